import { cloneLayer } from '@lsync/overlay-merge'
import { type HostPath, LsyncError, printable } from '@lsync/posix'
import { type RootContext, withLayersInUse } from './context.ts'
import { newLayer } from './home.ts'
import { withLayerTrees } from './layer-trees.ts'
import type { LayerRecord } from './records.ts'
import { sealInto } from './seal-into.ts'
import { type LayerStorage, tryStore } from './store-form.ts'

/** A store lacks what a layer as a directory needs. */
export class StoreHoldsNoTreesError extends LsyncError {
  constructor(path: string, lacking: readonly string[]) {
    super(
      'STORE_HOLDS_NO_TREES',
      `${printable(path)} cannot hold layers as directories: it lacks ${lacking.join(', ')}`,
      {
        path,
        hint: 'keep its layers sealed, or use another store',
      },
    )
  }
}

export interface ConvertRequest {
  readonly to: LayerStorage
  /** Which version; default the newest. */
  readonly version?: number | string
  readonly signal?: AbortSignal
}

export interface ConvertReport {
  readonly version: number
  /** The layers that were made, and which they stand for. */
  readonly made: readonly { readonly id: string; readonly from: string }[]
  readonly elapsedMs: number
}

/**
 * Makes another layer of each of a version's that has not this form: it stands for the same from then on, and `gc` removes the one
 * that it was made of once nobody has it mounted. Needs no lease, as `compact`. Killed anywhere, some are made.
 * @throws {StoreHoldsNoTreesError}
 */
export async function convertLayers(context: RootContext, request: ConvertRequest): Promise<ConvertReport> {
  const startMs = performance.now()
  const { home } = context
  const version = home.version(request.version)
  const form = request.to === 'sealed' ? 'erofs' : 'tree'
  if (form === 'tree') {
    const { lacking } = tryStore(home.path)
    if (lacking.length > 0) throw new StoreHoldsNoTreesError(home.path, lacking)
  }
  const made = await withLayersInUse(context, version.number, version.layers, async (layers) => {
    const all: { id: string; from: string }[] = []
    for (const layer of layers) {
      if (layer.form !== form) all.push({ id: await convert(context, layer, request.signal), from: layer.id })
    }
    return all
  })
  return { version: version.number, made, elapsedMs: performance.now() - startMs }
}

function convert(context: RootContext, layer: LayerRecord, signal: AbortSignal | undefined): Promise<string> {
  const { home, root, events } = context
  const record = newLayer({ isBottom: layer.isBottom, covers: layer.covers, madeBy: 'seal' })
  return withLayerTrees(context, [layer], async ([tree]) => {
    if (layer.form === 'tree') {
      const onLoss = (error: Error) => events.emit('problem', { verb: 'seal', error })
      const request = { tree: tree as HostPath, record, epoch: 0, scratch: root.path, onLoss, signal }
      await sealInto(home, request, (name, sealed) => home.promote(0, name, sealed))
    } else {
      await home.withScratch(0, record.id, async (path, name) => {
        const { namespace } = home.record
        const to = `${path}/tree` as HostPath
        await cloneLayer({ from: tree as HostPath, to, namespace, sharesInodes: false, ...(signal && { signal }) })
        home.promote(0, name, record)
      })
    }
    return record.id
  })
}
