import { spawn } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { freshDirectory, jsonLines, lsync, lsyncOnTerminal, stable } from './lsync.ts'

/** `up` on `low`: `a` is replaced, `b` is new, `c` lies below alone. */
function layers(): string {
  const directory = freshDirectory()
  for (const name of ['up', 'low']) mkdirSync(`${directory}/${name}`)
  writeFileSync(`${directory}/low/a`, 'old')
  writeFileSync(`${directory}/low/c`, 'below')
  writeFileSync(`${directory}/up/a`, 'new')
  writeFileSync(`${directory}/up/b`, 'added')
  return directory
}

const MERGE = ['merge', '--upper', 'up', '--lower', 'low', '--namespace', 'user']

describe('merge --in-place', () => {
  test('folds the upper into the lower, says so in one line, and leaves the upper empty', () => {
    const cwd = layers()
    const { stdout, stderr, code } = lsync([...MERGE, '--in-place', '--yes'], { cwd })
    expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
    expect(stable(stdout, cwd)).toBe('merged into <T>/low in <time>: 2 placed, 0 removed\n')
    expect(readFileSync(`${cwd}/low/a`, 'utf8')).toBe('new')
    expect(readdirSync(`${cwd}/low`).sort()).toEqual(['a', 'b', 'c'])
    expect(readdirSync(`${cwd}/up`)).toEqual([])
    expect(readdirSync(cwd).sort()).toEqual(['low', 'up'])
  })

  test('needs --yes where there is no terminal, and changes nothing without', () => {
    const cwd = layers()
    const { stdout, stderr, code } = lsync([...MERGE, '--in-place'], { cwd, input: 'y\n' })
    expect({ stdout, code }).toEqual({ stdout: '', code: 2 })
    expect(stable(stderr, cwd)).toBe(
      'lsync: this uses up <T>/up, and there is no terminal to ask on; add --yes, or look first with --dry-run (USAGE)\n',
    )
    expect(readFileSync(`${cwd}/low/a`, 'utf8')).toBe('old')
  })

  test('asks on a terminal and goes on after y', () => {
    const cwd = layers()
    const { stdout, code } = lsyncOnTerminal([...MERGE, '--in-place'], { cwd, input: 'y\\n' })
    expect(stable(stdout, cwd)).toContain('this uses up <T>/up. Go on? [y/N]')
    expect(code).toBe(0)
    expect(readFileSync(`${cwd}/low/a`, 'utf8')).toBe('new')
  })

  test('asks on a terminal and changes nothing after anything else', () => {
    const cwd = layers()
    const { stdout, code } = lsyncOnTerminal([...MERGE, '--in-place'], { cwd, input: 'n\\n' })
    expect(stdout).toContain('lsync: not confirmed; nothing was changed (NOT_CONFIRMED)')
    expect(code).toBe(1)
    expect(readFileSync(`${cwd}/low/a`, 'utf8')).toBe('old')
  })

  test('--verify compares the result with what the stack showed before', () => {
    const { stdout, code } = lsync([...MERGE, '--in-place', '--yes', '--verify', '--json'], { cwd: layers() })
    expect(code).toBe(0)
    expect(jsonLines(stdout)).toEqual([
      expect.objectContaining({ type: 'merge', mode: 'in-place' }),
      expect.objectContaining({ type: 'verify', equal: true, total: 0, entries: 4 }),
    ])
  })
})

describe('merge --output', () => {
  test('makes a new tree, needs no --yes, and names the next command', () => {
    const cwd = layers()
    const { stdout, stderr, code } = lsync([...MERGE, '--output', 'new', '--clone', 'copy'], { cwd })
    expect(code).toBe(0)
    expect(stable(stdout, cwd)).toBe('merged to new <T>/new by copy in <time>: 2 placed, 0 removed\n')
    expect(stable(stderr, cwd)).toBe('next: lsync verify --stack <T>/up:<T>/low --against <T>/new --namespace user\n')
    expect(readFileSync(`${cwd}/new/a`, 'utf8')).toBe('new')
    expect(readFileSync(`${cwd}/low/a`, 'utf8')).toBe('old')
  })

  test('--verify compares the result and says by whom', () => {
    const { stdout, code } = lsync([...MERGE, '--output', 'new', '--verify', '--json'], { cwd: layers() })
    expect(code).toBe(0)
    expect(jsonLines(stdout)).toEqual([
      expect.objectContaining({ type: 'merge', mode: 'output' }),
      expect.objectContaining({ type: 'verify', equal: true, total: 0 }),
    ])
  })

  test('refuses a target that exists', () => {
    const cwd = layers()
    mkdirSync(`${cwd}/new`)
    const { stderr, code } = lsync([...MERGE, '--output', 'new'], { cwd })
    expect(code).toBe(1)
    expect(stable(stderr, cwd)).toMatch(/^lsync: <T>\/new exists; .* \(OUTPUT_EXISTS\)\n$/)
  })
})

