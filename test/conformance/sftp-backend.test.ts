import { randomBytes } from 'node:crypto'
import { mkdirSync, mkdtempSync, readdirSync, rmSync, statSync, truncateSync, writeFileSync } from 'node:fs'
import { createServer, type Server } from 'node:net'
import { tmpdir } from 'node:os'
import { SftpBackend, type SftpOptions } from '@lsync/snapshot'
import { describe, expect, onTestFinished, test } from 'vitest'
import { type Fault, startFaultProxy } from '../support/fault-proxy.ts'
import { needs } from '../support/needs.ts'
import { hasSshd, useSshServer } from '../support/sshd.ts'
import { describeBackend } from './backend.ts'
import { closing, refOf } from './bad-line.ts'

/** Failures that cost no time, and a limit that only a broken backend reaches. */
const QUICK = { firstDelayMs: 1, idleTimeoutMs: 5_000, retryForMs: 90_000, firstAnswerWithinMs: 90_000 }

/** What happens to the first connections of a test; the next ones are good. */
const FAULTS: readonly Fault[] = [
  { kind: 'cut', direction: 'down', afterBytes: 5_000 },
  { kind: 'refuse' },
  { kind: 'cut', direction: 'up', afterBytes: 40_000 },
  { kind: 'truncate', afterBytes: 1_000 },
  { kind: 'cut', direction: 'up', afterBytes: 4_000 },
]

