import type { ByteString } from '@lsync/posix'
import { ProtocolError } from '@lsync/ssh'
import type { EntryKind, Extent, Operation, RawMeta, TreePath } from '../model/operation.ts'
import { OperationTooBigError } from './errors.ts'

// What travels in a lane: records, each a tag and its fields. docs/format.md, "Operations on the wire", has every byte.

/** No batch is larger, so that a receiver knows how much memory it needs. The largest record and `FULL_BYTES` fit. */
export const MAX_BATCH_BYTES = 4 << 20
/** From so many bytes on an encoder is full, and `take` is due before anything is added. */
const FULL_BYTES = 512 << 10
/** Operations in one batch, so that the list of those that failed is bounded, too. */
export const MAX_BATCH_OPERATIONS = 1 << 14
/** Of one record of content. */
export const MAX_CONTENT_BYTES = 1 << 20
export const MAX_PATH_BYTES = 256 << 10
/** Extents of one file, and holes of one patch. `limitExtents` joins what is more finely divided. */
export const MAX_EXTENTS = 1 << 16
const MAX_NAME_BYTES = 255
const MAX_SYMLINK_BYTES = 4095
const MAX_XATTR_BYTES = 64 << 10
/** Names and values of one object together, `XATTR_BYTES` added for each. */
const MAX_XATTRS_BYTES = 1 << 20
const XATTR_BYTES = 8
/** Names of one `keep` together, `NAME_BYTES` added for each. */
const MAX_NAMES_BYTES = 1 << 20
const NAME_BYTES = 2
const MAX_ID = 0xffff_fffe
const INODE_FLAGS = 0x30
const NO_NAME = '' as ByteString

const TAG = {
  remove: 1,
  out: 2,
  in: 3,
  rename: 4,
  directory: 5,
  file: 6,
  patch: 7,
  link: 8,
  symlink: 9,
  special: 10,
  meta: 11,
  keep: 12,
} as const satisfies Record<Operation['do'], number>
const CONTENT = 32
const FINISH = 33
const ABORT = 34

const KINDS: readonly EntryKind[] = ['file', 'directory', 'symlink', 'special']
/** FIFO, socket, character and block device: the S_IF* bits of `special`. */
const SPECIAL_TYPES = new Set([0o010000, 0o140000, 0o020000, 0o060000])

/** The operations whose content follows: they end with `finish` or `abort`, all others at once. */
export type ContentOperation = Extract<Operation, { do: 'file' | 'patch' }>

export function hasContent(operation: Operation): operation is ContentOperation {
  return operation.do === 'file' || operation.do === 'patch'
}

/** The bytes that follow a `file` or `patch`. */
export function contentBytesOf(operation: ContentOperation): number {
  let sum = 0
  for (const [, length] of operation.extents) sum += length
  return sum
}

/**
 * The same data in at most `limit` extents: where there are more, those with the smallest holes between them become one,
 * so that these holes travel as zeros.
 */
export function limitExtents(extents: readonly Extent[], limit = MAX_EXTENTS): readonly Extent[] {
  if (extents.length <= limit) return extents
  const gaps = new Float64Array(extents.length - 1)
  for (let i = 0; i < gaps.length; i++) gaps[i] = gapAfter(extents, i)
  const widest = gaps.slice().sort()[extents.length - limit - 1] as number
  let toJoin = extents.length - limit
  const joined: Extent[] = []
  for (const [index, [offset, length]] of extents.entries()) {
    const last = joined.at(-1)
    if (last !== undefined && toJoin > 0 && (gaps[index - 1] as number) <= widest) {
      joined[joined.length - 1] = [last[0], offset + length - last[0]]
      toJoin--
    } else joined.push([offset, length])
  }
  return joined
}

type Keep = Extract<Operation, { do: 'keep' }>

/** The same in operations that each can be encoded: one for so many names of the directory, by their bytes. */
export function splitKeep(operation: Keep): readonly Keep[] {
  const { path, names } = operation
  if (names.length * (MAX_NAME_BYTES + NAME_BYTES) <= MAX_NAMES_BYTES) return [operation]
  const sorted = [...names].sort()
  const parts: Keep[] = []
  let part: ByteString[] = []
  let sum = 0
  let after = operation.after
  const add = (last: ByteString | undefined) => {
    const bounds = { ...(after === undefined ? {} : { after }), ...(last === undefined ? {} : { last }) }
    parts.push({ do: 'keep', path, names: part, ...bounds })
  }
  for (const name of sorted) {
    if (sum + name.length + NAME_BYTES > MAX_NAMES_BYTES) {
      const last = part.at(-1) as ByteString
      add(last)
      after = last
      part = []
      sum = 0
    }
    part.push(name)
    sum += name.length + NAME_BYTES
  }
  add(operation.last)
  return parts
}

