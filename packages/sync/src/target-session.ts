import { EventEmitter } from 'node:events'
import { mkdir } from 'node:fs/promises'
import type { Namespace } from '@lsync/overlay-merge'
import {
  type ByteString,
  errnoOf,
  type FileHandle,
  handleAt,
  handleKey,
  LsyncError,
  O_DIRECTORY,
  O_PATH,
  openByHandle,
  pathOfFd,
  rawStatFd,
  tryRawStatAt,
  withFd,
} from '@lsync/posix'
import { type DescribedFile, tryOpenDirectory } from './describe.ts'
import { type Differences, describeDifferences } from './differences.ts'
import type { Patterns } from './filter.ts'
import { IndexStore, ROOT_ID } from './index-store.ts'
import { SyncJournal, type UnfinishedBatch } from './journal.ts'
import type { Checkpoint } from './model/checkpoint.ts'
import type { IndexChange, NamePlace } from './model/index-change.ts'
import type { Failure, Operation, TreePath } from './model/operation.ts'
import { Row } from './model/row.ts'
import type { Pace } from './pace.ts'
import {
  findDirectory,
  madeDirectories,
  missingLinks,
  needsBarrier,
  type Observation,
  type Plan,
  planChanges,
} from './planner.ts'
import { type Deliver, workers } from './pool.ts'
import { keptAttributes, rowOf } from './send.ts'
import type { DirectoryRef, Hint } from './source/source.ts'
import type { SweptTree } from './sweep.ts'
import { TargetGoneError } from './target-state.ts'
import type { Target, TargetLoss, TargetState } from './transport/target.ts'
import type {
  ContentsResult,
  FreshDirectory,
  FreshResult,
  Job,
  JobResults,
  LookDirectory,
  NameFailure,
  Piece,
  ScanDirectory,
  SendTask,
} from './work.ts'

/** A target holds things that no sync of this upper has put there. */
export class TargetNotOursError extends LsyncError {
  constructor(target: string, why: string) {
    super('TARGET_NOT_OURS', `${target} ${why}`, {
      path: target,
      hint: 'name an empty directory; or, if all that differs from the upper may go, allow it with --adopt',
    })
  }
}

/** What a session is given. */
export interface TargetSessionRequest {
  readonly upperPath: string
  readonly upperFd: number
  readonly target: Target
  readonly stateDir: string
  readonly namespace: Namespace
  readonly patterns: Patterns
  readonly adopt: boolean
  readonly pace: Pace | undefined
  /** How much of a first pass may have to be repeated after a crash. */
  readonly checkpointMs: number
  /** How long changes are collected. */
  readonly tickMs: number
  /** How old a change may get before it is durable: a pass makes way for those that come near it. */
  readonly maxLagMs: number
  /** Nothing more is to be carried over for now: a pass stops where it is. */
  readonly isHeld: () => boolean
  readonly signal: AbortSignal
}

/** A name that could not be carried over, and is tried again. */
export interface PendingFailure {
  readonly path: TreePath
  readonly code: string
  readonly message: string
  readonly attempts: number
}

/** Where a target stands. Counts are since the start. */
export interface TargetStatus {
  readonly target: string
  readonly phase: 'opening' | 'recovering' | 'first pass' | 'scanning' | 'following' | 'waiting' | 'closed'
  readonly checkpoint: Checkpoint | undefined
  readonly files: number
  readonly bytes: number
  readonly operations: number
  /** Directories of a first pass that are known and not carried over yet. */
  readonly queuedDirectories: number
  readonly queuedNames: number
  /** Age in ms of the oldest change that is not durable yet; 0 when there is none. */
  readonly lagMs: number
  /** A change waits for longer than `maxLagMs`. */
  readonly isLate: boolean
  readonly failures: readonly PendingFailure[]
  readonly losses: readonly TargetLoss[]
}

interface SessionEvents {
  progress: [TargetStatus]
  checkpoint: [Checkpoint & { readonly names: number; readonly tookMs: number }]
  failure: [NameFailure]
  /** A checkpoint was stored on both sides: so much of what was sent is durable. */
  durable: [{ readonly files: number; readonly bytes: number }]
}

// A batch of contents for one thread: enough to be worth a message, little enough for two threads to share.
const TASKS_PER_JOB = 128
const JOB_BYTES = 8 << 20
const FRESH_MS = 150
const DIRECTORY_IDS = 8192
const BLOCKS_IDS = 256
const CHECKPOINT_ROW_BYTES = 32 << 20
// A pass gets on for so long, at least, between two rounds for changes.
const PASS_LEAST_MS = 250
const PLAN_ROUNDS = 16
// More names than these are planned and carried out in several batches, each of which is in memory as a whole. A rename from
// one batch to another is a removal and a new name then.
const BATCH_NAMES = 1 << 15
const REACH_LEVELS = 256
const RETRY_FIRST_MS = 1000
// So many names are looked at to tell how large what has changed is.
const PENDING_LOOKS = 4096
const RETRY_MOST_MS = 60_000
/** Beyond this many directories that nobody knows, looking for each would take longer than looking everywhere. */
const UNKNOWN_MOST = 2000
/** The target as a whole refuses: nothing of a batch is to be taken for done, and all of it waits. */
const TARGET_WIDE: ReadonlySet<string> = new Set([
  'ENOSPC',
  'EDQUOT',
  'EROFS',
  'EIO',
  'ENOTCONN',
  'ETIMEDOUT',
  'ESTALE',
  'EMFILE',
  'ENFILE',
  'ENOMEM',
])
const DOT = '.' as ByteString
const NO_NAME = '' as ByteString

/** A batch that could not be carried out as a whole. */
class BatchFailedError extends LsyncError {
  constructor(failure: NameFailure) {
    super('BATCH_FAILED', `the target refuses: ${failure.message}`, {
      path: failure.path,
      hint: 'see what the target lacks (space, quota, being writable); it is tried again by itself',
    })
  }
}

interface HintedObjects {
  readonly directory: FileHandle
  readonly name: ByteString
  /** By their keys. */
  readonly handles: Map<string, FileHandle>
}

const NO_OBJECTS: ReadonlyMap<string, HintedObjects> = new Map()

/** One target of one upper: its index, its journal, and what is still to be done. */
export class TargetSession {
  readonly events = new EventEmitter<SessionEvents>()
  readonly #request: TargetSessionRequest
  #index!: IndexStore
  #journal!: SyncJournal
  #session = 0
  #losses: readonly TargetLoss[] = []
  #nextStage = 0
  /** The target was taken as it was found, at the user's word. */
  #isAdopted = false
  #checkpoint: Checkpoint | undefined
  #phase: TargetStatus['phase'] = 'opening'
  readonly #dirty = new Map<number, Set<ByteString>>()
  readonly #forced = new Set<string>()
  /** Names whose change time says nothing, since somebody may write to them through a mapping. */
  readonly #suspects = new Set<string>()
  /** What hints of the next round were about, by directory and name. */
  #objects = new Map<string, HintedObjects>()
  readonly #rescans = new Set<number>()
  #isScanDue = false
  readonly #unknown = new Map<string, { handle: FileHandle; names: Set<ByteString> }>()
  readonly #retries = new Map<string, PendingFailure & NamePlace & { readonly dueAt: number }>()
  /** A batch could not be carried out; it is done again from the journal. */
  #isBroken = false
  /** What a pass has still to carry over. */
  #freshQueue: FreshDirectory[] = []
  /** What is being carried over now. */
  #carrying: readonly FreshDirectory[] = []
  /** What a pass has found that is to be looked at again, when it is over. */
  readonly #later = new Map<number, Set<ByteString>>()
  readonly #laterRescans = new Set<number>()
  /** A pass has made way for changes. */
  #hasYielded = false
  #oldestChangeAt: number | undefined
  /** Of the changes that are being carried over. */
  #takenChangeAt: number | undefined
  /** How long it has taken of late to carry over the changes of a tick. */
  #takeMs = 0
  readonly #tally = { files: 0, bytes: 0, operations: 0 }
  #delivered: Failure[] = []

