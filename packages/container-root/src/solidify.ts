import { cloneLayer } from '@lsync/overlay-merge'
import { bytesOf, type HostPath, LsyncError, O_NOFOLLOW, openRoot, printable, randomHex, withFd } from '@lsync/posix'
import {
  type Checkpoint,
  type Differences,
  type FlushReport,
  LocalTarget,
  openSync,
  type Sync,
  TargetPlace,
} from '@lsync/sync'
import { thawCgroup } from './cgroup.ts'
import { assertCurrent, configOf, ensureLease, makeUpperOn, mountBase, type RootContext } from './context.ts'
import { buildDelta } from './delta-tree.ts'
import type { Home } from './home.ts'
import type { Changed } from './last-delta.ts'
import { findMount, unmountRoot } from './mount.ts'
import type { Quiescence } from './quiescence.ts'
import type { LayerRecord, NodeRootRecord, SolidifyRecord, VersionRecord } from './records.ts'
import { sealInto } from './seal-into.ts'
import { SealFailedError, SealLossyError, SealToolMissingError } from './sealed-layer.ts'

/** Some of the upper could not be carried to the store. Nothing was published. */
export class SolidifyIncompleteError extends LsyncError {
  constructor(path: string, report: FlushReport) {
    const [failure] = report.failures
    const why =
      failure === undefined
        ? 'files are still being written'
        : `${printable(failure.path)}${report.failures.length > 1 ? ` and ${report.failures.length - 1} more` : ''}: ${failure.message}`
    super('SOLIDIFY_INCOMPLETE', `${printable(path)} is not whole on the store: ${why}`, {
      path,
      hint: 'see `lsync root status`; put right what is named, then solidify again',
    })
  }
}

export interface SolidifyRequest {
  /** The container keeps its upper and goes on; it rests only for the end of the barrier. */
  readonly live?: boolean
  readonly message?: string
  readonly tags?: readonly string[]
  /** Without it a container must not be running (unless `live`: then the version is of no single moment). */
  readonly quiescence?: Quiescence
  /**
   * Whether what changed last becomes a sealed layer of its own, written in one piece, on top of what was carried over before; asked once
   * that is known. For a stopped container. Where it cannot be said exactly in such a layer, or it cannot be sealed, it is carried
   * over like all else. Default: never.
   */
  readonly sealsDelta?: (delta: Changed) => boolean
  /** After a success mount the root again and end the rest. Default true; not for a container that goes on elsewhere. */
  readonly goesOn?: boolean
  readonly signal?: AbortSignal
}

export interface SolidifyReport {
  readonly version: VersionRecord
  readonly layerId: string
  /** What changed last, where that is a sealed layer of its own. */
  readonly delta?: SealedDelta
  /** From the moment at which the container was asked to rest until it was told to go on. */
  readonly restMs: number
  readonly elapsedMs: number
  readonly isMounted: boolean
}

/** A sealed layer of what changed last. */
export interface SealedDelta extends Changed {
  readonly layerId: string
  readonly imageBytes: number
}

interface PublishedDelta {
  readonly journal: SolidifyRecord
  readonly version: VersionRecord
  readonly delta: SealedDelta
}

/** Where the copy of an upper is kept: on the store as the layer that it will be, and before it is sealed on this node. */
function placeOfCopy({ home, root }: RootContext, { incomingEpoch, upperId }: NodeRootRecord): HostPath {
  return isSealing(home) ? root.makeStaging(upperId) : home.makeIncoming(incomingEpoch, upperId)
}

function isSealing({ record }: Home): boolean {
  return record.layerForm === 'sealed'
}

/** The copy of an upper has one name for the sync's index, in whatever epoch's directory it lies. */
function copyTarget(context: RootContext, config: NodeRootRecord): LocalTarget {
  return new LocalTarget(`${placeOfCopy(context, config)}/tree` as HostPath, `incoming ${config.upperId}`)
}

/** Follows the upper, which is made where it is missing (or, with `once`, compares it when asked to flush) and keeps its copy on the store. */
export function openUpperSync(
  context: RootContext,
  config: NodeRootRecord,
  options: { readonly once: boolean; readonly signal?: AbortSignal | undefined },
): Promise<Sync> {
  if (!context.root.has('upper')) makeUpperOn(context, config.base.layers)
  return openSync({
    source: context.root.upperPath,
    targets: [copyTarget(context, config)],
    stateDir: context.root.indexPath,
    namespace: context.home.record.namespace,
    // The directory is made for this copy alone.
    adopt: true,
    once: options.once,
    // A container waits for it.
    heedsPressure: !options.once,
    ...(options.signal === undefined ? {} : { signal: options.signal }),
  })
}