describe.skipIf(!needs('sshd', hasSshd))('an SFTP server', () => {
  const sshd = useSshServer()

  function directory(): string {
    return mkdtempSync(`${tmpdir()}/lsync-sftp-`)
  }

  /** How the server is reached at a port, its own or a proxy's. */
  function at(path: string, port: number, options: SftpOptions = {}): SftpBackend {
    const { address, clientKey, hostKey, user } = sshd.current
    const known = `${path}.known_hosts`
    writeFileSync(known, `[${address}]:${port} ${hostKey}\n`)
    const ssh = { identities: [clientKey], knownHosts: [known], connectTimeoutMs: 20_000 }
    return new SftpBackend(`//${user}@${address}:${port}/${path}/repository`, { ssh, ...options })
  }

  function cleanUp(path: string): void {
    rmSync(path, { recursive: true, force: true })
    rmSync(`${path}.known_hosts`, { force: true })
  }

  describeBackend('a repository on an SFTP server', () => {
    const path = directory()
    const open = async () => at(path, sshd.current.port)
    return { open, reopen: open, cleanUp: async () => cleanUp(path) }
  })

  describeBackend('a repository on an SFTP server on a bad line', () => {
    const path = directory()
    let proxy: Awaited<ReturnType<typeof startFaultProxy>> | undefined
    const open = async () => {
      proxy ??= await startFaultProxy({
        port: sshd.current.port,
        speaks: 'bytes',
        fault: (connection) => FAULTS[connection],
      })
      return at(path, proxy.port, QUICK)
    }
    return {
      open,
      reopen: open,
      cleanUp: async () => {
        expect(proxy?.faults).toBeGreaterThan(2)
        await proxy?.stop()
        cleanUp(path)
      },
    }
  })

  function fresh(options: SftpOptions = {}) {
    const path = directory()
    onTestFinished(() => cleanUp(path))
    return { path, backend: closing(at(path, sshd.current.port, options)) }
  }

  test('nothing is left beside a file that was put, or whose upload was cut', async () => {
    const path = directory()
    onTestFinished(() => cleanUp(path))
    const proxy = await startFaultProxy({ port: sshd.current.port, speaks: 'bytes' })
    onTestFinished(() => proxy.stop())
    const backend = closing(at(path, proxy.port, QUICK))
    await backend.create()
    const content = randomBytes(5_000_000)
    const file = refOf('pack', content)
    expect(proxy.cutAll()).toBe(1)
    proxy.use((connection) => (connection < 2 ? { kind: 'cut', direction: 'up', afterBytes: 2_000_000 } : undefined))
    await backend.put(file, content)
    expect(proxy.faults).toBe(2)
    expect((await backend.get(file)).equals(content)).toBe(true)
    expect(readdirSync(`${path}/repository/data/${file.name.slice(0, 2)}`)).toEqual([file.name])
  })

  test('a line that falls silent is given up, and another one is made', async () => {
    const path = directory()
    onTestFinished(() => cleanUp(path))
    const proxy = await startFaultProxy({ port: sshd.current.port, speaks: 'bytes' })
    onTestFinished(() => proxy.stop())
    const backend = closing(at(path, proxy.port, { ...QUICK, idleTimeoutMs: 1_000 }))
    const start = performance.now()
    proxy.use((connection) => (connection === 0 ? { kind: 'stall', direction: 'down', afterBytes: 20_000 } : undefined))
    await backend.create()
    const content = randomBytes(200_000)
    await backend.put(refOf('index', content), content)
    expect((await backend.get(refOf('index', content))).equals(content)).toBe(true)
    expect(proxy.exchanges).toBeGreaterThanOrEqual(2)
    // Long before ssh's own signs of life (a minute) tell.
    expect(performance.now() - start).toBeLessThan(40_000)
  })

  test('files are private, as are their directories', async () => {
    const { path, backend } = fresh()
    await backend.create()
    const file = refOf('pack', Buffer.from('x'))
    await backend.put(file, Buffer.from('x'))
    const folder = `${path}/repository/data/${file.name.slice(0, 2)}`
    expect(statSync(folder).mode & 0o777).toBe(0o700)
    expect(statSync(`${folder}/${file.name}`).mode & 0o777).toBe(0o600)
  })

  test('the folder of a pack is made when it is missing', async () => {
    const { path, backend } = fresh()
    const file = refOf('pack', Buffer.from('x'))
    await backend.put(file, Buffer.from('x'))
    expect(readdirSync(`${path}/repository/data/${file.name.slice(0, 2)}`)).toEqual([file.name])
  })

  test('what others leave in the directories is not listed', async () => {
    const { path, backend } = fresh()
    await backend.create()
    const name = 'ab'.repeat(32)
    for (const wrong of [`data/cd/${name}`, `data/${name}`, `index/${name}-tmp`, 'index/\udcff']) {
      writeFileSync(`${path}/repository/${wrong}`, 'x')
    }
    mkdirSync(`${path}/repository/data/ab/x`)
    const names: string[] = []
    for (const kind of ['pack', 'index'] as const) {
      for await (const { name } of backend.list(kind)) names.push(name)
    }
    expect(names).toEqual([])
  })

  test('an absurd length is refused before a byte of it is held', async () => {
    const { path, backend } = fresh()
    await backend.create()
    const name = 'ab'.repeat(32)
    writeFileSync(`${path}/repository/index/${name}`, '')
    truncateSync(`${path}/repository/index/${name}`, 1e12)
    await expect(backend.get({ kind: 'index', name })).rejects.toMatchObject({ code: 'REPOSITORY_FILE_TOO_LARGE' })
    expect((await backend.get({ kind: 'index', name }, { offset: 9e11, length: 10 })).equals(Buffer.alloc(10))).toBe(
      true,
    )
  })

  test('a host key that nobody knows is an error at once', async () => {
    const { path } = fresh()
    writeFileSync(`${path}.known_hosts`, '')
    const { address, clientKey, port, user } = sshd.current
    const ssh = { identities: [clientKey], knownHosts: [`${path}.known_hosts`] }
    const backend = closing(new SftpBackend(`//${user}@${address}:${port}/${path}`, { ssh }))
    await expect(backend.stat({ kind: 'config', name: '' })).rejects.toMatchObject({ code: 'HOST_KEY_UNKNOWN' })
  })

  test('a path without a slash before it begins where the login leads to', async () => {
    const { address, clientKey, hostKey, port, user } = sshd.current
    const { path } = fresh()
    writeFileSync(`${path}.known_hosts`, `[${address}]:${port} ${hostKey}\n`)
    const ssh = { identities: [clientKey], knownHosts: [`${path}.known_hosts`] }
    const home = process.env['HOME'] ?? '/'
    const up = home
      .split('/')
      .filter(Boolean)
      .map(() => '..')
    const relative = [...up, path.slice(1)].join('/')
    const content = randomBytes(10)
    const file = refOf('index', content)
    for (const form of [`//${user}@${address}:${port}/${relative}/r`, `//${user}@${address}:${port}/${path}/r`]) {
      const backend = closing(new SftpBackend(form, { ssh }))
      await backend.create()
      await backend.put(file, content)
      expect(readdirSync(`${path}/r/index`)).toEqual([file.name])
    }
  })

  test('the system’s own ssh carries it as well', async () => {
    const { ssh, user, address } = sshd.current
    const { path } = fresh()
    const backend = closing(new SftpBackend(`${user}@${address}:${path}/r`, { rsh: ssh.join(' ') }))
    await backend.create()
    const content = randomBytes(1_000_000)
    await backend.put(refOf('pack', content), content)
    expect((await backend.get(refOf('pack', content))).equals(content)).toBe(true)
  })
})

