import {
  type DirectorySpool,
  decodeKernelInode,
  type EntryPath,
  LayerEntryRefusedError,
  type LayerItem,
  type LayerReader,
  MARKS,
  type Meta,
  type Namespace,
  plainEntry,
  type RawInode,
} from '@lsync/overlay-merge'
import { type ByteString, close, LsyncError, printable, truncate, writeAt } from '@lsync/posix'
import { bareDirectory, type ObjectId, type TreeNode, timeOf } from './model/tree.ts'
import { readAhead } from './read-ahead.ts'
import type { Repository } from './repository.ts'

/** What a snapshot's directory is: a kernel layer with the marks of a namespace, or a tree without any. */
export type SnapshotForm = 'plain' | Namespace

/** A name of a layer that is made of a snapshot. */
export interface LayerNode {
  /** `undefined`: a whiteout. */
  readonly node: TreeNode | undefined
  /** Of a directory: whether it is opaque, whatever its marks say. */
  readonly opaque?: boolean
  /** What is in a directory: all of a tree, or these names. */
  readonly content?: ObjectId | ReadonlyMap<ByteString, LayerNode>
}

/** A node as an entry of a layer, without its data. */
export function itemOf(node: TreeNode, path: ByteString | '', form: SnapshotForm): LayerItem {
  const raw = rawOf(node)
  if (form !== 'plain') return decodeKernelInode(path as EntryPath, raw, MARKS[form])
  if (raw.kind === 'special' && raw.type === 'character' && raw.rdev === 0) {
    throw new LayerEntryRefusedError(path, 'a plain tree holds no character device 0:0', 'read it as a kernel layer')
  }
  return { entry: plainEntry(path as EntryPath, raw) }
}

/** The items of a layer whose root this is. The data of one file at a time lies in the spool. */
export class NodeReader implements LayerReader {
  readonly #repository: Repository
  readonly #root: LayerNode
  readonly #form: SnapshotForm
  readonly #signal: AbortSignal | undefined

  constructor(repository: Repository, root: LayerNode, form: SnapshotForm, signal?: AbortSignal) {
    this.#repository = repository
    this.#root = root
    this.#form = form
    this.#signal = signal
  }

