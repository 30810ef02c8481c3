import { type MergeReport, merge } from '@lsync/overlay-merge'
import type { HostPath } from '@lsync/posix'
import { type RootContext, withLayersInUse } from './context.ts'
import { newLayer } from './home.ts'
import { withLayerTrees } from './layer-trees.ts'
import type { LayerRecord } from './records.ts'
import { sealInto } from './seal-into.ts'

/** When layers are worth folding into one. */
export interface CompactPolicy {
  /** So many layers a version may have before some are folded. Default 8. */
  readonly maxLayers?: number
  /** Fold into the bottom as well: the result shows everything, and costs as much as a copy of it where cloning does. */
  readonly intoBottom?: boolean
  /** Which version; default the newest. */
  readonly version?: number | string
  readonly dryRun?: boolean
  readonly signal?: AbortSignal
}

export interface CompactReport {
  readonly version: number
  /** The layers before, top first, and after. */
  readonly before: readonly string[]
  readonly after: readonly string[]
  /** The layer that was made; absent where nothing was worth it. */
  readonly layerId?: string
  readonly folded: readonly string[]
  readonly counts?: MergeReport['counts']
  readonly elapsedMs: number
}

const MAX_LAYERS = 8

/**
 * Folds layers of a version into one more layer, which stands for them from then on: mounts take it instead, versions stay as
 * they are, and `gc` removes what it stands for once nobody needs it. Needs no lease: layers never change, and two nodes that
 * do it at once make two layers that show the same. Killed anywhere, nothing has happened.
 */
export async function compact(context: RootContext, policy: CompactPolicy = {}): Promise<CompactReport> {
  const startMs = performance.now()
  const { home } = context
  const { number: version, layers: list } = home.version(policy.version)
  return withLayersInUse(context, version, list, async (layers) => {
    const before = layers.map(({ id }) => id)
    const [from, to] = rangeToFold(layers, policy)
    const folded = layers.slice(from, to)
    const nothing = { version, before, folded: folded.map(({ id }) => id) }
    if (folded.length < 2 || policy.dryRun === true) {
      return { ...nothing, after: before, elapsedMs: performance.now() - startMs }
    }
    const record = newLayer({
      isBottom: folded.at(-1)?.isBottom === true,
      covers: folded.flatMap(({ covers }) => covers),
      madeBy: 'compact',
    })
    const { id } = record
    const counts = await withLayerTrees(context, folded, (trees) => fold(context, trees, record, policy.signal))
    const after = [...before.slice(0, from), id, ...before.slice(to)]
    return { ...nothing, after, layerId: id, counts, elapsedMs: performance.now() - startMs }
  })
}

/** The longest run of deltas, once there are more layers than the policy allows; with the bottom if it says so. */
function rangeToFold(layers: readonly LayerRecord[], policy: CompactPolicy): readonly [from: number, to: number] {
  const { maxLayers = MAX_LAYERS, intoBottom = false } = policy
  if (layers.length <= maxLayers) return [0, 0]
  let best: readonly [number, number] = [0, 0]
  let from = 0
  for (const [i, { isBottom }] of layers.entries()) {
    if (isBottom && !intoBottom) from = i + 1
    else if (i + 1 - from > best[1] - best[0]) best = [from, i + 1]
  }
  return best
}

async function fold(
  context: RootContext,
  [upper, ...lowers]: readonly HostPath[],
  record: LayerRecord,
  signal: AbortSignal | undefined,
): Promise<MergeReport['counts']> {
  const { home, root } = context
  const mergeTo = (path: HostPath) =>
    merge({
      mode: record.isBottom ? 'output' : 'delta',
      upper: upper as HostPath,
      lowers,
      output: `${path}/tree` as HostPath,
      namespace: home.record.namespace,
      allowEmpty: true,
      ...(signal === undefined ? {} : { signal }),
    })
  if (home.record.layerForm === 'tree') {
    return home.withScratch(0, record.id, async (path, name) => {
      const { counts } = await mergeTo(path)
      home.promote(0, name, record)
      return counts
    })
  }
  return root.withScratch(async (path) => {
    const { counts } = await mergeTo(path)
    const onLoss = (error: Error) => context.events.emit('problem', { verb: 'compact', error })
    const request = { tree: `${path}/tree` as HostPath, record, epoch: 0, scratch: path, onLoss, signal }
    await sealInto(home, request, (name, sealed) => home.promote(0, name, sealed))
    return counts
  })
}
