import { LsyncError } from '@lsync/posix'
import { eachOf } from './concurrent.ts'
import { encodeIndex, INDEX_OBJECTS, type IndexedPack } from './index-file.ts'
import { RepositoryLock } from './lock.ts'
import type { ObjectId } from './model/tree.ts'
import { type Location, ObjectTable } from './object-table.ts'
import { PACK_BYTES, type PackedObject, packSizeBytes } from './pack.ts'
import { PackStore } from './pack-store.ts'
import { ObjectMissingError, type Repository } from './repository.ts'
import { listSnapshots } from './select.ts'
import { visitTrees } from './walk.ts'

export interface PruneRequest {
  /** How much of the repository may stay unused, as a share of all (0.05 by default). */
  readonly maxUnused?: number
  /** Rewrite at most so many bytes of packs; the rest is left for the next time. */
  readonly maxRewriteBytes?: number
  /** Begin no more rewriting after so long. What is known to be unused goes in any case. */
  readonly budgetMs?: number
  readonly dryRun?: boolean
  readonly signal?: AbortSignal | undefined
  readonly onProgress?: (progress: { phase: string; done: number; total?: number }) => void
}

export interface PruneReport {
  readonly snapshots: number
  readonly objects: { readonly total: number; readonly used: number }
  readonly packs: { readonly total: number; readonly removed: number; readonly rewritten: number }
  /** Bytes in the repository before, and what went. */
  readonly totalBytes: number
  readonly freedBytes: number
  /** Unused bytes that stay in packs. */
  readonly unusedBytes: number
  readonly elapsedMs: number
}

/** A pack that has something that is needed is not there. */
export class PackMissingError extends LsyncError {
  constructor(packId: ObjectId) {
    super('PACK_MISSING', `pack ${packId.slice(0, 8)} is missing, and snapshots need it`, {
      path: packId,
      hint: '`lsync snapshot check` names what is lost; nothing was removed',
    })
  }
}

const SMALL_PACK_BYTES = PACK_BYTES / 4
/** So many small packs of a kind are worth being put together. */
const SMALL_PACKS = 8

interface PackState {
  readonly id: ObjectId
  readonly sizeBytes: number
  readonly objects: readonly PackedObject[]
  used: PackedObject[]
  usedBytes: number
}

/**
 * Removes what no snapshot needs. Needs the repository for itself.
 *
 * New packs are written first, then an index of everything that stays, then the old indexes go, and the old packs last:
 * a crash in between leaves packs that nothing refers to, and the next run removes them.
 * @throws {RepositoryLockedError} while somebody else works on it
 * @throws {ObjectMissingError} {PackMissingError} when something that a snapshot needs is not there: nothing is removed then
 */
export async function pruneRepository(repository: Repository, request: PruneRequest = {}): Promise<PruneReport> {
  const startMs = performance.now()
  const lock = await RepositoryLock.acquire(repository, { exclusive: true, signal: request.signal })
  const { signal } = lock
  try {
    const snapshots = await listSnapshots(repository, {}, signal)
    const indexIds = await repository.listIds('index', signal)
    const indexed = await readIndexes(repository, indexIds, signal)
    await repository.loadIndex(signal)
    const used = await findUsed(repository, snapshots, request, signal)
    const listed = new Map<ObjectId, number>()
    for await (const { name, sizeBytes } of repository.backend.list('pack', { signal })) listed.set(name, sizeBytes)
    const packs = judgePacks(indexed, listed, used.table)
    const plan = planPrune(packs, listed, request)
    const report = {
      snapshots: snapshots.length,
      objects: { total: packs.reduce((sum, { objects }) => sum + objects.length, 0), used: used.count },
      packs: { total: listed.size, removed: plan.removed.length, rewritten: plan.rewritten.length },
      totalBytes: [...listed.values()].reduce((sum, size) => sum + size, 0),
      freedBytes: plan.freedBytes,
      unusedBytes: plan.unusedBytes,
    }
    if (request.dryRun === true) return { ...report, elapsedMs: performance.now() - startMs }
    await lock.settled()
    await repository.backend.tidy?.({ signal })
    const { rewritten, written } = await rewritePacks(repository, plan.rewritten, request, startMs, signal)
    const gone = new Set([...plan.removed, ...rewritten.map(({ id }) => id)])
    const kept = packs.filter(({ id }) => !gone.has(id) && listed.has(id))
    const hasChanged = gone.size > 0 || packs.length !== listed.size || indexIds.length > expectedIndexes(packs) + 1
    if (hasChanged) {
      repository.resetIndex()
      await lock.settled()
      await replaceIndexes(repository, indexIds, [...kept, ...written], signal)
      await lock.settled()
      await removePacks(repository, [...gone], request, signal)
    }
    const left = plan.rewritten.filter((pack) => !rewritten.includes(pack))
    return {
      ...report,
      packs: { ...report.packs, rewritten: rewritten.length },
      freedBytes: report.freedBytes - left.reduce((sum, pack) => sum + unusedOf(pack), 0),
      unusedBytes: report.unusedBytes + left.reduce((sum, pack) => sum + unusedOf(pack), 0),
      elapsedMs: performance.now() - startMs,
    }
  } finally {
    await lock.release()
  }
}

