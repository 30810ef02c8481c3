import { spawnSync } from 'node:child_process'
import { createHmac, randomBytes } from 'node:crypto'
import { mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import {
  formatTarget,
  OperationEncoder,
  parseTarget,
  type RemoteAddress,
  remoteTarget,
  SshConnections,
} from '@lsync/sync'
import { describe, expect, test } from 'vitest'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { hasSshd, type SshServer, useSshServer } from '../support/sshd.ts'
import { batchOf, codesOf, fileOf, meta, never, path } from './wire.ts'

const isRoot = process.geteuid?.() === 0
const lsync = fileURLToPath(new URL('../../packages/cli/bin/lsync', import.meta.url))

function addressOf(server: SshServer, target: string): RemoteAddress {
  const address = parseTarget(`ssh://${server.user}@${server.address}:${server.port}${target}`)
  if (address.scheme === 'local') throw new Error('not remote')
  return address
}

interface Way {
  readonly knownHosts?: string
  readonly identity?: string
  readonly lsync?: string
}

function over(kind: 'ssh2' | 'ssh', server: SshServer, target: string, way: Way = {}) {
  const identities = [way.identity ?? server.clientKey]
  const knownHosts = [way.knownHosts ?? server.knownHosts]
  const connections = new SshConnections({ identities, knownHosts, connectTimeoutMs: 20_000 })
  const [program, ...options] = server.ssh
  const words = options.filter((_, i) => options[i] !== '-p' && options[i - 1] !== '-p')
  const rsh = [program, ...words].map((word) =>
    way.knownHosts ? word.replace(server.knownHosts, way.knownHosts) : word,
  )
  const common = { connections, remoteLsync: way.lsync ?? lsync, timeoutMs: 30_000 }
  return remoteTarget(addressOf(server, target), kind === 'ssh' ? { ...common, rsh: rsh.join(' ') } : common)
}

describe.skipIf(!needs('sshd', hasSshd) || !needs('root', isRoot))('a target over ssh', () => {
  const disk = useFileSystem('ext4')
  const sshd = useSshServer()

  function place(): string {
    const at = disk.current.fresh()
    mkdirSync(`${at}/t`)
    return `${at}/t`
  }

  describe.each(['ssh2', 'ssh'] as const)('by %s', (kind) => {
    test('takes operations, stores a checkpoint, and is free when it is closed', async () => {
      const at = place()
      const target = over(kind, sshd.current, at)
      const state = await target.open(never)
      expect(state.isEmpty).toBe(true)
      const failures = await target.deliver(0, batchOf(fileOf('f', 'x'.repeat(1000)), fileOf('no/f', 'y')))
      expect(codesOf(failures)).toEqual([[1, 'ENOENT']])
      await target.barrier({ root: 'r', sequence: 1 })
      await target.close()
      const again = over(kind, sshd.current, at)
      expect((await again.open(never)).checkpoint).toEqual({ root: 'r', sequence: 1 })
      await again.close()
      expect(readdirSync(at)).toEqual(['f'])
    })

    test('is lost with its connection, and leaves nothing of the file that was under way', async () => {
      const at = place()
      const target = over(kind, sshd.current, at)
      await target.open(never)
      const encoder = new OperationEncoder()
      encoder.operation({ do: 'file', path: path('f'), meta: meta(), sizeBytes: 1 << 20, extents: [[0, 1 << 20]] })
      encoder.content(Buffer.alloc(1000))
      await target.deliver(0, encoder.take())
      expect(sshd.current.cutConnections()).toBeGreaterThan(0)
      await expect(target.barrier()).rejects.toMatchObject({ code: 'CONNECTION_LOST' })
      await target.close()
      await target.open(never)
      expect(readdirSync(at)).toEqual([])
      expect(readdirSync(`${at}/../.lsync.sync.t/stage`)).toEqual([])
      await target.close()
    })

    test('says that there is no lsync', async () => {
      const target = over(kind, sshd.current, place(), { lsync: '/nowhere/lsync' })
      await expect(target.open(never)).rejects.toMatchObject({ code: 'REMOTE_LSYNC_MISSING' })
    })

    test('says that what answers is no lsync, and shows what it says', async () => {
      const target = over(kind, sshd.current, place(), { lsync: 'echo Welcome to' })
      const quoted = over(kind, sshd.current, place(), { lsync: '/bin/echo' })
      await expect(target.open(never)).rejects.toMatchObject({ code: 'REMOTE_LSYNC_MISSING' })
      const error = await quoted.open(never).catch((thrown) => thrown)
      expect(error).toMatchObject({ code: 'PROTOCOL_VIOLATED' })
      expect(error.message).toMatch(/serve --stdio/)
    })

    test('is refused as the server says', async () => {
      const target = over(kind, sshd.current, '/nowhere/at/all')
      await expect(target.open(never)).rejects.toMatchObject({ code: 'SERVED_PATH' })
      await target.close()
    })

    test('an unknown host key is refused, and known_hosts stays as it was', async () => {
      const knownHosts = `${disk.current.fresh()}/known_hosts`
      writeFileSync(knownHosts, '')
      const target = over(kind, sshd.current, place(), { knownHosts })
      const code = kind === 'ssh2' ? 'HOST_KEY_UNKNOWN' : 'CONNECT_FAILED'
      await expect(target.open(never)).rejects.toMatchObject({ code })
      expect(readFileSync(knownHosts, 'latin1')).toBe('')
    })
  })

  describe('a host key', () => {
    const [type, key] = ['ssh-ed25519', 'AAAAC3NzaC1lZDI1NTE5AAAAIGxkZmFrZWtleWZha2VrZXlmYWtla2V5ZmFrZWtleWZha2U']
    const openWith = async (lines: (server: SshServer) => string) => {
      const knownHosts = `${disk.current.fresh()}/known_hosts`
      writeFileSync(knownHosts, lines(sshd.current))
      const target = over('ssh2', sshd.current, place(), { knownHosts })
      try {
        await target.open(never)
        return 'open'
      } catch (error) {
        return (error as { code: string }).code
      } finally {
        await target.close()
      }
    }
    const name = ({ address, port }: SshServer) => `[${address}]:${port}`

    test('is accepted by its hashed name', async () => {
      const hashed = (text: string) => {
        const salt = randomBytes(20)
        return `|1|${salt.toString('base64')}|${createHmac('sha1', salt).update(text).digest('base64')}`
      }
      expect(await openWith((server) => `${hashed(name(server))} ${server.hostKey}\n`)).toBe('open')
      expect(await openWith((server) => `${hashed(`${name(server)}0`)} ${server.hostKey}\n`)).toBe('HOST_KEY_UNKNOWN')
    })

    test('that is another than the known one is refused', async () => {
      expect(await openWith((server) => `${name(server)} ${type} ${key}\n`)).toBe('HOST_KEY_CHANGED')
    })

    test('that is revoked is refused', async () => {
      const lines = (server: SshServer) => `${name(server)} ${server.hostKey}\n@revoked * ${server.hostKey}\n`
      expect(await openWith(lines)).toBe('HOST_KEY_REVOKED')
    })

    test('that only an authority could vouch for is refused', async () => {
      expect(await openWith((server) => `@cert-authority * ${server.hostKey}\n`)).toBe('HOST_KEY_UNKNOWN')
    })

    test('that changes while connections are made is refused from then on', async () => {
      const at = place()
      const before = over('ssh2', sshd.current, at)
      await before.open(never)
      await before.close()
      await sshd.current.changeHostKey()
      try {
        await expect(over('ssh2', sshd.current, at).open(never)).rejects.toMatchObject({ code: 'HOST_KEY_CHANGED' })
      } finally {
        const line = readFileSync(sshd.current.knownHosts, 'latin1')
        const scanned = spawnSync('ssh-keyscan', [
          '-t',
          'ed25519',
          '-p',
          String(sshd.current.port),
          sshd.current.address,
        ])
        writeFileSync(sshd.current.knownHosts, scanned.stdout.length > 0 ? scanned.stdout : line)
      }
    })
  })

  test('a key that the server does not know is refused, and the message says what was tried', async () => {
    const identity = `${disk.current.fresh()}/id`
    spawnSync('ssh-keygen', ['-q', '-t', 'ed25519', '-N', '', '-f', identity])
    const error = await over('ssh2', sshd.current, place(), { identity })
      .open(never)
      .catch((thrown) => thrown)
    expect(error).toMatchObject({ code: 'AUTHENTICATION_FAILED' })
    expect(error.message).toContain(identity)
  })

  test('a key with a passphrase is not asked for', async () => {
    const identity = `${disk.current.fresh()}/id`
    spawnSync('ssh-keygen', ['-q', '-t', 'ed25519', '-N', 'secret', '-f', identity])
    const opened = over('ssh2', sshd.current, place(), { identity }).open(never)
    await expect(opened).rejects.toMatchObject({ code: 'IDENTITY_UNUSABLE' })
  })

  test('nobody at the port is an error that may be tried again', async () => {
    const address = { ...addressOf(sshd.current, '/x'), port: 1 }
    const target = remoteTarget(address, { connections: new SshConnections() })
    await expect(target.open(never)).rejects.toMatchObject({ code: 'CONNECT_FAILED' })
    expect(target.description).toBe(formatTarget(address))
  })

  test('many targets share connections, and each is free at its end', async () => {
    const { clientKey, knownHosts } = sshd.current
    const connections = new SshConnections({ identities: [clientKey], knownHosts: [knownHosts] })
    const places = Array.from({ length: 10 }, place)
    const before = sshd.current.log().split('Accepted publickey').length
    const targets = places.map((at) => remoteTarget(addressOf(sshd.current, at), { connections, remoteLsync: lsync }))
    for (const target of targets) await target.open(never)
    expect(sshd.current.log().split('Accepted publickey').length - before).toBe(2)
    await Promise.all(targets.map((target, i) => target.deliver(0, batchOf(fileOf('f', `content ${i}`)))))
    await Promise.all(targets.map((target) => target.close()))
    for (const [i, at] of places.entries()) expect(readFileSync(`${at}/f`, 'latin1')).toBe(`content ${i}`)
  })

  describe('a forced command', () => {
    test('pins the client to its directory and to new names, whatever command it asks for', async () => {
      const root = disk.current.fresh()
      mkdirSync(`${root}/mine`)
      writeFileSync(`${root}/mine/old`, 'old')
      const secret = disk.current.fresh()
      mkdirSync(`${secret}/t`)
      sshd.current.allow(`restrict,command="${lsync} serve --stdio --root ${root} --append-only"`)
      try {
        const outside = over('ssh2', sshd.current, `${secret}/t`)
        await expect(outside.open(never)).rejects.toMatchObject({ code: 'SERVED_PATH' })
        await outside.close()
        const target = over('ssh', sshd.current, '/mine', { lsync: 'rm -rf' })
        await target.open(never)
        const failures = await target.deliver(
          0,
          batchOf(fileOf('new', 'new'), fileOf('old', 'changed'), { do: 'remove', path: path('old') }),
        )
        expect(codesOf(failures)).toEqual([
          [1, 'ACCESS_REFUSED'],
          [2, 'ACCESS_REFUSED'],
        ])
        await target.close()
        expect(readFileSync(`${root}/mine/old`, 'latin1')).toBe('old')
        expect(readFileSync(`${root}/mine/new`, 'latin1')).toBe('new')
        expect(readdirSync(secret)).toEqual(['t'])
      } finally {
        sshd.current.allow('')
      }
    })
  })

  test('the command syncs over ssh2 and SFTP as it was built', () => {
    const at = place()
    const upper = disk.current.fresh()
    mkdirSync(`${upper}/d`)
    writeFileSync(`${upper}/d/f`, 'content')
    const { user, address, port, clientKey, knownHosts } = sshd.current
    const home = disk.current.fresh()
    mkdirSync(`${home}/.ssh`)
    writeFileSync(`${home}/.ssh/known_hosts`, readFileSync(knownHosts))
    for (const scheme of ['ssh', 'sftp']) {
      const target = `${scheme}://${user}@${address}:${port}${at}-${scheme}`
      const state = disk.current.fresh()
      const options = ['--once', '--identity', clientKey, '--remote-lsync', lsync, '--state', state]
      const { status, stderr } = spawnSync(lsync, ['sync', upper, target, ...options], {
        env: { ...process.env, HOME: home },
        encoding: 'utf8',
      })
      expect([status, stderr]).toEqual([0, expect.not.stringContaining('error')])
      expect(readFileSync(`${at}-${scheme}/d/f`, 'latin1')).toBe('content')
    }
  })

  test('the server killed in mid-file gives the lock back, and the old content stays', async () => {
    const at = place()
    const target = over('ssh2', sshd.current, at)
    await target.open(never)
    await target.deliver(0, batchOf(fileOf('f', 'old')))
    const encoder = new OperationEncoder()
    encoder.operation({ do: 'file', path: path('f'), meta: meta(), sizeBytes: 1 << 20, extents: [[0, 1 << 20]] })
    encoder.content(Buffer.alloc(1000))
    await target.deliver(0, encoder.take())
    const [pid] = serversOf(at)
    process.kill(pid as number, 'SIGKILL')
    await expect(target.barrier()).rejects.toMatchObject({ code: 'CONNECTION_LOST' })
    await target.close()
    await target.open(never)
    expect(readFileSync(`${at}/f`, 'latin1')).toBe('old')
    expect(readdirSync(`${at}/../.lsync.sync.t/stage`)).toEqual([])
    await target.close()
    expect(statSync(`${at}/f`).size).toBe(3)
  })
})

/** Processes of `lsync serve` that have this target open. */
function serversOf(at: string): number[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => {
      try {
        const isServer = readFileSync(`/proc/${pid}/cmdline`, 'latin1').includes('serve\0--stdio')
        return isServer && readFileSync(`/proc/${pid}/maps`, 'latin1') !== '' && opens(pid, at)
      } catch {
        return false
      }
    })
}

function opens(pid: number, at: string): boolean {
  return readdirSync(`/proc/${pid}/fd`).some((fd) => {
    try {
      const { dev, ino } = statSync(`/proc/${pid}/fd/${fd}`)
      const wanted = statSync(at)
      return dev === wanted.dev && ino === wanted.ino
    } catch {
      return false
    }
  })
}
