import { RepositoryLock } from './lock.ts'
import type { ObjectId } from './model/tree.ts'
import type { Repository } from './repository.ts'

export interface TagRequest {
  readonly ids: readonly ObjectId[]
  /** Replaces all tags; then neither `add` nor `remove` is used. */
  readonly set?: readonly string[]
  readonly add?: readonly string[]
  readonly remove?: readonly string[]
  readonly signal?: AbortSignal | undefined
}

/** A snapshot whose tags changed, and with them its id. */
export interface Retagged {
  readonly from: ObjectId
  readonly to: ObjectId
  readonly tags: readonly string[]
}

/** Changes the tags of snapshots. Each gets a new id; the first one stays known as its `original`. */
export async function tagSnapshots(repository: Repository, request: TagRequest): Promise<Retagged[]> {
  const { ids, set, add = [], remove = [], signal } = request
  const lock = await RepositoryLock.acquire(repository, { exclusive: true, signal })
  try {
    const changed: Retagged[] = []
    for (const id of ids) {
      const { id: _, ...snapshot } = await repository.readSnapshot(id, signal)
      const kept = snapshot.tags.filter((tag) => !remove.includes(tag))
      const tags = [...new Set(set ?? [...kept, ...add])]
      if (tags.join('\0') === snapshot.tags.join('\0')) continue
      await lock.settled()
      // The new one is there before the old one goes.
      const to = await repository.writeSnapshot({ ...snapshot, tags, original: snapshot.original ?? id }, signal)
      await repository.backend.delete({ kind: 'snapshot', name: id })
      changed.push({ from: id, to, tags })
    }
    return changed
  } finally {
    await lock.release()
  }
}
