import {
  allocate,
  type ByteString,
  errnoOf,
  type Ino,
  LsyncError,
  type Memory,
  makeDevice,
  printable,
  readInto,
  S_IFBLK,
  S_IFCHR,
  S_IFDIR,
  S_IFLNK,
  S_IFMT,
  S_IFREG,
  Stat,
  statFd,
} from '@lsync/posix'
import { Chunker, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES } from './chunk/chunker.ts'
import { parsePolynomial } from './chunk/polynomial.ts'
import { type CipherKey, createEngine, type Engine } from './crypto/engine.ts'
import type { Accounts } from './model/accounts.ts'
import { isMatched, type Pattern } from './model/exclude.ts'
import { formatParts, formatTime } from './model/go-text.ts'
import { nodeTypeOf } from './model/mode.ts'
import {
  decodeTree,
  encodeNode,
  isUnchanged,
  type ObjectId,
  type TreeNode,
  treeText,
  type Xattr,
} from './model/tree.ts'
import { ObjectTable, type TableSegment } from './object-table.ts'
import { type ObjectKind, PACK_BYTES, type Pack, type PackedObject, PackWriter } from './pack.ts'
import { readXattrs } from './source/directory.ts'
import {
  type EntryState,
  openSource,
  type Source,
  type SourceDirectory,
  type SourceFile,
  type SourceInit,
  type SourceName,
} from './source/source.ts'

/** Everything that a thread needs to save directories, in a form that travels. */
export interface SaveInit {
  readonly sources: readonly SourceInit[]
  readonly key: CipherKey
  readonly compresses: boolean
  readonly polynomial: string
  readonly segments: readonly TableSegment[]
  readonly accounts: Accounts
  readonly excludes: readonly Pattern[]
  /** Read every file, whatever its times say. */
  readonly force: boolean
}

/** One directory to save, or some names of one. */
export interface SaveTask {
  readonly id: number
  /** Index into `SaveInit.sources`. */
  readonly source: number
  /** Beneath the source's root, `''` for the root. */
  readonly path: ByteString | ''
  /** Absolute, as the snapshot shows it: for patterns and messages. */
  readonly shownPath: ByteString
  /** Only these; absent: all that the directory has. */
  readonly names?: readonly SourceName[]
  /** The root of a source has no directory that could hold its node: under this name it is given back. */
  readonly rootName?: ByteString
  /** The content of the tree that the parent snapshot has here. */
  readonly older?: Uint8Array
  /** With `older`: only these names are looked at, whether they are there or not; the others are as they were. */
  readonly looked?: readonly ByteString[]
}

/** A large file as it was when its saving began. */
export interface LargeFile {
  /** Index into `SaveInit.sources`. */
  readonly source: number
  /** Of its directory, beneath the source's root. */
  readonly path: ByteString | ''
  readonly name: ByteString
  readonly ino: Ino
  readonly ctimeNs: bigint
  readonly sizeBytes: number
}

/** Some of a large file, to be cut, or with `lengths` to be stored: the chunks into which it has been cut. */
export interface PartTask {
  readonly id: number
  readonly file: LargeFile
  readonly offset: number
  readonly lengths?: readonly number[]
}

/** What became of some of a large file. */
export interface SavedPart {
  readonly id: number
  /** The chunks that it is cut into; the last ones of the file, or as many as one task is worth. */
  readonly lengths: readonly number[]
  /** The chunks that were stored. */
  readonly content: readonly ObjectId[]
  readonly storedBytes: number
  /** Whether the file is what it was when its saving began. */
  readonly isStill: boolean
  /** Why it could not be read. */
  readonly failure: { readonly code: string; readonly message: string } | undefined
}

/** A directory in a directory, whose tree is not known yet. */
export interface Subdirectory {
  readonly name: ByteString
  /** Where its node stands in the list. */
  readonly index: number
  /** The tree that the parent snapshot has of it. */
  readonly olderTree: ObjectId | undefined
}

/** Something that could not be saved, or not be saved for certain. */
export interface SaveProblem {
  /** Absolute, as the snapshot would show it. */
  readonly path: ByteString
  readonly code: string
  readonly message: string
}

