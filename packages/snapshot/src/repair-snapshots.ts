import { type ByteString, LsyncError } from '@lsync/posix'
import type { Snapshot } from './model/snapshot.ts'
import { encodeNode, type ObjectId, type TreeNode } from './model/tree.ts'
import { type ObjectWriter, withObjectWriter } from './object-writer.ts'
import type { Repository } from './repository.ts'
import { TreeTooDeepError } from './restore.ts'
import { plainLength } from './restore-files.ts'
import { joinShown } from './save.ts'

export interface RepairSnapshotsRequest {
  readonly snapshots: readonly Snapshot[]
  /** Remove the snapshots of which a repaired one was made, and those of which nothing is left. */
  readonly forget?: boolean
  readonly dryRun?: boolean
  readonly signal?: AbortSignal | undefined
  readonly onProgress?: (progress: { phase: string; done: number; total?: number }) => void
}

/** Something that a repaired snapshot has no more. */
export interface SnapshotLoss {
  readonly path: ByteString
  /** `content`: pieces of a file, which has the others; `directory`: all that was in it; `size`: it was told wrongly. */
  readonly lost: 'content' | 'directory' | 'size'
}

/** What became of a snapshot that lacked something. */
export interface RepairedSnapshot {
  readonly from: ObjectId
  /** `undefined`: nothing of it is left. In a dry run as well. */
  readonly to: ObjectId | undefined
  readonly losses: readonly SnapshotLoss[]
}

/** By which repaired snapshots are known, to restic too. */
const TAG = 'repaired'
const MAX_DEPTH = 4096

/**
 * Makes snapshots that lack something into ones that are whole, as restic's `repair snapshots` does: a directory that
 * cannot be read becomes an empty one, of a file the pieces stay that are there, in their order, and its size is theirs.
 * The new snapshot has the tag `repaired` and knows its `original`, which stays unless `forget` is asked for.
 *
 * What counts as there is what the index names: `repairIndex` and `repairPacks` come first. Snapshots that lack nothing
 * are left alone.
 */
export async function repairSnapshots(
  repository: Repository,
  request: RepairSnapshotsRequest,
): Promise<RepairedSnapshot[]> {
  const { snapshots, forget = false, dryRun = false, onProgress } = request
  const exclusive = forget && !dryRun
  return withObjectWriter(repository, { exclusive, signal: request.signal }, async (writer, lock) => {
    const { signal } = lock
    const work = new TreeRepair(repository, dryRun ? undefined : writer, signal)
    const repaired: (RepairedSnapshot & { readonly snapshot: Snapshot; readonly tree: ObjectId | undefined })[] = []
    for (const [done, snapshot] of snapshots.entries()) {
      const { tree, losses } = await work.repair(snapshot.tree, '/' as ByteString, 0)
      if (losses.length > 0) repaired.push({ from: snapshot.id, to: undefined, losses, snapshot, tree })
      onProgress?.({ phase: 'snapshots', done: done + 1, total: snapshots.length })
    }
    if (dryRun) return repaired.map(({ from, to, losses }) => ({ from, to, losses }))
    await writer.flush()
    await lock.settled()
    const results: RepairedSnapshot[] = []
    for (const { from, losses, snapshot, tree } of repaired) {
      const { id: _, ...rest } = snapshot
      const tags = [...new Set([...snapshot.tags, TAG])]
      const made = tree === undefined ? undefined : { ...rest, tree, tags, original: snapshot.original ?? from }
      // The new one is there before the old one goes.
      const to = made === undefined ? undefined : await repository.writeSnapshot(made, signal)
      if (forget) await repository.backend.delete({ kind: 'snapshot', name: from }, { signal })
      results.push({ from, to, losses })
    }
    return results
  })
}

interface RepairedTree {
  /** `undefined`: the tree itself cannot be read. */
  readonly tree: ObjectId | undefined
  /** Paths beneath the tree. */
  readonly losses: readonly SnapshotLoss[]
}

class TreeRepair {
  readonly #repository: Repository
  /** Absent: nothing is written. */
  readonly #writer: ObjectWriter | undefined
  readonly #signal: AbortSignal
  /** Each tree once, however many snapshots have it. */
  readonly #known = new Map<ObjectId, RepairedTree>()

  constructor(repository: Repository, writer: ObjectWriter | undefined, signal: AbortSignal) {
    this.#repository = repository
    this.#writer = writer
    this.#signal = signal
  }

  async repair(id: ObjectId, path: ByteString, depth: number): Promise<RepairedTree> {
    if (depth > MAX_DEPTH) throw new TreeTooDeepError(path)
    const known = this.#known.get(id)
    const repaired = known ?? (await this.#repair(id, depth))
    if (known === undefined) this.#known.set(id, repaired)
    const losses = repaired.losses.map((loss) => ({ ...loss, path: pathBeneath(path, loss.path) }))
    return { ...repaired, losses }
  }

  async #repair(id: ObjectId, depth: number): Promise<RepairedTree> {
    this.#signal.throwIfAborted()
    let nodes: readonly TreeNode[]
    try {
      nodes = await this.#repository.readTree(id, this.#signal)
    } catch (error) {
      if (!(error instanceof LsyncError) || !LOST.has(error.code)) throw error
      return { tree: undefined, losses: [{ path: '' as ByteString, lost: 'directory' }] }
    }
    const losses: SnapshotLoss[] = []
    const texts: string[] = []
    for (const node of nodes) texts.push(encodeNode(await this.#repairNode(node, losses, depth)))
    if (losses.length === 0) return { tree: id, losses }
    return { tree: await this.#store(texts), losses }
  }

  async #repairNode(node: TreeNode, losses: SnapshotLoss[], depth: number): Promise<TreeNode> {
    if (node.subtree !== undefined) {
      const { tree, losses: below } = await this.repair(node.subtree, node.name, depth + 1)
      losses.push(...below)
      return below.length === 0 ? node : { ...node, subtree: tree ?? (await this.#store([])) }
    }
    if (node.content === undefined) return node
    const locations = node.content.map((id) => this.#repository.table.locate('data', id))
    const content = node.content.filter((_, i) => locations[i] !== undefined)
    const sizeBytes = locations.reduce((sum, location) => sum + (location === undefined ? 0 : plainLength(location)), 0)
    if (content.length < node.content.length) losses.push({ path: node.name, lost: 'content' })
    else if (sizeBytes !== node.sizeBytes) losses.push({ path: node.name, lost: 'size' })
    else return node
    return { ...node, content, sizeBytes }
  }

  async #store(nodes: readonly string[]): Promise<ObjectId> {
    return this.#writer === undefined ? NO_ID : this.#writer.addTree(nodes)
  }
}

/** What says that something is lost, as opposed to a connection that fails. */
const LOST = new Set([
  'OBJECT_MISSING',
  'OBJECT_DAMAGED',
  'REPOSITORY_FILE_MISSING',
  'TREE_INVALID',
  'PACK_DAMAGED',
  'REPOSITORY_FILE_DAMAGED',
])
const NO_ID = '0'.repeat(64)

function pathBeneath(path: ByteString, below: ByteString): ByteString {
  return below === ''
    ? path
    : path.startsWith('/') || path === ''
      ? joinShown(path, below)
      : (`${path}/${below}` as ByteString)
}
