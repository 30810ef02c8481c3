import { appendFileSync, chmodSync, mkdirSync, readdirSync, utimesSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { freshDirectory, jsonLines, lsync, stable } from './lsync.ts'

const LAYERS = ['--upper', 'up', '--lower', 'low', '--namespace', 'user']

/** `up` on `low`: `changed` is another, `same` is a copy-up that changed nothing, `new` is new, `only` lies below. */
function layers(): string {
  const directory = freshDirectory()
  const write = (path: string, content: string) => {
    writeFileSync(`${directory}/${path}`, content)
    utimesSync(`${directory}/${path}`, 1e9, 1e9)
  }
  for (const name of ['up', 'low']) mkdirSync(`${directory}/${name}`)
  for (const [name, content] of Object.entries({ changed: 'old', same: 'same', only: 'below' }))
    write(`low/${name}`, content)
  for (const [name, content] of Object.entries({ changed: 'newer', same: 'same', new: 'new' }))
    write(`up/${name}`, content)
  for (const name of ['up', 'low']) utimesSync(`${directory}/${name}`, 1e9, 1e9)
  return directory
}

describe('diff', () => {
  test('names each change by a letter, in path order', () => {
    const { stdout, stderr, code } = lsync(['diff', ...LAYERS], { cwd: layers() })
    expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
    expect(stdout).toMatch(/^M changed {2}\(.*size.*\)\nA new {2}\(file\)\n$/)
  })

  test('with --json gives one object for each', () => {
    const { stdout } = lsync(['diff', ...LAYERS, '--content', '--json'], { cwd: layers() })
    expect(jsonLines(stdout)).toEqual([
      expect.objectContaining({ type: 'difference', change: 'modified', path: 'changed', sizeBytes: 5, belowBytes: 3 }),
      expect.objectContaining({ type: 'difference', change: 'added', path: 'new' }),
    ])
  })
})

describe('verify', () => {
  function merged(): string {
    const cwd = layers()
    expect(lsync(['merge', ...LAYERS, '--output', 'a:b\\c', '--clone', 'copy'], { cwd }).code).toBe(0)
    return cwd
  }

  test('ends with 0 where the tree is what the stack shows, also when names hold colons and backslashes', () => {
    const cwd = merged()
    const equal = lsync(['verify', '--stack', 'up:low', '--against', 'a:b\\c', '--namespace', 'user'], { cwd })
    expect(equal.code).toBe(0)
    expect(stable(equal.stdout, cwd)).toBe('<T>/a:b\\\\c is what the stack shows: 5 entries compared in <time>\n')
    const itself = ['verify', '--stack', 'a\\:b\\\\c', '--against', 'a:b\\c', '--namespace', 'user']
    expect(lsync(itself, { cwd })).toMatchObject({ code: 0 })
  })

  test('ends with 3 where it is not, and names what differs', () => {
    const cwd = merged()
    appendFileSync(`${cwd}/a:b\\c/new`, 'more')
    chmodSync(`${cwd}/a:b\\c/only`, 0o600)
    const args = ['verify', '--stack', 'up:low', '--against', 'a:b\\c', '--namespace', 'user', '--json']
    const { stdout, code } = lsync(args, { cwd })
    expect(code).toBe(3)
    const lines = jsonLines(stdout)
    expect(lines).toContainEqual({ type: 'difference', path: 'new', what: 'size', expected: '3', actual: '7' })
    expect(lines).toContainEqual({ type: 'difference', path: 'only', what: 'mode', expected: '0644', actual: '0600' })
    expect(lines.at(-1)).toMatchObject({ type: 'verify', equal: false, entries: 5 })
  })
})

describe('vacuum', () => {
  test('--dry-run names what it would drop and drops nothing', () => {
    const cwd = layers()
    const { stdout, stderr, code } = lsync(['vacuum', ...LAYERS, '--dry-run'], { cwd })
    expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
    expect(stable(stdout, cwd)).toMatch(/^same {2}\(the same lies below\)\nwould drop 1 names, .* in <time>\n$/)
    expect(readdirSync(`${cwd}/up`).sort()).toEqual(['changed', 'new', 'same'])
  })

  test('needs --yes where there is no terminal, and then drops', () => {
    const cwd = layers()
    expect(lsync(['vacuum', ...LAYERS], { cwd }).code).toBe(2)
    const { stdout, code } = lsync(['vacuum', ...LAYERS, '--yes', '--json'], { cwd })
    expect(code).toBe(0)
    expect(jsonLines(stdout)).toEqual([
      { type: 'dropped', path: 'same', why: 'same-as-below' },
      expect.objectContaining({ type: 'vacuum', dropped: 1, dryRun: false }),
    ])
    expect(readdirSync(`${cwd}/up`).sort()).toEqual(['changed', 'new'])
  })
})

describe('check', () => {
  test('ends with 0 on layers in order', () => {
    const cwd = layers()
    const { stdout, stderr, code } = lsync(['check', ...LAYERS], { cwd })
    expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
    expect(stable(stdout, cwd)).toMatch(/^the layers are in order: \d+ entries in <time>\n$/)
  })

  test('--repair needs --yes where there is no terminal', () => {
    const cwd = layers()
    const { stderr, code } = lsync(['check', ...LAYERS, '--repair'], { cwd })
    expect(code).toBe(2)
    expect(stable(stderr, cwd)).toBe(
      'lsync: this mends <T>/up where it is broken, and there is no terminal to ask on; add --yes, or look first without --repair (USAGE)\n',
    )
    expect(lsync(['check', ...LAYERS, '--repair', '--yes'], { cwd }).code).toBe(0)
  })
})

test('deref makes a new upper and reports what it unfolded', () => {
  const cwd = layers()
  const { stdout, stderr, code } = lsync(['deref', ...LAYERS, '--output', 'flat', '--json'], { cwd })
  expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
  expect(jsonLines(stdout)).toEqual([
    expect.objectContaining({ type: 'deref', output: `${cwd}/flat`, objects: 3, unfoldedDirectories: 0, inexact: 0 }),
  ])
  expect(readdirSync(`${cwd}/flat`).sort()).toEqual(['changed', 'new', 'same'])
})

test('probe tells what the file system can do and leaves nothing behind', () => {
  const cwd = freshDirectory()
  const { stdout, stderr, code } = lsync(['probe', '.', '--json'], { cwd })
  expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
  expect(jsonLines(stdout)).toEqual([
    expect.objectContaining({ type: 'probe', abilities: expect.objectContaining({ hardLinks: { value: true } }) }),
  ])
  expect(lsync(['probe', '.'], { cwd }).stdout).toMatch(/^ {2}hard links +yes$/m)
  expect(readdirSync(cwd)).toEqual([])
})
