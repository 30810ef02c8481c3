import { mkdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { hostPath } from '@lsync/posix'
import { LocalBackend, Repository } from '@lsync/snapshot'
import { expect, test } from 'vitest'
import { CHEAP } from '../support/repository.ts'
import { freshDirectory, jsonLines, lsync } from './lsync.ts'

const PASSWORD = 'secret'

test('lsync sync makes snapshots of an upper, and rules thin them', async () => {
  const directory = freshDirectory()
  const path = `${directory}/repository`
  const made = await Repository.init(new LocalBackend(hostPath(path)), { password: PASSWORD, passwordCost: CHEAP })
  made.close()
  mkdirSync(`${directory}/upper/d`, { recursive: true })
  writeFileSync(`${directory}/upper/d/f`, 'first')
  const env = { LSYNC_PASSWORD: PASSWORD }
  const args = ['sync', '--once', '--state', `${directory}/state`, '--namespace', 'user', `${directory}/upper`]
  const sync = (...more: string[]) => lsync([...args, `repo:${path}`, ...more], { env, cwd: directory })
  expect(sync()).toMatchObject({ code: 0 })
  renameSync(`${directory}/upper/d`, `${directory}/upper/e`)
  writeFileSync(`${directory}/upper/e/f`, 'second')
  expect(sync('--keep-last', '1')).toMatchObject({ code: 0 })
  const snapshot = (...more: string[]) => lsync(['snapshot', ...more, '-r', path], { env, cwd: directory })
  expect(jsonLines(snapshot('list', '--json').stdout).map(({ tags, paths }) => [tags, paths])).toEqual([
    [['sync'], [`${directory}/upper`]],
  ])
  expect(snapshot('restore', 'latest', 'back')).toMatchObject({ code: 0 })
  expect(readFileSync(`${directory}/back/e/f`, 'utf8')).toBe('second')
  expect(lsync([...args, 'repo:/nowhere'], { env, cwd: directory })).toMatchObject({
    code: 1,
    stderr: expect.stringContaining('REPOSITORY_MISSING'),
  })
  expect(lsync([...args, `repo:${path}`], { cwd: directory })).toMatchObject({
    code: 2,
    stderr: expect.stringContaining('PASSWORD_UNKNOWN'),
  })
})
