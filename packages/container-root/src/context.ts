import type { EventEmitter } from 'node:events'
import { close, type HostPath, LsyncError, printable, randomHex } from '@lsync/posix'
import type { Sync } from '@lsync/sync'
import type { Home } from './home.ts'
import type { LayerCache, OpenedLayer } from './layer-cache.ts'
import { type Lease, LeaseLostError, type Leases, StoreWentBackError } from './lease.ts'
import { copyRootMeta, findMount, mountRoot, withLayers } from './mount.ts'
import type { NodeRoot } from './node-state.ts'
import type { LayerRecord, MountedRecord, NodeRecord, NodeRootRecord, VersionRecord } from './records.ts'
import { openSealed } from './sealed-layer.ts'

/** The upper lies on a version that is not the newest one any more: another node has published since. */
export class UpperStaleError extends LsyncError {
  constructor(path: string, base: number, head: number) {
    super(
      'UPPER_STALE',
      `${printable(path)} lies on version ${base}, but the newest version is ${head}, which knows nothing of what is in it`,
      { path, hint: 'save what is needed from it, then go on from the newest version: `lsync root mount --discard`' },
    )
  }
}

/** What is asked for would lose changes that are in no version. */
export class UnsavedChangesError extends LsyncError {
  constructor(path: string) {
    super('CHANGES_UNSAVED', `${printable(path)} has changes that are in no version`, {
      path,
      hint: 'solidify first, or give them up with --discard',
    })
  }
}

/** Steps of an operation, as they are reached. */
export interface RootEvents {
  step: [{ readonly verb: string; readonly step: string; readonly elapsedMs: number }]
  /** Something went wrong that did not end the operation. */
  problem: [{ readonly verb: string; readonly error: Error }]
  /** An upper of the root is followed from now on; the one before ended. */
  following: [Sync]
}

/** One root on one node, with all that its operations need. */
export interface RootContext {
  readonly name: string
  readonly home: Home
  readonly node: NodeRecord
  readonly root: NodeRoot
  readonly leases: Leases
  /** The layers of all roots that lie on this node. */
  readonly cache: LayerCache | undefined
  readonly events: EventEmitter<RootEvents>
  /** The lease that this process has, kept between operations. */
  lease: Lease | undefined
}

/** How the node calls itself when it claims a lease: readable, and unlike any other. */
export function leaseNameOf({ name, id }: NodeRecord): string {
  return `${name}-${id.slice(0, 12)}`
}

/** The configuration of the root, which is there once the root was opened. */
export function configOf({ root, name }: RootContext): NodeRootRecord {
  const config = root.readConfig()
  if (config === undefined) throw new Error(`the root ${name} was opened without a configuration`)
  return config
}

/** Whether a version is the one under the upper, or the last that was made of the upper itself. */
export function standsOn(
  { base, liveVersion }: NodeRootRecord,
  { number, layers }: Pick<VersionRecord, 'number' | 'layers'>,
): boolean {
  return number === liveVersion || (number === base.version && layers.join() === base.layers.join())
}

/**
 * The newest version, which is never older than the one that this node stands on, nor another one of that number: whoever
 * keeps the lease alone cannot see that the store was restored from a copy that was made under the same lease.
 * @throws {StoreWentBackError}
 */
export function headFor({ home }: RootContext, config: NodeRootRecord): VersionRecord {
  const head = home.head()
  const seen = Math.max(config.base.version, config.liveVersion ?? 0)
  if (head.number > seen || (head.number === seen && standsOn(config, head))) return head
  const found = head.number < seen ? `version ${head.number}` : `another version ${seen}`
  throw new StoreWentBackError(home.path, found, `version ${seen}`)
}

/**
 * Makes sure that what is published next stands on the newest version: a lease alone does not say that nobody has published
 * between two that this node had.
 * @throws {UpperStaleError}, {StoreWentBackError}
 */
export function assertCurrent(context: RootContext, config: NodeRootRecord): void {
  const head = headFor(context, config)
  if (!standsOn(config, head)) throw new UpperStaleError(context.root.upperPath, config.base.version, head.number)
}

/**
 * The right to write the root: the one that this process or this node has already, or a new claim. The copy of the upper moves
 * along to the new epoch's directory.
 * @throws {LeaseHeldError} if another node has it; {LeaseLostError} if it was lost while the upper has changes, which
 * `discard` gives up
 */
