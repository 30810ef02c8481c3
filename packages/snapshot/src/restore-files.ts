import { randomBytes } from 'node:crypto'
import {
  allocate,
  type ByteString,
  close,
  getXattr,
  type HostPath,
  LsyncError,
  link,
  listXattrs,
  type Memory,
  makeDirectory,
  makeNode,
  makeSymlink,
  memoryOver,
  O_CREAT,
  O_DIRECTORY,
  O_EXCL,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  O_RDWR,
  openat,
  openBeneath,
  PosixError,
  readDirents,
  readInto,
  readSymlink,
  removeDirectory,
  removeXattr,
  rename,
  S_IFMT,
  S_IFSOCK,
  type Stat,
  setModeAt,
  setModeFd,
  setOwner,
  setTimes,
  setXattr,
  statFd,
  truncate,
  tryStatAt,
  tryUnlink,
  unlink,
  withFd,
  writeFrom,
} from '@lsync/posix'
import { type CipherKey, createEngine, type Engine, SEAL_BYTES } from './crypto/engine.ts'
import { decodeTree, type ObjectId, type TreeNode, timeOf } from './model/tree.ts'
import { type Location, ObjectTable, type TableSegment } from './object-table.ts'
import type { ObjectKind } from './pack.ts'
import { PackReader } from './pack-reader.ts'
import { ObjectDamagedError, ObjectMissingError } from './repository.ts'
import type { Doer } from './thread-pool.ts'

/** What a thread needs to restore, in a form that travels. */
export interface RestoreInit {
  readonly key: CipherKey
  /** The target; everything happens beneath it. */
  readonly targetFd: number
  /** Existing files of the same size and mtime are taken for the same. */
  readonly trustsTimes: boolean
  readonly deletes: boolean
  readonly isDryRun: boolean
  /** Whether somebody wants to know of each name what happens to it; counts are given in any case. */
  readonly tellsActions: boolean
  /** Where packs lie that threads can read themselves, and in which of them every object is. */
  readonly repository?: {
    readonly directory: HostPath
    readonly segments: readonly TableSegment[]
    readonly packs: readonly ObjectId[]
  }
}

/** A file of more than this is not one job, and not held in memory. */
export const LARGE_BYTES = 16 * 1024 * 1024
/** So many sealed bytes are read for one job, or one object of more. */
export const BATCH_BYTES = 4 * 1024 * 1024
/** Ranges of a pack that lie closer are read in one go. */
const GAP_BYTES = 32 * 1024

/** Bytes of a pack that were read, and where in it they begin. */
export interface PackRange {
  readonly packId: ObjectId
  readonly offset: number
  readonly content: ArrayBuffer
}

/** Where a piece of a file lies: sealed, in one of a job's ranges. */
export interface PieceRef {
  readonly range: number
  /** In the range's content. */
  readonly at: number
  readonly length: number
  readonly uncompressedLength: number | undefined
}

/** A directory's tree, and which of its nodes are meant. */
interface NodesRef {
  /** Beneath the target. */
  readonly path: ByteString | ''
  readonly treeId: ObjectId
  /** The content of the tree object. */
  readonly tree: Uint8Array
  /** Positions in it. */
  readonly nodes: readonly number[]
}

/** A file and what it is made of. */
export interface FileRef {
  /** Position in the tree. */
  readonly node: number
  readonly pieces: readonly PieceRef[]
}

/** One piece of work. */
export type RestoreJob =
  /**
   * A directory with everything in it that one job can do, by a thread that reads the repository itself. What it leaves to
   * others is in `left` and `subdirectories`.
   */
  | {
      readonly kind: 'directory'
      readonly path: ByteString | ''
      readonly treeId: ObjectId
      readonly isNew: boolean
    }
  /** Says what is there already, removes what is too much, makes directories and everything that has no content. */
  | (NodesRef & { readonly kind: 'prepare'; readonly isNew: boolean; readonly keepsOthers: boolean })
  /** Writes whole files. `isNew`: nothing of their names is there. */
  | (Omit<NodesRef, 'nodes'> & {
      readonly kind: 'files'
      readonly files: readonly FileRef[]
      readonly ranges: readonly PackRange[]
      readonly isNew: boolean
    })
  /** Begins a file that is too large for one job, continues it, ends it. */
  | { readonly kind: 'begin'; readonly path: ByteString | ''; readonly sizeBytes: number }
  | {
      readonly kind: 'pieces'
      readonly path: ByteString | ''
      readonly temporary: ByteString
      readonly ids: readonly ObjectId[]
      readonly offsets: readonly number[]
      readonly pieces: readonly PieceRef[]
      readonly ranges: readonly PackRange[]
    }
  | (NodesRef & { readonly kind: 'end'; readonly temporary: ByteString })
  | { readonly kind: 'drop'; readonly path: ByteString | ''; readonly temporary: ByteString }
  /** Gives inodes that are there further names: pairs of paths. */
  | { readonly kind: 'links'; readonly pairs: readonly (readonly [from: ByteString, to: ByteString])[] }
  /** Sets what directories have, when everything in them is done: deepest first. */
  | {
      readonly kind: 'finish'
      readonly directories: readonly { readonly path: ByteString | ''; readonly node: TreeNode }[]
    }

