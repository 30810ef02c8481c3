import { globSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'
import { EXIT } from '../../packages/cli/src/failure.ts'
import { LAYER_PROBLEMS } from '../../packages/overlay-merge/src/check.ts'

const root = fileURLToPath(new URL('../..', import.meta.url))
const page = readFileSync(`${root}/docs/errors.md`, 'utf8')
const sources = globSync(['packages/*/src/**/*.ts', 'packages/cli/bin/lsync'], { cwd: root })
  .filter((file) => !file.endsWith('.test.ts'))
  .map((file) => readFileSync(`${root}/${file}`, 'utf8'))

/** Every way in which the sources give an error its code. */
const GIVEN = [
  /super\(\s*'([A-Z][A-Z0-9_]*)'/g,
  /new (?:LsyncError|PosixError)\(\s*'([A-Z][A-Z0-9_]*)'/g,
  /\bcode: '([A-Z][A-Z0-9_]*)'/g,
  /\.warning\(\s*'([A-Z][A-Z0-9_]*)'/g,
  /\(([A-Z]+_[A-Z_]+)\)" >&2/g,
]

function codesOf(source: string, patterns: readonly RegExp[]): string[] {
  return patterns.flatMap((pattern) => [...source.matchAll(pattern)].map(([, code]) => code as string))
}

/** Errno names that have a hint of their own. */
function hintedErrnos(): string[] {
  const [, hints = ''] =
    /const HINTS[^{]*\{([^}]*)\}/.exec(readFileSync(`${root}/packages/posix/src/errors.ts`, 'utf8')) ?? []
  return [...hints.matchAll(/^\s*(E[A-Z0-9]+):/gm)].map(([, name]) => name as string)
}

const documented = [...page.matchAll(/^\| `([A-Z][A-Z0-9_]*)` \|/gm)].map(([, code]) => code as string)
const inCode = new Set([
  ...sources.flatMap((source) => codesOf(source, GIVEN)),
  ...hintedErrnos(),
  ...Object.keys(LAYER_PROBLEMS),
])

test('every code of the sources is in docs/errors.md', () => {
  expect(inCode.size).toBeGreaterThan(40)
  expect([...inCode].filter((code) => !documented.includes(code)).sort()).toEqual([])
})

test('every code in docs/errors.md is in the sources', () => {
  const named = new Set(sources.flatMap((source) => codesOf(source, [/'(E[A-Z0-9]+)'/g])))
  expect(documented.filter((code) => !inCode.has(code) && !named.has(code))).toEqual([])
})

test('within a package, one code has one class', () => {
  const files = globSync('packages/*/src/**/*.ts', { cwd: root }).filter((file) => !file.endsWith('.test.ts'))
  const given = files.flatMap((file) =>
    codesOf(readFileSync(`${root}/${file}`, 'utf8'), [/super\(\s*'([A-Z][A-Z0-9_]*)'/g]).map(
      (code) => `${file.split('/')[1]} ${code}`,
    ),
  )
  expect(given.length).toBeGreaterThan(40)
  expect(given.filter((one, index) => given.indexOf(one) !== index)).toEqual([])
})

test('docs/errors.md names each code once', () => {
  expect(documented.filter((code, index) => documented.indexOf(code) !== index)).toEqual([])
})

test('the exit codes are those of the command', () => {
  const rows = [...page.matchAll(/^\| (\d+) \| `(\w+)` \|/gm)].map(([, code, name]) => [name, Number(code)])
  expect(Object.fromEntries(rows)).toEqual(EXIT)
})

test('the problems of layers are described with their severity', () => {
  const rows = [...page.matchAll(/^\| `([A-Z_]+)` \| (error|warning|info) \|.*\| (.*) \|$/gm)]
  const described = Object.fromEntries(rows.map(([, code, severity, repair]) => [code, [severity, repair !== '–']]))
  const known = Object.entries(LAYER_PROBLEMS)
    .filter(([code]) => code !== 'INDEX_NEEDED')
    .map(([code, { severity, repairable }]) => [code, [severity, repairable]])
  expect(described).toEqual(Object.fromEntries(known))
})
