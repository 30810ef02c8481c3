import { createHash } from 'node:crypto'
import { EventEmitter } from 'node:events'
import { setTimeout as delay } from 'node:timers/promises'
import type { Namespace } from '@lsync/overlay-merge'
import { bytesOf, close, type HostPath, LsyncError, openRoot, realPath, textOf } from '@lsync/posix'
import PQueue from 'p-queue'
import type { Differences } from './differences.ts'
import { compilePatterns } from './filter.ts'
import { mappedFiles } from './mapped-files.ts'
import type { Checkpoint } from './model/checkpoint.ts'
import { DEFAULT_PRESSURE, Pace } from './pace.ts'
import { openSource } from './source/choose.ts'
import type { BlindSpot, Source } from './source/source.ts'
import { Sweep } from './sweep.ts'
import { SETTLE_MS, TargetSession, type TargetStatus } from './target-session.ts'
import { LocalTarget } from './transport/local.ts'
import type { Target } from './transport/target.ts'
import type { NameFailure } from './work.ts'

/** A sync was asked for something while it ends, or has ended. */
export class SyncStoppedError extends LsyncError {
  constructor() {
    super('SYNC_STOPPED', 'this sync has been stopped', { hint: 'start it again' })
  }
}

/** What was asked for cannot be done. */
export class SyncRequestError extends LsyncError {
  constructor(message: string, hint: string) {
    super('SYNC_REQUEST_INVALID', message, { hint })
  }
}

export interface SyncRequest {
  /** The upper to follow: a directory. */
  readonly source: HostPath
  /** Where to: directories of this machine by their paths, or opened otherwise (`remoteTarget`). */
  readonly targets: readonly (HostPath | Target)[]
  /** Holds index and journal of each target; outside of the upper. Default `defaultStateDir(source)`. */
  readonly stateDir?: string
  /** Whose marks tell what is tied to this node. Default `trusted`. */
  readonly namespace?: Namespace
  /** How long after the first change what has changed is to be durable, as far as carrying it over is quick. Default 1000. */
  readonly tickMs?: number
  /**
   * How long a change may wait in any case, in ms: a first pass makes way for it before that, and nobody is spared by
   * backing off any more. What waits longer is told by a `lag` event. Default 5000, or five ticks if they are longer.
   */
  readonly maxLagMs?: number
  /** How long the slow walk in the background takes that looks for what nothing told of, in ms; 0: none. Default a day. */
  readonly sweepMs?: number
  readonly include?: readonly string[]
  readonly exclude?: readonly string[]
  readonly bytesPerSecond?: number
  readonly operationsPerSecond?: number
  /** Slow down while others wait for the disks. Default true. */
  readonly heedsPressure?: boolean
  readonly sourceChoice?: 'auto' | Source['kind']
  readonly pollIntervalMs?: number
  /**
   * Bounds the kernel's memory for events to what fs.fanotify.max_queued_events allows; a burst beyond that costs a
   * comparison of the whole upper. Default false.
   */
  readonly boundedQueue?: boolean
  /** How often a long pass stores a checkpoint: what lies after it is repeated after a crash. Default 5000. */
  readonly checkpointMs?: number
  /** No source is opened: changes are found by comparing when `flush` asks for it. */
  readonly once?: boolean
  /** What a target holds besides the copy of this upper may go. Default false. */
  readonly adopt?: boolean
  readonly signal?: AbortSignal
}

export interface SyncStatus {
  readonly source: HostPath
  readonly isPaused: boolean
  readonly watch: Source['kind'] | 'none'
  readonly blindSpots: readonly BlindSpot[]
  readonly targets: readonly TargetStatus[]
}

export interface FlushOptions {
  /** Compare the whole upper with the index as well: for a container that was stopped. */
  readonly sweep?: boolean
  /** Rounds at most for what changes while it is read, or is found by what was found. Default 20. */
  readonly rounds?: number
}

export interface FlushReport {
  readonly checkpoints: readonly (Checkpoint | undefined)[]
  /** Something was still being written when it was read last; it is carried over once more. */
  readonly isSettled: boolean
  readonly failures: TargetStatus['failures']
}

interface SyncEvents {
  progress: [TargetStatus]
  /** Everything that was known before is durable at this target. */
  checkpoint: [{ readonly target: string; readonly sequence: number; readonly names: number; readonly tookMs: number }]
  /** So much of what was sent to this target since the start is durable, in the middle of a pass, too. */
  durable: [{ readonly target: string; readonly files: number; readonly bytes: number }]
  /** One name could not be carried over; it is tried again. */
  failure: [NameFailure & { readonly target: string }]
  /** A change waits for longer than `maxLagMs` (`isLate`), or none does any more. */
  lag: [{ readonly target: string; readonly lagMs: number; readonly isLate: boolean }]
  /** A target as a whole does not work; it is tried again. */
  problem: [{ readonly target: string; readonly error: Error }]
}

