import { compareStacks } from '@lsync/overlay-merge'
import {
  type ByteString,
  close,
  DT_DIR,
  DT_REG,
  type HostPath,
  O_DIRECTORY,
  O_NOFOLLOW,
  openBeneath,
  openRoot,
  readDirents,
  statAt,
  withFd,
} from '@lsync/posix'
import { configOf, type RootContext, withLayersInUse } from './context.ts'
import { withLayerTrees } from './layer-trees.ts'

/** What a root takes, in bytes of content. */
export interface RootSpace {
  /** The upper on this node. */
  readonly upperBytes: number
  /** The replicas that this node keeps of layers. */
  readonly replicaBytes: number
  /** All layers under the upper, in the home. */
  readonly layerBytes: number
  /** What of that has names elsewhere, too, such as in a fork by hard links: it goes only with those. */
  readonly sharedBytes: number
  /** What of it no view shows any more: a compaction would free it. */
  readonly shadowedBytes: number
}

interface Counted {
  /** Of each inode once. */
  bytes: number
  /** Of each name. */
  namedBytes: number
  sharedBytes: number
}

/** Measures what a root takes: lists every layer under its upper, and the view of them. */
export async function measureSpace(context: RootContext, signal?: AbortSignal): Promise<RootSpace> {
  const { root, home } = context
  const { base } = configOf(context)
  const upper = root.has('upper') ? await count(root.upperPath, signal) : NOTHING
  let replicaBytes = 0
  for (const id of root.replicas())
    replicaBytes += (await count(`${root.path}/replicas/${id}` as HostPath, signal)).bytes
  return withLayersInUse(context, base.version, base.layers, (layers) =>
    withLayerTrees(context, layers, async (trees) => {
      let [layerBytes, namedBytes, sharedBytes] = [0, 0, 0]
      for (const tree of trees) {
        const counted = await count(tree, signal)
        layerBytes += counted.bytes
        namedBytes += counted.namedBytes
        sharedBytes += counted.sharedBytes
      }
      const [top, ...lowers] = trees
      const stack = { upper: top as HostPath, lowers, namespace: home.record.namespace }
      const shown = trees.length === 1 ? namedBytes : await shownBytes(stack, signal)
      const shadowedBytes = Math.max(0, namedBytes - shown)
      return { upperBytes: upper.bytes, replicaBytes, layerBytes, sharedBytes, shadowedBytes }
    }),
  )
}

// A view is equal to itself, and was counted by that.
async function shownBytes(
  stack: Parameters<typeof compareStacks>[0],
  signal: AbortSignal | undefined,
): Promise<number> {
  return (await compareStacks(stack, stack, { content: false, signal })).bytes
}

const NOTHING: Counted = { bytes: 0, namedBytes: 0, sharedBytes: 0 }
const TURN_MS = 20

async function count(tree: HostPath, signal: AbortSignal | undefined): Promise<Counted> {
  const counted = { ...NOTHING }
  const linked = new Map<string, { names: number; readonly nlink: number; readonly sizeBytes: number }>()
  const pending: (ByteString | '')[] = ['']
  let turn = performance.now()
  const root = openRoot(tree)
  const countIn = (path: ByteString | '') =>
    withFd(openBeneath(root, path, O_DIRECTORY | O_NOFOLLOW), (fd) =>
      readDirents(fd, (name, type) => {
        if (type === DT_DIR) pending.push((path === '' ? name : `${path}/${name}`) as ByteString)
        if (type !== DT_REG) return
        const { sizeBytes, nlink, ino, dev, blocks } = statAt(fd, name)
        // The data of a metacopy is in another layer.
        if (blocks === 0) return
        counted.namedBytes += sizeBytes
        const known = linked.get(`${dev}:${ino}`)
        if (known !== undefined) known.names++
        else {
          counted.bytes += sizeBytes
          if (nlink > 1) linked.set(`${dev}:${ino}`, { names: 1, nlink, sizeBytes })
        }
      }),
    )
  try {
    for (let path = pending.pop(); path !== undefined; path = pending.pop()) {
      countIn(path)
      if (performance.now() - turn < TURN_MS) continue
      await new Promise(setImmediate)
      signal?.throwIfAborted()
      turn = performance.now()
    }
  } finally {
    close(root)
  }
  for (const { names, nlink, sizeBytes } of linked.values()) if (nlink > names) counted.sharedBytes += sizeBytes
  return counted
}
