import { spawnSync } from 'node:child_process'
import { closeSync, mkdirSync, openSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { bash, freshDirectory, jsonLines, lsync, stable } from './lsync.ts'

const MARKS = ['--namespace', 'user']

function layer(): string {
  const directory = freshDirectory()
  mkdirSync(`${directory}/up/etc`, { recursive: true })
  writeFileSync(`${directory}/up/etc/motd`, 'hello\n')
  return directory
}

test.each(['import', 'export'])('the help of layer %s leads with two examples', (name) => {
  const { stdout, stderr, code } = lsync(['layer', name, '--help'])
  expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
  expect(stdout).toMatch(/^Examples:\n {2}lsync .*\n {2}.*lsync .*\n\nUsage: lsync layer /)
})

test('layer alone, and layer import without a form, are usage errors', () => {
  expect(lsync(['layer'])).toMatchObject({
    stderr: 'lsync: a command is missing; see `lsync layer --help` (USAGE)\n',
    code: 2,
  })
  expect(lsync(['layer', 'import', 'a', 'b'])).toMatchObject({
    stderr: "lsync: required option '--form <form>' not specified; see `lsync layer import --help` (USAGE)\n",
    code: 2,
  })
})

test('a layer is exported to an archive that tar reads, with its digests', () => {
  const cwd = layer()
  const { stdout, stderr, code } = lsync(
    ['layer', 'export', ...MARKS, '--form', 'oci', '--compression', 'gzip', 'up', 'up.tgz'],
    { cwd },
  )
  expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
  expect(stable(stdout, cwd)).toMatch(/^made <T>\/up\.tgz: 3 entries, 6 B of content, \d+ B as sha256:[0-9a-f]{64}\n$/)
  const { stdout: listed } = spawnSync('tar', ['-tzf', 'up.tgz'], { cwd, encoding: 'utf8' })
  expect(listed.split('\n').filter(Boolean)).toEqual(['./', 'etc/', 'etc/motd'])
})

test('export to standard output and import from standard input make the same layer again', () => {
  const cwd = layer()
  const piped = bash(
    'set -o pipefail; lsync layer export --namespace user --form tar --compression zstd up - | lsync layer import --namespace user --form tar --json - again',
    { cwd },
  )
  expect(piped).toMatchObject({ stderr: '', code: 0 })
  expect(jsonLines(piped.stdout)).toEqual([{ type: 'layer', target: `${cwd}/again`, entries: 3, bytes: 6, losses: 0 }])
  expect(readFileSync(`${cwd}/again/etc/motd`, 'utf8')).toBe('hello\n')
})

test('an archive that was cut short is refused, and nothing is left', () => {
  const cwd = layer()
  lsync(['layer', 'export', ...MARKS, '--form', 'tar', 'up', 'up.tar'], { cwd })
  const bytes = readFileSync(`${cwd}/up.tar`)
  const fd = openSync(`${cwd}/cut.tar`, 'w')
  writeFileSync(fd, bytes.subarray(0, 700))
  closeSync(fd)
  const { stderr, code } = lsync(['layer', 'import', ...MARKS, '--form', 'tar', 'cut.tar', 'again'], { cwd })
  expect(code).toBe(1)
  expect(stderr).toMatch(/^lsync: .* \(ARCHIVE_BROKEN\)\n$/)
  expect(readdirSync(cwd).sort()).toEqual(['cut.tar', 'up', 'up.tar'])
})

test('what is left out is named, and ends with 3', () => {
  const cwd = layer()
  spawnSync('chmod', ['u+s', `${cwd}/up/etc/motd`])
  const args = ['layer', 'export', ...MARKS, '--form', 'oci', '--setuid', 'clear', 'up', 'up.tar']
  const { stderr, code } = lsync(args, { cwd })
  expect(code).toBe(3)
  expect(stderr).toBe('lsync: warning: etc/motd: left out: setuid, setgid or file capabilities (LOSS)\n')
})

test('a directory cannot go to standard output', () => {
  const { stderr, code } = lsync(['layer', 'export', ...MARKS, '--form', 'aufs', 'up', '-'], { cwd: layer() })
  expect({ stderr, code }).toEqual({
    stderr: 'lsync: the form aufs is a directory; name a path instead of - (USAGE)\n',
    code: 2,
  })
})
