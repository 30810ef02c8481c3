import { uptime } from 'node:os'
import { LsyncError, printable } from '@lsync/posix'
import { z } from 'zod'
import { checkRecord, RecordId } from './records.ts'

/** How long a claim stands after its last heartbeat, where nobody says otherwise. */
export const DEFAULT_DURATION_MS = 30_000

/** The claim of one node on a root, as it lies on the store or in etcd. `docs/format.md`, "Leases". */
export const LeaseClaim = z.object({
  format: z.literal(1),
  /** Grows by one or more with each claim, and is never given twice. */
  epoch: z.int().positive(),
  node: z.string().min(1).max(255),
  /** Random; whoever knows it is the holder, also after a restart. */
  token: RecordId,
  /** How long the claim stands after its last heartbeat. */
  durationMs: z.int().positive(),
  /** For people: no decision is made by it, since clocks differ. */
  takenAt: z.string(),
})
export type LeaseClaim = z.infer<typeof LeaseClaim>

/** What is known of a root's newest claim. */
export interface LeaseState {
  readonly claim: LeaseClaim
  /** Given back by its holder, so that others need not wait. */
  readonly isReleased: boolean
  /** The node that it was handed to: that one and the giver may claim next. */
  readonly releasedTo?: string | undefined
}

export interface LeaseRequest {
  /** The name of the claiming node. */
  readonly node: string
  /** The highest epoch that this node has ever seen of the root; a store that shows less went back in time. */
  readonly seenEpoch?: number | undefined
  readonly signal?: AbortSignal | undefined
}

export interface TakeoverRequest extends LeaseRequest {
  /** Without waiting for the claim to expire, and from a store that went back: the operator vouches that the holder is dead. */
  readonly force?: boolean | undefined
}

/** Who may write a root: the same questions whatever keeps the answer, a shared store or etcd. */
export interface Leases {
  /** How long a claim stands after its last heartbeat. */
  readonly durationMs: number
  /** The newest claim; `undefined` before the first. */
  read(signal?: AbortSignal): Promise<LeaseState | undefined>
  /**
   * Claims a root that nobody holds.
   * @throws {LeaseHeldError} when somebody holds it, alive or not, or was faster
   * @throws {StoreWentBackError} when the store shows an older epoch than `seenEpoch`
   */
  acquire(request: LeaseRequest): Promise<Lease>
  /**
   * Claims a root whose holder has been silent for its whole duration, which is watched from beginning to end: no clock of
   * another machine is believed. With `force` at once.
   * @throws {LeaseHeldError} when the holder is alive, or somebody was faster
   * @throws {StoreWentBackError} as `acquire`, unless forced
   */
  takeover(request: TakeoverRequest): Promise<Lease>
  /**
   * Takes up a claim that this node made before, in another process perhaps.
   * @throws {LeaseLostError} when it does not stand any more
   */
  resume(held: { readonly epoch: number; readonly token: string }): Promise<Lease>
  /**
   * Whether what carries this epoch may still be published.
   * @throws {LeaseLostError} when the epoch is not the newest, or was given back
   */
  check(epoch: number, signal?: AbortSignal): Promise<void>
}

/** What a `Lease` asks of where its claim lies. */
export interface LeaseKeeper {
  /** Shows that the holder lives. */
  beat(claim: LeaseClaim): Promise<void>
  /** @throws {LeaseLostError} when the claim is not the newest, not there, or given back */
  assertNewest(claim: LeaseClaim): Promise<void>
  release(claim: LeaseClaim, to: string | undefined): Promise<void>
}

/** Another node has the right to write the root. */
export class LeaseHeldError extends LsyncError {
  readonly state: LeaseState | undefined

