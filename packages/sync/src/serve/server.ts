import type { Readable, Writable } from 'node:stream'
import { Worker } from 'node:worker_threads'
import { type ByteString, type HostPath, WriteBack } from '@lsync/posix'
import { ConnectionLostError, ProtocolError } from '@lsync/ssh'
import type { MadeNews } from '../made-directories.ts'
import {
  agreeOnVersion,
  CAPABILITY_DESCRIBE,
  CAPABILITY_ZSTD,
  costOf,
  encodeHeader,
  encodeHello,
  FRAME,
  type FrameHeader,
  FrameReader,
  type FrameType,
  type Hello,
  LEAST_COST_BYTES,
  MAX_LANES,
  PROTOCOL_HIGHEST,
  PROTOCOL_LOWEST,
  WINDOW_BYTES,
} from '../protocol/frame.ts'
import { decodeCheckpoint, decodeDescribe, decodePath, encodeCheckpoint, encodeError } from '../protocol/message.ts'
import { MAX_BATCH_BYTES, MAX_PATH_BYTES } from '../protocol/operation-codec.ts'
import { AccessRefusedError } from './errors.ts'
import { peekServed } from './place.ts'
import type { ServedTarget, ServeJob, ServeResult } from './serve-worker.ts'

export interface ServeRequest {
  /** What the client sends, and where it reads the answers. */
  readonly input: Readable
  readonly output: Writable
  /** Clients name targets beneath it, and reach nothing else. */
  readonly root: HostPath
  /** `read-only` answers what a target holds and changes nothing; `append-only` adds names and touches no other. */
  readonly access: 'full' | 'read-only' | 'append-only'
  /** Threads that carry out operations. */
  readonly workers?: number
  /** A client that is silent for so long has gone, whatever the network says: others may have the target. */
  readonly idleMs?: number
  readonly signal?: AbortSignal
}

/** What a client was served. */
export interface ServeReport {
  readonly batches: number
  readonly receivedBytes: number
}

/**
 * Serves one client until it closes the connection, and frees the target then, whatever state it was in.
 * @throws {ProtocolError} if the client broke the protocol
 */
export function serve(request: ServeRequest): Promise<ServeReport> {
  return new Server(request).run()
}

const DEFAULT_WORKERS = 2
// A client says something every 15 s.
const DEFAULT_IDLE_MS = 90_000
// Answers that the client does not read: from here on no more requests are read either.
const MAX_UNREAD_BYTES = 1 << 20
const MOST_NEWS = 1 << 14
const MAX_REQUEST_BYTES = MAX_PATH_BYTES + 1024
const ZSTD_OVERHEAD_BYTES = 64 << 10
// Young generations are small: batches lie outside of the heap.
const WORKER_LIMITS = { maxYoungGenerationSizeMb: 16 }

interface Pending {
  readonly resolve: (result: ServeResult) => void
  readonly reject: (error: unknown) => void
}

/** A worker thread: it answers jobs in their order. */
class Member {
  readonly #worker = new Worker(new URL('./serve-worker.ts', import.meta.url), { resourceLimits: WORKER_LIMITS })
  readonly #pending: Pending[] = []
  /** What the others have made and finished since it was told last. */
  readonly #news: MadeNews[] = []

  constructor(fail: (error: unknown) => void) {
    this.#worker.on('message', (result: ServeResult) => this.#pending.shift()?.resolve(result))
    this.#worker.on('error', (error) => {
      for (const { reject } of this.#pending.splice(0)) reject(error)
      fail(error)
    })
  }

  run(job: ServeJob, transfer: ArrayBuffer[] = []): Promise<ServeResult> {
    return new Promise((resolve, reject) => {
      this.#pending.push({ resolve, reject })
      this.#worker.postMessage(job, transfer)
    })
  }

  hear(news: readonly MadeNews[]): void {
    this.#news.push(...news)
    if (this.#news.length <= MOST_NEWS) return
    // A worker that had nothing to do for so long takes the longer way for all that was made until now.
    this.#news.length = 0
    this.run({ job: 'disown' }).catch(() => undefined)
  }

  takeNews(): readonly MadeNews[] {
    return this.#news.splice(0)
  }

  async end(): Promise<void> {
    await this.run({ job: 'end' }).catch(() => undefined)
    await this.#worker.terminate()
  }
}

class Server {
  readonly #request: ServeRequest
  readonly #reader: FrameReader
  readonly #members: Member[] = []
  /** Batches under way. A barrier waits for those that came before it. */
  readonly #batches = new Set<Promise<void>>()
  #isGreeted = false
  #inFlightBytes = 0
  #nextStage = 0
  #target: ServedTarget | undefined
  #writeBack: WriteBack | undefined
  /** Requests other than batches, one after the other. */
  #chain: Promise<void> = Promise.resolve()
  #report = { batches: 0, receivedBytes: 0 }
  #heardAt = performance.now()
  readonly #openIds = new Set<number>()
  #end: ((error?: unknown) => void) | undefined

