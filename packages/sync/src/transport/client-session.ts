import type { Writable } from 'node:stream'
import { promisify } from 'node:util'
import { constants, zstdCompress } from 'node:zlib'
import { ConnectError, type Connection, ConnectionLostError, ProtocolError } from '@lsync/ssh'
import { CompressionChoice } from '../protocol/compression.ts'
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
  HEADER_BYTES,
  type Hello,
  MAX_LANES,
  PROTOCOL_HIGHEST,
  PROTOCOL_LOWEST,
  WINDOW_BYTES,
} from '../protocol/frame.ts'
import { decodeError } from '../protocol/message.ts'
import { MAX_BATCH_BYTES } from '../protocol/operation-codec.ts'

const compress = promisify(zstdCompress)
// Frames below this are not worth a try.
const COMPRESS_FROM_BYTES = 1024
// As many as zlib's threads compress at once.
const COMPRESSING = 4
// A server takes a client that is silent for much longer for gone.
const PING_MS = 15_000
// Handed to the stream and not gone yet.
const UNSENT_BYTES = 2 << 20
// Answers of all kinds but `deliver` are short.
const SHORT_ANSWER_BYTES = 512 << 10

export interface SessionOptions {
  /** While something is expected, the hello included, a silence of this long ends the connection. */
  readonly timeoutMs: number
  /** No request may stay without its answer for longer, however often the server shows that it lives. */
  readonly answerTimeoutMs: number
  readonly signal?: AbortSignal | undefined
  /** `false`: never, `true`: always, 'auto': as the line needs it. */
  readonly compress: boolean | 'auto'
}

/** One that waits for its answer. */
interface OpenRequest {
  readonly type: FrameType
  readonly sentAt: number
  readonly costBytes: number
  readonly resolve: (payload: Buffer) => void
  readonly reject: (error: unknown) => void
}

interface Outgoing {
  readonly header: Omit<FrameHeader, 'payloadBytes' | 'isCompressed'>
  readonly payload: Uint8Array
  /** The payload compressed; `undefined` where that does not make it smaller. */
  readonly compressed: Promise<Uint8Array | undefined> | undefined
}

/**
 * The client's end of the protocol over any stream: requests with answers, pipelined, as many at a time as the server's
 * window takes. Believes nothing that the server says. Whatever goes wrong ends it, with one error for all that wait.
 */
export class ClientSession {
  readonly #connection: Connection
  readonly #writable: Writable
  readonly #options: SessionOptions
  readonly #reader: FrameReader
  readonly #choice = new CompressionChoice()
  readonly #open = new Map<number, OpenRequest>()
  readonly #outgoing: Outgoing[] = []
  readonly #waiting: { readonly costBytes: number; readonly start: () => void }[] = []
  #greeted: { resolve: (hello: Hello) => void; reject: (error: unknown) => void } | undefined
  #server: Hello | undefined
  #windowBytes = 0
  #nextId = 1
  readonly #compressing: Promise<unknown>[] = []
  #isSending = false
  #unsentBytes = 0
  #sentAt = 0
  #wakeSender: (() => void) | undefined
  #isPinging = false
  #failure: unknown
  #isEnding = false
  #heardAt = performance.now()
  #timer: NodeJS.Timeout | undefined