/** How much was seen and stored. */
export interface SaveCounts {
  filesNew: number
  filesChanged: number
  filesUnmodified: number
  directories: number
  others: number
  /** Content that was read. */
  readBytes: number
  /** All files' sizes. */
  totalBytes: number
  /** Objects that were stored, and what they take. */
  objectsAdded: number
  addedBytes: number
}

/** A file that is to be saved in parts. */
export interface LargeName {
  readonly name: ByteString
  /** Where its node belongs in the list, which has an empty one there. */
  readonly index: number
  readonly isNew: boolean
}

/** What became of one task. */
export interface SavedDirectory {
  readonly id: number
  /** Nodes in order of their names; those of subdirectories lack their tree and the closing brace. */
  readonly nodes: readonly string[]
  readonly subdirectories: readonly Subdirectory[]
  readonly large: readonly LargeName[]
  /** The tree, where nothing is missing from it. */
  readonly tree: ObjectId | undefined
  /** The node of a source's root, without its tree and closing brace. */
  readonly rootNode: string | undefined
  /** Slices of a directory that is too large for one task: these are to be saved instead. */
  readonly slices: readonly (readonly SourceName[])[]
  /** Whether it could not be read at all. */
  readonly isLost: boolean
}

/** What a thread gives back for a list of tasks. */
export interface SaveResult {
  readonly directories: readonly SavedDirectory[]
  readonly parts: readonly SavedPart[]
  readonly packs: readonly Pack[]
  readonly problems: readonly SaveProblem[]
  /** Absolute paths where something else is mounted. */
  readonly skipped: readonly ByteString[]
  readonly counts: SaveCounts
}

/** Objects that wait for a pack to fill, sealed. */
export interface SealedRest {
  readonly kind: ObjectKind
  readonly content: Uint8Array
  readonly objects: readonly PackedObject[]
}

const READ_BYTES = 2 * MAX_CHUNK_BYTES
/** How often a file is read that changes meanwhile. */
export const ATTEMPTS = 3
/** Files of so much are cut by one thread at a time, and their chunks stored by all. */
const LARGE_FILE_BYTES = 64 * 1024 * 1024
/** So much of a large file is cut by one task: a tenth of a second's work. */
const CUT_BYTES = 64 * 1024 * 1024
const LARGE = 'large'
/** What is left at the end and has so much is a pack of its own; what has less is put together with others'. */
const LARGE_REST_BYTES = PACK_BYTES / 4
const SLICE_NAMES = 1024
// Directories up to this many names are one task.
const WHOLE_NAMES = 2 * SLICE_NAMES

/** Saves directories with synchronous calls, in a worker thread or in the calling one. */
export class Saver {
  readonly #init: SaveInit
  readonly #sources: readonly Source[]
  readonly #engine: Engine
  readonly #table: ObjectTable
  readonly #writers: Readonly<Record<ObjectKind, PackWriter>>
  readonly #digest = allocate(32)
  readonly #digestWords = new Int32Array(this.#digest.buffer.buffer)
  readonly #links = new Map<string, { readonly ctimeNs: bigint; readonly content: readonly ObjectId[] }>()
  #small: Memory = allocate(64 * 1024)
  #treeMemory: Memory = allocate(64 * 1024)
  #chunker: Chunker | undefined
  #packs: Pack[] = []
  #problems: SaveProblem[] = []
  #skipped: ByteString[] = []
  #counts = emptyCounts()

