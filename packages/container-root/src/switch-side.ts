import { setTimeout as delay } from 'node:timers/promises'
import { probe } from '@lsync/posix'
import type { Sync } from '@lsync/sync'
import { z } from 'zod'
import type { ContainerRoot } from './container-root.ts'
import { leaseNameOf } from './context.ts'
import { type HookName, type HookReport, runHook } from './hooks.ts'
import { type Changed, type LastDelta, predict, ratesOf } from './last-delta.ts'
import { isFreeFor, LeaseHeldError, LeaseLostError } from './lease.ts'
import { mountsSealed } from './mounts-sealed.ts'
import { readHooks } from './root-hooks.ts'
import { canSeal, SealToolMissingError } from './sealed-layer.ts'
import { smallFileMs } from './store-form.ts'
import { SwitchTooSlowError, SwitchUnknownError } from './switch-errors.ts'
import { readSwitch, SwitchPhase, type SwitchPlan, type SwitchRecord, writeSwitch } from './switch-record.ts'

/** What one end says of itself before anything is changed. */
export const SideCheck = z.object({
  nodeId: z.string(),
  name: z.string(),
  lease: z.string(),
  rootId: z.string(),
  head: z.number(),
  isMounted: z.boolean(),
  hasChanges: z.boolean(),
  hooks: z.array(z.string()),
  /** Whether it could mount a sealed layer of the home. */
  mountsSealed: z.boolean(),
  /** Why this node could not be the target; absent if it could. */
  obstacle: z.string().optional(),
})
export type SideCheck = z.infer<typeof SideCheck>

/** One pass over what had changed while the container ran. */
export const PreCopyRound = z.object({
  durationMs: z.number(),
  files: z.number(),
  bytes: z.number(),
  /** What had changed since it began, and for how long the container would have stood still after it. */
  left: z.object({ names: z.number(), bytes: z.number() }),
  predictedMs: z.number(),
})
export type PreCopyRound = z.infer<typeof PreCopyRound>

export const StopReport = z.object({
  version: z.number(),
  /** From the moment before the stop hook until now. */
  sinceStopMs: z.number(),
  /** The steps in it, in the order in which they came. */
  steps: z.array(z.object({ step: z.string(), durationMs: z.number() })),
  /** What was carried over since the container was stopped. */
  files: z.number(),
  bytes: z.number(),
  /** The size of the sealed layer that it travelled as, if it did. */
  sealedBytes: z.number().optional(),
})
export type StopReport = z.infer<typeof StopReport>

export const HookOutcome = z.object({ durationMs: z.number(), runs: z.number(), output: z.string() })
export type HookOutcome = z.infer<typeof HookOutcome>

/** Where the container is after an end has settled what was left open. */
export const Settlement = z.object({ runsOn: z.enum(['source', 'target']), phase: SwitchPhase })
export type Settlement = z.infer<typeof Settlement>

const MOST_ROUNDS = 12
const SETTLING_ROUNDS = 4
/** A round that takes this much of the one before it shows that more rounds would not help. */
const NO_LONGER_SHRINKS = 0.8
const PATIENT_ROUNDS = 3
const SETTLE_LOOK_MS = 500
/** So many durations of a lease are waited for the other end to say what became of it. */
const SETTLE_DURATIONS = 20

/**
 * One node's part in a switch. Each step may be asked for by whoever drives the switch; `settle` needs nobody: from the record
 * in the home and the lease each node finds out by itself what is left to do, so that the container runs in one place.
 */
export class SwitchSide {
  readonly #root: ContainerRoot
  #sync: Sync | undefined
  /** As the rounds have shown it to be quicker. */
  #sealsDelta: (changed: Changed) => boolean = () => false

  constructor(root: ContainerRoot) {
    this.#root = root
  }