function gapAfter(extents: readonly Extent[], index: number): number {
  const [offset, length] = extents[index] as Extent
  return (extents[index + 1] as Extent)[0] - offset - length
}

// Larger ones are allocated as they are needed.
const INITIAL_BYTES = 64 << 10
const VARINT_BYTES = 8

/**
 * Writes operations and their content as the bytes of one lane. Each batch that `take` gives holds whole records; a file
 * may begin in one and end in a later one of the same lane.
 */
export class OperationEncoder {
  #buffer: Buffer
  #length = 0
  #remaining: number | undefined
  #begun = 0
  #ended = 0

  /** `sizeBytes`: how large batches will be, so that the memory for one is taken at once. */
  constructor(sizeBytes = INITIAL_BYTES) {
    this.#initial = sizeBytes
    this.#buffer = Buffer.allocUnsafeSlow(sizeBytes)
  }

  readonly #initial: number

  /** Bytes that `take` would give now. */
  get sizeBytes(): number {
    return this.#length
  }

  /** `take` is due: what is added now could make a batch larger than a receiver takes. */
  get isFull(): boolean {
    return this.#length >= FULL_BYTES || this.#begun >= MAX_BATCH_OPERATIONS
  }

  /** Operations that came to their end since the last `take`: the positions that a `Failure` counts. */
  get ended(): number {
    return this.#ended
  }

  /** A `file` or `patch` was begun and has neither been finished nor aborted. */
  get isOpen(): boolean {
    return this.#remaining !== undefined
  }

  /**
   * Adds one operation. After `file` and `patch` comes `content` as long as its extents, and `finish`; or `abort`.
   * @throws {OperationTooBigError} when it is more than a receiver takes; nothing was added
   */
  operation(operation: Operation): void {
    if (this.#remaining !== undefined) throw new Error('the file before this operation has no end')
    const start = this.#length
    try {
      this.#operation(operation)
    } catch (error) {
      this.#length = start
      throw error
    }
    this.#begun++
    if (hasContent(operation)) this.#remaining = contentBytesOf(operation)
    else this.#ended++
  }

  /** The next bytes of the file that was begun, at most `MAX_CONTENT_BYTES`. */
  content(bytes: Uint8Array): void {
    if (this.#remaining === undefined || bytes.length > this.#remaining) throw new Error('content beyond the extents')
    if (bytes.length > MAX_CONTENT_BYTES) throw new Error('more content than one record holds')
    if (bytes.length === 0) return
    this.#remaining -= bytes.length
    this.#reserve(1 + VARINT_BYTES + bytes.length)
    this.#buffer[this.#length++] = CONTENT
    this.#varint(bytes.length)
    this.#buffer.set(bytes, this.#length)
    this.#length += bytes.length
  }

  /** All content of the file was given, and it is what the source holds. */
  finish(): void {
    if (this.#remaining !== 0) throw new Error('content is missing')
    this.#end(FINISH)
  }

  /** The source vanished or changed while it was read: the receiver forgets the file that was begun. */
  abort(): void {
    if (this.#remaining === undefined) throw new Error('no file was begun')
    this.#end(ABORT)
  }

  /**
   * All records since the last call. The bytes are the caller's, alone in their ArrayBuffer, so that it can be
   * transferred to another thread.
   */
  take(): Uint8Array<ArrayBuffer> {
    const batch = this.#buffer.subarray(0, this.#length)
    this.#buffer = Buffer.allocUnsafeSlow(this.#initial)
    this.#length = 0
    this.#begun = 0
    this.#ended = 0
    return batch as Uint8Array<ArrayBuffer>
  }

  #end(tag: number): void {
    this.#reserve(1)
    this.#buffer[this.#length++] = tag
    this.#remaining = undefined
    this.#ended++
  }

  #operation(operation: Operation): void {
    this.#reserve(1)
    this.#buffer[this.#length++] = TAG[operation.do]
    this.#path(operation.do === 'rename' ? operation.from : operation.path)
    if ('to' in operation) this.#path(operation.to)
    if ('stage' in operation) this.#number(operation.stage)
    if (operation.do === 'keep') this.#names(operation)
    if (!('meta' in operation)) return
    this.#meta(operation.meta, operation.path)
    if (hasContent(operation)) {
      this.#number(operation.sizeBytes)
      this.#extents(operation.extents, operation.path)
    }
    if (operation.do === 'patch') {
      this.#extents(operation.holes, operation.path)
      this.#number(operation.shared ? 1 : 0)
    } else if (operation.do === 'symlink') this.#bytes(operation.target)
    else if (operation.do === 'special') {
      this.#number(operation.type)
      this.#number(operation.rdev)
    } else if (operation.do === 'meta') this.#number(KINDS.indexOf(operation.kind))
  }

  #names({ path, names, after, last }: Extract<Operation, { do: 'keep' }>): void {
    let sum = 0
    this.#bytes(after ?? NO_NAME)
    this.#bytes(last ?? NO_NAME)
    this.#number(names.length)
    for (const name of names) {
      sum += name.length + NAME_BYTES
      if (sum > MAX_NAMES_BYTES) throw new OperationTooBigError(path, 'the sum of the names in it', MAX_NAMES_BYTES)
      this.#bytes(name)
    }
  }

  #path(path: TreePath): void {
    if (path.length > MAX_PATH_BYTES) throw new OperationTooBigError(path, 'its path', MAX_PATH_BYTES)
    this.#bytes(path)
  }

