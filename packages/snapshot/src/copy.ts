import { type ByteString, memoryOver } from '@lsync/posix'
import { RepositoryLock } from './lock.ts'
import { isSameTime } from './model/go-text.ts'
import type { Snapshot } from './model/snapshot.ts'
import type { ObjectId } from './model/tree.ts'
import { type ObjectKind, PackWriter } from './pack.ts'
import { PackStore } from './pack-store.ts'
import type { Repository } from './repository.ts'
import { listSnapshots } from './select.ts'
import { visitTrees } from './walk.ts'

export interface CopyRequest {
  /** Snapshots of the source, oldest first. */
  readonly snapshots: readonly Snapshot[]
  readonly signal?: AbortSignal | undefined
  readonly onProgress?: (progress: { phase: string; done: number; total?: number }) => void
}

export interface CopyReport {
  readonly copied: readonly { readonly from: ObjectId; readonly to: ObjectId }[]
  /** Those that the target has already. */
  readonly present: readonly ObjectId[]
  readonly objects: number
  readonly addedBytes: number
}

/** Copies snapshots into another repository, with everything that they need and it lacks. */
export async function copySnapshots(from: Repository, to: Repository, request: CopyRequest): Promise<CopyReport> {
  const { signal } = request
  const fromLock = await RepositoryLock.acquire(from, { exclusive: false, signal })
  try {
    const toLock = await RepositoryLock.acquire(to, { exclusive: false, signal })
    try {
      return await copy(from, to, toLock, request)
    } finally {
      await toLock.release()
    }
  } finally {
    await fromLock.release()
  }
}

async function copy(
  from: Repository,
  to: Repository,
  lock: RepositoryLock,
  { snapshots, signal, onProgress }: CopyRequest,
): Promise<CopyReport> {
  const existing = await listSnapshots(to, {}, signal)
  await from.loadIndex(signal)
  await to.loadIndex(signal)
  const store = new PackStore(to, { signal })
  const options = { compresses: to.compresses }
  const writers = { data: new PackWriter('data', to.engine, options), tree: new PackWriter('tree', to.engine, options) }
  let objects = 0
  let addedBytes = 0
  const add = async (kind: ObjectKind, id: ObjectId, known?: Buffer) => {
    to.table.grow()
    if (!to.table.claim(kind, id)) return
    const content = known ?? (await from.readObject(kind, id, signal))
    const own = new ArrayBuffer(content.length)
    const memory = memoryOver(own)
    content.copy(memory.buffer)
    addedBytes += writers[kind].add(id, memory, 0, content.length)
    objects++
    if (writers[kind].isFull) store.add(writers[kind].finish())
    if (store.isCongested) await store.wait()
  }
  const copied: { from: ObjectId; to: ObjectId }[] = []
  const present: ObjectId[] = []
  try {
    for (const [done, snapshot] of snapshots.entries()) {
      onProgress?.({ phase: 'copy', done, total: snapshots.length })
      if (existing.some((other) => isSameSnapshot(snapshot, other))) {
        present.push(snapshot.id)
        continue
      }
      const needed: (readonly [ObjectKind, ObjectId])[] = []
      await visitTrees(
        from,
        [{ id: snapshot.tree, path: '/' as ByteString }],
        {
          tree: (id, nodes) => {
            if (!to.table.has('tree', id)) needed.push(['tree', id])
            for (const { content } of nodes) {
              for (const piece of content ?? []) if (!to.table.has('data', piece)) needed.push(['data', piece])
            }
          },
          problem: (_id, _path, error) => {
            throw error
          },
        },
        signal,
      )
      for (const [kind, id] of needed) await add(kind, id)
      for (const writer of Object.values(writers)) if (writer.sizeBytes > 0) store.add(writer.finish())
      await store.flush()
      await lock.settled()
      const { id, parent: _, ...rest } = snapshot
      const copy = { ...rest, parent: undefined, original: snapshot.original ?? id }
      copied.push({ from: id, to: await to.writeSnapshot(copy, signal) })
    }
    return { copied, present, objects, addedBytes }
  } finally {
    await store.settle()
  }
}

/** Whether a snapshot of the target is a copy of one, whichever of them was made first. Source: restic's `copy`. */
function isSameSnapshot(left: Snapshot, right: Snapshot): boolean {
  const ids = ({ id, original }: Snapshot) => [id, ...(original === undefined ? [] : [original])]
  return (
    ids(left).some((id) => ids(right).includes(id)) &&
    isSameTime(left.time, right.time) &&
    left.tree === right.tree &&
    left.hostname === right.hostname &&
    [...left.tags].sort().join('\0') === [...right.tags].sort().join('\0')
  )
}
