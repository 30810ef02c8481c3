import { randomBytes } from 'node:crypto'
import { type ByteString, type HostPath, PosixError, S_IFDIR, S_IFLNK, S_IFREG } from '@lsync/posix'
import { ChunkStream } from './chunk-stream.ts'
import { type CreateRequest, describeSnapshot, normalized } from './create.ts'
import { RepositoryLock } from './lock.ts'
import { formatTime } from './model/go-text.ts'
import { nodeTypeOf } from './model/mode.ts'
import type { Snapshot } from './model/snapshot.ts'
import { bareDirectory, encodeNode, type ObjectId, type TreeNode } from './model/tree.ts'
import { ObjectWriter } from './object-writer.ts'
import type { Repository } from './repository.ts'
import { plainLength } from './restore-files.ts'
import { openNode } from './save.ts'
import { locatePath } from './select.ts'

/** What an inode carries besides its data. */
export interface EditedMeta {
  /** Permission bits, 07777. */
  readonly mode: number
  readonly uid: number
  readonly gid: number
  readonly mtimeNs: bigint
  readonly xattrs: readonly (readonly [name: ByteString, value: Uint8Array])[]
}

/** Where a directory's names come from, and what was done to them. */
class Directory {
  node: TreeNode
  readonly base: ObjectId | undefined
  nodes: ReadonlyMap<ByteString, TreeNode> | undefined
  /** `undefined`: it is gone. */
  readonly children = new Map<ByteString, Child | undefined>()

  constructor(node: TreeNode, base: ObjectId | undefined) {
    this.node = node
    this.base = base
  }
}

type Child = Directory | TreeNode

/** Something that was taken out of its place, to be put into another one. */
export type Taken = Child | undefined

/**
 * A directory of a repository as it changes, name by name, and the snapshots of it. What does not change is not read,
 * and stays by its id. Paths are beneath the directory, components joined by `/`; `''` is the directory itself.
 *
 * Between the first change and `commit` the repository is locked against removal, so that what is stored meanwhile stays.
 * One call at a time. After a failure it is of no use any more: close it, and make another one.
 */
export class SnapshotEditor {
  readonly #repository: Repository
  readonly #path: HostPath
  readonly #signal: AbortSignal
  #root: Directory
  #parent: ObjectId | undefined
  #lock: RepositoryLock | undefined
  #writer: ObjectWriter | undefined
  #taken = 0

  private constructor(repository: Repository, path: HostPath, signal: AbortSignal, root: Directory) {
    this.#repository = repository
    this.#path = path
    this.#signal = signal
    this.#root = root
  }

  /** Begins with what a snapshot has of a directory that was saved, or with an empty one. */
  static async open(
    repository: Repository,
    {
      path,
      snapshot,
      signal,
    }: { readonly path: HostPath; readonly snapshot: Snapshot | undefined; readonly signal: AbortSignal },
  ): Promise<SnapshotEditor> {
    await repository.loadIndex(signal)
    const located = snapshot === undefined ? undefined : await locatePath(repository, snapshot, path, signal)
    const root = new Directory(located?.node ?? bareDirectory('' as ByteString), located?.tree)
    const editor = new SnapshotEditor(repository, normalized(path), signal, root)
    editor.#parent = snapshot?.id
    return editor
  }

  /** Whether anything was changed since the last commit. */
  get isTouched(): boolean {
    return this.#writer !== undefined
  }

  /** Forgets all that is in the directory. */
  async clear(): Promise<void> {
    await this.#begin()
    this.#root = new Directory(this.#root.node, undefined)
  }

  async remove(path: ByteString): Promise<void> {
    await this.#put(path, undefined)
  }