/** Something that could not be restored. */
export interface RestoreProblem {
  /** Beneath the target. */
  readonly path: ByteString
  readonly code: string
  readonly message: string
}

/** What happens to a name. */
export type RestoreAction = 'create' | 'replace' | 'metadata' | 'remove'

/** What one job did. */
export interface RestoreResult {
  /** `prepare`: which nodes still need their content. */
  readonly wanted: readonly number[]
  /** `prepare`: the directories among the nodes that are new. */
  readonly newDirectories: readonly number[]
  /** `directory`: nodes with several names, and files that are too large. */
  readonly left: readonly number[]
  /** `directory`: what is to be restored next, unless there is a problem with it. */
  readonly subdirectories: readonly { readonly node: TreeNode; readonly isNew: boolean }[]
  /** `directory`: how many of its nodes are files; absent when its tree could not be read. */
  readonly files: number | undefined
  /** `begin`: the name of the file until it is whole. */
  readonly temporary: ByteString | undefined
  readonly counts: Readonly<Record<RestoreAction, number>>
  /** What happened, or would happen; empty unless `tellsActions`. */
  readonly actions: readonly (readonly [action: RestoreAction, path: ByteString])[]
  readonly problems: readonly RestoreProblem[]
  readonly writtenBytes: number
}

/** Something of another kind stands where a directory is to be, or a directory where something else is. */
export class TargetInTheWayError extends LsyncError {
  constructor(path: ByteString) {
    super('TARGET_IN_THE_WAY', 'a directory stands where something else is to be restored', {
      path,
      hint: 'allow it with --delete',
    })
  }
}

const TEMPORARY = /^\.lsync-restore-[0-9a-f]{16}$/
const SPARSE_BLOCK_BYTES = 4096
const SPARSE_FROM_BYTES = 64 * 1024
const NO_BYTES = Buffer.alloc(SPARSE_BLOCK_BYTES)
const HELD_TREES = 4

/** Restores with synchronous calls beneath one directory. Nothing outside of it is reached: no symlink is followed. */
export class Restorer implements Doer<RestoreJob, RestoreResult> {
  readonly #init: RestoreInit
  readonly #engine: Engine
  readonly #uid = process.geteuid?.() ?? 0
  readonly #gid = process.getegid?.() ?? 0
  readonly #trees = new Map<string, readonly TreeNode[]>()
  readonly #digest = allocate(32)
  readonly #table: ObjectTable | undefined
  readonly #packs: PackReader | undefined
  #sealed: Memory = allocate(64 * 1024)
  #plain: Memory = allocate(64 * 1024)
  #content: Memory = allocate(64 * 1024)
  #existing: Memory = allocate(64 * 1024)
  #wanted: number[] = []
  #newDirectories: number[] = []
  #left: number[] = []
  #subdirectories: { node: TreeNode; isNew: boolean }[] = []
  #files: number | undefined
  #counts: Record<RestoreAction, number> = { create: 0, replace: 0, metadata: 0, remove: 0 }
  #actions: [RestoreAction, ByteString][] = []
  #problems: RestoreProblem[] = []
  #writtenBytes = 0

  constructor(init: RestoreInit) {
    this.#init = init
    const { encrypt, macK, macR } = init.key
    this.#engine = createEngine({ encrypt: Buffer.from(encrypt), macK: Buffer.from(macK), macR: Buffer.from(macR) })
    if (init.repository === undefined) return
    const { directory, segments, packs } = init.repository
    this.#table = new ObjectTable(segments, packs)
    this.#packs = new PackReader(directory)
  }

