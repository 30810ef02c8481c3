import {
  dataName,
  decodeKernelInode,
  MARKS,
  type Meta,
  type Namespace,
  PORTABLE_MANIFEST,
  type PortableInode,
  type PortableName,
  type RawInode,
  readPortableTree,
  writeManifest,
} from '@lsync/overlay-merge'
import { type ByteString, S_IFBLK, S_IFCHR, S_IFIFO, S_IFSOCK } from '@lsync/posix'
import { SFTP_CREATE, SFTP_READ, SFTP_TRUNCATE, SFTP_WRITE, type SftpClient, SftpError } from '@lsync/ssh'
import type { Extent, Operation, RawMeta, TreePath } from '../model/operation.ts'
import type { ContentOperation } from '../protocol/operation-codec.ts'
import { checkPath, OperationRefusedError, placeOf } from '../target-path.ts'
import type { FileSink, OperationSink, PlainOperation } from './sftp-lane.ts'
import { replaceFile, type SftpPlace } from './sftp-place.ts'

const DATA = 'data'
const PIECE_BYTES = 256 << 10
const SPECIAL: Readonly<Record<number, 'fifo' | 'socket' | 'character' | 'block'>> = {
  [S_IFIFO]: 'fifo',
  [S_IFSOCK]: 'socket',
  [S_IFCHR]: 'character',
  [S_IFBLK]: 'block',
}
const NO_META: RawMeta = { mode: 0o700, uid: 0, gid: 0, mtimeNs: 0n, xattrs: [], inodeFlags: 0 }

/**
 * Operations as a portable layer on an SFTP server, from which `lsync layer import` restores the exact layer. The tree is
 * known here; only content goes there at once, each in a file of its own that is never written to again. A barrier
 * writes the manifest, so the layer there is always that of the last barrier.
 */
export class SftpPortable implements OperationSink {
  readonly #client: SftpClient
  readonly #place: SftpPlace
  readonly #namespace: Namespace
  readonly #root: PortableName
  /** Names of each inode. */
  readonly #links = new Map<PortableInode, number>()
  readonly #stage = new Map<number, PortableName>()
  readonly #buckets = new Map<string, Promise<void>>()
  /** Data files that the manifest there still names. */
  #freed: number[] = []
  #nextData = 0
  #isChanged = false

  private constructor(client: SftpClient, place: SftpPlace, namespace: Namespace, root: PortableName) {
    this.#client = client
    this.#place = place
    this.#namespace = namespace
    this.#root = root
    this.#count(root)
  }

  /** Reads what is there; data that no manifest names, as a lost connection leaves it, is removed. */
  static async open(client: SftpClient, place: SftpPlace, namespace: Namespace): Promise<SftpPortable> {
    const text = await readWhole(client, `${place.root}/${PORTABLE_MANIFEST}` as ByteString)
    const root = text === undefined ? undefined : readPortableTree(linesOf(text), namespace)
    const opened = new SftpPortable(client, place, namespace, root ?? directoryOf(NO_META))
    await opened.#sweep()
    return opened
  }

