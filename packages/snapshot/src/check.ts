import { createHash } from 'node:crypto'
import { type ByteString, LsyncError, printable } from '@lsync/posix'
import { type CheckInit, type CheckJob, type CheckResult, PackChecker } from './check-pack.ts'
import { eachOf } from './concurrent.ts'
import type { IndexedPack } from './index-file.ts'
import { lockForReading } from './lock.ts'
import type { Snapshot } from './model/snapshot.ts'
import type { ObjectId, TreeNode } from './model/tree.ts'
import { packSizeBytes } from './pack.ts'
import { DEFAULT_WORKERS } from './prepared-threads.ts'
import type { Repository } from './repository.ts'
import { ownMemory } from './restore.ts'
import { joinShown } from './save.ts'
import { ThreadPool } from './thread-pool.ts'
import { visitTrees } from './walk.ts'

/** Which packs are read: a part of so many, by id; or a share of them at random. */
export type ReadSubset = { readonly part: number; readonly of: number } | { readonly share: number }

export interface CheckRequest {
  /** Read every pack to the last byte, or some of them. Otherwise only what describes them is looked at. */
  readonly readData?: boolean | ReadSubset
  /** Take no lock, for a repository that cannot be written to. */
  readonly noLock?: boolean
  /** How many threads share the work, the calling one included. */
  readonly workers?: number
  readonly signal?: AbortSignal | undefined
  readonly onProgress?: (progress: { phase: string; done: number; total?: number }) => void
  readonly onProblem?: (problem: CheckProblem) => void
}

/** Something that is wrong, or could be better. */
export interface CheckProblem {
  /** An error loses something; a note does not. */
  readonly severity: 'error' | 'note'
  readonly code: string
  /** What is damaged: the id of a file of the repository or of an object. */
  readonly id: ObjectId
  /** What of a snapshot is lost by it, as one of the paths where it is. */
  readonly path: ByteString | undefined
  readonly message: string
}

export interface CheckReport {
  readonly problems: readonly CheckProblem[]
  readonly snapshots: number
  readonly trees: number
  readonly packs: number
  readonly packsRead: number
  readonly bytesRead: number
  readonly elapsedMs: number
}

/**
 * Looks whether a repository is whole: that everything a snapshot needs is in an index and in a pack of the right size, and
 * on demand that every byte is what it was. Names each thing that is damaged, and goes on.
 */
export async function checkRepository(repository: Repository, request: CheckRequest = {}): Promise<CheckReport> {
  const startMs = performance.now()
  const lock = await lockForReading(repository, request)
  const { signal } = lock
  try {
    const check = new Check(repository, request, signal)
    const report = await check.run()
    return { ...report, elapsedMs: performance.now() - startMs }
  } finally {
    await lock.release()
  }
}

class Check {
  readonly #repository: Repository
  readonly #request: CheckRequest
  readonly #signal: AbortSignal
  readonly #problems: CheckProblem[] = []
  readonly #listed = new Map<ObjectId, number>()
  readonly #indexed = new Map<ObjectId, IndexedPack>()
  /** Pieces of files that were found damaged, and the packs in which they are. */
  readonly #damaged = new Map<ObjectId, ObjectId>()

  constructor(repository: Repository, request: CheckRequest, signal: AbortSignal) {
    this.#repository = repository
    this.#request = request
    this.#signal = signal
  }