  constructor(request: TargetSessionRequest) {
    this.#request = request
  }

  /**
   * Opens target and index, finishes what a crash left, and finds out what is to be done: everything for a new target,
   * else a comparison of the upper with the index.
   * @throws {TargetNotOursError}
   */
  async open(): Promise<void> {
    const { target, stateDir, upperFd, signal, adopt } = this.#request
    workers.warm()
    await mkdir(stateDir, { recursive: true, mode: 0o700 })
    const unfinished = await this.#openJournal()
    const root = rowOf(NO_NAME, rawStatFd(upperFd))
    this.#index = await IndexStore.open(`${stateDir}/index`, Buffer.from(root.identity, 'latin1').toString('hex'))
    // An empty directory in its place may be where it is to be mounted.
    const state = await target.open(signal, this.#isKnown && !adopt)
    this.#take(state)
    const isBelieved = await this.#believe(state.checkpoint, state.isEmpty, unfinished.length > 0, adopt)
    if (isBelieved) {
      await this.#recover(unfinished)
      this.#queuePending()
      this.#isScanDue = true
    } else {
      await this.#journal.clear()
      // What a crash has left is never taken for the same by its looks: a file may have changed twice in a second.
      this.#isAdopted = adopt
      await this.#beginAnew(root, !state.isEmpty)
    }
  }

  /** This upper was carried to the target before, or its first pass has begun. */
  get #isKnown(): boolean {
    return this.#index.row(0, NO_NAME) !== undefined
  }

