import { spawnSync } from 'node:child_process'
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { hostPath } from '@lsync/posix'
import { LocalBackend, Repository } from '@lsync/snapshot'
import { expect, test } from 'vitest'
import { CHEAP } from '../support/repository.ts'
import { freshDirectory, jsonLines, lsync } from './lsync.ts'

const MARKS = ['--namespace', 'user']

function layer(): string {
  const directory = freshDirectory()
  mkdirSync(`${directory}/up/etc`, { recursive: true })
  writeFileSync(`${directory}/up/etc/motd`, 'hello\n')
  return directory
}

test.each(['import', 'export'])('the help of image %s leads with two examples', (name) => {
  const { stdout, stderr, code } = lsync(['image', name, '--help'])
  expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
  expect(stdout).toMatch(/^Examples:\n {2}.*lsync .*\n {2}.*lsync .*\n\nUsage: lsync image /)
})

test('a layer becomes an image, one on it becomes another, and both come back as layers', () => {
  const cwd = layer()
  const first = lsync(['image', 'export', ...MARKS, '--ref', 'one', '--cmd', '/bin/sh', 'image', 'up'], { cwd })
  expect(first).toMatchObject({ stderr: '', code: 0 })
  expect(first.stdout).toMatch(
    /^made one in \/.*\/image: sha256:[0-9a-f]{64}, 1 layers\nthe new one: 3 entries, \d+ B as sha256:[0-9a-f]{64}\n$/,
  )
  mkdirSync(`${cwd}/more`)
  writeFileSync(`${cwd}/more/new`, 'new')
  const settings = ['--env', 'A=b=c', '--label', 'who=me', '--created', '2024-01-31T12:00:00Z', '--json']
  const names = ['--base', 'one', '--ref', 'two']
  const second = lsync(['image', 'export', ...MARKS, ...names, ...settings, 'image', 'more'], { cwd })
  expect(second).toMatchObject({ stderr: '', code: 0 })
  expect(jsonLines(second.stdout)).toMatchObject([{ type: 'image', ref: 'two', layers: 2, losses: 0 }])

  const imported = lsync(['image', 'import', ...MARKS, '--ref', 'two', '--json', 'image', 'root'], { cwd })
  expect(imported).toMatchObject({ stderr: '', code: 0 })
  expect(jsonLines(imported.stdout)).toMatchObject([
    {
      type: 'image',
      config: {
        created: '2024-01-31T12:00:00Z',
        config: { Cmd: ['/bin/sh'], Env: ['A=b=c'], Labels: { who: 'me' } },
        history: [{}, { created: '2024-01-31T12:00:00Z' }],
      },
      layers: [
        { path: `${cwd}/root/layers/1`, entries: 3, losses: 0 },
        { path: `${cwd}/root/layers/2`, entries: 2 },
      ],
    },
  ])
  expect(readFileSync(`${cwd}/root/layers/1/etc/motd`, 'utf8')).toBe('hello\n')
  expect(lsync(['image', 'import', ...MARKS, '--ref', 'one', 'image', 'again'], { cwd }).stdout).toMatch(
    /\nlowerdir=\/.*\/again\/layers\/1\n$/,
  )
})

test('a snapshot becomes an image', async () => {
  const cwd = layer()
  const backend = new LocalBackend(hostPath(`${cwd}/repository`))
  ;(await Repository.init(backend, { password: 'secret', passwordCost: CHEAP })).close()
  const env = { LSYNC_PASSWORD: 'secret', LSYNC_REPOSITORY: `${cwd}/repository` }
  expect(lsync(['snapshot', 'create', 'up'], { cwd, env })).toMatchObject({ stderr: '', code: 0 })
  const made = lsync(['image', 'export', '--snapshot', 'latest', '--json', 'image'], { cwd, env })
  expect(made).toMatchObject({ stderr: '', code: 0 })
  expect(jsonLines(made.stdout)).toMatchObject([{ type: 'image', ref: 'latest', layers: 1, layer: { entries: 3 } }])
  expect(readdirSync(`${cwd}/image`).sort()).toEqual(['blobs', 'index.json', 'oci-layout'])
})

test('which image is meant has to be said, and a damaged one is refused', () => {
  const cwd = layer()
  for (const ref of ['one', 'two']) lsync(['image', 'export', ...MARKS, '--ref', ref, 'image', 'up'], { cwd })
  const unclear = lsync(['image', 'import', ...MARKS, 'image', 'root'], { cwd })
  expect(unclear.code).toBe(1)
  expect(unclear.stderr).toMatch(
    /^lsync: .* has no image that is the only one; it has one, two; .* \(IMAGE_NOT_FOUND\)\n$/,
  )
  spawnSync('sh', ['-c', 'for f in blobs/sha256/*; do echo x >>$f; done'], { cwd: `${cwd}/image` })
  const damaged = lsync(['image', 'import', ...MARKS, '--ref', 'one', 'image', 'root'], { cwd })
  expect(damaged.stderr).toMatch(/ \(BLOB_DAMAGED\)\n$/)
  expect(readdirSync(cwd).sort()).toEqual(['image', 'up'])
})

test.each([
  [['export', 'image'], 'what becomes an image is not said'],
  [['export', '--snapshot', 'latest', 'image', 'up'], 'what becomes an image is not said'],
  [['export', '--since', 'latest', 'image', 'up'], '--since tells from which snapshot on'],
  [['export', '--env', 'X', 'image', 'up'], 'Expected NAME=value'],
  [['export', '--created', 'yesterday', 'image', 'up'], 'Expected a time such as'],
])('image %j is a usage error', (args, message) => {
  const { stderr, code } = lsync(['image', ...args], { cwd: layer() })
  expect(code).toBe(2)
  expect(stderr).toContain(message)
})