  constructor(init: SaveInit) {
    this.#init = init
    this.#sources = init.sources.map(openSource)
    // Buffers arrive as plain arrays from another thread.
    const { encrypt, macK, macR } = init.key
    this.#engine = createEngine({ encrypt: Buffer.from(encrypt), macK: Buffer.from(macK), macR: Buffer.from(macR) })
    this.#table = new ObjectTable(init.segments)
    const options = { compresses: init.compresses }
    this.#writers = {
      data: new PackWriter('data', this.#engine, options),
      tree: new PackWriter('tree', this.#engine, options),
    }
  }

  /** A segment that the table got in another thread. */
  attach(segment: TableSegment): void {
    this.#table.attach(segment)
  }

  /** Memory of a pack that has been written, for the next one. */
  recycle(memory: ArrayBufferLike): void {
    this.#writers.data.recycle(memory)
  }

  /** Saves all of these. A directory that cannot be read at all is a problem, and its task gives no tree. */
  save(tasks: readonly (SaveTask | PartTask)[]): SaveResult {
    const directories: SavedDirectory[] = []
    const parts: SavedPart[] = []
    for (const task of tasks) {
      if ('file' in task) parts.push(this.#savePart(task))
      else directories.push(this.#saveTask(task))
    }
    const result = {
      directories,
      parts,
      packs: this.#packs,
      problems: this.#problems,
      skipped: this.#skipped,
      counts: this.#counts,
    }
    this.#packs = []
    this.#problems = []
    this.#skipped = []
    this.#counts = emptyCounts()
    return result
  }

  /** Stores content that is no directory's: a chunk at a place in memory. */
  storeChunk(memory: Memory, at: number, length: number): ObjectId {
    return this.#store('data', memory, at, length)
  }

  /** The packs that are full, and what was counted, since this was last asked for. */
  takeStored(): Pick<SaveResult, 'packs' | 'counts'> {
    const stored = { packs: this.#packs, counts: this.#counts }
    this.#packs = []
    this.#counts = emptyCounts()
    return stored
  }

  /** Stores a tree of which all nodes are known. */
  storeTree(nodes: readonly string[]): ObjectId {
    const text = treeText(nodes)
    // A unit of text is at most three bytes.
    if (this.#treeMemory.buffer.length < text.length * 3) this.#treeMemory = allocate(text.length * 3)
    return this.#store('tree', this.#treeMemory, 0, this.#treeMemory.buffer.write(text))
  }

  /** The node of an open directory, up to where its tree belongs. */
  describeDirectory(name: ByteString, fd: number): string {
    return openNode(this.#describe(name, statFd(fd), readXattrs(fd, '')))
  }

  /**
   * A large file as it is now, and its node without content; `undefined` when it is gone.
   * @throws {FileReplacedError} {PosixError}
   */
  beginLarge(
    source: number,
    path: ByteString | '',
    name: ByteString,
    shownPath: ByteString,
  ): { readonly file: LargeFile; readonly node: TreeNode } | undefined {
    return this.#withFile(source, path, name, (opened) => {
      const state = opened.state()
      if ((state.mode & S_IFMT) !== S_IFREG) throw new FileReplacedError(shownPath)
      const { ino, ctimeNs, sizeBytes } = state
      const node = this.#describe(name, state, opened.xattrs())
      return { file: { source, path, name, ino, ctimeNs, sizeBytes }, node }
    })
  }

  /** Ends the packs that are full enough to stay alone. */
  finishLarge(): Pack[] {
    return Object.values(this.#writers).flatMap((writer) =>
      writer.sizeBytes < LARGE_REST_BYTES ? [] : [writer.finish()],
    )
  }

  /** What does not fill a pack yet, taken out. */
  takeRest(): SealedRest[] {
    return Object.values(this.#writers).map((writer) => ({ kind: writer.kind, ...writer.takeSealed() }))
  }

  close(): void {
    this.#engine.close()
  }

  #saveTask(task: SaveTask): SavedDirectory {
    let directory: SourceDirectory
    try {
      directory = (this.#sources[task.source] as Source).openDirectory(task.path)
    } catch (error) {
      this.#problem(task.shownPath, error)
      return nothingOf(task.id)
    }
    try {
      return this.#saveDirectory(task, directory)
    } catch (error) {
      this.#problem(task.shownPath, error)
      return nothingOf(task.id)
    } finally {
      directory.close()
    }
  }

  #withFile<T>(source: number, path: ByteString | '', name: ByteString, use: (file: SourceFile) => T): T | undefined {
    const directory = (this.#sources[source] as Source).openDirectory(path)
    try {
      const file = openPresent(directory, name)
      if (file === undefined) return undefined
      try {
        return use(file)
      } finally {
        file.close()
      }
    } finally {
      directory.close()
    }
  }

  #savePart({ id, file, offset, lengths }: PartTask): SavedPart {
    const nothing = { id, lengths: [], content: [], storedBytes: 0, isStill: false, failure: undefined }
    try {
      const saved = this.#withFile(file.source, file.path, file.name, (opened): SavedPart => {
        const part =
          lengths === undefined
            ? { lengths: this.#cut(opened.fd, offset, file.sizeBytes) }
            : this.#storeChunks(opened.fd, offset, lengths)
        const { ino, ctimeNs } = opened.state()
        return { ...nothing, ...part, isStill: ino === file.ino && ctimeNs === file.ctimeNs }
      })
      return saved ?? nothing
    } catch (error) {
      if (!(error instanceof LsyncError)) throw error
      return { ...nothing, failure: { code: error.code, message: error.message } }
    }
  }

  /** Where a file is cut from `from` on, which is where a chunk begins: nothing before it matters. */
  #cut(fd: number, from: number, sizeBytes: number): number[] {
    const chunker = this.#ownChunker
    const { memory, start, end } = chunker
    const lengths: number[] = []
    let read = from
    let cut = 0
    let filled = start
    for (let isLast = false; !isLast && cut < CUT_BYTES; ) {
      const wanted = Math.min(end - filled, sizeBytes - read)
      const length = readInto(fd, read, memory, filled, wanted)
      read += length
      isLast = read === sizeBytes || length < wanted
      filled = chunker.takeChunks(filled + length, isLast, (_, chunkLength) => {
        lengths.push(chunkLength)
        cut += chunkLength
      })
    }
    return lengths
  }

  #storeChunks(
    fd: number,
    offset: number,
    lengths: readonly number[],
  ): { readonly content: ObjectId[]; readonly storedBytes: number } {
    const { memory, start } = this.#ownChunker
    const content: ObjectId[] = []
    let at = offset
    for (const wanted of lengths) {
      const length = readInto(fd, at, memory, start, wanted)
      if (length > 0) content.push(this.#store('data', memory, start, length))
      at += length
      this.#counts.readBytes += length
      // It became shorter, which its times tell, too.
      if (length < wanted) break
    }
    return { content, storedBytes: at - offset }
  }

  get #ownChunker(): Chunker {
    this.#chunker ??= new Chunker(parsePolynomial(this.#init.polynomial), READ_BYTES)
    return this.#chunker
  }

  #saveDirectory(task: SaveTask, directory: SourceDirectory): SavedDirectory {
    const older = task.older === undefined ? undefined : olderNodes(task.older)
    const looked = older === undefined || task.looked === undefined ? undefined : new Set(task.looked)
    const entries = (task.names ?? namesOf(directory, older, looked)).toSorted(byName)
    if (task.names === undefined && entries.length > WHOLE_NAMES && task.older === undefined) {
      const slices: SourceName[][] = []
      for (let at = 0; at < entries.length; at += SLICE_NAMES) slices.push(entries.slice(at, at + SLICE_NAMES))
      return { ...nothingOf(task.id), rootNode: this.#rootNodeOf(task, directory), slices, isLost: false }
    }
    const nodes: string[] = []
    const subdirectories: Subdirectory[] = []
    const large: LargeName[] = []
    for (const { name, isFile } of entries) {
      const shownPath = joinShown(task.shownPath, name)
      if (isMatched(this.#init.excludes, shownPath)) continue
      try {
        const before = older?.get(name)
        if (before !== undefined && looked?.has(name) === false) {
          nodes.push(encodeNode(before))
          continue
        }
        // A file that is new is opened at once, and asked what it is when it is open.
        const node =
          isFile && before === undefined
            ? this.#openedFileOf(directory, name, shownPath, undefined)
            : this.#nodeOf(directory, name, shownPath, before)
        if (node === undefined) continue
        if (node === LARGE) {
          large.push({ name, index: nodes.length, isNew: before === undefined })
          nodes.push('')
        } else if (node.type === 'dir' && node.subtree === undefined) {
          subdirectories.push({ name, index: nodes.length, olderTree: before?.subtree })
          nodes.push(openNode(node))
        } else nodes.push(encodeNode(node))
      } catch (error) {
        this.#problem(shownPath, error)
      }
    }
    const isWhole = subdirectories.length === 0 && large.length === 0 && task.names === undefined
    if (task.names === undefined) this.#counts.directories++
    return {
      id: task.id,
      nodes: isWhole ? [] : nodes,
      subdirectories,
      large,
      tree: isWhole ? this.storeTree(nodes) : undefined,
      rootNode: this.#rootNodeOf(task, directory),
      slices: [],
      isLost: false,
    }
  }

  #rootNodeOf({ rootName }: SaveTask, directory: SourceDirectory): string | undefined {
    if (rootName === undefined) return undefined
    return openNode(this.#describe(rootName, directory.state, directory.ownXattrs))
  }

  #nodeOf(
    directory: SourceDirectory,
    name: ByteString,
    shownPath: ByteString,
    older: TreeNode | undefined,
  ): TreeNode | typeof LARGE | undefined {
    const state = directory.stateOf(name)
    if (state === undefined) return undefined
    if (state.isMountRoot === true) {
      this.#skipped.push(shownPath)
      // A directory stays, so that there is something to mount on.
      if ((state.mode & S_IFMT) !== S_IFDIR) return undefined
      return { ...this.#describe(name, state, []), subtree: this.storeTree([]) }
    }
    if ((state.mode & S_IFMT) === S_IFREG) return this.#fileOf(directory, name, shownPath, state, older)
    const node = this.#describe(name, state, directory.xattrs(name))
    if (node.type === 'dir') return node
    this.#counts.others++
    return node.type === 'symlink' ? { ...node, linkTarget: directory.readLink(name) } : node
  }

  /** `sizeBytes`: of a file, what was read of it. */
  #describe(
    name: ByteString,
    state: EntryState,
    xattrs: readonly Xattr[],
    content?: readonly ObjectId[],
    sizeBytes = state.sizeBytes,
  ): TreeNode {
    const { mode, nlink, uid, gid, ino, dev, rdev } = state
    const [mtime, ctime] = timesOf(state)
    const format = mode & S_IFMT
    const isDevice = format === S_IFCHR || format === S_IFBLK
    const { users, groups } = this.#init.accounts
    return {
      name,
      type: nodeTypeOf(mode),
      mode,
      mtime,
      // As restic without --with-atime: reading would change the tree.
      atime: mtime,
      ctime,
      uid,
      gid,
      user: users.get(uid) ?? '',
      group: groups.get(gid) ?? '',
      inode: ino,
      deviceId: makeDevice(Math.floor(dev / 0x1_0000_0000), dev % 0x1_0000_0000),
      sizeBytes: format === S_IFREG ? sizeBytes : 0,
      // Of fifos and sockets restic tells none; where there are several, they are one inode all the same.
      links: format === S_IFREG || format === S_IFLNK || isDevice || (format !== S_IFDIR && nlink > 1) ? nlink : 0,
      linkTarget: '' as ByteString,
      xattrs,
      device: isDevice ? rdev : 0,
      content: format === S_IFREG ? (content ?? []) : undefined,
      subtree: undefined,
    }
  }

  #fileOf(
    directory: SourceDirectory,
    name: ByteString,
    shownPath: ByteString,
    state: EntryState,
    older: TreeNode | undefined,
  ): TreeNode | typeof LARGE | undefined {
    if (older !== undefined && !this.#init.force) {
      const node = this.#describe(name, state, older.xattrs, older.content)
      if (isUnchanged(node, older) && older.content?.every((id) => this.#table.has('data', id)) === true) {
        this.#counts.filesUnmodified++
        this.#counts.totalBytes += state.sizeBytes
        return node
      }
    }
    return this.#openedFileOf(directory, name, shownPath, older)
  }

  #openedFileOf(
    directory: SourceDirectory,
    name: ByteString,
    shownPath: ByteString,
    older: TreeNode | undefined,
  ): TreeNode | typeof LARGE | undefined {
    const file = openPresent(directory, name)
    if (file === undefined) return undefined
    try {
      return this.#readFile(file, name, shownPath, older)
    } finally {
      file.close()
    }
  }

  #readFile(
    file: SourceFile,
    name: ByteString,
    shownPath: ByteString,
    older: TreeNode | undefined,
  ): TreeNode | typeof LARGE {
    for (let attempt = 1; ; attempt++) {
      const before = file.state()
      if ((before.mode & S_IFMT) !== S_IFREG) throw new FileReplacedError(shownPath)
      // Of one with several names the thread that read it knows the content.
      if (before.sizeBytes >= LARGE_FILE_BYTES && before.nlink < 2) return LARGE
      const xattrs = file.xattrs()
      const { content, sizeBytes } = this.#contentOf(file.fd, before)
      const after = file.state()
      const isStill = after.ctimeNs === before.ctimeNs && after.sizeBytes === sizeBytes
      if (!isStill && attempt < ATTEMPTS) continue
      if (!isStill) this.#problem(shownPath, new FileChangingError(shownPath))
      this.#counts[older === undefined ? 'filesNew' : 'filesChanged']++
      this.#counts.totalBytes += sizeBytes
      return this.#describe(name, before, xattrs, content, sizeBytes)
    }
  }

