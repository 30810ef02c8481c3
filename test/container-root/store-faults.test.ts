import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { type Hooks, LocalPeer, SwitchSide, switchRoot, writeHooks } from '@lsync/container-root'
import { describe, expect, onTestFinished, test } from 'vitest'
import { dir, file } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { canMountImages } from '../support/ready.ts'
import { mount, run, unmount } from '../support/system.ts'
import { changesSince, makeSite, type Site, shown, withRoot } from './roots.ts'

describe.skipIf(!canMountImages())('a store that fails', () => {
  const disk = useFileSystem('ext4')

  /** A home on a file system of its own, with room for so much. */
  async function setUp(sizeMiB: number): Promise<{ site: Site; store: string }> {
    const at = disk.current.fresh()
    const store = `${at}/store`
    mkdirSync(store)
    mount('tmpfs', store, 'tmpfs', 0, `size=${sizeMiB}m`)
    onTestFinished(() => void unmount(store))
    return { site: await makeSite(store, at, dir({ etc: dir({ hostname: file('lab') }) })), store }
  }

  const big = Buffer.alloc(6 << 20, 'x')

  test.each([false, true])('that is full publishes nothing and loses nothing (live: %s)', async (live) => {
    const { site, store } = await setUp(4)
    await withRoot(site, 'one', async (root) => {
      await root.mount()
      writeFileSync(`${root.mergedPath}/big`, big)
      const before = shown(root)
      await expect(root.solidify({ live })).rejects.toMatchObject({ code: 'BATCH_FAILED' })
      expect(root.versions()).toHaveLength(1)
      expect(changesSince(before, root)).toEqual([])
      // The container goes on, and there is room again.
      writeFileSync(`${root.mergedPath}/more`, 'more')
      run('mount', '-o', 'remount,size=64m', store)
      const { version } = await root.solidify({ live })
      expect(version.layers).toHaveLength(2)
      await root.unmount()
      if (live) {
        // Its upper stays with what the version has, and the lease with it, until it is given up.
        await root.rollback({ to: version.number, discard: true })
        await root.unmount()
      }
      await withRoot(site, 'two', async (other) => {
        await other.mount()
        expect(readFileSync(`${other.mergedPath}/big`).equals(big)).toBe(true)
        expect(readFileSync(`${other.mergedPath}/more`, 'utf8')).toBe('more')
      })
    })
  })

  test('that is full when a root is switched leaves it where it is, and takes it over once there is room', async () => {
    const { site, store } = await setUp(4)
    const hooks = (node: string): Hooks => ({
      stop: { command: `rm ${store}.runs-on-${node}` },
      start: { command: `touch ${store}.runs-on-${node}` },
    })
    await withRoot(site, 'one', (root) =>
      withRoot(site, 'two', async (other) => {
        writeHooks(root, hooks('one'))
        writeHooks(other, hooks('two'))
        await root.mount()
        writeFileSync(`${store}.runs-on-one`, '')
        const change = () => {
          const [source, target] = [new LocalPeer(new SwitchSide(root)), new LocalPeer(new SwitchSide(other))]
          return switchRoot({ name: 'lab', source, target, maxDowntimeMs: 60_000 })
        }
        // Full before it is stopped, and full of what it wrote at last.
        for (const fill of [
          () => writeFileSync(`${root.mergedPath}/big`, big),
          () =>
            writeHooks(root, {
              ...hooks('one'),
              stop: { command: `rm ${store}.runs-on-one; cat /dev/zero > ${store}/fill; :` },
            }),
        ]) {
          fill()
          const before = shown(root)
          await expect(change()).rejects.toBeInstanceOf(Error)
          expect([existsSync(`${store}.runs-on-one`), existsSync(`${store}.runs-on-two`)]).toEqual([true, false])
          expect(changesSince(before, root)).toEqual([])
          expect(root.versions()).toHaveLength(1)
          run('mount', '-o', 'remount,size=64m', store)
        }
        const before = shown(root)
        rmSync(`${store}/fill`)
        writeHooks(root, hooks('one'))
        await change()
        expect([existsSync(`${store}.runs-on-one`), existsSync(`${store}.runs-on-two`)]).toEqual([false, true])
        expect(changesSince(before, other)).toEqual([])
      }),
    )
  })
})