  async run(): Promise<Omit<CheckReport, 'elapsedMs'>> {
    // Snapshots before indexes, indexes before packs: what somebody adds meanwhile is then not missed.
    const snapshots = await this.#checkSnapshots()
    await this.#checkIndexes()
    for await (const { name, sizeBytes } of this.#repository.backend.list('pack', { signal: this.#signal })) {
      this.#listed.set(name, sizeBytes)
    }
    this.#checkPacks()
    const trees = await this.#checkTrees(snapshots)
    const { packsRead, bytesRead } = await this.#readPacks()
    await this.#nameDamaged(snapshots)
    const problems = [...this.#problems].sort((left, right) => (left.id < right.id ? -1 : left.id > right.id ? 1 : 0))
    return { problems, snapshots: snapshots.length, trees, packs: this.#listed.size, packsRead, bytesRead }
  }

  #report(problem: Omit<CheckProblem, 'path' | 'severity'> & Partial<CheckProblem>): void {
    const whole = { severity: 'error', path: undefined, ...problem } as const
    this.#problems.push(whole)
    this.#request.onProblem?.(whole)
  }

  /** What is thrown about one file becomes a problem; everything else ends the check. */
  #note(id: ObjectId, error: unknown, path?: ByteString): void {
    if (!(error instanceof LsyncError) || this.#signal.aborted || !OF_ONE_FILE.has(error.code)) throw error
    const place = path === undefined ? '' : ` (${printable(path)})`
    this.#report({ id, code: error.code, message: `${error.message}${place}`, path })
  }

  async #checkSnapshots(): Promise<Snapshot[]> {
    const { backend } = this.#repository
    const snapshots: Snapshot[] = []
    await eachOf(await this.#repository.listIds('snapshot', this.#signal), backend.concurrency, async (id) => {
      try {
        snapshots.push(await this.#repository.readSnapshot(id, this.#signal))
      } catch (error) {
        this.#note(id, error)
      }
    })
    return snapshots.sort((left, right) => (left.id < right.id ? -1 : 1))
  }

