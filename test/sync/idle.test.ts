import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdirSync, readFileSync } from 'node:fs'
import { beforeAll, describe, expect, test, vi } from 'vitest'
import { mayMount } from '../posix/privileges.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { isPresent, run } from '../support/system.ts'
import { withIdle } from './idle.ts'

const mayTrace = needs('strace', isPresent('strace'))

function makeDirectories(root: string, count: number): void {
  for (let i = 0; i * 100 < count; i++) {
    mkdirSync(`${root}/${i}`)
    for (let j = 0; j < 99; j++) mkdirSync(`${root}/${i}/${j}`)
  }
}

/** Something to do every half second, for as long as the calls are counted: with it there must be some. */
async function countCallsWhileBusy(pid: number, file: string): Promise<number> {
  const busy = spawn('sh', ['-c', `for i in 1 2 3 4 5 6; do echo > ${file}; sleep 0.5; done`])
  const calls = countCalls(pid, 2)
  await once(busy, 'exit')
  return calls
}

describe.skipIf(!mayMount || !mayTrace)('on 100,000 directories', () => {
  const fs = useFileSystem('tmpfs')
  const upper = () => `${fs.current.root}/upper`
  beforeAll(() => {
    mkdirSync(upper())
    makeDirectories(upper(), 100_000)
  })

  test('a watch is ready at once, and makes no system call while nothing happens', () =>
    withIdle<{ hints: number; residentBytes: number }>([], 'watcher', [upper()], async ({ child, ready, ask }) => {
      expect(ready.ready).toBe('fanotify')
      // 15 ms where nothing else runs: what it must not do is walk.
      expect(ready.tookMs).toBeLessThan(1000)
      const calls = countCalls(child.pid as number, 5)
      expect(calls).toBeLessThan(100)
      expect(await countCallsWhileBusy(child.pid as number, `${upper()}/999/98/f`)).toBeGreaterThan(calls)
      const { hints, residentBytes } = await ask()
      expect(hints).toBeGreaterThan(0)
      expect(residentBytes).toBeLessThan(140e6)
    }))

  test('a sync that follows them makes none either', async () => {
    const [target, state] = [`${fs.current.root}/target`, `${fs.current.root}/state`]
    await withIdle<{ failures: number }>([], 'sync', [upper(), target, state], async ({ child, ready, ask }) => {
      expect(ready.ready).toBe('fanotify')
      expect(existsSync(`${target}/999/98`)).toBe(true)
      // What the first pass took is given back some seconds after it.
      const after = residentBytes(child.pid as number)
      await vi.waitFor(() => expect(residentBytes(child.pid as number)).toBeLessThan(after - 30e6), 60_000)
      // What follows a first pass (buffers given back, code compiled anew) is over after a while.
      await new Promise((resolve) => setTimeout(resolve, 3000))
      const calls = countCalls(child.pid as number, 5)
      expect(calls).toBeLessThan(300)
      expect(await countCallsWhileBusy(child.pid as number, `${upper()}/999/98/g`)).toBeGreaterThan(calls)
      expect(await ask()).toMatchObject({ failures: 0 })
      expect(existsSync(`${target}/999/98/g`)).toBe(true)
    })
  })
})

function residentBytes(pid: number): number {
  return 1024 * Number(/^VmRSS:\s*(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1])
}

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