const TICK_MS = 1000
const MAX_LAG_MS = 5000
const CHECKPOINT_MS = 5000
const SWEEP_MS = 86_400_000
const SWEPT_PER_SECOND = 200
const POLL_MS = 10_000
const LAG_LOOK_MS = 250
const BACK_OFF_FIRST_MS = 1000
const BACK_OFF_MOST_MS = 30_000
const FLUSH_ROUNDS = 20
const LAST_ROUND_MS = 10_000

/**
 * Where a sync keeps what it knows of an upper: /var/lib/lsync/sync for root, else in $XDG_STATE_HOME (~/.local/state),
 * in a directory that is named after the upper's path.
 */
export function defaultStateDir(source: HostPath): string {
  const path = realPath(source)
  const id = createHash('sha256').update(path, 'latin1').digest('hex').slice(0, 16)
  const { XDG_STATE_HOME: state, HOME: home } = process.env
  const base = process.geteuid?.() === 0 ? '/var/lib' : (state ?? `${home ?? '/tmp'}/.local/state`)
  return `${base}/lsync/sync/${id}`
}

/** Where, within the state directory of an upper, index and journal of one target are. */
export function targetStateDir(stateDir: string, { description }: Pick<Target, 'description'>): string {
  return `${stateDir}/targets/${createHash('sha256').update(description).digest('hex').slice(0, 16)}`
}

/**
 * Follows an upper and carries its changes to targets. Resolves when all targets are open and changes are seen; the
 * first pass goes on meanwhile.
 * @throws {SyncRequestError}, and what opening a target or a source throws
 */
export async function openSync(request: SyncRequest): Promise<Sync> {
  const sync = new Sync(request)
  try {
    await sync.open()
    return sync
  } catch (error) {
    await sync.stop({ flush: false })
    throw error
  }
}

interface Member {
  readonly session: TargetSession
  /** Rounds of one target, one after the other; those of others do not wait for them. */
  readonly queue: PQueue
  /** What the queue does now; it goes on for a moment when the queue has given it up. */
  running: Promise<unknown>
  timer: NodeJS.Timeout | undefined
  /** Looks whether a change waits for too long. */
  lagTimer: NodeJS.Timeout | undefined
  isLate: boolean
  failedRounds: number
  readonly target: string
}

/** A running sync. */
export class Sync {
  readonly events = new EventEmitter<SyncEvents>()
  readonly #request: SyncRequest
  readonly #abort = new AbortController()
  readonly #members: Member[] = []
  #upperFd: number | undefined
  #source: Source | undefined
  #isPaused = false
  #isStopped = false
  /** Barriers that somebody waits for, paused or not. */
  #flushes = 0
  #isEnding = false
  #stopping: Promise<void> | undefined

