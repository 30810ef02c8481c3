import { randomBytes } from 'node:crypto'
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { hostPath } from '@lsync/posix'
import {
  type Backend,
  type BackendOptions,
  createSnapshot,
  FILE_KINDS,
  LocalBackend,
  openBackend,
  Repository,
  restoreSnapshot,
} from '@lsync/snapshot'
import { describe, expect, onTestFinished, test } from 'vitest'
import { jsonLines, lsync } from '../cli/lsync.ts'
import { type Fault, faultsInTurn, startFaultProxy } from '../support/fault-proxy.ts'
import { needs } from '../support/needs.ts'
import { hasRclone, useRclone } from '../support/rclone.ts'
import { CHEAP, PASSWORD, Restic, temporaryDirectory } from '../support/repository.ts'
import { hasSshd, useSshServer } from '../support/sshd.ts'
import { hasSwift, useSwift } from '../support/swift.ts'
import { isPresent } from '../support/system.ts'
import { diffTrees, readTree } from '../support/tree.ts'

const hasRestic = needs('restic', isPresent('restic'))

/** A small tree, and the command on a new repository at an address. */
async function place(address: string, options: BackendOptions, words: readonly string[], env: Record<string, string>) {
  const backend = openBackend(address, options)
  onTestFinished(() => backend.close())
  ;(await Repository.init(backend, { password: PASSWORD, passwordCost: CHEAP })).close()
  const directory = temporaryDirectory()
  mkdirSync(`${directory}/tree/d`, { recursive: true })
  writeFileSync(`${directory}/tree/d/large`, randomBytes(3_000_000))
  writeFileSync(`${directory}/tree/small`, 'small')
  const run = (command: string, ...others: string[]) => {
    const outcome = lsync(['snapshot', command, ...words, ...others], {
      cwd: directory,
      env: { LSYNC_PASSWORD: PASSWORD, LSYNC_REPOSITORY: address, ...env },
    })
    expect(outcome).toMatchObject({ stderr: '', code: 0 })
    return outcome.stdout
  }
  return { backend, directory, run }
}

/** Saves, changes, saves again, forgets, prunes, checks and restores. */
function useIt({ directory, run }: Awaited<ReturnType<typeof place>>): void {
  run('create', 'tree')
  writeFileSync(`${directory}/tree/small`, 'changed')
  run('create', 'tree')
  run('forget', '--keep-last', '1', '--prune', '--yes')
  run('check', '--read-data')
  run('restore', 'latest', 'back')
  expect(readFileSync(`${directory}/back/small`, 'utf8')).toBe('changed')
  expect(readFileSync(`${directory}/back/d/large`).equals(readFileSync(`${directory}/tree/d/large`))).toBe(true)
  expect(jsonLines(run('list', '--json'))).toHaveLength(1)
}

async function fetched(backend: Backend): Promise<string> {
  const path = `${temporaryDirectory()}/fetched`
  const local = new LocalBackend(hostPath(path))
  await local.create()
  for (const kind of FILE_KINDS) {
    for await (const { name } of backend.list(kind)) await local.put({ kind, name }, await backend.get({ kind, name }))
  }
  return path
}

describe.skipIf(!needs('rclone', hasRclone) || !hasRestic)('a repository behind rclone serve restic', () => {
  const rclone = useRclone({ user: 'me', password: 'secret' })

  test('serves lsync and restic in turn', async () => {
    const at = `127.0.0.1:${rclone.current.port}/r/`
    const login = { LSYNC_REST_PASSWORD: 'secret' }
    const words = ['-o', 'rest.username=me']
    const rest = { username: 'me', password: 'secret' }
    const made = await place(`rest:http://${at}`, { rest }, words, login)
    useIt(made)
    const restic = new Restic(`rest:http://me:secret@${at}`)
    expect(restic.run('check', '--read-data')).toContain('no errors were found')
    restic.run('backup', `${made.directory}/tree`)
    expect(jsonLines(made.run('list', '--json'))).toHaveLength(2)
    made.run('check', '--read-data')
    made.run('unlock')
  })
})

