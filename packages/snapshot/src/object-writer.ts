import type { ByteString, HostPath, Memory } from '@lsync/posix'
import { RepositoryLock } from './lock.ts'
import { bareDirectory, type ObjectId } from './model/tree.ts'
import { PackStore } from './pack-store.ts'
import type { Repository } from './repository.ts'
import { closeNode, openNode, Saver } from './save.ts'

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

/** Stores chunks and trees in the calling thread, for those who have them in memory. The index is loaded. */
export class ObjectWriter {
  /** What was stored so far: objects that were new, and what they take. */
  objectsAdded = 0
  addedBytes = 0
  readonly #repository: Repository
  readonly #signal: AbortSignal
  readonly #saver: Saver
  readonly #store: PackStore
  #segments: number

  constructor(repository: Repository, signal: AbortSignal) {
    const { key, compresses, config, table } = repository
    const { segments } = table
    this.#repository = repository
    this.#signal = signal
    this.#segments = segments.length
    this.#saver = new Saver({
      sources: [],
      key,
      compresses,
      polynomial: config.chunker_polynomial,
      segments,
      accounts: { users: new Map(), groups: new Map() },
      excludes: [],
      force: false,
    })
    this.#store = new PackStore(repository, { signal, onWritten: (memory) => this.#saver.recycle(memory) })
  }

  /** Stores a chunk. `hand` is due now and then. */
  addChunk(memory: Memory, at: number, length: number): ObjectId {
    return this.#saver.storeChunk(memory, at, length)
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

  /** Hands packs that are full to the backend, and waits while it has many. */
  async hand(): Promise<void> {
    const { packs, counts } = this.#saver.takeStored()
    for (const pack of packs) this.#store.add(pack)
    this.objectsAdded += counts.objectsAdded
    this.addedBytes += counts.addedBytes
    this.#repository.table.grow()
    for (const segment of this.#repository.table.segments.slice(this.#segments)) {
      this.#saver.attach(segment)
      this.#segments++
    }
    while (this.#store.isCongested) await this.#store.wait()
    this.#signal.throwIfAborted()
  }

  /** Everything is durable and indexed when it resolves. */
  async flush(): Promise<void> {
    await this.hand()
    for (const rest of this.#saver.takeRest()) this.#store.addRest(rest)
    await this.#store.flush()
  }

  async close(): Promise<void> {
    await this.#store.settle()
    this.#saver.close()
  }
}
