import { type IndexRows, ROW_WORDS } from './index-file.ts'
import type { ObjectId } from './model/tree.ts'
import { type ObjectKind, type PackedObject, visitHeader } from './pack.ts'

/** Where an object lies. */
export interface Location extends PackedObject {
  readonly packId: ObjectId
}

/** A table as it travels to a worker: the memory is shared. */
export type TableSegment = SharedArrayBuffer

// A segment: count, capacity, then slots (entry number + 1, twice as many as entries), then entries.
const HEAD_WORDS = 2
const COUNT = 0
const CAPACITY = 1
// An entry: 8 words of id, kind, pack number + 1 (0: not in a pack yet), offset, length, uncompressed length + 1 (0: none).
const ENTRY_WORDS = 13
const KIND = 8
const PACK = 9
const OFFSET = 10
const LENGTH = 11
const UNCOMPRESSED = 12
const FIRST_CAPACITY = 1 << 14
const ID_BYTES = 32

const KINDS = { data: 0, tree: 1 } as const

class Segment {
  readonly buffer: TableSegment
  readonly #words: Int32Array
  readonly #mask: number
  readonly #slots = HEAD_WORDS
  readonly #entries: number

  constructor(buffer: TableSegment) {
    this.buffer = buffer
    this.#words = new Int32Array(buffer)
    this.#mask = this.capacity * 2 - 1
    this.#entries = HEAD_WORDS + this.capacity * 2
  }

  static ofCapacity(capacity: number): Segment {
    const buffer = new SharedArrayBuffer((HEAD_WORDS + capacity * (2 + ENTRY_WORDS)) * 4)
    new Int32Array(buffer)[CAPACITY] = capacity
    return new Segment(buffer)
  }

  get capacity(): number {
    return this.#words[CAPACITY] as number
  }

