import { type ChildProcessWithoutNullStreams, spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { chmodSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { describe, expect, test } from 'vitest'
import { openSource } from '../../packages/sync/src/source/choose.ts'
import { hasBindfs, mayMount } from '../posix/privileges.ts'
import { temporary } from '../posix/temporary.ts'
import { withFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { isPresent, run, unmount } from '../support/system.ts'
import { watching } from './hints.ts'

const watcher = fileURLToPath(new URL('./idle-watcher.ts', import.meta.url))
const UNPRIVILEGED = ['setpriv', '--reuid=65534', '--regid=65534', '--clear-groups', '--bounding-set=-all']

const auto = (root: string) => watching(root, openSource)

interface Watcher {
  readonly child: ChildProcessWithoutNullStreams
  readonly ready: { readonly ready: string; readonly tookMs: number }
  ask(): Promise<{ readonly hints: number; readonly residentBytes: number }>
}

/** Runs a process that watches a root, behind `prefix`, for as long as `use` takes. */
async function withWatcher<T>(
  prefix: readonly string[],
  root: string,
  use: (watcher: Watcher) => Promise<T>,
): Promise<T> {
  const [command = '', ...args] = [...prefix, process.execPath, watcher, root]
  const child = spawn(command, args)
  let complaint = ''
  child.stderr.on('data', (text) => {
    complaint += text
  })
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]()
  const line = async () => {
    const { value, done } = await lines.next()
    if (done) throw new Error(`the watcher ended: ${complaint}`)
    return JSON.parse(value)
  }
  const ended = once(child, 'exit')
  try {
    const ready = await line()
    return await use({
      child,
      ready,
      ask: () => {
        child.stdin.write('?\n')
        return line()
      },
    })
  } finally {
    child.stdin.end()
    await ended
  }
}

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
    await withWatcher(UNPRIVILEGED, path, async ({ ready, ask }) => {
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
    await withWatcher(['unshare', '-U', '-r', 'sh', '-c', limited, 'sh'], path, async ({ ready, ask }) => {
      expect(ready.ready).toBe('poll')
      writeFileSync(`${path}/7/f`, '')
      expect((await ask()).hints).toBeGreaterThan(0)
    })
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

const mayTrace = needs('strace', isPresent('strace'))

describe.skipIf(!mayMount || !mayTrace)('a watch on 100,000 directories', () => {
  test('is ready at once, makes no system call while nothing happens, and stays small', () =>
    withFileSystem('tmpfs', async ({ root }) => {
      for (let i = 0; i < 1000; i++) {
        mkdirSync(`${root}/${i}`)
        for (let j = 0; j < 99; j++) mkdirSync(`${root}/${i}/${j}`)
      }
      await withWatcher([], root, async ({ child, ready, ask }) => {
        expect(ready).toMatchObject({ ready: 'fanotify' })
        expect(ready.tookMs).toBeLessThan(1000)
        const switches = contextSwitchesOf(child.pid as number)
        const calls = countCalls(child.pid as number, 6)
        expect(calls).toBeLessThan(100)
        expect(contextSwitchesOf(child.pid as number) - switches).toBeLessThan(500)
        // The counting itself: with something to do there are calls.
        const busy = spawn('sh', ['-c', `for i in 1 2 3 4 5 6; do echo > ${root}/999/98/f; sleep 0.5; done`])
        expect(countCalls(child.pid as number, 2)).toBeGreaterThan(calls)
        await once(busy, 'exit')
        const { hints, residentBytes } = await ask()
        expect(hints).toBeGreaterThan(0)
        expect(residentBytes).toBeLessThan(120e6)
      })
    }))
})

/** All calls of all threads of a process in so many seconds, counted by strace. */
function countCalls(pid: number, seconds: number): number {
  const log = `/tmp/lsync-strace-${process.pid}`
  const { error } = spawnSync('timeout', [
    '--signal=INT',
    String(seconds),
    ...['strace', '-f', '-c', '-S', 'calls', '-o', log, '-p', String(pid)],
  ])
  if (error !== undefined) throw error
  const table = readFileSync(log, 'utf8')
  run('rm', log)
  if (!table.includes('% time') && table.trim() !== '') throw new Error(`strace says ${table}`)
  // The last line is the total: percent, seconds, microseconds a call, calls, errors.
  const total = table.split('\n').find((line) => line.trim().endsWith('total'))
  return total === undefined ? 0 : Number(total.trim().split(/\s+/)[3])
}

function contextSwitchesOf(pid: number): number {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8')
  return Number(/^voluntary_ctxt_switches:\s*(\d+)/m.exec(status)?.[1])
}