  #bytes(bytes: ByteString): void {
    this.#reserve(VARINT_BYTES + bytes.length)
    this.#varint(bytes.length)
    this.#buffer.write(bytes, this.#length, 'latin1')
    this.#length += bytes.length
  }

  #meta({ mode, uid, gid, mtimeNs, xattrs, inodeFlags }: RawMeta, path: TreePath): void {
    this.#number(mode)
    this.#number(uid)
    this.#number(gid)
    this.#reserve(9)
    this.#buffer.writeBigInt64LE(mtimeNs, this.#length)
    this.#buffer[this.#length + 8] = inodeFlags
    this.#length += 9
    this.#number(xattrs.length)
    let sum = 0
    for (const [name, value] of xattrs) {
      sum += name.length + value.length + XATTR_BYTES
      if (sum > MAX_XATTRS_BYTES) throw new OperationTooBigError(path, 'the sum of its attributes', MAX_XATTRS_BYTES)
      this.#bytes(name)
      this.#reserve(VARINT_BYTES + value.length)
      this.#varint(value.length)
      this.#buffer.set(value, this.#length)
      this.#length += value.length
    }
  }

  #extents(extents: readonly Extent[], path: TreePath): void {
    if (extents.length > MAX_EXTENTS) throw new OperationTooBigError(path, 'the number of its extents', MAX_EXTENTS)
    this.#reserve((1 + 2 * extents.length) * VARINT_BYTES)
    this.#varint(extents.length)
    let end = 0
    for (const [offset, length] of extents) {
      this.#varint(offset - end)
      this.#varint(length)
      end = offset + length
    }
  }

  #number(value: number): void {
    this.#reserve(VARINT_BYTES)
    this.#varint(value)
  }

  /** Little-endian groups of seven bits, the highest bit set on all but the last; the eighth byte holds the rest. */
  #varint(value: number): void {
    let rest = value
    while (rest >= 0x80) {
      this.#buffer[this.#length++] = (rest % 0x80) | 0x80
      rest = Math.floor(rest / 0x80)
    }
    this.#buffer[this.#length++] = rest
  }

  #reserve(bytes: number): void {
    const needed = this.#length + bytes
    if (needed <= this.#buffer.length) return
    const larger = Buffer.allocUnsafeSlow(Math.max(needed, Math.min(this.#buffer.length * 2, MAX_BATCH_BYTES)))
    this.#buffer.copy(larger, 0, 0, this.#length)
    this.#buffer = larger
  }
}

/** What a decoder hands out, in the order of the stream. */
export interface OperationReceiver {
  /** For `file` and `patch`, content and then `finish` or `abort` follow, perhaps in a later batch. */
  operation(operation: Operation): void
  /** Belongs to the batch: it is valid as long as that. */
  content(bytes: Uint8Array): void
  finish(): void
  abort(): void
}

/**
 * Reads the bytes of one lane. Trusts nothing: every length is checked before memory is taken for it, and what is handed
 * out is an operation whose paths stay beneath the root by their text, whose extents lie in the file, and whose content
 * is as long as they are. Holds nothing between batches but how much content is still to come.
 */
export class OperationDecoder {
  #batch: Buffer = Buffer.alloc(0)
  #at = 0
  #begun = 0
  #remaining: number | undefined

  /** A file was begun and has no end yet. */
  get isOpen(): boolean {
    return this.#remaining !== undefined
  }

  /**
   * Hands out all records of a batch. What comes before a fault was handed out already.
   * @throws {ProtocolError} on anything that an encoder would not write
   */
  decode(batch: Uint8Array, receiver: OperationReceiver): void {
    if (batch.length > MAX_BATCH_BYTES) throw new ProtocolError(`a batch of ${batch.length} bytes`)
    this.#batch = Buffer.from(batch.buffer, batch.byteOffset, batch.byteLength)
    this.#at = 0
    this.#begun = 0
    while (this.#at < this.#batch.length) this.#record(receiver)
    this.#batch = Buffer.alloc(0)
  }

  #record(receiver: OperationReceiver): void {
    const tag = this.#byte()
    if (this.#remaining === undefined) {
      if (++this.#begun > MAX_BATCH_OPERATIONS) throw new ProtocolError('a batch of too many operations')
      const operation = this.#operation(tag)
      if (hasContent(operation)) this.#remaining = contentBytesOf(operation)
      receiver.operation(operation)
    } else if (tag === CONTENT) {
      const length = this.#number(Math.min(MAX_CONTENT_BYTES, this.#remaining), 'content')
      if (length === 0) throw new ProtocolError('a record without content')
      this.#remaining -= length
      receiver.content(this.#take(length))
    } else if (tag === FINISH && this.#remaining === 0) {
      this.#remaining = undefined
      receiver.finish()
    } else if (tag === ABORT) {
      this.#remaining = undefined
      receiver.abort()
    } else throw new ProtocolError(`record ${tag} within a file`)
  }

  #operation(tag: number): Operation {
    switch (tag) {
      case TAG.remove:
        return { do: 'remove', path: this.#name() }
      case TAG.out:
      case TAG.in: {
        const path = this.#name()
        return { do: tag === TAG.out ? 'out' : 'in', path, stage: this.#number(Number.MAX_SAFE_INTEGER, 'stage') }
      }
      case TAG.rename:
        return { do: 'rename', from: this.#name(), to: this.#name() }
      case TAG.directory:
        return { do: 'directory', path: this.#path() }
      case TAG.keep: {
        const path = this.#path()
        const after = this.#bytes(MAX_NAME_BYTES, 'name')
        const last = this.#bytes(MAX_NAME_BYTES, 'name')
        const bounds = { ...(after === '' ? {} : { after }), ...(last === '' ? {} : { last }) }
        return { do: 'keep', path, names: this.#names(), ...bounds }
      }
      case TAG.file: {
        const path = this.#name()
        const meta = this.#meta()
        const sizeBytes = this.#number(Number.MAX_SAFE_INTEGER, 'size')
        return { do: 'file', path, meta, sizeBytes, extents: this.#extents(sizeBytes) }
      }
      case TAG.patch: {
        const path = this.#name()
        const meta = this.#meta()
        const sizeBytes = this.#number(Number.MAX_SAFE_INTEGER, 'size')
        const extents = this.#extents(sizeBytes)
        const holes = this.#extents(sizeBytes)
        return { do: 'patch', path, meta, sizeBytes, extents, holes, shared: this.#number(1, 'shared') === 1 }
      }
      case TAG.link:
        return { do: 'link', path: this.#name(), to: this.#name() }
      case TAG.symlink: {
        const path = this.#name()
        const meta = this.#meta()
        const target = this.#bytes(MAX_SYMLINK_BYTES, 'symlink target')
        if (target === '' || target.includes('\0')) throw new ProtocolError('a symlink target that cannot be')
        return { do: 'symlink', path, meta, target }
      }
      case TAG.special: {
        const path = this.#name()
        const meta = this.#meta()
        const type = this.#number(0o170000, 'type')
        if (!SPECIAL_TYPES.has(type)) throw new ProtocolError(`the file type ${type}`)
        return { do: 'special', path, meta, type, rdev: this.#number(Number.MAX_SAFE_INTEGER, 'device') }
      }
      case TAG.meta: {
        const path = this.#path()
        const meta = this.#meta()
        return { do: 'meta', path, kind: KINDS[this.#number(KINDS.length - 1, 'kind')] as EntryKind, meta }
      }
      default:
        throw new ProtocolError(`the record ${tag} is unknown`)
    }
  }

  #names(): ByteString[] {
    const count = this.#number(MAX_NAMES_BYTES, 'names')
    const names: ByteString[] = []
    let sum = 0
    for (let i = 0; i < count; i++) {
      const name = this.#bytes(MAX_NAME_BYTES, 'name')
      sum += name.length + NAME_BYTES
      if (sum > MAX_NAMES_BYTES) throw new ProtocolError('names without end')
      if (name === '' || name.includes('/')) throw new ProtocolError('a name that cannot be')
      assertBeneath(name)
      names.push(name)
    }
    return names
  }

  #meta(): RawMeta {
    const mode = this.#number(0o7777, 'mode')
    const uid = this.#number(MAX_ID, 'owner')
    const gid = this.#number(MAX_ID, 'group')
    const mtimeNs = this.#take(8).readBigInt64LE(0)
    const inodeFlags = this.#byte()
    if ((inodeFlags & ~INODE_FLAGS) !== 0) throw new ProtocolError(`the inode flags ${inodeFlags}`)
    const count = this.#number(MAX_XATTRS_BYTES, 'attributes')
    const xattrs: [ByteString, Uint8Array][] = []
    let last = ''
    let sum = 0
    for (let i = 0; i < count; i++) {
      const name = this.#bytes(MAX_NAME_BYTES, 'attribute name')
      if (name <= last || name.includes('\0')) throw new ProtocolError('an attribute name that cannot be here')
      last = name
      const length = this.#number(MAX_XATTR_BYTES, 'attribute')
      sum += name.length + length + XATTR_BYTES
      if (sum > MAX_XATTRS_BYTES) throw new ProtocolError('attributes without end')
      // A copy: the applier may keep metadata for longer than the batch.
      xattrs.push([name, Uint8Array.from(this.#take(length))])
    }
    return { mode, uid, gid, mtimeNs, xattrs, inodeFlags }
  }

  #extents(sizeBytes: number): Extent[] {
    const count = this.#number(MAX_EXTENTS, 'extents')
    const extents: Extent[] = []
    let end = 0
    for (let i = 0; i < count; i++) {
      const gap = this.#number(sizeBytes - end, 'offset')
      const offset = end + gap
      const length = this.#number(sizeBytes - offset, 'extent')
      if (length === 0 || (gap === 0 && i > 0)) throw new ProtocolError('extents that are empty or touch')
      extents.push([offset, length])
      end = offset + length
    }
    return extents
  }

  /** A path that is not the root's. */
  #name(): TreePath {
    const path = this.#path()
    if (path === '') throw new ProtocolError('the root where a name is expected')
    return path
  }

  #path(): TreePath {
    const path = this.#bytes(MAX_PATH_BYTES, 'path')
    assertBeneath(path)
    return path
  }

  #bytes(limit: number, what: string): ByteString {
    const length = this.#number(limit, what)
    if (length > this.#batch.length - this.#at) throw new ProtocolError('a record that is cut short')
    const start = this.#at
    this.#at += length
    return this.#batch.toString('latin1', start, this.#at) as ByteString
  }

  #take(length: number): Buffer {
    if (length > this.#batch.length - this.#at) throw new ProtocolError('a record that is cut short')
    const start = this.#at
    this.#at += length
    return this.#batch.subarray(start, this.#at)
  }

  #byte(): number {
    const byte = this.#batch[this.#at++]
    if (byte === undefined) throw new ProtocolError('a record that is cut short')
    return byte
  }

  #number(limit: number, what: string): number {
    let value = 0
    let scale = 1
    for (let i = 0; i < VARINT_BYTES; i++) {
      const byte = this.#byte()
      value += (byte & 0x7f) * scale
      if (byte < 0x80) {
        // One form for each number: what an encoder would not write is refused.
        if (value > limit || (byte === 0 && i > 0)) throw new ProtocolError(`${what} ${value} beyond ${limit}`)
        return value
      }
      scale *= 0x80
    }
    throw new ProtocolError(`${what}: a number without end`)
  }
}

/** Throws unless every component of `path` is a name: no `..`, `.`, nothing empty, no NUL, at most 255 bytes each. */
export function assertBeneath(path: string): void {
  if (path === '') return
  if (path.includes('\0')) throw new ProtocolError('a path with a NUL byte')
  let start = 0
  for (;;) {
    const slash = path.indexOf('/', start)
    const end = slash < 0 ? path.length : slash
    const length = end - start
    if (length === 0 || length > MAX_NAME_BYTES || isDots(path, start, length)) {
      throw new ProtocolError('a path that leads out of its tree or cannot be', { path })
    }
    if (slash < 0) return
    start = slash + 1
  }
}

function isDots(path: string, start: number, length: number): boolean {
  const DOT = 0x2e
  return length <= 2 && path.charCodeAt(start) === DOT && (length === 1 || path.charCodeAt(start + 1) === DOT)
}
