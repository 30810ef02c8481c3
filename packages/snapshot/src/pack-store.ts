import { INDEX_OBJECTS, type IndexedPack, indexOfTexts, packText } from './index-file.ts'
import type { ObjectId } from './model/tree.ts'
import { type ObjectKind, objectsOf, type Pack, type PackedObject, PackWriter } from './pack.ts'
import type { Repository } from './repository.ts'
import type { SealedRest } from './save.ts'

const INDEX_AFTER_MS = 5 * 60_000
/** A disk of this machine is busy with so many packs, and each of them takes 18 MB until it is written. */
const PACKS_TO_DISK = 2

/** Writes packs and the indexes that name them, several at a time. A pack is durable before an index names it. */
export class PackStore {
  readonly #repository: Repository
  readonly #signal: AbortSignal | undefined
  readonly #writesIndex: boolean
  readonly #mostPacks: number
  readonly #onWritten: ((memory: ArrayBufferLike) => void) | undefined
  readonly #running = new Set<Promise<void>>()
  readonly #writers: Readonly<Record<ObjectKind, PackWriter>>
  #failure: unknown
  #failed = false
  #stored: { readonly id: ObjectId; readonly header: Buffer }[] = []
  /** What the next index has of them: made pack by pack, while others are filled. */
  #texts: Buffer[] = []
  #storedObjects = 0
  #indexedMs = performance.now()
  #listeners: (() => void)[] = []

  constructor(
    repository: Repository,
    options: {
      readonly signal?: AbortSignal | undefined
      readonly writesIndex?: boolean
      /** Told of the memory of each pack that has been written. */
      readonly onWritten?: (memory: ArrayBufferLike) => void
    } = {},
  ) {
    this.#repository = repository
    this.#signal = options.signal
    this.#writesIndex = options.writesIndex ?? true
    this.#onWritten = options.onWritten
    const { engine, compresses, backend } = repository
    const isOwnDisk = backend.directory !== undefined && backend.settleMs === 0
    this.#mostPacks = isOwnDisk ? Math.min(PACKS_TO_DISK, backend.concurrency) : backend.concurrency
    this.#writers = {
      data: new PackWriter('data', engine, { compresses }),
      tree: new PackWriter('tree', engine, { compresses }),
    }
  }

  /** Whether no more packs should come for the moment: those in memory are many already. */
  get isCongested(): boolean {
    return this.#running.size >= this.#mostPacks
  }

  /** Resolves when a pack has been written. At once when none is under way. */
  async wait(): Promise<void> {
    if (this.#running.size > 0) await new Promise<void>((resolve) => this.#listeners.push(resolve))
    this.#throwFailure()
  }

  /** Begins to write a pack. */
  add(pack: Pack): void {
    const job: Promise<void> = this.#write(pack).then(
      () => this.#ended(job),
      (error: unknown) => {
        if (!this.#failed) this.#failure = error
        this.#failed = true
        this.#ended(job)
      },
    )
    this.#running.add(job)
  }

  /** Adds an object that is sealed already, to a pack of this store's own. */
  addSealed(object: PackedObject, sealed: Uint8Array): void {
    const writer = this.#writers[object.kind]
    writer.addSealed(object, sealed)
    if (writer.isFull) this.add(writer.finish())
  }

  /** Adds what did not fill a pack of another writer. */
  addRest({ content, objects }: SealedRest): void {
    for (const object of objects) this.addSealed(object, content.subarray(object.offset, object.offset + object.length))
  }

  /**
   * Writes what waits, and the indexes of all: when it resolves, every object that was added is durable and indexed. With
   * `writesIndex` false, the packs that the caller is to index are given back instead.
   */
  async flush(): Promise<readonly IndexedPack[]> {
    for (const writer of Object.values(this.#writers)) if (writer.sizeBytes > 0) this.add(writer.finish())
    await Promise.all(this.#running)
    this.#throwFailure()
    if (!this.#writesIndex) return this.#stored.map(({ id, header }) => ({ id, objects: objectsOf(header) }))
    await this.#writeIndex()
    return []
  }

  /** Waits for what is under way, whatever came of it. */
  async settle(): Promise<void> {
    await Promise.allSettled(this.#running)
  }

  async #write({ id, content, header: { buffer, byteOffset, byteLength } }: Pack): Promise<void> {
    await this.#repository.backend.put({ kind: 'pack', name: id }, content, { signal: this.#signal })
    this.#onWritten?.(content.buffer)
    // Of a pack that comes from another thread it is a plain array.
    const header = Buffer.from(buffer, byteOffset, byteLength)
    this.#stored.push({ id, header })
    if (this.#writesIndex) this.#texts.push(packText(id, header))
    // The shortest entry has 37 bytes, the longest 41.
    this.#storedObjects += header.length / 37
    const isDue = this.#storedObjects >= INDEX_OBJECTS || performance.now() - this.#indexedMs > INDEX_AFTER_MS
    if (isDue && this.#writesIndex) await this.#writeIndex()
  }

  async #writeIndex(): Promise<ObjectId | undefined> {
    const [packs, texts] = [this.#stored, this.#texts]
    if (packs.length === 0) return undefined
    this.#stored = []
    this.#texts = []
    this.#storedObjects = 0
    this.#indexedMs = performance.now()
    const id = await this.#repository.writeFile('index', indexOfTexts(texts), this.#signal)
    this.#repository.addIndexOfHeaders(id, packs)
    return id
  }

  #ended(job: Promise<void>): void {
    this.#running.delete(job)
    const listeners = this.#listeners
    this.#listeners = []
    for (const listener of listeners) listener()
  }

  #throwFailure(): void {
    if (this.#failed) throw this.#failure
  }
}
