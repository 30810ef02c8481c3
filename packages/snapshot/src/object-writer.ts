import type { ByteString, HostPath, Memory } from '@lsync/posix'
import { MAX_CHUNK_BYTES } from './chunk/chunker.ts'
import { ChunkStorer, type StoreJob, type StoreResult } from './chunk-storer.ts'
import { RepositoryLock } from './lock.ts'
import { bareDirectory, type ObjectId } from './model/tree.ts'
import { PackStore } from './pack-store.ts'
import { DEFAULT_WORKERS } from './prepared-threads.ts'
import type { Repository } from './repository.ts'
import { closeNode, openNode, type SaveInit, Saver } from './save.ts'
import { ThreadPool } from './thread-pool.ts'

// One at work in each of two threads, one that waits for the other, and one that waits for this one.
const MOST_JOBS = 4

/**
 * Stores what `use` makes, in this thread, in a repository that is locked meanwhile and whose index is loaded. The lock's
 * signal ends it.
 * @throws {RepositoryLockedError} and what `use` and the backend throw
 */
export async function withObjectWriter<T>(
  repository: Repository,
  options: Parameters<typeof RepositoryLock.acquire>[1],
  use: (writer: ObjectWriter, lock: RepositoryLock) => Promise<T>,
): Promise<T> {
  const lock = await RepositoryLock.acquire(repository, options)
  try {
    await repository.loadIndex(lock.signal)
    const writer = new ObjectWriter(repository, lock.signal)
    try {
      return await use(writer, lock)
    } finally {
      await writer.close()
    }
  } catch (error) {
    // Objects that were noted and did not get into the repository must not be taken for stored.
    repository.resetIndex()
    throw error
  } finally {
    await lock.release()
  }
}

/** Chunks that are stored together, by whatever thread has time. */
interface Batch {
  readonly content: SharedArrayBuffer
  readonly lengths: number[]
  usedBytes: number
  readonly ids: PromiseWithResolvers<ObjectId>[]
}

/**
 * Stores chunks and trees for those who have them in memory, in the calling thread; chunks that need not be there at once in
 * others as well. The index is loaded.
 */
export class ObjectWriter {
  /** What was stored so far: objects that were new, and what they take. */
  objectsAdded = 0
  addedBytes = 0
  readonly #repository: Repository
  readonly #signal: AbortSignal
  readonly #init: SaveInit
  readonly #saver: Saver
  readonly #own: ChunkStorer
  readonly #store: PackStore
  #pool: ThreadPool<SaveInit, StoreJob, StoreResult> | undefined
  #batch: Batch | undefined
  readonly #jobs = new Set<Promise<void>>()
  /** Memory of packs that were written, and of batches that were stored. */
  readonly #spares: ArrayBufferLike[] = []
  readonly #contents: SharedArrayBuffer[] = []
  #failure: { readonly error: unknown } | undefined

