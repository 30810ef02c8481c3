import { type ByteString, LsyncError, printable } from '@lsync/posix'
import { ProtocolError } from '@lsync/ssh'
import { type DescribedFile, type Description, MAX_DESCRIBED_BLOCKS_BYTES } from '../describe.ts'
import type { Checkpoint } from '../model/checkpoint.ts'
import type { Failure, TreePath } from '../model/operation.ts'
import { ROW_BYTES, Row } from '../model/row.ts'
import type { TargetLoss, TargetState } from '../transport/target.ts'
import { assertBeneath, MAX_BATCH_OPERATIONS, MAX_PATH_BYTES } from './operation-codec.ts'

// The payloads of all frames but `deliver`. Numbers are little-endian; strings are their length (4 bytes) and bytes.

const MAX_TEXT_BYTES = 4096
const MAX_MESSAGE_BYTES = 256
const MAX_LOSSES = 64
const MAX_NAME_BYTES = 255
const MAX_DESCRIBED = 16_384
const NO_BYTES = Buffer.alloc(0)
const CODE = /^[A-Z][A-Z0-9_]{0,63}$/
const LOSSES: ReadonlySet<string> = new Set<TargetLoss['what']>([
  'owner',
  'xattr',
  'trusted-xattr',
  'acl',
  'special',
  'hard-link',
  'time',
  'flags',
  'symlink-meta',
  'atomic',
  'durable',
  'holes',
])

class Writer {
  readonly #parts: Buffer[] = []

  number(value: number): this {
    const bytes = Buffer.allocUnsafe(8)
    bytes.writeBigUInt64LE(BigInt(value))
    this.#parts.push(bytes)
    return this
  }

  bytes(bytes: Buffer): this {
    const length = Buffer.allocUnsafe(4)
    length.writeUInt32LE(bytes.length)
    this.#parts.push(length, bytes)
    return this
  }

  name(bytes: ByteString): this {
    return this.bytes(Buffer.from(bytes, 'latin1'))
  }

  /** Text for people, cut where it gets long. */
  text(text: string, limit = MAX_TEXT_BYTES): this {
    const bytes = Buffer.from(text)
    return this.bytes(bytes.length <= limit ? bytes : Buffer.from(`${bytes.toString('utf8', 0, limit - 8)}…`))
  }

  done(): Buffer {
    return Buffer.concat(this.#parts)
  }
}

class Reader {
  readonly #bytes: Buffer
  #at = 0

