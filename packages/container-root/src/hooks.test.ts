import { readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { setTimeout as delay } from 'node:timers/promises'
import { randomHex } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { type Hooks, presetHooks, runHook } from './hooks.ts'

const context = { root: 'lab', merged: '/srv/lab', node: 'one', reason: 'switch' }
const run = (hooks: Hooks, name: keyof Hooks, signal?: AbortSignal) => runHook(hooks, name, context, signal)

describe('hooks', () => {
  test('what is absent is not run', async () => {
    expect(await run({}, 'stop')).toBeUndefined()
  })

  test('a hook is told about the root, and its output is kept', async () => {
    const command = 'echo "$LSYNC_HOOK $LSYNC_ROOT $LSYNC_MERGED $LSYNC_NODE $LSYNC_REASON"; echo loud >&2'
    expect(await run({ stop: { command } }, 'stop')).toMatchObject({
      hook: 'stop',
      runs: 1,
      output: 'stop lab /srv/lab one switch\nloud\n',
    })
  })

  test('only the last of a long output is kept', async () => {
    const report = await run({ stop: { command: 'yes | head -c 300000; echo end' } }, 'stop')
    expect(report?.output).toHaveLength(65_536)
    expect(report?.output.endsWith('y\nend\n')).toBe(true)
  })

  test('another exit code than 0 is a failure, and says what it said last', async () => {
    await expect(run({ start: { command: 'echo no such bundle >&2; exit 3' } }, 'start')).rejects.toMatchObject({
      code: 'HOOK_FAILED',
      message: 'the start hook ended with 3; it said last: no such bundle',
    })
    await expect(run({ start: { command: 'kill -9 $$' } }, 'start')).rejects.toThrow('ended by SIGKILL')
  })

  test('after its time it is killed, with all that it started', async () => {
    const file = `${tmpdir()}/lsync-hook-test-${randomHex(8)}`
    const command = `trap '' TERM; sh -c 'trap "" TERM; sleep 300 & echo $$ $! > ${file}; wait' & sleep 300; sleep 300`
    await expect(run({ stop: { command, timeoutMs: 1000 } }, 'stop')).rejects.toMatchObject({ code: 'HOOK_TIMEOUT' })
    const pids = readFileSync(file, 'utf8').trim().split(' ').map(Number)
    expect(pids).toHaveLength(2)
    for (const pid of pids) {
      for (let look = 0; isAlive(pid) && look < 100; look++) await delay(50)
      expect(isAlive(pid)).toBe(false)
    }
    rmSync(file)
  })

  test('what a start hook leaves running is left running, and waited for by nobody', async () => {
    const report = await run({ start: { command: 'sleep 300 & echo $!' } }, 'start')
    const pid = Number(report?.output)
    expect(isAlive(pid)).toBe(true)
    process.kill(pid, 'SIGKILL')
    expect(report?.durationMs).toBeLessThan(60_000)
  })

  test('health is asked until it is well, or its time is over', async () => {
    const file = `${tmpdir()}/lsync-hook-test-${randomHex(8)}`
    const command = `echo x >> ${file}; [ $(wc -l < ${file}) -ge 3 ]`
    expect(await run({ health: { command } }, 'health')).toMatchObject({ runs: 3 })
    rmSync(file)
    await expect(run({ health: { command: 'echo ill; false', timeoutMs: 700 } }, 'health')).rejects.toMatchObject({
      code: 'HOOK_TIMEOUT',
      output: 'ill\n',
    })
  })

  test('a signal ends it', async () => {
    const running = run({ stop: { command: 'sleep 300' } }, 'stop', AbortSignal.timeout(200))
    await expect(running).rejects.toMatchObject({ name: 'TimeoutError' })
  })

  test('the presets quote what they are given', () => {
    const { start, stop } = presetHooks('runc', { container: 'a', bundle: "/srv/b; rm -rf '/'" })
    expect(start?.command).toContain(`--bundle '/srv/b; rm -rf '\\''/'\\'''`)
    expect(stop?.timeoutMs).toBe(40_000)
    expect(presetHooks('docker', { container: 'web', stopSeconds: 3 }).stop?.command).toBe('docker stop --time 3 web')
  })
})

function isAlive(pid: number): boolean {
  try {
    // A zombie whose parent has not looked yet has ended.
    return !/^State:\s+Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'))
  } catch {
    return false
  }
}