  constructor(where: string, state: LeaseState | undefined, why?: string) {
    const { node, epoch } = state?.claim ?? { node: 'another node', epoch: 0 }
    const promised = state?.isReleased === true && state.releasedTo !== undefined
    const who = promised ? `promised to ${printable(state.releasedTo as string)}` : `held by ${printable(node)}`
    super('LEASE_HELD', `${printable(where)} is ${who} (epoch ${epoch})${why === undefined ? '' : `: ${why}`}`, {
      path: where,
      hint: 'stop the container there, or take over once that node is silent (--takeover; --force if it is surely dead)',
    })
    this.state = state
  }
}

/** The right to write was lost: somebody else has claimed the root since, or the claim was given back. */
export class LeaseLostError extends LsyncError {
  constructor(where: string, epoch: number, why: string) {
    super('LEASE_LOST', `epoch ${epoch} of ${printable(where)} may not write any more: ${why}`, {
      path: where,
      hint: 'stop the container on this node, save what it wrote since from its upper, then `lsync root mount --discard`',
    })
  }
}

/** Nobody can say whether the lease still stands: its keeper did not answer for as long as a claim stands. */
export class LeaseUnreachableError extends LsyncError {
  constructor(where: string, cause: unknown) {
    const said = cause instanceof Error ? cause.message : String(cause)
    super('LEASE_UNREACHABLE', `the lease of ${printable(where)} cannot be asked for: ${said}`, {
      path: where,
      hint: 'bring the store (or etcd) back, then try again; nothing is published meanwhile',
      cause,
    })
  }
}

/** The store shows an older state than this node has seen: a backup was restored, or another store is mounted there. */
export class StoreWentBackError extends LsyncError {
  /** `found` and `seen`: what it shows and what it had shown, such as `epoch 3`. */
  constructor(where: string, found: string, seen: string) {
    super(
      'STORE_WENT_BACK',
      `${printable(where)} shows ${found}, but this node has seen ${seen}: its contents are old`,
      {
        path: where,
        hint: 'mount the right store; if it was restored on purpose, take over with --force',
      },
    )
  }
}

/** A claim that cannot be read: damaged, or of a newer lsync. */
export class LeaseDamagedError extends LsyncError {
  constructor(where: string, why: string) {
    super('LEASE_DAMAGED', `the claim ${printable(where)} cannot be read: ${why}`, {
      path: where,
      hint: 'use the newest lsync; if it is damaged, take over with --force',
    })
  }
}

/** Milliseconds of a clock that never jumps, and runs while the machine sleeps (CLOCK_BOOTTIME, to 10 ms). */
export function bootMs(): number {
  return uptime() * 1000
}

/** Heartbeats come three to a duration, so that two may be late. */
const BEATS = 3

/** The right to write one root, until it is given back or lost. */
export class Lease {
  readonly claim: LeaseClaim
  readonly #keeper: LeaseKeeper
  readonly #where: string
  readonly #lost = new AbortController()
  #validUntilMs: number
  #timer: NodeJS.Timeout | undefined
  #beating: Promise<void> = Promise.resolve()
  #isReleased = false

  /** `shownMs` is the `bootMs()` from before the holder last showed that it lives. */
  constructor(keeper: LeaseKeeper, where: string, claim: LeaseClaim, shownMs: number) {
    this.#keeper = keeper
    this.#where = where
    this.claim = claim
    this.#validUntilMs = shownMs + claim.durationMs
  }

  get epoch(): number {
    return this.claim.epoch
  }

  /** Aborted with a `LeaseLostError` once it is known that another node may write. */
  get signal(): AbortSignal {
    return this.#lost.signal
  }