describe('merge --dry-run', () => {
  test('changes nothing, needs no --yes, and says what it would do', () => {
    const cwd = layers()
    const { stdout, stderr, code } = lsync([...MERGE, '--in-place', '--dry-run'], { cwd })
    expect(code).toBe(0)
    expect(stable(stdout, cwd)).toBe('would merge into <T>/low in <time>: 2 placed, 0 removed\n')
    expect(stderr).toBe('next: the same command without --dry-run\n')
    expect(readFileSync(`${cwd}/low/a`, 'utf8')).toBe('old')
    expect(readdirSync(cwd).sort()).toEqual(['low', 'up'])
  })

  test('with --json prints the very plan, and the report last', () => {
    const cwd = layers()
    const { stdout, stderr, code } = lsync([...MERGE, '--in-place', '--dry-run', '--json'], { cwd })
    expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
    const lines = jsonLines(stdout)
    expect(lines.map(({ type }) => type)).toEqual(['header', 'directory', 'merge'])
    expect(lines[1]).toMatchObject({ path: '', steps: [{ name: 'a' }, { name: 'b' }] })
    expect(lines[2]).toMatchObject({ dryRun: true, counts: { created: 1, replaced: 1, removed: 0 } })
  })
})

test('with --json the report is one object', () => {
  const cwd = layers()
  const { stdout, stderr, code } = lsync([...MERGE, '--in-place', '--yes', '--json'], { cwd })
  expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
  expect(jsonLines(stdout)).toEqual([
    {
      type: 'merge',
      mode: 'in-place',
      target: `${cwd}/low`,
      counts: expect.objectContaining({ created: 1, replaced: 1, removed: 0 }),
      losses: [],
      recovered: false,
      dryRun: false,
      elapsedMs: expect.any(Number),
    },
  ])
})

test('a target that another lsync works on ends with exit code 4', async () => {
  const cwd = layers()
  mkdirSync(`${cwd}/.lsync.low`, { mode: 0o700 })
  const holder = spawn('flock', ['-x', `${cwd}/.lsync.low`, 'sh', '-c', 'echo held; exec sleep 60'])
  try {
    await new Promise((resolve) => holder.stdout.once('data', resolve))
    const { stderr, code } = lsync([...MERGE, '--in-place', '--yes'], { cwd })
    expect(stable(stderr, cwd)).toMatch(/^lsync: another lsync works on <T>\/.*low; .* \(TARGET_BUSY\)\n$/)
    expect(code).toBe(4)
  } finally {
    holder.kill()
  }
})

test('recover says that nothing was interrupted, in words and in JSON', () => {
  const cwd = layers()
  expect(lsync(['recover', 'low'], { cwd })).toEqual({
    stdout: 'nothing was interrupted on low\n',
    stderr: '',
    code: 0,
  })
  expect(jsonLines(lsync(['recover', 'low', '--json'], { cwd }).stdout)).toEqual([
    { type: 'recover', outcome: 'nothing', target: 'low', dryRun: false },
  ])
})

test('colour and progress appear on a terminal alone, and colour not with NO_COLOR', () => {
  const cwd = layers()
  const args = ['merge', '--upper', 'none', '--lower', 'low', '--output', 'new', '--namespace', 'user']
  expect(lsync(args, { cwd }).stderr).not.toContain('\x1b')
  expect(lsyncOnTerminal(args, { cwd }).stdout).toContain('\x1b[31mlsync: ')
  expect(lsyncOnTerminal(args, { cwd, env: { NO_COLOR: '1' } }).stdout).not.toContain('\x1b[31m')
  expect(existsSync(`${cwd}/new`)).toBe(false)
})
