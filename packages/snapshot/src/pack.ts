import { allocate, LsyncError, type Memory, memoryOver } from '@lsync/posix'
import { compressBound, type Engine, SEAL_BYTES } from './crypto/engine.ts'
import { isId, type ObjectId } from './model/tree.ts'

/** What an object is: a piece of a file's content, or the list of a directory's nodes. */
export type ObjectKind = 'data' | 'tree'

/** One object as a pack has it. */
export interface PackedObject {
  readonly kind: ObjectKind
  readonly id: ObjectId
  readonly offset: number
  /** Sealed, as it lies in the pack. */
  readonly length: number
  /** Of the content; `undefined` when it is not compressed. */
  readonly uncompressedLength: number | undefined
}

/** A finished pack. */
export interface Pack {
  readonly id: ObjectId
  readonly content: Uint8Array
  /** Its objects, as its header has them before it is sealed: see `visitHeader`. */
  readonly header: Uint8Array
}

/** Packs are finished when they have this much. Source: restic's default since its version 0.14. */
export const PACK_BYTES = 16 * 1024 * 1024
/** Room for a pack, the object that fills it and its header. Chunks of more than that are rare. */
const ROOM_BYTES = PACK_BYTES + 2 * 1024 * 1024

/** Nothing in a repository that a restic wrote is larger: its chunks end at 8 MiB. */
export const MAX_DATA_BYTES = 64 * 1024 * 1024
/** A directory of a million names is a tree of 400 MB. */
export const MAX_TREE_BYTES = 1024 * 1024 * 1024
/** A pack has its header at the end; no header of a sane pack is larger. */
const MAX_HEADER_BYTES = 64 * 1024 * 1024

const LENGTH_BYTES = 4
const ID_BYTES = 32
const TYPES = { data: 0, tree: 1 } as const
const COMPRESSED = 2
const FIRST_HEADER_BYTES = 4096

/** A pack, or what is in one, is not what it must be. */
export class PackDamagedError extends LsyncError {
  constructor(packId: ObjectId, why: string) {
    super('PACK_DAMAGED', `pack ${packId.slice(0, 8)} is damaged: ${why}`, {
      path: packId,
      hint: 'see `lsync snapshot check --read-data`',
    })
  }
}

/** Puts objects of one kind into packs: compressed where that makes them smaller, then sealed. */
export class PackWriter {
  readonly kind: ObjectKind
  readonly #engine: Engine
  readonly #compresses: boolean
  #memory: Memory
  #length = 0
  // In the header's own form: a hundred thousand objects would be a hundred thousand things to collect.
  #header = Buffer.allocUnsafe(FIRST_HEADER_BYTES)
  #headerLength = 0
  readonly #id = Buffer.allocUnsafe(ID_BYTES)
  #frame = allocate(64 * 1024)
  readonly #spares: Memory[] = []
  #hasFilled = false

  constructor(kind: ObjectKind, engine: Engine, options: { readonly compresses: boolean }) {
    this.kind = kind
    this.#engine = engine
    this.#compresses = options.compresses
    this.#memory = allocate(64 * 1024)
  }

  /** Bytes of the objects so far. */
  get sizeBytes(): number {
    return this.#length
  }

  get isFull(): boolean {
    return this.#length >= PACK_BYTES
  }

