import { mkdirSync, readdirSync, writeFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { bash, freshDirectory, jsonLines } from './lsync.ts'

function bytes(...parts: (string | number)[]): Buffer {
  return Buffer.concat(parts.map((part) => (typeof part === 'number' ? Buffer.from([part]) : Buffer.from(part))))
}

function namesIn(path: Buffer): string[] {
  return readdirSync(path, { encoding: 'buffer' })
    .map((name) => name.toString('latin1'))
    .sort()
}

test('arguments are bytes: layers whose names are not UTF-8 are merged, printed escaped, and round-trip in JSON', () => {
  const cwd = freshDirectory()
  const up = bytes(`${cwd}/u\n`, 0xff)
  const low = bytes(`${cwd}/l`, 0xfe, 'ä')
  for (const path of [up, low]) mkdirSync(path)
  writeFileSync(Buffer.concat([up, bytes('/', 'n', 0xe4, '\n')]), 'x')
  const plan = bash(
    "lsync merge --upper $'u\\n\\xff' --lower $'l\\xfeä' --in-place --dry-run --json --namespace user",
    { cwd },
  )
  expect(plan).toMatchObject({ stderr: '', code: 0 })
  const lines = jsonLines(plan.stdout)
  expect(lines[0]).toMatchObject({ upper: `${cwd}/u\n\udcff`, target: `${cwd}/l\udcfeä` })
  expect(lines[1]).toMatchObject({ steps: [{ name: 'n\udce4\n' }] })

  const diff = bash("lsync diff --upper $'u\\n\\xff' --lower $'l\\xfeä' --namespace user", { cwd })
  expect(diff.stdout).toContain('A n\\xe4\\n')

  const merged = bash("lsync merge --upper $'u\\n\\xff' --lower $'l\\xfeä' --in-place --yes --namespace user", { cwd })
  expect(merged).toMatchObject({ stderr: '', code: 0 })
  expect(merged.stdout).toContain(`merged into ${cwd}/l\\xfeä in `)
  expect(namesIn(low)).toEqual(['n\xe4\n'])
})

test('a command that is suggested can be pasted whatever the names are', () => {
  const cwd = freshDirectory()
  for (const path of [bytes(`${cwd}/it's: `, 0xff), bytes(`${cwd}/low er`)]) mkdirSync(path)
  writeFileSync(`${cwd}/low er/file`, 'x')
  const merged = bash("lsync merge --upper $'it\\'s: \\xff' --lower 'low er' --output $'n\\xfe' --namespace user", {
    cwd,
  })
  expect(merged.code).toBe(0)
  const suggestion = merged.stderr.replace(/^next: /, '')
  const verified = bash(suggestion, { cwd })
  expect(verified).toMatchObject({ code: 0 })
  expect(verified.stdout).toContain('is what the stack shows')
})
