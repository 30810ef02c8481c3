import type { ByteString } from '@lsync/posix'
import type { ObjectId, TreeNode } from './model/tree.ts'
import type { Repository } from './repository.ts'
import { joinShown } from './save.ts'
import type { Located } from './select.ts'
import { walkTree } from './walk.ts'

/** What happened to a path between two snapshots. */
export interface SnapshotChange {
  readonly path: ByteString
  /** `content`: what a file, link or device holds; `metadata`: owner, mode, times, attributes; `type`: all of it. */
  readonly change: 'added' | 'removed' | 'content' | 'metadata' | 'type'
  readonly before: TreeNode | undefined
  readonly after: TreeNode | undefined
}

/**
 * What changed from one place in a snapshot to another one, by path; paths are beneath both places. Equal trees are known
 * by their ids and not looked into. Times of change and access, inode numbers and link counts do not count.
 */
export async function* diffSnapshots(
  repository: Repository,
  before: Located,
  after: Located,
  signal?: AbortSignal,
): AsyncGenerator<SnapshotChange> {
  if (before.tree !== undefined && after.tree !== undefined) {
    yield* diffTrees(repository, before.tree, after.tree, '/' as ByteString, signal)
  } else yield* diffNodes(repository, before.node, after.node, '/' as ByteString, signal)
}

async function* diffTrees(
  repository: Repository,
  before: ObjectId,
  after: ObjectId,
  path: ByteString,
  signal: AbortSignal | undefined,
): AsyncGenerator<SnapshotChange> {
  if (before === after) return
  const left = new Map((await repository.readTree(before, signal)).map((node) => [node.name, node]))
  const right = new Map((await repository.readTree(after, signal)).map((node) => [node.name, node]))
  for (const name of [...new Set([...left.keys(), ...right.keys()])].sort()) {
    yield* diffNodes(repository, left.get(name), right.get(name), joinShown(path, name), signal)
  }
}

async function* diffNodes(
  repository: Repository,
  before: TreeNode | undefined,
  after: TreeNode | undefined,
  path: ByteString,
  signal: AbortSignal | undefined,
): AsyncGenerator<SnapshotChange> {
  const change = changeOf(before, after)
  if (change !== undefined) yield { path, change, before, after }
  if (before?.subtree !== undefined && after?.subtree !== undefined) {
    yield* diffTrees(repository, before.subtree, after.subtree, path, signal)
    return
  }
  if (before?.subtree !== undefined) {
    for await (const { path: gone, node } of walkTree(repository, before.subtree, path, { signal })) {
      yield { path: gone, change: 'removed', before: node, after: undefined }
    }
  }
  if (after?.subtree !== undefined) {
    for await (const { path: come, node } of walkTree(repository, after.subtree, path, { signal })) {
      yield { path: come, change: 'added', before: undefined, after: node }
    }
  }
}

/** What happened to a node, if anything did. */
export function changeOf(
  before: TreeNode | undefined,
  after: TreeNode | undefined,
): SnapshotChange['change'] | undefined {
  if (before === undefined) return after === undefined ? undefined : 'added'
  if (after === undefined) return 'removed'
  if (before.type !== after.type) return 'type'
  if (contentOf(before) !== contentOf(after)) return 'content'
  return metadataOf(before) === metadataOf(after) ? undefined : 'metadata'
}

function contentOf({ content, linkTarget, device }: TreeNode): string {
  return `${content?.join(',')} ${device} ${linkTarget}`
}

function metadataOf({ mode, uid, gid, mtime, xattrs }: TreeNode): string {
  const attributes = xattrs.map(([name, value]) => `${name}=${value.toString('hex')}`).sort()
  return [mode, uid, gid, mtime, ...attributes].join('\n')
}