  constructor(request: ServeRequest) {
    this.#request = request
    this.#reader = new FrameReader({
      hello: (hello) => this.#greet(hello),
      admit: (header) => this.#admit(header),
      frame: (header, payload) => this.#receive(header, payload),
    })
  }

  async run(): Promise<ServeReport> {
    const { input, output, signal } = this.#request
    output.write(
      encodeHello({
        lowest: PROTOCOL_LOWEST,
        highest: PROTOCOL_HIGHEST,
        // Who may only add does not learn what is there.
        capabilities: CAPABILITY_ZSTD | (this.#request.access === 'full' ? CAPABILITY_DESCRIBE : 0),
        windowBytes: WINDOW_BYTES,
        lanes: MAX_LANES,
      }),
    )
    const abort = () => this.#end?.(signal?.reason)
    const { idleMs = DEFAULT_IDLE_MS } = this.#request
    const watch = setInterval(() => {
      const silentMs = performance.now() - this.#heardAt
      if (silentMs > idleMs)
        this.#end?.(new ConnectionLostError(`the client is silent for ${Math.round(silentMs / 1000)} s`))
    }, idleMs / 4)
    try {
      await new Promise<void>((resolve, reject) => {
        this.#end = (error) => (error === undefined ? resolve() : reject(error))
        input.on('data', (chunk: Buffer) => this.#push(chunk))
        // What came whole is carried out before the end.
        input.on('end', () => void Promise.all(this.#batches).then(() => this.#end?.()))
        // Both mean that the client has gone, and that is no failure of the server.
        input.on('error', () => this.#end?.())
        output.on('error', () => this.#end?.())
        output.on('close', () => this.#end?.())
        signal?.addEventListener('abort', abort, { once: true })
        if (signal?.aborted === true) abort()
      })
    } finally {
      clearInterval(watch)
      signal?.removeEventListener('abort', abort)
      input.removeAllListeners('data')
      input.resume()
      await this.#writeBack?.end()
      // The first one keeps the target's lock, so it ends last.
      const [first, ...others] = this.#members
      await Promise.all(others.map((member) => member.end()))
      await first?.end()
    }
    return this.#report
  }

  #push(chunk: Buffer): void {
    this.#heardAt = performance.now()
    this.#report.receivedBytes += chunk.length
    try {
      this.#reader.push(chunk)
    } catch (error) {
      this.#fail(error)
    }
  }

  /** Says why, and ends. */
  #fail(error: unknown): void {
    this.#request.input.removeAllListeners('data')
    if (error instanceof ProtocolError && this.#isGreeted) this.#answer(FRAME.failed, 0, encodeError(error))
    this.#end?.(error)
  }

  #greet(hello: Hello): void {
    agreeOnVersion(hello)
    this.#isGreeted = true
  }

  #admit({ type, id, payloadBytes, isCompressed }: FrameHeader): void {
    if (type === FRAME.done || type === FRAME.failed) throw new ProtocolError('an answer to nothing')
    if (isCompressed && type !== FRAME.deliver) throw new ProtocolError('a compressed request')
    const limit =
      type !== FRAME.deliver ? MAX_REQUEST_BYTES : MAX_BATCH_BYTES + (isCompressed ? ZSTD_OVERHEAD_BYTES : 0)
    if (payloadBytes > limit) throw new ProtocolError(`a request of ${payloadBytes} bytes`)
    if (id === 0 || this.#openIds.has(id)) throw new ProtocolError(`the number ${id} for two requests`)
    if (this.#inFlightBytes + LEAST_COST_BYTES > WINDOW_BYTES) throw new ProtocolError('more than the window holds')
  }

  #receive(header: FrameHeader, payload: Buffer): void {
    const { type, id } = header
    const costBytes = costOf(type, Math.max(payload.length, header.isCompressed ? contentBytes(payload) : 0))
    this.#inFlightBytes += costBytes
    if (this.#inFlightBytes > WINDOW_BYTES) throw new ProtocolError('more than the window holds')
    this.#openIds.add(id)
    const settle = (answer: FrameType, bytes: Uint8Array) => {
      this.#inFlightBytes -= costBytes
      this.#openIds.delete(id)
      this.#answer(answer, id, bytes)
    }
    if (type === FRAME.ping) settle(FRAME.done, new Uint8Array(0))
    else if (type === FRAME.deliver) this.#deliver(header, payload, settle)
    else if (type === FRAME.describe) this.#describe(id, payload, settle)
    else this.#chain = this.#chain.then(() => this.#carryOut(type, payload, settle))
  }

  #deliver({ lane, isCompressed }: FrameHeader, payload: Buffer, settle: Settle): void {
    if (this.#target === undefined) throw new ProtocolError('a batch before a target was opened')
    this.#report.batches++
    const member = this.#members[lane % this.#members.length] as Member
    const { length } = payload
    const job = { job: 'batch', lane, bytes: payload, isCompressed, news: member.takeNews() } as const
    const batch = member.run(job, [payload.buffer as ArrayBuffer]).then((result) => {
      if ('done' in result) {
        this.#nextStage = Math.max(this.#nextStage, (result.highestStage ?? -1) + 1)
        for (const other of this.#members) if (other !== member) other.hear(result.news ?? [])
        this.#writeBack?.wrote(length, result.files ?? 0)
      }
      this.#settle(result, settle)
    })
    const counted = batch.catch((error) => this.#fail(error)).finally(() => this.#batches.delete(counted))
    this.#batches.add(counted)
  }

  #describe(id: number, payload: Buffer, settle: Settle): void {
    const { access } = this.#request
    if (access !== 'full') throw new ProtocolError('a question that was not offered')
    if (this.#target === undefined) throw new ProtocolError('a question before a target was opened')
    const member = this.#members[id % this.#members.length] as Member
    const job = { job: 'describe', ...decodeDescribe(payload) } as const
    member.run(job).then(
      (result) => this.#settle(result, settle),
      (error) => this.#fail(error),
    )
  }

  async #carryOut(type: FrameType, payload: Buffer, settle: Settle): Promise<void> {
    try {
      if (type === FRAME.open) this.#settle(await this.#open(decodePath(payload)), settle)
      else if (type === FRAME.status) {
        settle(FRAME.done, encodeCheckpoint(peekServed(this.#request.root, decodePath(payload))))
      } else if (type === FRAME.barrier) {
        const checkpoint = decodeCheckpoint(payload)
        const [first, ...others] = this.#members
        if (first === undefined) throw new ProtocolError('a barrier before a target was opened')
        await Promise.all(this.#batches)
        for (const member of this.#members) member.takeNews()
        await Promise.all(others.map((member) => member.run({ job: 'disown' })))
        const job = { job: 'barrier', checkpoint, nextStage: this.#nextStage } as const
        this.#settle(await first.run(job), settle)
      } else {
        // `close`: the target is free when it is answered.
        await Promise.all(this.#batches)
        await this.#writeBack?.end()
        await Promise.all(this.#members.map((member) => member.run({ job: 'end' })))
        this.#target = undefined
        this.#writeBack = undefined
        settle(FRAME.done, new Uint8Array(0))
      }
    } catch (error) {
      if (error instanceof ProtocolError) this.#fail(error)
      else settle(FRAME.failed, encodeError(error))
    }
  }

  async #open(path: ByteString): Promise<ServeResult> {
    const { root, access, workers = DEFAULT_WORKERS } = this.#request
    if (access === 'read-only') throw new AccessRefusedError(path, access, 'to open a target for writing')
    if (this.#target !== undefined) throw new ProtocolError('a second target')
    while (this.#members.length < workers) this.#members.push(new Member((error) => this.#fail(error)))
    const [first, ...others] = this.#members
    const job = { job: 'open', root, path, create: true, isAppendOnly: access === 'append-only' } as const
    const result = await (first as Member).run(job)
    if (!('done' in result)) return result
    this.#target = result.target
    this.#writeBack = result.target && new WriteBack(result.target.rootFd)
    if (result.target !== undefined) {
      for (const member of others) await member.run({ job: 'target', target: result.target })
    }
    return result
  }

  #settle(result: ServeResult, settle: Settle): void {
    if ('done' in result) settle(FRAME.done, result.done)
    else if (result.isBroken) this.#fail(new ProtocolError(result.reason))
    else settle(FRAME.failed, result.failed)
  }

  #answer(type: FrameType, id: number, payload: Uint8Array): void {
    const { input, output } = this.#request
    if (output.destroyed) return
    output.write(encodeHeader({ type, isCompressed: false, lane: 0, id }, payload))
    if (payload.length > 0) output.write(payload)
    if (output.writableLength < MAX_UNREAD_BYTES || input.isPaused()) return
    input.pause()
    output.once('drain', () => input.resume())
  }
}

type Settle = (type: FrameType, payload: Uint8Array) => void

/** What a compressed payload says that it holds. */
function contentBytes(payload: Buffer): number {
  if (payload.length < 4) throw new ProtocolError('a compressed batch that is cut short')
  return payload.readUInt32LE(0)
}
