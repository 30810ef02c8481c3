import { printable } from '@lsync/posix'
import { ProtocolError } from '@lsync/ssh'
import { ProtocolVersionError } from './errors.ts'
import { checksumOf } from './hash.ts'
import { MAX_BATCH_BYTES } from './operation-codec.ts'

// What goes over a connection: one hello each way, then frames. docs/format.md, "The wire", has every byte.

/** Not text, and broken by whatever converts line ends. */
const MAGIC = Buffer.from('\x89LSYNC\r\n', 'latin1')
const HELLO_BYTES = 32
export const HEADER_BYTES = 16
export const PROTOCOL_LOWEST = 1
export const PROTOCOL_HIGHEST = 1
/** A side reads frames whose payload is a zstd frame. */
export const CAPABILITY_ZSTD = 1
/** A server answers `describe`. */
export const CAPABILITY_DESCRIBE = 2

/** Bytes of requests that a server takes before it has answered them. */
export const WINDOW_BYTES = 16 << 20
/** What a request costs of the window at least, so that the number of open requests is bounded, too. */
export const LEAST_COST_BYTES = 4096
/** What a `describe` costs of the window: as much as its answer may be long. */
const DESCRIBE_COST_BYTES = 512 << 10
export const MAX_LANES = 64
/** Answers name what failed in a batch: its paths again, and a message for each. */
export const MAX_PAYLOAD_BYTES = 2 * MAX_BATCH_BYTES + (1 << 20)

/** Kinds of frames. Requests come from the client, an answer to each from the server, with the same id. */
export const FRAME = {
  open: 1,
  deliver: 2,
  barrier: 3,
  status: 4,
  close: 5,
  ping: 6,
  describe: 7,
  done: 64,
  failed: 65,
} as const
export type FrameType = (typeof FRAME)[keyof typeof FRAME]
/** What a request takes of the server's window until it is answered; `contentBytes` is the length of its payload before compression. */
export function costOf(type: FrameType, contentBytes: number): number {
  return type === FRAME.describe ? DESCRIBE_COST_BYTES : Math.max(contentBytes, LEAST_COST_BYTES)
}

const TYPES: ReadonlySet<number> = new Set(Object.values(FRAME))

const FLAG_ZSTD = 1

export interface FrameHeader {
  readonly type: FrameType
  /** The payload is the length of the content (4 bytes), then a zstd frame of that. */
  readonly isCompressed: boolean
  readonly lane: number
  readonly id: number
  readonly payloadBytes: number
}

/** What each side says first. */
export interface Hello {
  readonly lowest: number
  readonly highest: number
  readonly capabilities: number
  readonly windowBytes: number
  readonly lanes: number
}

export function encodeHello(hello: Hello): Buffer {
  const bytes = Buffer.alloc(HELLO_BYTES)
  MAGIC.copy(bytes)
  bytes.writeUInt16LE(hello.lowest, 8)
  bytes.writeUInt16LE(hello.highest, 10)
  bytes.writeUInt32LE(hello.capabilities, 12)
  bytes.writeUInt32LE(hello.windowBytes, 16)
  bytes.writeUInt32LE(hello.lanes, 20)
  bytes.writeUInt32LE(checksumOf(bytes.subarray(0, 28), 0n), 28)
  return bytes
}

function decodeHello(bytes: Buffer): Hello {
  if (bytes.readUInt32LE(28) !== checksumOf(bytes.subarray(0, 28), 0n)) throw new ProtocolError('a damaged hello')
  return {
    lowest: bytes.readUInt16LE(8),
    highest: bytes.readUInt16LE(10),
    capabilities: bytes.readUInt32LE(12),
    windowBytes: bytes.readUInt32LE(16),
    lanes: bytes.readUInt32LE(20),
  }
}

/**
 * The highest version that both sides speak.
 * @throws {ProtocolVersionError} if there is none
 */
export function agreeOnVersion(other: Hello, lowest = PROTOCOL_LOWEST, highest = PROTOCOL_HIGHEST): number {
  const version = Math.min(highest, other.highest)
  if (version < lowest || version < other.lowest) throw new ProtocolVersionError(other.lowest, other.highest)
  return version
}

/** The header of a frame; the payload goes behind it. */
export function encodeHeader(header: Omit<FrameHeader, 'payloadBytes'>, payload: Uint8Array): Buffer {
  const bytes = Buffer.allocUnsafe(HEADER_BYTES)
  bytes.writeUInt32LE(payload.length, 0)
  bytes[4] = header.type
  bytes[5] = header.isCompressed ? FLAG_ZSTD : 0
  bytes.writeUInt16LE(header.lane, 6)
  bytes.writeUInt32LE(header.id, 8)
  bytes.writeUInt32LE(checksumOf(payload, seedOf(bytes)), 12)
  return bytes
}

