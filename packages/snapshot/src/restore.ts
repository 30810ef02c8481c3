import { mkdirSync } from 'node:fs'
import {
  type ByteString,
  close,
  errnoOf,
  type HostPath,
  LsyncError,
  openRoot,
  syncFileSystemAsync,
  WriteBack,
  withFd,
} from '@lsync/posix'
import { drainStack, eachOf } from './concurrent.ts'
import { lockForReading } from './lock.ts'
import { isMatched, type Pattern, parsePatterns } from './model/exclude.ts'
import type { Snapshot } from './model/snapshot.ts'
import { decodeTree, encodeNode, encodeTree, type ObjectId, type TreeNode } from './model/tree.ts'
import type { Location } from './object-table.ts'
import { DEFAULT_WORKERS } from './prepared-threads.ts'
import { ObjectMissingError, type Repository } from './repository.ts'
import {
  BATCH_BYTES,
  dropDefaultAcl,
  type FileRef,
  gather,
  isFatal,
  joined,
  LARGE_BYTES,
  type PackRange,
  type PieceRef,
  plainLength,
  type RestoreAction,
  type RestoreInit,
  type RestoreJob,
  type RestoreProblem,
  type RestoreResult,
  Restorer,
} from './restore-files.ts'
import { joinShown } from './save.ts'
import { locatePath } from './select.ts'
import { ThreadPool } from './thread-pool.ts'

export interface RestoreRequest {
  readonly snapshot: Snapshot
  /** What of it, absolute; by default the directory that was saved. */
  readonly path?: ByteString | undefined
  /** The directory that becomes it. Made if it is not there; what is in it stays, unless a name is in the snapshot. */
  readonly target: HostPath
  /** Only what these patterns match (`--exclude` of create has their form), and what lies above it. */
  readonly includes?: readonly string[]
  readonly excludes?: readonly string[]
  /** Remove what the snapshot does not have. With patterns, nothing is removed. */
  readonly delete?: boolean
  /** Change nothing; say what would be done. */
  readonly dryRun?: boolean
  /** Take existing files of the same size and mtime for the same, instead of comparing them. */
  readonly trustTimes?: boolean
  /** Take no lock, for a repository that cannot be written to. */
  readonly noLock?: boolean
  /** How many threads share the work, the calling one included. */
  readonly workers?: number
  readonly signal?: AbortSignal | undefined
  readonly onProgress?: (progress: { phase: string; done: number }) => void
  readonly onAction?: (action: RestoreAction, path: ByteString) => void
}

export interface RestoreReport {
  readonly snapshotId: ObjectId
  /** What became the target. */
  readonly path: ByteString
  readonly counts: Readonly<Record<RestoreAction, number>>
  readonly files: number
  readonly directories: number
  readonly writtenBytes: number
  /** What is missing or not as it was; by path. */
  readonly problems: readonly RestoreProblem[]
  readonly elapsedMs: number
}

/** Directories are nested deeper than any that could have been saved. */
export class TreeTooDeepError extends LsyncError {
  constructor(path: ByteString) {
    super('TREE_TOO_DEEP', `directories are nested more than ${MAX_DEPTH} deep`, {
      path,
      hint: 'restore a part of it by its path',
    })
  }
}

const LANES = 6
const MAX_DEPTH = 4096
const FINISH_BATCH = 500

/**
 * Makes a directory what a snapshot shows: names, content, owners, modes, times, attributes, devices, whiteouts, links.
 *
 * Every byte is checked against its hash before it is written. An existing file that differs is replaced by a rename,
 * never written to. It can be interrupted and repeated: what is right already stays. Nothing outside of the target is
 * touched, whatever the repository holds.
 */