function expectedIndexes(packs: readonly PackState[]): number {
  return Math.ceil(packs.reduce((sum, { objects }) => sum + objects.length, 0) / INDEX_OBJECTS)
}

async function readIndexes(
  repository: Repository,
  ids: readonly ObjectId[],
  signal: AbortSignal,
): Promise<Map<ObjectId, IndexedPack>> {
  const packs = new Map<ObjectId, IndexedPack>()
  await eachOf(ids, repository.backend.concurrency, async (id) => {
    for (const pack of await repository.readIndex(id, signal)) {
      // An interrupted writer may have named a pack twice; the longer list has all of it.
      const known = packs.get(pack.id)
      if (known === undefined || known.objects.length < pack.objects.length) packs.set(pack.id, pack)
    }
  })
  return packs
}

async function findUsed(
  repository: Repository,
  snapshots: readonly { readonly tree: ObjectId }[],
  { onProgress }: PruneRequest,
  signal: AbortSignal,
): Promise<{ table: ObjectTable; count: number }> {
  const table = new ObjectTable()
  let count = 0
  let trees = 0
  const note = (kind: 'data' | 'tree', id: ObjectId) => {
    table.grow()
    if (!table.claim(kind, id)) return
    if (repository.table.locate(kind, id) === undefined) throw new ObjectMissingError(kind, id)
    count++
  }
  const roots = snapshots.map(({ tree }) => ({ id: tree, path: '/' as never }))
  await visitTrees(
    repository,
    roots,
    {
      tree: (id, nodes) => {
        note('tree', id)
        for (const { content } of nodes) for (const piece of content ?? []) note('data', piece)
        trees++
        onProgress?.({ phase: 'trees', done: trees })
      },
      problem: (_id, _path, error) => {
        throw error
      },
    },
    signal,
  )
  return { table, count }
}

/** Which objects of which pack count. An object that lies in several packs counts in one that is used anyway. */
function judgePacks(
  indexed: ReadonlyMap<ObjectId, IndexedPack>,
  listed: ReadonlyMap<ObjectId, number>,
  used: ObjectTable,
): PackState[] {
  const packs = [...indexed.values()]
    .map(
      ({ id, objects }): PackState => ({
        id,
        objects,
        sizeBytes: listed.get(id) ?? packSizeBytes(objects),
        used: [],
        usedBytes: 0,
      }),
    )
    .sort((left, right) => (left.id < right.id ? -1 : 1))
  const shareOf = new Map(
    packs.map((pack) => [
      pack,
      pack.objects.filter(({ kind, id }) => used.has(kind, id)).length / Math.max(1, pack.objects.length),
    ]),
  )
  // First those that are there, then those that are used most: they are the ones to stay.
  const order = [...packs].sort(
    (left, right) =>
      Number(listed.has(right.id)) - Number(listed.has(left.id)) ||
      (shareOf.get(right) ?? 0) - (shareOf.get(left) ?? 0),
  )
  const placed = new ObjectTable()
  for (const pack of order) {
    for (const object of pack.objects) {
      if (!used.has(object.kind, object.id)) continue
      placed.grow()
      if (!placed.claim(object.kind, object.id)) continue
      if (!listed.has(pack.id)) throw new PackMissingError(pack.id)
      pack.used.push(object)
      pack.usedBytes += object.length
    }
  }
  return packs
}

interface PrunePlan {
  readonly removed: readonly ObjectId[]
  readonly rewritten: readonly PackState[]
  readonly freedBytes: number
  readonly unusedBytes: number
}

function unusedOf({ sizeBytes, used }: PackState): number {
  return Math.max(0, sizeBytes - packSizeBytes(used))
}

