import { type ByteString, type HostPath, makeDirectory, openRoot, unmount, withFd } from '@lsync/posix'
import type { RootContext } from './context.ts'
import type { LayerRecord } from './records.ts'
import { mountSealed } from './sealed-layer.ts'

/** Layers of the home as directories, to be read: sealed ones are mounted meanwhile in the state of this node. */
export async function withLayerTrees<T>(
  { home, root }: Pick<RootContext, 'home' | 'root'>,
  layers: readonly Pick<LayerRecord, 'id' | 'form'>[],
  use: (trees: readonly HostPath[]) => Promise<T>,
): Promise<T> {
  const treeOf = ({ id }: Pick<LayerRecord, 'id'>) => `${home.layerPath(id)}/tree` as HostPath
  if (layers.every(({ form }) => form === 'tree')) return await use(layers.map(treeOf))
  return root.withScratch(async (scratch) => {
    const mounted: HostPath[] = []
    try {
      const trees = layers.map((layer) => {
        if (layer.form === 'tree') return treeOf(layer)
        const at = `${scratch}/${layer.id}` as HostPath
        withFd(openRoot(scratch), (fd) => makeDirectory(fd, layer.id as ByteString, 0o700))
        mountSealed(`${home.layerPath(layer.id)}/layer.erofs` as HostPath, at)
        mounted.push(at)
        return at
      })
      return await use(trees)
    } finally {
      // Whoever looks at one still, by a copy of the mount in another namespace, keeps nobody waiting.
      for (const at of mounted) unmount(at, { lazy: true })
    }
  })
}
