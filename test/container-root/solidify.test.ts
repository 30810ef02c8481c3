import { appendFileSync, chmodSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { richTree } from '../layers/rich-tree.ts'
import { useFileSystem } from '../support/image.ts'
import { canMountImages } from '../support/ready.ts'
import { changesSince, makeSite, shown, withRoot } from './roots.ts'

describe.skipIf(!canMountImages())('a root on ext4', () => {
  const disk = useFileSystem('ext4')

  test('shows the same before and after solidify', async () => {
    const at = disk.current.fresh()
    const site = await makeSite(at, at, richTree())
    await withRoot(site, 'one', async (root) => {
      await root.mount()
      const merged = root.mergedPath
      writeFileSync(`${merged}/dots/...`, 'changed\n')
      rmSync(`${merged}/old`)
      renameSync(`${merged}/bytes`, `${merged}/moved`)
      chmodSync(`${merged}/binary`, 0o700)
      const before = shown(root)
      const report = await root.solidify({ message: 'first', tags: ['t'] })
      expect(report.version).toMatchObject({ number: 2, parent: 1, madeBy: 'solidify', epoch: 1, message: 'first' })
      expect(changesSince(before, root)).toEqual([])
      expect(root.versions().map(({ number }) => number)).toEqual([1, 2])
      expect(await root.status()).toMatchObject({ isMounted: true, hasChanges: false, version: 2, head: 2, errors: [] })
      // And again, with changes on changes.
      appendFileSync(`${merged}/dots/...`, 'more\n')
      const again = shown(root)
      await root.solidify()
      expect(changesSince(again, root)).toEqual([])
      await root.unmount()
      // Another node has only the store.
      await withRoot(site, 'two', async (other) => {
        await other.mount()
        expect(changesSince(again, other)).toEqual([])
        expect(readFileSync(`${other.mergedPath}/dots/...`, 'utf8')).toBe('changed\nmore\n')
      })
    })
  })
})
