import { cloneLayer } from '@lsync/overlay-merge'
import { type HostPath, randomHex, textOf } from '@lsync/posix'
import { type RootContext, withLayersInUse } from './context.ts'
import { Home, newLayer } from './home.ts'
import { withLayerTrees } from './layer-trees.ts'
import type { LayerRecord } from './records.ts'
import { sealInto } from './seal-into.ts'
import { copyDurably, LayerDamagedError } from './sealed-layer.ts'
import { type LayerStorage, layerFormFor } from './store-form.ts'

export interface ForkRequest {
  /** The home to make. */
  readonly home: HostPath
  /** Number or tag; default the newest. */
  readonly version?: number | string
  /** How its layers are kept. Default: as the store can (`tryStore`). A sealed layer stays one. */
  readonly layerForm?: LayerStorage
  readonly signal?: AbortSignal
}

/** Makes a second root that begins as a version of another. Trees become clones, by the cheapest way that works. */
export async function fork(context: RootContext, request: ForkRequest): Promise<Home> {
  const { home, node } = context
  const version = home.version(request.version)
  const { namespace, id: rootId, lease } = home.record
  const record = {
    format: 1,
    id: randomHex(16),
    createdAtMs: Date.now(),
    namespace,
    layerForm: request.layerForm ?? layerFormFor(request.home),
    forkedFrom: { rootId, version: version.number },
    ...(lease === undefined ? {} : { lease }),
  } as const
  return withLayersInUse(context, version.number, version.layers, (layers) =>
    Home.create(request.home, record, async (made) => {
      const ids: string[] = []
      for (const layer of layers) ids.push(await copyLayer(context, layer, made, request.signal))
      made.publishFirst({ layers: ids, madeBy: 'fork', nodeId: node.id, nodeName: node.name })
    }),
  )
}

/** Copies a layer of a home into another. Gives its id there. */
function copyLayer(
  context: RootContext,
  layer: LayerRecord,
  to: Home,
  signal: AbortSignal | undefined,
): Promise<string> {
  const { home, root, events } = context
  const copy = newLayer({ isBottom: layer.isBottom, madeBy: 'fork' })
  const source = home.layerPath(layer.id)
  if (layer.form === 'erofs') {
    return to.withScratch(0, copy.id, async (path, name) => {
      const sha256 = await copyDurably(textOf(`${source}/layer.erofs`), textOf(`${path}/layer.erofs`), signal)
      const { entries, contentBytes, image } = layer
      if (image !== undefined && image.sha256 !== sha256) throw new LayerDamagedError(`${source}/layer.erofs`)
      to.promote(0, name, {
        ...copy,
        form: 'erofs',
        ...(image && { image }),
        ...(entries === undefined ? {} : { entries }),
        ...(contentBytes === undefined ? {} : { contentBytes }),
      })
      return copy.id
    })
  }
  return withLayerTrees(context, [layer], async ([tree]) => {
    const from = tree as HostPath
    if (to.record.layerForm === 'sealed') {
      const onLoss = (error: Error) => events.emit('problem', { verb: 'fork', error })
      const request = { tree: from, record: copy, epoch: 0, scratch: root.path, onLoss, signal }
      await sealInto(to, request, (name, sealed) => to.promote(0, name, sealed))
      return copy.id
    }
    return to.withScratch(0, layer.id, async (path) => {
      const { namespace } = home.record
      const made = `${path}/tree` as HostPath
      await cloneLayer({ from, to: made, namespace, sharesInodes: true, ...(signal && { signal }) })
      return to.adoptTree(made, copy)
    })
  })
}