export async function restoreSnapshot(repository: Repository, request: RestoreRequest): Promise<RestoreReport> {
  const startMs = performance.now()
  const lock = await lockForReading(repository, request)
  const { signal } = lock
  let targetFd = -1
  try {
    await repository.loadIndex(signal)
    const located = await locatePath(repository, request.snapshot, request.path, signal)
    const isNew = makeTarget(request)
    if (!(isNew && request.dryRun === true)) targetFd = openRoot(request.target)
    const init: RestoreInit = {
      key: repository.key,
      targetFd,
      trustsTimes: request.trustTimes === true,
      deletes: request.delete === true,
      isDryRun: request.dryRun === true,
      tellsActions: request.onAction !== undefined,
      ...repositoryOf(repository),
    }
    const pool = new ThreadPool<RestoreInit, RestoreJob, RestoreResult>('restore', init, new Restorer(init), {
      width: request.workers ?? DEFAULT_WORKERS,
      threads: repository.threads,
    })
    const writeBack = targetFd >= 0 && request.dryRun !== true ? new WriteBack(targetFd) : undefined
    try {
      const work = new RestoreWork(repository, pool, request, writeBack, signal)
      await work.run(located.path, located.node, located.tree, isNew)
      if (writeBack !== undefined) await syncFileSystemAsync(targetFd, request.target)
      const { counts, files, directories, writtenBytes } = work
      const problems = work.problems.sort((left, right) => (left.path < right.path ? -1 : 1))
      const elapsedMs = performance.now() - startMs
      const { path } = located
      return { snapshotId: request.snapshot.id, path, counts, files, directories, writtenBytes, problems, elapsedMs }
    } finally {
      await pool.close()
      await writeBack?.end()
    }
  } finally {
    if (targetFd >= 0) close(targetFd)
    await lock.release()
  }
}

/** What threads need to read packs themselves, where they can. */
function repositoryOf({ backend, table }: Repository): Pick<RestoreInit, 'repository'> {
  const { directory } = backend
  return directory === undefined ? {} : { repository: { directory, segments: table.segments, packs: table.packs } }
}

/** Whether the target was not there. */
function makeTarget({ target, dryRun }: RestoreRequest): boolean {
  try {
    if (dryRun === true) {
      close(openRoot(target))
      return false
    }
    mkdirSync(Buffer.from(target, 'latin1'), { mode: 0o700 })
    withFd(openRoot(target), (fd) => dropDefaultAcl(fd, ''))
    return true
  } catch (error) {
    if (errnoOf(error) === 'EEXIST') return false
    if (dryRun === true && errnoOf(error) === 'ENOENT') return true
    throw error
  }
}

/** A directory to be restored. */
interface Task {
  readonly path: ByteString | ''
  /** As the snapshot has it, for patterns. */
  readonly shownPath: ByteString
  readonly treeId: ObjectId
  readonly isNew: boolean
  readonly depth: number
}

class RestoreWork {
  readonly counts: Record<RestoreAction, number> = { create: 0, replace: 0, metadata: 0, remove: 0 }
  readonly problems: RestoreProblem[] = []
  files = 0
  directories = 0
  writtenBytes = 0
  readonly #repository: Repository
  readonly #pool: ThreadPool<RestoreInit, RestoreJob, RestoreResult>
  readonly #request: RestoreRequest
  readonly #writeBack: WriteBack | undefined
  readonly #signal: AbortSignal
  readonly #includes: readonly Pattern[]
  readonly #excludes: readonly Pattern[]
  readonly #tasks: Task[] = []
  /** The first name of each inode that has several. */
  readonly #firstNames = new Map<string, ByteString>()
  readonly #links: (readonly [ByteString, ByteString])[] = []
  readonly #finished: { path: ByteString | ''; node: TreeNode }[] = []

  constructor(
    repository: Repository,
    pool: ThreadPool<RestoreInit, RestoreJob, RestoreResult>,
    request: RestoreRequest,
    writeBack: WriteBack | undefined,
    signal: AbortSignal,
  ) {
    this.#repository = repository
    this.#pool = pool
    this.#request = request
    this.#writeBack = writeBack
    this.#signal = signal
    this.#includes = parsePatterns(request.includes ?? [])
    this.#excludes = parsePatterns(request.excludes ?? [])
  }

