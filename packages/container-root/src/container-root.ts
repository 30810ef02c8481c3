import { EventEmitter } from 'node:events'
import { bytesOf, type HostPath, randomHex, textOf } from '@lsync/posix'
import type { Repository } from '@lsync/snapshot'
import type { Sync } from '@lsync/sync'
import { type BackupReport, backupVersion } from './backup.ts'
import { type CompactPolicy, type CompactReport, compact } from './compact.ts'
import {
  assertCurrent,
  configOf,
  ensureLease,
  giveLeaseBack,
  headFor,
  mountBase,
  type PrefetchReport,
  prefetch,
  type RootContext,
  type RootEvents,
  standsOn,
  startFrom,
  UnsavedChangesError,
  UpperStaleError,
  withLayersInUse,
} from './context.ts'
import { type ConvertReport, type ConvertRequest, convertLayers } from './convert.ts'
import { EtcdLeases, type EtcdLeasesOptions } from './etcd-lease.ts'
import { FileLeases } from './file-lease.ts'
import { Follower, isFollowed, listenForCommands, pauseFollower } from './follower.ts'
import { type ForkRequest, fork } from './fork.ts'
import { collectGarbage, type GcPolicy, type GcReport } from './gc.ts'
import { Home } from './home.ts'
import type { LayerCache } from './layer-cache.ts'
import type { Lease, Leases } from './lease.ts'
import { findMount, unmountRoot } from './mount.ts'
import { type NodeRoot, NodeState, RootBusyError, RootNameTakenError, RootUnknownError } from './node-state.ts'
import type { NodeRecord, NodeRootRecord, VersionRecord } from './records.ts'
import { openUpperSync, recoverSolidify, type SolidifyReport, type SolidifyRequest, solidify } from './solidify.ts'
import { type RootStatus, type StatusOptions, statusOf } from './status.ts'
import { diffVersions, type VersionDifference } from './version-diff.ts'

export interface OpenOptions {
  /** The state of this node. Default `defaultNodeState()`. */
  readonly state?: NodeState
  /** Who keeps the right to write. Default: as the home says. */
  readonly leases?: (home: Home) => Leases
  /** How this node shows an etcd who it is; the home, which all nodes read, does not say it. */
  readonly etcdUser?: EtcdLeasesOptions['user']
  /** Where layers are kept near by. Default: the cache of the state, if it has one (`NodeState.openCache`). */
  readonly cache?: LayerCache
}

export interface MountRequest {
  /** Give up changes that are in no version, and begin with the newest one. */
  readonly discard?: boolean
  /** Take the lease over from a node that is silent, or by force. */
  readonly takeover?: 'expired' | 'force'
  /** Copy the layers that this node lacks into its cache before, so that the mount is of those. */
  readonly prefetch?: boolean
  readonly signal?: AbortSignal
}

export interface RollbackRequest {
  /** Number or tag. */
  readonly to: number | string
  readonly message?: string
  /** Give up changes that are in no version. */
  readonly discard?: boolean
  readonly signal?: AbortSignal
}

/**
 * One root on this node: the same verbs as `lsync root`. Operations of one root come one after the other, also those of several
 * processes (`ROOT_BUSY`); those of different roots do not wait for each other.
 */
export class ContainerRoot {
  readonly events: EventEmitter<RootEvents>
  readonly #context: RootContext
  #sync: Sync | undefined
  /** Another process that follows the root, and leaves it alone as long as this one works on it. */
  #paused: ReturnType<typeof pauseFollower> | undefined
  #isFollower = false
  #working = 0

  private constructor(context: RootContext) {
    this.#context = context
    this.events = context.events
  }