// So that the checksum covers the header, too.
function seedOf(header: Buffer): bigint {
  return header.readBigUInt64LE(0) ^ (BigInt(header.readUInt32LE(8)) << 17n)
}

export interface FrameReceiver {
  hello(hello: Hello): void
  /** Before memory is taken for the payload. Throws to refuse it. */
  admit(header: FrameHeader): void
  /** The payload is alone in its ArrayBuffer. */
  frame(header: FrameHeader, payload: Buffer): void
}

/** Cuts a stream of bytes into a hello and frames. Holds one frame at most. */
export class FrameReader {
  readonly #receiver: FrameReceiver
  #hasHello = false
  readonly #start = Buffer.alloc(HELLO_BYTES)
  #startLength = 0
  #header: FrameHeader | undefined
  #payload: Buffer = Buffer.alloc(0)
  #payloadLength = 0

  constructor(receiver: FrameReceiver) {
    this.#receiver = receiver
  }

  /** Nothing is missing: the stream may end here. */
  get isBetweenFrames(): boolean {
    return this.#hasHello && this.#startLength === 0 && this.#header === undefined
  }

  /** @throws {ProtocolError} on anything that an lsync would not send; nothing may be pushed after that */
  push(chunk: Uint8Array): void {
    let rest = Buffer.from(chunk.buffer, chunk.byteOffset, chunk.byteLength)
    while (rest.length > 0) {
      rest = this.#header === undefined ? this.#readStart(rest) : this.#readPayload(this.#header, rest)
    }
  }

  #readStart(chunk: Buffer): Buffer {
    const needed = (this.#hasHello ? HEADER_BYTES : HELLO_BYTES) - this.#startLength
    const taken = chunk.copy(this.#start, this.#startLength, 0, needed)
    this.#startLength += taken
    if (!this.#hasHello) this.#checkMagic(chunk)
    if (taken < needed) return chunk.subarray(taken)
    this.#startLength = 0
    if (this.#hasHello) this.#begin(readHeader(this.#start))
    else {
      this.#hasHello = true
      this.#receiver.hello(decodeHello(this.#start))
    }
    return chunk.subarray(taken)
  }

  #checkMagic(chunk: Buffer): void {
    const length = Math.min(this.#startLength, MAGIC.length)
    if (this.#start.subarray(0, length).equals(MAGIC.subarray(0, length))) return
    throw new ProtocolError(`it begins with “${printable(chunk.toString('latin1', 0, 60)).trim()}”, not as lsync does`)
  }

  #begin(header: FrameHeader): void {
    this.#receiver.admit(header)
    this.#header = header
    this.#payload = Buffer.allocUnsafeSlow(header.payloadBytes)
    this.#payloadLength = 0
    if (header.payloadBytes === 0) this.#finish(header)
  }

  #readPayload(header: FrameHeader, chunk: Buffer): Buffer {
    const taken = chunk.copy(this.#payload, this.#payloadLength)
    this.#payloadLength += taken
    if (this.#payloadLength === header.payloadBytes) this.#finish(header)
    return chunk.subarray(taken)
  }

  #finish(header: FrameHeader): void {
    const payload = this.#payload
    this.#header = undefined
    this.#payload = Buffer.alloc(0)
    if (this.#start.readUInt32LE(12) !== checksumOf(payload, seedOf(this.#start))) {
      throw new ProtocolError('a frame whose checksum does not fit')
    }
    this.#receiver.frame(header, payload)
  }
}

function readHeader(bytes: Buffer): FrameHeader {
  const payloadBytes = bytes.readUInt32LE(0)
  const type = bytes[4] as number
  const flags = bytes[5] as number
  const lane = bytes.readUInt16LE(6)
  if (!TYPES.has(type)) throw new ProtocolError(`the frame type ${type} is unknown`)
  if ((flags & ~FLAG_ZSTD) !== 0) throw new ProtocolError(`the frame flags ${flags} are unknown`)
  if (payloadBytes > MAX_PAYLOAD_BYTES) throw new ProtocolError(`a frame of ${payloadBytes} bytes`)
  if (lane >= MAX_LANES) throw new ProtocolError(`the lane ${lane}`)
  return {
    type: type as FrameType,
    isCompressed: (flags & FLAG_ZSTD) !== 0,
    lane,
    id: bytes.readUInt32LE(8),
    payloadBytes,
  }
}
