import { LsyncError } from '@lsync/posix'
import { PackChecker } from './check-pack.ts'
import { eachOf } from './concurrent.ts'
import type { IndexedPack } from './index-file.ts'
import { RepositoryLock } from './lock.ts'
import type { ObjectId } from './model/tree.ts'
import { packSizeBytes } from './pack.ts'
import { PackStore } from './pack-store.ts'
import { replaceIndexes } from './prune.ts'
import type { Repository } from './repository.ts'
import { ownMemory } from './restore.ts'

export interface RepairRequest {
  readonly signal?: AbortSignal | undefined
  readonly onProgress?: (progress: { phase: string; done: number; total?: number }) => void
}

export interface RepairIndexReport {
  readonly packs: number
  /** Packs whose header was read, since no index had them as they are. */
  readonly packsRead: number
  /** Packs that even their header says nothing of, with the reason. */
  readonly unreadable: readonly { readonly id: ObjectId; readonly message: string }[]
  /** Packs that an index named and that are gone. */
  readonly missing: readonly ObjectId[]
}

/** Makes the index again from what is there: packs that an index has as they are stay, of others the header is read. */
export async function repairIndex(
  repository: Repository,
  { signal, onProgress }: RepairRequest = {},
): Promise<RepairIndexReport> {
  const lock = await RepositoryLock.acquire(repository, { exclusive: true, signal })
  try {
    const indexIds = await repository.listIds('index', signal)
    const indexed = await readableIndexes(repository, indexIds, signal)
    const listed = new Map<ObjectId, number>()
    for await (const { name, sizeBytes } of repository.backend.list('pack', { signal })) listed.set(name, sizeBytes)
    const packs: IndexedPack[] = []
    const unreadable: { id: ObjectId; message: string }[] = []
    let packsRead = 0
    let done = 0
    await eachOf(listed, repository.backend.concurrency, async ([id, sizeBytes]) => {
      const known = indexed.get(id)
      if (known !== undefined && packSizeBytes(known.objects) === sizeBytes) packs.push(known)
      else {
        packsRead++
        try {
          packs.push({ id, objects: await repository.readPack(id, sizeBytes, signal) })
        } catch (error) {
          if (!(error instanceof LsyncError) || error.code !== 'PACK_DAMAGED') throw error
          unreadable.push({ id, message: error.message })
        }
      }
      done++
      onProgress?.({ phase: 'packs', done: done, total: listed.size })
    })
    packs.sort((left, right) => (left.id < right.id ? -1 : 1))
    await lock.settled()
    repository.resetIndex()
    await replaceIndexes(repository, indexIds, packs, signal)
    const missing = [...indexed.keys()].filter((id) => !listed.has(id)).sort()
    return { packs: packs.length, packsRead, unreadable, missing }
  } finally {
    await lock.release()
  }
}

/** All packs of all indexes that can be read. */
async function readableIndexes(
  repository: Repository,
  ids: readonly ObjectId[],
  signal: AbortSignal | undefined,
): Promise<Map<ObjectId, IndexedPack>> {
  const packs = new Map<ObjectId, IndexedPack>()
  await eachOf(ids, repository.backend.concurrency, async (id) => {
    try {
      for (const pack of await repository.readIndex(id, signal)) {
        const known = packs.get(pack.id)
        if (known === undefined || known.objects.length < pack.objects.length) packs.set(pack.id, pack)
      }
    } catch (error) {
      const code = error instanceof LsyncError ? error.code : ''
      if (code !== 'REPOSITORY_FILE_DAMAGED' && code !== 'INDEX_INVALID') throw error
    }
  })
  return packs
}

export interface RepairPacksReport {
  /** Objects that were saved into new packs, and those that are lost. */
  readonly saved: number
  readonly lost: readonly ObjectId[]
  /** The packs that were damaged and are gone now. */
  readonly removed: readonly ObjectId[]
}

/**
 * Saves what is whole in damaged packs into new ones, and removes them. Snapshots that need what is lost stay; `check`
 * names their files.
 */
export async function repairPacks(
  repository: Repository,
  packIds: readonly ObjectId[],
  { signal, onProgress }: RepairRequest = {},
): Promise<RepairPacksReport> {
  const lock = await RepositoryLock.acquire(repository, { exclusive: true, signal })
  const store = new PackStore(repository, { signal, writesIndex: false })
  const checker = new PackChecker({ key: repository.key })
  try {
    const indexIds = await repository.listIds('index', signal)
    const indexed = await readableIndexes(repository, indexIds, signal)
    const lost: ObjectId[] = []
    const removed: ObjectId[] = []
    let saved = 0
    for (const packId of packIds) {
      const found = await repository.backend.stat({ kind: 'pack', name: packId }, { signal })
      const known = indexed.get(packId)?.objects ?? []
      if (found === undefined) {
        lost.push(...known.map(({ id }) => id))
        indexed.delete(packId)
        continue
      }
      const content = ownMemory(await repository.backend.get({ kind: 'pack', name: packId }, undefined, { signal }))
      const job = { packId, content, ...(known.length === 0 ? {} : { objects: known }) }
      const { why, whole, damaged } = await checker.run(job)
      if (why.length === 0) continue
      for (const object of whole) {
        store.addSealed(object, Buffer.from(content, object.offset, object.length))
        saved++
        if (store.isCongested) await store.wait()
      }
      lost.push(...damaged.map(({ id }) => id))
      removed.push(packId)
      indexed.delete(packId)
      onProgress?.({ phase: 'packs', done: removed.length, total: packIds.length })
    }
    const written = await store.flush()
    await lock.settled()
    repository.resetIndex()
    await replaceIndexes(repository, indexIds, [...indexed.values(), ...written], signal)
    for (const name of removed) await repository.backend.delete({ kind: 'pack', name })
    return { saved, lost, removed }
  } finally {
    checker.close()
    await store.settle()
    await lock.release()
  }
}
