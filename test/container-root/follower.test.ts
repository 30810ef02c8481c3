import { appendFileSync, existsSync, readFileSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { ContainerRoot, type LayerStorage } from '@lsync/container-root'
import { describe, expect, test } from 'vitest'
import { dir, file } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { canMountImages } from '../support/ready.ts'
import { changesSince, makeSite, type Site, shown, withRoot } from './roots.ts'

/** Runs `use` while another object, as a process of its own, follows the root; gives how often it began with an upper. */
async function whileFollowed(site: Site, use: (follower: ContainerRoot) => Promise<void>): Promise<number> {
  const root = await ContainerRoot.open(site.home, 'lab', { state: site.node('one') })
  const end = new AbortController()
  let began = 0
  root.events.on('following', () => began++)
  const followed = root.follow({ signal: end.signal })
  try {
    await until(() => began === 1 && existsSync(`${root.statePath}/follower.sock`))
    await use(root)
  } finally {
    end.abort()
    await followed
    await root.close()
  }
  return began
}

async function until(holds: () => boolean | Promise<boolean>): Promise<void> {
  while (!(await holds())) await delay(20)
}

describe.skipIf(!canMountImages())('a root that another process follows', () => {
  const disk = useFileSystem('ext4')
  const site = (layerForm: LayerStorage) => {
    const at = disk.current.fresh()
    return makeSite(at, at, dir({ etc: dir({ hostname: file('base\n') }) }), layerForm)
  }

  test.each<LayerStorage>(['tree', 'sealed'])(
    'is solidified, live or not, and followed again (%s)',
    async (layerForm) => {
      const made = await site(layerForm)
      await withRoot(made, 'one', async (root) => {
        await root.mount()
        const began = await whileFollowed(made, async (follower) => {
          for (const live of [true, false]) {
            appendFileSync(`${root.mergedPath}/etc/hostname`, `${live}\n`)
            const before = shown(root)
            await root.solidify({ live })
            expect(changesSince(before, root)).toEqual([])
            await until(async () => (await follower.status()).sync !== undefined)
          }
          writeFileSync(`${root.mergedPath}/etc/last`, 'x')
          await until(async () => ((await follower.status()).sync?.targets[0]?.files ?? 0) > 0)
          expect((await root.status()).sync?.targets).toHaveLength(1)
        })
        expect(began).toBe(3)
        expect(root.versions().map(({ number }) => number)).toEqual([1, 2, 3])
        await root.unmount()
        await withRoot(made, 'two', async (other) => {
          await expect(other.mount()).rejects.toMatchObject({ code: 'LEASE_HELD' })
        })
        await root.solidify()
        await root.unmount()
        await withRoot(made, 'two', async (other) => {
          await other.mount()
          expect(readFileSync(`${other.mergedPath}/etc/hostname`, 'utf8')).toBe('base\ntrue\nfalse\n')
          expect(existsSync(`${other.mergedPath}/etc/last`)).toBe(true)
        })
      })
    },
  )

  test('is unmounted, rolled back and mounted, and nothing follows what was given up', async () => {
    const made = await site('tree')
    await withRoot(made, 'one', async (root) => {
      await root.mount()
      appendFileSync(`${root.mergedPath}/etc/hostname`, 'more\n')
      await root.solidify()
      await whileFollowed(made, async (follower) => {
        await root.unmount()
        await root.rollback({ to: 1 })
        await root.unmount()
        // Nobody has it now, and nobody takes it.
        await delay(600)
        expect((await follower.status()).sync).toBeUndefined()
        await withRoot(made, 'two', async (other) => {
          await other.mount()
          appendFileSync(`${other.mergedPath}/etc/hostname`, 'two\n')
          await other.solidify()
          await other.unmount()
        })
        await root.mount()
        await until(async () => (await follower.status()).sync !== undefined)
        expect(readFileSync(`${root.mergedPath}/etc/hostname`, 'utf8')).toBe('base\ntwo\n')
      })
    })
  })

  test('is followed by one at a time', async () => {
    const made = await site('tree')
    await withRoot(made, 'one', async (root) => {
      await root.mount()
      await whileFollowed(made, async () => {
        await expect(root.follow({ signal: new AbortController().signal })).rejects.toMatchObject({ code: 'ROOT_BUSY' })
      })
      await whileFollowed(made, async () => undefined)
    })
  })
})
