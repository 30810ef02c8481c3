import { RequestInvalidError } from '@lsync/overlay-merge'
import { type ByteString, printable } from '@lsync/posix'
import { changeOf } from './diff.ts'
import { itemOf, type LayerNode, type SnapshotForm } from './layer-items.ts'
import type { ObjectId, TreeNode } from './model/tree.ts'
import type { Repository } from './repository.ts'
import { TreeTooDeepError } from './restore.ts'
import { joinShown } from './save.ts'

const MAX_DEPTH = 4096

type Nodes = Map<ByteString, LayerNode>

/** A directory of both versions. */
interface Place {
  readonly path: ByteString
  readonly depth: number
  /** Opaque in both, or in such a one: nothing lies beneath, and whiteouts in it mean nothing. */
  readonly isClosed: boolean
}

/**
 * The names of the layer that, on what shows the tree `before`, shows the tree `after`.
 *
 * Trees of kernel layers may lie on layers that nobody knows here. What went away gets a whiteout: had something lain
 * beneath it, the kernel would have left one itself. So it is with an opaque mark that went away, which happens where
 * another directory is moved to a place with nothing beneath. A directory that became opaque is taken whole. What no
 * kernel does and no layer above can undo is refused: a whiteout that is there no more.
 * @throws {RequestInvalidError}
 */
export async function layerDifference(
  repository: Repository,
  before: ObjectId,
  after: ObjectId,
  form: SnapshotForm,
  signal?: AbortSignal,
): Promise<ReadonlyMap<ByteString, LayerNode>> {
  const work = new Difference(repository, form, signal)
  const nodes = await work.compare(before, after, { path: '/' as ByteString, depth: 0, isClosed: false })
  // A further name of a file that comes along comes along, so that they stay one file.
  if (work.groups.size > 0) await work.addLinked(after, nodes, 0)
  return nodes
}

class Difference {
  /** Inodes with several names of which one is in the layer. */
  readonly groups = new Set<string>()
  readonly #repository: Repository
  readonly #form: SnapshotForm
  readonly #signal: AbortSignal | undefined

  constructor(repository: Repository, form: SnapshotForm, signal: AbortSignal | undefined) {
    this.#repository = repository
    this.#form = form
    this.#signal = signal
  }

  async compare(before: ObjectId, after: ObjectId, place: Place): Promise<Nodes> {
    const nodes: Nodes = new Map()
    const { path } = place
    if (before === after) return nodes
    if (place.depth > MAX_DEPTH) throw new TreeTooDeepError(path)
    const left = new Map((await this.#read(before)).map((node) => [node.name, node]))
    const right = new Map((await this.#read(after)).map((node) => [node.name, node]))
    for (const name of new Set([...left.keys(), ...right.keys()])) {
      const node = await this.#compareNames(left.get(name), right.get(name), { ...place, path: joinShown(path, name) })
      if (node !== undefined) nodes.set(name, node)
    }
    return nodes
  }

  /** Adds the names of `groups` that are not in the layer. */
  async addLinked(tree: ObjectId, nodes: Nodes, depth: number): Promise<void> {
    if (depth > MAX_DEPTH) throw new TreeTooDeepError('' as ByteString)
    for (const node of await this.#read(tree)) {
      const known = nodes.get(node.name)
      if (node.subtree === undefined) {
        if (known === undefined && this.groups.has(groupOf(node))) nodes.set(node.name, { node })
        continue
      }
      // All of it is there.
      if (typeof known?.content === 'string') continue
      const inside = (known?.content as Nodes | undefined) ?? new Map()
      await this.addLinked(node.subtree, inside, depth + 1)
      if (known === undefined && inside.size > 0) nodes.set(node.name, { node, opaque: false, content: inside })
    }
  }

  async #compareNames(
    before: TreeNode | undefined,
    after: TreeNode | undefined,
    { path, depth, isClosed }: Place,
  ): Promise<LayerNode | undefined> {
    const was = this.#kindOf(before, isClosed)
    const is = this.#kindOf(after, isClosed)
    if (is === was && (is === 'whiteout' || is === 'absent')) return undefined
    if (is === 'whiteout') return { node: undefined }
    if (is === 'absent' || after === undefined) {
      if (was === 'whiteout') throw cannotUndo(path, 'was a whiteout and is none any more')
      return { node: undefined }
    }
    if (after.subtree === undefined) {
      if (was === 'other' && changeOf(before, after) === undefined) return undefined
      this.#note(after)
      return { node: after }
    }
    const isOpaque = is === 'opaque'
    if (before?.subtree !== undefined && !(isOpaque && was === 'directory')) {
      const inside = { path, depth: depth + 1, isClosed: isClosed || was === 'opaque' }
      const content = await this.compare(before.subtree, after.subtree, inside)
      if (content.size === 0 && changeOf(before, after) === undefined) return undefined
      // What lies beneath is what the opaque directory of `before` shows.
      return { node: after, opaque: false, content }
    }
    if (was === 'whiteout' && !isOpaque) throw cannotUndo(path, 'was a whiteout and lets through what lies beneath now')
    await this.#noteAll(after.subtree, depth)
    return { node: after, opaque: isOpaque, content: after.subtree }
  }

  #kindOf(node: TreeNode | undefined, isClosed: boolean): 'absent' | 'whiteout' | 'directory' | 'opaque' | 'other' {
    if (node === undefined) return 'absent'
    const { entry } = itemOf(node, node.name, this.#form)
    if (entry.kind === 'directory') return entry.opaque && !isClosed ? 'opaque' : 'directory'
    if (entry.kind === 'whiteout') return isClosed ? 'absent' : 'whiteout'
    return 'other'
  }

  #note(node: TreeNode): void {
    if (node.links > 1) this.groups.add(groupOf(node))
  }

  async #noteAll(tree: ObjectId, depth: number): Promise<void> {
    if (depth > MAX_DEPTH) throw new TreeTooDeepError('' as ByteString)
    for (const node of await this.#read(tree)) {
      if (node.subtree === undefined) this.#note(node)
      else await this.#noteAll(node.subtree, depth + 1)
    }
  }

  async #read(tree: ObjectId): Promise<TreeNode[]> {
    this.#signal?.throwIfAborted()
    return this.#repository.readTree(tree, this.#signal)
  }
}

function groupOf({ links, deviceId, inode }: TreeNode): string {
  return links > 1 ? `${deviceId}:${inode}` : ''
}

function cannotUndo(path: ByteString, what: string): RequestInvalidError {
  return new RequestInvalidError(
    `${printable(path)} ${what}, which no layer above can say`,
    'export the whole version with --snapshot alone, on the image that its first version lay on',
  )
}