  get #hasPatterns(): boolean {
    return this.#includes.length > 0 || this.#excludes.length > 0
  }

  async run(path: ByteString, node: TreeNode | undefined, tree: ObjectId | undefined, isNew: boolean): Promise<void> {
    if (tree === undefined) {
      // One file (or link, or device): it is put into the target.
      const above = path.slice(0, Math.max(1, path.lastIndexOf('/'))) as ByteString
      const content = encodeTree([encodeNode(node as TreeNode)])
      const task = { path: '' as const, shownPath: above, treeId: `only ${path}`, isNew, depth: 0 }
      await this.#restoreNodes(task, content, [node as TreeNode], true)
    } else {
      if (node !== undefined) this.#finished.push({ path: '', node })
      this.#tasks.push({ path: '', shownPath: path, treeId: tree, isNew, depth: 0 })
      // Several directories at a time, depth first.
      await drainStack(this.#tasks, LANES, (task) => this.#restoreDirectory(task))
    }
    if (this.#request.dryRun === true) return
    await this.#inBatches(this.#links, (pairs) => ({ kind: 'links', pairs }))
    // A directory's time is set when nothing in it changes any more: those within come before it.
    this.#finished.sort((left, right) => (left.path > right.path ? -1 : 1))
    for (let at = 0; at < this.#finished.length; at += FINISH_BATCH) {
      // In order, since a directory that may not be entered any more must be the last on its path.
      await this.#do({ kind: 'finish', directories: this.#finished.slice(at, at + FINISH_BATCH) })
    }
  }

  async #inBatches<T>(items: readonly T[], jobOf: (items: readonly T[]) => RestoreJob): Promise<void> {
    const batches: T[][] = []
    for (let at = 0; at < items.length; at += FINISH_BATCH) batches.push(items.slice(at, at + FINISH_BATCH))
    await eachOf(batches, LANES, async (batch) => {
      await this.#do(jobOf(batch))
    })
  }

  async #restoreDirectory(task: Task): Promise<void> {
    this.#signal.throwIfAborted()
    if (task.depth > MAX_DEPTH) throw new TreeTooDeepError(task.path as ByteString)
    if (this.#isByThreads) return this.#handOver(task)
    await this.#restoreHere(task)
  }

  /** Whether threads can do whole directories, reading what they need: no pattern asks for anything to be read first. */
  get #isByThreads(): boolean {
    return this.#repository.backend.directory !== undefined && this.#request.dryRun !== true && !this.#hasPatterns
  }

  /** Has a thread restore a directory, and does here what it leaves. */
  async #handOver(task: Task): Promise<void> {
    const { path, treeId, isNew } = task
    const done = await this.#do({ kind: 'directory', path, treeId, isNew })
    if (done.files === undefined) return
    this.directories++
    this.files += done.files
    const lost = new Set(done.problems.map((problem) => problem.path))
    for (const { node, isNew } of done.subdirectories) {
      if (!lost.has(joined(path, node.name))) this.#addDirectory(task, node, isNew)
    }
    this.#request.onProgress?.({ phase: 'restore', done: this.files })
    if (done.left.length > 0) await this.#restoreHere(task, done.left)
  }

  #addDirectory({ path, shownPath, depth }: Task, node: TreeNode, isNew: boolean): void {
    const childPath = joined(path, node.name)
    this.#finished.push({ path: childPath, node })
    this.#tasks.push({
      path: childPath,
      shownPath: joinShown(shownPath, node.name),
      treeId: node.subtree as ObjectId,
      isNew,
      depth: depth + 1,
    })
  }

  /** Restores a directory whose content is read by this thread; with `left`, only these of its nodes. */
  async #restoreHere(task: Task, left?: readonly number[]): Promise<void> {
    let content: Buffer
    let nodes: TreeNode[]
    try {
      content = await this.#repository.readObject('tree', task.treeId, this.#signal)
      nodes = decodeTree(content)
    } catch (error) {
      this.#note(task.path, error)
      return
    }
    await this.#restoreNodes(task, content, nodes, false, left)
    if (left === undefined) this.directories++
  }

  async #restoreNodes(
    task: Task,
    tree: Buffer,
    nodes: readonly TreeNode[],
    isOnly: boolean,
    left?: readonly number[],
  ): Promise<void> {
    const positions = await this.#select(task, nodes, left)
    const { path, treeId, isNew } = task
    const keepsOthers = this.#hasPatterns || isOnly
    const prepared = await this.#do({ kind: 'prepare', path, treeId, tree, nodes: positions, isNew, keepsOthers })
    const lost = new Set(prepared.problems.map((problem) => problem.path))
    const newDirectories = new Set(prepared.newDirectories)
    for (const position of positions) {
      const node = nodes[position] as TreeNode
      if (node.type === 'file' && left === undefined) this.files++
      if (node.type !== 'dir' || lost.has(joined(path, node.name))) continue
      this.#addDirectory(task, node, newDirectories.has(position))
    }
    this.#request.onProgress?.({ phase: 'restore', done: this.files })
    if (this.#request.dryRun === true) return
    const wanted = prepared.wanted.map((position) => ({ position, node: nodes[position] as TreeNode }))
    await this.#writeFiles({ path, treeId, tree, isNew }, wanted)
  }

  /** Positions of the nodes to be restored; further names of an inode are put aside. */
  async #select(task: Task, nodes: readonly TreeNode[], among: Iterable<number> = nodes.keys()): Promise<number[]> {
    const positions: number[] = []
    for (const position of among) {
      const node = nodes[position] as TreeNode
      const shownPath = joinShown(task.shownPath, node.name)
      if (!(await this.#isSelected(node, shownPath))) continue
      if (node.links > 1 && node.type !== 'dir') {
        const key = `${node.deviceId}:${node.inode}`
        const path = joined(task.path, node.name)
        const first = this.#firstNames.get(key)
        if (first !== undefined) {
          this.#links.push([first, path])
          continue
        }
        this.#firstNames.set(key, path)
      }
      positions.push(position)
    }
    return positions
  }

  async #isSelected(node: TreeNode, shownPath: ByteString): Promise<boolean> {
    if (isMatched(this.#excludes, shownPath)) return false
    if (this.#includes.length === 0 || isMatched(this.#includes, shownPath)) return true
    return node.subtree !== undefined && (await this.#holdsSelected(node.subtree, shownPath, 0))
  }

  /** Whether something beneath a directory is included, so that the directory has to be there. */
  async #holdsSelected(tree: ObjectId, shownPath: ByteString, depth: number): Promise<boolean> {
    if (depth > MAX_DEPTH) throw new TreeTooDeepError(shownPath)
    for (const node of await this.#repository.readTree(tree, this.#signal)) {
      const path = joinShown(shownPath, node.name)
      if (isMatched(this.#excludes, path)) continue
      if (isMatched(this.#includes, path)) return true
      if (node.subtree !== undefined && (await this.#holdsSelected(node.subtree, path, depth + 1))) return true
    }
    return false
  }

  async #writeFiles(
    directory: Pick<Extract<RestoreJob, { kind: 'files' }>, 'path' | 'treeId' | 'tree' | 'isNew'>,
    wanted: readonly { readonly position: number; readonly node: TreeNode }[],
  ): Promise<void> {
    let batch: { position: number; locations: Location[] }[] = []
    let batchBytes = 0
    const flush = async () => {
      const files = batch
      batch = []
      batchBytes = 0
      if (files.length > 0) await this.#writeBatch(directory, files)
    }
    for (const { position, node } of wanted) {
      const path = joined(directory.path, node.name)
      let locations: Location[]
      try {
        locations = (node.content ?? []).map((id) => this.#locate(id))
      } catch (error) {
        this.#note(path, error)
        continue
      }
      const size = locations.reduce((sum, location) => sum + location.length, 0)
      const plainSize = locations.reduce((sum, location) => sum + plainLength(location), 0)
      if (plainSize > LARGE_BYTES) {
        await this.#writeLarge(directory, position, node, locations, plainSize)
        continue
      }
      if (batchBytes + size > BATCH_BYTES) await flush()
      batch.push({ position, locations })
      batchBytes += size
    }
    await flush()
  }

  #locate(id: ObjectId): Location {
    const location = this.#repository.table.locate('data', id)
    if (location === undefined) throw new ObjectMissingError('data', id)
    return location
  }

  async #writeBatch(
    directory: Pick<Extract<RestoreJob, { kind: 'files' }>, 'path' | 'treeId' | 'tree' | 'isNew'>,
    files: readonly { readonly position: number; readonly locations: readonly Location[] }[],
  ): Promise<void> {
    try {
      const { ranges, refs } = await this.#read(files.flatMap(({ locations }) => locations))
      let at = 0
      const list = files.map(({ position, locations }): FileRef => {
        at += locations.length
        return { node: position, pieces: refs.slice(at - locations.length, at) }
      })
      await this.#do({ kind: 'files', ...directory, files: list, ranges }, ranges)
    } catch (error) {
      // What one pack lacks is not to cost its neighbours: each file alone.
      if (files.length > 1 && isOfRepository(error)) {
        for (const file of files) await this.#writeBatch(directory, [file])
      } else {
        const nodes = decodeTree(Buffer.from(directory.tree))
        const node = nodes[files[0]?.position ?? 0] as TreeNode
        this.#note(joined(directory.path, node.name), error)
      }
    }
  }

  /** A file that is larger than a job may be: written piece by piece under another name. */
  async #writeLarge(
    directory: Pick<Extract<RestoreJob, { kind: 'files' }>, 'path' | 'treeId' | 'tree'>,
    position: number,
    node: TreeNode,
    locations: readonly Location[],
    sizeBytes: number,
  ): Promise<void> {
    const { path, treeId, tree } = directory
    const { temporary } = await this.#do({ kind: 'begin', path, sizeBytes })
    if (temporary === undefined) throw new Error('a file was begun without a name')
    try {
      const parts: { locations: Location[]; offsets: number[]; bytes: number }[] = []
      let offset = 0
      for (const location of locations) {
        let part = parts.at(-1)
        if (part === undefined || part.bytes + location.length > BATCH_BYTES) {
          part = { locations: [], offsets: [], bytes: 0 }
          parts.push(part)
        }
        part.locations.push(location)
        part.offsets.push(offset)
        part.bytes += location.length
        offset += plainLength(location)
      }
      await eachOf(parts, 3, async ({ locations, offsets }) => {
        const { ranges, refs } = await this.#read(locations)
        const ids = locations.map(({ id }) => id)
        await this.#do({ kind: 'pieces', path, temporary, ids, offsets, pieces: refs, ranges }, ranges)
      })
      await this.#do({ kind: 'end', path, treeId, tree, nodes: [position], temporary })
    } catch (error) {
      await this.#do({ kind: 'drop', path, temporary })
      this.#note(joined(path, node.name), error)
    }
  }

  /** Reads the sealed bytes of objects, neighbours together. */
  async #read(locations: readonly Location[]): Promise<{ ranges: PackRange[]; refs: readonly PieceRef[] }> {
    const { spans, refs } = gather(locations)
    const ranges = await Promise.all(
      spans.map(async ({ packId, offset, length }): Promise<PackRange> => {
        const file = { kind: 'pack', name: packId } as const
        const content = await this.#repository.backend.get(file, { offset, length }, { signal: this.#signal })
        return { packId, offset, content: ownMemory(content) }
      }),
    )
    return { ranges, refs }
  }

  async #do(job: RestoreJob, ranges: readonly PackRange[] = []): Promise<RestoreResult> {
    const result = await this.#pool.run(
      job,
      ranges.map(({ content }) => content),
    )
    this.problems.push(...result.problems)
    const fatal = result.problems.find(({ code }) => isFatal(code))
    if (fatal !== undefined) throw new LsyncError(fatal.code, fatal.message, { path: fatal.path })
    for (const [action, count] of Object.entries(result.counts)) this.counts[action as RestoreAction] += count
    for (const [action, path] of result.actions) this.#request.onAction?.(action, path)
    this.writtenBytes += result.writtenBytes
    this.#writeBack?.wrote(result.writtenBytes, result.counts.create + result.counts.replace)
    return result
  }

  /** A problem of one name; whatever is no problem of the repository or of one name ends the run. */
  #note(path: ByteString | '', error: unknown): void {
    if (this.#signal.aborted) throw this.#signal.reason
    if (!(error instanceof LsyncError) || isFatal(error.code)) throw error
    this.problems.push({ path: path as ByteString, code: error.code, message: error.message })
  }
}

/** An error about files of the repository, as opposed to the target or the connection. */
function isOfRepository(error: unknown): boolean {
  const code = error instanceof LsyncError ? error.code : ''
  return code === 'REPOSITORY_FILE_MISSING' || code === 'OBJECT_DAMAGED' || code === 'OBJECT_MISSING'
}

/** The memory of a buffer that nothing else shares, to be given away. */
export function ownMemory(buffer: Buffer): ArrayBuffer {
  if (buffer.byteOffset === 0 && buffer.buffer.byteLength === buffer.length) return buffer.buffer as ArrayBuffer
  return Uint8Array.from(buffer).buffer
}
