import { randomBytes } from 'node:crypto'
import dns from 'node:dns'
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http'
import { pipeline, Readable } from 'node:stream'
import { type Backend, S3Backend, type S3Options } from '@lsync/snapshot'
import { describe, expect, onTestFinished, test, vi } from 'vitest'
import { faultsInTurn, startFaultProxy } from '../support/fault-proxy.ts'
import { needs } from '../support/needs.ts'
import { hasSwift, useSwift } from '../support/swift.ts'
import { describeBackend } from './backend.ts'
import { closing, httpFaults, QUICK, refOf } from './bad-line.ts'

async function namesIn(backend: Backend, kind: 'pack' | 'index'): Promise<string[]> {
  const names: string[] = []
  for await (const { name } of backend.list(kind)) names.push(name)
  return names
}

describe.skipIf(!needs('OpenStack Swift', hasSwift))('Swift as S3 server', () => {
  const swift = useSwift()
  let places = 0

  describeBackend('a repository in a bucket', () => {
    const place = ++places
    const open = async () =>
      new S3Backend(`http://127.0.0.1:${swift.current.port}/bucket${place}/some/where`, { pageFiles: 2 })
    return { open, reopen: open, cleanUp: async () => undefined }
  })

  describeBackend('a repository in a bucket on a bad line', () => {
    const place = ++places
    let proxy: Awaited<ReturnType<typeof startFaultProxy>> | undefined
    const open = async () => {
      proxy ??= await startFaultProxy({
        port: swift.current.port,
        speaks: 'http',
        fault: faultsInTurn(4, httpFaults(400)),
      })
      return new S3Backend(`http://127.0.0.1:${proxy.port}/bucket${place}`, {
        ...QUICK,
        multipartFromBytes: 12_000_000,
        partBytes: 5 << 20,
      })
    }
    return {
      open,
      reopen: open,
      cleanUp: async () => {
        if ((proxy?.exchanges ?? 0) > 12) expect(proxy?.faults).toBeGreaterThan(2)
        await proxy?.stop()
      },
    }
  })

  async function bucket(options: S3Options = {}) {
    const backend = closing(new S3Backend(`http://127.0.0.1:${swift.current.port}/bucket${++places}`, options))
    await backend.create()
    return { backend, name: `bucket${places}` }
  }

  test('large files go up in parts and come back whole and by range', async () => {
    const { backend } = await bucket({ multipartFromBytes: 6 << 20, partBytes: 5 << 20 })
    const content = randomBytes(12_345_678)
    const file = refOf('pack', content)
    await backend.put(file, content)
    expect(await backend.stat(file)).toEqual({ sizeBytes: content.length })
    expect((await backend.get(file)).equals(content)).toBe(true)
    const range = { offset: (5 << 20) - 10, length: 20 }
    expect((await backend.get(file, range)).equals(content.subarray(range.offset, range.offset + 20))).toBe(true)
    expect(await namesIn(backend, 'pack')).toEqual([file.name])
  })

  test('a bucket that is a part of the host name holds the same files', async () => {
    const { backend, name } = await bucket()
    const content = randomBytes(100)
    await backend.put(refOf('index', content), content)
    // What a DNS server would say of *.s3.test.
    const lookup = dns.lookup
    const asked: string[] = []
    const spy = vi.spyOn(dns, 'lookup').mockImplementation(((host: string, ...others: [never, never]) => {
      asked.push(host)
      return lookup(host.endsWith(`.${swift.current.domain}`) ? '127.0.0.1' : host, ...others)
    }) as typeof dns.lookup)
    onTestFinished(() => spy.mockRestore())
    const address = `http://${swift.current.domain}:${swift.current.port}/${name}`
    const other = closing(new S3Backend(address, { style: 'virtual' }))
    expect((await other.get(refOf('index', content))).equals(content)).toBe(true)
    expect(asked).toContain(`${name}.${swift.current.domain}`)
  })

  test('what lies beside a repository in its bucket is not listed', async () => {
    const { name } = await bucket()
    const at = (prefix: string) => closing(new S3Backend(`http://127.0.0.1:${swift.current.port}/${name}/${prefix}`))
    const [outer, inner] = [at(''), at('data')]
    const content = randomBytes(10)
    await inner.put(refOf('pack', content), content)
    await inner.put(refOf('index', content), content)
    expect(await namesIn(outer, 'pack')).toEqual([])
    expect(await namesIn(outer, 'index')).toEqual([])
    expect(await namesIn(inner, 'pack')).toEqual([refOf('pack', content).name])
  })

  test('a wrong secret is an error at once', async () => {
    const { name } = await bucket()
    process.env['AWS_SECRET_ACCESS_KEY'] = 'wrong'
    onTestFinished(() => {
      process.env['AWS_SECRET_ACCESS_KEY'] = swift.current.secretKey
    })
    const backend = closing(new S3Backend(`http://127.0.0.1:${swift.current.port}/${name}`))
    await expect(namesIn(backend, 'pack')).rejects.toMatchObject({ code: 'BACKEND_DENIED' })
  })

  test('a bucket that is not there has no files, and takes none', async () => {
    const backend = closing(new S3Backend(`http://127.0.0.1:${swift.current.port}/absent-bucket`))
    expect(await namesIn(backend, 'pack')).toEqual([])
    expect(await backend.stat({ kind: 'config', name: '' })).toBeUndefined()
    await expect(backend.put({ kind: 'config', name: '' }, randomBytes(10))).rejects.toMatchObject({
      code: 'BACKEND_FAILED',
    })
  })

  test('a silent server is given up, before its answer and in the middle of it', async () => {
    const proxy = await startFaultProxy({ port: swift.current.port, speaks: 'http' })
    onTestFinished(() => proxy.stop())
    const backend = closing(
      new S3Backend(`http://127.0.0.1:${proxy.port}/bucket${++places}`, { ...QUICK, idleTimeoutMs: 500 }),
    )
    await backend.create()
    const content = randomBytes(500_000)
    await backend.put(refOf('pack', content), content)
    for (const afterBytes of [0, 100_000]) {
      proxy.use((exchange) => (exchange === 0 ? { kind: 'stall', direction: 'down', afterBytes } : undefined))
      expect((await backend.get(refOf('pack', content))).equals(content)).toBe(true)
      expect(proxy.exchanges).toBeGreaterThanOrEqual(2)
    }
  })
})

