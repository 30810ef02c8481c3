import { spawn } from 'node:child_process'
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { PassThrough } from 'node:stream'
import { fileURLToPath } from 'node:url'
import { constants, zstdCompressSync } from 'node:zlib'
import { type ByteString, type HostPath, LsyncError } from '@lsync/posix'
import { Applier, type Connection, ProtocolError, RemoteTarget, serve, TargetPlace } from '@lsync/sync'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { encodeHeader, encodeHello, FRAME, type FrameType } from '../../packages/sync/src/protocol/frame.ts'
import {
  encodeCheckpoint,
  encodeDescribe,
  encodeFailures,
  encodePath,
  encodeState,
} from '../../packages/sync/src/protocol/message.ts'
import { Lane } from '../../packages/sync/src/serve/lane.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { batchOf, fileOf, meta, never, path, serveHere } from './wire.ts'

const isRoot = process.geteuid?.() === 0
const lsync = fileURLToPath(new URL('../../packages/cli/bin/lsync', import.meta.url))

const hello = encodeHello({ lowest: 1, highest: 1, capabilities: 1, windowBytes: 16 << 20, lanes: 64 })
const helloWith = (more: Partial<Parameters<typeof encodeHello>[0]>) =>
  encodeHello({ lowest: 1, highest: 1, capabilities: 1, windowBytes: 16 << 20, lanes: 64, ...more })

function frame(type: FrameType, id: number, payload: Uint8Array = Buffer.alloc(0), lane = 0, isCompressed = false) {
  return Buffer.concat([encodeHeader({ type, isCompressed, lane, id }, payload), payload])
}

const state = encodeState({ checkpoint: undefined, isEmpty: true, nextStage: 0, losses: [] })