  async *readItems(spool: DirectorySpool): AsyncGenerator<LayerItem> {
    const data = new DataWriter(this.#repository, spool, this.#signal)
    const root = this.#root.node ?? bareDirectory('' as ByteString)
    yield itemOf(root, '', this.#form)
    const levels: Listed[][] = [await this.#list('', this.#root.content)]
    for (let level = levels.at(-1); level !== undefined; level = levels.at(-1)) {
      this.#signal?.throwIfAborted()
      // Files up to the next directory are read ahead.
      const end = level.findIndex(({ item }) => item.entry.kind === 'directory')
      yield* data.complete(level.splice(0, end < 0 ? level.length : end))
      const directory = level.shift()
      if (directory === undefined) levels.pop()
      else {
        yield directory.item
        levels.push(await this.#list(directory.item.entry.path, directory.layerNode.content))
      }
    }
  }

  /** The names of a directory as items: whiteouts first, then the others, by their bytes. */
  async #list(path: ByteString | '', content: LayerNode['content']): Promise<Listed[]> {
    const nodes: Iterable<readonly [ByteString, LayerNode]> =
      typeof content !== 'string'
        ? (content ?? [])
        : (await this.#repository.readTree(content, this.#signal)).map((node) => [
            node.name,
            node.subtree === undefined ? { node } : { node, content: node.subtree },
          ])
    const listed = [...nodes].map(([name, layerNode]): Listed => {
      const at = (path === '' ? name : `${path}/${name}`) as ByteString
      return { layerNode, item: this.#itemOf(layerNode, at) }
    })
    const rank = ({ item }: Listed) => (item.entry.kind === 'whiteout' ? 0 : 1)
    return listed.sort((left, right) =>
      rank(left) !== rank(right) ? rank(left) - rank(right) : left.item.entry.path < right.item.entry.path ? -1 : 1,
    )
  }

  #itemOf({ node, opaque }: LayerNode, path: ByteString): LayerItem {
    if (node === undefined) return { entry: { kind: 'whiteout', path: path as EntryPath, form: 'device' } }
    const item = itemOf(node, path, this.#form)
    const { entry } = item
    return entry.kind !== 'directory' || opaque === undefined ? item : { ...item, entry: { ...entry, opaque } }
  }
}

interface Listed {
  readonly layerNode: LayerNode
  readonly item: LayerItem
}

const BLOCK_BYTES = 4096
const ZEROS = Buffer.alloc(BLOCK_BYTES)

/** Puts the data of files into a spool, as they come. */
class DataWriter {
  readonly #repository: Repository
  readonly #spool: DirectorySpool
  readonly #signal: AbortSignal | undefined
  /** Inodes whose first name was given: further names are links to it. */
  readonly #given = new Set<string>()
  #number = 0

  constructor(repository: Repository, spool: DirectorySpool, signal: AbortSignal | undefined) {
    this.#repository = repository
    this.#spool = spool
    this.#signal = signal
  }

  /** The items with their data; it is gone when the next one is asked for. */
  async *complete(listed: readonly Listed[]): AsyncGenerator<LayerItem> {
    const files = new Map<LayerItem, readonly ObjectId[]>()
    for (const { item, layerNode } of listed) {
      if (this.#needsData(item)) files.set(item, layerNode.node?.content ?? [])
    }
    const objects = readAhead(this.#repository, [...files.values()].flat(), this.#signal)
    for (const { item } of listed) {
      const content = files.get(item)
      if (content === undefined) {
        yield item
        continue
      }
      const number = this.#number++
      try {
        await this.#write(number, content.length, objects, item)
        yield { ...item, ...this.#spool.dataOf(number) }
      } finally {
        this.#spool.drop(number)
      }
    }
  }

  #needsData({ entry }: LayerItem): boolean {
    if (entry.kind !== 'file' || entry.metacopy !== undefined || entry.sizeBytes === 0) return false
    if (entry.linkGroup === undefined) return true
    if (this.#given.has(entry.linkGroup)) return false
    this.#given.add(entry.linkGroup)
    return true
  }

  async #write(number: number, pieces: number, objects: AsyncIterator<Buffer>, { entry }: LayerItem): Promise<void> {
    const { path } = entry
    const fd = this.#spool.create(number)
    try {
      let offset = 0
      for (let i = 0; i < pieces; i++) {
        const { value: bytes } = (await objects.next()) as { value: Buffer }
        writeData(fd, offset, bytes)
        offset += bytes.length
      }
      truncate(fd, offset, path)
    } catch (error) {
      if (!(error instanceof LsyncError) || this.#signal?.aborted === true) throw error
      throw new LsyncError(error.code, `${printable(path)}: ${error.message}`, { path, cause: error })
    } finally {
      close(fd)
    }
  }
}

/** Writes what is not zero: blocks of zeros stay holes. */
function writeData(fd: number, offset: number, bytes: Buffer): void {
  let start = 0
  for (let at = 0; at < bytes.length; ) {
    const end = Math.min(bytes.length, at + BLOCK_BYTES - ((offset + at) % BLOCK_BYTES))
    if (bytes.compare(ZEROS, 0, end - at, at, end) === 0) {
      if (at > start) writeAt(fd, offset + start, bytes.subarray(start, at))
      start = end
    }
    at = end
  }
  if (bytes.length > start) writeAt(fd, offset + start, bytes.subarray(start))
}

function rawOf(node: TreeNode): RawInode {
  const { type, sizeBytes, linkTarget, device, links, deviceId, inode } = node
  const meta = metaOf(node)
  const group = links > 1 ? { linkGroup: `${deviceId}:${inode}` } : {}
  switch (type) {
    case 'file':
      return { kind: 'file', meta, sizeBytes, ...group }
    case 'dir':
      return { kind: 'directory', meta }
    case 'symlink':
      return { kind: 'symlink', meta, target: linkTarget, ...group }
    case 'fifo':
    case 'socket':
      return { kind: 'special', meta, type, rdev: 0, ...group }
    case 'chardev':
      return { kind: 'special', meta, type: 'character', rdev: device, ...group }
    case 'dev':
      return { kind: 'special', meta, type: 'block', rdev: device, ...group }
  }
}

function metaOf({ mode, uid, gid, atime, mtime, xattrs }: TreeNode): Meta {
  return {
    mode: mode & 0o7777,
    uid,
    gid,
    atimeNs: timeOf(atime),
    mtimeNs: timeOf(mtime),
    xattrs: xattrs.map(([name, value]) => ({ name, value })).sort((left, right) => (left.name < right.name ? -1 : 1)),
  }
}
