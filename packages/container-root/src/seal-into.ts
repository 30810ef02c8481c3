import { type HostPath, textOf } from '@lsync/posix'
import type { Home } from './home.ts'
import type { LayerRecord } from './records.ts'
import { SealLossyError, type SealRequest, sealLayer } from './sealed-layer.ts'

export interface SealIntoRequest {
  readonly tree: HostPath
  /** What the layer will be; its form, its image and what was counted are added. */
  readonly record: LayerRecord
  /** In whose incoming area it is made. */
  readonly epoch: number
  /** A directory of this node, where the image is built. */
  readonly scratch: HostPath
  /** Go on where chattr flags are lost, which no image can hold. Default true. */
  readonly lossy?: boolean | undefined
  /** As `SealRequest` says. Default false. */
  readonly isUrgent?: boolean | undefined
  /** As `SealRequest` says. */
  readonly counts?: SealRequest['counts']
  /** Hears of flags that are lost. */
  readonly onLoss?: ((loss: SealLossyError) => void) | undefined
  readonly signal?: AbortSignal | undefined
}

/** Makes a sealed layer of a tree that nobody changes meanwhile; `publish` gets the record with which it is promoted, and does that. */
export function sealInto<T>(
  home: Home,
  { tree, record, epoch, scratch, lossy = true, isUrgent, counts, onLoss, signal }: SealIntoRequest,
  publish: (name: string, record: LayerRecord) => Promise<T> | T,
): Promise<T> {
  return home.withScratch(epoch, record.id, async (path, name) => {
    const report = await sealLayer({
      layer: tree,
      image: `${path}/layer.erofs` as HostPath,
      scratch: textOf(scratch),
      lossy,
      isUrgent,
      counts,
      signal,
    })
    const { sizeBytes, sha256, entries, contentBytes, losses } = report
    if (losses.length > 0) onLoss?.(new SealLossyError(tree, losses))
    return publish(name, { ...record, form: 'erofs', entries, contentBytes, image: { sizeBytes, sha256 } })
  })
}
