import { readableStatus, type Sync, type SyncStatus } from '@lsync/sync'
import { configOf, localLayers, type RootContext } from './context.ts'
import { followerStatus } from './follower.ts'
import { chooseLayers } from './layer-choice.ts'
import { findMount } from './mount.ts'
import type { LayerRecord } from './records.ts'

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
  /** What could not be found out, and why. */
  readonly errors: readonly { readonly what: string; readonly code: string; readonly message: string }[]
}

/** What is known without claiming, waiting for others or changing anything. What does not answer becomes an error in it. */
export async function statusOf(context: RootContext, sync: Sync | undefined): Promise<RootStatus> {
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
  const state = await attempt('lease', () => leases.read())
  const nodes = await attempt('nodes', () =>
    home
      .mounted()
      .flatMap(({ purpose, nodeName, version }) => (purpose === 'mount' ? { node: nodeName, version } : [])),
  )
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
