import { allocate, type Memory } from '@lsync/posix'
import { Chunker, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES } from './chunk/chunker.ts'
import type { Polynomial } from './chunk/polynomial.ts'
import type { ObjectId } from './model/tree.ts'
import type { ObjectWriter } from './object-writer.ts'

const ZEROS = Buffer.alloc(256 * 1024)
/** Of a file, what lies beyond this is stored by all threads: to start one takes as long as to store some megabytes. */
const OWN_BYTES = 64 * 1024 * 1024

/** Cuts the content of files into chunks as it comes, one file after the other, and stores them. */
export class ChunkStream {
  readonly #writer: ObjectWriter
  readonly #polynomial: Polynomial
  /** What is too short to be cut: most files need no chunker, which takes 16 MiB. */
  #small: Memory = allocate(64 * 1024)
  #chunker: Chunker | undefined
  /** Where the next byte goes: in the chunker's memory, once there is one. */
  #filled = 0
  #ids: (ObjectId | Promise<ObjectId>)[] = []
  #cutBytes = 0

  constructor(writer: ObjectWriter, polynomial: Polynomial) {
    this.#writer = writer
    this.#polynomial = polynomial
  }

  async add(bytes: Uint8Array): Promise<void> {
    if (this.#chunker === undefined && this.#filled + bytes.length < MIN_CHUNK_BYTES) {
      this.#addSmall(bytes)
      return
    }
    this.#chunker ??= this.#beginCutting()
    const { memory, end } = this.#chunker
    for (let at = 0; at < bytes.length; ) {
      const count = Math.min(bytes.length - at, end - this.#filled)
      memory.buffer.set(bytes.subarray(at, at + count), this.#filled)
      this.#filled += count
      at += count
      if (this.#filled === end) {
        this.#cut(this.#chunker, false)
        await this.#writer.hand()
      }
    }
  }

  async addZeros(count: number): Promise<void> {
    for (let left = count; left > 0; left -= ZEROS.length) {
      await this.add(left < ZEROS.length ? ZEROS.subarray(0, left) : ZEROS)
    }
  }

  /** Ends a file. Returns its chunks; the next byte is that of another file. */
  async finish(): Promise<readonly ObjectId[]> {
    if (this.#chunker !== undefined) this.#cut(this.#chunker, true)
    else if (this.#filled > 0) {
      this.#take(this.#small, 0, this.#filled)
      this.#filled = 0
    }
    const ids = this.#ids
    this.#ids = []
    if (this.#cutBytes > OWN_BYTES) this.#writer.sendChunks()
    this.#cutBytes = 0
    await this.#writer.hand()
    return Promise.all(ids)
  }

  #addSmall(bytes: Uint8Array): void {
    if (this.#small.buffer.length < this.#filled + bytes.length) {
      const larger = allocate(MIN_CHUNK_BYTES)
      this.#small.buffer.copy(larger.buffer, 0, 0, this.#filled)
      this.#small = larger
    }
    this.#small.buffer.set(bytes, this.#filled)
    this.#filled += bytes.length
  }

  #beginCutting(): Chunker {
    const chunker = new Chunker(this.#polynomial, 2 * MAX_CHUNK_BYTES)
    chunker.memory.buffer.set(this.#small.buffer.subarray(0, this.#filled), chunker.start)
    this.#filled += chunker.start
    return chunker
  }

  #cut(chunker: Chunker, isLast: boolean): void {
    const { memory } = chunker
    this.#filled = chunker.takeChunks(this.#filled, isLast, (at, length) => this.#take(memory, at, length))
  }

  #take(memory: Memory, at: number, length: number): void {
    this.#cutBytes += length
    const isOwn = this.#cutBytes <= OWN_BYTES
    this.#ids.push(isOwn ? this.#writer.addChunk(memory, at, length) : this.#writer.addChunkSoon(memory, at, length))
  }
}