  #take(state: TargetState): void {
    const { target, upperFd, namespace, patterns, pace } = this.#request
    this.#losses = state.losses
    this.#nextStage = Math.max(this.#nextStage, state.nextStage)
    this.#checkpoint = state.checkpoint
    const losses = state.losses.map(({ what }) => what)
    const { delivery } = target
    const isLimited = pace?.isLimited === true
    this.#session = workers.open({ upperFd, delivery, losses, namespace, patterns, isLimited })
  }

  /** Says that something may have changed. Quick. */
  hint(hint: Hint): void {
    if (hint.kind === 'lost') this.#isScanDue = true
    else if (hint.kind === 'tree') this.#rescan(hint.directory)
    else if (hint.kind === 'name') {
      this.#mark(hint.directory, hint.name)
      if (hint.object !== undefined) this.#noteObject(hint.directory, hint.name, hint.object)
    } else for (const end of [hint.from, hint.to]) if (end !== undefined) this.#mark(end.directory, end.name)
    this.#oldestChangeAt ??= performance.now()
  }

  /** Names (paths from the upper's root on) that may be written to through a mapping, unseen. */
  suspect(paths: readonly ByteString[]): void {
    for (const path of paths) {
      const { directory, rest } = this.#index.resolve(path.slice(0, Math.max(0, path.lastIndexOf('/'))) as ByteString)
      if (rest.length > 0) continue
      const name = path.slice(path.lastIndexOf('/') + 1) as ByteString
      this.#add(directory, name)
      this.#suspects.add(keyOf({ directory, name }))
    }
  }

  /** Compares the whole upper with the index in the next round. */
  scan(): void {
    this.#isScanDue = true
  }

  /** The directories of the index, for a sweep. `look` must not run while a round does. */
  get tree(): SweptTree {
    return {
      count: () => this.#index.directoryCount,
      after: (id, most) => this.#index.directoriesAfter(id, most),
      look: async (ids) => {
        // A first pass or a comparison of everything does as much, and sooner.
        if (this.#isPassing || this.#isScanDue || this.#isBroken) return
        const directories = ids.flatMap((id) => {
          const path = this.#index.pathOf(id)
          return path === undefined ? [] : [{ id, path }]
        })
        await this.#scanList(directories, true)
      },
    }
  }

  /**
   * Compares the whole upper with what the target has, and sends nothing. `undefined` where that is not known: after a failure, or
   * before a first pass has come to its end. Must not run while a round does.
   */
  async differences(): Promise<Differences | undefined> {
    const index = this.#index
    const isUnsure = this.#isPassing || this.#isBroken || this.#forced.size > 0 || this.#retries.size > 0
    if (isUnsure || !this.#isKnown || index.pending().length > 0) return undefined
    const places: NamePlace[] = [{ directory: 0, name: NO_NAME }]
    let hasFailed = false
    await this.#inParallel<ScanDirectory>([{ id: ROOT_ID, path: '' as TreePath }], 64, async (piece) => {
      const directories = piece.map((directory) => ({ ...directory, pages: index.pages(directory.id) }))
      const { dirty, children, failures } = await this.#run({ do: 'scan', directories })
      places.push(...dirty)
      hasFailed ||= failures.length > 0
      return children
    })
    if (hasFailed) return undefined
    const { upperFd, namespace } = this.#request
    const names = describeDifferences({ upperFd, places, index, keeps: keptAttributes(namespace) })
    return { names, isTargetEmpty: index.directoryCount <= 1 && index.rows(ROOT_ID).length === 0 }
  }

  /** How much is known to have changed: names, and the bytes of those that are files. New directories count as what was said of them. */
  get pending(): { readonly names: number; readonly bytes: number } {
    const { upperFd } = this.#request
    let [names, looked, bytes] = [0, 0, 0]
    const count = (changed: ReadonlySet<ByteString>, pathOf: () => TreePath | undefined) => {
      names += changed.size
      const path = looked < PENDING_LOOKS ? pathOf() : undefined
      if (path === undefined) return
      const some = [...changed].slice(0, PENDING_LOOKS - looked)
      looked += some.length
      bytes += sizeOfFiles(upperFd, path, some)
    }
    for (const [id, changed] of this.#dirty) count(changed, () => this.#index.pathOf(id))
    for (const { handle, names: changed } of this.#unknown.values()) count(changed, () => this.#pathOfHandle(handle))
    // What was not looked at is taken for as large as the rest.
    return { names, bytes: looked === 0 ? 0 : Math.round((bytes / looked) * names) }
  }

  /** Whether a round would find something to do now. */
  get hasWork(): boolean {
    const now = performance.now()
    return this.#isUnsettled || this.#isPassing || [...this.#retries.values()].some(({ dueAt }) => dueAt <= now)
  }

  /** Something but a pass is left to do. */
  get #isUnsettled(): boolean {
    return (
      this.#dirty.size > 0 ||
      this.#isScanDue ||
      this.#isBroken ||
      this.#rescans.size > 0 ||
      // While a pass goes on, they wait for its end.
      (!this.#isPassing && this.#later.size + this.#laterRescans.size > 0) ||
      this.#unknown.size > 0
    )
  }

  /** A pass has not come to its end. */
  get #isPassing(): boolean {
    return this.#freshQueue.length > 0
  }

  /** How long changes may be collected so that they are durable a tick after the first of them. */
  get collectMs(): number {
    const { tickMs, maxLagMs, pace } = this.#request
    // While others wait for the disks, what is written several times is better carried over once.
    const wantedMs = (pace?.backOffMs ?? 0) > 0 ? Math.max(tickMs, maxLagMs / 2) : tickMs
    return Math.max(wantedMs / 2, wantedMs - this.#takeMs)
  }

  /** When the next retry is due, in ms from now. */
  get retryInMs(): number | undefined {
    const due = [...this.#retries.values()].map(({ dueAt }) => dueAt)
    return due.every((at) => at === Number.POSITIVE_INFINITY)
      ? undefined
      : Math.max(0, Math.min(...due) - performance.now())
  }

  get status(): TargetStatus {
    let queuedNames = 0
    for (const names of this.#dirty.values()) queuedNames += names.size
    const lagMs = this.#lagMs
    return {
      target: this.#request.target.description,
      phase: this.#phase,
      checkpoint: this.#checkpoint,
      ...this.#tally,
      queuedDirectories: this.#freshQueue.length + this.#carrying.length,
      queuedNames,
      lagMs,
      isLate: lagMs > this.#request.maxLagMs,
      failures: [...this.#retries.values()].map(({ path, code, message, attempts }) => ({
        path,
        code,
        message,
        attempts,
      })),
      losses: this.#losses,
    }
  }

  get #lagMs(): number {
    const oldest = Math.min(
      this.#takenChangeAt ?? Number.POSITIVE_INFINITY,
      this.#oldestChangeAt ?? Number.POSITIVE_INFINITY,
    )
    return oldest === Number.POSITIVE_INFINITY ? 0 : performance.now() - oldest
  }

  /**
   * Carries over everything that is known to have changed, and makes it durable. Returns whether something changed
   * while it was read, so that another round is needed for it. A pass makes way for what changes meanwhile.
   */
  async round(): Promise<{ readonly isSettled: boolean }> {
    const startedAt = performance.now()
    const before = this.#checkpoint?.sequence
    let names = 0
    if (this.#isBroken) await this.#redo()
    do {
      this.#hasYielded = false
      if (this.#isPassing && !this.#request.isHeld()) {
        this.#phase = 'first pass'
        // A pass from the root on reads everything from now on, and more than that no comparison could find.
        if (this.#freshQueue.some(({ id }) => id === ROOT_ID)) this.#isScanDue = false
        await this.#carryFresh(this.#freshQueue.splice(0), new Map(), new Set())
      }
      names += await this.#takeChanges()
    } while (this.#hasYielded && !this.#request.isHeld())
    this.#phase = 'waiting'
    workers.ended()
    if (this.#checkpoint !== undefined && this.#checkpoint.sequence !== before) {
      this.events.emit('checkpoint', { ...this.#checkpoint, names, tookMs: performance.now() - startedAt })
    }
    return { isSettled: this.#request.isHeld() ? !this.#isUnsettled : !this.#isUnsettled && !this.#isPassing }
  }

  /** Carries over what is known to have changed. Returns how many names it looked at. */
  async #takeChanges(): Promise<number> {
    const startedAt = performance.now()
    this.#takenChangeAt = this.#oldestChangeAt
    this.#oldestChangeAt = undefined
    try {
      if (!this.#isPassing) this.#lookLater()
      await this.#scanDue()
      this.#takeRetries()
      await this.#reachUnknown()
      if (this.#dirty.size === 0 && this.#objects.size === 0) return 0
      this.#phase = 'following'
      return await this.#follow()
    } catch (error) {
      this.#oldestChangeAt = this.#takenChangeAt ?? this.#oldestChangeAt
      throw error
    } finally {
      this.#takenChangeAt = undefined
      const tookMs = performance.now() - startedAt
      this.#takeMs = Math.max(tookMs, this.#takeMs * 0.9)
    }
  }

  #lookLater(): void {
    for (const [directory, names] of this.#later) for (const name of names) this.#add(directory, name)
    for (const id of this.#laterRescans) this.#rescans.add(id)
    this.#later.clear()
    this.#laterRescans.clear()
  }

  /** Whether a pass that has gone on since then is to make way for changes. */
  #isChangeDue(since: number): boolean {
    const now = performance.now()
    if (this.#oldestChangeAt === undefined || now - since < Math.max(PASS_LEAST_MS, this.#takeMs)) return false
    const { tickMs, maxLagMs } = this.#request
    // A pass is interrupted as rarely as the lag allows.
    return now - this.#oldestChangeAt >= Math.max(tickMs, Math.min(maxLagMs / 2, maxLagMs - 2 * this.#takeMs))
  }

  /**
   * Finds out where directories are of which something was said before the index knew them. What a pass has not come to
   * is carried over now, as far as it leads to a change: level by level, since nobody knows what lies beneath.
   */
  async #reachUnknown(): Promise<void> {
    for (let level = 0; level < REACH_LEVELS; level++) {
      const wanted = this.#placeUnknown()
      if (wanted.size === 0) return
      const reached = this.#freshQueue.filter(({ id }) => wanted.has(id))
      this.#freshQueue = this.#freshQueue.filter(({ id }) => !wanted.has(id))
      // What is in them is seen as it is now.
      for (const id of wanted) this.#dirty.delete(id)
      await this.#carryFresh(reached, new Map(), new Set(), true)
    }
    // Deeper than any tree is, or many that keep moving: they are lagging behind.
    this.#oldestChangeAt ??= this.#takenChangeAt
  }

  async close(): Promise<void> {
    this.#phase = 'closed'
    if (this.#session !== 0) await workers.close(this.#session)
    else await workers.cool()
    await this.#journal?.close()
    await this.#index?.close()
    await this.#request.target.close()
  }

  async #believe(
    checkpoint: Checkpoint | undefined,
    isEmpty: boolean,
    hasJournal: boolean,
    adopt: boolean,
  ): Promise<boolean> {
    const { target } = this.#request
    const index = this.#index
    const isFirst = !this.#isKnown
    if (checkpoint === undefined) {
      if (!isFirst && !adopt) throw new TargetGoneError(target.description, 'was synced before and does not know it')
      if (!isEmpty && !adopt) throw new TargetNotOursError(target.description, 'is not empty and was never synced')
      if (!isFirst) await index.reset()
      return false
    }
    if (checkpoint.root === index.root && !isFirst) {
      const isAhead = checkpoint.sequence < index.sequence
      const isBehind = checkpoint.sequence > index.sequence + (hasJournal ? 1 : 0)
      // A crash between the two leaves the target one checkpoint ahead, and the batch in the journal.
      if (!isAhead && !isBehind) return true
    } else if (!isEmpty && !adopt) {
      throw new TargetNotOursError(
        target.description,
        'holds the copy of another upper, or the state of this one is lost',
      )
    }
    await index.reset()
    return false
  }

  async #beginAnew(root: Row, isDirty: boolean): Promise<void> {
    const { upperFd } = this.#request
    // Before the index says that anything is there.
    await this.#barrier({ root: this.#index.root, sequence: this.#index.sequence })
    await this.#index.commit([
      {
        set: 'directory',
        record: { id: ROOT_ID, parent: 0, name: NO_NAME, bits: 0, isPending: true, handle: handleAt(upperFd, '') },
      },
      { set: 'row', directory: 0, row: root.with({ ref: ROOT_ID, settled: false }) },
    ])
    const { identity } = root
    this.#freshQueue = [{ id: ROOT_ID, parent: 0, name: NO_NAME, path: '' as TreePath, identity, isDirty }]
  }

  // What a first pass had begun, and what had not been reached yet: nothing of it is believed.
  #queuePending(only?: number): void {
    const pending = new Set(this.#index.pending())
    for (const id of only === undefined ? pending : [only]) {
      if (this.#isBeneath(id, pending)) continue
      const record = this.#index.directory(id)
      const path = this.#index.pathOf(id)
      if (record === undefined || path === undefined) continue
      const { parent, name } = record
      const identity = this.#index.row(parent, name)?.identity ?? ''
      this.#freshQueue.push({ id, parent, name, path, identity, isDirty: true })
    }
  }

  // A directory that was to be carried over and was not there for the moment, or was refused.
  #queueAnew(id: number): void {
    if (this.#index.directory(id)?.isPending !== true || this.#freshQueue.some((queued) => queued.id === id)) return
    this.#queuePending(id)
  }

  // What is beneath a directory that is carried over anew comes with it, under another id.
  #isBeneath(id: number, directories: ReadonlySet<number>): boolean {
    for (let at = this.#index.directory(id)?.parent ?? 0; at > 0; at = this.#index.directory(at)?.parent ?? 0) {
      if (directories.has(at)) return true
    }
    return false
  }

  async #recover(unfinished: readonly UnfinishedBatch[]): Promise<void> {
    this.#phase = 'recovering'
    for (const batch of unfinished) {
      if (!batch.isStructured && needsBarrier(batch)) {
        const failed = batch.isHalfDone ? [] : await this.#operations(batch.first)
        await this.#barrier()
        failed.push(...(await this.#operations(batch.second)))
        const [wide] = failed.filter(({ code }) => TARGET_WIDE.has(code))
        if (wide !== undefined) throw new BatchFailedError(wide)
        await this.#barrier()
        await this.#index.commit(batch.changes)
        if (batch === unfinished.at(-1)) await this.#journal.mark('structured')
        // What could not be brought to its place is not there, whatever the index says.
        for (const { path } of failed) this.#distrust(path)
        for (const path of destinationsOf(batch, failed)) this.#distrust(path)
      }
      for (const path of batch.touched) this.#distrust(path)
    }
  }

  /** A name of which nobody knows what the target has there. */
  #distrust(path: TreePath): void {
    const { directory, rest } = this.#index.resolve(path)
    const isKnown = rest.length === 0
    const record = isKnown ? this.#index.directory(directory) : undefined
    if (isKnown && directory === ROOT_ID) return
    const place =
      record !== undefined
        ? { directory: record.parent, name: record.name }
        : { directory, name: rest[0] as ByteString }
    // Beneath something that the index does not know there is nothing to distrust: it comes as a whole.
    if (!isKnown && rest.length > 1) {
      this.#force({ directory, name: rest[0] as ByteString })
      return
    }
    this.#force(place)
    const row = this.#index.row(place.directory, place.name)
    if (row === undefined || row.nlink < 2 || row.isDirectory) return
    for (const other of this.#index.namesOf(row.identity)) this.#force(other)
  }

  #force(place: NamePlace): void {
    this.#add(place.directory, place.name)
    this.#forced.add(keyOf(place))
  }

  async #openJournal(): Promise<readonly UnfinishedBatch[]> {
    const { stateDir, signal } = this.#request
    const { journal, unfinished } = await SyncJournal.open(`${stateDir}/journal`)
    this.#journal = journal
    // The session may have been closed meanwhile, without this one.
    if (signal.aborted) await journal.close()
    signal.throwIfAborted()
    return unfinished
  }

  async #redo(): Promise<void> {
    await this.#journal.close()
    const unfinished = await this.#openJournal()
    this.#delivered = []
    const { target, signal, upperFd } = this.#request
    // A connection may be gone, and what it held back with it; a mount may be another one.
    if (target.isThere?.() !== true) {
      const session = this.#session
      this.#session = 0
      await workers.close(session)
      await target.close()
      const state = await target.open(signal, true)
      this.#take(state)
      if (!(await this.#believe(state.checkpoint, state.isEmpty, unfinished.length > 0, false))) {
        await this.#journal.clear()
        await this.#beginAnew(rowOf(NO_NAME, rawStatFd(upperFd)), !state.isEmpty)
        this.#isBroken = false
        return
      }
    }
    await this.#recover(unfinished)
    this.#freshQueue = []
    this.#queuePending()
    this.#isBroken = false
    // What the broken batch had taken from the list of changes is found by comparing.
    this.#isScanDue = true
  }

  #add(directory: number, name: ByteString): void {
    const names = this.#dirty.get(directory)
    if (names === undefined) this.#dirty.set(directory, new Set([name]))
    else names.add(name)
  }

  #mark(directory: DirectoryRef, name: ByteString): void {
    if ('path' in directory) {
      const { directory: id, rest } = this.#index.resolve(directory.path)
      const [missing] = rest
      if (missing !== undefined) this.#add(id, missing)
      else this.#markKnown(id, name)
      return
    }
    const id = this.#index.byHandle(directory.handle)
    if (id !== undefined) {
      this.#markKnown(id, name)
      return
    }
    const key = handleKey(directory.handle)
    const known = this.#unknown.get(key)
    if (known === undefined) this.#unknown.set(key, { handle: directory.handle, names: new Set([name]) })
    else known.names.add(name)
  }

  #noteObject(directory: DirectoryRef, name: ByteString, object: FileHandle): void {
    if (!('handle' in directory)) return
    const key = `${handleKey(directory.handle)}/${name}`
    const known = this.#objects.get(key)
    if (known === undefined) {
      this.#objects.set(key, { directory: directory.handle, name, handles: new Map([[handleKey(object), object]]) })
    } else known.handles.set(handleKey(object), object)
  }

  #markKnown(id: number, name: ByteString): void {
    if (name !== DOT) {
      this.#add(id, name)
      return
    }
    const record = this.#index.directory(id)
    if (record !== undefined) this.#add(record.parent, record.name)
  }

  #rescan(directory: DirectoryRef): void {
    if ('path' in directory) {
      const { directory: id, rest } = this.#index.resolve(directory.path)
      const [missing] = rest
      if (missing !== undefined) this.#add(id, missing)
      else this.#rescans.add(id)
      return
    }
    const id = this.#index.byHandle(directory.handle)
    if (id !== undefined) this.#rescans.add(id)
    else this.#mark(directory, DOT)
  }

  // Directories that the index did not know when something was said of them: by now it may, or they lie beneath one
  // that has just appeared, or outside the upper. Gives those that a pass has to carry over before more can be said.
  #placeUnknown(): ReadonlySet<number> {
    const queued = new Set(this.#freshQueue.map(({ id }) => id))
    const wanted = new Set<number>()
    if (queued.size > 0) for (const id of this.#dirty.keys()) if (queued.has(id)) wanted.add(id)
    const unknown = [...this.#unknown]
    this.#unknown.clear()
    if (unknown.length > UNKNOWN_MOST) {
      this.#isScanDue = true
      return wanted
    }
    for (const [key, one] of unknown) {
      const { handle, names } = one
      const id = this.#index.byHandle(handle)
      if (id !== undefined) {
        for (const name of names) this.#markKnown(id, name)
        if (queued.has(id)) wanted.add(id)
        continue
      }
      const path = this.#pathOfHandle(handle)
      if (path === undefined) continue
      const { directory, rest } = this.#index.resolve(path)
      const [missing] = rest
      if (queued.has(directory)) {
        wanted.add(directory)
        this.#unknown.set(key, one)
      } else if (missing !== undefined) this.#add(directory, missing)
      else {
        // Another directory than the one that the index has there.
        this.#markKnown(directory, DOT)
        for (const name of names) this.#markKnown(directory, name)
      }
    }
    return wanted
  }

  /** Where a directory is beneath the upper now. */
  #pathOfHandle(handle: FileHandle): TreePath | undefined {
    const { upperFd } = this.#request
    let fd: number | undefined
    try {
      fd = openByHandle(upperFd, handle, O_PATH | O_DIRECTORY)
    } catch (error) {
      if (errnoOf(error) === undefined) throw error
      return undefined
    }
    if (fd === undefined) return undefined
    const path = withFd(fd, pathOfFd)
    const root = pathOfFd(upperFd)
    if (path === root) return '' as TreePath
    const prefix = root === '/' ? '/' : `${root}/`
    return path.startsWith(prefix) ? (path.slice(prefix.length) as TreePath) : undefined
  }

  #takeRetries(): void {
    const now = performance.now()
    for (const [key, retry] of this.#retries) {
      if (retry.dueAt > now) continue
      this.#add(retry.directory, retry.name)
      const row = this.#index.row(retry.directory, retry.name)
      if (row?.isDirectory === true) this.#queueAnew(row.ref)
      // Until it has succeeded or failed once more.
      this.#retries.set(key, { ...retry, dueAt: Number.POSITIVE_INFINITY })
    }
  }

  async #scanDue(): Promise<void> {
    const queue: ScanDirectory[] = []
    if (this.#isScanDue) {
      queue.push({ id: ROOT_ID, path: '' as TreePath })
      this.#add(0, NO_NAME)
    } else {
      for (const id of this.#rescans) {
        const path = this.#index.pathOf(id)
        if (path !== undefined) queue.push({ id, path })
      }
    }
    this.#isScanDue = false
    this.#rescans.clear()
    if (queue.length === 0) return
    this.#phase = 'scanning'
    await this.#scanList(queue, false)
  }

  async #scanList(queue: ScanDirectory[], flat: boolean): Promise<void> {
    // What a pass has not come to is carried over as it will be then.
    const queued = new Set(this.#freshQueue.map(({ id }) => id))
    await this.#inParallel(queue, 64, async (directories) => {
      const indexed = directories
        .filter(({ id }) => !queued.has(id))
        .map((directory) => ({ ...directory, pages: this.#index.pages(directory.id) }))
      const { dirty, children, failures } = await this.#run({ do: 'scan', directories: indexed })
      for (const { directory, name } of dirty) this.#add(directory, name)
      for (const failure of failures) this.#fail(failure)
      return flat ? [] : children
    })
  }

  /**
   * Hands out a growing list in pieces to all threads. The list is handed out from its end, so that what was found last,
   * deepest in the tree, comes first and the list stays short. What is enough leaves the rest in it.
   */
  async #inParallel<T>(
    queue: T[],
    size: number,
    work: (piece: T[]) => Promise<readonly T[]>,
    isEnough: () => boolean = () => false,
  ): Promise<void> {
    let running = 0
    let failure: unknown
    let isDone = false
    await new Promise<void>((resolve) => {
      const next = () => {
        if (failure !== undefined) queue.length = 0
        while (queue.length > 0 && running < workers.width * 2 && !isDone) {
          isDone = isEnough()
          if (isDone) break
          running++
          const share = Math.max(1, Math.min(size, Math.ceil(queue.length / workers.width)))
          work(queue.splice(-share))
            .then((more) => queue.push(...more))
            .catch((error) => {
              failure ??= error
            })
            .finally(() => {
              running--
              next()
            })
        }
        if (running === 0 && (queue.length === 0 || isDone)) resolve()
      }
      next()
    })
    if (failure !== undefined) throw failure
  }

  /** Looks, plans and carries out until nothing known is left. Returns how many names it looked at. */
  async #follow(): Promise<number> {
    const taken = [...this.#dirty].flatMap(([directory, names]) => [...names].map((name) => ({ directory, name })))
    this.#dirty.clear()
    const forced = new Set(this.#forced)
    const suspects = new Set(this.#suspects)
    this.#suspects.clear()
    const objects = this.#objects
    this.#objects = new Map()
    let done = 0
    const giveBack = () => {
      for (const [key, hinted] of objects) {
        const since = this.#objects.get(key)
        this.#objects.set(key, since ? { ...hinted, handles: new Map([...hinted.handles, ...since.handles]) } : hinted)
      }
      for (const { directory, name } of taken.slice(done)) this.#add(directory, name)
      for (const key of suspects) this.#suspects.add(key)
    }
    try {
      do {
        const batch = taken.length <= BATCH_NAMES ? taken : taken.slice(done, done + BATCH_NAMES)
        const isLast = done + batch.length === taken.length
        // What was seen of an inode counts for all names that it may have by now.
        const made = await this.#plan(batch, forced, suspects, isLast ? objects : NO_OBJECTS)
        if (made === undefined) {
          giveBack()
          return done
        }
        await this.#carryOut(made, batch)
        for (const place of batch) {
          this.#forced.delete(keyOf(place))
          // It was somewhere else for the moment in which it was to be carried over.
          const row = this.#index.row(place.directory, place.name)
          if (row?.isDirectory === true) this.#queueAnew(row.ref)
        }
        done += batch.length
      } while (done < taken.length)
    } catch (error) {
      giveBack()
      throw error
    }
    return taken.length
  }

  async #plan(
    taken: readonly NamePlace[],
    forced: ReadonlySet<string>,
    suspects: ReadonlySet<string>,
    objects: ReadonlyMap<string, HintedObjects>,
  ) {
    const index = this.#index
    const observations = new Map<string, Observation>()
    const view = {
      directory: (id: number) => index.directory(id),
      byHandle: (handle: { type: number; bytes: Buffer }) => index.byHandle(handle),
      namesOf: (identity: string) => index.namesOf(identity),
      row: (directory: number, name: ByteString) => {
        const row = index.row(directory, name)
        return row !== undefined && suspects.has(keyOf({ directory, name })) ? row.with({ settled: false }) : row
      },
    }
    let places = taken
    let hasPeeked = false
    const searched = new Set<string>()
    for (let round = 0; round < PLAN_ROUNDS; round++) {
      await this.#look(places, forced, observations)
      if (round === 0) await this.#look(await this.#otherNames(objects, observations), forced, observations)
      const missing = missingLinks(observations.values(), index)
      for (const identity of searched) missing.delete(identity)
      if (missing.size > 0) {
        for (const identity of missing) searched.add(identity)
        const found = await index.findSingle(missing)
        await this.#look(found, forced, observations)
      }
      const plan = planChanges({
        observations: [...observations.values()],
        index: view,
        takeDirectoryId: () => index.takeDirectoryIds(1),
        takeStage: () => this.#nextStage++,
      })
      if (plan.isInconsistent) return undefined
      places = plan.alsoLook
      if (places.length > 0) continue
      if (hasPeeked || plan.leaving.size === 0 || plan.fresh.length === 0) return { plan, observations }
      hasPeeked = true
      await this.#peek(plan, forced, observations)
    }
    return undefined
  }

  /**
   * Names of what was written to under names that are gone by now, or are another's: the kernel tells of the name alone
   * through which it was done.
   */
  async #otherNames(
    objects: ReadonlyMap<string, HintedObjects>,
    observations: ReadonlyMap<string, Observation>,
  ): Promise<readonly NamePlace[]> {
    const handles: FileHandle[] = []
    for (const { directory, name, handles: hinted } of objects.values()) {
      const id = this.#index.byHandle(directory)
      const seen = id === undefined ? undefined : observations.get(keyOf({ directory: id, name }))?.seen
      if (seen === undefined || hinted.size > 1) handles.push(...hinted.values())
    }
    if (handles.length === 0) return []
    const identities = new Set<string>()
    await this.#inParallel(handles, 1024, async (piece) => {
      const { rows } = await this.#run({ do: 'find', handles: piece })
      for (const row of rows) identities.add(new Row(NO_NAME, Buffer.from(row)).identity)
      return []
    })
    for (const { seen } of observations.values()) if (seen !== undefined) identities.delete(seen.identity)
    const places: NamePlace[] = []
    for (const identity of identities) {
      const known = this.#index.namesOf(identity)
      places.push(...known)
      if (known.length > 0) identities.delete(identity)
    }
    return identities.size === 0 ? places : [...places, ...(await this.#index.findSingle(identities))]
  }

  async #look(
    places: readonly NamePlace[],
    forced: ReadonlySet<string>,
    observations: Map<string, Observation>,
  ): Promise<void> {
    const byDirectory = new Map<number, ByteString[]>()
    for (const { directory, name } of places) {
      const names = byDirectory.get(directory)
      if (names === undefined) byDirectory.set(directory, [name])
      else names.push(name)
    }
    const directories: LookDirectory[] = []
    for (const [id, names] of byDirectory) {
      if (id === 0) {
        directories.push({ id, path: '' as TreePath, handle: undefined, identity: '', names })
        continue
      }
      const record = this.#index.directory(id)
      const path = this.#index.pathOf(id)
      // A directory that went in an earlier round takes what was said of its names with it.
      if (record === undefined || path === undefined) continue
      const identity = this.#index.row(record.parent, record.name)?.identity ?? ''
      directories.push({ id, path, handle: record.handle, identity, names })
    }
    await this.#inParallel(directories, 256, async (piece) => {
      const { seen, displaced, failures } = await this.#run({ do: 'look', directories: piece })
      for (const { directory, name, row, handle } of seen) {
        const place = { directory, name }
        const key = keyOf(place)
        observations.set(key, {
          ...place,
          seen: row === undefined ? undefined : new Row(name, Buffer.from(row)),
          handle: handle === undefined ? undefined : { type: handle.type, bytes: Buffer.from(handle.bytes) },
          isForced: forced.has(key),
        })
      }
      for (const id of displaced) {
        const record = this.#index.directory(id)
        if (record !== undefined && record.parent !== 0) this.#add(record.parent, record.name)
      }
      for (const failure of failures) this.#fail(failure)
      return []
    })
  }

  // Things that left their names may have moved into directories that are new.
  async #peek(plan: Plan, forced: ReadonlySet<string>, observations: Map<string, Observation>): Promise<void> {
    const identities = [...plan.leaving]
    for (const { id, parent, name, path } of plan.fresh) {
      const { found } = await this.#run({ do: 'peek', path, identities })
      if (found.length === 0) continue
      const key = keyOf({ directory: parent, name })
      const root = observations.get(key)
      if (root !== undefined) observations.set(key, { ...root, freshId: id })
      const ids = new Map<string, number>([[path, id]])
      for (const { path: at, row, handle, isHit } of found) {
        const slash = at.lastIndexOf('/')
        const directory = ids.get(at.slice(0, slash)) as number
        const seen = new Row(at.slice(slash + 1) as ByteString, Buffer.from(row))
        const place = { directory, name: seen.name }
        const plain = handle && { type: handle.type, bytes: Buffer.from(handle.bytes) }
        const observation = { ...place, seen, handle: plain, isForced: forced.has(keyOf(place)) }
        if (isHit) {
          observations.set(keyOf(place), observation)
          continue
        }
        // It may have moved there from beneath something that went as a whole, where nobody looked for it.
        const knownId = findDirectory(this.#index, seen, plain)
        const freshId = knownId === undefined ? this.#index.takeDirectoryIds(1) : undefined
        ids.set(at, knownId ?? (freshId as number))
        observations.set(keyOf(place), freshId === undefined ? observation : { ...observation, freshId })
      }
    }
  }

  async #carryOut(
    { plan, observations }: { plan: Plan; observations: Map<string, Observation> },
    taken: readonly NamePlace[],
  ): Promise<void> {
    const { first, second, contents, links, metas } = plan
    if (first.length + second.length + contents.length + links.length + metas.length === 0) {
      for (const place of taken) this.#retries.delete(keyOf(place))
      return
    }
    await this.#journal.begin({ first, second, changes: plan.changes, touched: plan.touched })
    const retried = new Set(taken.map(keyOf))
    const moved = new Set<string>()
    let kept: Plan
    try {
      kept = this.#withoutFailed(plan, await this.#operations(first), observations)
      if (needsBarrier(plan)) {
        await this.#barrier()
        await this.#journal.mark('half')
      }
      kept = this.#withoutFailed(kept, await this.#operations(second), observations)
      for (const change of kept.changes) if (change.set === 'row') moved.add(change.row.identity)
      for (const identity of madeDirectories(plan).keys()) moved.delete(identity)
      const changes: IndexChange[] = [...kept.changes]
      const skipped = await this.#sendContents(kept, changes, retried)
      const linkable = kept.links.filter((operation) => operation.do !== 'link' || !skipped.has(operation.to))
      this.#failLinks(await this.#operations(linkable), links)
      await this.#sendMetas(kept, changes)
      await this.#checkpointNow(changes)
      for (const key of retried)
        if (this.#retries.get(key)?.dueAt === Number.POSITIVE_INFINITY) this.#retries.delete(key)
      for (const id of plan.rescans) this.#rescans.add(id)
      this.#relocateQueue(plan)
    } catch (error) {
      // What was sent is not known to be there: it is done again from the journal.
      this.#isBroken = true
      throw error
    }
    // They are in the index by now, as pending, so that a crash does not lose them.
    const roots = kept.fresh
    if (roots.length > 0) await this.#carryFresh(roots, madeDirectories(kept), moved)
  }

  // What a pass has still to carry over may have moved with a directory above it, or gone with it.
  #relocateQueue({ first, second }: Plan): void {
    if (!this.#isPassing) return
    const left = new Set<string>()
    for (const operation of [...first, ...second]) {
      if (operation.do === 'rename') left.add(operation.from)
      else if (operation.do === 'out' || operation.do === 'remove') left.add(operation.path)
    }
    if (left.size === 0) return
    this.#freshQueue = this.#freshQueue.flatMap((queued) => {
      if (!hasAncestorIn(queued.path, left)) return [queued]
      const record = this.#index.directory(queued.id)
      const path = this.#index.pathOf(queued.id)
      return record === undefined || path === undefined
        ? []
        : [{ ...queued, parent: record.parent, name: record.name, path }]
    })
  }

  /** A plan without what depends on operations that failed. */
  #withoutFailed(plan: Plan, failed: readonly NameFailure[], observations: ReadonlyMap<string, Observation>): Plan {
    let kept = plan
    for (const failure of failed) {
      const { path } = failure
      const operation = [...plan.first, ...plan.second].find((one) => pathOf(one) === path)
      const isDirectory = operation?.do === 'directory'
      if (TARGET_WIDE.has(failure.code) || (!isDirectory && operation?.do !== 'remove'))
        throw new BatchFailedError(failure)
      const place = this.#observedAt(plan, path, observations, isDirectory)
      if (place === undefined) throw new BatchFailedError(failure)
      this.#fail({ ...failure, ...place })
      kept = isDirectory ? withoutTree(kept, path, place) : withoutRemoval(kept, place)
    }
    return kept
  }

  #observedAt(
    plan: Plan,
    path: TreePath,
    observations: ReadonlyMap<string, Observation>,
    isNew: boolean,
  ): NamePlace | undefined {
    const fresh = plan.fresh.find((tree) => tree.path === path)
    if (isNew) return fresh && { directory: fresh.parent, name: fresh.name }
    const name = path.slice(path.lastIndexOf('/') + 1)
    return [...observations.values()].find(
      (one) => one.name === name && join(this.#index.pathOf(one.directory), one.name) === path,
    )
  }

  #failLinks(failed: readonly NameFailure[], links: readonly Operation[]): void {
    const [failure] = failed
    if (failure !== undefined && links.length > 0) throw new BatchFailedError(failure)
  }

  /** Runs plain operations in their order, and gives those that failed. */
  async #operations(operations: readonly Operation[]): Promise<NameFailure[]> {
    if (operations.length === 0) return []
    const { failures } = await this.#run({ do: 'operations', operations: operations as never })
    this.#tally.operations += operations.length
    const found = failures.map(({ index, code, message }) => {
      const operation = operations[index] as Operation
      return { directory: 0, name: NO_NAME, path: pathOf(operation), code, message }
    })
    return [...found, ...this.#takeDelivered()]
  }

  #takeDelivered(): NameFailure[] {
    return this.#delivered
      .splice(0)
      .map(({ path, code, message }) => ({ directory: 0, name: NO_NAME, path, code, message }))
  }

  /** Sends contents; gives the paths that were not sent. */
  async #sendContents(plan: Plan, changes: IndexChange[], retried: Set<string>): Promise<ReadonlySet<TreePath>> {
    const skipped = new Set<TreePath>()
    const tasks = [...plan.contents]
    const byPath = new Map(tasks.map((task) => [task.path, task]))
    const byPlace = new Map(tasks.map((task) => [keyOf(task), task]))
    const jobs: (typeof tasks)[] = []
    // A hundred names are a share for each thread, too.
    const most = Math.min(TASKS_PER_JOB, Math.max(TASKS_PER_JOB / 8, Math.ceil(tasks.length / workers.width)))
    let bytes = 0
    for (const task of tasks) {
      const last = jobs.at(-1)
      if (last === undefined || last.length >= most || bytes > JOB_BYTES) {
        jobs.push([task])
        bytes = 0
      } else last.push(task)
      bytes += task.seen.sizeBytes
    }
    await this.#inParallel(jobs.reverse(), 1, async ([job]) => {
      const result = await this.#run({
        do: 'contents',
        tasks: (job as typeof tasks).map((task) => this.#sendTaskOf(task)),
      })
      this.#mergeContents(result, byPlace, changes, retried)
      for (const { path } of result.failures) skipped.add(path)
      for (const { path } of result.again) skipped.add(path)
      return []
    })
    for (const failure of this.#takeDelivered()) {
      const task = byPath.get(failure.path)
      if (task === undefined) throw new BatchFailedError(failure)
      this.#failContent({ ...failure, directory: task.directory, name: task.name }, changes, retried)
      skipped.add(task.path)
    }
    return skipped
  }

  #mergeContents(
    { sent, again, failures, files, bytes }: ContentsResult,
    byPlace: ReadonlyMap<string, Plan['contents'][number]>,
    changes: IndexChange[],
    retried: Set<string>,
  ): void {
    this.#tally.files += files
    this.#tally.bytes += bytes
    for (const { directory, name, row: image, blocks, isUnsettled } of sent) {
      const task = byPlace.get(keyOf({ directory, name }))
      let row = new Row(name, Buffer.from(image))
      const old = task?.row
      if (old?.isFile === true && old.ref !== 0 && blocks === undefined) changes.push({ set: 'no blocks', id: old.ref })
      if (blocks !== undefined) {
        const id = old?.isFile === true && old.ref !== 0 ? old.ref : this.#index.takeBlocksIds(1)
        changes.push({ set: 'blocks', id, hashes: blocks })
        row = row.with({ ref: id })
      }
      for (const place of [{ directory, name }, ...(task?.others ?? [])]) {
        changes.push({ set: 'row', directory: place.directory, row: row.with({ name: place.name }) })
        if (isUnsettled) this.#add(place.directory, place.name)
      }
    }
    for (const { directory, name } of again) {
      const task = byPlace.get(keyOf({ directory, name }))
      for (const place of [{ directory, name }, ...(task?.others ?? [])]) this.#add(place.directory, place.name)
    }
    for (const failure of failures) {
      if (TARGET_WIDE.has(failure.code)) throw new BatchFailedError(failure)
      this.#failContent(failure, changes, retried)
    }
    this.events.emit('progress', this.status)
  }

  // Half of it may have been written where other names see it.
  #failContent(failure: NameFailure, changes: IndexChange[], retried: Set<string>): void {
    if (TARGET_WIDE.has(failure.code)) throw new BatchFailedError(failure)
    const place = { directory: failure.directory, name: failure.name }
    const row = this.#index.row(place.directory, place.name)
    const names = row !== undefined && row.nlink > 1 ? this.#index.namesOf(row.identity) : []
    for (const { directory, name } of row === undefined ? [] : [place, ...names]) {
      const old = this.#index.row(directory, name)
      if (old === undefined || old.isDirectory) continue
      const ref = old.isFile ? { ref: 0 } : {}
      changes.push({ set: 'row', directory, row: old.with({ contentHash: 0n, settled: false, ...ref }) })
    }
    retried.delete(keyOf(place))
    this.#fail(failure)
  }

  #fail(failure: NameFailure): void {
    const key = keyOf(failure)
    const attempts = (this.#retries.get(key)?.attempts ?? 0) + 1
    const waitMs = Math.min(RETRY_MOST_MS, RETRY_FIRST_MS * 2 ** (attempts - 1))
    this.#retries.set(key, { ...failure, attempts, dueAt: performance.now() + waitMs })
    this.events.emit('failure', failure)
  }

  async #sendMetas(plan: Plan, changes: IndexChange[]): Promise<void> {
    await this.#inParallel([...plan.metas].reverse(), 512, async (tasks) => {
      const { rows, again, failures } = await this.#run({ do: 'metas', tasks })
      for (const { id, row, isUnsettled } of rows) {
        const place = this.#placeIn(plan, id)
        if (place === undefined) continue
        changes.push({
          set: 'row',
          directory: place.directory,
          row: new Row(place.name, Buffer.from(row)).with({ ref: id, name: place.name }),
        })
        if (isUnsettled) this.#add(place.directory, place.name)
      }
      for (const id of [...again]) {
        const place = this.#placeIn(plan, id)
        if (place !== undefined) this.#add(place.directory, place.name)
      }
      for (const failure of failures) {
        if (TARGET_WIDE.has(failure.code)) throw new BatchFailedError(failure)
        const place = this.#placeIn(plan, failure.directory)
        if (place !== undefined) this.#fail({ ...failure, ...place })
      }
      return []
    })
    const [failure] = this.#takeDelivered()
    if (failure !== undefined) throw new BatchFailedError(failure)
  }

  /** Where a directory is once the plan is carried out. */
  #placeIn(plan: Plan, id: number): NamePlace | undefined {
    for (const change of plan.changes) {
      if ((change.set === 'place' || change.set === 'new directory') && change.id === id) {
        return { directory: change.parent, name: change.name }
      }
    }
    const record = this.#index.directory(id)
    return record === undefined ? undefined : { directory: record.parent, name: record.name }
  }

  /**
   * Carries over directories, pending in the index, with what is beneath them, with a checkpoint every few seconds. Makes
   * way for changes: then the rest is left in the queue. `isFlat`: what is beneath them is left there in any case.
   */
  async #carryFresh(
    roots: readonly FreshDirectory[],
    known: ReadonlyMap<string, number>,
    moved: ReadonlySet<string>,
    isFlat = false,
  ): Promise<void> {
    try {
      await this.#carryTrees(roots, known, moved, isFlat)
    } catch (error) {
      // What is pending in the index is carried over anew.
      this.#isBroken = true
      this.#carrying = []
      throw error
    }
  }

  async #carryTrees(
    roots: readonly FreshDirectory[],
    known: ReadonlyMap<string, number>,
    moved: ReadonlySet<string>,
    isFlat: boolean,
  ): Promise<void> {
    const changes: IndexChange[] = []
    // Of a directory whose copy is repeated no row is believed; a new one may have rows of what was moved into it.
    const repeated = new Set(moved.size === 0 ? roots.map(({ id }) => id) : [])
    const knownIds = [...known]
    const movedInodes = [...moved]
    const startedAt = performance.now()
    let lastAt = startedAt
    let rowBytes = 0
    let count = DIRECTORY_IDS
    let checkpointing: Promise<void> | undefined
    const queue = [...roots]
    const left: FreshDirectory[] = []
    const carry = async (directories: readonly FreshDirectory[]): Promise<readonly FreshDirectory[]> => {
      const result = await this.#run({
        do: 'fresh',
        directories,
        directoryIds: [this.#index.takeDirectoryIds(count), count],
        blocksIds: [this.#index.takeBlocksIds(BLOCKS_IDS), BLOCKS_IDS],
        known: knownIds,
        moved: movedInodes,
        described: await this.#describe(directories),
        // What is limited is done in small pieces, so that no change waits until a large one is paid for.
        budgetMs: isFlat || this.#request.pace?.isLimited === true ? 0 : FRESH_MS,
        budgetBytes: JOB_BYTES,
      })
      if (result.needsIds > 0) count = Math.max(count, result.needsIds * 2)
      rowBytes += this.#mergeFresh(result, changes, repeated)
      this.events.emit('progress', this.status)
      const isDue = performance.now() - lastAt > this.#request.checkpointMs || rowBytes > CHECKPOINT_ROW_BYTES
      if (isDue && checkpointing === undefined) {
        lastAt = performance.now()
        rowBytes = 0
        checkpointing = this.#checkpointNow(changes.splice(0)).finally(() => {
          checkpointing = undefined
        })
        await checkpointing
      }
      if (!isFlat) return result.rest
      const asked = new Set(directories.map(({ id }) => id))
      left.push(...result.rest.filter(({ id }) => !asked.has(id)))
      return result.rest.filter(({ id }) => asked.has(id))
    }
    // What moves from place to place within a plan is known to this call alone.
    const isEnough = () => !isFlat && moved.size === 0 && (this.#request.isHeld() || this.#isChangeDue(startedAt))
    this.#carrying = queue
    await this.#inParallel(queue, isFlat ? 1 : 64, carry, isEnough)
    this.#carrying = []
    this.#hasYielded ||= queue.length > 0
    await checkpointing
    await this.#checkpointNow(changes)
    this.#freshQueue.push(...left, ...queue)
  }

  /** What the target has in directories that are dirty; `undefined` where the workers see that themselves, or nobody does. */
  async #describe(
    directories: readonly FreshDirectory[],
  ): Promise<readonly (readonly [id: number, files: readonly DescribedFile[]])[] | undefined> {
    const { target, signal } = this.#request
    const dirty = directories.filter(({ isDirty }) => isDirty)
    if (target.describe === undefined || dirty.length === 0) return undefined
    const described = await Promise.all(dirty.map(({ path }) => target.describe?.(path, this.#isAdopted)))
    signal.throwIfAborted()
    if (described.includes(undefined)) return undefined
    return dirty.map(({ id }, index) => [id, described[index] ?? []])
  }

  #mergeFresh(result: FreshResult, changes: IndexChange[], repeated: ReadonlySet<number>): number {
    this.#tally.files += result.files
    this.#tally.bytes += result.bytes
    let rowBytes = 0
    const idByPath = new Map<string, number>()
    const placeById = new Map<number, NamePlace>()
    const piece = ([offset, length]: Piece) => Buffer.from(result.arena.buffer, offset, length)
    for (const { id, parent, name, path, handle, isNew, pages: pieces } of result.directories) {
      idByPath.set(path, id)
      placeById.set(id, { directory: parent, name })
      if (isNew) {
        const plain = handle && { type: handle.type, bytes: Buffer.from(handle.bytes) }
        changes.push({ set: 'new directory', id, parent, name, handle: plain })
      }
      if (pieces === undefined) continue
      const pages = pieces.map(piece)
      for (const page of pages) rowBytes += page.length
      changes.push(
        { set: 'pages', directory: id, pages, keepsOthers: !repeated.has(id) },
        { set: 'pending', id, isPending: false },
      )
    }
    for (const { id, row } of result.rows) {
      const place = placeById.get(id) as NamePlace
      changes.push({
        set: 'row',
        directory: place.directory,
        row: new Row(place.name, piece(row)).with({ ref: id, name: place.name }),
      })
    }
    for (const { id, hashes } of result.blocks) changes.push({ set: 'blocks', id, hashes })
    for (const { directory, name, isForced } of result.again) {
      if (name === DOT) this.#laterRescans.add(directory)
      else {
        const names = this.#later.get(directory)
        if (names === undefined) this.#later.set(directory, new Set([name]))
        else names.add(name)
        if (isForced) this.#forced.add(keyOf({ directory, name }))
      }
    }
    for (const failure of result.failures) {
      if (TARGET_WIDE.has(failure.code)) throw new BatchFailedError(failure)
      this.#fail(failure)
    }
    for (const failure of this.#takeDelivered()) {
      const slash = failure.path.lastIndexOf('/')
      const directory = idByPath.get(slash < 0 ? '' : failure.path.slice(0, slash))
      if (TARGET_WIDE.has(failure.code) || directory === undefined) throw new BatchFailedError(failure)
      const name = failure.path.slice(slash + 1) as ByteString
      changes.push({ set: 'no row', directory, name })
      this.#fail({ ...failure, directory, name })
    }
    return rowBytes
  }

  async #checkpointNow(changes: readonly IndexChange[]): Promise<void> {
    const checkpoint = { root: this.#index.root, sequence: this.#index.sequence + 1 }
    const { files, bytes } = this.#tally
    await this.#barrier(checkpoint)
    await this.#index.commit(changes, checkpoint.sequence)
    await this.#journal.clear()
    this.events.emit('durable', { files, bytes })
  }

  async #barrier(checkpoint?: Checkpoint): Promise<void> {
    await this.#request.target.barrier(checkpoint)
    if (checkpoint !== undefined) this.#checkpoint = checkpoint
  }

  #sendTaskOf(task: Plan['contents'][number]): SendTask {
    const { directory, name, path, seen, row, isShared } = task
    const blocks = row?.isFile === true && row.ref !== 0 ? this.#index.blocks(row.ref) : undefined
    const { identity, isWhiteout } = seen
    return { directory, name, path, identity, isWhiteout, row: row?.image, blocks, isShared }
  }

  readonly #deliver: Deliver = async (lane, batch) => {
    const { target } = this.#request
    await this.#pay(batch.length, 1)
    this.#delivered.push(...(await target.deliver(lane, batch)))
  }

  async #run<K extends Job['do']>(job: Extract<Job, { do: K }>): Promise<JobResults[K]> {
    this.#request.signal.throwIfAborted()
    let paidBytes = 0
    const result = await workers.run<K>(this.#session, job, this.#deliver, (bytes) => {
      paidBytes += bytes
      return this.#pay(bytes, 0)
    })
    // Of what the workers write themselves, the pieces of large files are paid for one by one, all else afterwards: who pays
    // next waits until it is made up for.
    if (this.#request.target.delivery.mode === 'direct') {
      if ('operations' in job) await this.#pay(0, job.operations.length)
      else if (result !== undefined && 'bytes' in result) {
        this.#request.target.wrote?.(result.bytes, result.files)
        await this.#pay(Math.max(0, result.bytes - paidBytes), Math.max(1, result.files))
      }
    }
    return result
  }

  async #pay(bytes: number, operations: number): Promise<void> {
    const { pace, maxLagMs, signal } = this.#request
    await pace?.take(bytes, operations, signal, this.#lagMs > maxLagMs / 2)
  }
}