  close(): void {
    this.#packs?.close()
    this.#engine.close()
  }

  run(job: RestoreJob): RestoreResult {
    const temporary = this.#do(job)
    const result = {
      wanted: this.#wanted,
      newDirectories: this.#newDirectories,
      left: this.#left,
      subdirectories: this.#subdirectories,
      files: this.#files,
      temporary,
      counts: this.#counts,
      actions: this.#actions,
      problems: this.#problems,
      writtenBytes: this.#writtenBytes,
    }
    this.#wanted = []
    this.#newDirectories = []
    this.#left = []
    this.#subdirectories = []
    this.#files = undefined
    this.#counts = { create: 0, replace: 0, metadata: 0, remove: 0 }
    this.#actions = []
    this.#problems = []
    this.#writtenBytes = 0
    return result
  }

  #do(job: RestoreJob): ByteString | undefined {
    switch (job.kind) {
      case 'directory':
        this.#try(job.path, () => this.#restoreDirectory(job))
        return undefined
      case 'prepare':
        if (this.#init.isDryRun && job.isNew) this.#prepareNothing(job)
        else this.#in(job.path, (directory) => this.#prepare(job, directory))
        return undefined
      case 'files':
        this.#in(job.path, (directory) => this.#writeFiles(job, directory))
        return undefined
      case 'begin':
        return this.#in(job.path, (directory) => this.#begin(directory, job.sizeBytes))
      case 'pieces':
        this.#in(job.path, (directory) => this.#writePieces(job, directory))
        return undefined
      case 'end':
        this.#in(job.path, (directory) => this.#end(job, directory))
        return undefined
      case 'drop':
        this.#in(job.path, (directory) => unlink(directory, job.temporary))
        return undefined
      case 'links':
        for (const [from, to] of job.pairs) this.#try(to, () => this.#link(from, to))
        return undefined
      case 'finish':
        for (const { path, node } of job.directories) this.#try(path, () => this.#finish(path, node))
        return undefined
    }
  }

  #tell(action: RestoreAction, path: ByteString): void {
    this.#counts[action]++
    if (this.#init.tellsActions) this.#actions.push([action, path])
  }

  #in<T>(path: ByteString | '', use: (directory: number) => T): T {
    return withFd(openBeneath(this.#init.targetFd, path, O_RDONLY | O_DIRECTORY), use)
  }

  /** One name that fails is a problem; the others go on. */
  #try(path: ByteString | '', work: () => void): void {
    try {
      work()
    } catch (error) {
      if (!(error instanceof LsyncError)) throw error
      this.#problems.push({ path: path as ByteString, code: error.code, message: error.message })
    }
  }

  #nodesOf({ treeId, tree }: Pick<NodesRef, 'treeId' | 'tree'>): readonly TreeNode[] {
    // Jobs of one directory follow each other: its tree is read once.
    const held = this.#trees.get(treeId)
    if (held !== undefined) return held
    const nodes = decodeTree(Buffer.from(tree.buffer, tree.byteOffset, tree.byteLength))
    if (this.#trees.size >= HELD_TREES) this.#trees.clear()
    this.#trees.set(treeId, nodes)
    return nodes
  }