  get count(): number {
    return Math.min(Atomics.load(this.#words, COUNT), this.capacity)
  }

  /** The place of an entry's words, or -1. */
  find(id: Int32Array, kind: number): number {
    const words = this.#words
    for (let slot = startOf(id, kind) & this.#mask; ; slot = (slot + 1) & this.#mask) {
      const number = Atomics.load(words, this.#slots + slot)
      if (number === 0) return -1
      const at = this.#entries + (number - 1) * ENTRY_WORDS
      if (this.#holds(at, id, kind)) return at
    }
  }

  /** The place of a new entry, or -1 when the id is there or the segment is full. Any thread, at any time. */
  insert(id: Int32Array, kind: number): number {
    const words = this.#words
    const number = Atomics.add(words, COUNT, 1)
    if (number >= this.capacity) return -1
    const at = this.#entries + number * ENTRY_WORDS
    words.set(id, at)
    words[at + KIND] = kind
    for (let slot = startOf(id, kind) & this.#mask; ; ) {
      // The exchange publishes the entry, so its words are written before.
      const found = Atomics.compareExchange(words, this.#slots + slot, 0, number + 1)
      if (found === 0) return at
      if (this.#holds(this.#entries + (found - 1) * ENTRY_WORDS, id, kind)) return -1
      slot = (slot + 1) & this.#mask
    }
  }

  word(at: number): number {
    return this.#words[at] as number
  }

  writePlace(at: number, packNumber: number, offset: number, length: number, uncompressedLength?: number): void {
    const words = this.#words
    words[at + OFFSET] = offset
    words[at + LENGTH] = length
    words[at + UNCOMPRESSED] = uncompressedLength === undefined ? 0 : uncompressedLength + 1
    words[at + PACK] = packNumber + 1
  }

  #holds(at: number, id: Int32Array, kind: number): boolean {
    const words = this.#words
    for (let i = 0; i < KIND; i++) if (words[at + i] !== id[i]) return false
    return words[at + KIND] === kind
  }
}

function startOf(id: Int32Array, kind: number): number {
  return (id[0] as number) ^ (kind * 0x9e3779b9)
}

/** An id as the table compares it: eight words. The result is overwritten by the next call. */
const scratch = Buffer.from(new ArrayBuffer(ID_BYTES))
const scratchWords = new Int32Array(scratch.buffer)

function wordsOf(id: ObjectId): Int32Array {
  scratch.write(id, 'hex')
  return scratchWords
}

/**
 * Every object that is known, in memory that all threads share: 60 bytes each. Threads look up and add without a lock; two
 * that add the same object at the same time into a table that grows may both be told that it is new, which costs a
 * second copy and nothing else.
 */
export class ObjectTable {
  #segments: Segment[]
  readonly #packs: ObjectId[]

  /** A table of what another thread has in its `segments`; with its `packs`, `locate` can be used, too. */
  constructor(segments?: readonly TableSegment[], packs: readonly ObjectId[] = []) {
    this.#segments =
      segments === undefined ? [Segment.ofCapacity(FIRST_CAPACITY)] : segments.map((buffer) => new Segment(buffer))
    this.#packs = [...packs]
  }

  /** For another thread's table: the memory is shared. */
  get segments(): readonly TableSegment[] {
    return this.#segments.map(({ buffer }) => buffer)
  }

  /** The packs by their numbers, as they are now. */
  get packs(): readonly ObjectId[] {
    return this.#packs
  }

  /** An upper bound: an object that was added twice at once counts twice. */
  get size(): number {
    return this.#segments.reduce((sum, segment) => sum + segment.count, 0)
  }

  /** Makes room for more once the last segment is half full. Other threads are to `attach` the segment that is new then. */
  grow(): void {
    const last = this.#segments.at(-1) as Segment
    if (last.count >= last.capacity / 2) this.#segments.push(Segment.ofCapacity(last.capacity * 2))
  }

  /** A segment that another thread's `grow` made. */
  attach(buffer: TableSegment): void {
    this.#segments.push(new Segment(buffer))
  }

  has(kind: ObjectKind, id: ObjectId): boolean {
    return this.hasWords(kind, wordsOf(id))
  }

  /** As `has`, of an id that lies in memory as words. */
  hasWords(kind: ObjectKind, id: Int32Array): boolean {
    return this.#segments.some((segment) => segment.find(id, KINDS[kind]) >= 0)
  }

  /** Whether the caller is the first to have this object, and so the one to store it. */
  claim(kind: ObjectKind, id: ObjectId): boolean {
    return this.claimWords(kind, wordsOf(id))
  }

  claimWords(kind: ObjectKind, id: Int32Array): boolean {
    if (this.hasWords(kind, id)) return false
    const last = this.#segments.at(-1) as Segment
    // In a full segment nothing can be noted: then the object may be stored more than once.
    return last.insert(id, KINDS[kind]) >= 0 || last.count >= last.capacity
  }

  /** Adds an object with its place; the first place stays. For the thread that owns the table. */
  add(packNumber: number, object: PackedObject): boolean {
    const { kind, offset, length, uncompressedLength } = object
    return this.#add(packNumber, KINDS[kind], wordsOf(object.id), offset, length, uncompressedLength)
  }

  /** Adds all objects of a pack's plain header. */
  addHeader(packNumber: number, header: Buffer): void {
    visitHeader(header, (kind, offset, length, uncompressedLength, idAt) => {
      header.copy(scratch, 0, idAt, idAt + ID_BYTES)
      this.#add(packNumber, KINDS[kind], scratchWords, offset, length, uncompressedLength)
    })
  }

  /** Adds all objects of an index. */
  addRows({ packs, words }: IndexRows): void {
    let row = 0
    for (const { id, objects } of packs) {
      const packNumber = this.addPack(id)
      for (const end = row + objects * ROW_WORDS; row < end; row += ROW_WORDS) {
        for (let i = 0; i < KIND; i++) scratchWords[i] = words[row + i] as number
        const size = words[row + 11] as number
        this.#add(
          packNumber,
          words[row + 8] as number,
          scratchWords,
          words[row + 9] as number,
          words[row + 10] as number,
          size < 0 ? undefined : size,
        )
      }
    }
  }

  /** Makes room for so many objects at once, in a table that has none and that no other thread knows yet. */
  reserve(objects: number): void {
    let capacity = FIRST_CAPACITY
    while (capacity < objects * 2) capacity *= 2
    if (capacity > FIRST_CAPACITY && this.size === 0) this.#segments = [Segment.ofCapacity(capacity)]
  }

  #add(
    packNumber: number,
    kind: number,
    id: Int32Array,
    offset: number,
    length: number,
    uncompressedLength: number | undefined,
  ): boolean {
    for (const segment of this.#segments) {
      const at = segment.find(id, kind)
      if (at < 0) continue
      if (segment.word(at + PACK) !== 0) return false
      segment.writePlace(at, packNumber, offset, length, uncompressedLength)
      return true
    }
    this.grow()
    const last = this.#segments.at(-1) as Segment
    last.writePlace(last.insert(id, kind), packNumber, offset, length, uncompressedLength)
    return true
  }

  /** The number of a pack for `add`. */
  addPack(packId: ObjectId): number {
    return this.#packs.push(packId) - 1
  }

  /** Where an object lies; `undefined` when it is not known or not stored yet. */
  locate(kind: ObjectKind, id: ObjectId): Location | undefined {
    const words = wordsOf(id)
    for (const segment of this.#segments) {
      const at = segment.find(words, KINDS[kind])
      if (at < 0) continue
      const packId = this.#packs[segment.word(at + PACK) - 1]
      if (packId === undefined) return undefined
      const size = segment.word(at + UNCOMPRESSED)
      return {
        kind,
        id,
        packId,
        offset: segment.word(at + OFFSET) >>> 0,
        length: segment.word(at + LENGTH) >>> 0,
        uncompressedLength: size === 0 ? undefined : size - 1,
      }
    }
    return undefined
  }
}