/** Of some names in a directory, the files; what cannot be looked at counts nothing. */
function sizeOfFiles(upperFd: number, path: TreePath, names: readonly ByteString[]): number {
  try {
    const fd = tryOpenDirectory(upperFd, path)
    if (fd === undefined) return 0
    return withFd(fd, () => {
      let bytes = 0
      for (const name of names) {
        const words = tryRawStatAt(fd, name)
        const row = words && rowOf(name, words)
        if (row?.isFile === true) bytes += row.sizeBytes
      }
      return bytes
    })
  } catch (error) {
    if (errnoOf(error) === undefined) throw error
    return 0
  }
}

/** Where things were to go that could not be taken out of their old places. */
function destinationsOf(batch: UnfinishedBatch, failed: readonly NameFailure[]): TreePath[] {
  const paths = new Set(failed.map(({ path }) => path))
  const stages = new Set(
    batch.first.flatMap((operation) => (operation.do === 'out' && paths.has(operation.path) ? [operation.stage] : [])),
  )
  return batch.second.flatMap((operation) =>
    operation.do === 'in' && stages.has(operation.stage) ? [operation.path] : [],
  )
}

function keyOf({ directory, name }: NamePlace): string {
  return `${directory}/${name}`
}

function pathOf(operation: Operation): TreePath {
  return operation.do === 'rename' ? operation.to : operation.path
}