describe('a client of a hostile server', () => {
  /** A client whose server is `answer`, told of all that is sent. It has little patience. */
  function clientOf(answer: (send: (bytes: Uint8Array) => void, toServer: PassThrough) => void) {
    const [toServer, toClient] = [new PassThrough(), new PassThrough()]
    const connection: Connection = {
      readable: toClient,
      writable: toServer,
      explain: async () => undefined,
      destroy: () => {
        toServer.destroy()
        toClient.destroy()
      },
    }
    answer((bytes) => {
      if (!toClient.destroyed) toClient.write(bytes)
    }, toServer)
    return new RemoteTarget({
      description: 'hostile',
      path: 't' as ByteString,
      connect: async () => connection,
      compress: 'auto',
      timeoutMs: 400,
      answerTimeoutMs: 1000,
    })
  }

  const failureOf = (answer: Parameters<typeof clientOf>[0]) =>
    clientOf(answer)
      .open(never)
      .then(
        () => 'opened',
        (error) => (error instanceof LsyncError ? error.code : `untyped: ${error}`),
      )

  test.each<[string, string, Parameters<typeof clientOf>[0]]>([
    ['that says nothing', 'CONNECTION_LOST', () => undefined],
    ['that speaks another version', 'PROTOCOL_VERSION', (send) => send(helloWith({ lowest: 7, highest: 9 }))],
    ['with a window that takes no request', 'PROTOCOL_VIOLATED', (send) => send(helloWith({ windowBytes: 10 }))],
    ['that never answers', 'CONNECTION_LOST', (send) => send(hello)],
    [
      'that answers what nobody asked',
      'PROTOCOL_VIOLATED',
      (send) => send(Buffer.concat([hello, frame(FRAME.done, 9)])),
    ],
    ['that asks', 'PROTOCOL_VIOLATED', (send) => send(Buffer.concat([hello, frame(FRAME.open, 1, state)]))],
    [
      'whose answer is compressed',
      'PROTOCOL_VIOLATED',
      (send) => send(Buffer.concat([hello, frame(FRAME.done, 1, state, 0, true)])),
    ],
    [
      'whose answer is cut short',
      'PROTOCOL_VIOLATED',
      (send) => send(Buffer.concat([hello, frame(FRAME.done, 1, state.subarray(1))])),
    ],
    [
      'whose answer is endless',
      'PROTOCOL_VIOLATED',
      (send) => send(Buffer.concat([hello, frame(FRAME.done, 1, Buffer.alloc(8 << 20))])),
    ],
    [
      'whose answer says a gigabyte',
      'PROTOCOL_VIOLATED',
      (send) => {
        const header = encodeHeader({ type: FRAME.done, isCompressed: false, lane: 0, id: 1 }, Buffer.alloc(0))
        header.writeUInt32LE(1 << 30, 0)
        send(Buffer.concat([hello, header]))
      },
    ],
    ['that greets twice', 'PROTOCOL_VIOLATED', (send) => send(Buffer.concat([hello, hello]))],
    [
      'with an error that is none',
      'PROTOCOL_VIOLATED',
      (send) => send(Buffer.concat([hello, frame(FRAME.failed, 1, Buffer.from('x'))])),
    ],
  ])('%s fails with an error that says so', async (_, code, answer) => {
    // The answer may come before the question: it is then one to nothing.
    const found = await failureOf((send, toServer) => {
      let isSent = false
      toServer.on('data', () => {
        // The hello of the client comes first, its request second.
        if (isSent) return
        isSent = true
        answer(send, toServer)
      })
    })
    expect(found).toBe(code)
  })

  test('a server that lives but never answers is given up', async () => {
    const found = await failureOf((send, toServer) => {
      let isFirst = true
      toServer.on('data', (chunk: Buffer) => {
        if (isFirst) send(hello)
        isFirst = false
        // Answers pings alone.
        for (let at = chunk.indexOf(hello.subarray(0, 4)) >= 0 ? 32 : 0; at + 16 <= chunk.length; ) {
          if (chunk[at + 4] === FRAME.ping) send(frame(FRAME.done, chunk.readUInt32LE(at + 8)))
          at += 16 + chunk.readUInt32LE(at)
        }
      })
    })
    expect(found).toBe('CONNECTION_LOST')
  })

  test('an answer that comes byte by byte forever is given up', async () => {
    let timer: NodeJS.Timeout | undefined
    const found = await failureOf((send, toServer) => {
      const answer = frame(FRAME.done, 1, Buffer.alloc(100_000))
      let at = 0
      let isFirst = true
      toServer.on('data', () => {
        if (!isFirst) return
        isFirst = false
        send(hello)
        timer = setInterval(() => send(answer.subarray(at, ++at)), 20)
      })
    })
    clearInterval(timer)
    expect(found).toBe('CONNECTION_LOST')
  })

  test('no stream of bytes, random or a good one with damage, gives anything but a typed error or a good answer', async () => {
    const failures = encodeFailures([{ index: 0, code: 'EIO', path: path('f'), message: 'm' }])
    const good = Buffer.concat([
      hello,
      frame(FRAME.done, 1, state),
      frame(FRAME.done, 2, failures),
      frame(FRAME.done, 3),
    ])
    const anyStream = fc.oneof(
      fc.uint8Array({ maxLength: 300 }).map((bytes) => Buffer.concat([hello, bytes])),
      fc.array(fc.tuple(fc.nat(good.length - 1), fc.nat(255)), { minLength: 1, maxLength: 4 }).map((hits) => {
        const bytes = Buffer.from(good)
        for (const [at, value] of hits) bytes[at] = value
        return bytes
      }),
    )
    await fc.assert(
      fc.asyncProperty(anyStream, async (stream) => {
        const [toServer, toClient] = [new PassThrough(), new PassThrough()]
        toServer.resume()
        const target = new RemoteTarget({
          description: 'hostile',
          path: 't' as ByteString,
          connect: async () => ({
            readable: toClient,
            writable: toServer,
            explain: async () => undefined,
            destroy: () => toClient.destroy(),
          }),
          compress: false,
          timeoutMs: 5000,
          answerTimeoutMs: 5000,
        })
        const calls = (async () => {
          await target.open(never)
          await target.deliver(0, batchOf({ do: 'remove', path: path('f') }))
          await target.barrier()
        })()
        toClient.end(stream)
        const error = await calls.then(
          () => undefined,
          (thrown) => thrown,
        )
        if (error !== undefined) expect(error).toBeInstanceOf(LsyncError)
        await target.close()
      }),
      { numRuns: 300 },
    )
  })
})