const FAULTS: readonly Fault[] = [
  { kind: 'status', status: 503 },
  { kind: 'cut', direction: 'up', afterBytes: 1000 },
  { kind: 'cut', direction: 'down', afterBytes: 100 },
  { kind: 'status', status: 502, afterwards: true },
  { kind: 'refuse' },
  { kind: 'truncate', afterBytes: 600 },
]

describe.skipIf(!needs('rclone', hasRclone) || !hasRestic)('a repository behind a bad line', () => {
  const rclone = useRclone()

  test('loses nothing: what was saved over it is whole, and comes back over it', async () => {
    const proxy = await startFaultProxy({ port: rclone.current.port, speaks: 'http', fault: faultsInTurn(4, FAULTS) })
    onTestFinished(() => proxy.stop())
    const quick = { firstDelayMs: 1, retryForMs: 90_000, firstAnswerWithinMs: 90_000 }
    const backend = openBackend(`rest:http://127.0.0.1:${proxy.port}/r/`, quick)
    onTestFinished(() => backend.close())
    const repository = await Repository.init(backend, { password: PASSWORD, passwordCost: CHEAP })
    onTestFinished(() => repository.close())
    const directory = temporaryDirectory()
    mkdirSync(`${directory}/tree`)
    for (let i = 0; i < 30; i++) writeFileSync(`${directory}/tree/f${i}`, randomBytes(1_000_000))
    const { snapshotId, problems } = await createSnapshot(repository, {
      targets: [{ path: hostPath(`${directory}/tree`) }],
    })
    expect(problems).toEqual([])
    const snapshot = await repository.readSnapshot(snapshotId)
    const restored = await restoreSnapshot(repository, { snapshot, target: hostPath(`${directory}/back`) })
    expect(restored.problems).toEqual([])
    expect(diffTrees(readTree(`${directory}/tree`), readTree(`${directory}/back`))).toEqual([])
    expect(proxy.faults).toBeGreaterThan(5)
    const restic = new Restic(`rest:http://127.0.0.1:${rclone.current.port}/r/`)
    expect(restic.run('check', '--read-data')).toContain('no errors were found')
  })
})

describe.skipIf(!needs('sshd', hasSshd) || !hasRestic)('a repository on an SFTP server', () => {
  const sshd = useSshServer()

  test('is one that restic reads', async () => {
    const { address, clientKey, knownHosts, port, user } = sshd.current
    const path = `${temporaryDirectory()}/repository`
    const ssh = { identities: [clientKey], knownHosts: [knownHosts] }
    const words = ['-o', `ssh.identity=${clientKey}`, '-o', `ssh.known-hosts=${knownHosts}`]
    const made = await place(`sftp://${user}@${address}:${port}/${path}`, { ssh }, words, {})
    useIt(made)
    expect(new Restic(path).run('check', '--read-data')).toContain('no errors were found')
    expect(readdirSync(`${path}/locks`)).toEqual([])
  })
})

describe.skipIf(!needs('OpenStack Swift', hasSwift) || !hasRestic)('a repository in a bucket', () => {
  const swift = useSwift()

  test('is one that restic reads', async () => {
    const { accessKey, port, secretKey } = swift.current
    const keys = { AWS_ACCESS_KEY_ID: accessKey, AWS_SECRET_ACCESS_KEY: secretKey }
    const words = ['-o', 's3.style=path', '-o', 's3.region=us-east-1', '-o', 'connections=4']
    const made = await place(`s3:http://127.0.0.1:${port}/bucket/prefix`, {}, words, keys)
    useIt(made)
    // restic's own S3 client does not get on with Swift.
    expect(new Restic(await fetched(made.backend)).run('check', '--read-data')).toContain('no errors were found')
  })
})

test.each([
  ['-o', 'nonsense=1', 'is no option'],
  ['-o', 'connections=many', 'is no number of connections'],
  ['-o', 's3.style=odd', 'is no style of S3'],
  ['-r', 'ftp://host/x', 'is no repository'],
])('lsync snapshot list %s %s is refused', (flag, value, message) => {
  const env = { LSYNC_PASSWORD: PASSWORD, LSYNC_REPOSITORY: '/nowhere' }
  expect(lsync(['snapshot', 'list', flag, value], { env }).stderr).toContain(message)
})
