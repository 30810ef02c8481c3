import { readFileSync } from 'node:fs'
import { hostname } from 'node:os'
import { closeStack, openStack, type StackRequest, stackInit } from '@lsync/overlay-merge'
import {
  type ByteString,
  close,
  errnoOf,
  type HostPath,
  LsyncError,
  openRoot,
  printable,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import { userName } from './key-file.ts'
import { RepositoryLock } from './lock.ts'
import { type Accounts, parseAccounts } from './model/accounts.ts'
import { type ChangeNode, changeTreeOf, type SourceChange } from './model/changes.ts'
import { parsePatterns } from './model/exclude.ts'
import { formatTime, parseTime } from './model/go-text.ts'
import type { Snapshot } from './model/snapshot.ts'
import { bareDirectory, encodeNode, type ObjectId, type TreeNode } from './model/tree.ts'
import { PackStore } from './pack-store.ts'
import { DEFAULT_WORKERS } from './prepared-threads.ts'
import type { Repository } from './repository.ts'
import {
  ATTEMPTS,
  closeNode,
  emptyCounts,
  FileChangingError,
  joinShown,
  type LargeFile,
  type LargeName,
  openNode,
  type PartTask,
  type SaveCounts,
  type SavedDirectory,
  type SavedPart,
  type SaveProblem,
  type SaveResult,
  type SaveTask,
  type Subdirectory,
} from './save.ts'
import { SavePool, type SaveWork } from './save-pool.ts'
import type { SourceInit } from './source/source.ts'

/** One tree to save. */
export interface SnapshotTarget {
  /** Absolute, and what the snapshot calls it. */
  readonly path: HostPath
  /** What lies there. Absent: the directory at `path`, as it is on disk. */
  readonly source?: SourceInit
  /** Layers, in the place of `source`: the view that a mount of them at `path` would show is saved. Nothing is mounted. */
  readonly stack?: StackRequest
  /**
   * All that may have changed since `CreateRequest.parent`, which is named then, such as a journal knows it: nothing else is
   * looked at, and the cost follows the changes. Of an inode with several names all are listed. With other patterns than
   * the parent's, everything is looked at.
   */
  readonly changes?: readonly SourceChange[]
}

export interface CreateRequest {
  readonly targets: readonly SnapshotTarget[]
  readonly tags?: readonly string[]
  /** Whose snapshot it is; by default this machine's. */
  readonly hostname?: string
  /** When it was taken, in ns since 1970; by default now. */
  readonly timeNs?: bigint
  /** As `restic backup --exclude`; matched against absolute paths. */
  readonly excludes?: readonly string[]
  /** The snapshot whose files need not be read again; by default the latest of this host and these paths. */
  readonly parent?: ObjectId | 'none'
  /** Read every file, whatever its times say. */
  readonly force?: boolean
  /** How many threads share the work, the calling one included. */
  readonly workers?: number
  readonly signal?: AbortSignal | undefined
  readonly onProgress?: (progress: { phase: string; done: number }) => void
}

export interface CreateReport {
  readonly snapshotId: ObjectId
  readonly tree: ObjectId
  readonly parent: ObjectId | undefined
  readonly counts: SaveCounts
  /** What is not in the snapshot, or not for certain; by path. */
  readonly problems: readonly SaveProblem[]
  /** Where another file system is mounted: what lies there is not in the snapshot. */
  readonly skipped: readonly ByteString[]
  readonly elapsedMs: number
}

/** There is nothing to make a snapshot of. */
export class SourceUnreadableError extends LsyncError {
  constructor(problem: SaveProblem) {
    super('SOURCE_UNREADABLE', `nothing was saved: ${problem.message}`, {
      path: problem.path,
      hint: 'name a directory that can be read',
    })
  }
}

/** A snapshot to make cannot be as asked. */
export class CreateInvalidError extends LsyncError {
  constructor(why: string) {
    super('SNAPSHOT_REQUEST_INVALID', why, { hint: 'see `lsync snapshot create --help`' })
  }
}

const FEW_CHANGES = 1000

/**
 * Makes a snapshot. Everything that it refers to is durable before it is there, so that a crash at any moment leaves the
 * repository as it was, at most with packs that nothing refers to.
 *
 * One file that cannot be read is a problem in the report, and the rest is saved.
 * @throws {RepositoryLockedError} {SourceUnreadableError} and what the backend throws
 */
export async function createSnapshot(repository: Repository, request: CreateRequest): Promise<CreateReport> {
  const startMs = performance.now()
  const targets = checkedTargets(request.targets)
  if (request.parent === undefined && targets.some(({ changes }) => changes !== undefined)) {
    throw new CreateInvalidError('changes are listed, and not the snapshot since which')
  }
  const excludes = parsePatterns(request.excludes ?? [])
  const lock = await RepositoryLock.acquire(repository, { exclusive: false, signal: request.signal })
  const { signal } = lock
  const opened: number[] = []
  const stacks: ReturnType<typeof openStack>[] = []
  try {
    const files = new Set<HostPath>()
    const sources = targets.map(({ path, source, stack }): SourceInit => {
      if (source !== undefined) return source
      if (stack !== undefined) {
        const layers = openStack(stack, false)
        stacks.push(layers)
        return { kind: 'stack', stack: stackInit(layers) }
      }
      const fd = openTarget(path, files)
      opened.push(fd)
      return { kind: 'directory', fd }
    })
    const host = request.hostname ?? hostname()
    const parent = await findParent(repository, request, targets, host, signal)
    await repository.loadIndex(signal)
    const init = {
      sources,
      key: repository.key,
      compresses: repository.compresses,
      polynomial: repository.config.chunker_polynomial,
      segments: repository.table.segments,
      accounts: readAccounts(),
      excludes,
      force: request.force === true,
    }
    // Other patterns show other names, also where nothing changed.
    const isSameView = parent?.excludes.join('\0') === (request.excludes ?? []).join('\0')
    const looked = isSameView && request.force !== true ? targets : targets.map(withoutChanges)
    const width = request.workers ?? DEFAULT_WORKERS
    const isSmall = looked.every(isSoonDone)
    const pool = new SavePool(init, repository.table, { width, isSmall, threads: repository.threads, signal })
    const store = new PackStore(repository, { signal, onWritten: (memory) => pool.recycle(memory) })
    try {
      const work = new TreeWork(repository, store, pool, request.onProgress, signal)
      await work.begin(looked, files, parent?.tree)
      await pool.run(work)
      const tree = work.rootTree
      const { packs, rests } = await pool.takeRest()
      for (const pack of packs) store.add(pack)
      for (const rest of rests) store.addRest(rest)
      await store.flush()
      await lock.settled()
      const problems = [...work.problems].sort(byPath)
      const snapshot = { ...request, paths: targets.map(({ path }) => path), tree, parent: parent?.id }
      const snapshotId = await repository.writeSnapshot(describeSnapshot(snapshot), signal)
      const { counts, skipped } = work
      const elapsedMs = performance.now() - startMs
      return { snapshotId, tree, parent: parent?.id, counts, problems, skipped: [...skipped].sort(), elapsedMs }
    } finally {
      await store.settle()
      await pool.close()
    }
  } catch (error) {
    // Objects that were noted and did not get into the repository must not be taken for stored.
    repository.resetIndex()
    throw error
  } finally {
    for (const fd of opened) close(fd)
    for (const stack of stacks) closeStack(stack)
    await lock.release()
  }
}

/** What is stored of a snapshot that is made by this process, now or at the time of the request. */
export function describeSnapshot(
  request: Pick<CreateRequest, 'timeNs' | 'hostname' | 'excludes' | 'tags'> &
    Pick<Snapshot, 'paths' | 'tree' | 'parent'>,
): Omit<Snapshot, 'id'> {
  const { timeNs, paths, tree, parent, excludes = [], tags = [] } = request
  return {
    time: formatTime(timeNs ?? BigInt(Date.now()) * 1_000_000n),
    parent,
    tree,
    paths,
    hostname: request.hostname ?? hostname(),
    username: userName(),
    uid: process.getuid?.() ?? 0,
    gid: process.getgid?.() ?? 0,
    excludes,
    tags,
    original: undefined,
    others: {},
  }
}

/** Opens a target; of one that is no directory, the directory that it is in, and notes it in `files`. */
function openTarget(path: HostPath, files: Set<HostPath>): number {
  try {
    return openRoot(path)
  } catch (error) {
    // A symlink that leads nowhere can be saved, too.
    const directory = (path.slice(0, path.lastIndexOf('/')) || '/') as HostPath
    if (errnoOf(error) !== 'ENOTDIR' && errnoOf(error) !== 'ENOENT') throw error
    const fd = openRoot(directory)
    if (tryStatAt(fd, lastOf(path)) === undefined) {
      close(fd)
      throw error
    }
    files.add(path)
    return fd
  }
}

/** Whether a target has so few changes that threads would be ready when everything is done, and only be waited for. */
function isSoonDone({ changes }: SnapshotTarget): boolean {
  return changes !== undefined && changes.length <= FEW_CHANGES && changes.every(({ scope }) => scope === 'entry')
}

function withoutChanges({ changes: _, ...target }: SnapshotTarget): SnapshotTarget {
  return target
}

/** Orders problems by their path, for `sort`. */
export function byPath(left: SaveProblem, right: SaveProblem): number {
  return left.path < right.path ? -1 : left.path > right.path ? 1 : 0
}

function checkedTargets(targets: readonly SnapshotTarget[]): SnapshotTarget[] {
  if (targets.length === 0) throw new CreateInvalidError('no path is named')
  const sorted = targets
    .map((target) => ({ ...target, path: normalized(target.path) }))
    .sort((left, right) => (left.path < right.path ? -1 : 1))
  for (const [i, { path }] of sorted.entries()) {
    const inside = sorted.find((other, j) => i !== j && (other.path === path || isBeneath(path, other.path)))
    if (inside !== undefined) throw new CreateInvalidError(`${printable(path)} lies in ${printable(inside.path)}`)
  }
  return sorted
}

function isBeneath(path: string, above: string): boolean {
  return path !== above && path.startsWith(above === '/' ? '/' : `${above}/`)
}

/** An absolute path without what means nothing in it. @throws {CreateInvalidError} */
export function normalized(path: HostPath): HostPath {
  if (!path.startsWith('/')) throw new CreateInvalidError(`${printable(path)} is not absolute`)
  const components = path.split('/').filter((part) => part !== '' && part !== '.')
  if (components.includes('..')) throw new CreateInvalidError(`${printable(path)} has a .. in it`)
  return `/${components.join('/')}` as HostPath
}

/** The latest snapshot of the same host and paths. Source: restic's choice of a parent. */
async function findParent(
  repository: Repository,
  request: CreateRequest,
  targets: readonly SnapshotTarget[],
  host: string,
  signal: AbortSignal,
): Promise<Snapshot | undefined> {
  if (request.parent === 'none') return undefined
  if (request.parent !== undefined) return repository.readSnapshot(request.parent, signal)
  const paths = targets.map(({ path }) => path).join('\0')
  let latest: Snapshot | undefined
  for (const id of await repository.listIds('snapshot', signal)) {
    const snapshot = await repository.readSnapshot(id, signal)
    if (snapshot.hostname !== host || [...snapshot.paths].sort().join('\0') !== paths) continue
    if (latest === undefined || timeOf(snapshot) > timeOf(latest)) latest = snapshot
  }
  return latest
}

function timeOf({ time }: Snapshot): bigint {
  return parseTime(time) as bigint
}

function readAccounts(): Accounts {
  const read = (path: string) => {
    try {
      return parseAccounts(readFileSync(path, 'latin1'))
    } catch {
      return new Map<number, string>()
    }
  }
  return { users: read('/etc/passwd'), groups: read('/etc/group') }
}

/** A directory of the snapshot that is not complete yet. */
interface Frame {
  readonly id: number
  readonly parent: Frame | undefined
  /** The place of its node among those of its parent: which part, and where in it. */
  readonly place: readonly [part: number, index: number]
  readonly source: number
  readonly path: ByteString | ''
  readonly shownPath: ByteString
  /** Its own node, up to where its tree belongs, when the parent does not have it. */
  node: string | undefined
  /** What may have changed in it; `undefined`: anything. */
  readonly change: ChangeNode | undefined
  /** Lists of nodes, in order. */
  readonly parts: string[][]
  /** Tasks and subdirectories that are not done. */
  pending: number
  /** What could not be read is left out of the parent. */
  isLost: boolean
}

/** A target with what is known of it when the work begins. */
interface FirstTarget {
  readonly path: HostPath
  readonly source: number
  /** Its source is the directory that it is in. */
  readonly isFile: boolean
  readonly change: ChangeNode | undefined
}

/** A task and where its result goes. */
interface Ticket {
  readonly frame: Frame
  readonly part: number
  /** Where in the part its only node belongs; absent: its nodes are the part. */
  readonly slot?: number
  readonly task: SaveTask
  readonly olderTree: ObjectId | undefined
}

/** Where a large file's node belongs. */
interface LargePlace extends LargeName {
  readonly frame: Frame
  readonly part: number
  /** The task that found it: it says where the directory is. */
  readonly task: SaveTask
  /** A target that is a file. */
  readonly isTarget: boolean
}

/** A large file that is being saved in parts. */
interface LargeWork {
  readonly place: LargePlace
  readonly attempt: number
  readonly file: LargeFile
  readonly node: TreeNode
  /** The chunks of each part, in the order of the parts. */
  readonly content: (readonly ObjectId[])[]
  isCutting: boolean
  /** How far it has been cut. */
  cutBytes: number
  /** Parts that are not stored yet. */
  storing: number
  storedBytes: number
  isStill: boolean
  failure: SavedPart['failure']
}

/** A part of a large file; `index`: which of those that are stored. */
interface PartTicket {
  readonly work: LargeWork
  readonly index?: number
  readonly task: PartTask
}

const PREFETCH = 8
/** A large file is not cut much further than it is stored, so that what was read once is still in memory. */
const PARTS_AHEAD = 8
const PART_BYTES = 16 * 1024 * 1024

/** The tree of one snapshot as it grows: hands out directories, depth first, and closes those that are complete. */
class TreeWork implements SaveWork {
  readonly problems: SaveProblem[] = []
  readonly skipped: ByteString[] = []
  readonly counts = emptyCounts()
  readonly #repository: Repository
  readonly #store: PackStore
  readonly #pool: SavePool
  readonly #onProgress: CreateRequest['onProgress']
  readonly #signal: AbortSignal
  readonly #tickets = new Map<number, Ticket>()
  readonly #parts = new Map<number, PartTicket>()
  readonly #readyParts: PartTicket[] = []
  /** Ready to be handed out, and waiting for the parent snapshot's tree. */
  readonly #ready: Ticket[] = []
  readonly #waiting: Ticket[] = []
  #reading = 0
  #nextId = 0
  #root: ObjectId | undefined
  #targets = 0
  #lostTargets = 0
  #wake: (() => void) | undefined
  #failure: unknown
  #failed = false

  constructor(
    repository: Repository,
    store: PackStore,
    pool: SavePool,
    onProgress: CreateRequest['onProgress'],
    signal: AbortSignal,
  ) {
    this.#repository = repository
    this.#store = store
    this.#pool = pool
    this.#onProgress = onProgress
    this.#signal = signal
  }

  /**
   * The tree of the snapshot, when the work is complete.
   * @throws {SourceUnreadableError} when none of the targets could be read
   */
  get rootTree(): ObjectId {
    const [problem] = this.problems
    if (problem !== undefined && this.#lostTargets === this.#targets) throw new SourceUnreadableError(problem)
    return this.#root as ObjectId
  }

  get isComplete(): boolean {
    const isOfParts = this.#parts.size > 0 || this.#readyParts.length > 0
    const isOfTrees = this.#tickets.size > 0 || this.#ready.length > 0 || this.#waiting.length > 0 || this.#reading > 0
    return !isOfParts && !isOfTrees
  }

  /** Makes the directories above the targets, and the first tasks. */
  async begin(
    targets: readonly SnapshotTarget[],
    files: ReadonlySet<HostPath>,
    olderTree: ObjectId | undefined,
  ): Promise<void> {
    this.#targets = targets.length
    await this.#addAbove(
      undefined,
      [0, 0],
      '/' as ByteString,
      targets.map(({ path, changes }, source) => ({
        path,
        source,
        isFile: files.has(path),
        change: changes === undefined ? undefined : changeTreeOf(changes),
      })),
      olderTree,
    )
  }

  /** The frame of a directory that only leads to targets, from the root of the host on. */
  async #addAbove(
    parent: Frame | undefined,
    place: readonly [number, number],
    path: ByteString,
    targets: readonly FirstTarget[],
    olderTree: ObjectId | undefined,
  ): Promise<void> {
    const [only] = targets
    if (only !== undefined && only.path === path) {
      const frame = this.#frame(parent, place, only.source, '', path, only.change)
      this.#enqueue(frame, 0, olderTree, parent === undefined ? {} : { rootName: lastOf(path) })
      return
    }
    const frame = this.#frame(parent, place, -1, '', path, undefined)
    if (parent !== undefined) frame.node = this.#nodeAbove(path)
    const older = await this.#olderNodes(olderTree)
    const names = [...new Set(targets.map((target) => nextOf(path, target.path)))].sort()
    frame.parts.push(names.map(() => ''))
    frame.pending = names.length
    for (const [index, name] of names.entries()) {
      const beneath = targets.filter((target) => nextOf(path, target.path) === name)
      const [first] = beneath
      if (first?.isFile === true && first.path === joinShown(path, name)) {
        this.#enqueueFile(frame, index, first, olderTree)
        continue
      }
      await this.#addAbove(frame, [0, index], joinShown(path, name), beneath, older.get(name))
    }
  }

  /** One name of a directory that is not saved itself. */
  #enqueueFile(frame: Frame, index: number, { source, path }: FirstTarget, olderTree: ObjectId | undefined): void {
    const names = [{ name: lastOf(path), isFile: false }]
    const task = { id: this.#nextId++, source, path: '' as const, shownPath: frame.shownPath, names }
    this.#push({ frame, part: 0, slot: index, task, olderTree })
  }

  #nodeAbove(path: ByteString): string {
    try {
      // A symlink on the way is followed: the user named it.
      return withFd(openRoot(path as HostPath), (fd) => this.#pool.own.describeDirectory(lastOf(path), fd))
    } catch (error) {
      // What is saved from elsewhere under this name needs no such directory here.
      if (errnoOf(error) !== 'ENOENT' && errnoOf(error) !== 'ENOTDIR') throw error
      return openNode(bareDirectory(lastOf(path)))
    }
  }

  async #olderNodes(tree: ObjectId | undefined): Promise<ReadonlyMap<ByteString, ObjectId>> {
    if (tree === undefined) return new Map()
    try {
      const nodes = await this.#repository.readTree(tree, this.#signal)
      return new Map(nodes.flatMap(({ name, subtree }) => (subtree === undefined ? [] : [[name, subtree] as const])))
    } catch (error) {
      if (!(error instanceof LsyncError) || this.#signal.aborted) throw error
      return new Map()
    }
  }

  #frame(
    parent: Frame | undefined,
    place: readonly [number, number],
    source: number,
    path: ByteString | '',
    shownPath: ByteString,
    change: ChangeNode | undefined,
  ): Frame {
    const id = this.#nextId++
    return { id, parent, place, source, path, shownPath, change, node: undefined, parts: [], pending: 0, isLost: false }
  }

  #enqueue(
    frame: Frame,
    part: number,
    olderTree: ObjectId | undefined,
    extra: Pick<SaveTask, 'rootName' | 'names'> = {},
  ): void {
    const { source, path, shownPath, change } = frame
    const looked = change === undefined || change.isWhole ? {} : { looked: [...change.children.keys()] }
    const ticket = {
      frame,
      part,
      task: { id: this.#nextId++, source, path, shownPath, ...looked, ...extra },
      olderTree,
    }
    frame.pending++
    this.#push(ticket)
  }

  #push(ticket: Ticket): void {
    if (ticket.olderTree === undefined) this.#ready.push(ticket)
    else this.#waiting.push(ticket)
    this.#read()
  }

  next(limit: number): readonly (SaveTask | PartTask)[] {
    if (this.#failed) throw this.#failure
    if (this.#store.isCongested) return []
    // Each is much work, and where a file is cut comes before anything can be done with it.
    const part = this.#readyParts.pop()
    if (part !== undefined) {
      this.#parts.set(part.task.id, part)
      return [part.task]
    }
    // With few directories known, each thread gets few, so that all have some.
    const share = Math.min(limit, Math.max(1, this.#ready.length >> 2))
    const tickets = this.#ready.splice(-share)
    for (const ticket of tickets) this.#tickets.set(ticket.task.id, ticket)
    this.#read()
    return tickets.map(({ task }) => task)
  }

  async wait(): Promise<void> {
    const woken = new Promise<void>((resolve) => {
      this.#wake = resolve
    })
    await (this.#store.isCongested ? Promise.race([this.#store.wait(), woken]) : woken)
    if (this.#failed) throw this.#failure
  }

  done(result: SaveResult): void {
    for (const pack of result.packs) this.#store.add(pack)
    this.problems.push(...result.problems)
    this.skipped.push(...result.skipped)
    for (const [name, count] of Object.entries(result.counts)) this.counts[name as keyof SaveCounts] += count
    for (const directory of result.directories) this.#take(directory)
    for (const part of result.parts) this.#takePart(part)
    const { filesNew, filesChanged, filesUnmodified } = this.counts
    this.#onProgress?.({ phase: 'save', done: filesNew + filesChanged + filesUnmodified })
  }

  /** Reads trees of the parent snapshot ahead of the tasks that need them. */
  #read(): void {
    while (this.#waiting.length > 0 && this.#reading < PREFETCH && this.#ready.length < PREFETCH * 8) {
      const ticket = this.#waiting.pop() as Ticket
      this.#reading++
      this.#repository
        .readObject('tree', ticket.olderTree as ObjectId, this.#signal)
        .then(
          (older) => this.#ready.push({ ...ticket, task: { ...ticket.task, older } }),
          (error: unknown) => {
            // A parent that is damaged costs time, and nothing else: its files are read again.
            if (error instanceof LsyncError && this.#signal.aborted === false) this.#ready.push(ticket)
            else this.#fail(error)
          },
        )
        .finally(() => {
          this.#reading--
          this.#awake()
        })
    }
  }

  #take(saved: SavedDirectory): void {
    const { frame, part, slot, task } = this.#tickets.get(saved.id) as Ticket
    this.#tickets.delete(saved.id)
    if (slot !== undefined) {
      const [node = ''] = saved.nodes
      const [large] = saved.large
      if (large !== undefined) {
        this.#beginLarge({ ...large, frame, part, index: slot, task, isTarget: true })
        return
      }
      if (node === '') this.#lostTargets++
      ;(frame.parts[part] as string[])[slot] = node
      this.#finishOne(frame)
      return
    }
    if (saved.rootNode !== undefined) frame.node = saved.rootNode
    if (saved.tree !== undefined) {
      this.#close(frame, saved.tree)
      return
    }
    if (saved.slices.length > 0) {
      frame.pending--
      for (const [i, names] of saved.slices.entries()) {
        frame.parts.push([])
        this.#enqueue(frame, part + i, undefined, { names })
      }
      return
    }
    frame.isLost ||= saved.isLost
    frame.parts[part] = [...saved.nodes]
    for (const large of saved.large) {
      frame.pending++
      this.#beginLarge({ ...large, frame, part, task, isTarget: false })
    }
    for (const subdirectory of saved.subdirectories) this.#addSubdirectory(frame, part, subdirectory)
    this.#finishOne(frame)
  }

  #addSubdirectory(parent: Frame, part: number, { name, index, olderTree }: Subdirectory): void {
    const path = (parent.path === '' ? name : `${parent.path}/${name}`) as ByteString
    const change = parent.change?.isWhole === true ? undefined : parent.change?.children.get(name)
    if (change !== undefined && isUntouched(change) && this.#isThere(olderTree)) {
      const nodes = parent.parts[part] as string[]
      nodes[index] = closeNode(nodes[index] as string, olderTree)
      return
    }
    const shownPath = joinShown(parent.shownPath, name)
    const frame = this.#frame(parent, [part, index], parent.source, path, shownPath, change)
    parent.pending++
    this.#enqueue(frame, 0, olderTree)
  }

  #isThere(tree: ObjectId | undefined): tree is ObjectId {
    return tree !== undefined && this.#repository.table.has('tree', tree)
  }

  #beginLarge(place: LargePlace, attempt = 1): void {
    const { task, name } = place
    this.#pool.useAll()
    try {
      const begun = this.#pool.own.beginLarge(task.source, task.path, name, shownPathOf(place))
      const state = { isCutting: false, cutBytes: 0, storing: 0, storedBytes: 0, isStill: true, failure: undefined }
      if (begun === undefined) this.#endLarge(place, '')
      else this.#goOn({ place, attempt, ...begun, content: [], ...state })
    } catch (error) {
      if (!(error instanceof LsyncError)) throw error
      this.#loseLarge(place, error)
    }
  }

  #takePart({ id, lengths, content, storedBytes, isStill, failure }: SavedPart): void {
    const { work, index } = this.#parts.get(id) as PartTicket
    this.#parts.delete(id)
    if (!isStill) work.isStill = false
    work.failure ??= failure
    if (index === undefined) {
      work.isCutting = false
      // Nothing of it is there any more.
      if (lengths.length === 0) work.cutBytes = work.file.sizeBytes
      // The first ones are the next to be taken.
      this.#readyParts.push(
        ...partsOf(lengths)
          .map((part) => this.#partTicket(work, part))
          .reverse(),
      )
    } else {
      work.storing--
      work.storedBytes += storedBytes
      work.content[index] = content
    }
    this.#goOn(work)
  }

  #partTicket(work: LargeWork, lengths: readonly number[]): PartTicket {
    const index = work.content.push([]) - 1
    const task = { id: this.#nextId++, file: work.file, offset: work.cutBytes, lengths }
    work.cutBytes += sumOf(lengths)
    work.storing++
    return { work, index, task }
  }

  /** Has some more of a large file cut; when all of it is stored, its node is known. */
  #goOn(work: LargeWork): void {
    const { place, file, attempt } = work
    const isOver = work.failure !== undefined || (!work.isStill && attempt < ATTEMPTS)
    if (!isOver && !work.isCutting && work.cutBytes < file.sizeBytes && work.storing < PARTS_AHEAD) {
      work.isCutting = true
      this.#readyParts.push({ work, task: { id: this.#nextId++, file, offset: work.cutBytes } })
    }
    if (work.isCutting || work.storing > 0) return
    if (work.failure !== undefined) this.#loseLarge(place, work.failure)
    else if (isOver) this.#beginLarge(place, attempt + 1)
    else this.#closeLarge(work)
  }

  #closeLarge({ place, node, content, storedBytes, isStill }: LargeWork): void {
    const path = shownPathOf(place)
    if (!isStill) {
      const { code, message } = new FileChangingError(path)
      this.problems.push({ path, code, message })
    }
    this.counts[place.isNew ? 'filesNew' : 'filesChanged']++
    this.counts.totalBytes += storedBytes
    this.#endLarge(place, encodeNode({ ...node, sizeBytes: storedBytes, content: content.flat() }))
  }

  #loseLarge(place: LargePlace, { code, message }: { readonly code: string; readonly message: string }): void {
    this.problems.push({ path: shownPathOf(place), code, message })
    this.#endLarge(place, '')
  }

  #endLarge({ frame, part, index, isTarget }: LargePlace, node: string): void {
    if (node === '' && isTarget) this.#lostTargets++
    ;(frame.parts[part] as string[])[index] = node
    this.#finishOne(frame)
  }

  /** One of the things that a directory waits for is there. The last one completes it, and maybe those above it. */
  #finishOne(frame: Frame): void {
    frame.pending--
    if (frame.pending > 0) return
    if (frame.isLost) this.#drop(frame)
    else this.#close(frame, this.#pool.own.storeTree(frame.parts.flat().filter((node) => node !== '')))
  }

  #close(frame: Frame, tree: ObjectId): void {
    const { parent } = frame
    if (parent === undefined) {
      this.#root = tree
      return
    }
    const [part, index] = frame.place
    const nodes = parent.parts[part] as string[]
    nodes[index] = closeNode(frame.node ?? (nodes[index] as string), tree)
    this.#finishOne(parent)
  }

  #drop(frame: Frame): void {
    const { parent } = frame
    if (frame.path === '') this.#lostTargets++
    if (parent === undefined) return
    const [part, index] = frame.place
    ;(parent.parts[part] as string[])[index] = ''
    this.#finishOne(parent)
  }

  #fail(error: unknown): void {
    if (!this.#failed) this.#failure = error
    this.#failed = true
  }

  #awake(): void {
    const wake = this.#wake
    this.#wake = undefined
    wake?.()
  }
}

function shownPathOf({ task, name }: LargePlace): ByteString {
  return joinShown(task.shownPath, name)
}

/** Chunks in groups that are worth a task each. */
function partsOf(lengths: readonly number[]): number[][] {
  const parts: number[][] = []
  let room = 0
  for (const length of lengths) {
    if (room <= 0) {
      parts.push([])
      room = PART_BYTES
    }
    parts.at(-1)?.push(length)
    room -= length
  }
  return parts
}

function sumOf(numbers: readonly number[]): number {
  return numbers.reduce((sum, number) => sum + number, 0)
}

/** Whether a directory itself is all that may have changed. */
function isUntouched({ isWhole, children }: ChangeNode): boolean {
  return !isWhole && children.size === 0
}

function lastOf(path: ByteString): ByteString {
  return path.slice(path.lastIndexOf('/') + 1) as ByteString
}

/** The component of `target` right beneath `path`. */
function nextOf(path: string, target: string): ByteString {
  const rest = target.slice(path === '/' ? 1 : path.length + 1)
  return rest.split('/')[0] as ByteString
}