  /** Beats three times a duration until `pause`, `release` or the loss. Does not keep the process alive. */
  keepAlive(): void {
    this.#timer ??= setInterval(() => {
      void this.heartbeat().catch(() => undefined)
    }, this.claim.durationMs / BEATS)
    this.#timer.unref()
  }

  /** Ends `keepAlive`; the claim stands until it expires, for a process that takes it up with `resume`. */
  async pause(): Promise<void> {
    clearInterval(this.#timer)
    this.#timer = undefined
    await this.#beating
  }

  /**
   * Shows that the holder lives, and makes sure that nobody has claimed the root.
   * @throws {LeaseLostError}, {LeaseUnreachableError}
   */
  heartbeat(): Promise<void> {
    // One after the other: two that write one file at once could disturb each other.
    const beat = this.#beating.then(() => this.#beat())
    this.#beating = beat.catch(() => undefined)
    return beat
  }

  async #beat(): Promise<void> {
    this.#assertHeld()
    const startedMs = bootMs()
    try {
      // In this order: whoever takes over claims first and looks for a beat after that. One of the two sees the other.
      const failure: unknown = await this.#keeper.beat(this.claim).catch((cause: unknown) => cause)
      await this.#keeper.assertNewest(this.claim)
      if (failure !== undefined) throw failure
      this.#validUntilMs = startedMs + this.claim.durationMs
    } catch (cause) {
      this.#fail(cause)
    }
  }

  /**
   * To be called right before anything is published: the claim stands, and still will for a moment. A node that slept or was
   * cut off finds out here.
   * @throws {LeaseLostError}, {LeaseUnreachableError}
   */
  async check(): Promise<void> {
    this.#assertHeld()
    if (this.#validUntilMs - bootMs() < (this.claim.durationMs * (BEATS - 1)) / BEATS) return this.heartbeat()
    try {
      await this.#keeper.assertNewest(this.claim)
    } catch (cause) {
      this.#fail(cause)
    }
  }

  /** Gives the right back; `to` hands it to one node. A second time does nothing. */
  async release({ to }: { readonly to?: string | undefined } = {}): Promise<void> {
    await this.pause()
    if (this.#isReleased) return
    await this.#keeper.assertNewest(this.claim)
    await this.#keeper.release(this.claim, to)
    this.#isReleased = true
  }

  #assertHeld(): void {
    this.#lost.signal.throwIfAborted()
    if (this.#isReleased) throw new LeaseLostError(this.#where, this.epoch, 'it was given back')
  }

  #fail(cause: unknown): never {
    // A keeper that does not answer may do so again, and until somebody else claims the root the claim can be shown anew.
    if (!(cause instanceof LeaseLostError)) throw cause
    clearInterval(this.#timer)
    this.#lost.abort(cause)
    throw cause
  }
}

/** `claim` as a new claim after `state`; checked against what the node has seen. */
export function nextClaim(
  where: string,
  state: LeaseState | undefined,
  request: TakeoverRequest,
  durationMs: number,
  token: string,
): LeaseClaim {
  const found = state?.claim.epoch ?? 0
  const seen = request.seenEpoch ?? 0
  if (found < seen && request.force !== true) throw new StoreWentBackError(where, `epoch ${found}`, `epoch ${seen}`)
  const takenAt = new Date().toISOString()
  return { format: 1, epoch: Math.max(found, seen) + 1, node: request.node, token, durationMs, takenAt }
}

/** What stands for a claim that cannot be read, for whoever goes on after it by force. */
export function unreadableState(epoch: number, durationMs: number): LeaseState {
  const claim = { format: 1, epoch, node: 'unknown', token: '0'.repeat(32), durationMs, takenAt: '' } as const
  return { claim, isReleased: false }
}

/** Whether `node` may claim the root without waiting for anybody. */
export function isFreeFor(state: LeaseState | undefined, node: string): boolean {
  if (state === undefined) return true
  const { isReleased, releasedTo, claim } = state
  // The giver of a lease that nobody took may have it back: a new claim is exclusive, so only one of the two gets it.
  return isReleased && (releasedTo === undefined || releasedTo === node || claim.node === node)
}

/** Reads a claim. @throws {LeaseDamagedError} */
export function parseClaim(text: string, where: string): LeaseClaim {
  const found = checkRecord(LeaseClaim, text)
  if ('record' in found) return found.record
  throw new LeaseDamagedError(where, 'why' in found ? found.why : `its format ${found.newerFormat} is newer`)
}