describe.skipIf(!needs('root', isRoot))('a server of a hostile client', () => {
  const disk = useFileSystem('tmpfs')

  function site() {
    const root = disk.current.fresh()
    mkdirSync(`${root}/t`)
    writeFileSync(`${root}/precious`, 'precious')
    return root
  }

  /** Sends bytes to a server and waits for its end; what it threw comes back. */
  async function endOf(root: string, ...parts: Uint8Array[]): Promise<unknown> {
    const { toServer, toClient, ended } = serveHere({ root: root as HostPath, access: 'full', workers: 1 })
    toClient.resume()
    for (const part of parts) toServer.write(part)
    toServer.end()
    return ended
  }

  const open = frame(FRAME.open, 1, encodePath('t' as ByteString))

  /** Waits for the answer to `open` before it goes on: what follows belongs to a target that is open. */
  async function endOfOpened(root: string, ...parts: Uint8Array[]): Promise<unknown> {
    const { toServer, toClient, ended } = serveHere({ root: root as HostPath, access: 'full', workers: 1 })
    toServer.write(Buffer.concat([hello, open]))
    let length = 0
    await new Promise<void>((resolve) => {
      toClient.on('data', (chunk: Buffer) => {
        length += chunk.length
        if (length > 32 + 16) resolve()
      })
      void ended.then(() => resolve())
    })
    for (const part of parts) toServer.write(part)
    toServer.end()
    return ended
  }

  const batch = batchOf(fileOf('f', 'x'))
  const questions = (count: number) => [
    Buffer.concat(Array.from({ length: count }, (_, i) => frame(FRAME.describe, i + 2, encodeDescribe(path(''), '')))),
  ]
  const bomb = (says: number, is: number) => {
    const size = Buffer.alloc(4)
    size.writeUInt32LE(says)
    return Buffer.concat([
      size,
      zstdCompressSync(Buffer.alloc(is), { params: { [constants.ZSTD_c_compressionLevel]: 1 } }),
    ])
  }

  test.each<[string, Uint8Array[]]>([
    ['a batch before a target', [hello, frame(FRAME.deliver, 1, batch)]],
    ['a question before a target', [hello, frame(FRAME.describe, 1, encodeDescribe(path(''), ''))]],
    ['a barrier before a target', [hello, frame(FRAME.barrier, 1, encodeCheckpoint(undefined))]],
    [
      'one number for two requests',
      [
        hello,
        frame(FRAME.barrier, 7, encodeCheckpoint(undefined)),
        frame(FRAME.status, 7, encodePath('t' as ByteString)),
      ],
    ],
    ['an answer', [hello, frame(FRAME.done, 1)]],
    ['the number 0', [hello, frame(FRAME.ping, 0)]],
    ['a path that leads out', [hello, frame(FRAME.open, 1, encodePath('../x' as ByteString))]],
    ['a second hello', [hello, hello]],
    ['no hello', [open]],
    ['a version of tomorrow', [helloWith({ lowest: 2, highest: 3 })]],
    ['a request that is too large', [hello, frame(FRAME.open, 1, Buffer.alloc(1 << 20))]],
    ['a compressed request', [hello, frame(FRAME.open, 1, encodePath('t' as ByteString), 0, true)]],
  ])('refuses %s and changes nothing', async (_, parts) => {
    const root = site()
    expect(await endOf(root, ...parts)).toMatchObject({ code: expect.stringMatching(/^PROTOCOL_/) })
    expect(readdirSync(root).sort()).toEqual(['precious', 't'])
  })

  test.each<[string, Uint8Array[]]>([
    ['a second target', [frame(FRAME.open, 2, encodePath('u' as ByteString))]],
    ['a question about another place', [frame(FRAME.describe, 2, encodeDescribe(path('../precious'), ''))]],
    ['more questions than the window holds', questions(40)],
    ['an unknown record', [frame(FRAME.deliver, 2, Buffer.from([99]))]],
    ['a path that leads out', [frame(FRAME.deliver, 2, batchOf({ do: 'remove', path: path('../precious') }))]],
    ['an absolute path', [frame(FRAME.deliver, 2, batchOf({ do: 'remove', path: path('/etc/x') }))]],
    ['a batch that expands beyond what it says', [frame(FRAME.deliver, 2, bomb(10, 1 << 20), 0, true)]],
    ['a batch that expands beyond what any may', [frame(FRAME.deliver, 2, bomb(64 << 20, 64 << 20), 0, true)]],
    ['a batch that is no zstd', [frame(FRAME.deliver, 2, Buffer.alloc(100), 0, true)]],
    [
      'more than the window',
      Array.from({ length: 40 }, (_, i) => frame(FRAME.deliver, i + 2, new Uint8Array(4 << 20))),
    ],
    ['a frame with damage', [Buffer.concat([frame(FRAME.deliver, 2, batch).subarray(0, -1), Buffer.from([0x55])])]],
  ])('refuses %s', async (_, parts) => {
    const root = site()
    expect(await endOfOpened(root, ...parts)).toMatchObject({ code: 'PROTOCOL_VIOLATED' })
    expect(readFileSync(`${root}/precious`, 'latin1')).toBe('precious')
    expect(readdirSync(root).sort()).toEqual(['.lsync.sync.t', 'precious', 't'])
    expect(readdirSync(`${root}/.lsync.sync.t/stage`)).toEqual([])
  })

  test('writes nothing outside of its target, whatever bytes come', () => {
    const root = site()
    const records = batchOf(
      fileOf('a/b', 'content'),
      { do: 'directory', path: path('a') },
      { do: 'rename', from: path('a'), to: path('b') },
      { do: 'out', path: path('b'), stage: 1 },
      { do: 'in', path: path('c'), stage: 1 },
      { do: 'link', path: path('l'), to: path('a/b') },
      { do: 'symlink', path: path('s'), meta: meta(), target: path(root) },
      fileOf('s/precious', 'gone'),
      { do: 'keep', path: path(''), names: [] },
    )
    const anyDamage = fc.array(fc.tuple(fc.nat(records.length - 1), fc.nat(255)), { maxLength: 6 })
    const place = TargetPlace.open(`${root}/t` as HostPath, { create: false })
    try {
      fc.assert(
        fc.property(anyDamage, (hits) => {
          const bytes = Buffer.from(records)
          for (const [at, value] of hits) bytes[at] = value
          const lane = new Lane(new Applier(place), () => 'go')
          try {
            lane.run(bytes)
          } catch (error) {
            expect(error).toBeInstanceOf(ProtocolError)
          } finally {
            lane.end()
          }
          expect(readFileSync(`${root}/precious`, 'latin1')).toBe('precious')
          expect(readdirSync(root).sort()).toEqual(['.lsync.sync.t', 'precious', 't'])
        }),
        { numRuns: 500 },
      )
    } finally {
      place.close()
    }
  })

  test('a client that is silent gives its target back', async () => {
    const root = site()
    const { toServer, toClient, ended } = serveHere({ root: root as HostPath, access: 'full', workers: 1, idleMs: 300 })
    toClient.resume()
    toServer.write(Buffer.concat([hello, open]))
    expect(await ended).toMatchObject({ code: 'CONNECTION_LOST' })
  })

  test('a client that reads no answers is not read from any more', async () => {
    const root = site()
    const toServer = new PassThrough()
    const toClient = new PassThrough({ highWaterMark: 1024 })
    const abort = new AbortController()
    const served = serve({
      input: toServer,
      output: toClient,
      root: root as HostPath,
      access: 'full',
      workers: 1,
      signal: abort.signal,
    })
    toServer.write(hello)
    const ping = (id: number) => frame(FRAME.ping, id)
    let id = 1
    let isTaken = true
    // Each answer is 16 bytes: one megabyte of them stops the server.
    while (isTaken && id < 2_000_000) {
      isTaken = toServer.write(Buffer.concat(Array.from({ length: 4000 }, () => ping(id++))))
      await new Promise(setImmediate)
    }
    expect(id).toBeLessThan(200_000)
    expect(toClient.writableLength).toBeLessThan(2 << 20)
    abort.abort(new Error('over'))
    await expect(served).rejects.toThrow('over')
  })

  test('the memory of a server is bounded, however much a client sends', async () => {
    const root = site()
    const child = spawn(lsync, ['serve', '--stdio', '--root', root], { stdio: ['pipe', 'pipe', 'ignore'] })
    const ended = new Promise((resolve) => child.once('close', resolve))
    child.stdin.on('error', () => undefined)
    let answers = 0
    let peak = 0
    child.stdout.on('data', (chunk: Buffer) => {
      answers += chunk.length
      const [, kilobytes = '0'] = /VmHWM:\s+(\d+)/.exec(readFileSync(`/proc/${child.pid}/status`, 'latin1')) ?? []
      peak = Math.max(peak, Number(kilobytes) / 1024)
    })
    const send = async (...parts: Uint8Array[]) => {
      for (const part of parts) {
        if (!child.stdin.write(part)) await new Promise((resolve) => child.stdin.once('drain', resolve))
      }
    }
    try {
      await send(hello, open)
      await expect.poll(() => answers, { timeout: 30_000 }).toBeGreaterThan(48)
      // As many lanes as there are, each with a file of a terabyte of holes, metadata as large as it may be, and
      // operations that fail, as many as one batch holds.
      const xattrs = Array.from(
        { length: 15 },
        (_, i) => [`user.${i + 10}` as ByteString, new Uint8Array(65_536)] as const,
      )
      const heavy = batchOf({ do: 'meta', path: path('missing'), kind: 'file', meta: meta({ xattrs }) })
      const failing = batchOf(
        ...Array.from({ length: 16_000 }, () => ({ do: 'link', path: path('x/y'), to: path('x/z') }) as const),
      )
      const names = Array.from({ length: 60_000 }, (_, i) => String(i) as ByteString)
      const keeping = batchOf({ do: 'keep', path: path('x'), names })
      let id = 2
      let sent = 0
      const batches = [heavy, failing, keeping]
      for (let round = 0; round < 12; round++) {
        const before = answers
        for (let lane = 0; lane < 6; lane++) {
          const bytes = batches[(round + lane) % 3] as Uint8Array
          await send(frame(FRAME.deliver, id++, bytes, lane * 9))
          sent++
        }
        await expect.poll(() => answers - before, { timeout: 60_000 }).toBeGreaterThan(0)
        await new Promise((resolve) => setTimeout(resolve, 300))
      }
      expect(sent).toBe(72)
      expect(peak).toBeGreaterThan(40)
      expect(peak).toBeLessThan(600)
    } finally {
      child.kill('SIGKILL')
      await ended
    }
  })
})