export async function ensureLease(
  context: RootContext,
  options: {
    readonly signal?: AbortSignal | undefined
    readonly takeover?: 'expired' | 'force' | undefined
    readonly discard?: boolean | undefined
  } = {},
): Promise<Lease> {
  const { root, leases, node, home } = context
  const config = configOf(context)
  const lease = (await standing(context, config, options.discard === true)) ?? (await claim())
  context.lease = lease
  if (config.lease?.epoch === lease.epoch && config.incomingEpoch === lease.epoch) return lease
  home.moveIncoming(config.upperId, config.incomingEpoch, lease.epoch)
  const { epoch, token } = lease.claim
  root.writeConfig({ ...config, lease: { epoch, token }, incomingEpoch: epoch, seenEpoch: epoch })
  return lease

  async function claim(): Promise<Lease> {
    const { signal, takeover } = options
    const request = { node: leaseNameOf(node), seenEpoch: config.seenEpoch, signal }
    if (takeover === undefined) {
      const state = await leases.read(signal)
      // Its own claim that it knows nothing of: the process that made it was killed before it could note it, for this one has the
      // root's lock.
      const isUnnoted =
        state?.isReleased === false && state.claim.node === request.node && state.claim.epoch >= config.seenEpoch
      // Whoever gave a lease back publishes nothing under it any more.
      if (!isUnnoted) return leases.acquire(request)
    }
    const lease = await leases.takeover({ ...request, force: takeover !== 'expired' })
    home.fence(lease.epoch)
    return lease
  }
}

async function standing(context: RootContext, config: NodeRootRecord, discard: boolean): Promise<Lease | undefined> {
  const { lease, leases, root } = context
  try {
    if (lease !== undefined && !lease.signal.aborted) {
      await lease.heartbeat()
      return lease
    }
    return config.lease === undefined ? undefined : await leases.resume(config.lease)
  } catch (error) {
    // What another node published since knows nothing of the changes in this upper.
    if (!(error instanceof LeaseLostError) || (root.hasChanges() && !discard)) throw error
    return undefined
  }
}

/**
 * Gives the right to write back, to whoever claims it first or to one node. One that was lost is forgotten where nothing is lost
 * with it.
 * @throws {LeaseLostError} unless it `mayBeLost`
 */
export async function giveLeaseBack(
  context: RootContext,
  { to, mayBeLost }: { readonly to?: string | undefined; readonly mayBeLost: boolean },
): Promise<void> {
  const { lease: held, ...rest } = configOf(context)
  try {
    const lease = context.lease ?? (held === undefined ? undefined : await context.leases.resume(held))
    context.lease = undefined
    await lease?.release({ to })
  } catch (error) {
    if (!(error instanceof LeaseLostError) || !mayBeLost) throw error
  }
  context.root.writeConfig(rest)
}

/** A layer that lies on this node costs less than one that is read over a network, also if there are some more. */
const LOCAL_COST = 1
const STORE_COST = 3

/** The layers that this node mounts for a version's list: replicas where it has them, and as few as possible. */
export function layersFor(context: RootContext, list: readonly string[]): readonly LayerRecord[] {
  const isLocal = localLayers(context)
  return context.home.requireLayers(list, ({ id }) => (isLocal(id) === undefined ? STORE_COST : LOCAL_COST))
}

/** Tells where this node has a layer: as the upper that it was made of, or in its cache. */
export function localLayers({ root, cache }: RootContext): (id: string) => 'replica' | 'cache' | undefined {
  const replicas = new Set(root.replicas())
  return (id) => (replicas.has(id) ? 'replica' : cache?.has(id) === true ? 'cache' : undefined)
}

/** Opens the nearest copy of a layer. */
function openLayer({ home, root, cache }: RootContext, { id, form }: LayerRecord): OpenedLayer {
  const replica = root.openReplica(id)
  if (replica !== undefined) return closing(replica)
  const cached = cache?.openLayer(id)
  if (cached !== undefined) return cached
  return closing(
    form === 'erofs' ? openSealed(`${home.layerPath(id)}/layer.erofs` as HostPath) : home.openLayerTree(id),
  )
}

function closing(fd: number): OpenedLayer {
  return { fd, close: () => close(fd) }
}

/** How many of the layers of a version this node has, and of how many it needs. */
export interface PrefetchReport {
  readonly version: number
  readonly local: number
  readonly of: number
}