  constructor(repository: Repository, signal: AbortSignal) {
    const { key, compresses, config, table } = repository
    const { segments } = table
    this.#repository = repository
    this.#signal = signal
    this.#init = {
      sources: [],
      key,
      compresses,
      polynomial: config.chunker_polynomial,
      segments,
      accounts: { users: new Map(), groups: new Map() },
      excludes: [],
      force: false,
    }
    this.#saver = new Saver(this.#init)
    this.#own = new ChunkStorer(this.#saver, segments.length)
    this.#store = new PackStore(repository, { signal, onWritten: (memory) => this.#recycle(memory) })
  }

  /** Stores a chunk. `hand` is due now and then. */
  addChunk(memory: Memory, at: number, length: number): ObjectId {
    return this.#saver.storeChunk(memory, at, length)
  }

  /** Stores a copy of a chunk in whatever thread has time, by and by, or when `sendChunks` is called. `hand` is due now and then. */
  addChunkSoon({ buffer }: Memory, at: number, length: number): Promise<ObjectId> {
    if (this.#batch !== undefined && this.#batch.usedBytes + length > MAX_CHUNK_BYTES) this.sendChunks()
    this.#batch ??= {
      content: this.#contents.pop() ?? new SharedArrayBuffer(MAX_CHUNK_BYTES),
      lengths: [],
      usedBytes: 0,
      ids: [],
    }
    const batch = this.#batch
    new Uint8Array(batch.content, batch.usedBytes, length).set(buffer.subarray(at, at + length))
    batch.usedBytes += length
    batch.lengths.push(length)
    const id = Promise.withResolvers<ObjectId>()
    // Who gave a file up does not ask for its chunks any more.
    id.promise.catch(() => undefined)
    batch.ids.push(id)
    return id.promise
  }

  /** Has those chunks stored that wait for others. */
  sendChunks(): void {
    const batch = this.#batch
    if (batch === undefined) return
    this.#batch = undefined
    const { threads, table } = this.#repository
    this.#pool ??= new ThreadPool('store', { ...this.#init, segments: table.segments }, this.#own, {
      width: DEFAULT_WORKERS,
      threads,
    })
    const { content, lengths, ids } = batch
    const { segments } = table
    const job = this.#pool.run({ kind: 'chunks', content, lengths, segments, spare: this.#spares.pop() }).then(
      (result) => {
        this.#take(result)
        this.#contents.push(content)
        for (const [i, id] of ids.entries()) id.resolve(result.ids[i] as ObjectId)
      },
      (error: unknown) => {
        this.#failure ??= { error }
        for (const id of ids) id.reject(error)
      },
    )
    const ended = job.finally(() => this.#jobs.delete(ended))
    this.#jobs.add(ended)
  }

  /** Stores a tree of encoded nodes, in order of their names. */
  async addTree(nodes: readonly string[]): Promise<ObjectId> {
    const id = this.#saver.storeTree(nodes)
    await this.hand()
    return id
  }

  /** Stores the tree of a snapshot that shows a directory, of which this is the open node and the tree, at a path. */
  async addAbove(path: HostPath, node: string, tree: ObjectId): Promise<ObjectId> {
    const names = path.split('/').filter((name) => name !== '') as ByteString[]
    const nodes = names.map((name, i) => (i === names.length - 1 ? node : openNode(bareDirectory(name))))
    let top = tree
    for (const open of nodes.reverse()) top = await this.addTree([closeNode(open, top)])
    return top
  }

  /** Hands packs that are full to the backend, and waits while it, or the threads, have many. */
  async hand(): Promise<void> {
    this.#take(this.#saver.takeStored())
    this.#repository.table.grow()
    this.#own.attach(this.#repository.table.segments)
    while (this.#jobs.size >= MOST_JOBS) await Promise.race(this.#jobs)
    while (this.#store.isCongested) await this.#store.wait()
    if (this.#failure !== undefined) throw this.#failure.error
    this.#signal.throwIfAborted()
  }

  /** Everything is durable and indexed when it resolves. */
  async flush(): Promise<void> {
    this.sendChunks()
    await Promise.all(this.#jobs)
    await this.hand()
    for (const result of (await this.#pool?.runEach({ kind: 'rest' })) ?? []) {
      this.#take(result)
      for (const rest of result.rests) this.#store.addRest(rest)
    }
    for (const rest of this.#saver.takeRest()) this.#store.addRest(rest)
    await this.#store.flush()
  }

  async close(): Promise<void> {
    await Promise.all(this.#jobs)
    await this.#store.settle()
    if (this.#pool === undefined) this.#own.close()
    else await this.#pool.close()
  }

  #take({ packs, counts }: Pick<StoreResult, 'packs' | 'counts'>): void {
    for (const pack of packs) this.#store.add(pack)
    this.objectsAdded += counts.objectsAdded
    this.addedBytes += counts.addedBytes
  }

  #recycle(memory: ArrayBufferLike): void {
    if (this.#pool === undefined) this.#saver.recycle(memory)
    // What is not shared is small, and no use to a thread that fills packs.
    else if (memory instanceof SharedArrayBuffer) this.#spares.push(memory)
  }
}
