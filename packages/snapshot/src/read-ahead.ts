import type { ObjectId } from './model/tree.ts'
import type { Repository } from './repository.ts'

const MOST_BYTES = 32 * 1024 * 1024

/**
 * Pieces of files in order, each checked against its hash, with the next ones on their way: as many as the backend
 * takes at a time, and no more than 32 MiB of them.
 */
export async function* readAhead(
  repository: Repository,
  ids: readonly ObjectId[],
  signal?: AbortSignal,
): AsyncGenerator<Buffer> {
  const { concurrency } = repository.backend
  const begun: { readonly object: Promise<Buffer>; readonly bytes: number }[] = []
  let next = 0
  let bytes = 0
  while (next < ids.length || begun.length > 0) {
    while (next < ids.length && (begun.length === 0 || (begun.length < concurrency && bytes < MOST_BYTES))) {
      const id = ids[next++] as ObjectId
      const object = repository.readObject('data', id, signal)
      // One that fails is told of when its turn comes.
      object.catch(() => undefined)
      const length = repository.table.locate('data', id)?.length ?? 0
      begun.push({ object, bytes: length })
      bytes += length
    }
    const first = begun.shift() as (typeof begun)[0]
    yield await first.object
    bytes -= first.bytes
  }
}