  #restoreDirectory(job: Extract<RestoreJob, { kind: 'directory' }>): void {
    const [tree] = this.#readSealed([this.#locate('tree', job.treeId)])
    const length = this.#assemble([tree as Piece])
    const nodes = decodeTree(this.#content.buffer.subarray(0, length))
    this.#files = nodes.reduce((count, { type }) => count + (type === 'file' ? 1 : 0), 0)
    const positions: number[] = []
    for (const [position, { type, links }] of nodes.entries()) {
      // Which of the names of an inode comes first is not for one thread to say.
      if (links > 1 && type !== 'dir') this.#left.push(position)
      else positions.push(position)
    }
    this.#in(job.path, (directory) => {
      this.#prepareNodes(job, nodes, positions, false, directory)
      const created = new Set(this.#newDirectories)
      this.#subdirectories = positions.flatMap((position) => {
        const node = nodes[position] as TreeNode
        return node.type === 'dir' ? [{ node, isNew: created.has(position) }] : []
      })
      this.#restoreFiles(job, nodes, directory)
    })
    this.#wanted = []
    this.#newDirectories = []
  }

  /** Reads and writes the content of what is wanted, as many files at a time as fit into a batch. */
  #restoreFiles(job: Extract<RestoreJob, { kind: 'directory' }>, nodes: readonly TreeNode[], directory: number): void {
    let files: { node: TreeNode; path: ByteString; count: number }[] = []
    let locations: Location[] = []
    let batchBytes = 0
    const flush = () => {
      const pieces = this.#readSealed(locations)
      let at = 0
      for (const { node, path, count } of files) {
        const own = pieces.slice(at, at + count)
        at += count
        this.#try(path, () => this.#restoreFile(directory, path, node, own, job.isNew))
      }
      files = []
      locations = []
      batchBytes = 0
    }
    for (const position of this.#wanted) {
      const node = nodes[position] as TreeNode
      const path = joined(job.path, node.name)
      this.#try(path, () => {
        const own = (node.content ?? []).map((id) => this.#locate('data', id))
        if (own.length > 1 && own.reduce((sum, location) => sum + plainLength(location), 0) > LARGE_BYTES) {
          this.#left.push(position)
          return
        }
        const sealedBytes = own.reduce((sum, { length }) => sum + length, 0)
        if (batchBytes > 0 && batchBytes + sealedBytes > BATCH_BYTES) flush()
        files.push({ node, path, count: own.length })
        for (const location of own) locations.push(location)
        batchBytes += sealedBytes
      })
    }
    flush()
  }

  #locate(kind: ObjectKind, id: ObjectId): Location {
    const location = this.#table?.locate(kind, id)
    if (location === undefined) throw new ObjectMissingError(kind, id)
    return location
  }

  /** Reads the sealed bytes of objects, neighbours together. What cannot be read fails where it is used. */
  #readSealed(locations: readonly Location[]): Piece[] {
    const { spans, refs } = gather(locations)
    this.#sealed = roomIn(
      this.#sealed,
      spans.reduce((sum, { length }) => sum + length, 0),
      0,
    )
    let base = 0
    const ranges = spans.map(({ packId, offset, length }): OpenRange => {
      const range = { packId, offset, memory: this.#sealed, base, length, failure: undefined }
      base += length
      try {
        return { ...range, length: (this.#packs as PackReader).read(packId, offset, length, this.#sealed, range.base) }
      } catch (error) {
        return { ...range, failure: error }
      }
    })
    return locations.map((location, i) => {
      const ref = refs[i] as PieceRef
      return { ...ref, kind: location.kind, id: location.id, in: ranges[ref.range] as OpenRange }
    })
  }

  #prepareNothing(job: Extract<RestoreJob, { kind: 'prepare' }>): void {
    const nodes = this.#nodesOf(job)
    for (const position of job.nodes) {
      const node = nodes[position] as TreeNode
      this.#tell('create', joined(job.path, node.name))
      if (node.type === 'dir') this.#newDirectories.push(position)
    }
  }

  #prepare(job: Extract<RestoreJob, { kind: 'prepare' }>, directory: number): void {
    this.#prepareNodes(job, this.#nodesOf(job), job.nodes, job.keepsOthers, directory)
  }

  #prepareNodes(
    { path: parent, isNew }: { readonly path: ByteString | ''; readonly isNew: boolean },
    nodes: readonly TreeNode[],
    positions: readonly number[],
    keepsOthers: boolean,
    directory: number,
  ): void {
    if (!isNew) this.#removeOthers(parent, keepsOthers, directory, new Set(nodes.map(({ name }) => name)))
    for (const position of positions) {
      const node = nodes[position] as TreeNode
      const path = joined(parent, node.name)
      this.#try(path, () => {
        const existing = isNew ? undefined : tryStatAt(directory, node.name)
        if (node.type === 'dir') this.#prepareDirectory(directory, path, node, position, existing)
        else if (node.type === 'file') this.#prepareFile(directory, path, node, position, existing)
        else this.#makeSpecial(directory, path, node, existing)
      })
    }
  }

  #removeOthers(path: ByteString | '', keepsOthers: boolean, directory: number, names: ReadonlySet<ByteString>): void {
    const others: ByteString[] = []
    readDirents(directory, (name) => {
      // What an interrupted run left behind goes in any case.
      if (!names.has(name) && (TEMPORARY.test(name) || (this.#init.deletes && !keepsOthers))) others.push(name)
    })
    for (const name of others.sort()) {
      if (!TEMPORARY.test(name)) this.#tell('remove', joined(path, name))
      if (!this.#init.isDryRun) this.#try(joined(path, name), () => removeTree(directory, name))
    }
  }

  #prepareDirectory(
    directory: number,
    path: ByteString,
    { name }: TreeNode,
    position: number,
    existing: Stat | undefined,
  ): void {
    if (existing?.isDirectory === true) return
    this.#newDirectories.push(position)
    this.#tell(existing === undefined ? 'create' : 'replace', path)
    if (this.#init.isDryRun) return
    if (existing !== undefined) unlink(directory, name)
    // Until it is finished, nobody else enters.
    makeDirectory(directory, name, 0o700)
    dropDefaultAcl(directory, name)
  }

  #prepareFile(
    directory: number,
    path: ByteString,
    node: TreeNode,
    position: number,
    existing: Stat | undefined,
  ): void {
    const isSame =
      existing?.isFile === true &&
      existing.sizeBytes === node.sizeBytes &&
      existing.mtimeNs === timeOf(node.mtime) &&
      (this.#init.trustsTimes || this.#init.isDryRun)
    if (!isSame) {
      this.#wanted.push(position)
      if (this.#init.isDryRun) this.#tell(existing === undefined ? 'create' : 'replace', path)
      return
    }
    if (this.#init.isDryRun) return
    withFd(openat(directory, node.name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK), (fd) => {
      if (this.#setFileMeta(fd, node, false)) this.#tell('metadata', path)
    })
  }

  #makeSpecial(directory: number, path: ByteString, node: TreeNode, existing: Stat | undefined): void {
    const { name, type, mode, device, linkTarget } = node
    if (existing !== undefined && isSameSpecial(directory, node, existing)) {
      if (!this.#init.isDryRun) this.#setMetaAt(directory, node)
      return
    }
    this.#tell(existing === undefined ? 'create' : 'replace', path)
    if (this.#init.isDryRun) return
    if (existing !== undefined) this.#makeRoom(directory, path, name, existing)
    if (type === 'symlink') makeSymlink(linkTarget, directory, name)
    // A socket of nobody; whoever binds to it replaces it.
    else makeNode(directory, name, (mode & S_IFMT) | 0o600, (mode & S_IFMT) === S_IFSOCK ? 0 : device)
    this.#setMetaAt(directory, node)
  }

  #makeRoom(directory: number, path: ByteString, name: ByteString, existing: Stat): void {
    if (existing.isDirectory && !this.#init.deletes) throw new TargetInTheWayError(path)
    removeTree(directory, name)
  }

  #writeFiles(job: Extract<RestoreJob, { kind: 'files' }>, directory: number): void {
    const nodes = this.#nodesOf(job)
    const ranges = job.ranges.map(openRange)
    for (const { node: position, pieces } of job.files) {
      const node = nodes[position] as TreeNode
      const path = joined(job.path, node.name)
      const own = pieces.map((ref, i) => pieceOf(ref, node.content?.[i] as ObjectId, ranges))
      this.#try(path, () => this.#restoreFile(directory, path, node, own, job.isNew))
    }
  }

  #restoreFile(
    directory: number,
    path: ByteString,
    node: TreeNode,
    pieces: readonly Piece[],
    isNewDirectory: boolean,
  ): void {
    const sizeBytes = this.#assemble(pieces)
    const existing = isNewDirectory ? undefined : tryStatAt(directory, node.name)
    if (existing?.isFile === true && this.#isContent(directory, node.name, existing, sizeBytes)) {
      withFd(openat(directory, node.name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK), (fd) => {
        if (this.#setFileMeta(fd, node, false)) this.#tell('metadata', path)
      })
      return
    }
    this.#tell(existing === undefined ? 'create' : 'replace', path)
    this.#writeFile(directory, path, node, sizeBytes, existing, isNewDirectory)
  }

  /** Puts the pieces of a file together in `#content`. Returns its size in bytes. */
  #assemble(pieces: readonly Piece[]): number {
    let size = 0
    for (const piece of pieces) {
      const length = plainLength(piece)
      this.#content = roomIn(this.#content, size + length, size)
      this.#openPiece(piece, this.#content, size)
      size += length
    }
    return size
  }

  /** Opens, decompresses and checks one object. Only what is what its id says gets any further. */
  #openPiece(piece: Piece, to: Memory, toAt: number): void {
    const { id, length, uncompressedLength, in: range } = piece
    const damaged = (why: string) => {
      const { kind } = piece
      const { packId, offset } = range
      return new ObjectDamagedError({ kind, id, packId, offset: offset + piece.at, length, uncompressedLength }, why)
    }
    if (range.failure !== undefined) throw range.failure
    if (piece.at + length > range.length) throw damaged('its pack is too short')
    const at = range.base + piece.at
    const frameLength = length - SEAL_BYTES
    if (uncompressedLength === undefined) {
      if (!this.#engine.open(range.memory, at, length, to, toAt)) throw damaged('its MAC is wrong')
    } else {
      this.#plain = roomIn(this.#plain, frameLength, 0)
      if (!this.#engine.open(range.memory, at, length, this.#plain, 0)) throw damaged('its MAC is wrong')
      const size = this.#engine.decompress(this.#plain, 0, frameLength, to, toAt, uncompressedLength)
      if (size !== uncompressedLength) throw damaged('it does not decompress to its length')
    }
    this.#engine.hash(to, toAt, plainLength(piece), this.#digest, 0)
    if (this.#digest.buffer.toString('hex') !== id) throw damaged('its content is not what its id says')
  }

  #isContent(directory: number, name: ByteString, existing: Stat, sizeBytes: number): boolean {
    if (existing.sizeBytes !== sizeBytes) return false
    this.#existing = roomIn(this.#existing, sizeBytes, 0)
    const read = withFd(openat(directory, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK), (fd) =>
      readInto(fd, 0, this.#existing, 0, sizeBytes),
    )
    return read === sizeBytes && this.#existing.buffer.compare(this.#content.buffer, 0, sizeBytes, 0, sizeBytes) === 0
  }

  #writeFile(
    directory: number,
    path: ByteString,
    node: TreeNode,
    sizeBytes: number,
    existing: Stat | undefined,
    isNewDirectory: boolean,
  ): void {
    // A name that is free is written at once. What stands there is replaced by one rename, and never written to: the
    // inode may have other names.
    const temporary = existing === undefined ? node.name : temporaryName()
    // One of another owner is nobody's to read before it is theirs.
    const isOwn = node.uid === this.#uid && node.gid === this.#gid
    const mode = isOwn ? node.mode & 0o777 : 0o600
    const fd = openat(directory, temporary, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, mode)
    let isDone = false
    try {
      this.#writeContent(fd, 0, this.#content, 0, sizeBytes)
      if (sizeBytes >= SPARSE_FROM_BYTES) truncate(fd, sizeBytes, path)
      this.#setFileMeta(fd, node, isNewDirectory)
      if (existing !== undefined) this.#takePlace(directory, path, temporary, node.name, existing)
      isDone = true
    } finally {
      close(fd)
      if (!isDone) tryUnlink(directory, temporary)
    }
  }

  #takePlace(directory: number, path: ByteString, temporary: ByteString, name: ByteString, existing: Stat): void {
    if (existing.isDirectory) this.#makeRoom(directory, path, name, existing)
    rename(directory, temporary, directory, name)
  }

  /** Writes what is not zero; in files worth it, blocks of zeros stay holes. */
  #writeContent(fd: number, offset: number, from: Memory, at: number, length: number): void {
    this.#writtenBytes += length
    if (length < SPARSE_FROM_BYTES) {
      if (length > 0) writeFrom(fd, offset, from, at, length)
      return
    }
    let start = 0
    const flush = (end: number) => {
      if (end > start) writeFrom(fd, offset + start, from, at + start, end - start)
    }
    // Blocks as the file has them, wherever the piece begins and ends.
    for (let place = 0; place < length; ) {
      const end = Math.min(length, place + SPARSE_BLOCK_BYTES - ((offset + place) % SPARSE_BLOCK_BYTES))
      if (isZero(from.buffer, at + place, at + end)) {
        flush(place)
        start = end
      }
      place = end
    }
    flush(length)
  }

  #begin(directory: number, sizeBytes: number): ByteString {
    const name = temporaryName()
    withFd(openat(directory, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0o600), (fd) =>
      truncate(fd, sizeBytes, name),
    )
    return name
  }

  #writePieces(job: Extract<RestoreJob, { kind: 'pieces' }>, directory: number): void {
    const ranges = job.ranges.map(openRange)
    withFd(openat(directory, job.temporary, O_RDWR | O_NOFOLLOW), (fd) => {
      for (const [i, ref] of job.pieces.entries()) {
        const length = plainLength(ref)
        this.#content = roomIn(this.#content, length, 0)
        this.#openPiece(pieceOf(ref, job.ids[i] as ObjectId, ranges), this.#content, 0)
        this.#writeContent(fd, job.offsets[i] as number, this.#content, 0, length)
      }
    })
  }

  #end(job: Extract<RestoreJob, { kind: 'end' }>, directory: number): void {
    const node = this.#nodesOf(job)[job.nodes[0] as number] as TreeNode
    const path = joined(job.path, node.name)
    const existing = tryStatAt(directory, node.name)
    this.#tell(existing === undefined ? 'create' : 'replace', path)
    withFd(openat(directory, job.temporary, O_RDWR | O_NOFOLLOW), (fd) => this.#setFileMeta(fd, node, false))
    if (existing?.isDirectory === true) this.#makeRoom(directory, path, node.name, existing)
    rename(directory, job.temporary, directory, node.name)
  }

  #link(from: ByteString, to: ByteString): void {
    const [fromPath, fromName] = split(from)
    const [toPath, toName] = split(to)
    this.#in(fromPath, (fromDirectory) =>
      this.#in(toPath, (toDirectory) => {
        const source = tryStatAt(fromDirectory, fromName)
        if (source === undefined) throw new PosixError('ENOENT', { syscall: 'linkat', path: from })
        const existing = tryStatAt(toDirectory, toName)
        if (existing !== undefined && existing.ino === source.ino && existing.dev === source.dev) return
        this.#tell(existing === undefined ? 'create' : 'replace', to)
        if (existing !== undefined) this.#makeRoom(toDirectory, to, toName, existing)
        link(fromDirectory, fromName, toDirectory, toName)
      }),
    )
  }

  #finish(path: ByteString | '', node: TreeNode): void {
    this.#in(path, (fd) => this.#setFileMeta(fd, node, false))
  }

  /** Sets owner, attributes, mode and times of an open file or directory, as far as they differ. `isBare`: it has no attributes. */
  #setFileMeta(fd: number, node: TreeNode, isBare: boolean): boolean {
    const stat = statFd(fd)
    const mtimeNs = timeOf(node.mtime)
    let changed = false
    if (stat.uid !== node.uid || stat.gid !== node.gid) {
      setOwner(fd, '', node.uid, node.gid)
      changed = true
    }
    // After the owner, whose change takes capabilities away.
    if (setXattrs(fd, '', node, isBare)) changed = true
    // Always after an ACL, which sets some of these bits.
    if (changed || stat.permissions !== (node.mode & 0o7777)) {
      setModeFd(fd, node.mode & 0o7777)
      changed = true
    }
    if (changed || stat.mtimeNs !== mtimeNs) {
      setTimes(fd, '', node.atime === node.mtime ? mtimeNs : timeOf(node.atime), mtimeNs)
      changed = true
    }
    return changed
  }

  #setMetaAt(directory: number, node: TreeNode): void {
    const { name, mode, uid, gid } = node
    setOwner(directory, name, uid, gid)
    setXattrs(directory, name, node, false)
    if (node.type !== 'symlink') setModeAt(directory, name, mode)
    setTimes(directory, name, timeOf(node.atime), timeOf(node.mtime))
  }
}