  /** Removes what is not among `names`, beyond `after` and not beyond `last`. */
  async keep(
    path: ByteString | '',
    names: readonly ByteString[],
    { after, last }: { readonly after?: ByteString; readonly last?: ByteString } = {},
  ): Promise<void> {
    await this.#begin()
    const directory = await this.#find(path)
    if (!(directory instanceof Directory)) return
    const kept = new Set(names)
    for (const name of [...(await this.#load(directory)).keys(), ...directory.children.keys()]) {
      const isMeant = (after === undefined || name > after) && (last === undefined || name <= last)
      if (isMeant && !kept.has(name)) directory.children.set(name, undefined)
    }
  }

  /** Takes what has a name away from there. What is taken is put somewhere, or dropped. */
  async take(path: ByteString): Promise<Taken> {
    const found = await this.#find(path)
    await this.#put(path, undefined)
    this.#taken++
    return found
  }

  /** Gives what was taken a name, where whatever is there is replaced. @throws {PosixError} ENOENT if nothing was taken */
  async put(path: ByteString, taken: Taken): Promise<void> {
    this.#taken--
    if (taken === undefined) throw new PosixError('ENOENT', { syscall: 'rename', path })
    await this.#put(path, taken)
  }

  drop(_taken: Taken): void {
    this.#taken--
  }

  /** Makes a directory; one that is there stays. */
  async makeDirectory(path: ByteString | ''): Promise<void> {
    await this.#begin()
    if ((await this.#find(path)) instanceof Directory) return
    await this.#put(path as ByteString, new Directory(bareDirectory('' as ByteString), undefined))
  }

  /** Begins a file. It has no name before `finish`. */
  async beginFile(): Promise<ContentWriter> {
    await this.#begin()
    return new ContentWriter(this.#repository, this.#writer as ObjectWriter, [], this.#signal)
  }

  /** Begins a file whose content is that of a name, except for what is added. @throws {PosixError} ENOENT */
  async beginPatch(path: ByteString): Promise<ContentWriter> {
    await this.#begin()
    const { content = [] } = await this.#file(path)
    return new ContentWriter(this.#repository, this.#writer as ObjectWriter, content, this.#signal)
  }

  /** Gives a name the content that was written; `isShared`: all other names of the inode get it, too. */
  async finish(
    path: ByteString,
    content: FinishedContent,
    meta: EditedMeta,
    { isShared = false }: { readonly isShared?: boolean } = {},
  ): Promise<void> {
    const node = { ...nodeOf(S_IFREG, meta), ...content }
    if (!isShared) return this.#put(path, node)
    const { inode, links } = await this.#file(path)
    await this.#put(path, { ...node, inode, links })
    await this.#changeLinked({ ...node, inode, links })
  }

  /** Gives an inode one more name. @throws {PosixError} ENOENT */
  async link(path: ByteString, to: ByteString): Promise<void> {
    const node = await this.#file(to)
    const linked = { ...node, links: Math.max(node.links, 1) + 1, inode: node.links > 1 ? node.inode : newInode() }
    await this.#put(to, linked)
    await this.#put(path, linked)
  }

  async makeSymlink(path: ByteString, linkTarget: ByteString, meta: EditedMeta): Promise<void> {
    await this.#put(path, { ...nodeOf(S_IFLNK, meta), linkTarget })
  }

  /** A fifo, socket, device or whiteout; `format` is the S_IF* of its mode. */
  async makeSpecial(path: ByteString, format: number, device: number, meta: EditedMeta): Promise<void> {
    await this.#put(path, { ...nodeOf(format, meta), device })
  }

  /** Gives what is there its metadata; all names of the inode show it. @throws {PosixError} ENOENT */
  async setMeta(path: ByteString | '', meta: EditedMeta): Promise<void> {
    await this.#begin()
    const found = await this.#find(path)
    if (found === undefined) throw new PosixError('ENOENT', { syscall: 'setattr', path })
    if (found instanceof Directory) {
      found.node = { ...found.node, ...metaFieldsOf(S_IFDIR, meta) }
      // It is looked at when its parent is made again.
      if (path !== '') await this.#put(path as ByteString, found)
      return
    }
    const node = { ...found, ...metaFieldsOf(found.mode & ~0o7777, meta) }
    await this.#put(path as ByteString, node)
    if (node.links > 1) await this.#changeLinked(node)
  }

  /**
   * Makes a snapshot of what there is now. It is durable when this resolves.
   * @throws {RepositoryLockedError} and what the backend throws
   */
  async commit(
    request: Pick<CreateRequest, 'hostname' | 'tags' | 'timeNs'> & {
      readonly fields: Readonly<Record<string, unknown>>
    },
  ): Promise<{ readonly snapshotId: ObjectId; readonly tree: ObjectId }> {
    await this.#begin()
    const writer = this.#writer as ObjectWriter
    const own = await this.#store(this.#root)
    const name = this.#path.slice(this.#path.lastIndexOf('/') + 1) as ByteString
    const tree = await writer.addAbove(this.#path, openNode({ ...this.#root.node, name, subtree: undefined }), own)
    await writer.flush()
    await this.#lock?.settled()
    const described = describeSnapshot({ ...request, paths: [this.#path], tree, parent: this.#parent })
    const snapshotId = await this.#repository.writeSnapshot({ ...described, others: request.fields }, this.#signal)
    this.#parent = snapshotId
    this.#root = new Directory(this.#root.node, own)
    await writer.close()
    this.#writer = undefined
    // What was taken away is in no snapshot until it is put somewhere.
    if (this.#taken === 0) await this.#unlock()
    return { snapshotId, tree }
  }

  /** Gives everything back. What was not committed is gone. */
  async close(): Promise<void> {
    // Objects that were noted and did not get into the repository must not be taken for stored.
    if (this.#writer !== undefined) this.#repository.resetIndex()
    await this.#writer?.close()
    this.#writer = undefined
    await this.#unlock()
  }

  async #unlock(): Promise<void> {
    const lock = this.#lock
    this.#lock = undefined
    await lock?.release()
  }

  async #begin(): Promise<void> {
    this.#signal.throwIfAborted()
    this.#lock?.signal.throwIfAborted()
    if (this.#writer !== undefined) return
    this.#lock ??= await RepositoryLock.acquire(this.#repository, { exclusive: false, signal: this.#signal })
    await this.#repository.loadIndex(this.#signal)
    this.#writer = new ObjectWriter(this.#repository, this.#signal)
  }

  async #load(directory: Directory): Promise<ReadonlyMap<ByteString, TreeNode>> {
    if (directory.nodes === undefined) {
      const { base } = directory
      const nodes = base === undefined ? [] : await this.#repository.readTree(base, this.#signal)
      directory.nodes = new Map(nodes.map((node) => [node.name, node]))
    }
    return directory.nodes
  }

  async #child(directory: Directory, name: ByteString): Promise<Child | undefined> {
    if (directory.children.has(name)) return directory.children.get(name)
    const node = (await this.#load(directory)).get(name)
    if (node?.subtree === undefined) return node
    const child = new Directory(node, node.subtree)
    directory.children.set(name, child)
    return child
  }

  async #find(path: ByteString | ''): Promise<Child | undefined> {
    let found: Child | undefined = this.#root
    for (const name of path === '' ? [] : (path.split('/') as ByteString[])) {
      if (!(found instanceof Directory)) return undefined
      found = await this.#child(found, name)
    }
    return found
  }

  async #file(path: ByteString): Promise<TreeNode> {
    const found = await this.#find(path)
    if (found === undefined) throw new PosixError('ENOENT', { syscall: 'open', path })
    if (found instanceof Directory) throw new PosixError('EPERM', { syscall: 'open', path })
    return found
  }

  async #put(path: ByteString, child: Child | undefined): Promise<void> {
    await this.#begin()
    const cut = path.lastIndexOf('/')
    const directory = await this.#find(path.slice(0, Math.max(0, cut)) as ByteString)
    if (directory instanceof Directory) directory.children.set(path.slice(cut + 1) as ByteString, child)
    else if (child !== undefined) throw new PosixError('ENOENT', { syscall: 'open', path })
  }

  /** Gives all names of an inode what one of them has got. */
  async #changeLinked(changed: TreeNode, directory = this.#root): Promise<void> {
    const seen = new Set(directory.children.keys())
    for (const [name, child] of directory.children) {
      if (child instanceof Directory) await this.#changeLinked(changed, child)
      else if (child !== undefined && isSameInode(child, changed)) directory.children.set(name, changed)
    }
    for (const [name, node] of await this.#load(directory)) {
      if (seen.has(name)) continue
      if (node.subtree === undefined) {
        if (isSameInode(node, changed)) directory.children.set(name, changed)
        continue
      }
      const below = new Directory(node, node.subtree)
      await this.#changeLinked(changed, below)
      if (below.children.size > 0) directory.children.set(name, below)
    }
  }

  async #store(directory: Directory): Promise<ObjectId> {
    if (directory.children.size === 0 && directory.base !== undefined) return directory.base
    const nodes = new Map(await this.#load(directory))
    for (const [name, child] of directory.children) {
      if (child === undefined) nodes.delete(name)
      else if (!(child instanceof Directory)) nodes.set(name, { ...child, name })
      else nodes.set(name, { ...child.node, name, subtree: await this.#store(child) })
    }
    const sorted = [...nodes.values()].sort((left, right) => (left.name < right.name ? -1 : 1))
    return (this.#writer as ObjectWriter).addTree(sorted.map(encodeNode))
  }
}

/** What a file is made of. */
export interface FinishedContent {
  readonly content: readonly ObjectId[]
  readonly sizeBytes: number
}

/** The content of one file, from its beginning to its end. What is not added is as in the file before, or zeros. */
export class ContentWriter {
  readonly #repository: Repository
  readonly #signal: AbortSignal
  readonly #before: readonly ObjectId[]
  readonly #chunks: ChunkStream
  #offset = 0

  constructor(repository: Repository, writer: ObjectWriter, before: readonly ObjectId[], signal: AbortSignal) {
    this.#repository = repository
    this.#before = before
    this.#signal = signal
    this.#chunks = new ChunkStream(writer, repository.polynomial)
  }

  /** Adds bytes at an offset that is not before what was added last. */
  async add(offset: number, bytes: Uint8Array): Promise<void> {
    await this.#copyUpTo(offset)
    await this.#append(bytes)
  }

  /** Leaves a hole, of which nothing is taken from the file before. */
  async skip(offset: number, length: number): Promise<void> {
    await this.#copyUpTo(offset)
    await this.#appendZeros(length)
  }

  async finish(sizeBytes: number): Promise<FinishedContent> {
    await this.#copyUpTo(sizeBytes)
    return { content: await this.#chunks.finish(), sizeBytes }
  }

  async #copyUpTo(end: number): Promise<void> {
    let at = 0
    for (const id of this.#before) {
      if (at >= end) break
      const location = this.#repository.table.locate('data', id)
      const length = location === undefined ? 0 : plainLength(location)
      if (at + length > this.#offset) {
        const object = await this.#repository.readObject('data', id, this.#signal)
        await this.#append(object.subarray(this.#offset - at, end - at))
      }
      at += length
    }
    await this.#appendZeros(end - this.#offset)
  }

  async #append(bytes: Uint8Array): Promise<void> {
    this.#offset += bytes.length
    await this.#chunks.add(bytes)
  }

  async #appendZeros(count: number): Promise<void> {
    if (count <= 0) return
    this.#offset += count
    await this.#chunks.addZeros(count)
  }
}

function metaFieldsOf(format: number, { mode, uid, gid, mtimeNs, xattrs }: EditedMeta) {
  const mtime = formatTime(mtimeNs)
  return {
    mode: format | mode,
    mtime,
    atime: mtime,
    ctime: mtime,
    uid,
    gid,
    xattrs: xattrs.map(([name, value]) => [name, Buffer.from(value)] as const),
  }
}

function nodeOf(format: number, meta: EditedMeta): TreeNode {
  return {
    ...bareDirectory('' as ByteString),
    ...metaFieldsOf(format, meta),
    type: nodeTypeOf(format),
    links: 1,
    content: format === S_IFREG ? [] : undefined,
  }
}

/** A number that no other inode has: an upper's own would be used again. */
function newInode(): number {
  return randomBytes(6).readUIntBE(0, 6)
}

function isSameInode(one: TreeNode, other: TreeNode): boolean {
  return one.links > 1 && one.inode === other.inode && one.deviceId === other.deviceId
}