describe('an SFTP server that means harm', () => {
  /** Speaks SFTP 3 over a socket, without ssh, as `--rsh` allows: the bytes of each answer are the test's. */
  async function hostile(answer: (type: number, id: number) => Buffer): Promise<SftpBackend> {
    const server: Server = createServer((socket) => {
      let received = Buffer.alloc(0)
      socket.on('error', () => undefined)
      socket.on('data', (chunk: Buffer) => {
        received = Buffer.concat([received, chunk])
        while (received.length >= 4 && received.length >= 4 + received.readUInt32BE(0)) {
          const packet = received.subarray(4, 4 + received.readUInt32BE(0))
          received = received.subarray(4 + packet.length)
          const type = packet[0] as number
          socket.write(framed(type === 1 ? Buffer.from([2, 0, 0, 0, 3]) : answer(type, packet.readUInt32BE(1))))
        }
      })
    })
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    onTestFinished(() => void server.close())
    const address = server.address()
    const port = typeof address === 'object' && address !== null ? address.port : 0
    const script = `import { connect } from 'node:net'; const s = connect(${port}, '127.0.0.1'); process.stdin.pipe(s); s.pipe(process.stdout)`
    const rsh = `${process.execPath} --input-type=module -e "${script.replaceAll('"', '\\"')}" --`
    return closing(new SftpBackend('host:/x', { ...QUICK, retryForMs: 500, maxListedFiles: 100_000, rsh }))
  }

  function framed(packet: Buffer): Buffer {
    const length = Buffer.alloc(4)
    length.writeUInt32BE(packet.length)
    return Buffer.concat([length, packet])
  }

  function reply(type: number, id: number, ...numbers: number[]): Buffer {
    const bytes = Buffer.alloc(5 + 4 * numbers.length)
    bytes[0] = type
    bytes.writeUInt32BE(id, 1)
    for (const [i, number] of numbers.entries()) bytes.writeUInt32BE(number, 5 + 4 * i)
    return bytes
  }

  test('a size beyond all numbers is refused', async () => {
    const backend = await hostile((_, id) => reply(105, id, 1, 0xffff_ffff, 0xffff_ffff))
    await expect(backend.stat({ kind: 'config', name: '' })).rejects.toMatchObject({ code: 'BACKEND_ANSWER_INVALID' })
  })

  test('a list without an end is refused while it comes', async () => {
    const name = Buffer.concat([Buffer.from([0, 0, 0, 1]), Buffer.from('x'), Buffer.alloc(8)])
    const many = Buffer.concat(Array.from({ length: 20_000 }, () => name))
    const backend = await hostile((type, id) =>
      type === 11
        ? Buffer.concat([reply(102, id, 1), Buffer.from('h')])
        : type === 12
          ? Buffer.concat([reply(104, id, 20_000), many])
          : reply(101, id, 0, 0, 0),
    )
    const list = async () => {
      for await (const _ of backend.list('index'));
    }
    await expect(list()).rejects.toMatchObject({
      code: 'BACKEND_ANSWER_INVALID',
      message: expect.stringContaining('more than 100000 files'),
    })
  })

  test('a refusal is an error at once', async () => {
    const backend = await hostile((_, id) => reply(101, id, 3, 0, 0))
    const put = backend.put({ kind: 'config', name: '' }, randomBytes(10))
    await expect(put).rejects.toMatchObject({ code: 'BACKEND_DENIED' })
  })

  test('an answer that is none ends the connection', async () => {
    const backend = await hostile((_, id) => reply(200, id, 1))
    await expect(backend.stat({ kind: 'config', name: '' })).rejects.toMatchObject({ code: 'PROTOCOL_VIOLATED' })
  })
})
