import { textOf } from '@lsync/posix'
import { readableStatus, type Sync, type SyncStatus } from '@lsync/sync'
import { configOf, localLayers, type RootContext } from './context.ts'
import { followerStatus } from './follower.ts'
import type { Home } from './home.ts'
import { chooseLayers } from './layer-choice.ts'
import type { Leases } from './lease.ts'
import { findMount } from './mount.ts'
import type { ErrorsRecord, LayerRecord } from './records.ts'
import { measureSpace, type RootSpace } from './space.ts'

/** One layer of the base, as it would be mounted now. */
export interface LayerStatus extends Pick<LayerRecord, 'id' | 'form' | 'isBottom' | 'madeBy'> {
  /** How many of a version's layers it stands for. */
  readonly covers: number
  /** Where this node has it, nearer than the store: the upper that it was, or a copy in the cache. */
  readonly local?: 'replica' | 'cache'
}

/** Where a root stands, on this node and in its home. */
export interface RootStatus {
  readonly name: string
  readonly rootId: string
  /** Text (`textOf`). */
  readonly home: string
  readonly isMounted: boolean
  /** As the kernel shows them; only while it is mounted. */
  readonly mountOptions: readonly string[]
  /** Whether the upper has anything that is in no version. After a live solidify it still has all that was published then. */
  readonly hasChanges: boolean
  /** The version under the upper, the one that was made of it last while it stayed in use, and the newest one. */
  readonly version: number
  readonly liveVersion?: number
  readonly head?: number
  /** Top first; absent where the store does not answer or lacks some. */
  readonly layers?: readonly LayerStatus[]
  readonly lease?: {
    readonly epoch: number
    readonly node: string
    readonly isOurs: boolean
    readonly isReleased: boolean
  }
  readonly nodes?: readonly { readonly node: string; readonly version: number }[]
  /** What an interrupted operation left, to be recovered by the next one. */
  readonly unfinished?: 'solidify'
  /** Of whoever follows the root on this node, in whatever process. */
  readonly sync?: SyncStatus
  /** Only where it was asked for: it takes a look at every layer. */
  readonly space?: RootSpace
  /** What failed on this node, the newest first, ten at most. */
  readonly lastErrors: ErrorsRecord['errors']
  /** What could not be found out, and why. */
  readonly errors: readonly { readonly what: string; readonly code: string; readonly message: string }[]
}

export interface StatusOptions {
  /** Measure what the root takes as well: lists every layer. */
  readonly space?: boolean
  readonly signal?: AbortSignal
}

/** What is known without claiming, waiting for others or changing anything. What does not answer becomes an error in it. */
export async function statusOf(
  context: RootContext,
  sync: Sync | undefined,
  options: StatusOptions = {},
): Promise<RootStatus> {
  const { root, home, leases, name } = context
  const config = configOf(context)
  const errors: RootStatus['errors'][number][] = []
  const attempt = async <T>(what: string, ask: () => T | Promise<T>): Promise<T | undefined> => {
    try {
      return await ask()
    } catch (error) {
      const { code = 'UNKNOWN', message } = error as Error & { code?: string }
      errors.push({ what, code, message })
      return undefined
    }
  }
  const mounted = findMount(root)
  const following = sync === undefined ? await attempt('sync', () => followerStatus(root)) : readableStatus(sync.status)
  const head = await attempt('head', () => home.head().number)
  const layers = await attempt('layers', () => layersOf(context, config.base.layers))
  const state = await attempt('lease', () => leases.read(options.signal))
  const space = options.space === true ? await attempt('space', () => measureSpace(context, options.signal)) : undefined
  const lastErrors = await attempt('last errors', () => root.lastErrors())
  const nodes = await attempt('nodes', () => nodesOf(home))
  return {
    name,
    rootId: config.rootId,
    home: config.home,
    isMounted: mounted !== undefined,
    mountOptions: mounted?.options ?? [],
    hasChanges: root.hasChanges(),
    version: config.base.version,
    ...(config.liveVersion === undefined ? {} : { liveVersion: config.liveVersion }),
    ...(head === undefined ? {} : { head }),
    ...(layers === undefined ? {} : { layers }),
    ...(state === undefined
      ? {}
      : {
          lease: {
            epoch: state.claim.epoch,
            node: state.claim.node,
            isOurs: state.claim.token === config.lease?.token,
            isReleased: state.isReleased,
          },
        }),
    ...(nodes === undefined ? {} : { nodes }),
    ...(root.readSolidify() === undefined ? {} : { unfinished: 'solidify' as const }),
    ...(following === undefined ? {} : { sync: following }),
    ...(space === undefined ? {} : { space }),
    lastErrors: lastErrors ?? [],
    errors,
  }
}

function layersOf(context: RootContext, list: readonly string[]): LayerStatus[] | undefined {
  const isLocal = localLayers(context)
  return chooseLayers(list, context.home.layers())?.map(({ id, form, isBottom, madeBy, covers }) => {
    const local = isLocal(id)
    return { id, form, isBottom, madeBy, covers: covers.length, ...(local && { local }) }
  })
}

/** Where a root stands in its home, whatever nodes have it. */
export interface HomeStatus {
  readonly rootId: string
  /** Text (`textOf`). */
  readonly home: string
  readonly layerForm: 'tree' | 'sealed'
  readonly head: number
  readonly versions: number
  readonly layers: number
  readonly lease?: { readonly epoch: number; readonly node: string; readonly isReleased: boolean }
  readonly nodes: readonly { readonly node: string; readonly version: number }[]
}

/** What a home says, without a state of this node. */
export async function statusOfHome(home: Home, leases: Leases, signal?: AbortSignal): Promise<HomeStatus> {
  const versions = home.versions()
  const state = await leases.read(signal)
  return {
    rootId: home.record.id,
    home: textOf(home.path),
    layerForm: home.record.layerForm,
    head: home.head().number,
    versions: versions.length,
    layers: home.layers().length,
    ...(state && { lease: { epoch: state.claim.epoch, node: state.claim.node, isReleased: state.isReleased } }),
    nodes: nodesOf(home),
  }
}

function nodesOf(home: Home): { readonly node: string; readonly version: number }[] {
  return home
    .mounted()
    .flatMap(({ purpose, nodeName, version }) => (purpose === 'mount' ? { node: nodeName, version } : []))
}