  /** Adds an object by its content. Returns how many bytes it takes. */
  add(id: ObjectId, from: Memory, at: number, length: number): number {
    this.#id.write(id, 'hex')
    return this.addDigest(this.#id, from, at, length)
  }

  /** As `add`, with the 32 bytes of the id. */
  addDigest(digest: Uint8Array, from: Memory, at: number, length: number): number {
    const bound = compressBound(length)
    if (this.#frame.buffer.length < bound) this.#frame = allocate(bound)
    const isTried = this.#compresses && !isRandom(from.buffer, at, length)
    const frameLength = isTried ? this.#engine.compress(from, at, length, this.#frame, 0) : length
    const isCompressed = frameLength < length
    const [source, sourceAt, size] = isCompressed ? [this.#frame, 0, frameLength] : [from, at, length]
    const offset = this.#reserve(size + SEAL_BYTES)
    this.#engine.seal(source, sourceAt, size, this.#memory, offset)
    this.#note(digest, size + SEAL_BYTES, isCompressed ? length : undefined)
    return size + SEAL_BYTES
  }

  /** Adds an object that is sealed already, with the same keys. */
  addSealed(object: PackedObject, sealed: Uint8Array): void {
    const offset = this.#reserve(sealed.length)
    this.#memory.buffer.set(sealed, offset)
    this.#id.write(object.id, 'hex')
    this.#note(this.#id, sealed.length, object.uncompressedLength)
  }

  /** Takes out what is there, without a header, for another writer's `addSealed`. */
  takeSealed(): { readonly content: Buffer; readonly objects: readonly PackedObject[] } {
    const objects = objectsOf(this.#header.subarray(0, this.#headerLength))
    const taken = { content: this.#memory.buffer.subarray(0, this.#length), objects }
    this.#begin()
    return taken
  }

  /** Ends the pack and begins another one. There must be an object in it. */
  finish(): Pack {
    if (this.isFull) this.#hasFilled = true
    const header = this.#header.subarray(0, this.#headerLength)
    const at = this.#reserve(header.length + SEAL_BYTES + LENGTH_BYTES)
    const plain = allocate(header.length)
    plain.buffer.set(header)
    this.#engine.seal(plain, 0, header.length, this.#memory, at)
    this.#memory.buffer.writeUInt32LE(header.length + SEAL_BYTES, this.#length - LENGTH_BYTES)
    const digest = allocate(ID_BYTES)
    this.#engine.hash(this.#memory, 0, this.#length, digest, 0)
    const pack = { id: digest.buffer.toString('hex'), content: this.#memory.buffer.subarray(0, this.#length), header }
    this.#header = Buffer.allocUnsafe(Math.max(FIRST_HEADER_BYTES, header.length))
    this.#begin()
    return pack
  }

  /** Takes memory of a pack that has been written, for one of the next. */
  recycle(memory: ArrayBufferLike): void {
    if (memory.byteLength >= ROOM_BYTES) this.#spares.push(memoryOver(memory))
  }

  #begin(): void {
    // The memory goes with the pack: copying it would cost more than allocating.
    this.#memory = this.#hasFilled ? this.#takeRoom() : allocate(64 * 1024)
    this.#length = 0
    this.#headerLength = 0
  }

  /**
   * Memory for a pack that will be full. It is shared, not handed over, and comes back by `recycle`: 16 MiB that come and
   * go between threads have the collectors of all of them run all the time.
   */
  #takeRoom(): Memory {
    return this.#spares.pop() ?? memoryOver(new SharedArrayBuffer(ROOM_BYTES))
  }

  #note(digest: Uint8Array, length: number, uncompressedLength: number | undefined): void {
    const bytes = headerEntryBytes({ uncompressedLength })
    if (this.#headerLength + bytes > this.#header.length) {
      const larger = Buffer.allocUnsafe(this.#header.length * 2)
      this.#header.copy(larger, 0, 0, this.#headerLength)
      this.#header = larger
    }
    const header = this.#header
    let at = this.#headerLength
    header[at] = TYPES[this.kind] + (uncompressedLength === undefined ? 0 : COMPRESSED)
    at = header.writeUInt32LE(length, at + 1)
    if (uncompressedLength !== undefined) at = header.writeUInt32LE(uncompressedLength, at)
    header.set(digest, at)
    this.#headerLength += bytes
  }

  #reserve(length: number): number {
    const at = this.#length
    this.#length += length
    if (this.#length > this.#memory.buffer.length) {
      // Small snapshots have small packs, so the room doubles up to that of a full one.
      const doubled = this.#memory.buffer.length * 2
      const wanted = Math.max(doubled > PACK_BYTES / 2 ? ROOM_BYTES : doubled, this.#length)
      const larger = wanted === ROOM_BYTES ? this.#takeRoom() : allocate(wanted)
      this.#memory.buffer.copy(larger.buffer, 0, 0, at)
      this.#memory = larger
    }
    return at
  }
}

const counts = new Uint16Array(256)
const SAMPLES = 512
const SAMPLED_FROM = 1024
// In content of this size repetitions of bytes that look random are worth looking for.
const SAMPLED_BELOW = 128 * 1024
// Of 512 random bytes the squares of the counts sum up to 1534 ± 45.
const RANDOM_SQUARES = 1690

/**
 * Whether content is as good as random, so that compressing it would be in vain: eight samples of it hold all bytes equally
 * often. Looking costs a fifth of finding out by compressing.
 */
function isRandom(content: Buffer, at: number, length: number): boolean {
  if (length < SAMPLED_FROM || length >= SAMPLED_BELOW) return false
  counts.fill(0)
  let squares = 0
  const stride = Math.floor((length - 64) / 7)
  for (let sample = 0; sample < SAMPLES; sample++) {
    const byte = content[at + (sample >> 6) * stride + (sample & 63)] as number
    const count = counts[byte] as number
    counts[byte] = count + 1
    squares += 2 * count + 1
  }
  return squares < RANDOM_SQUARES
}

/** Told of one object of a header: `idAt` is where in the header the 32 bytes of its id begin. */
export type HeaderVisitor = (
  kind: ObjectKind,
  offset: number,
  length: number,
  uncompressedLength: number | undefined,
  idAt: number,
) => void

/**
 * Tells of every object of a pack's plain header, in order. Returns the bytes that they take; `undefined` when it is no
 * header. Source: restic's design document, "Pack Format".
 */
export function visitHeader(header: Buffer, visit: HeaderVisitor): number | undefined {
  let offset = 0
  for (let at = 0; at < header.length; ) {
    const type = header[at] as number
    const isCompressed = type >= COMPRESSED
    const idAt = at + 1 + LENGTH_BYTES + (isCompressed ? LENGTH_BYTES : 0)
    if (type > 3 || idAt + ID_BYTES > header.length) return undefined
    const length = header.readUInt32LE(at + 1)
    visit(
      type % 2 === 0 ? 'data' : 'tree',
      offset,
      length,
      isCompressed ? header.readUInt32LE(at + 5) : undefined,
      idAt,
    )
    offset += length
    at = idAt + ID_BYTES
  }
  return offset
}

/** The objects of a plain header as a list. */
export function objectsOf(header: Buffer): PackedObject[] {
  const objects: PackedObject[] = []
  visitHeader(header, (kind, offset, length, uncompressedLength, idAt) => {
    objects.push({ kind, id: header.toString('hex', idAt, idAt + ID_BYTES), offset, length, uncompressedLength })
  })
  return objects
}

/** What an object takes in a pack's header. */
function headerEntryBytes({ uncompressedLength }: Pick<PackedObject, 'uncompressedLength'>): number {
  return 1 + LENGTH_BYTES + ID_BYTES + (uncompressedLength === undefined ? 0 : LENGTH_BYTES)
}

/** The size of a pack's file with these objects in it and nothing else. */
export function packSizeBytes(objects: readonly PackedObject[]): number {
  return objects.reduce((sum, object) => sum + object.length + headerEntryBytes(object), SEAL_BYTES + LENGTH_BYTES)
}

/** Reads a part of a file: as `Backend.get` does. */
export type ReadRange = (offset: number, length: number) => Promise<Buffer>

/**
 * The objects of a pack by its own header.
 * @throws {PackDamagedError}
 */
export async function readPackHeader(
  packId: ObjectId,
  sizeBytes: number,
  read: ReadRange,
  open: (sealed: Buffer) => Buffer | undefined,
): Promise<PackedObject[]> {
  const damaged = (why: string) => new PackDamagedError(packId, why)
  if (sizeBytes < SEAL_BYTES + LENGTH_BYTES) throw damaged('it is too short')
  // One read brings most headers whole.
  const guess = Math.min(sizeBytes, 16 * 1024)
  let tail = await read(sizeBytes - guess, guess)
  if (tail.length !== guess) throw damaged('it is shorter than it was')
  const headerLength = tail.readUInt32LE(guess - LENGTH_BYTES)
  if (headerLength < SEAL_BYTES || headerLength > Math.min(MAX_HEADER_BYTES, sizeBytes - LENGTH_BYTES)) {
    throw damaged('the length of its header is absurd')
  }
  if (headerLength + LENGTH_BYTES > guess) {
    const length = headerLength + LENGTH_BYTES
    tail = await read(sizeBytes - length, length)
  }
  const sealed = tail.subarray(tail.length - LENGTH_BYTES - headerLength, tail.length - LENGTH_BYTES)
  const header = open(sealed)
  if (header === undefined) throw damaged('the MAC of its header is wrong')
  return parseHeader(packId, header, sizeBytes - LENGTH_BYTES - headerLength)
}

function parseHeader(packId: ObjectId, header: Buffer, contentBytes: number): PackedObject[] {
  const filled = visitHeader(header, () => undefined)
  if (filled === undefined) throw new PackDamagedError(packId, 'its header is none')
  if (filled !== contentBytes) throw new PackDamagedError(packId, 'its objects do not fill it')
  return objectsOf(header)
}

/** Whether lengths of an object, from an index or a header, are such that memory may be taken for it. */
export function isPlausible({ kind, offset, length, uncompressedLength }: Omit<PackedObject, 'id'>): boolean {
  const limit = kind === 'data' ? MAX_DATA_BYTES : MAX_TREE_BYTES
  return (
    Number.isSafeInteger(offset) &&
    offset >= 0 &&
    Number.isSafeInteger(length) &&
    length >= SEAL_BYTES &&
    length <= limit + SEAL_BYTES &&
    (uncompressedLength === undefined || (uncompressedLength >= 0 && uncompressedLength <= limit))
  )
}

/** Reads what an index says of an object; `undefined` when it cannot be one. */
export function parseObject(raw: unknown): PackedObject | undefined {
  const { id, type, offset, length, uncompressed_length } = (raw ?? {}) as Readonly<Record<string, unknown>>
  if (!isId(id) || (type !== 'data' && type !== 'tree')) return undefined
  if (typeof offset !== 'number' || typeof length !== 'number') return undefined
  // Go leaves a zero out, so that 0 and nothing are the same.
  const size = uncompressed_length ?? 0
  if (typeof size !== 'number' || !Number.isInteger(size)) return undefined
  const object = { kind: type, id, offset, length, uncompressedLength: size === 0 ? undefined : size } as const
  return isPlausible(object) ? object : undefined
}
