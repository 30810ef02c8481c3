import { EventEmitter } from 'node:events'
import { randomHex } from '@lsync/posix'
import type { LastDelta } from './last-delta.ts'
import { SwitchFailedError, SwitchRefusedError } from './switch-errors.ts'
import type { SwitchPeer } from './switch-peer.ts'
import type { SwitchPlan } from './switch-record.ts'
import type { PreCopyRound, SideCheck } from './switch-side.ts'

/** A phase of a switch, as it ends. */
export interface SwitchPhaseReport {
  readonly phase: 'check' | 'before' | 'pre-copy' | 'stop' | 'pass' | 'mount' | 'start' | 'health' | 'commit' | 'after'
  readonly node: string
  readonly durationMs: number
  readonly files?: number
  readonly bytes?: number
  /** `stop`: the size of the sealed layer that the last changes travelled as, if they did. */
  readonly sealedBytes?: number
  /** The parts of `stop`: the hook, unmounting, the last delta, publishing. */
  readonly steps?: readonly { readonly step: string; readonly durationMs: number }[]
  /** What a hook wrote. */
  readonly output?: string
}

export interface SwitchReport {
  readonly id: string
  readonly from: string
  readonly to: string
  /** The version that the container began with on the target; absent for a dry run. */
  readonly version?: number
  readonly phases: readonly SwitchPhaseReport[]
  readonly rounds: readonly PreCopyRound[]
  /** From the moment before the stop hook until the health hook was content; absent for a dry run. */
  readonly downtimeMs?: number
  readonly isDryRun: boolean
}

export interface SwitchRequest {
  /** The root's name, for messages. */
  readonly name: string
  readonly source: SwitchPeer
  readonly target: SwitchPeer
  /** How long the container may stand still, by what is predicted before it is stopped. Default 2 s. */
  readonly maxDowntimeMs?: number | undefined
  /** How what changed last travels. Default `auto`: as a sealed layer where that is quicker and the target can mount one. */
  readonly lastDelta?: LastDelta | undefined
  /** Look at both ends, and stop before anything is changed. */
  readonly dryRun?: boolean | undefined
  readonly events?: EventEmitter<SwitchEvents> | undefined
  /** Ends it as long as the container was not stopped; from then on it comes to its end. */
  readonly signal?: AbortSignal | undefined
}

export interface SwitchEvents {
  phase: [SwitchPhaseReport]
  /** Something went wrong that does not end it. */
  problem: [Error]
}

const DEFAULT_DOWNTIME_MS = 2000

/**
 * Moves a root's container from one node to another. What it wrote is carried over while it runs; then it is stopped, the rest is
 * published as a version, the right to write passes, and it is started on the target. If anything fails before the target
 * commits, it runs on the source again.
 * @throws {SwitchRefusedError}, {SwitchTooSlowError} before it was stopped; {SwitchFailedError} after that, which says where it runs
 */
export async function switchRoot(request: SwitchRequest): Promise<SwitchReport> {
  return await new Switch(request).run()
}

class Switch {
  readonly #request: SwitchRequest
  readonly #events: EventEmitter<SwitchEvents>
  readonly #phases: SwitchPhaseReport[] = []

  constructor(request: SwitchRequest) {
    this.#request = request
    this.#events = request.events ?? new EventEmitter<SwitchEvents>()
  }

  async run(): Promise<SwitchReport> {
    const { source, target, maxDowntimeMs = DEFAULT_DOWNTIME_MS, signal } = this.#request
    const [from, to] = await this.#timed('check', 'both', () =>
      Promise.all([source.ask('check', {}, signal), target.ask('check', {}, signal)]),
    )
    this.#assertPossible(from, to)
    const plan: SwitchPlan = { format: 1, id: randomHex(16), from: endOf(from), to: endOf(to) }
    const common = { id: plan.id, from: from.name, to: to.name, phases: this.#phases }
    if (this.#request.dryRun === true) return { ...common, rounds: [], isDryRun: true }
    await this.#hook(source, from, 'before', signal)
    await this.#hook(target, to, 'before', signal)
    const lastDelta = to.mountsSealed ? (this.#request.lastDelta ?? 'auto') : 'tree'
    const rounds = await this.#timed('pre-copy', from.name, () =>
      source.ask('preCopy', { maxDowntimeMs, lastDelta }, signal),
    )
    signal?.throwIfAborted()
    const stopped = await this.#stop(plan, from)
    const startMs = performance.now() - stopped.sinceStopMs
    await this.#takeTo(plan, to)
    const downtimeMs = performance.now() - startMs
    await this.#commit(plan, to)
    // It is over; what these say is told, and changes nothing.
    for (const [peer, end] of [[source, from] as const, [target, to] as const]) {
      await this.#hook(peer, end, 'after').catch((error: unknown) => this.#tell(error))
    }
    return { ...common, rounds, version: stopped.version, downtimeMs, isDryRun: false }
  }

  #assertPossible(from: SideCheck, to: SideCheck): void {
    const { name } = this.#request
    const refuse = (why: string, hint: string) => new SwitchRefusedError(name, why, hint)
    if (from.nodeId === to.nodeId)
      throw refuse('both ends are the same node', 'name another node, or another --remote-state')
    if (from.rootId !== to.rootId) {
      throw refuse(`the home on ${to.name} is that of another root`, 'mount the same store there, or name the home')
    }
    if (!from.isMounted)
      throw refuse(`it is not mounted on ${from.name}`, 'mount it there, or start from the other node')
    if (to.obstacle !== undefined)
      throw refuse(`${to.name} cannot take it: ${to.obstacle}`, 'put that right, then try again')
    if (this.#request.lastDelta === 'sealed' && !to.mountsSealed) {
      throw refuse(`${to.name} cannot mount sealed layers of this home`, 'leave out --last-delta; they need Linux 6.15')
    }
    if (!to.hooks.includes('start') && from.hooks.includes('stop')) {
      throw refuse(`${to.name} has no start hook`, 'set one there: lsync hooks NAME')
    }
    // Two nodes that see the store at different moments would not see the same version.
    if (to.head !== from.head)
      throw refuse(`the nodes see other versions (${from.head} and ${to.head})`, 'see that both mount the same store')
  }

