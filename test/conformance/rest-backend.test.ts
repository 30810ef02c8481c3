import { randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { pipeline, Readable } from 'node:stream'
import { type Backend, RestBackend, type RestOptions } from '@lsync/snapshot'
import { describe, expect, onTestFinished, test } from 'vitest'
import { type Fault, faultsInTurn, startFaultProxy } from '../support/fault-proxy.ts'
import { needs } from '../support/needs.ts'
import { hasRclone, useRclone } from '../support/rclone.ts'
import { describeBackend } from './backend.ts'
import { closing, httpFaults, QUICK, refOf } from './bad-line.ts'

describe.skipIf(!needs('rclone', hasRclone))('rclone serve restic', () => {
  const rclone = useRclone()
  let places = 0

  describeBackend('a repository behind a REST server', () => {
    const place = ++places
    const open = async () => new RestBackend(`http://127.0.0.1:${rclone.current.port}/place${place}/`)
    return { open, reopen: open, cleanUp: async () => undefined }
  })

  describeBackend('a repository behind a REST server on a bad line', () => {
    const place = ++places
    let proxy: Awaited<ReturnType<typeof startFaultProxy>> | undefined
    const open = async () => {
      proxy ??= await startFaultProxy({
        port: rclone.current.port,
        speaks: 'http',
        fault: faultsInTurn(3, httpFaults(500)),
      })
      return new RestBackend(`http://127.0.0.1:${proxy.port}/bad${place}`, QUICK)
    }
    return {
      open,
      reopen: open,
      cleanUp: async () => {
        if ((proxy?.exchanges ?? 0) > 10) expect(proxy?.faults).toBeGreaterThan(2)
        await proxy?.stop()
      },
    }
  })

  async function behindProxy(fault: (exchange: number) => Fault | undefined, options: RestOptions = {}) {
    const proxy = await startFaultProxy({ port: rclone.current.port, speaks: 'http' })
    onTestFinished(() => proxy.stop())
    const address = `http://127.0.0.1:${proxy.port}/single${++places}/`
    const backend = closing(new RestBackend(address, { ...QUICK, ...options }))
    await backend.create()
    proxy.use(fault)
    return { proxy, backend }
  }

  test('an upload that is cut off is not seen by anybody, and the next attempt stores it whole', async () => {
    const content = randomBytes(3_000_000)
    // rclone removes what it has of a cut upload a little later: the next attempt must not come before that.
    const { backend, proxy } = await behindProxy(
      (exchange) => (exchange < 3 ? { kind: 'cut', direction: 'up', afterBytes: 1_000_000 } : undefined),
      { firstDelayMs: 1500 },
    )
    await backend.put(refOf('pack', content), content)
    expect(proxy.faults).toBe(3)
    expect((await backend.get(refOf('pack', content))).equals(content)).toBe(true)
  })

  test('a silent server is given up, and asked again over another connection', async () => {
    const content = randomBytes(100)
    const { backend, proxy } = await behindProxy(
      (exchange) => (exchange === 0 ? { kind: 'stall', direction: 'down', afterBytes: 0 } : undefined),
      { idleTimeoutMs: 500 },
    )
    expect(await backend.stat(refOf('index', content))).toBeUndefined()
    expect(proxy.exchanges).toBeGreaterThanOrEqual(2)
  })

  test('what never works ends with an error that says why, in the time it was given', async () => {
    const retried: string[] = []
    const { backend } = await behindProxy(() => ({ kind: 'status', status: 503 }), {
      retryForMs: 300,
      onRetry: ({ what, error }) => retried.push(`${what}: ${(error as Error).message}`),
    })
    const start = performance.now()
    const file = { kind: 'pack', name: 'ab'.repeat(32) } as const
    await expect(backend.stat(file)).rejects.toMatchObject({
      code: 'BACKEND_FAILED',
      message: expect.stringMatching(/^looking for pack abababab failed at rest:http:.*: 503/),
    })
    expect(performance.now() - start).toBeLessThan(20_000)
    expect(retried[0]).toBe('looking for pack abababab: 503')
  })

  test('a pause between attempts ends with the signal', async () => {
    const abort = new AbortController()
    const reason = new Error('enough')
    const { backend } = await behindProxy(() => ({ kind: 'refuse' }), {
      firstDelayMs: 20_000,
      onRetry: () => abort.abort(reason),
    })
    const start = performance.now()
    const file = { kind: 'pack', name: 'ab'.repeat(32) } as const
    await expect(backend.get(file, undefined, { signal: abort.signal })).rejects.toBe(reason)
    expect(performance.now() - start).toBeLessThan(9_000)
  })

  test('a call under way ends with the signal', async () => {
    const abort = new AbortController()
    const reason = new Error('enough')
    const { backend } = await behindProxy(
      () => {
        setTimeout(() => abort.abort(reason), 50)
        return { kind: 'stall', direction: 'down', afterBytes: 0 }
      },
      { idleTimeoutMs: 30_000 },
    )
    const file = { kind: 'pack', name: 'ab'.repeat(32) } as const
    const start = performance.now()
    await expect(backend.get(file, undefined, { signal: abort.signal })).rejects.toBe(reason)
    expect(performance.now() - start).toBeLessThan(15_000)
  })

  test('nothing is told of passwords', () => {
    const backend = closing(new RestBackend('http://me:secret@127.0.0.1:1/x'))
    expect(backend.location).toBe('rest:http://127.0.0.1:1/x/')
  })

  test('nobody there is an error in the time for a first answer', async () => {
    const backend = closing(new RestBackend('http://127.0.0.1:1/', { firstDelayMs: 1, firstAnswerWithinMs: 100 }))
    await expect(backend.stat({ kind: 'config', name: '' })).rejects.toMatchObject({
      code: 'BACKEND_FAILED',
      message: expect.stringContaining('ECONNREFUSED'),
    })
  })
})

describe.skipIf(!needs('rclone', hasRclone))('rclone serve restic with TLS and a password', () => {
  const rclone = useRclone({ tls: true, user: 'me', password: 'p@ss:word' })

  test('lets in who knows both', async () => {
    const ca = readFileSync(rclone.current.certificate, 'utf8')
    const address = `https://me:p%40ss%3Aword@127.0.0.1:${rclone.current.port}/`
    const content = randomBytes(100)
    const backend = closing(new RestBackend(address, { ca }))
    await backend.create()
    await backend.put(refOf('index', content), content)
    const other = new RestBackend(`https://localhost:${rclone.current.port}/`, {
      ca,
      username: 'me',
      password: 'p@ss:word',
    })
    expect((await closing(other).get(refOf('index', content))).equals(content)).toBe(true)
  })

  test('a wrong password is an error at once', async () => {
    const ca = readFileSync(rclone.current.certificate, 'utf8')
    const backend = closing(new RestBackend(`https://me:wrong@127.0.0.1:${rclone.current.port}/`, { ca }))
    await expect(backend.create()).rejects.toMatchObject({ code: 'BACKEND_DENIED' })
    await expect(backend.put({ kind: 'config', name: '' }, randomBytes(10))).rejects.toMatchObject({
      code: 'BACKEND_DENIED',
    })
  })

  test('a certificate of nobody known is an error at once', async () => {
    const backend = closing(new RestBackend(`https://me:wrong@127.0.0.1:${rclone.current.port}/`))
    await expect(backend.create()).rejects.toMatchObject({
      code: 'BACKEND_FAILED',
      message: expect.stringContaining('certificate'),
    })
  })
})

describe.skipIf(!needs('rclone', hasRclone))('rclone serve restic that only takes new files', () => {
  const rclone = useRclone({ appendOnly: true })

  test('takes the same file twice, keeps another config, and deletes locks alone', async () => {
    const backend = closing(new RestBackend(`http://127.0.0.1:${rclone.current.port}/`))
    await backend.create()
    const content = randomBytes(100)
    const file = refOf('pack', content)
    expect(await backend.put(file, content)).toBe(true)
    expect(await backend.put(file, content)).toBe(true)
    await expect(backend.delete(file)).rejects.toMatchObject({ code: 'BACKEND_DENIED' })
    const config = { kind: 'config', name: '' } as const
    expect(await backend.put(config, Buffer.from('one'))).toBe(true)
    expect(await backend.put(config, Buffer.from('two'), { exclusive: true })).toBe(false)
    await expect(backend.put(config, Buffer.from('two'))).rejects.toMatchObject({ code: 'BACKEND_DENIED' })
    expect((await backend.get(config)).toString()).toBe('one')
    const lock = { kind: 'lock', name: file.name } as const
    await backend.put(lock, content)
    expect(await backend.delete(lock)).toBe(true)
  })
})

function* zeros(): Generator<Buffer> {
  for (;;) yield Buffer.alloc(1 << 16)
}

describe('a server that means harm', () => {
  async function hostile(answer: (request: IncomingMessage, response: ServerResponse) => void): Promise<RestBackend> {
    const server = createServer(answer)
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    onTestFinished(() => {
      server.closeAllConnections()
      server.close()
    })
    const address = server.address()
    const port = typeof address === 'object' && address !== null ? address.port : 0
    return closing(new RestBackend(`http://127.0.0.1:${port}/`, { ...QUICK, retryForMs: 500 }))
  }
  const name = 'ab'.repeat(32)

  async function listed(backend: Backend): Promise<unknown[]> {
    const found: unknown[] = []
    for await (const file of backend.list('index')) found.push(file)
    return found
  }

  /** How much this process grows meanwhile. */
  async function growthBytes(use: () => Promise<unknown>): Promise<number> {
    const before = process.memoryUsage.rss()
    await use()
    return process.memoryUsage.rss() - before
  }

  test('an absurd length is refused before a byte of it is held', async () => {
    const backend = await hostile((request, response) => {
      response.writeHead(200, { 'Content-Length': 1e15 })
      if (request.method === 'HEAD') response.end()
      else response.write(Buffer.alloc(1 << 20))
    })
    const growth = await growthBytes(() =>
      expect(backend.get({ kind: 'index', name })).rejects.toMatchObject({
        code: 'REPOSITORY_FILE_TOO_LARGE',
        message: expect.stringContaining('1000000000000000 bytes'),
      }),
    )
    expect(growth).toBeLessThan(100_000_000)
  })

  test('a config without an end is cut off at its limit', async () => {
    const backend = await hostile((request, response) => {
      response.writeHead(200)
      if (request.method === 'HEAD') response.end()
      else pipeline(Readable.from(zeros()), response, () => undefined)
    })
    const growth = await growthBytes(() =>
      expect(backend.get({ kind: 'config', name: '' })).rejects.toMatchObject({ code: 'BACKEND_ANSWER_INVALID' }),
    )
    expect(growth).toBeLessThan(100_000_000)
  })

  test('more than the range that was asked for is left out', async () => {
    const backend = await hostile((_, response) => {
      response.writeHead(206)
      response.end(Buffer.alloc(100_000, 'x'))
    })
    expect((await backend.get({ kind: 'pack', name }, { offset: 5, length: 10 })).toString()).toBe('xxxxxxxxxx')
  })

  test('a server that knows no ranges is understood', async () => {
    const backend = await hostile((_, response) => void response.end('0123456789'))
    expect((await backend.get({ kind: 'pack', name }, { offset: 5, length: 3 })).toString()).toBe('567')
  })

  test.each([
    ['{"name":"x"}', 'it is no list'],
    ['[{"name":1,"size":1}]', 'no name or size'],
    [`[{"name":"${name}","size":-1}]`, 'no name or size'],
    [`[{"name":"${name}","size":1e300}]`, 'no name or size'],
    [`[{"name":"${name}","size":1}`, 'does not end'],
    ['[{"name":"x"]]', 'not JSON'],
    ['[,]', 'not JSON'],
    ['[null]', 'no name or size'],
    ['<html>', 'it is no list'],
  ])('the listing %s is refused: %s', async (text, reason) => {
    const backend = await hostile((_, response) => {
      response.setHeader('Content-Type', 'application/vnd.x.restic.rest.v2')
      response.end(text)
    })
    await expect(listed(backend)).rejects.toMatchObject({
      code: 'BACKEND_ANSWER_INVALID',
      message: expect.stringContaining(reason),
    })
  })

  test('names that no repository has are left out of a listing, whatever is in them', async () => {
    const backend = await hostile((_, response) => {
      response.setHeader('Content-Type', 'application/vnd.x.restic.rest.v2')
      response.end(` [\n{"name":"../]},","size":1}, {"size":7,"name":"${name}"},{"name":"\\"","size":1} ]`)
    })
    expect(await listed(backend)).toEqual([{ name, sizeBytes: 7 }])
  })

  test('the older listing, names alone, is completed', async () => {
    const backend = await hostile((request, response) => {
      if (request.method === 'HEAD') response.writeHead(200, { 'Content-Length': 9 }).end()
      else response.setHeader('Content-Type', 'application/vnd.x.restic.rest.v1').end(`["${name}"]`)
    })
    expect(await listed(backend)).toEqual([{ name, sizeBytes: 9 }])
  })

  test('a redirection is an error: it may lead anywhere', async () => {
    const backend = await hostile(
      (_, response) => void response.writeHead(302, { Location: 'http://169.254.169.254/' }).end(),
    )
    await expect(backend.stat({ kind: 'config', name: '' })).rejects.toMatchObject({ code: 'BACKEND_ANSWER_INVALID' })
  })
})