/** Copies layers of a version into the cache of this node, unless it has them. What has no place stays away. */
export async function prefetch(
  context: RootContext,
  { number: version, layers: list }: Pick<VersionRecord, 'number' | 'layers'>,
  signal?: AbortSignal,
): Promise<PrefetchReport> {
  const { home } = context
  return withLayersInUse(
    context,
    version,
    list,
    async (layers) => {
      const isLocal = localLayers(context)
      const missing = layers.filter(({ id }) => isLocal(id) === undefined)
      const { namespace } = home.record
      const wanted = missing.map(({ id, form }) => ({
        id,
        source: {
          form,
          path: `${home.layerPath(id)}/${form === 'erofs' ? 'layer.erofs' : 'tree'}` as HostPath,
          namespace,
        },
      }))
      const came = (await context.cache?.prefetch(wanted, signal)) ?? 0
      return { version, local: layers.length - missing.length + came, of: layers.length }
    },
    () => layersFor(context, list),
  )
}

/** Makes an empty upper for a list of layers: it looks like their root. */
export function makeUpperOn(context: RootContext, list: readonly string[]): void {
  const [top] = layersFor(context, list)
  withLayers([() => openLayer(context, top as LayerRecord)], ([fd]) => {
    context.root.makeUpper((upper) => copyRootMeta(fd as number, upper, context.home.record.namespace))
  })
}

/** Goes on from a version with an empty upper; the copy of the old one goes. There must be no changes, or they are given up. */
export function startFrom(context: RootContext, version: VersionRecord): void {
  const { root, home } = context
  const { liveVersion: _, ...rest } = configOf(context)
  for (const epoch of home.incomingEpochs(rest.upperId)) {
    if (epoch <= rest.incomingEpoch) home.removeIncoming(epoch, rest.upperId)
  }
  const next: NodeRootRecord = {
    ...rest,
    base: { version: version.number, layers: version.layers },
    upperId: randomHex(16),
  }
  root.discardUpper()
  root.clearIndex()
  root.clearStaging()
  // Without an upper, whatever happens next makes a new one for the base that it finds.
  root.writeConfig(next)
  makeUpperOn(context, next.base.layers)
}

/** Mounts the root on the layers of its base, after saying on the store that it uses them. */
export function mountBase(context: RootContext): void {
  const { root, home, node } = context
  if (findMount(root) !== undefined) return
  const { base, incomingEpoch: epoch } = configOf(context)
  if (!root.has('upper')) makeUpperOn(context, base.layers)
  const use = { purpose: 'mount', id: node.id, version: base.version, epoch } as const
  const layers = recordUse(context, use, () => layersFor(context, base.layers))
  withLayers(
    layers.map((layer) => () => openLayer(context, layer)),
    (fds) => mountRoot(root, fds, home.record.namespace),
  )
  context.events.emit('step', { verb: 'mount', step: `mounted on ${node.name}`, elapsedMs: 0 })
}

/** Chooses layers and says that this node needs them; a `gc` that did not see it in time gives them back, or leaves others. */
function recordUse(
  { home, node }: Pick<RootContext, 'home' | 'node'>,
  use: Pick<MountedRecord, 'purpose' | 'id' | 'version' | 'epoch'>,
  choose: () => readonly LayerRecord[],
): readonly LayerRecord[] {
  for (;;) {
    const layers = choose()
    const ids = layers.map(({ id }) => id)
    // On a full store a container comes back on what it had: nothing need be written that is there.
    if (!isRecorded(home, use, ids)) {
      home.recordMounted({ format: 1, ...use, nodeId: node.id, nodeName: node.name, layers: ids, sinceMs: Date.now() })
    }
    if (choose().every(({ id }, i) => id === ids[i])) return layers
  }
}

function isRecorded(home: Home, use: Parameters<typeof recordUse>[1], layers: readonly string[]): boolean {
  const known = home.mounted().find(({ id }) => id === use.id)
  return (
    known !== undefined &&
    known.purpose === use.purpose &&
    known.version === use.version &&
    known.epoch === use.epoch &&
    known.layers.join() === layers.join()
  )
}

/** Reads layers of a version's list while no `gc` removes them: their paths, top first. */
export async function withLayersInUse<T>(
  context: Pick<RootContext, 'home' | 'node'>,
  version: number,
  list: readonly string[],
  use: (layers: readonly LayerRecord[]) => Promise<T>,
  choose: () => readonly LayerRecord[] = () => context.home.requireLayers(list),
): Promise<T> {
  const { home } = context
  const id = randomHex(16)
  try {
    return await use(recordUse(context, { purpose: 'work', id, version, epoch: 0 }, choose))
  } finally {
    home.forgetMounted(id)
  }
}