/** Bytes of a pack in memory. */
interface OpenRange {
  readonly packId: ObjectId
  readonly offset: number
  readonly memory: Memory
  /** Where in the memory they begin, and how many there are. */
  readonly base: number
  readonly length: number
  /** Why they could not be read. */
  readonly failure: unknown
}

/** An object whose sealed bytes are in memory. */
interface Piece extends PieceRef {
  readonly kind: ObjectKind
  readonly id: ObjectId
  readonly in: OpenRange
}

function openRange({ packId, offset, content }: PackRange): OpenRange {
  return { packId, offset, memory: memoryOver(content), base: 0, length: content.byteLength, failure: undefined }
}

function pieceOf(ref: PieceRef, id: ObjectId, ranges: readonly OpenRange[]): Piece {
  return { ...ref, kind: 'data', id, in: ranges[ref.range] as OpenRange }
}

/** In which ranges of packs objects are read, neighbours together, and where in them each of them lies. */
export function gather(locations: readonly Location[]): {
  readonly spans: readonly { readonly packId: ObjectId; readonly offset: number; readonly length: number }[]
  readonly refs: readonly PieceRef[]
} {
  const order = locations.map((_, i) => i)
  const at = (i: number) => locations[i] as Location
  order.sort((left, right) =>
    at(left).packId === at(right).packId
      ? at(left).offset - at(right).offset
      : at(left).packId < at(right).packId
        ? -1
        : 1,
  )
  const spans: { packId: ObjectId; offset: number; length: number }[] = []
  const refs: PieceRef[] = new Array(locations.length)
  for (const i of order) {
    const { packId, offset, length, uncompressedLength } = at(i)
    let span = spans.at(-1)
    if (span === undefined || span.packId !== packId || offset > span.offset + span.length + GAP_BYTES) {
      span = { packId, offset, length: 0 }
      spans.push(span)
    }
    span.length = Math.max(span.length, offset + length - span.offset)
    refs[i] = { range: spans.length - 1, at: offset - span.offset, length, uncompressedLength }
  }
  return { spans, refs }
}