  /**
   * Opens a root under a name of this node; `close` it. The first time the node begins with the newest version, and nothing
   * is mounted or claimed.
   * @throws {HomeMissingError}, {RootNameTakenError} if the name is that of another root here
   */
  static async open(homePath: HostPath, name: string, options: OpenOptions = {}): Promise<ContainerRoot> {
    const state = options.state ?? NodeState.open()
    const cache = options.cache ?? (await state.openCache())
    const home = Home.open(homePath)
    let root: NodeRoot | undefined
    try {
      root = state.openRoot(name, { create: true })
      const context: RootContext = {
        name,
        home,
        node: state.node,
        root,
        leases: options.leases?.(home) ?? leasesOf(home, options.etcdUser),
        cache,
        events: new EventEmitter<RootEvents>(),
        lease: undefined,
      }
      if (root.readConfig() === undefined) root.writeConfig(firstConfig(name, home))
      const config = configOf(context)
      if (config.rootId !== home.record.id) throw new RootNameTakenError(name, config.home)
      context.events.on('problem', ({ verb, error }) => context.root.noteError(verb, error))
      return new ContainerRoot(context)
    } catch (error) {
      root?.close()
      home.close()
      throw error
    }
  }

  /** Opens a root that this node knows already by its name alone. @throws {RootUnknownError} */
  static openKnown(name: string, options: OpenOptions = {}): Promise<ContainerRoot> {
    const state = options.state ?? NodeState.open()
    const root = state.openRoot(name)
    const config = root.readConfig()
    root.close()
    if (config === undefined) throw new RootUnknownError(name, state.path)
    return ContainerRoot.open(homePathOf(config), name, { ...options, state })
  }

  get name(): string {
    return this.#context.name
  }

  get home(): Home {
    return this.#context.home
  }

  /** Where the root is mounted. */
  get mergedPath(): HostPath {
    return this.#context.root.mergedPath
  }

  /** This node. */
  get node(): NodeRecord {
    return this.#context.node
  }

  /** Who keeps the right to write this root. */
  get leases(): Leases {
    return this.#context.leases
  }

