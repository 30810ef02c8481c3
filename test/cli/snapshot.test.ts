import { execFileSync } from 'node:child_process'
import { mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { hostname } from 'node:os'
import { hostPath } from '@lsync/posix'
import { LocalBackend, Repository, RepositoryLock } from '@lsync/snapshot'
import { describe, expect, test } from 'vitest'
import { CHEAP } from '../support/repository.ts'
import { bash, freshDirectory, jsonLines, lsync, type Outcome, stable } from './lsync.ts'

const PASSWORD = 'secret'

/** A repository with two snapshots of a small tree, and the command on it. */
async function small() {
  const directory = freshDirectory()
  const path = `${directory}/repository`
  const backend = new LocalBackend(hostPath(path))
  ;(await Repository.init(backend, { password: PASSWORD, passwordCost: CHEAP })).close()
  mkdirSync(`${directory}/tree/d`, { recursive: true })
  writeFileSync(`${directory}/tree/a`, 'first')
  writeFileSync(`${directory}/tree/d/n\n`, '')
  symlinkSync('a', `${directory}/tree/l`)
  const env = { LSYNC_PASSWORD: PASSWORD, LSYNC_REPOSITORY: path }
  const run = (...args: string[]) => lsync(['snapshot', ...args], { env, cwd: directory })
  const said = ({ stdout, stderr, code }: Outcome) => ({
    stdout: stable(stdout, directory).replace(/\b[0-9a-f]{8}\b/g, '<id>'),
    stderr: stable(stderr, directory),
    code,
  })
  return { directory, path, run, said, first: run('create', 'tree', '--json') }
}

describe('lsync snapshot', () => {
  test('saves, lists, shows, compares and restores', async () => {
    const { directory, run, said, first } = await small()
    expect(first).toMatchObject({ stderr: '', code: 0 })
    expect(jsonLines(first.stdout)).toEqual([
      expect.objectContaining({
        type: 'created',
        filesNew: 2,
        problems: 0,
        paths: [`${directory}/tree`],
        parent: null,
      }),
    ])
    writeFileSync(`${directory}/tree/a`, 'second')
    expect(said(run('create', 'tree', '--tag', 'x,y'))).toMatchObject({
      stdout: expect.stringMatching(/^snapshot <id>: 2 files \(0 new, 1 changed\), \d+ B added in <time>\n$/),
      code: 0,
    })
    const listed = jsonLines(run('list', '--json').stdout)
    expect(listed.map(({ tags, host }) => [tags, host])).toEqual([
      [[], hostname()],
      [['x', 'y'], hostname()],
    ])
    expect(run('show', 'latest', '--tag', 'x').stdout).toContain(`${directory}/tree/d/n\\n`)
    const [before, after] = listed.map(({ id }) => String(id)) as [string, string]
    expect(run('diff', before, after.slice(0, 10))).toEqual({ stdout: 'M /a\n', stderr: '', code: 0 })
    expect(run('dump', `${before}:${directory}/tree/a`).stdout).toBe('first')
    expect(said(run('restore', before, 'back'))).toMatchObject({
      stdout: 'restored <id> to <T>/back in <time>: 4 created, 0 replaced, 0 mended, 0 removed, 5 B written\n',
      code: 0,
    })
    expect(readFileSync(`${directory}/back/a`, 'utf8')).toBe('first')
    writeFileSync(`${directory}/back/extra`, '')
    expect(run('restore', after, 'back', '--delete', '--dry-run').stdout.split('\n').slice(0, 2)).toEqual([
      'remove extra',
      'replace a',
    ])
    expect(run('restore', after, 'back', '--delete')).toMatchObject({ code: 2 })
    expect(run('restore', after, 'back', '--delete', '--yes')).toMatchObject({ code: 0 })
    expect(readFileSync(`${directory}/back/a`, 'utf8')).toBe('second')
  })

  test('saves a tar that comes through a pipe', async () => {
    const { directory, said, path } = await small()
    const env = { LSYNC_PASSWORD: PASSWORD, LSYNC_REPOSITORY: path }
    const input = execFileSync('tar', ['-c', '-C', `${directory}/tree`, '.'], { encoding: 'latin1' })
    const piped = (...args: string[]) => lsync(['snapshot', 'create', ...args], { env, cwd: directory, input })
    expect(said(piped('--stdin-tar', '/srv/web', '--tag', 'web'))).toMatchObject({
      stdout: expect.stringMatching(/^snapshot <id>: 2 files \(2 new, 0 changed\), \d+ B added in <time>\n$/),
      code: 0,
    })
    const restored = lsync(['snapshot', 'restore', 'latest', 'back', '--tag', 'web'], { env, cwd: directory })
    expect(restored.code).toBe(0)
    expect(readFileSync(`${directory}/back/a`, 'utf8')).toBe('first')
    expect(piped('tree', '--stdin-tar')).toMatchObject({ code: 2 })
    expect(piped()).toMatchObject({ code: 2, stderr: expect.stringContaining('name a directory, or use --stdin-tar') })
    expect(lsync(['snapshot', 'create', '--stdin-tar'], { env, input: 'not a tar' })).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('ARCHIVE_BROKEN'),
    })
  })

  test('restores in another form, to a path or to a pipe', async () => {
    const { directory, run, path } = await small()
    const env = { LSYNC_PASSWORD: PASSWORD, LSYNC_REPOSITORY: path }
    const line = 'lsync snapshot restore latest --as oci --compression gzip | tar -tz'
    expect(bash(line, { env, cwd: directory })).toEqual({ stdout: './\na\nd/\nd/n\\n\nl\n', stderr: '', code: 0 })
    expect(run('restore', 'latest', 'up', '--as', 'kernel-user', '--namespace', 'user')).toMatchObject({
      stdout: expect.stringMatching(/^restored [0-9a-f]{8} to .*\/up as kernel-user: 5 entries, 5 B\n$/),
      code: 0,
    })
    expect(readFileSync(`${directory}/up/a`, 'utf8')).toBe('first')
    expect(run('restore', 'latest', 'up', '--as', 'plain')).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('OUTPUT_EXISTS'),
    })
    expect(run('restore', 'latest', '--as', 'plain')).toMatchObject({ code: 2 })
    expect(run('restore', 'latest', '--as', 'tar', '--delete')).toMatchObject({ code: 2 })
    expect(run('restore', 'latest')).toMatchObject({ code: 2, stderr: expect.stringContaining('use --as') })
  })

  test('saves what a stack shows, without a mount', async () => {
    const { directory, run } = await small()
    for (const name of ['up', 'up/d', 'low', 'low/d']) mkdirSync(`${directory}/${name}`)
    writeFileSync(`${directory}/up/d/both`, 'upper')
    writeFileSync(`${directory}/low/d/both`, 'lower')
    writeFileSync(`${directory}/low/d/beneath`, '')
    const stack = ['--stack', 'up:low', '--namespace', 'user']
    expect(run('create', ...stack, '/srv/merged')).toMatchObject({ stderr: '', code: 0 })
    expect(run('dump', 'latest:/srv/merged/d/both').stdout).toBe('upper')
    expect(run('show', 'latest').stdout).toContain('/srv/merged/d/beneath')
    expect(run('create', ...stack)).toMatchObject({ code: 2 })
  })

  test('forgets, prunes, checks, and says what is damaged', async () => {
    const { directory, path, run, said } = await small()
    writeFileSync(`${directory}/tree/a`, 'second')
    run('create', 'tree')
    expect(run('forget', '--keep-last', '1')).toMatchObject({ code: 2, stderr: expect.stringContaining('add --yes') })
    expect(said(run('forget', '--keep-last', '1', '--yes', '--prune')).stdout.split('\n')).toEqual([
      expect.stringMatching(/^keep {4}<id> .*\(last snapshot\)$/),
      expect.stringMatching(/^remove {2}<id> /),
      expect.stringMatching(/^freed /),
      '',
    ])
    expect(run('check', '--read-data')).toMatchObject({ stdout: expect.stringContaining('is whole'), code: 0 })
    expect(run('forget', '--yes')).toMatchObject({ code: 1, stderr: expect.stringContaining('FORGET_REFUSED') })
    rmSync(`${path}/index`, { recursive: true })
    mkdirSync(`${path}/index`)
    const damaged = run('check', '--json')
    expect(damaged.code).toBe(3)
    expect(jsonLines(damaged.stdout)).toContainEqual(
      expect.objectContaining({ code: 'OBJECT_MISSING', severity: 'error' }),
    )
    expect(run('repair', 'index')).toMatchObject({ code: 0 })
    expect(run('check').code).toBe(0)
  })

  test('says what is wrong in one line, with the exit code of its kind', async () => {
    const { directory, path, run } = await small()
    const plain = (env: Record<string, string>, ...args: string[]) =>
      lsync(['snapshot', ...args], { env, cwd: directory })
    expect(plain({}, 'list')).toMatchObject({ code: 2, stderr: expect.stringContaining('name one with -r') })
    expect(plain({}, 'list', '-r', path)).toMatchObject({
      code: 2,
      stderr: expect.stringContaining('PASSWORD_UNKNOWN'),
    })
    expect(plain({ LSYNC_PASSWORD: 'wrong' }, 'list', '-r', path)).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('PASSWORD_WRONG'),
    })
    expect(plain({}, 'list', '-r', path, '--password-command', `echo ${PASSWORD}`).code).toBe(0)
    writeFileSync(`${directory}/password`, `${PASSWORD}\n`)
    expect(plain({}, 'list', '-r', 'repository', '--password-file', 'password').code).toBe(0)
    expect(plain({ LSYNC_PASSWORD: 'x' }, 'list', '-r', 'nowhere')).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('REPOSITORY_MISSING'),
    })
    expect(plain({}, 'list', '-r', 'gopher://x/')).toMatchObject({
      stderr: expect.stringContaining('REPOSITORY_ADDRESS_INVALID'),
    })
    expect(run('restore', 'ffff', 'back')).toMatchObject({ stderr: expect.stringContaining('SNAPSHOT_NOT_FOUND') })
    expect(run('create', 'not there')).toMatchObject({ code: 1, stderr: expect.stringContaining('ENOENT') })
    const repository = await Repository.open(new LocalBackend(hostPath(path)), { password: PASSWORD })
    const lock = await RepositoryLock.acquire(repository, { exclusive: true })
    expect(run('create', 'tree', '--json')).toMatchObject({
      code: 4,
      stderr: expect.stringContaining('"REPOSITORY_LOCKED"'),
    })
    await lock.release()
    repository.close()
  })

  test('makes a repository, tags, copies, and counts', async () => {
    const { directory, run } = await small()
    const other = { LSYNC_PASSWORD: 'other', LSYNC_REPOSITORY: `${directory}/other` }
    expect(lsync(['snapshot', 'init'], { env: other })).toMatchObject({ code: 0 })
    expect(lsync(['snapshot', 'init'], { env: other })).toMatchObject({
      code: 1,
      stderr: expect.stringContaining('REPOSITORY_EXISTS'),
    })
    expect(run('tag', '--add', 'keep', 'latest').stdout).toMatch(/^\w{8} is \w{8} now, with keep\n$/)
    const copied = run('copy', '--to', 'other', '--to-password-command', 'echo other')
    expect(copied).toMatchObject({ code: 0, stdout: expect.stringContaining('copied 1 snapshots (0 were there)') })
    expect(jsonLines(lsync(['snapshot', 'stats', '--json'], { env: other }).stdout)).toEqual([
      expect.objectContaining({ snapshots: 1, files: 2, restoreBytes: 5 }),
    ])
    expect(run('find', 'n*').stdout).toContain('/tree/d/n\\n')
    expect(run('key', 'list').stdout).toMatch(/^\* \w{8} /)
    expect(run('unlock').stdout).toBe('removed 0 locks\n')
  })
})
