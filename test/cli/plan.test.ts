import { appendFileSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { bash, freshDirectory, jsonLines, lsync, stable } from './lsync.ts'

const MARKS = '--namespace user'
const LAYERS = ['--upper', 'up', '--lower', 'low']

/** `up` on `low`: `a` is replaced, `new/b` is new, `gone` is deleted, `c` lies below alone; the same in `u2`, `l2`. */
function layers(): string {
  const directory = freshDirectory()
  for (const name of ['up', 'low']) mkdirSync(`${directory}/${name}`)
  writeFileSync(`${directory}/low/a`, 'old')
  writeFileSync(`${directory}/low/c`, 'below')
  writeFileSync(`${directory}/low/gone`, 'x')
  writeFileSync(`${directory}/up/a`, 'new')
  mkdirSync(`${directory}/up/new`)
  // U+2028 ends a line for some programs.
  writeFileSync(`${directory}/up/new/b\u2028`, 'added')
  bash('mknod up/gone c 0 0 && cp -a up u2 && cp -a low l2 && chown --reference=up u2', { cwd: directory })
  return directory
}

function snapshot(cwd: string): string {
  return bash("find up low u2 l2 -printf '%p %y %m %u %s %T@\\n' | sort; cat low/a l2/a", { cwd }).stdout
}

function planOf(cwd: string): string[] {
  const { stdout, stderr, code } = lsync(['plan', ...LAYERS, ...MARKS.split(' '), '--json'], { cwd })
  expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
  return stdout.split('\n').filter((line) => line !== '')
}

function apply(cwd: string, lines: readonly string[]): ReturnType<typeof lsync> {
  writeFileSync(`${cwd}/plan`, lines.map((line) => `${line}\n`).join(''))
  return lsync(['apply', 'plan', ...LAYERS, '--yes'], { cwd })
}

describe('plan', () => {
  test('shows one line a step, and changes nothing', () => {
    const cwd = layers()
    const before = snapshot(cwd)
    const { stdout, stderr, code } = lsync(['plan', ...LAYERS, ...MARKS.split(' ')], { cwd })
    expect({ stdout, stderr, code }).toEqual({
      stdout: [
        'replace a',
        'remove gone',
        'add new with all that is in it',
        '3 steps in 1 directories, by renaming',
        '',
      ].join('\n'),
      stderr: 'next: the same command with --json makes the plan for `lsync apply`\n',
      code: 0,
    })
    expect(snapshot(cwd)).toBe(before)
  })

  test('--json writes a header, records and an end; --copy plans for two file systems', () => {
    const cwd = layers()
    const { stdout, code } = lsync(['plan', ...LAYERS, ...MARKS.split(' '), '--copy', '--json'], { cwd })
    expect(code).toBe(0)
    const lines = jsonLines(stdout)
    expect(lines.at(0)).toMatchObject({ type: 'header', portable: true, rename: false })
    expect(lines.at(-1)).toMatchObject({ type: 'end', records: lines.length - 2 })
  })
})

describe('apply', () => {
  test('what plan wrote, read from a pipe, gives what merge --in-place gives', () => {
    const cwd = layers()
    const piped = bash(
      `set -o pipefail; lsync plan --upper up --lower low ${MARKS} --json | lsync apply - --upper up --lower low --yes`,
      { cwd },
    )
    expect(piped).toMatchObject({ stderr: '', code: 0 })
    expect(stable(piped.stdout, cwd)).toBe('applied to <T>/low in <time>: 3 steps in 1 directories\n')
    expect(
      lsync(['merge', '--upper', 'u2', '--lower', 'l2', ...MARKS.split(' '), '--in-place', '--yes'], { cwd }).code,
    ).toBe(0)
    const verified = lsync(['verify', '--stack', 'low', '--against', 'l2', ...MARKS.split(' '), '--json'], { cwd })
    expect(jsonLines(verified.stdout)).toEqual([expect.objectContaining({ type: 'verify', equal: true })])
    expect(readFileSync(`${cwd}/low/a`, 'utf8')).toBe('new')
    expect(readdirSync(`${cwd}/up`)).toEqual([])
    expect(readdirSync(`${cwd}/low/new`)).toEqual(['b\u2028'])
    expect(readdirSync(cwd).sort()).toEqual(['l2', 'low', 'u2', 'up'])
  })

  test('--dry-run checks everything and changes nothing; --json tells what would be done', () => {
    const cwd = layers()
    writeFileSync(`${cwd}/plan`, `${planOf(cwd).join('\n')}\n`)
    const before = snapshot(cwd)
    const { stdout, stderr, code } = lsync(['apply', 'plan', ...LAYERS, '--dry-run', '--json'], { cwd })
    expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
    expect(jsonLines(stdout)).toEqual([
      {
        type: 'apply',
        target: `${cwd}/low`,
        directories: 1,
        steps: 3,
        recovered: false,
        dryRun: true,
        elapsedMs: expect.any(Number),
      },
    ])
    expect(snapshot(cwd)).toBe(before)
  })

  test('needs --yes where there is no terminal', () => {
    const cwd = layers()
    const { stderr, code } = lsync(['apply', '-', ...LAYERS], { cwd, input: planOf(cwd).join('\n') })
    expect(code).toBe(2)
    expect(stable(stderr, cwd)).toBe(
      'lsync: this uses up <T>/up, and there is no terminal to ask on; add --yes, or look first with --dry-run (USAGE)\n',
    )
  })

  test('refuses trees that are not as the plan expects, lists what differs, and touches nothing', () => {
    const cwd = layers()
    const lines = planOf(cwd)
    appendFileSync(`${cwd}/up/a`, 'er')
    writeFileSync(`${cwd}/up/more`, '')
    const before = snapshot(cwd)
    const { stdout, stderr, code } = apply(cwd, lines)
    expect(code).toBe(1)
    expect(stdout).toMatch(/^a \(upper\): should be .*, is .*\nmore \(upper\): should be .*, is .*\n$/)
    expect(stderr).toMatch(
      /^lsync: a \(upper\) should be .* \(and 1 more\); make the plan again .* \(PRECONDITION_FAILED\)\n$/,
    )
    expect(snapshot(cwd)).toBe(before)
    const json = lsync(['apply', 'plan', ...LAYERS, '--yes', '--json'], { cwd })
    expect(jsonLines(json.stdout).map(({ type, path, in: tree }) => [type, path, tree])).toEqual([
      ['precondition', 'a', 'upper'],
      ['precondition', 'more', 'upper'],
    ])
    expect(jsonLines(json.stderr)).toMatchObject([{ type: 'error', code: 'PRECONDITION_FAILED' }])
    expect(readdirSync(cwd).sort()).toEqual(['l2', 'low', 'plan', 'u2', 'up'])
  })

  const damages: [what: string, damage: (lines: string[]) => string[]][] = [
    ['cut after a record', (lines) => lines.slice(0, -1)],
    ['cut within a record', (lines) => [...lines.slice(0, -2), (lines.at(-2) as string).slice(0, 40)]],
    ['empty', () => []],
    ['with an edited line', (lines) => lines.map((line) => line.replace('"gone"', '"c"'))],
    ['with a path that leads out', (lines) => lines.map((line) => line.replace('"path":""', '"path":".."'))],
    ['with a name that leads out', (lines) => lines.map((line) => line.replace('"name":"a"', '"name":"../a"'))],
    ['with something after its end', (lines) => [...lines, '{}']],
  ]
  test.each(damages)('refuses a plan %s, and touches nothing', (_, damage) => {
    const cwd = layers()
    const lines = planOf(cwd)
    const before = snapshot(cwd)
    const { stdout, stderr, code } = apply(cwd, damage(lines))
    expect({ stdout, code }).toEqual({ stdout: '', code: 1 })
    expect(stderr).toMatch(/^lsync: line \d+ of the plan: .* \(PLAN_INVALID\)\n$/)
    expect(snapshot(cwd)).toBe(before)
    expect(readdirSync(cwd).sort()).toEqual(['l2', 'low', 'plan', 'u2', 'up'])
  })

  test('says when the plan is not there', () => {
    const { stderr, code } = lsync(['apply', 'nowhere', ...LAYERS, '--yes'], { cwd: layers() })
    expect(code).toBe(1)
    expect(stderr).toMatch(/\(ENOENT\)\n$/)
  })
})
