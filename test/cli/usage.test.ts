import { spawnSync } from 'node:child_process'
import { readFileSync, symlinkSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { commands } from '../../packages/cli/src/commands.ts'
import { freshDirectory, jsonLines, lsync, lsyncPath } from './lsync.ts'

test('--version is one line with the version of the package', () => {
  const { version } = JSON.parse(readFileSync(new URL('../../packages/cli/package.json', import.meta.url), 'utf8'))
  expect(lsync(['--version'])).toEqual({ stdout: `lsync ${version}\n`, stderr: '', code: 0 })
  expect(lsync(['-V']).stdout).toBe(`lsync ${version}\n`)
})

test('without arguments lsync shows its help, which names every command', () => {
  const { stdout, stderr, code } = lsync([])
  expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
  for (const name of Object.keys(commands)) expect(stdout).toMatch(new RegExp(`^  ${name} `, 'm'))
  expect(lsync(['--help']).stdout).toBe(stdout)
})

test.each(Object.keys(commands))('the help of %s leads with two examples and shows no colour', (name) => {
  const { stdout, stderr, code } = lsync([name, '--help'])
  expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
  expect(stdout).toMatch(/^Examples:\n {2}.*lsync .*\n {2}.*lsync .*\n\nUsage: lsync /)
  expect(stdout).not.toContain('\x1b')
})

const MERGE = ['merge', '--upper', 'U', '--lower', 'L']
const WRONG: [string[], string][] = [
  [['bogus'], "lsync: unknown command 'bogus'; see `lsync --help` (USAGE)\n"],
  [['merge'], "lsync: required option '--upper <dir>' not specified; see `lsync merge --help` (USAGE)\n"],
  [MERGE, 'lsync: where to merge to is not said; name one of --in-place, --output NEW and --delta OUT (USAGE)\n'],
  [
    [...MERGE, '--in-place', '--output', 'N'],
    'lsync: there can be only one place to merge to; name one of --in-place, --output NEW and --delta OUT (USAGE)\n',
  ],
  [
    [...MERGE, '--output', 'N', '--workers', 'many'],
    "lsync: option '--workers <count>' argument 'many' is invalid. Expected a whole number; see `lsync merge --help` (USAGE)\n",
  ],
  [
    [...MERGE, '--output', ''],
    "lsync: option '--output <dir>' argument '' is invalid. A path cannot be empty; see `lsync merge --help` (USAGE)\n",
  ],
  [
    ['verify', '--stack', 'a::b:c', '--against', 'd'],
    "lsync: option '--stack <layers>' argument 'a::b:c' is invalid. Expected UPPER:LOWER…, with data-only layers as ::DATA at the end; see `lsync verify --help` (USAGE)\n",
  ],
  [
    ['completion', 'ksh'],
    "lsync: command-argument value 'ksh' is invalid for argument 'shell'. Allowed choices are bash, zsh, fish; see `lsync completion --help` (USAGE)\n",
  ],
]

test.each(WRONG)('%j is a usage error: one line on stderr and exit code 2', (args, line) => {
  expect(lsync(args, { cwd: freshDirectory() })).toEqual({ stdout: '', stderr: line, code: 2 })
})

describe('with --json', () => {
  test('a usage error is one object on stderr', () => {
    const { stdout, stderr, code } = lsync(['merge', '--json'])
    expect({ stdout, code }).toEqual({ stdout: '', code: 2 })
    expect(jsonLines(stderr)).toEqual([
      {
        type: 'error',
        code: 'USAGE',
        message: "required option '--upper <dir>' not specified",
        hint: 'see `lsync merge --help`',
      },
    ])
  })

  test('a failed operation is one object with its path', () => {
    const directory = freshDirectory()
    const args = ['diff', '--upper', `${directory}/none`, '--lower', directory, '--json']
    const { stdout, stderr, code } = lsync(args)
    expect({ stdout, code }).toEqual({ stdout: '', code: 1 })
    expect(jsonLines(stderr)).toEqual([
      expect.objectContaining({ type: 'error', code: 'ENOENT', path: `${directory}/none` }),
    ])
  })
})

test('the command works from any directory and through a chain of symlinks', () => {
  const directory = freshDirectory()
  symlinkSync(lsyncPath, `${directory}/first`)
  symlinkSync('first', `${directory}/second`)
  for (const [command, cwd] of [
    [`${directory}/second`, '/'],
    ['./second', directory],
    ['./lsync', lsyncPath.replace(/\/lsync$/, '')],
  ] as const) {
    expect(spawnSync(command, ['--version'], { cwd, encoding: 'utf8' }).stdout).toMatch(/^lsync \d/)
  }
})