  private constructor(connection: Connection, options: SessionOptions) {
    this.#connection = connection
    this.#writable = connection.writable
    this.#options = options
    this.#reader = new FrameReader({
      hello: (hello) => this.#greet(hello),
      admit: (header) => this.#admit(header),
      frame: (header, payload) => this.#receive(header, payload),
    })
    const { readable, writable } = connection
    readable.on('data', (chunk: Buffer) => this.#push(chunk))
    for (const stream of new Set([readable, writable])) {
      stream.on('error', (error) => void this.#lose(error))
      stream.on('close', () => void this.#lose())
    }
    readable.on('end', () => void this.#lose())
    options.signal?.addEventListener('abort', this.#abort, { once: true })
    this.#timer = setInterval(() => this.#watch(), Math.max(10, Math.min(PING_MS, options.timeoutMs / 4)))
  }

  /**
   * Greets the server. The session owns the connection.
   * @throws {ProtocolError} if what answers is no lsync, {ProtocolVersionError} if it is another one,
   * {ConnectionLostError} if nothing answers in time
   */
  static async start(connection: Connection, options: SessionOptions): Promise<ClientSession> {
    options.signal?.throwIfAborted()
    const session = new ClientSession(connection, options)
    await new Promise<Hello>((resolve, reject) => {
      session.#greeted = { resolve, reject }
      const hello = {
        lowest: PROTOCOL_LOWEST,
        highest: PROTOCOL_HIGHEST,
        capabilities: CAPABILITY_ZSTD,
        windowBytes: WINDOW_BYTES,
        lanes: MAX_LANES,
      }
      connection.writable.write(encodeHello(hello))
    })
    return session
  }

  /**
   * Sends a request and resolves with the answer's payload. Requests are sent in the order of the calls; a call waits
   * while the server's window is full.
   * @throws {LsyncError} what the server says went wrong; or what ended the session
   */
  async request(type: FrameType, payload: Uint8Array, lane = 0): Promise<Buffer> {
    if (payload.length > MAX_BATCH_BYTES) throw new Error('a request that no server takes')
    const costBytes = costOf(type, payload.length)
    await this.#window(costBytes)
    return new Promise((resolve, reject) => {
      const id = this.#nextId
      this.#nextId = id === 0xffff_ffff ? 1 : id + 1
      this.#open.set(id, { type, sentAt: performance.now(), costBytes, resolve, reject })
      this.#outgoing.push(this.#outgoingOf({ type, lane, id }, payload))
      if (!this.#isSending) void this.#send()
    })
  }

  /** The server tells what it has, so that only what differs need travel. */
  get canDescribe(): boolean {
    return ((this.#server?.capabilities ?? 0) & CAPABILITY_DESCRIBE) !== 0
  }

  /** Ends the stream in order. What is still open is rejected. */
  end(): void {
    this.#isEnding = true
    this.#fail(new ConnectionLostError('it was closed'))
  }

  /** Waits until that much of the server's window is free, first come first served, and takes it. */
  async #window(costBytes: number): Promise<void> {
    if (this.#failure !== undefined) throw this.#failure
    if (this.#waiting.length > 0 || this.#windowBytes < costBytes) {
      await new Promise<void>((start) => this.#waiting.push({ costBytes, start }))
      if (this.#failure !== undefined) throw this.#failure
    } else this.#windowBytes -= costBytes
  }

  #release(costBytes: number): void {
    this.#windowBytes += costBytes
    for (
      let next = this.#waiting[0];
      next !== undefined && this.#windowBytes >= next.costBytes;
      next = this.#waiting[0]
    ) {
      this.#waiting.shift()
      this.#windowBytes -= next.costBytes
      next.start()
    }
  }

  #outgoingOf(header: Outgoing['header'], payload: Uint8Array): Outgoing {
    const { compress: wanted } = this.#options
    const canCompress = header.type === FRAME.deliver && payload.length >= COMPRESS_FROM_BYTES
    const isKnown = ((this.#server?.capabilities ?? 0) & CAPABILITY_ZSTD) !== 0
    if (!canCompress || !isKnown || wanted === false || (wanted === 'auto' && !this.#choice.decide())) {
      return { header, payload, compressed: undefined }
    }
    return { header, payload, compressed: this.#compress(payload) }
  }

  async #compress(payload: Uint8Array): Promise<Uint8Array | undefined> {
    while (this.#compressing.length >= COMPRESSING) await Promise.race(this.#compressing)
    const start = performance.now()
    const running = compress(payload, { params: { [constants.ZSTD_c_compressionLevel]: 1 } })
    this.#compressing.push(running)
    const compressed = await running
    this.#compressing.splice(this.#compressing.indexOf(running), 1)
    this.#choice.sawZstd(payload.length, compressed.length, performance.now() - start)
    if (4 + compressed.length >= payload.length) return undefined
    const wire = Buffer.allocUnsafe(4 + compressed.length)
    wire.writeUInt32LE(payload.length, 0)
    compressed.copy(wire, 4)
    return wire
  }

  async #send(): Promise<void> {
    this.#isSending = true
    try {
      for (let next = this.#outgoing.shift(); next !== undefined; next = this.#outgoing.shift()) {
        const compressed = await next.compressed
        if (this.#failure !== undefined) return
        const payload = compressed ?? next.payload
        const bytes = HEADER_BYTES + payload.length
        const start = performance.now()
        let isFull = false
        this.#unsentBytes += bytes
        this.#writable.cork()
        this.#writable.write(encodeHeader({ ...next.header, isCompressed: compressed !== undefined }, payload))
        this.#writable.write(payload, () => this.#sent(bytes, isFull ? start : undefined))
        this.#writable.uncork()
        isFull = this.#writable.writableNeedDrain
        // Several frames wait at the line, so that it never waits for us.
        while (this.#unsentBytes > UNSENT_BYTES && this.#failure === undefined) {
          await new Promise<void>((resolve) => {
            this.#wakeSender = resolve
          })
        }
        if (this.#failure !== undefined) return
      }
    } catch (error) {
      this.#fail(error)
    } finally {
      this.#isSending = false
    }
  }

  /** `start`: when it was handed to a stream that was full. */
  #sent(bytes: number, start: number | undefined): void {
    this.#unsentBytes -= bytes
    const now = performance.now()
    // A peer that takes what is sent is alive, though it may have nothing to say yet.
    this.#heardAt = now
    if (start !== undefined) this.#choice.sawLine(bytes, now - Math.max(start, this.#sentAt))
    this.#sentAt = now
    this.#wakeSender?.()
  }

  #push(chunk: Buffer): void {
    if (this.#failure !== undefined) return
    this.#heardAt = performance.now()
    try {
      this.#reader.push(chunk)
    } catch (error) {
      this.#fail(error)
    }
  }

  #greet(hello: Hello): void {
    agreeOnVersion(hello)
    // A smaller one could never take the largest request, and no session needs more memory than a good server's.
    if (hello.windowBytes < MAX_BATCH_BYTES) throw new ProtocolError(`a window of ${hello.windowBytes} bytes`)
    this.#windowBytes = Math.min(hello.windowBytes, 4 * WINDOW_BYTES)
    this.#server = hello
    this.#greeted?.resolve(hello)
  }

  #admit({ type, id, payloadBytes, isCompressed }: FrameHeader): void {
    if (type === FRAME.failed && id === 0 && payloadBytes <= SHORT_ANSWER_BYTES) return
    const request = this.#open.get(id)
    if ((type !== FRAME.done && type !== FRAME.failed) || isCompressed) throw new ProtocolError('no answer')
    if (request === undefined) throw new ProtocolError('an answer to nothing')
    const isLong = type === FRAME.done && request.type === FRAME.deliver
    if (!isLong && payloadBytes > SHORT_ANSWER_BYTES) throw new ProtocolError(`an answer of ${payloadBytes} bytes`)
    if (isLong && payloadBytes > answerLimit(request.costBytes)) {
      throw new ProtocolError(`an answer of ${payloadBytes} bytes`)
    }
  }

  #receive({ type, id }: FrameHeader, payload: Buffer): void {
    // Of the connection, not of one request: the server has ended it.
    if (id === 0) throw decodeError(payload)
    const request = this.#open.get(id) as OpenRequest
    this.#open.delete(id)
    this.#release(request.costBytes)
    if (type === FRAME.done) request.resolve(payload)
    else request.reject(decodeError(payload))
  }

  #watch(): void {
    const silentMs = performance.now() - this.#heardAt
    // A Map has its oldest entry first.
    const [oldest] = this.#open.values()
    if (oldest !== undefined && performance.now() - oldest.sentAt > this.#options.answerTimeoutMs) {
      this.#fail(new ConnectionLostError('a request got no answer'))
    }
    if (silentMs > this.#options.timeoutMs) {
      this.#fail(new ConnectionLostError(`nothing came for ${Math.round(silentMs / 1000)} s`))
    } else if (
      silentMs > Math.min(PING_MS, this.#options.timeoutMs / 4) &&
      this.#server !== undefined &&
      !this.#isPinging
    ) {
      this.#isPinging = true
      const done = () => {
        this.#isPinging = false
      }
      this.request(FRAME.ping, new Uint8Array(0)).then(done, done)
    }
  }

  readonly #abort = (): void => this.#fail(this.#options.signal?.reason)

  async #lose(cause?: Error): Promise<void> {
    if (this.#failure !== undefined) return
    const reason = await this.#connection.explain()
    // What could not be reached and what was reached and lost look alike to `ssh`.
    if (reason instanceof ConnectError && this.#server !== undefined) {
      this.#fail(new ConnectionLostError(reason.message, { cause: reason }))
    }
    this.#fail(reason ?? new ConnectionLostError(cause?.message ?? 'it was closed from the other side', { cause }))
  }

  #fail(error: unknown): void {
    if (this.#failure !== undefined) return
    this.#failure = error
    clearInterval(this.#timer)
    this.#options.signal?.removeEventListener('abort', this.#abort)
    this.#greeted?.reject(this.#failure)
    for (const { reject } of this.#open.values()) reject(this.#failure)
    this.#open.clear()
    for (const { start } of this.#waiting.splice(0)) start()
    this.#wakeSender?.()
    if (this.#isEnding) this.#writable.end()
    else this.#connection.destroy()
  }
}

/** Of each operation its path may come back, and a message with it. The smallest operation takes three bytes. */
function answerLimit(requestBytes: number): number {
  return 1024 + requestBytes * 128
}