function join(parent: TreePath | undefined, name: ByteString): string | undefined {
  return parent === undefined ? undefined : parent === '' ? name : `${parent}/${name}`
}

/** Whether a path or one that leads to it is among some. */
function hasAncestorIn(path: string, paths: ReadonlySet<string>): boolean {
  for (let end = path.length; end > 0; end = path.lastIndexOf('/', end - 1))
    if (paths.has(path.slice(0, end))) return true
  return false
}

function isBeneath(path: string, top: string): boolean {
  return path === top || path.startsWith(`${top}/`)
}

/** A plan without a new directory that could not be made, and without what was to be in it. */
function withoutTree(plan: Plan, top: TreePath, place: NamePlace): Plan {
  const gone = new Set(plan.fresh.filter(({ path }) => isBeneath(path, top)).map(({ id }) => id))
  return {
    ...plan,
    fresh: plan.fresh.filter(({ id }) => !gone.has(id)),
    contents: plan.contents.filter(({ path }) => !isBeneath(path, top)),
    links: plan.links.filter((operation) => operation.do !== 'link' || !isBeneath(operation.path, top)),
    metas: plan.metas.filter(({ path }) => !isBeneath(path, top)),
    changes: plan.changes.filter((change) => {
      if (change.set === 'new directory') return !gone.has(change.id)
      if (change.set !== 'row') return true
      return (
        !gone.has(change.directory) && keyOf({ directory: change.directory, name: change.row.name }) !== keyOf(place)
      )
    }),
  }
}

/** A plan in which something that could not be removed is still there. */
function withoutRemoval(plan: Plan, place: NamePlace): Plan {
  const changes: IndexChange[] = []
  for (const change of plan.changes) {
    if (change.set === 'no row' && keyOf(change) === keyOf(place)) continue
    // What is left of it is not known.
    if (change.set === 'no directory') changes.push({ set: 'pending', id: change.id, isPending: true })
    else changes.push(change)
  }
  return { ...plan, changes }
}

/** How long a change time is too young to be told from the next one, in ms. */
export const SETTLE_MS = 35