  constructor(request: SyncRequest) {
    this.#request = request
    compilePatterns(this.#patterns)
    if (request.targets.length === 0) throw new SyncRequestError('a sync needs a target', 'name one')
    if ((request.include?.length ?? 0) > 0 && (request.exclude?.length ?? 0) === 0) {
      throw new SyncRequestError('what is included is an exception from what is excluded', 'say what is excluded')
    }
    if (this.#maxLagMs < this.#tickMs) {
      throw new SyncRequestError('changes are collected for longer than they may wait', 'name a shorter tick')
    }
  }

  async open(): Promise<void> {
    const { source, signal } = this.#request
    signal?.throwIfAborted()
    signal?.addEventListener('abort', () => void this.stop({ flush: false }).catch(() => undefined), { once: true })
    const upperFd = openRoot(source)
    this.#upperFd = upperFd
    this.#checkPlaces()
    for (const target of this.#request.targets) await this.#openTarget(target, upperFd)
    if (this.#request.once !== true) {
      this.#source = openSource({
        root: source,
        rootFd: upperFd,
        choice: this.#request.sourceChoice ?? 'auto',
        pollIntervalMs: this.#request.pollIntervalMs ?? POLL_MS,
        boundedQueue: this.#request.boundedQueue ?? false,
      })
      await this.#source.start((hint) => {
        for (const member of this.#members) {
          member.session.hint(hint)
          this.#schedule(member)
          this.#watchLag(member)
        }
      })
      const sweepMs = this.#request.sweepMs ?? SWEEP_MS
      for (const member of this.#members) {
        if (sweepMs > 0) this.#sweep(member, sweepMs)
        this.#runNow(member)
      }
    }
  }

  /**
   * Resolves when everything that happened before the call is durable at all targets, files that processes have mapped
   * included.
   */
  async flush(options: FlushOptions = {}): Promise<FlushReport> {
    if (this.#isStopped) throw new SyncStoppedError()
    this.#flushes++
    try {
      return await this.#flush(options)
    } finally {
      this.#flushes--
    }
  }

  async #flush({ sweep = false, rounds = FLUSH_ROUNDS }: FlushOptions): Promise<FlushReport> {
    const mapped = mappedFiles(this.#request.source)
    let isSettled = true
    for (let round = 0; round < rounds; round++) {
      await this.#source?.drain()
      for (const { session } of this.#members) {
        if (round === 0) session.suspect(mapped)
        if (round === 0 && (sweep || this.#request.once === true)) session.scan()
      }
      const results = await Promise.all(this.#members.map((member) => this.#round(member)))
      isSettled = results.every((result) => result)
      if (isSettled) break
      await delay(SETTLE_MS)
    }
    const statuses = this.#members.map(({ session }) => session.status)
    return {
      checkpoints: statuses.map(({ checkpoint }) => checkpoint),
      isSettled,
      failures: statuses.flatMap(({ failures }) => failures),
    }
  }

  /**
   * What the upper has otherwise than the first target, by a comparison of all of it that sends nothing. For an upper that nobody writes
   * to, and a sync that is paused: what is carried over later is not in it. `undefined` where it is not known what the target has.
   */
  async differences(): Promise<Differences | undefined> {
    if (this.#isStopped) throw new SyncStoppedError()
    const member = this.#members[0] as Member
    await this.#source?.drain()
    return await member.queue.add(() => track(member, member.session.differences()), { signal: this.#abort.signal })
  }

  /** What is known to have changed and is not at the first target yet, without a comparison. */
  async pending(): Promise<{ readonly names: number; readonly bytes: number }> {
    await this.#source?.drain()
    return (this.#members[0] as Member).session.pending
  }

  /** Stops carrying over, in the middle of a pass, too, unless for a `flush`; changes are collected meanwhile. */
  pause(): void {
    this.#isPaused = true
    for (const member of this.#members) {
      clearTimeout(member.timer)
      member.timer = undefined
    }
  }

  resume(): void {
    this.#isPaused = false
    for (const member of this.#members) this.#runNow(member)
  }

  get status(): SyncStatus {
    return {
      source: this.#request.source,
      isPaused: this.#isPaused,
      watch: this.#source?.kind ?? 'none',
      blindSpots: this.#source?.blindSpots ?? [],
      targets: this.#members.map(({ session }) => session.status),
    }
  }

  /**
   * Ends the sync, with a last barrier before if so wished: for all that changed. A first pass is not brought to its end for
   * that; it stops at a checkpoint and goes on at the next start, which also finds what was not carried over.
   */
  stop(options: { readonly flush?: boolean } = {}): Promise<void> {
    this.#stopping ??= this.#stop(options.flush === true)
    return this.#stopping
  }

  async #stop(flush: boolean): Promise<void> {
    this.#isEnding = true
    try {
      if (flush) await this.flush()
    } finally {
      this.#isStopped = true
      for (const member of this.#members) {
        clearTimeout(member.timer)
        clearTimeout(member.lagTimer)
        member.queue.clear()
      }
      this.#abort.abort(new SyncStoppedError())
      await this.#source?.stop()
      await Promise.allSettled(this.#members.map(({ queue }) => queue.onIdle()))
      // A round uses descriptors that are closed next. On a dead line it may never end: then closing the target ends it.
      const rounds = Promise.allSettled(this.#members.map(({ running }) => running))
      await Promise.race([rounds, delay(LAST_ROUND_MS, undefined, { ref: false })])
      await Promise.all(this.#members.map(({ session }) => session.close()))
      if (this.#upperFd !== undefined) close(this.#upperFd)
      this.#upperFd = undefined
    }
  }

  get #patterns() {
    return { include: this.#request.include ?? [], exclude: this.#request.exclude ?? [] }
  }

  // Index and journal inside the upper would be carried over with it, and never come to rest.
  #checkPlaces(): void {
    const { source } = this.#request
    const root = realPath(source)
    const stateDir = bytesOf(this.#stateDir)
    if (isWithin(stateDir, root)) {
      throw new SyncRequestError(`${this.#stateDir} lies in the upper`, 'name a state directory outside of it')
    }
    for (const target of this.#request.targets) {
      if (typeof target === 'string' && (isWithin(target, root) || isWithin(root, target))) {
        throw new SyncRequestError(`${textOf(target)} and the upper lie in one another`, 'name separate directories')
      }
    }
  }

  get #tickMs(): number {
    return this.#request.tickMs ?? TICK_MS
  }

  get #maxLagMs(): number {
    return this.#request.maxLagMs ?? Math.max(MAX_LAG_MS, 5 * this.#tickMs)
  }

  get #stateDir(): string {
    return this.#request.stateDir ?? defaultStateDir(this.#request.source)
  }

  async #openTarget(given: HostPath | Target, upperFd: number): Promise<void> {
    const { source, bytesPerSecond, operationsPerSecond, heedsPressure = true, namespace, adopt } = this.#request
    const target = typeof given === 'string' ? new LocalTarget(given) : given
    const limits = {
      ...(bytesPerSecond === undefined ? {} : { bytesPerSecond }),
      ...(operationsPerSecond === undefined ? {} : { operationsPerSecond }),
      ...(heedsPressure ? { pressure: DEFAULT_PRESSURE } : {}),
    }
    const session = new TargetSession({
      upperPath: source,
      upperFd,
      target,
      stateDir: targetStateDir(this.#stateDir, target),
      namespace: namespace ?? 'trusted',
      patterns: this.#patterns,
      adopt: adopt === true,
      pace: new Pace(limits),
      checkpointMs: this.#request.checkpointMs ?? CHECKPOINT_MS,
      tickMs: this.#tickMs,
      maxLagMs: this.#maxLagMs,
      isHeld: () => this.#isEnding || (this.#isPaused && this.#flushes === 0),
      signal: this.#abort.signal,
    })
    const { description } = target
    session.events.on('progress', (status) => this.events.emit('progress', status))
    session.events.on('checkpoint', ({ sequence, names, tookMs }) =>
      this.events.emit('checkpoint', { target: description, sequence, names, tookMs }),
    )
    session.events.on('durable', (sent) => this.events.emit('durable', { ...sent, target: description }))
    session.events.on('failure', (failure) => this.events.emit('failure', { ...failure, target: description }))
    this.#members.push({
      session,
      queue: new PQueue({ concurrency: 1 }),
      running: Promise.resolve(),
      timer: undefined,
      lagTimer: undefined,
      isLate: false,
      failedRounds: 0,
      target: description,
    })
    await session.open()
  }

  #sweep(member: Member, periodMs: number): void {
    const { session, queue } = member
    const { signal } = this.#abort
    const look = async (ids: readonly number[]): Promise<void> => {
      await queue.add(() => track(member, session.tree.look(ids)), { signal })
      if (session.hasWork) this.#schedule(member)
    }
    const sweep = new Sweep({ periodMs, directoriesPerSecond: SWEPT_PER_SECOND }, { ...session.tree, look })
    sweep.run(signal).catch((error: unknown) => this.#tell(member, error))
  }

  #tell(member: Member, error: unknown): void {
    if (this.#isStopped) return
    const problem = error instanceof Error ? error : new Error(String(error))
    this.events.emit('problem', { target: member.target, error: problem })
  }

  // Without a change, no timer runs.
  #watchLag(member: Member, afterMs = this.#maxLagMs): void {
    if (this.#isStopped || member.lagTimer !== undefined) return
    member.lagTimer = setTimeout(() => {
      member.lagTimer = undefined
      const { lagMs, isLate } = member.session.status
      // Who has paused it knows.
      if (!this.#isPaused && isLate !== member.isLate) {
        member.isLate = isLate
        this.events.emit('lag', { target: member.target, lagMs, isLate })
      }
      if (isLate) this.#watchLag(member, LAG_LOOK_MS)
      else if (lagMs > 0) this.#watchLag(member, Math.max(LAG_LOOK_MS, this.#maxLagMs - lagMs + 1))
    }, afterMs)
    member.lagTimer.unref()
  }

  #schedule(member: Member, afterMs = member.session.collectMs): void {
    if (this.#isPaused || this.#isStopped || member.timer !== undefined) return
    member.timer = setTimeout(() => {
      member.timer = undefined
      this.#runNow(member)
    }, afterMs)
  }

  #runNow(member: Member): void {
    if (this.#isPaused || this.#isStopped || member.queue.size > 0) return
    this.#round(member).catch((error: unknown) => this.#tell(member, error))
  }

  /** One round of one target. A target that does not work is tried again later and later. */
  async #round(member: Member): Promise<boolean> {
    const { session, queue } = member
    try {
      const { isSettled } = await queue.add(() => track(member, session.round()), { signal: this.#abort.signal })
      member.failedRounds = 0
      if (session.hasWork) this.#schedule(member)
      else if (session.retryInMs !== undefined) this.#schedule(member, session.retryInMs)
      return isSettled
    } catch (error) {
      const waitMs = Math.min(BACK_OFF_MOST_MS, BACK_OFF_FIRST_MS * 2 ** member.failedRounds++)
      this.#schedule(member, waitMs)
      throw error
    }
  }
}

function track<T>(member: Member, work: Promise<T>): Promise<T> {
  member.running = work
  return work
}

function isWithin(path: string, directory: string): boolean {
  return path === directory || path.startsWith(directory === '/' ? '/' : `${directory}/`)
}