describe('an S3 server that means harm', () => {
  async function hostile(answer: (request: IncomingMessage, response: ServerResponse) => void): Promise<S3Backend> {
    const server = createServer(answer)
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
    process.env['AWS_ACCESS_KEY_ID'] = 'key'
    process.env['AWS_SECRET_ACCESS_KEY'] = 'secret'
    onTestFinished(() => {
      delete process.env['AWS_ACCESS_KEY_ID']
      delete process.env['AWS_SECRET_ACCESS_KEY']
      server.closeAllConnections()
      server.close()
    })
    const address = server.address()
    const port = typeof address === 'object' && address !== null ? address.port : 0
    return closing(new S3Backend(`http://127.0.0.1:${port}/bucket`, { ...QUICK, retryForMs: 500 }))
  }
  const name = 'ab'.repeat(32)

  function* endless(text: string): Generator<Buffer> {
    for (;;) yield Buffer.from(text.repeat(1000))
  }

  test('an absurd length is refused before a byte of it is held', async () => {
    const backend = await hostile((_, response) => {
      response.writeHead(200, { 'Content-Length': 1e15 })
      response.write(Buffer.alloc(1 << 20))
    })
    await expect(backend.get({ kind: 'index', name })).rejects.toMatchObject({ code: 'REPOSITORY_FILE_TOO_LARGE' })
  })

  test('a config without an end is cut off at its limit', async () => {
    const backend = await hostile((_, response) => {
      response.writeHead(200)
      pipeline(Readable.from(endless('x'.repeat(64))), response, () => undefined)
    })
    await expect(backend.get({ kind: 'config', name: '' })).rejects.toMatchObject({ code: 'BACKEND_ANSWER_INVALID' })
  })

  test('a refusal without an end is cut off, too', async () => {
    const backend = await hostile((_, response) => {
      response.writeHead(400)
      pipeline(Readable.from(endless('<Error><Code>x</Code></Error>')), response, () => undefined)
    })
    await expect(backend.get({ kind: 'config', name: '' })).rejects.toMatchObject({ code: 'BACKEND_ANSWER_INVALID' })
  })

  test('a list without an end is cut off before it is parsed', async () => {
    const backend = await hostile((_, response) => {
      response.setHeader('Content-Type', 'application/xml')
      pipeline(Readable.from(endless('<Contents><Key>x</Key></Contents>')), response, () => undefined)
    })
    await expect(namesIn(backend, 'pack')).rejects.toMatchObject({
      code: 'BACKEND_ANSWER_INVALID',
      message: expect.stringContaining('longer than 16777216 bytes'),
    })
  })

  test('a list that leads back to itself is refused', async () => {
    const backend = await hostile((_, response) => {
      response.end(
        `<?xml version="1.0"?><ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>
<Contents><Key>data/../../${name}</Key><Size>1</Size></Contents></ListBucketResult>`,
      )
    })
    await expect(namesIn(backend, 'pack')).rejects.toMatchObject({
      code: 'BACKEND_ANSWER_INVALID',
      message: expect.stringContaining('without saying where'),
    })
  })

  test('what is not XML is an error', async () => {
    const backend = await hostile((_, response) => void response.end('<html>It works!'))
    await expect(namesIn(backend, 'pack')).rejects.toMatchObject({ code: 'BACKEND_FAILED' })
  })
})
