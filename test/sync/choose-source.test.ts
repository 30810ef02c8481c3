import { chmodSync, mkdirSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { openSource } from '../../packages/sync/src/source/choose.ts'
import { hasBindfs, mayMount } from '../posix/privileges.ts'
import { temporary } from '../posix/temporary.ts'
import { withFileSystem } from '../support/image.ts'
import { run, unmount } from '../support/system.ts'
import { watching } from './hints.ts'
import { withIdle } from './idle.ts'

const UNPRIVILEGED = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups', '--bounding-set=-all']

/** What idle-watcher.ts answers. */
interface Watched {
  readonly hints: number
}

const auto = (root: string) => watching(root, openSource)

describe.skipIf(!mayMount)('the source that is chosen', () => {
  test('is fanotify where the process may mark the file system', () =>
    withFileSystem('ext4', async ({ root }) => {
      const watched = await auto(root)
      expect(watched.source.kind).toBe('fanotify')
      expect(watched.source.blindSpots.map(({ code }) => code)).toEqual(['MAPPED_WRITES', 'PREPARED_DIRECTORIES'])
      await watched.stop()
    }))

  test('is chokidar in a btrfs subvolume, which takes no mark', () =>
    withFileSystem('btrfs', async ({ root }) => {
      run('btrfs', 'subvolume', 'create', `${root}/sub`)
      const watched = await auto(`${root}/sub`)
      expect(watched.source.kind).toBe('chokidar')
      writeFileSync(`${root}/sub/f`, '')
      expect(await watched.said()).toContain('f')
      await watched.stop()
    }))

  test('is chokidar for a process without privileges', async () => {
    const { path } = temporary()
    chmodSync(path, 0o777)
    await withIdle<Watched>(UNPRIVILEGED, 'watcher', [path], async ({ ready, ask }) => {
      expect(ready.ready).toBe('chokidar')
      writeFileSync(`${path}/f`, '')
      expect((await ask()).hints).toBeGreaterThan(0)
    })
  })

  test('is poll where the tree has more directories than may be watched', async () => {
    const { path } = temporary()
    for (let i = 0; i < 20; i++) mkdirSync(`${path}/${i}`)
    // A user namespace has limits of its own, so the machine's stay as they are.
    const limited = 'echo 10 > /proc/sys/user/max_inotify_watches; exec "$@"'
    await withIdle<Watched>(
      ['unshare', '-U', '-r', 'sh', '-c', limited, 'sh'],
      'watcher',
      [path],
      async ({ ready, ask }) => {
        expect(ready.ready).toBe('poll')
        writeFileSync(`${path}/7/f`, '')
        expect((await ask()).hints).toBeGreaterThan(0)
      },
    )
  })

  test.skipIf(!hasBindfs())('is poll on FUSE, which sees what is written behind the mount', async () => {
    const { path } = temporary()
    for (const name of ['store', 'mounted']) mkdirSync(`${path}/${name}`)
    run('bindfs', `${path}/store`, `${path}/mounted`)
    try {
      const watched = await auto(`${path}/mounted`)
      expect(watched.source.kind).toBe('poll')
      writeFileSync(`${path}/store/f`, '')
      expect(await watched.said()).toContain('f')
      await watched.stop()
      const byChoice = await watching(`${path}/mounted`, openSource, { choice: 'chokidar' })
      expect(byChoice.source.blindSpots[0]).toMatchObject({
        code: 'REMOTE_WRITES',
        message: expect.stringContaining('FUSE'),
      })
      await byChoice.stop()
      await expect(watching(`${path}/mounted`, openSource, { choice: 'fanotify' })).rejects.toMatchObject({
        code: 'SOURCE_UNAVAILABLE',
      })
    } finally {
      unmount(`${path}/mounted`)
    }
  })
})