  async check(): Promise<SideCheck> {
    const root = this.#root
    await root.recover()
    const { isMounted, hasChanges } = await root.status()
    const { canBeOverlayUpper: upper } = probe(root.statePath)
    const state = await root.leases.read()
    const lease = leaseNameOf(root.node)
    const holder = state === undefined || isFreeFor(state, lease) ? undefined : state.claim.node
    const obstacle = !upper.ok
      ? `its state cannot be an upper: ${upper.unknown ?? upper.missing.join(', ')}`
      : isMounted
        ? 'the root is mounted there'
        : hasChanges
          ? 'it has changes that are in no version'
          : undefined
    if (isMounted && holder !== undefined && holder !== lease) {
      throw new LeaseHeldError(root.home.path, state, 'another node may write it')
    }
    return {
      nodeId: root.node.id,
      name: root.node.name,
      lease,
      rootId: root.home.record.id,
      head: root.home.head().number,
      isMounted,
      hasChanges,
      hooks: Object.keys(readHooks(root)),
      mountsSealed: mountsSealed(root.home.path, root.statePath),
      ...(obstacle === undefined ? {} : { obstacle }),
    }
  }

  /** Runs a hook of this node; `undefined` where it has none. @throws {HookFailedError}, {HookTimeoutError} */
  async hook(name: HookName, reason: string, signal?: AbortSignal): Promise<HookOutcome | undefined> {
    const report = await this.#hook(name, reason, signal)
    return report === undefined
      ? undefined
      : { durationMs: report.durationMs, runs: report.runs, output: report.output }
  }