/** Whether a part of a buffer, of at most one block, is zero. */
function isZero(buffer: Buffer, start: number, end: number): boolean {
  return buffer[start] === 0 && buffer.compare(NO_BYTES, 0, end - start, start, end) === 0
}

/** The size of an object's content. */
export function plainLength({ length, uncompressedLength }: Pick<PieceRef, 'length' | 'uncompressedLength'>): number {
  return uncompressedLength ?? length - SEAL_BYTES
}

/** So that nothing in a new directory gets attributes that the snapshot does not have; its own come when it is finished. */
export function dropDefaultAcl(fd: number, name: ByteString | ''): void {
  removeXattr(fd, name, 'system.posix_acl_default' as ByteString)
}

/** Makes an inode's attributes those of the node. Whether anything had to be changed. */
function setXattrs(fd: number, name: ByteString | '', node: TreeNode, isBare: boolean): boolean {
  if (isBare && node.xattrs.length === 0) return false
  const wanted = new Map(node.xattrs)
  let changed = false
  for (const attribute of listXattrs(fd, name)) {
    // Labels are the system's own affair where the snapshot has none.
    if (wanted.has(attribute) || attribute === 'security.selinux') continue
    removeXattr(fd, name, attribute)
    changed = true
  }
  for (const [attribute, value] of wanted) {
    if (getXattr(fd, name, attribute)?.equals(value) === true) continue
    setXattr(fd, name, attribute, value)
    changed = true
  }
  return changed
}