  /** Keeps the lease that this node has alive until `close`. Gives the lease. @throws {LeaseHeldError}, {LeaseLostError} */
  keepLease(): Promise<Lease> {
    return this.#exclusive(async () => {
      const lease = await ensureLease(this.#context)
      lease.keepAlive()
      return lease
    })
  }

  /**
   * Unmounts the root and hands the right to write to another node (`leaseNameOf`), or to whoever claims it first. Changes that are in
   * no version are given up with `discard`.
   * @throws {UnsavedChangesError}, {RootBusyError}
   */
  handOver(options: { readonly to?: string; readonly discard?: boolean } = {}): Promise<void> {
    return this.#exclusive(async () => {
      const { root, home, node } = this.#context
      const { to, discard = false } = options
      await this.#unmount()
      if (root.hasChanges()) {
        if (!discard) throw new UnsavedChangesError(root.upperPath)
        startFrom(this.#context, home.version(configOf(this.#context).base.version))
      }
      home.forgetMounted(node.id)
      await giveLeaseBack(this.#context, { to, mayBeLost: discard })
    })
  }

  /** What this node keeps of the root: upper, replicas, records. */
  get statePath(): HostPath {
    return this.#context.root.path
  }

  /** Ends what runs, without changing anything: a mounted root stays mounted, and the lease stands. */
  async close(): Promise<void> {
    try {
      await this.#sync?.stop()
    } finally {
      await this.#giveBack()
      await this.#context.lease?.pause()
      this.#context.root.close()
      this.#context.home.close()
    }
  }

  /** What is known without claiming, waiting or changing anything. */
  status(options: StatusOptions = {}): Promise<RootStatus> {
    return statusOf(this.#context, this.#sync, options)
  }

  /**
   * Finishes or takes back what was interrupted. Every operation does so first.
   * @throws {RootBusyError} if another process is at work
   */
  recover(): Promise<'nothing' | 'finished' | 'taken back'> {
    return this.#context.root.locked(async () => recoverSolidify(this.#context))
  }

  /**
   * Mounts the root for writing: claims the lease, takes the newest version if there are no changes here, and makes sure that the
   * layers stay. Mounted already is fine, on the newest version.
   * @throws {LeaseHeldError}, {UpperStaleError}, {LayerMissingError}, {StoreWentBackError}, {RootBusyError} if it is mounted on an older one and used
   */
  mount(request: MountRequest = {}): Promise<NodeRootRecord['base']> {
    return this.#noted('mount', async () => {
      const { root, home } = this.#context
      const newest = () =>
        request.takeover === 'force' ? home.head() : headFor(this.#context, configOf(this.#context))
      // Before anything is claimed on a store that went back, and once nobody else can publish.
      newest()
      await ensureLease(this.#context, request)
      const config = configOf(this.#context)
      const head = newest()
      if (!standsOn(config, head) || (findMount(root) === undefined && request.discard === true)) {
        const assertNothingLost = () => {
          if (request.discard === true || !root.hasChanges()) return
          throw new UpperStaleError(root.upperPath, config.base.version, head.number)
        }
        assertNothingLost()
        await this.#unmount()
        // Until then a container could write.
        assertNothingLost()
        startFrom(this.#context, head)
      }
      const { base } = configOf(this.#context)
      if (request.prefetch === true && findMount(root) === undefined) {
        await prefetch(this.#context, { number: base.version, layers: base.layers }, request.signal)
      }
      mountBase(this.#context)
      return base
    })
  }

  /**
   * Unmounts the root. Without changes the lease is given back, so that any node may go on; with changes it is kept, since they are
   * in no version yet.
   * @throws {RootBusyError} naming who uses it
   */
  unmount(): Promise<{ readonly hasChanges: boolean }> {
    return this.#noted('unmount', async () => {
      const { root, home, node } = this.#context
      await this.#unmount()
      const hasChanges = root.hasChanges()
      if (!hasChanges) {
        home.forgetMounted(node.id)
        // Another node may have taken it over, and nothing here is lost by that.
        await giveLeaseBack(this.#context, { mayBeLost: true })
      }
      return { hasChanges }
    })
  }

  /** Afterwards nothing is mounted on the upper, and nothing follows it. @throws {RootBusyError} */
  async #unmount(): Promise<void> {
    unmountRoot(this.#context.root)
    await this.#sync?.stop()
    this.#sync = undefined
  }

  /**
   * Follows the upper from now on, so that a solidify has little left to carry.
   * @throws {LeaseHeldError}, {UpperStaleError} if no version can be made of it
   */
  startSync(options: { readonly signal?: AbortSignal } = {}): Promise<Sync> {
    return this.#exclusive(async () => {
      // Layers of an older version may be gone, and nobody else need wait for what cannot be published. A lease that was lost says more.
      if (configOf(this.#context).lease === undefined) assertCurrent(this.#context, configOf(this.#context))
      const lease = await ensureLease(this.#context, options)
      assertCurrent(this.#context, configOf(this.#context))
      lease.keepAlive()
      return (
        this.#sync ??
        this.#following(await openUpperSync(this.#context, configOf(this.#context), { ...options, once: false }))
      )
    })
  }

  /**
   * Follows the upper of the root, and the ones that take its place, until it is aborted; the event `following` tells of each sync. Other
   * processes on this node may work on the root meanwhile: for as long, this one leaves it alone. It waits while the root is not mounted
   * and this node has no lease; with `waits` also at first, where it would claim it.
   * @throws {RootBusyError} if another process follows the root already; {LeaseHeldError}, {LeaseLostError}
   */
  async follow({ signal, waits = false }: { readonly signal: AbortSignal; readonly waits?: boolean }): Promise<void> {
    const { root } = this.#context
    if (await isFollowed(root)) throw new RootBusyError(root.path, 'another lsync follows it')
    this.#isFollower = true
    const follower = new Follower({
      start: async () => void (await this.startSync({ signal })),
      stop: () => root.locked(() => this.#leaveAlone()),
      sync: () => this.#sync,
      isNeeded: () => findMount(root) !== undefined || configOf(this.#context).lease !== undefined,
      onProblem: (error) => void this.events.emit('problem', { verb: 'sync', error }),
    })
    try {
      if (!waits) await this.startSync({ signal })
      const socket = await listenForCommands(root, follower)
      try {
        await follower.run(signal)
      } finally {
        await socket.close()
      }
    } finally {
      this.#isFollower = false
    }
  }

  async #giveBack(): Promise<void> {
    const paused = this.#paused
    this.#paused = undefined
    // What went wrong with it was said to whoever asked.
    ;(await paused?.catch(() => undefined))?.giveBack()
  }

  /** Ends the sync, and what this process knows of the lease: another one may give it back meanwhile. */
  async #leaveAlone(): Promise<void> {
    const sync = this.#sync
    this.#sync = undefined
    await sync?.stop()
    await this.#context.lease?.pause()
    this.#context.lease = undefined
  }

  #following(sync: Sync): Sync {
    this.#sync = sync
    sync.events.on('problem', ({ error }) => this.#context.root.noteError('sync', error))
    this.events.emit('following', sync)
    return sync
  }

  /** Makes a version of what the root holds now. @throws {SolidifyIncompleteError}, {LeaseLostError}, {RootBusyError} */
  solidify(request: SolidifyRequest = {}): Promise<SolidifyReport> {
    return this.#noted('solidify', async () => {
      const running = this.#sync
      try {
        return await solidify(this.#context, request, running)
      } finally {
        if (running !== undefined && request.live !== true) await this.#followAgain(running)
      }
    })
  }

  /** A sync ends with the upper that it follows. What goes wrong here takes nothing back of what was done, and is told. */
  async #followAgain(ended: Sync): Promise<void> {
    this.#sync = undefined
    try {
      // Where nothing was begun it runs still, and has the target.
      await ended.stop()
      if (findMount(this.#context.root) === undefined) return
      this.#following(await openUpperSync(this.#context, configOf(this.#context), { once: false }))
    } catch (cause) {
      const error = cause instanceof Error ? cause : new Error(String(cause))
      this.events.emit('problem', { verb: 'solidify', error })
    }
  }

  /** All versions that count, oldest first. */
  versions(): VersionRecord[] {
    return this.#context.home.versions()
  }

  /** Every name that two versions do not show alike, in path order; see `diffVersions`. @throws {VersionUnknownError} */
  diff(
    from: number | string,
    to: number | string,
    options: { readonly content?: boolean; readonly signal?: AbortSignal } = {},
  ): Promise<VersionDifference[]> {
    const { home } = this.#context
    return diffVersions(this.#context, home.version(from), home.version(to), options)
  }

  /**
   * Publishes the layers of an earlier version as the newest one, and begins with it. The versions between stay. The root must
   * not be mounted.
   * @throws {UnsavedChangesError}, {VersionUnknownError}, {RootBusyError}
   */
  rollback(request: RollbackRequest): Promise<VersionRecord> {
    return this.#noted('rollback', async () => {
      const { root, home, node } = this.#context
      if (findMount(root) !== undefined) throw new RootBusyError(root.mergedPath, 'it is mounted')
      const version = home.version(request.to)
      if (root.hasChanges() && request.discard !== true) throw new UnsavedChangesError(root.upperPath)
      headFor(this.#context, configOf(this.#context))
      // Until a version names them again, a gc could take its layers.
      const published = await withLayersInUse(this.#context, version.number, version.layers, async () => {
        const lease = await ensureLease(this.#context, request)
        return home.publishVersion(
          {
            parent: home.head().number,
            layers: version.layers,
            madeBy: 'rollback',
            sameAs: version.number,
            nodeId: node.id,
            nodeName: node.name,
            ...(request.message === undefined ? {} : { message: request.message }),
          },
          lease,
        )
      })
      // What follows an upper that is not mounted ends with it.
      await this.#unmount()
      startFrom(this.#context, published)
      // The new upper is empty, so nothing is lost with what lay under the old one.
      home.forgetMounted(node.id)
      return published
    })
  }

  /** Makes a second root that begins as a version of this one. Its layers are clones, by the cheapest way that works. */
  fork(request: ForkRequest): Promise<Home> {
    return fork(this.#context, request)
  }

  /** Makes the layers of a version sealed ones, or trees again; see `convertLayers`. */
  convert(request: ConvertRequest): Promise<ConvertReport> {
    return convertLayers(this.#context, request)
  }

  /** Copies the layers of a version (default the newest) into the cache of this node; the next mount takes them. */
  prefetch(
    options: { readonly version?: number | string; readonly signal?: AbortSignal } = {},
  ): Promise<PrefetchReport> {
    const { home } = this.#context
    const version = home.version(options.version)
    return prefetch(this.#context, version, options.signal)
  }

  /** Saves a version (default the newest) in a repository; see `backupVersion`. */
  backup(
    repository: Repository,
    options: { readonly version?: number | string; readonly signal?: AbortSignal } = {},
  ): Promise<BackupReport> {
    const { home } = this.#context
    const version = home.version(options.version)
    return this.#noting('backup', () => backupVersion(this.#context, repository, version, options.signal))
  }

  /** Folds layers of a version into one; see `compact`. Waits for nothing, and nothing waits for it. */
  compact(policy: CompactPolicy = {}): Promise<CompactReport> {
    return this.#noting('compact', () => compact(this.#context, policy))
  }

  /** Removes old versions and layers that nobody needs, in the home and of the replicas here. */
  async gc(policy: GcPolicy = {}): Promise<GcReport & { readonly replicas: readonly string[] }> {
    const { home, leases } = this.#context
    const claim = policy.claim ?? (await leases.read(policy.signal))?.claim
    const report = await collectGarbage(home, { ...policy, ...(claim && { claim }) })
    const replicas = await this.#dropReplicas(policy.dryRun === true)
    return { ...report, replicas }
  }

  /** A replica of a layer that the home has no more, or that is not in the base of this node, is of no use. */
  #dropReplicas(dryRun: boolean): Promise<string[]> {
    return this.#exclusive(async () => {
      const { root, home } = this.#context
      const present = new Set(home.layers().map(({ id }) => id))
      const { base } = configOf(this.#context)
      const isMounted = findMount(root) !== undefined
      const useless = root.replicas().filter((id) => !present.has(id) && !(isMounted && base.layers.includes(id)))
      if (!dryRun) for (const id of useless) root.removeReplica(id)
      return useless
    })
  }

  #noted<T>(verb: string, use: () => Promise<T>): Promise<T> {
    return this.#noting(verb, () => this.#exclusive(use))
  }

  /** Keeps what fails, for `status`. */
  async #noting<T>(verb: string, use: () => Promise<T>): Promise<T> {
    try {
      return await use()
    } catch (error) {
      if (!(error instanceof RootBusyError)) this.#context.root.noteError(verb, error)
      throw error
    }
  }

  async #exclusive<T>(use: () => Promise<T>): Promise<T> {
    const { root } = this.#context
    this.#working++
    try {
      if (this.#sync === undefined && !this.#isFollower) this.#paused ??= pauseFollower(root)
      await this.#paused
      return await root.locked(async () => {
        recoverSolidify(this.#context)
        return await use()
      })
    } finally {
      if (--this.#working === 0 && this.#sync === undefined) await this.#giveBack()
    }
  }
}

/** Who keeps the right to write a root, as its home says. */
export function leasesOf({ record, leaseDirectory }: Home, user?: EtcdLeasesOptions['user']): Leases {
  const { etcd: endpoints, durationMs } = record.lease ?? {}
  return endpoints === undefined
    ? new FileLeases(leaseDirectory, { durationMs })
    : new EtcdLeases({ endpoints, root: record.id, durationMs, user })
}

/** A node begins with the newest version; nothing of it is its own yet. */
function firstConfig(name: string, home: Home): NodeRootRecord {
  const { number, layers } = home.head()
  return {
    format: 1,
    name,
    home: textOf(home.path),
    rootId: home.record.id,
    base: { version: number, layers },
    upperId: randomHex(16),
    incomingEpoch: 0,
    seenEpoch: 0,
  }
}

function homePathOf({ home }: NodeRootRecord): HostPath {
  return bytesOf(home) as HostPath
}
