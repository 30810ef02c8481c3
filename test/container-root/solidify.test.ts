import { readFileSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { richTree } from '../layers/rich-tree.ts'
import { useFileSystem } from '../support/image.ts'
import { hasMooseFs, mooseFsLimits, useMooseFs } from '../support/moosefs.ts'
import { needs } from '../support/needs.ts'
import { canMountImages } from '../support/ready.ts'
import { life } from './life.ts'
import { makeSite, withRoot } from './roots.ts'

describe.skipIf(!canMountImages())('a root shows what was written to it', () => {
  describe.each(['ext4', 'xfs', 'btrfs', 'tmpfs'] as const)('on %s', (kind) => {
    const disk = useFileSystem(kind)

    test('through solidify, live solidify, compact, gc, another node and rollback', async () => {
      const at = disk.current.fresh()
      await life(await makeSite(at, at, richTree()), {})
    }, 120_000)
  })
})

describe.skipIf(!canMountImages())('a root that was never mounted here', () => {
  const disk = useFileSystem('ext4')

  test.each([
    [false, false],
    [true, false],
    [true, true],
  ])('has versions all the same (live: %s, followed: %s)', async (live, isFollowed) => {
    const at = disk.current.fresh()
    await withRoot(await makeSite(at, at, richTree()), 'one', async (root) => {
      if (isFollowed) await root.startSync()
      await root.solidify({ live })
      expect(root.versions().map(({ number }) => number)).toEqual([1, 2])
      await root.mount()
      expect(readFileSync(`${root.mergedPath}/dots/...`, 'utf8')).not.toBe('')
    })
  })

  test('is rolled back while it is followed, and followed again', async () => {
    const at = disk.current.fresh()
    await withRoot(await makeSite(at, at, richTree()), 'one', async (root) => {
      await root.startSync()
      await root.rollback({ to: 1 })
      const sync = await root.startSync()
      expect((await sync.flush()).failures).toEqual([])
      await root.mount()
      writeFileSync(`${root.mergedPath}/new`, 'new')
      expect((await root.solidify()).version.number).toBe(3)
    })
  })
})

describe.skipIf(!needs('MooseFS', hasMooseFs) || !canMountImages())('a root whose home is on MooseFS', () => {
  const store = useMooseFs()
  const disk = useFileSystem('ext4')

  test('shows what was written to it, on any node', async () => {
    await life(await makeSite(store.current.fresh(), disk.current.fresh(), richTree()), mooseFsLimits)
  }, 180_000)
})
