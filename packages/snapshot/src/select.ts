import { type ByteString, bytesOf, LsyncError, printable } from '@lsync/posix'
import { eachOf } from './concurrent.ts'
import { parseTime } from './model/go-text.ts'
import type { Snapshot } from './model/snapshot.ts'
import type { ObjectId, TreeNode } from './model/tree.ts'
import type { Repository } from './repository.ts'

/** Which snapshots are meant: all conditions hold. Absent ones hold always. */
export interface SnapshotFilter {
  /** Of one of these hosts. */
  readonly hosts?: readonly string[]
  /** With all tags of one of these lists; the empty list means no tags at all. */
  readonly tags?: readonly (readonly string[])[]
  /** Of all these paths, maybe among others. */
  readonly paths?: readonly ByteString[]
}

/** There is no such snapshot, or the start of its id fits several. */
export class SnapshotNotFoundError extends LsyncError {
  constructor(text: string, why: string) {
    super('SNAPSHOT_NOT_FOUND', `${text || 'the empty name'} ${why}`, { hint: '`lsync snapshot list` shows them all' })
  }
}

/** A snapshot has nothing of this path. */
export class PathNotInSnapshotError extends LsyncError {
  constructor(path: ByteString, snapshotId: ObjectId) {
    super('PATH_NOT_FOUND', `${printable(path)} is not in snapshot ${snapshotId.slice(0, 8)}`, {
      path,
      hint: '`lsync snapshot show` lists what is in it',
    })
  }
}

/** Whether a snapshot is one of those that are meant. */
export function isSelected(snapshot: Snapshot, { hosts, tags, paths }: SnapshotFilter): boolean {
  if (hosts !== undefined && hosts.length > 0 && !hosts.includes(snapshot.hostname)) return false
  if (tags !== undefined && tags.length > 0 && !tags.some((list) => hasTags(snapshot, list))) return false
  return paths?.every((path) => snapshot.paths.includes(path)) ?? true
}

function hasTags({ tags }: Snapshot, list: readonly string[]): boolean {
  if (list.every((tag) => tag === '')) return tags.length === 0
  return list.every((tag) => tags.includes(tag))
}

/** All snapshots that are meant, oldest first. */
export async function listSnapshots(
  repository: Repository,
  filter: SnapshotFilter = {},
  signal?: AbortSignal,
): Promise<Snapshot[]> {
  const snapshots: Snapshot[] = []
  await eachOf(await repository.listIds('snapshot', signal), repository.backend.concurrency, async (id) => {
    const snapshot = await repository.readSnapshot(id, signal)
    if (isSelected(snapshot, filter)) snapshots.push(snapshot)
  })
  return snapshots.sort(byTime)
}

/** Oldest first; those of one moment by id. */
export function byTime(left: Snapshot, right: Snapshot): number {
  const [leftNs, rightNs] = [snapshotTimeNs(left), snapshotTimeNs(right)]
  return leftNs < rightNs ? -1 : leftNs > rightNs ? 1 : left.id < right.id ? -1 : 1
}

export function snapshotTimeNs({ time }: Snapshot): bigint {
  return parseTime(time) as bigint
}

/** What a user calls a snapshot, and what in it: `latest`, `1a2b3c`, `latest:/etc`. */
export interface SnapshotName {
  readonly snapshot: string
  readonly path: ByteString | undefined
}

export function parseSnapshotName(text: string): SnapshotName {
  const cut = text.indexOf(':')
  if (cut < 0) return { snapshot: text, path: undefined }
  return { snapshot: text.slice(0, cut), path: bytesOf(text.slice(cut + 1)) }
}

/**
 * The snapshot of an id, of the start of one, or the latest of those that a filter leaves.
 * @throws {SnapshotNotFoundError}
 */
export async function findSnapshot(
  repository: Repository,
  text: string,
  filter: SnapshotFilter = {},
  signal?: AbortSignal,
): Promise<Snapshot> {
  if (text === 'latest') {
    const latest = (await listSnapshots(repository, filter, signal)).at(-1)
    if (latest === undefined) throw new SnapshotNotFoundError(text, 'is none: no snapshot fits')
    return latest
  }
  if (!/^[0-9a-f]{2,64}$/.test(text)) throw new SnapshotNotFoundError(text, 'is no id of a snapshot')
  const found = (await repository.listIds('snapshot', signal)).filter((id) => id.startsWith(text))
  const [id, other] = found
  if (id === undefined) throw new SnapshotNotFoundError(text, 'is no snapshot')
  if (other !== undefined) throw new SnapshotNotFoundError(text, `begins the ids of ${found.length} snapshots`)
  return repository.readSnapshot(id, signal)
}

/** What lies at a path of a snapshot. `node` is absent for the root. */
export interface Located {
  readonly path: ByteString
  readonly node: TreeNode | undefined
  /** The tree of a directory. */
  readonly tree: ObjectId | undefined
}

/**
 * Finds a path (absolute) in a snapshot; by default the directory that was saved, or the root where there are several.
 * The index is loaded.
 * @throws {PathNotInSnapshotError}
 */
export async function locatePath(
  repository: Repository,
  snapshot: Snapshot,
  path: ByteString | undefined,
  signal?: AbortSignal,
): Promise<Located> {
  const [only, second] = snapshot.paths
  const wanted = path ?? (second === undefined && only?.startsWith('/') === true ? only : ('/' as ByteString))
  const components = wanted.split('/').filter((part) => part !== '')
  let tree: ObjectId | undefined = snapshot.tree
  let node: TreeNode | undefined
  for (const component of components) {
    const nodes: TreeNode[] = tree === undefined ? [] : await repository.readTree(tree, signal)
    node = nodes.find(({ name }) => name === component)
    if (node === undefined) {
      // A relative path was saved, or bytes that a snapshot's list of paths cannot hold.
      if (path === undefined) return { path: '/' as ByteString, node: undefined, tree: snapshot.tree }
      throw new PathNotInSnapshotError(wanted, snapshot.id)
    }
    tree = node.subtree
  }
  return { path: `/${components.join('/')}` as ByteString, node, tree }
}