function planPrune(
  packs: readonly PackState[],
  listed: ReadonlyMap<ObjectId, number>,
  request: PruneRequest,
): PrunePlan {
  const indexed = new Set(packs.map(({ id }) => id))
  const unindexed = [...listed.keys()].filter((id) => !indexed.has(id))
  const unused = packs.filter(({ id, used }) => used.length === 0 && listed.has(id))
  const mixed = packs.filter(({ used, objects }) => used.length > 0 && used.length < objects.length)
  const small = (['data', 'tree'] as const).flatMap((kind) => {
    const found = packs.filter(
      ({ used, objects, sizeBytes }) =>
        used.length === objects.length && sizeBytes < SMALL_PACK_BYTES && objects[0]?.kind === kind,
    )
    return found.length >= SMALL_PACKS ? found : []
  })
  const totalUsed = packs.reduce((sum, { usedBytes }) => sum + usedBytes, 0)
  const allowed = totalUsed * (request.maxUnused ?? 0.05)
  let unusedBytes = mixed.reduce((sum, pack) => sum + unusedOf(pack), 0)
  let rewriteBytes = 0
  const limit = request.maxRewriteBytes ?? Number.POSITIVE_INFINITY
  const rewritten: PackState[] = []
  let freedBytes = [...unindexed, ...unused.map(({ id }) => id)].reduce((sum, id) => sum + (listed.get(id) ?? 0), 0)
  // The emptiest first: the most is freed for the least work.
  for (const pack of [...mixed].sort(
    (left, right) => left.usedBytes / left.sizeBytes - right.usedBytes / right.sizeBytes,
  )) {
    if (unusedBytes <= allowed) break
    if (rewriteBytes + pack.usedBytes > limit) continue
    rewritten.push(pack)
    rewriteBytes += pack.usedBytes
    unusedBytes -= unusedOf(pack)
    freedBytes += unusedOf(pack)
  }
  for (const pack of small) {
    if (rewriteBytes + pack.usedBytes > limit) continue
    rewritten.push(pack)
    rewriteBytes += pack.usedBytes
  }
  return { removed: [...unindexed, ...unused.map(({ id }) => id)], rewritten, freedBytes, unusedBytes }
}

/** Copies what is used into new packs. Each object is checked on the way. Gives back what is done when time is up. */
async function rewritePacks(
  repository: Repository,
  packs: readonly PackState[],
  { budgetMs, onProgress }: PruneRequest,
  startMs: number,
  signal: AbortSignal,
): Promise<{ rewritten: PackState[]; written: readonly IndexedPack[] }> {
  const store = new PackStore(repository, { signal, writesIndex: false })
  const rewritten: PackState[] = []
  try {
    for (const pack of packs) {
      if (budgetMs !== undefined && performance.now() - startMs > budgetMs) break
      for (const object of pack.used) {
        const sealed = await readSealed(repository, { ...object, packId: pack.id }, signal)
        store.addSealed(object, sealed)
        if (store.isCongested) await store.wait()
      }
      rewritten.push(pack)
      onProgress?.({ phase: 'rewrite', done: rewritten.length, total: packs.length })
    }
    return { rewritten, written: await store.flush() }
  } finally {
    await store.settle()
  }
}

/** The sealed bytes of an object, which were opened and compared with its id. @throws {ObjectDamagedError} */
export async function readSealed(repository: Repository, location: Location, signal?: AbortSignal): Promise<Buffer> {
  const { packId, offset, length } = location
  const sealed = await repository.backend.get({ kind: 'pack', name: packId }, { offset, length }, { signal })
  repository.openObject(location, sealed)
  return sealed
}

/** Writes indexes of these packs, and then removes the old ones. */
export async function replaceIndexes(
  repository: Repository,
  oldIds: readonly ObjectId[],
  packs: readonly IndexedPack[],
  signal?: AbortSignal,
): Promise<void> {
  const written = new Set<ObjectId>()
  let part: IndexedPack[] = []
  let objects = 0
  const flush = async () => {
    if (part.length === 0) return
    written.add(await repository.writeFile('index', encodeIndex(part), signal))
    part = []
    objects = 0
  }
  for (const pack of packs) {
    part.push(pack)
    objects += pack.objects.length
    if (objects >= INDEX_OBJECTS) await flush()
  }
  await flush()
  await eachOf(oldIds, repository.backend.concurrency, async (id) => {
    if (!written.has(id)) await repository.backend.delete({ kind: 'index', name: id })
  })
}

async function removePacks(
  repository: Repository,
  ids: readonly ObjectId[],
  { onProgress }: PruneRequest,
  signal: AbortSignal,
): Promise<void> {
  let done = 0
  await eachOf(ids, repository.backend.concurrency, async (name) => {
    signal.throwIfAborted()
    await repository.backend.delete({ kind: 'pack', name })
    done++
    onProgress?.({ phase: 'remove', done: done, total: ids.length })
  })
}