  /**
   * Carries over what changed, again and again, while the container runs, until what is left fits into the time that it may stand
   * still, by what the store has taken so far. `lastDelta`: in which forms that may travel.
   * @throws {SwitchTooSlowError} if it never does
   */
  async preCopy(maxDowntimeMs: number, lastDelta: LastDelta, signal?: AbortSignal): Promise<PreCopyRound[]> {
    this.#sync ??= await this.#root.startSync(signal === undefined ? {} : { signal })
    const allowed = canSeal() ? lastDelta : 'tree'
    if (lastDelta === 'sealed' && allowed !== 'sealed') throw new SealToolMissingError()
    const fileMs = smallFileMs(this.#root.home.path)
    const rounds: PreCopyRound[] = []
    for (;;) {
      signal?.throwIfAborted()
      const before = this.#counts()
      const startMs = performance.now()
      // What was read while it was written is read again, since the container would wait for that later.
      await this.#sync.flush({ rounds: SETTLING_ROUNDS })
      const durationMs = performance.now() - startMs
      const after = this.#counts()
      const carried = { durationMs, files: after.files - before.files, bytes: after.bytes - before.bytes }
      const rates = ratesOf([...rounds, carried], fileMs)
      const left = await this.#sync.pending()
      const prediction = predict(left, rates, allowed)
      const predictedMs = prediction.deltaMs + prediction.fixedMs
      rounds.push({ ...carried, left, predictedMs })
      this.#sealsDelta = (changed) => predict(changed, rates, allowed).form === 'sealed'
      if (predictedMs <= maxDowntimeMs) return rounds
      const previous = rounds.at(-2)
      const shrinks = previous === undefined || predictedMs < previous.predictedMs * NO_LONGER_SHRINKS
      const isHopeless = prediction.fixedMs > maxDowntimeMs
      if (isHopeless || rounds.length >= MOST_ROUNDS || (rounds.length >= PATIENT_ROUNDS && !shrinks)) {
        throw new SwitchTooSlowError(this.#root.name, prediction, maxDowntimeMs)
      }
    }
  }

  /**
   * Stops the container and publishes what it had written. If that fails it runs again here, or will when it is settled.
   * @throws {HookFailedError}, {SolidifyIncompleteError} and what `solidify` throws
   */
  async stop(plan: SwitchPlan, signal?: AbortSignal): Promise<StopReport> {
    const root = this.#root
    const lease = await root.keepLease()
    this.#write(plan, 'stopping', lease.epoch)
    const before = this.#counts()
    const steps: { step: string; atMs: number }[] = []
    const onStep = ({ step }: { step: string }) => void steps.push({ step, atMs: performance.now() })
    let stopMs = performance.now()
    let isPublished = false
    root.events.on('step', onStep)
    try {
      const { version, delta } = await root.solidify({
        message: `switch from ${plan.from.name} to ${plan.to.name}`.slice(0, 1000),
        goesOn: false,
        sealsDelta: this.#sealsDelta,
        quiescence: {
          begin: async () => {
            stopMs = performance.now()
            await this.#hook('stop', 'switch', signal)
            steps.push({ step: 'hook', atMs: performance.now() })
          },
          end: async () => void (await this.#hook('start', 'rollback')),
        },
        ...(signal && { signal }),
      })
      isPublished = true
      await lease.check()
      this.#write(plan, 'published', lease.epoch)
      const after = this.#counts()
      return {
        version: version.number,
        sinceStopMs: performance.now() - stopMs,
        steps: durationsOf(steps, stopMs),
        files: after.files - before.files + (delta?.names ?? 0),
        bytes: after.bytes - before.bytes + (delta?.bytes ?? 0),
        ...(delta && { sealedBytes: delta.imageBytes }),
      }
    } catch (error) {
      // A solidify that fails starts it again; after one that did not, nobody has, and `settle` is to find that out.
      if (!isPublished) await this.#undone(plan).catch((problem: Error) => void this.#tell(problem))
      throw error
    } finally {
      root.events.off('step', onStep)
      this.#sync = undefined
    }
  }

  /** Hands the right to write to the target. */
  async pass(plan: SwitchPlan): Promise<void> {
    const lease = await this.#root.keepLease()
    this.#write(plan, 'passed', lease.epoch)
    await this.#root.handOver({ to: plan.to.lease })
  }

  /** Takes the right to write and mounts the version that was published. */
  async mount(plan: SwitchPlan): Promise<void> {
    await this.#root.mount()
    const lease = await this.#root.keepLease()
    this.#write(plan, 'mounted', lease.epoch)
  }

  /** From here on the container belongs to this node. @throws {LeaseLostError} if another node took it over */
  async commit(plan: SwitchPlan): Promise<void> {
    const lease = await this.#root.keepLease()
    this.#write(plan, 'committed', lease.epoch)
    // A node that stood still between the two was taken for dead.
    await lease.check()
  }

  /** The target's way back: the container there is stopped, what it wrote there is given up, and the source may have the root again. */
  async undo(): Promise<void> {
    const record = this.#record()
    await this.#hook('stop', 'rollback')
    await this.#root.handOver({ to: record.from.lease, discard: true })
  }

  /**
   * Settles a switch that nobody drives any more, from what is on the store: the source brings its container back unless the
   * target has it; the target commits if its container is well, and gives the root back if not. `id`: only that switch.
   * @throws {SwitchUnknownError}; {LeaseHeldError} while the other end is alive and has said nothing for very long
   */
  async settle({ id, signal }: { readonly id?: string; readonly signal?: AbortSignal } = {}): Promise<Settlement> {
    const me = leaseNameOf(this.#root.node)
    const startMs = performance.now()
    for (;;) {
      signal?.throwIfAborted()
      // Nothing is written of a switch that fails before its first step.
      if (id !== undefined && readSwitch(this.#root.home)?.id !== id) return { runsOn: 'source', phase: 'undone' }
      const record = this.#record()
      const state = await this.#root.leases.read(signal)
      const settled = settledIn(record, state?.claim)
      const isMine = state?.claim.node === me && !state.isReleased
      if (settled?.runsOn !== 'target' && record.to.lease === me && !isMine) await this.#leave()
      if (settled !== undefined) return settled
      if (record.to.lease === me) {
        return isMine ? await this.#settleAsTarget(record) : { runsOn: 'source', phase: record.phase }
      }
      if (record.from.lease !== me) throw new SwitchUnknownError(this.#root.name)
      const needsTakeover = !isMine && !isFreeFor(state, me)
      if (await this.#settleAsSource(record, needsTakeover, signal)) return { runsOn: 'source', phase: 'undone' }
      if (performance.now() - startMs > SETTLE_DURATIONS * this.#root.leases.durationMs) {
        throw new LeaseHeldError(
          this.#root.home.path,
          state,
          'it is alive, and neither commits nor gives the root back',
        )
      }
      await delay(SETTLE_LOOK_MS, undefined, { ...(signal && { signal }) })
    }
  }

  /** A target that lost the root while its container was about to start: that one must not run beside the other. */
  async #leave(): Promise<void> {
    const { isMounted, hasChanges } = await this.#root.status()
    if (!isMounted && !hasChanges) return
    await this.#hook('stop', 'rollback')
    await this.#root.handOver({ discard: true })
  }

  async #settleAsTarget(record: SwitchRecord): Promise<Settlement> {
    try {
      await this.#root.mount()
      await this.#hook('start', 'switch')
      await this.#hook('health', 'switch')
    } catch (error) {
      if (error instanceof LeaseLostError) throw error
      await this.undo()
      return { runsOn: 'source', phase: record.phase }
    }
    await this.commit(record)
    return { runsOn: 'target', phase: 'committed' }
  }

  /** Whether the container runs here again; `false` while the target has the root. */
  async #settleAsSource(
    record: SwitchRecord,
    needsTakeover: boolean,
    signal: AbortSignal | undefined,
  ): Promise<boolean> {
    try {
      await this.#root.mount({ ...(needsTakeover && { takeover: 'expired' }), ...(signal && { signal }) })
    } catch (error) {
      if (error instanceof LeaseHeldError) return false
      throw error
    }
    await this.#hook('start', 'rollback')
    await this.#undone(record)
    return true
  }

  /** What goes wrong on the way back does not hide why there had to be one. */
  #tell(error: Error): void {
    this.#root.events.emit('problem', { verb: 'switch', error })
  }

  async #undone(plan: SwitchPlan): Promise<void> {
    const lease = await this.#root.keepLease()
    this.#write(plan, 'undone', lease.epoch)
  }

  #record(): SwitchRecord {
    const record = readSwitch(this.#root.home)
    if (record === undefined) throw new SwitchUnknownError(this.#root.name)
    return record
  }

  #write({ format, id, from, to }: SwitchPlan, phase: SwitchPhase, epoch: number): void {
    writeSwitch(this.#root.home, { format, id, from, to, phase, epoch, updatedAtMs: Date.now() })
  }

  #hook(name: HookName, reason: string, signal?: AbortSignal): Promise<HookReport | undefined> {
    const root = this.#root
    const context = { root: root.name, merged: root.mergedPath, node: root.node.name, reason }
    return runHook(readHooks(root), name, context, signal)
  }

  #counts(): { readonly files: number; readonly bytes: number } {
    const [target] = this.#sync?.status.targets ?? []
    return { files: target?.files ?? 0, bytes: target?.bytes ?? 0 }
  }
}

/** What the record itself says, if it is over. A commit that a later claim has overtaken is none. */
function settledIn(
  { phase, epoch, from }: SwitchRecord,
  claim: { readonly epoch: number; readonly node: string } | undefined,
): Settlement | undefined {
  if (phase === 'undone') return { runsOn: 'source', phase }
  if (phase !== 'committed') return undefined
  const isOvertaken = claim !== undefined && claim.epoch > epoch && claim.node === from.lease
  return isOvertaken ? undefined : { runsOn: 'target', phase }
}

function durationsOf(steps: readonly { step: string; atMs: number }[], startMs: number) {
  let lastMs = startMs
  return steps.flatMap(({ step, atMs }) => {
    if (atMs < startMs) return []
    const durationMs = atMs - lastMs
    lastMs = atMs
    return [{ step, durationMs }]
  })
}