  #contentOf(fd: number, state: EntryState): { content: readonly ObjectId[]; sizeBytes: number } {
    if (state.nlink < 2) return this.#chunksOf(fd, state.sizeBytes)
    // Another name of a file that was read a moment ago.
    const key = `${state.dev}:${state.ino}`
    const known = this.#links.get(key)
    if (known !== undefined && known.ctimeNs === state.ctimeNs) {
      return { content: known.content, sizeBytes: state.sizeBytes }
    }
    const read = this.#chunksOf(fd, state.sizeBytes)
    if (read.sizeBytes === state.sizeBytes) this.#links.set(key, { ctimeNs: state.ctimeNs, content: read.content })
    return read
  }

  /** Reads exactly as much as the file had: one that grows is noticed by its ctime. */
  #chunksOf(fd: number, sizeBytes: number): { content: ObjectId[]; sizeBytes: number } {
    if (sizeBytes >= MIN_CHUNK_BYTES) return this.#cutChunks(fd, sizeBytes)
    if (sizeBytes === 0) return { content: [], sizeBytes: 0 }
    if (this.#small.buffer.length < sizeBytes) this.#small = allocate(MIN_CHUNK_BYTES)
    const length = readInto(fd, 0, this.#small, 0, sizeBytes)
    this.#counts.readBytes += length
    return { content: length === 0 ? [] : [this.#store('data', this.#small, 0, length)], sizeBytes: length }
  }

  #cutChunks(fd: number, sizeBytes: number): { content: ObjectId[]; sizeBytes: number } {
    const chunker = this.#ownChunker
    const { memory, start, end } = chunker
    const content: ObjectId[] = []
    const take = (at: number, length: number) => content.push(this.#store('data', memory, at, length))
    let read = 0
    let filled = start
    let isLast = false
    while (!isLast) {
      const wanted = Math.min(end - filled, sizeBytes - read)
      const length = readInto(fd, read, memory, filled, wanted)
      read += length
      filled += length
      isLast = read === sizeBytes || length < wanted
      filled = chunker.takeChunks(filled, isLast, take)
    }
    this.#counts.readBytes += read
    return { content, sizeBytes: read }
  }

  #store(kind: ObjectKind, memory: Memory, at: number, length: number): ObjectId {
    this.#engine.hash(memory, at, length, this.#digest, 0)
    const id = this.#digest.buffer.toString('hex')
    if (!this.#table.claimWords(kind, this.#digestWords)) return id
    const writer = this.#writers[kind]
    this.#counts.addedBytes += writer.addDigest(this.#digest.buffer, memory, at, length)
    this.#counts.objectsAdded++
    if (writer.isFull) this.#packs.push(writer.finish())
    return id
  }

  #problem(path: ByteString, error: unknown): void {
    // Whatever else goes wrong is a mistake of this program's, and no reason to leave a file out.
    if (!(error instanceof LsyncError) && errnoOf(error) === undefined) throw error
    const { code, message } = error as LsyncError
    this.#problems.push({ path, code, message })
  }
}

/** A file was written to during each of the attempts to read it. */
export class FileChangingError extends LsyncError {
  constructor(path: ByteString) {
    super(
      'FILE_CHANGING',
      `${printable(path)} changed while it was read, ${ATTEMPTS} times; what was read last is saved`,
      {
        path,
        hint: 'save it again when nobody writes to it',
      },
    )
  }
}

/** Something else stood under a file's name when it was opened. */
export class FileReplacedError extends LsyncError {
  constructor(path: ByteString) {
    super('FILE_REPLACED', `${printable(path)} became something else while it was saved`, { path, hint: 'save again' })
  }
}

/** Opens a file; `undefined` when it was removed meanwhile: then it is not in the snapshot. */
function openPresent(directory: SourceDirectory, name: ByteString): SourceFile | undefined {
  try {
    return directory.openFile(name)
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return undefined
    throw error
  }
}

/** Modification and change as a tree has them. */
function timesOf(state: EntryState): readonly [mtime: string, ctime: string] {
  if (state instanceof Stat) {
    const [second, ns] = state.mtimeParts
    const [changeSecond, changeNs] = state.ctimeParts
    if (isNear(second) && isNear(changeSecond)) {
      const mtime = formatParts(second, ns)
      return [mtime, second === changeSecond && ns === changeNs ? mtime : formatParts(changeSecond, changeNs)]
    }
  }
  const { mtimeNs, ctimeNs } = state
  const mtime = formatTime(mtimeNs)
  return [mtime, ctimeNs === mtimeNs ? mtime : formatTime(ctimeNs)]
}

/** Whether a second lies in the years that need no care: 1970 to 2242. */
function isNear(second: number): boolean {
  return second >= 0 && second < 2 ** 33
}

/** A directory's node up to where its tree belongs. */
export function openNode(node: TreeNode): string {
  return encodeNode(node).slice(0, -1)
}

/** An open node with its tree. */
export function closeNode(node: string, tree: ObjectId): string {
  return `${node},"subtree":"${tree}"}`
}

/** The path of a name in a directory that a snapshot shows. */
export function joinShown(directory: ByteString, name: ByteString): ByteString {
  return `${directory === '/' ? '' : directory}/${name}` as ByteString
}

/** The names of a directory; with a list of those to look at, these and the ones it had. */
function namesOf(
  directory: SourceDirectory,
  older: ReadonlyMap<ByteString, TreeNode> | undefined,
  looked: ReadonlySet<ByteString> | undefined,
): SourceName[] {
  if (older === undefined || looked === undefined) return directory.entries()
  return [...new Set([...older.keys(), ...looked])].map((name) => ({ name, isFile: false }))
}

function byName(left: SourceName, right: SourceName): number {
  return left.name < right.name ? -1 : 1
}

function olderNodes(content: Uint8Array): ReadonlyMap<ByteString, TreeNode> {
  const nodes = decodeTree(Buffer.from(content.buffer, content.byteOffset, content.byteLength))
  return new Map(nodes.map((node) => [node.name, node]))
}

function nothingOf(id: number): SavedDirectory {
  return {
    id,
    nodes: [],
    subdirectories: [],
    large: [],
    tree: undefined,
    rootNode: undefined,
    slices: [],
    isLost: true,
  }
}

export function emptyCounts(): SaveCounts {
  return {
    filesNew: 0,
    filesChanged: 0,
    filesUnmodified: 0,
    directories: 0,
    others: 0,
    readBytes: 0,
    totalBytes: 0,
    objectsAdded: 0,
    addedBytes: 0,
  }
}
