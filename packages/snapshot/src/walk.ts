import { type ByteString, LsyncError } from '@lsync/posix'
import { drainStack } from './concurrent.ts'
import { decodeTree, type ObjectId, type TreeNode } from './model/tree.ts'
import { ObjectTable } from './object-table.ts'
import type { Repository } from './repository.ts'
import { TreeTooDeepError } from './restore.ts'
import { joinShown } from './save.ts'

const MAX_DEPTH = 4096
const WIDTH = 8

/** One name of a snapshot, with its whole path. */
export interface ShownNode {
  readonly path: ByteString
  readonly node: TreeNode
}

/** Everything beneath a tree, each directory before what is in it, names in order of their bytes. */
export async function* walkTree(
  repository: Repository,
  tree: ObjectId,
  path: ByteString,
  options: { readonly isRecursive?: boolean; readonly signal?: AbortSignal | undefined } = {},
  depth = 0,
): AsyncGenerator<ShownNode> {
  if (depth > MAX_DEPTH) throw new TreeTooDeepError(path)
  for (const node of await repository.readTree(tree, options.signal)) {
    const shown = { path: joinShown(path, node.name), node }
    yield shown
    if (node.subtree !== undefined && options.isRecursive !== false) {
      yield* walkTree(repository, node.subtree, shown.path, options, depth + 1)
    }
  }
}

/** What somebody who looks at all trees is told. */
export interface TreeVisitor {
  /** Each tree once, however many snapshots have it. `path` is one of the places where it is. */
  tree(id: ObjectId, nodes: readonly TreeNode[], path: ByteString): void
  /** A tree that cannot be read. Throwing ends the walk. */
  problem(id: ObjectId, path: ByteString, error: LsyncError): void
}

/** Visits every tree that is reachable from `roots`, several at a time, each once. */
export async function visitTrees(
  repository: Repository,
  roots: readonly { readonly id: ObjectId; readonly path: ByteString }[],
  visitor: TreeVisitor,
  signal?: AbortSignal,
): Promise<void> {
  const seen = new ObjectTable()
  const pending: { id: ObjectId; path: ByteString }[] = []
  const push = (id: ObjectId, path: ByteString) => {
    seen.grow()
    if (seen.claim('tree', id)) pending.push({ id, path })
  }
  for (const { id, path } of roots) push(id, path)
  const visit = async ({ id, path }: { id: ObjectId; path: ByteString }) => {
    signal?.throwIfAborted()
    let nodes: TreeNode[]
    try {
      nodes = decodeTree(await repository.readObject('tree', id, signal))
    } catch (error) {
      if (!(error instanceof LsyncError) || signal?.aborted === true) throw error
      visitor.problem(id, path, error)
      return
    }
    visitor.tree(id, nodes, path)
    for (const { name, subtree } of nodes) if (subtree !== undefined) push(subtree, joinShown(path, name))
  }
  await drainStack(pending, WIDTH, visit)
}