  async #checkIndexes(): Promise<void> {
    const { backend } = this.#repository
    await eachOf(await this.#repository.listIds('index', this.#signal), backend.concurrency, async (id) => {
      try {
        const packs = await this.#repository.readIndex(id, this.#signal)
        this.#repository.addPacks(packs)
        for (const pack of packs) {
          const known = this.#indexed.get(pack.id)
          if (known === undefined || known.objects.length < pack.objects.length) this.#indexed.set(pack.id, pack)
        }
      } catch (error) {
        this.#note(id, error)
      }
    })
  }

  #checkPacks(): void {
    for (const { id, objects } of this.#indexed.values()) {
      const sizeBytes = this.#listed.get(id)
      if (sizeBytes === undefined) {
        this.#report({ id, code: 'PACK_MISSING', message: `pack ${id.slice(0, 8)} is in an index and is not there` })
      } else if (sizeBytes !== packSizeBytes(objects)) {
        const message = `pack ${id.slice(0, 8)} has ${sizeBytes} bytes instead of ${packSizeBytes(objects)}`
        this.#report({ id, code: 'PACK_DAMAGED', message })
      }
    }
    for (const id of this.#listed.keys()) {
      if (this.#indexed.has(id)) continue
      const message = `pack ${id.slice(0, 8)} is in no index: an interrupted run left it, and prune removes it`
      this.#report({ id, severity: 'note', code: 'PACK_UNINDEXED', message })
    }
  }

  async #checkTrees(snapshots: readonly Snapshot[]): Promise<number> {
    let trees = 0
    const roots = snapshots.map(({ id, tree }) => ({ id: tree, path: `${id.slice(0, 8)}:/` as ByteString }))
    await visitTrees(
      this.#repository,
      roots,
      {
        tree: (_id, nodes, path) => {
          trees++
          this.#request.onProgress?.({ phase: 'trees', done: trees })
          for (const node of nodes) this.#checkNode(node, path)
        },
        problem: (id, path, error) => this.#note(id, error, path),
      },
      this.#signal,
    )
    return trees
  }

  #checkNode(node: TreeNode, directory: ByteString): void {
    const { content, sizeBytes } = node
    if (content === undefined) return
    let length = 0
    for (const id of content) {
      const location = this.#repository.table.locate('data', id)
      const path = joinShown(directory, node.name)
      if (location === undefined || !this.#listed.has(location.packId)) {
        const message = `a piece of ${printable(path)} (${id.slice(0, 8)}) is missing`
        this.#report({ id, code: 'OBJECT_MISSING', message, path })
        return
      }
      length += location.uncompressedLength ?? location.length - 32
    }
    if (length === sizeBytes) return
    const path = joinShown(directory, node.name)
    // A file that grew while it was read; what was read is there.
    const message = `${printable(path)} is said to have ${sizeBytes} bytes and has ${length}`
    this.#report({ id: content[0] ?? '', severity: 'note', code: 'SIZE_DIFFERS', message, path })
  }

  async #readPacks(): Promise<{ packsRead: number; bytesRead: number }> {
    const chosen = this.#choosePacks()
    let packsRead = 0
    let bytesRead = 0
    if (chosen.length === 0) return { packsRead, bytesRead }
    const init = { key: this.#repository.key }
    const pool = new ThreadPool<CheckInit, CheckJob, CheckResult>('check', init, new PackChecker(init), {
      width: this.#request.workers ?? DEFAULT_WORKERS,
      threads: this.#repository.threads,
    })
    try {
      await eachOf(chosen, Math.min(4, this.#repository.backend.concurrency), async (packId) => {
        this.#signal.throwIfAborted()
        try {
          const file = { kind: 'pack', name: packId } as const
          const content = ownMemory(await this.#repository.backend.get(file, undefined, { signal: this.#signal }))
          bytesRead += content.byteLength
          const objects = this.#indexed.get(packId)?.objects
          const job = { packId, content, ...(objects === undefined ? {} : { objects }) }
          const { why, damaged } = await pool.run(job, [content])
          for (const { kind, id } of damaged) if (kind === 'data') this.#damaged.set(id, packId)
          for (const reason of why) {
            this.#report({ id: packId, code: 'PACK_DAMAGED', message: `pack ${packId.slice(0, 8)}: ${reason}` })
          }
        } catch (error) {
          this.#note(packId, error)
        }
        packsRead++
        this.#request.onProgress?.({ phase: 'packs', done: packsRead, total: chosen.length })
      })
    } finally {
      await pool.close()
    }
    return { packsRead, bytesRead }
  }

  /** Says what damaged pieces cost. Damaged trees were met when they were read. */
  async #nameDamaged(snapshots: readonly Snapshot[]): Promise<void> {
    if (this.#damaged.size === 0) return
    const isDamaged = (id: ObjectId) => {
      const packId = this.#damaged.get(id)
      // The same piece may be whole in another pack, from which it is read.
      return packId !== undefined && this.#repository.table.locate('data', id)?.packId === packId
    }
    const roots = snapshots.map(({ id, tree }) => ({ id: tree, path: `${id.slice(0, 8)}:/` as ByteString }))
    const tree = (_: ObjectId, nodes: readonly TreeNode[], directory: ByteString) => {
      for (const { name, content } of nodes) {
        const id = content?.find(isDamaged)
        if (id === undefined) continue
        const path = joinShown(directory, name)
        const message = `a piece of ${printable(path)} (${id.slice(0, 8)}) is damaged`
        this.#report({ id, code: 'OBJECT_DAMAGED', message, path })
      }
    }
    await visitTrees(this.#repository, roots, { tree, problem: () => undefined }, this.#signal)
  }

  #choosePacks(): ObjectId[] {
    const { readData = false } = this.#request
    const ids = [...this.#listed.keys()].sort()
    if (typeof readData === 'boolean') return readData ? ids : []
    // By id, so that the parts together are everything; ids are as good as random.
    if ('of' in readData)
      return ids.filter((id) => Number.parseInt(id.slice(0, 12), 16) % readData.of === readData.part - 1)
    const salt = String(Math.random())
    const rank = (id: ObjectId) => createHash('sha256').update(salt).update(id).digest('hex')
    const count = Math.ceil(ids.length * readData.share)
    return ids.sort((left, right) => (rank(left) < rank(right) ? -1 : 1)).slice(0, count)
  }
}

const OF_ONE_FILE = new Set([
  'REPOSITORY_FILE_MISSING',
  'REPOSITORY_FILE_DAMAGED',
  'SNAPSHOT_INVALID',
  'INDEX_INVALID',
  'TREE_INVALID',
  'OBJECT_MISSING',
  'OBJECT_DAMAGED',
  'PACK_DAMAGED',
])