  async apply(operation: PlainOperation): Promise<void> {
    this.#isChanged = true
    switch (operation.do) {
      case 'remove':
        return this.#put(operation.path, undefined)
      case 'out': {
        this.#place.nextStage = Math.max(this.#place.nextStage, operation.stage + 1)
        if (!this.#stage.has(operation.stage)) this.#stage.set(operation.stage, this.#take(operation.path))
        return
      }
      case 'in': {
        const name = this.#stage.get(operation.stage)
        this.#stage.delete(operation.stage)
        if (name !== undefined) this.#put(operation.path, name)
        return
      }
      case 'rename': {
        if (this.#find(operation.from) !== undefined) this.#put(operation.to, this.#take(operation.from))
        else if (this.#find(operation.to) === undefined) throw missing(operation.from)
        return
      }
      case 'directory':
        if (this.#find(operation.path)?.children === undefined) this.#add(operation.path, directoryOf(NO_META))
        return
      case 'keep':
        return this.#keep(operation)
      case 'link': {
        const existing = this.#find(operation.to)
        if (existing === undefined) throw missing(operation.to)
        if (existing.children !== undefined) throw new OperationRefusedError(operation.to, 'directories have one name')
        if (this.#find(operation.path)?.inode === existing.inode) return
        return this.#add(operation.path, { inode: existing.inode, children: undefined })
      }
      case 'symlink': {
        const raw: RawInode = { kind: 'symlink', meta: metaOf(operation.meta), target: operation.target }
        return this.#add(operation.path, this.#nameOf(operation.path, raw))
      }
      case 'special': {
        const type = SPECIAL[operation.type]
        if (type === undefined) throw new OperationRefusedError(operation.path, 'no such type of file')
        const raw: RawInode = { kind: 'special', meta: metaOf(operation.meta), type, rdev: operation.rdev }
        return this.#add(operation.path, this.#nameOf(operation.path, raw))
      }
      case 'meta': {
        const name = this.#find(operation.path)
        if (name === undefined) throw missing(operation.path)
        if (name.inode.raw.kind !== operation.kind)
          throw new OperationRefusedError(operation.path, 'it is of another kind')
        const raw = { ...name.inode.raw, meta: metaOf(operation.meta) }
        this.#check(operation.path, raw)
        name.inode.raw = raw
        return
      }
    }
  }

  async open(operation: ContentOperation): Promise<FileSink> {
    const { path, sizeBytes, extents, meta } = operation
    const base = operation.do === 'patch' ? this.#find(path)?.inode : undefined
    if (operation.do === 'patch' && base?.raw.kind !== 'file') throw missing(path)
    this.#parent(path)
    const raw: RawInode = { kind: 'file', meta: metaOf(meta), sizeBytes }
    const isMetacopy = isMetacopyOf(this.#check(path, raw))
    const data = sizeBytes === 0 || isMetacopy ? undefined : this.#nextData++
    const handle = data === undefined ? undefined : await this.#create(data)
    const discard = async () => {
      if (data !== undefined) this.#freed.push(data)
      if (handle !== undefined) await this.#client.close(handle)
    }
    try {
      if (handle !== undefined && base?.data !== undefined) await this.#copy(base.data, handle)
      if (handle !== undefined && operation.do === 'patch') await this.#punch(handle, operation)
    } catch (error) {
      await discard()
      throw error
    }
    return {
      discard,
      write: (offset, bytes) => (handle === undefined ? Promise.resolve() : this.#write(handle, offset, bytes, path)),
      finish: async () => {
        if (handle !== undefined) {
          const isShort = operation.do === 'patch' || endOf(extents) < sizeBytes
          await Promise.all([
            ...(isShort ? [this.#client.fsetstat(handle, { sizeBytes }, path)] : []),
            ...(this.#client.has('fsync@openssh.com') ? [this.#client.fsync(handle, path)] : []),
          ])
          await this.#client.close(handle)
        }
        this.#isChanged = true
        if (operation.do === 'patch' && operation.shared && base !== undefined) {
          if (base.data !== undefined) this.#freed.push(base.data)
          base.raw = raw
          base.data = data
        } else this.#add(path, { inode: { raw, data }, children: undefined })
      },
    }
  }

  /** The layer there is that of now, durably as far as the server can. */
  async store(): Promise<void> {
    if (!this.#isChanged) return
    const freed = this.#freed
    const path = `${this.#place.root}/${PORTABLE_MANIFEST}` as ByteString
    await replaceFile(this.#client, this.#place.temporary(), path, piecesOf(writeManifest(this.#root, this.#namespace)))
    this.#isChanged = false
    this.#freed = []
    await Promise.all(freed.map((number) => this.#client.remove(this.#pathOf(number)).catch(ifGone)))
  }

  /** What is still in the stage was taken out for good. */
  clearStage(): void {
    for (const name of this.#stage.values()) this.#release(name)
    this.#stage.clear()
  }

  #keep({ path, names, after, last }: Extract<Operation, { do: 'keep' }>): void {
    if (path !== '') checkPath(path)
    const children = this.#find(path)?.children
    if (children === undefined) return
    const kept = new Set<string>(names)
    for (const [name, child] of [...children]) {
      if ((after !== undefined && name <= after) || (last !== undefined && name > last) || kept.has(name)) continue
      children.delete(name)
      this.#release(child)
    }
  }

  #nameOf(path: TreePath, raw: RawInode): PortableName {
    this.#check(path, raw)
    return { inode: { raw, data: undefined }, children: undefined }
  }

  // What the manifest could not say has to fail here, where it is one name that fails.
  #check(path: TreePath, raw: RawInode) {
    return decodeKernelInode(path as unknown as Parameters<typeof decodeKernelInode>[0], raw, MARKS[this.#namespace])
  }

  #find(path: TreePath): PortableName | undefined {
    if (path === '') return this.#root
    checkPath(path)
    let name: PortableName | undefined = this.#root
    for (const part of path.split('/')) name = name?.children?.get(part as ByteString)
    return name
  }

  #parent(path: TreePath): { children: Map<ByteString, PortableName>; name: ByteString } {
    const { parent, name } = placeOf(path)
    const children = this.#find(parent)?.children
    if (children === undefined) throw missing(path)
    return { children, name }
  }

  #take(path: TreePath): PortableName {
    const { children, name } = this.#parent(path)
    const found = children.get(name)
    if (found === undefined) throw missing(path)
    children.delete(name)
    return found
  }

  /** Gives a name that is counted already a place, or nothing; what was there goes. */
  #put(path: TreePath, value: PortableName | undefined): void {
    if (value === undefined && this.#find(path) === undefined) return
    const { children, name } = this.#parent(path)
    const before = children.get(name)
    if (before === value) return
    if (value === undefined) children.delete(name)
    else children.set(name, value)
    if (before !== undefined) this.#release(before)
  }

  #add(path: TreePath, value: PortableName): void {
    if (path === '') throw new OperationRefusedError(path, 'the root is no name')
    this.#count(value)
    try {
      this.#put(path, value)
    } catch (error) {
      this.#release(value)
      throw error
    }
  }

  #count({ inode, children }: PortableName): void {
    this.#links.set(inode, (this.#links.get(inode) ?? 0) + 1)
    if (inode.data !== undefined) this.#nextData = Math.max(this.#nextData, inode.data + 1)
    for (const child of children?.values() ?? []) this.#count(child)
  }

  #release({ inode, children }: PortableName): void {
    for (const child of children?.values() ?? []) this.#release(child)
    const left = (this.#links.get(inode) ?? 1) - 1
    if (left > 0) {
      this.#links.set(inode, left)
      return
    }
    this.#links.delete(inode)
    if (inode.data !== undefined) this.#freed.push(inode.data)
  }

  #pathOf(data: number): ByteString {
    const { bucket, name } = dataName(data)
    return `${this.#place.root}/${DATA}/${bucket}/${name}` as ByteString
  }

  async #create(data: number): Promise<Buffer> {
    const { bucket } = dataName(data)
    let made = this.#buckets.get(bucket)
    if (made === undefined) {
      made = this.#makeDirectory(`${this.#place.root}/${DATA}/${bucket}` as ByteString)
      this.#buckets.set(bucket, made)
    }
    await made
    return this.#client.open(this.#pathOf(data), SFTP_WRITE | SFTP_CREATE | SFTP_TRUNCATE)
  }

  async #makeDirectory(path: ByteString): Promise<void> {
    try {
      await this.#client.mkdir(path, 0o700)
    } catch (error) {
      if (!(error instanceof SftpError) || (await this.#client.lstat(path)) === undefined) throw error
    }
  }

  async #copy(data: number, to: Buffer): Promise<void> {
    const path = this.#pathOf(data)
    const from = await this.#client.open(path, SFTP_READ)
    try {
      if (this.#client.has('copy-data')) {
        await this.#client.copyData(from, to, path)
        return
      }
      for (let at = 0; ; ) {
        const bytes = await this.#client.read(from, at, 8 * this.#client.writeBytes)
        if (bytes.length === 0) return
        await this.#write(to, at, bytes, path)
        at += bytes.length
      }
    } finally {
      await this.#client.close(from)
    }
  }

  async #punch(handle: Buffer, { path, sizeBytes, holes }: Extract<Operation, { do: 'patch' }>): Promise<void> {
    await this.#client.fsetstat(handle, { sizeBytes }, path)
    const zeros = Buffer.alloc(PIECE_BYTES)
    for (const [offset, length] of holes) {
      for (let at = 0; at < length; at += zeros.length) {
        await this.#write(handle, offset + at, zeros.subarray(0, Math.min(zeros.length, length - at)), path)
      }
    }
  }

  async #write(handle: Buffer, offset: number, bytes: Uint8Array, path: string): Promise<void> {
    const size = this.#client.writeBytes
    const writes: Promise<void>[] = []
    for (let at = 0; at < bytes.length; at += size) {
      writes.push(this.#client.write(handle, offset + at, bytes.subarray(at, at + size), path))
    }
    await Promise.all(writes)
  }

  async #sweep(): Promise<void> {
    const directory = `${this.#place.root}/${DATA}` as ByteString
    await this.#makeDirectory(directory)
    const used = new Set<string>()
    for (const { data } of this.#links.keys()) if (data !== undefined) used.add(this.#pathOf(data))
    for (const bucket of await this.#client.readdir(directory)) {
      const path = `${directory}/${bucket.name}`
      const unused = (await this.#client.readdir(path as ByteString))
        .map(({ name }) => `${path}/${name}` as ByteString)
        .filter((file) => !used.has(file))
      await Promise.all(unused.map((file) => this.#client.remove(file)))
    }
  }
}

function directoryOf(meta: RawMeta): PortableName {
  return { inode: { raw: { kind: 'directory', meta: metaOf(meta) }, data: undefined }, children: new Map() }
}

function isMetacopyOf({ entry }: ReturnType<typeof decodeKernelInode>): boolean {
  return entry.kind === 'file' && entry.metacopy !== undefined
}

function metaOf({ mode, uid, gid, mtimeNs, xattrs }: RawMeta): Meta {
  return { mode, uid, gid, atimeNs: mtimeNs, mtimeNs, xattrs: xattrs.map(([name, value]) => ({ name, value })) }
}

function endOf(extents: readonly Extent[]): number {
  const last = extents.at(-1)
  return last === undefined ? 0 : last[0] + last[1]
}

function missing(path: TreePath): SftpError {
  return new SftpError('ENOENT', path, 'it is not in the layer')
}

function ifGone(error: unknown): void {
  if (!(error instanceof SftpError) || error.code !== 'ENOENT') throw error
}

function* piecesOf(lines: Iterable<string>): Generator<Uint8Array> {
  let text = ''
  for (const line of lines) {
    text += line
    if (text.length < PIECE_BYTES) continue
    yield Buffer.from(text)
    text = ''
  }
  yield Buffer.from(text)
}

async function readWhole(client: SftpClient, path: ByteString): Promise<Buffer | undefined> {
  if ((await client.lstat(path)) === undefined) return undefined
  const handle = await client.open(path, SFTP_READ)
  try {
    const parts: Buffer[] = []
    for (let at = 0; ; ) {
      const bytes = await client.read(handle, at, 16 * client.writeBytes)
      if (bytes.length === 0) return Buffer.concat(parts)
      parts.push(bytes)
      at += bytes.length
    }
  } finally {
    await client.close(handle)
  }
}

function* linesOf(bytes: Buffer): Generator<string> {
  let start = 0
  for (let end = bytes.indexOf(0x0a); end >= 0; end = bytes.indexOf(0x0a, start)) {
    yield bytes.toString('utf8', start, end)
    start = end + 1
  }
}