  constructor(bytes: Uint8Array) {
    this.#bytes = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  }

  number(limit = Number.MAX_SAFE_INTEGER): number {
    if (this.#bytes.length - this.#at < 8) throw new ProtocolError('a message that is cut short')
    const value = this.#bytes.readBigUInt64LE(this.#at)
    this.#at += 8
    if (value > BigInt(limit)) throw new ProtocolError(`a number beyond ${limit}`)
    return Number(value)
  }

  bytes(limit: number): Buffer {
    const start = this.#at + 4
    if (start > this.#bytes.length) throw new ProtocolError('a message that is cut short')
    const length = this.#bytes.readUInt32LE(this.#at)
    if (length > limit || length > this.#bytes.length - start) throw new ProtocolError(`a string of ${length} bytes`)
    this.#at = start + length
    return this.#bytes.subarray(start, this.#at)
  }

  path(): ByteString {
    const path = this.bytes(MAX_PATH_BYTES).toString('latin1') as ByteString
    assertBeneath(path)
    return path
  }

  name(): ByteString {
    return this.bytes(MAX_NAME_BYTES).toString('latin1') as ByteString
  }

  /** Text for people, without anything that a terminal would obey. */
  text(limit = MAX_TEXT_BYTES): string {
    return printable(this.bytes(limit).toString('latin1')).replaceAll('\\\\', '\\')
  }

  code(): string {
    const code = this.bytes(64).toString('latin1')
    if (!CODE.test(code)) throw new ProtocolError('an error code that cannot be')
    return code
  }

  end(): void {
    if (this.#at !== this.#bytes.length) throw new ProtocolError('a message with more than belongs to it')
  }
}

function asBuffer(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

function decode<T>(payload: Uint8Array, read: (reader: Reader) => T): T {
  const reader = new Reader(payload)
  const value = read(reader)
  reader.end()
  return value
}

/** `open` and `status`: the target, beneath what the server serves. */
export function encodePath(path: ByteString): Buffer {
  return new Writer().name(path).done()
}

export function decodePath(payload: Uint8Array): ByteString {
  return decode(payload, (reader) => reader.path())
}

/** `barrier`, and a part of what `open` and `status` are answered with. */
export function encodeCheckpoint(checkpoint: Checkpoint | undefined): Buffer {
  return writeCheckpoint(new Writer(), checkpoint).done()
}

export function decodeCheckpoint(payload: Uint8Array): Checkpoint | undefined {
  return decode(payload, readCheckpoint)
}

function writeCheckpoint(writer: Writer, checkpoint: Checkpoint | undefined): Writer {
  if (checkpoint === undefined) return writer.number(0)
  return writer.number(1).text(checkpoint.root).number(checkpoint.sequence)
}

function readCheckpoint(reader: Reader): Checkpoint | undefined {
  if (reader.number(1) === 0) return undefined
  const root = reader.bytes(128).toString('latin1')
  if (!/^[\w-]+$/.test(root)) throw new ProtocolError('a checkpoint of a root that cannot be')
  return { root, sequence: reader.number() }
}

/** The answer to `open`. */
export function encodeState({ checkpoint, isEmpty, nextStage, losses }: TargetState): Buffer {
  const writer = writeCheckpoint(new Writer(), checkpoint)
  writer
    .number(isEmpty ? 1 : 0)
    .number(nextStage)
    .number(losses.length)
  for (const { what, message } of losses) writer.text(what).text(message)
  return writer.done()
}

export function decodeState(payload: Uint8Array): TargetState {
  return decode(payload, (reader) => {
    const checkpoint = readCheckpoint(reader)
    const isEmpty = reader.number(1) === 1
    const nextStage = reader.number(2 ** 52)
    const losses: TargetLoss[] = []
    for (let count = reader.number(MAX_LOSSES); count > 0; count--) {
      const what = reader.text()
      if (!LOSSES.has(what)) throw new ProtocolError('a loss that is unknown')
      losses.push({ what: what as TargetLoss['what'], message: reader.text() })
    }
    return { checkpoint, isEmpty, nextStage, losses }
  })
}

/** The answer to `deliver`. */
export function encodeFailures(failures: readonly Failure[]): Buffer {
  const writer = new Writer().number(failures.length)
  for (const { index, code, path, message } of failures) {
    writer.number(index).text(code).name(path).text(message, MAX_MESSAGE_BYTES)
  }
  return writer.done()
}

export function decodeFailures(payload: Uint8Array): readonly Failure[] {
  return decode(payload, (reader) => {
    const failures: Failure[] = []
    let least = 0
    for (let count = reader.number(MAX_BATCH_OPERATIONS); count > 0; count--) {
      const index = reader.number(MAX_BATCH_OPERATIONS)
      if (index < least) throw new ProtocolError('failures out of order')
      least = index + 1
      failures.push({ index, code: reader.code(), path: reader.path(), message: reader.text(MAX_MESSAGE_BYTES) })
    }
    return failures
  })
}

/** `describe`: a directory of the target, and the name after which its description is to go on. */
export function encodeDescribe(path: TreePath, after: ByteString | ''): Buffer {
  return new Writer()
    .name(path)
    .name(after as ByteString)
    .done()
}

export function decodeDescribe(payload: Uint8Array): { readonly path: TreePath; readonly after: ByteString } {
  return decode(payload, (reader) => ({ path: reader.path() as TreePath, after: reader.name() }))
}

/** The answer to `describe`. */
export function encodeDescription({ files, isWhole }: Description): Buffer {
  const writer = new Writer().number(isWhole ? 1 : 0).number(files.length)
  for (const { name, image, blocks = NO_BYTES } of files) {
    writer.name(name).bytes(asBuffer(image)).bytes(asBuffer(blocks))
  }
  return writer.done()
}

export function decodeDescription(payload: Uint8Array, after: ByteString | ''): Description {
  return decode(payload, (reader) => {
    const isWhole = reader.number(1) === 1
    const files: DescribedFile[] = []
    let last: string = after
    for (let count = reader.number(MAX_DESCRIBED); count > 0; count--) {
      const name = reader.name()
      if (name <= last) throw new ProtocolError('a description out of order')
      last = name
      const image = reader.bytes(ROW_BYTES)
      const blocks = reader.bytes(MAX_DESCRIBED_BLOCKS_BYTES)
      if (image.length !== ROW_BYTES || !new Row(name, image).isFile) throw new ProtocolError('a file that is none')
      if (blocks.length % 8 !== 0) throw new ProtocolError('hashes that are cut short')
      files.push({ name, image, blocks: blocks.length === 0 ? undefined : blocks })
    }
    // Else it would be asked for the same again and again.
    if (!isWhole && files.length === 0) throw new ProtocolError('a description that does not go on')
    return { files, isWhole }
  })
}

/** `failed`: why a request could not be done. The error's class is known by its code. */
export function encodeError(error: unknown): Buffer {
  const { code, message, hint } =
    error instanceof LsyncError ? error : new LsyncError('REMOTE_FAILED', `lsync failed there: ${String(error)}`)
  return new Writer()
    .text(code)
    .text(message)
    .text(hint ?? '')
    .done()
}

export function decodeError(payload: Uint8Array): LsyncError {
  return decode(payload, (reader) => {
    const [code, message, hint] = [reader.code(), reader.text(), reader.text()]
    return new LsyncError(code, message, hint === '' ? {} : { hint })
  })
}
