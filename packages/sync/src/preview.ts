import { existsSync } from 'node:fs'
import { type ByteString, close, type HostPath, openRoot } from '@lsync/posix'
import { IndexStore, ROOT_ID } from './index-store.ts'
import type { TreePath } from './model/operation.ts'
import { workers } from './pool.ts'
import { defaultStateDir, type SyncRequest, targetStateDir } from './sync.ts'
import type { Target } from './transport/target.ts'
import type { ScanDirectory } from './work.ts'

/** One name that a sync would carry over or remove. A new directory stands for all that is in it. */
export interface PreviewedChange {
  readonly path: TreePath
  readonly change: 'new' | 'changed' | 'gone'
}

// A comparison sends nothing.
const nothing = () => Promise.resolve()

/**
 * What a sync to one target would do now, as far as the comparison of the upper with the index tells: nothing is read
 * but the upper, and nothing is written. Before the first sync everything is new: then the root alone is given.
 */
export async function previewSync(
  request: Pick<SyncRequest, 'source' | 'stateDir' | 'namespace' | 'include' | 'exclude'>,
  target: Pick<Target, 'description'>,
): Promise<readonly PreviewedChange[]> {
  const { source, namespace = 'trusted', include = [], exclude = [] } = request
  const indexPath = `${targetStateDir(request.stateDir ?? defaultStateDir(source as HostPath), target)}/index`
  const everything: PreviewedChange[] = [{ path: '' as TreePath, change: 'new' }]
  if (!existsSync(indexPath)) return everything
  const index = await IndexStore.openExisting(indexPath)
  const upperFd = openRoot(source)
  const session = workers.open({
    upperFd,
    delivery: { mode: 'encoded' },
    losses: [],
    namespace,
    patterns: { include, exclude },
    isLimited: false,
  })
  try {
    if (index.row(0, '' as ByteString) === undefined) return everything
    const changes: PreviewedChange[] = []
    const pending = new Set(index.pending())
    let queue: ScanDirectory[] = [{ id: ROOT_ID, path: '' as TreePath }]
    for (const id of pending) changes.push({ path: index.pathOf(id) ?? ('' as TreePath), change: 'new' })
    while (queue.length > 0) {
      const piece = queue.splice(-64).filter(({ id }) => !pending.has(id))
      const directories = piece.map((directory) => ({ ...directory, pages: index.pages(directory.id) }))
      const found = await workers.run<'scan'>(session, { do: 'scan', directories }, nothing, nothing)
      const paths = new Map(piece.map(({ id, path }) => [id, path]))
      for (const { directory, name } of found.dirty) {
        const parent = paths.get(directory) ?? ''
        const path = (parent === '' ? name : `${parent}/${name}`) as TreePath
        const isKnown = index.row(directory, name) !== undefined
        changes.push({ path, change: !isKnown ? 'new' : existsAt(source, path) ? 'changed' : 'gone' })
      }
      queue = queue.concat(found.children)
    }
    return changes.sort((one, other) => (one.path < other.path ? -1 : 1))
  } finally {
    await workers.close(session)
    await index.close()
    close(upperFd)
  }
}

function existsAt(root: HostPath, path: TreePath): boolean {
  return existsSync(Buffer.from(`${root}/${path}`, 'latin1'))
}