function isSameSpecial(directory: number, node: TreeNode, existing: Stat): boolean {
  if (existing.type !== (node.mode & S_IFMT)) return false
  if (node.type === 'symlink') return readSymlink(directory, node.name) === node.linkTarget
  return existing.rdev === node.device
}

function roomIn(memory: Memory, length: number, used: number): Memory {
  if (memory.buffer.length >= length) return memory
  const larger = allocate(Math.max(length, memory.buffer.length * 2))
  memory.buffer.copy(larger.buffer, 0, 0, used)
  return larger
}

function temporaryName(): ByteString {
  return `.lsync-restore-${randomBytes(8).toString('hex')}` as ByteString
}

/** Removes a name and everything beneath it, through no symlink and into no other mount. */
function removeTree(directory: number, name: ByteString): void {
  const failure = tryUnlink(directory, name)
  if (failure === undefined || failure === 'ENOENT') return
  if (failure !== 'EISDIR' && failure !== 'EPERM') throw new PosixError(failure, { syscall: 'unlinkat', path: name })
  withFd(openBeneath(directory, name, O_RDONLY | O_DIRECTORY), (fd) => {
    const names: ByteString[] = []
    readDirents(fd, (child) => names.push(child))
    for (const child of names) removeTree(fd, child)
  })
  removeDirectory(directory, name)
}

export function joined(path: ByteString | '', name: ByteString): ByteString {
  return (path === '' ? name : `${path}/${name}`) as ByteString
}

function split(path: ByteString): readonly [ByteString | '', ByteString] {
  const cut = path.lastIndexOf('/')
  return [path.slice(0, Math.max(0, cut)) as ByteString, path.slice(cut + 1) as ByteString]
}

/** Errnos that say nothing about one file, but that nothing more can be done. */
export function isFatal(code: string): boolean {
  return code === 'ENOSPC' || code === 'EDQUOT' || code === 'EROFS' || code === 'EIO'
}