  async #stop(plan: SwitchPlan, from: SideCheck) {
    const startMs = performance.now()
    try {
      const stopped = await this.#request.source.ask('stop', plan)
      const { steps, files, bytes, sealedBytes } = stopped
      const durationMs = performance.now() - startMs
      const sealed = sealedBytes === undefined ? {} : { sealedBytes }
      this.#ended({ phase: 'stop', node: from.name, durationMs, steps, files, bytes, ...sealed })
      await this.#timed('pass', from.name, () => this.#request.source.ask('pass', plan))
      return stopped
    } catch (error) {
      // The source has brought it back, or does so now.
      throw await this.#failure(plan, 'stop', error)
    }
  }

  async #takeTo(plan: SwitchPlan, to: SideCheck): Promise<void> {
    const { target } = this.#request
    let phase: SwitchPhaseReport['phase'] = 'mount'
    try {
      await this.#timed('mount', to.name, () => target.ask('mount', plan))
      phase = 'start'
      await this.#hook(target, to, 'start')
      phase = 'health'
      await this.#hook(target, to, 'health')
    } catch (error) {
      await this.#undoOn(to)
      throw await this.#failure(plan, phase, error)
    }
  }

  async #commit(plan: SwitchPlan, to: SideCheck): Promise<void> {
    try {
      await this.#timed('commit', to.name, () => this.#request.target.ask('commit', plan))
    } catch (error) {
      // It may have been written all the same: the source finds out.
      const failure = await this.#failure(plan, 'commit', error)
      if (failure.runsOn !== 'target') throw failure
      this.#tell(error)
    }
  }

  /** Asks the target to give the root back. Where it cannot be asked, it does so by itself, or is waited for. */
  async #undoOn(to: SideCheck): Promise<void> {
    try {
      await this.#request.target.ask('undo', {})
    } catch (error) {
      this.#tell(new Error(`${to.name} could not be asked to give the root back: ${(error as Error).message}`))
    }
  }

  /** Has the source settle it, and says what came of that. */
  async #failure(plan: SwitchPlan, phase: string, cause: unknown): Promise<SwitchFailedError> {
    try {
      const { runsOn } = await this.#request.source.ask('settle', { id: plan.id })
      return new SwitchFailedError(this.#request.name, phase, runsOn, cause)
    } catch (error) {
      this.#tell(error)
      return new SwitchFailedError(this.#request.name, phase, 'unknown', cause)
    }
  }

  async #hook(
    peer: SwitchPeer,
    end: SideCheck,
    name: 'before' | 'start' | 'health' | 'after',
    signal?: AbortSignal,
  ): Promise<void> {
    if (!end.hooks.includes(name)) return
    const startMs = performance.now()
    const outcome = await peer.ask('hook', { name, reason: 'switch' }, signal)
    this.#ended({ phase: name, node: end.name, durationMs: performance.now() - startMs, output: outcome?.output ?? '' })
  }

  async #timed<T>(phase: SwitchPhaseReport['phase'], node: string, work: () => Promise<T>): Promise<T> {
    const startMs = performance.now()
    const result = await work()
    this.#ended({ phase, node, durationMs: performance.now() - startMs })
    return result
  }

  #ended(phase: SwitchPhaseReport): void {
    this.#phases.push(phase)
    this.#events.emit('phase', phase)
  }

  #tell(problem: unknown): void {
    this.#events.emit('problem', problem instanceof Error ? problem : new Error(String(problem)))
  }
}

function endOf({ nodeId, name, lease }: SideCheck): SwitchPlan['from'] {
  return { nodeId, name, lease }
}