/**
 * Makes a version of what the upper holds. Stopped: the synced copy becomes the layer and the upper its local replica, each by
 * one rename. Live: the copy is cloned. Where layers are sealed, an image is made of the upper, or live of its copy. Killed anywhere, the next command on the root (`recoverSolidify`) brings the state
 * before or the one after. The caller holds the root's lock.
 */
export async function solidify(
  context: RootContext,
  request: SolidifyRequest,
  running?: Sync,
): Promise<SolidifyReport> {
  const run = new Solidify(context, request)
  return request.live === true ? await run.live(running) : await run.stopped(running)
}

class Solidify {
  readonly #context: RootContext
  readonly #request: SolidifyRequest
  readonly #startMs = performance.now()
  #restsSinceMs: number | undefined
  #restMs = 0

  constructor(context: RootContext, request: SolidifyRequest) {
    this.#context = context
    this.#request = request
  }

  async stopped(running: Sync | undefined): Promise<SolidifyReport> {
    const { root, home } = this.#context
    const lease = await ensureLease(this.#context, this.#request)
    const config = configOf(this.#context)
    assertCurrent(this.#context, config)
    const wasMounted = findMount(root) !== undefined
    if (isSealing(home)) return await this.#stoppedToSeal(running, config, lease.epoch, wasMounted)
    let journal = this.#journal(config, lease.epoch, config.upperId, wasMounted)
    const sync = running ?? (await openUpperSync(this.#context, config, { ...this.#request, once: true }))
    try {
      // Most of it travels while the container still runs.
      if (wasMounted) await sync.flush({ rounds: 1 })
      this.#step('copied')
      root.writeSolidify(journal)
      await this.#rest()
      if (wasMounted) unmountRoot(root)
      this.#step('stopped')
      const differences = await this.#differencesAtRest(sync, config)
      const isCopied = differences?.names.length === 0
      const sealed =
        differences === undefined || isCopied
          ? undefined
          : await this.#publishWithDelta(sync, config, journal, differences)
      if (sealed !== undefined) {
        const { delta, version } = sealed
        return { ...(await this.#end(sealed.journal, version)), delta }
      }
      if (!isCopied) await this.#barrier(sync, config)
      await sync.stop()
      this.#step('synced')
      journal = { ...journal, step: 'promoting' }
      root.writeSolidify(journal)
      const version = await this.#publish(journal, (home) =>
        home.promote(journal.epoch, config.upperId, layerOf(journal)),
      )
      return await this.#end(journal, version)
    } catch (error) {
      await sync.stop().catch((problem: unknown) => this.#tell(problem))
      await this.#giveBack(journal)
      throw error
    }
  }

  /** What the copy on the store lacks, where that matters and is known: it stays so, since the sync is paused then. */
  async #differencesAtRest(sync: Sync, config: NodeRootRecord): Promise<Differences | undefined> {
    if (this.#request.sealsDelta === undefined) return undefined
    sync.pause()
    const differences = await sync.differences()
    const [copied] = sync.status.targets
    if (differences === undefined || !this.#isCopiedTo(config, copied?.checkpoint)) return undefined
    this.#step('compared')
    return differences
  }

  /**
   * Publishes the copy as it is and, on top of it, what it lacks as a sealed layer. `undefined`, and nothing was changed, where that
   * is not wanted or cannot be done exactly.
   */
  async #publishWithDelta(
    sync: Sync,
    config: NodeRootRecord,
    plain: SolidifyRecord,
    differences: Differences,
  ): Promise<PublishedDelta | undefined> {
    const { root, home } = this.#context
    const { sealsDelta } = this.#request
    return await root.withScratch(async (scratch) => {
      const tree = `${scratch}/delta` as HostPath
      const { namespace } = home.record
      const counts = buildDelta({ upper: root.upperPath, differences, namespace, to: tree })
      if (counts === undefined || counts.names === 0 || sealsDelta?.(counts) !== true) return undefined
      this.#step('built')
      // Where nothing was carried over before, it is the whole of the upper.
      const deltaId = differences.isTargetEmpty ? plain.layerId : randomHex(16)
      const layers = differences.isTargetEmpty ? plain.layers : [deltaId, ...plain.layers]
      const journal: SolidifyRecord = { ...plain, deltaId, layers }
      root.writeSolidify(journal)
      const record = { ...layerOf(journal), id: deltaId, covers: [deltaId] }
      const { signal } = this.#request
      const request = { tree, record, epoch: journal.epoch, scratch, lossy: false, isUrgent: true, counts, signal }
      try {
        return await sealInto(home, request, async (name, sealed) => {
          this.#step('sealed')
          await sync.stop()
          const next: SolidifyRecord = { ...journal, step: 'promoting' }
          root.writeSolidify(next)
          const version = await this.#publish(next, () => {
            if (!differences.isTargetEmpty) home.promote(journal.epoch, config.upperId, layerOf(journal))
            home.promote(journal.epoch, name, sealed)
          })
          const imageBytes = sealed.image?.sizeBytes ?? 0
          return { journal: next, version, delta: { ...counts, layerId: deltaId, imageBytes } }
        })
      } catch (error) {
        const isUnsealable =
          error instanceof SealFailedError || error instanceof SealLossyError || error instanceof SealToolMissingError
        if (!isUnsealable) throw error
        this.#tell(error)
        return undefined
      }
    })
  }

  /** An image is made of the upper itself: a copy would be no nearer to it. */
  async #stoppedToSeal(
    running: Sync | undefined,
    config: NodeRootRecord,
    epoch: number,
    wasMounted: boolean,
  ): Promise<SolidifyReport> {
    const { root } = this.#context
    const journal = this.#journal(config, epoch, config.upperId, wasMounted)
    try {
      if (!root.has('upper')) makeUpperOn(this.#context, config.base.layers)
      this.#step('copied')
      root.writeSolidify(journal)
      await this.#rest()
      if (wasMounted) unmountRoot(root)
      this.#step('stopped')
      await running?.stop()
      const version = await this.#seal(root.upperPath, journal)
      return await this.#end(journal, version)
    } catch (error) {
      await running?.stop().catch((problem: unknown) => this.#tell(problem))
      await this.#giveBack(journal)
      throw error
    }
  }

  /** What follows the publication of a version that the upper was used up for. */
  async #end(journal: SolidifyRecord, version: VersionRecord): Promise<SolidifyReport> {
    this.#step('published')
    finish(this.#context, { ...journal, version: version.number })
    if (this.#request.goesOn !== false) {
      if (journal.wasMounted) mountBase(this.#context)
      await this.#goOn()
      this.#step('mounted')
    }
    return this.#report(version, journal.layerId)
  }

  async live(running: Sync | undefined): Promise<SolidifyReport> {
    const { root, home } = this.#context
    const lease = await ensureLease(this.#context, this.#request)
    const config = configOf(this.#context)
    assertCurrent(this.#context, config)
    const layerId = randomHex(16)
    const journal = this.#journal(config, lease.epoch, layerId, true)
    const sync = running ?? (await openUpperSync(this.#context, config, { ...this.#request, once: true }))
    try {
      await sync.flush({ rounds: 1 })
      this.#step('copied')
      root.writeSolidify(journal)
      // Nothing is carried over while the copy is cloned.
      sync.pause()
      await this.#rest()
      await this.#barrier(sync, config)
      await this.#goOn()
      this.#step('synced')
      const copy = `${placeOfCopy(this.#context, config)}/tree` as HostPath
      const version = await (isSealing(home) ? this.#seal(copy, journal) : this.#clone(copy, journal))
      this.#step('published')
      finish(this.#context, { ...journal, version: version.number })
      return this.#report(version, layerId)
    } catch (error) {
      await this.#goOn().catch((problem: unknown) => this.#tell(problem))
      try {
        recoverSolidify(this.#context)
      } catch (problem) {
        // The next command on the root does so; what went wrong first is what is to be known.
        this.#tell(problem)
      }
      throw error
    } finally {
      if (running === undefined) {
        await sync.stop().catch((problem: unknown) => this.#tell(problem))
        // Nobody keeps it up to date, and it takes as much space as the upper.
        if (isSealing(home)) forgetCopy(this.#context)
      } else sync.resume()
    }
  }

  /** The copy of the upper is cloned on the store, and the clone published. */
  #clone(copy: HostPath, journal: SolidifyRecord): Promise<VersionRecord> {
    const { home, root } = this.#context
    const { signal } = this.#request
    return home.withScratch(journal.epoch, journal.layerId, async (path, name) => {
      await cloneLayer({
        from: copy,
        to: `${path}/tree` as HostPath,
        namespace: home.record.namespace,
        sharesInodes: false,
        ...(signal === undefined ? {} : { signal }),
      })
      this.#step('cloned')
      root.writeSolidify({ ...journal, step: 'promoting' })
      return this.#publish(journal, () => home.promote(journal.epoch, name, layerOf(journal)))
    })
  }

  /** An image is made of a tree of this node, which nobody changes meanwhile, and published. */
  #seal(tree: HostPath, journal: SolidifyRecord): Promise<VersionRecord> {
    const { home, root } = this.#context
    const { epoch } = journal
    const request = {
      tree,
      record: layerOf(journal),
      epoch,
      scratch: root.path,
      onLoss: (loss: unknown) => this.#tell(loss),
      signal: this.#request.signal,
    }
    return sealInto(home, request, (name, record) => {
      this.#step('sealed')
      root.writeSolidify({ ...journal, step: 'promoting' })
      return this.#publish(journal, () => home.promote(epoch, name, record))
    })
  }

  #journal(config: NodeRootRecord, epoch: number, layerId: string, wasMounted: boolean): SolidifyRecord {
    const { message, tags, live = false, quiescence } = this.#request
    return {
      format: 1,
      step: 'syncing',
      isLive: live,
      layerId,
      nextUpperId: randomHex(16),
      epoch,
      parent: this.#context.home.head().number,
      layers: [layerId, ...config.base.layers],
      createdAtMs: Date.now(),
      ...(message === undefined ? {} : { message }),
      ...(tags === undefined ? {} : { tags: [...tags] }),
      wasMounted,
      ranOn: false,
      ...(quiescence?.cgroup === undefined ? {} : { cgroup: quiescence.cgroup }),
    }
  }

  /** All of the upper is durable on the store, and the store says so. */
  async #barrier(sync: Sync, config: NodeRootRecord): Promise<void> {
    const { root } = this.#context
    const report = await sync.flush({ sweep: true })
    if (report.failures.length > 0) throw new SolidifyIncompleteError(root.upperPath, report)
    if (!report.isSettled && this.#request.live !== true) throw new SolidifyIncompleteError(root.upperPath, report)
    const [sent] = report.checkpoints
    if (!this.#isCopiedTo(config, sent)) throw new SolidifyIncompleteError(root.upperPath, report)
  }

  /** Whether the store itself says that the copy is at a checkpoint, or beyond. */
  #isCopiedTo(config: NodeRootRecord, sent: Checkpoint | undefined): boolean {
    const place = placeOfCopy(this.#context, config)
    const held = withFd(openRoot(place, O_NOFOLLOW), (fd) =>
      TargetPlace.peek(fd, bytesOf('tree'), `${place}/tree` as HostPath),
    )
    return sent !== undefined && held?.root === sent.root && held.sequence >= sent.sequence
  }

  async #publish(journal: SolidifyRecord, promote: (home: Home) => void): Promise<VersionRecord> {
    const { home, node, root } = this.#context
    const lease = await ensureLease(this.#context, this.#request)
    if (lease.epoch !== journal.epoch) throw new Error('the lease changed while a version was made under it')
    promote(home)
    const version = await home.publishVersion(
      {
        parent: journal.parent,
        layers: journal.layers,
        madeBy: journal.isLive ? 'live' : 'solidify',
        nodeId: node.id,
        nodeName: node.name,
        ...(journal.message === undefined ? {} : { message: journal.message }),
        ...(journal.tags === undefined ? {} : { tags: journal.tags }),
      },
      lease,
    )
    root.writeSolidify({ ...journal, step: 'published', version: version.number })
    return version
  }

  async #rest(): Promise<void> {
    const { quiescence, signal } = this.#request
    this.#restsSinceMs = performance.now()
    await quiescence?.begin(signal)
  }

  async #goOn(): Promise<void> {
    if (this.#restsSinceMs === undefined) return
    this.#restMs = performance.now() - this.#restsSinceMs
    this.#restsSinceMs = undefined
    await this.#request.quiescence?.end()
  }

  /** After a failure: either it was published all the same, or everything is as it was. The container runs again. */
  async #giveBack(journal: SolidifyRecord): Promise<void> {
    const { root } = this.#context
    try {
      recoverSolidify(this.#context)
    } catch (error) {
      // Nobody can say now whether the version is there. The container need not wait for that.
      this.#tell(error)
    }
    try {
      const left = root.readSolidify()
      if (left !== undefined) root.writeSolidify({ ...left, ranOn: true })
      if (journal.wasMounted) mountBase(this.#context)
      await this.#goOn()
    } catch (error) {
      this.#tell(error)
    }
  }

  #step(step: string): void {
    this.#context.events.emit('step', { verb: 'solidify', step, elapsedMs: performance.now() - this.#startMs })
  }

  #tell(problem: unknown): void {
    const error = problem instanceof Error ? problem : new Error(String(problem))
    this.#context.events.emit('problem', { verb: 'solidify', error })
  }

  #report(version: VersionRecord, layerId: string): SolidifyReport {
    return {
      version,
      layerId,
      restMs: this.#restMs,
      elapsedMs: performance.now() - this.#startMs,
      isMounted: findMount(this.#context.root) !== undefined,
    }
  }
}

/** What the layer of a version will be, as a tree. */
function layerOf({ layerId: id, isLive, createdAtMs }: SolidifyRecord): LayerRecord {
  return {
    format: 1,
    id,
    form: 'tree',
    isBottom: false,
    covers: [id],
    madeBy: isLive ? 'live' : 'solidify',
    createdAtMs,
  }
}

/** What a sync knew of the upper, and its copy on this node. */
function forgetCopy({ root }: RootContext): void {
  root.clearIndex()
  root.clearStaging()
}

/**
 * Finishes or takes back what an interrupted solidify left. If a version names its layer, it happened; else the layer is the
 * copy of the upper again. May be interrupted and repeated. The caller holds the root's lock.
 */
export function recoverSolidify(context: RootContext): 'nothing' | 'finished' | 'taken back' {
  const { root, home } = context
  const journal = root.readSolidify()
  if (journal === undefined) return 'nothing'
  if (journal.cgroup !== undefined) thawCgroup(journal.cgroup)
  const version = home.versions().find(({ layers }) => layers[0] === (journal.deltaId ?? journal.layerId))
  if (version !== undefined) {
    finish(context, { ...journal, version: version.number })
    return 'finished'
  }
  const { deltaId } = journal
  for (const made of [deltaId, journal.isLive || isSealing(home) ? journal.layerId : undefined]) {
    if (made === undefined) continue
    home.trashLayer(made)
    home.removeIncoming(journal.epoch, `.clone-${made}`)
  }
  const mayBePromoted = journal.step !== 'syncing' && deltaId !== journal.layerId
  if (!journal.isLive && !isSealing(home) && mayBePromoted) home.demote(journal.epoch, journal.layerId)
  root.removeSolidify()
  return 'taken back'
}

type Published = SolidifyRecord & { version: number }

/** Makes the node stand where the version leaves it that was published. Each step may be repeated. */
function finish(context: RootContext, journal: Published): void {
  const { root, home } = context
  if (journal.isLive) root.writeConfig({ ...configOf(context), liveVersion: journal.version })
  else {
    if (journal.ranOn) keepUpper(context, journal)
    else replaceUpper(context, journal)
    forgetCopy(context)
    home.forgetSyncState(journal.layerId)
    // Nothing had been carried over, and an image took its place.
    if (journal.deltaId === journal.layerId) home.removeIncoming(journal.epoch, journal.layerId)
  }
  root.removeSolidify()
}

/** The upper becomes the replica of its layer, and a new one takes its place. */
function replaceUpper(context: RootContext, { layerId, nextUpperId: upperId, version, layers }: Published): void {
  const { root } = context
  const { liveVersion: _, ...config } = configOf(context)
  if (config.upperId === layerId) {
    root.keepReplica(layerId)
    root.writeConfig({ ...config, base: { version, layers }, upperId })
  }
  if (!root.has('upper')) makeUpperOn(context, layers)
}

/** The container went on with its upper, so that one is more than the layer: it stays on its base, and is copied anew. */
function keepUpper(context: RootContext, { layerId, nextUpperId: upperId, version: liveVersion }: Published): void {
  const config = configOf(context)
  if (config.upperId === layerId) context.root.writeConfig({ ...config, upperId, liveVersion })
}
