import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { freshDirectory, jsonLines, lsync, startLsync } from './lsync.ts'

function site() {
  const directory = freshDirectory()
  mkdirSync(`${directory}/up/d`, { recursive: true })
  writeFileSync(`${directory}/up/d/f`, 'content')
  const args = (...more: string[]) => ['sync', ...more, '--state', `${directory}/state`]
  return { directory, upper: `${directory}/up`, target: `${directory}/copy`, args }
}

test('sync --once copies, a dry run says what the next one would do, and nothing else is written', () => {
  const { upper, target, args } = site()
  expect(lsync(args(upper, target, '--dry-run'))).toMatchObject({ stdout: 'new      (everything)\n', code: 0 })
  expect(existsSync(target)).toBe(false)
  const first = lsync(args(upper, target, '--once', '--json'))
  expect(first.code).toBe(0)
  expect(jsonLines(first.stdout).at(-1)).toMatchObject({ type: 'done', files: 1, bytes: 7, failures: [] })
  expect(readFileSync(`${target}/d/f`, 'utf8')).toBe('content')
  writeFileSync(`${upper}/d/f`, 'another')
  rmSync(`${upper}/d/f`)
  expect(lsync(args(upper, target, '--dry-run')).stdout).toContain('gone     d/f\n')
  expect(readFileSync(`${target}/d/f`, 'utf8')).toBe('content')
})

test('a running sync answers flush, pause, resume and status, lets no second one in, and ends with a barrier', async () => {
  const { directory, upper, target, args } = site()
  expect(lsync(args('flush', upper))).toMatchObject({ code: 1, stderr: expect.stringContaining('SYNC_NOT_RUNNING') })
  const { child, ended } = startLsync(args(upper, target, '--json', '--tick', '20ms'))
  const socket = `${directory}/state/control.sock`
  while (!existsSync(socket) && child.exitCode === null) await sleep(20)
  expect(statSync(socket).mode & 0o777).toBe(0o600)
  writeFileSync(`${upper}/d/g`, 'more')
  const flushed = lsync(args('flush', upper, '--json'))
  expect(jsonLines(flushed.stdout)).toMatchObject([{ type: 'flush', isSettled: true, failures: [] }])
  expect(readFileSync(`${target}/d/g`, 'utf8')).toBe('more')
  expect(lsync(args(upper, `${directory}/other`, '--once'))).toMatchObject({ code: 4 })
  expect(jsonLines(lsync(args('pause', upper, '--json')).stdout)).toMatchObject([{ isPaused: true }])
  writeFileSync(`${upper}/d/h`, 'paused')
  expect(jsonLines(lsync(args('status', upper, '--json')).stdout)).toMatchObject([
    { isPaused: true, targets: [{ target, failures: [] }] },
  ])
  expect(existsSync(`${target}/d/h`)).toBe(false)
  expect(lsync(args('resume', upper)).code).toBe(0)
  writeFileSync(`${upper}/d/last`, 'at the end')
  child.kill('SIGTERM')
  const { stdout, code } = await ended
  expect(code).toBe(0)
  expect(jsonLines(stdout).at(-1)).toMatchObject({ type: 'done' })
  for (const name of ['h', 'last']) expect(existsSync(`${target}/d/${name}`)).toBe(true)
  expect(existsSync(socket)).toBe(false)
})

test('Ctrl-C ends a sync as it ends everything else, and a signal in a first pass stops it at a checkpoint', async () => {
  const { upper, target, args } = site()
  for (let index = 0; index < 400; index++) {
    mkdirSync(`${upper}/${index}`)
    for (let file = 0; file < 5; file++) writeFileSync(`${upper}/${index}/${file}`, 'content')
  }
  // Twenty seconds for a first pass at this rate.
  const { child, ended } = startLsync(args(upper, target, '--json', '--iops', '100'))
  const hasBegun = () => existsSync(target) && readdirSync(target).some((name) => existsSync(`${target}/${name}/4`))
  while (!hasBegun() && child.exitCode === null) await sleep(20)
  writeFileSync(`${upper}/d/f`, 'changed')
  child.kill('SIGINT')
  const { stdout, code } = await ended
  expect(code).toBe(130)
  const last = jsonLines(stdout).at(-1) as { queuedDirectories: number }
  expect(last.queuedDirectories).toBeGreaterThan(100)
  expect(readFileSync(`${target}/d/f`, 'utf8')).toBe('changed')
  const { stdout: again } = lsync(args(upper, target, '--once', '--json'))
  const { bytes } = jsonLines(again).at(-1) as { bytes: number }
  expect(bytes).toBeLessThan(2000 * 7)
  expect(readdirSync(target)).toHaveLength(401)
})

test.each([
  ['a verb without an upper', ['sync', 'flush', 'a', 'b']],
  ['a target of another kind', ['sync', '/tmp', 'ftp://host/path']],
  ['a rate that is none', ['sync', '/tmp', '/nowhere', '--bwlimit', 'fast']],
])('%s is refused', (_, args) => {
  const { code, stderr } = lsync(args)
  expect(code).not.toBe(0)
  expect(stderr.trimEnd().split('\n')).toHaveLength(1)
})
