import { availableParallelism } from 'node:os'
import { Worker } from 'node:worker_threads'
import {
  close,
  DT_BLK,
  DT_CHR,
  DT_DIR,
  DT_FIFO,
  DT_LNK,
  DT_REG,
  DT_SOCK,
  errnoOf,
  FS_APPEND_FL,
  FS_IMMUTABLE_FL,
  LsyncError,
  nextData,
  O_DIRECTORY,
  O_NOFOLLOW,
  openBeneath,
  printable,
  readAt,
  S_IFBLK,
  S_IFCHR,
  S_IFLNK,
  type Stat,
  statFd,
  tryStatAt,
} from '@lsync/posix'
import { type EndMessage, endWorker } from './end-worker.ts'
import type { Xattr } from './model/entry.ts'
import { type EntryPath, join, type Name, ROOT } from './model/path.ts'
import { type Directory, rootDirectory, type Stack } from './resolve.ts'
import { sortedDirents, typeOf } from './scan.ts'
import { type Present, type ShownInode, shownDirectory, TreeInode, ViewDirectory } from './view.ts'

/** One thing that is not as it should be. `what` is one of the words of `WHAT`, or `xattr NAME`. */
export interface Discrepancy {
  readonly what: string
  readonly expected: string
  readonly actual: string
}

export interface CompareOptions {
  /** Compare the bytes of files of equal size. Default true. */
  readonly content?: boolean
  /** Times that fall into the same grain are equal. Default 1n. */
  readonly timeGranularityNs?: bigint
  /** Compare the immutable and append-only flags (chattr). Default false. */
  readonly flags?: boolean
  /** Report a file that has holes and comes out without any. Default false. */
  readonly holes?: boolean
}

const TYPE_NAMES: Readonly<Record<number, string>> = {
  [DT_REG]: 'file',
  [DT_DIR]: 'directory',
  [DT_LNK]: 'symlink',
  [DT_FIFO]: 'fifo',
  [DT_SOCK]: 'socket',
  [DT_CHR]: 'character device',
  [DT_BLK]: 'block device',
}

/** What kind of inode a stat is of, in words. */
export function kindOf(stat: Stat): string {
  return TYPE_NAMES[typeOf(stat)] ?? 'unknown'
}

/**
 * Everything in which two inodes differ: type, or else mode, owner, mtime, attributes (ACLs and capabilities among
 * them), symlink target, device number, size, content. Access times and inode numbers are not part of it.
 */
export function compareInodes(expected: ShownInode, actual: ShownInode, options: CompareOptions = {}): Discrepancy[] {
  const [want, got] = [expected.stat, actual.stat]
  if (want.type !== got.type) return [{ what: 'type', expected: kindOf(want), actual: kindOf(got) }]
  const found = compareMetadata(expected, actual, options)
  if (want.type === S_IFLNK) {
    const [one, other] = [expected.target, actual.target]
    if (one !== other) found.push({ what: 'target', expected: printable(one), actual: printable(other) })
  } else if (want.type === S_IFCHR || want.type === S_IFBLK) {
    if (want.rdev !== got.rdev) found.push({ what: 'device', expected: String(want.rdev), actual: String(got.rdev) })
  } else if (want.isFile) {
    if (want.sizeBytes !== got.sizeBytes) {
      found.push({ what: 'size', expected: String(want.sizeBytes), actual: String(got.sizeBytes) })
    } else {
      if (options.content !== false) {
        const at = compareContent(expected, actual)
        if (at !== undefined) found.push({ what: 'content', expected: `as is at byte ${at}`, actual: 'other bytes' })
      }
      if (options.holes === true && lostHoles(expected, actual)) {
        found.push({ what: 'holes', expected: 'some', actual: 'none' })
      }
    }
  }
  return found
}

const HOLE_BYTES = 64 * 1024

/**
 * Whether all holes of a file are gone. Where exactly they are is each file system's own business, and what is allocated
 * differs with compression and preallocation: only both together tell.
 */
function lostHoles(expected: ShownInode, actual: ShownInode): boolean {
  const { sizeBytes, blocks } = expected.stat
  if (sizeBytes < HOLE_BYTES || blocks * 512 + HOLE_BYTES > sizeBytes || actual.stat.blocks * 512 < sizeBytes)
    return false
  return holesOf(expected) >= HOLE_BYTES && holesOf(actual) === 0
}

function holesOf(inode: ShownInode): number {
  const fd = inode.openData()
  try {
    const { sizeBytes } = inode.stat
    let holes = sizeBytes
    for (let at = 0; at < sizeBytes; ) {
      const data = dataFrom(fd, at)
      if (data === undefined) break
      holes -= Math.min(data.end, sizeBytes) - data.start
      at = data.end
    }
    return holes
  } finally {
    close(fd)
  }
}

/** What `compareInodes` compares besides type, target, device, size and content. */
export function compareMetadata(expected: ShownInode, actual: ShownInode, options: CompareOptions = {}): Discrepancy[] {
  const found: Discrepancy[] = []
  const [want, got] = [expected.stat, actual.stat]
  // Nobody can set the mode of a symlink, which means nothing; MooseFS gives some of them another one than 0777.
  if (want.permissions !== got.permissions && want.type !== S_IFLNK) {
    found.push({ what: 'mode', expected: octal(want.permissions), actual: octal(got.permissions) })
  }
  if (want.uid !== got.uid || want.gid !== got.gid) {
    found.push({ what: 'owner', expected: `${want.uid}:${want.gid}`, actual: `${got.uid}:${got.gid}` })
  }
  const grain = options.timeGranularityNs ?? 1n
  const [wantTime, gotTime] = [want.mtimeNs, got.mtimeNs]
  if (wantTime !== gotTime && (grain === 1n || wantTime / grain !== gotTime / grain)) {
    found.push({ what: 'times', expected: String(wantTime), actual: String(gotTime) })
  }
  compareXattrs(expected.xattrs, actual.xattrs, found)
  if (options.flags === true && expected.protection !== actual.protection) {
    found.push({ what: 'flags', expected: flagLetters(expected.protection), actual: flagLetters(actual.protection) })
  }
  return found
}

/** The flags of chattr(1) that protect an inode, in its letters. */
export function flagLetters(flags: number): string {
  const letters = `${flags & FS_IMMUTABLE_FL ? 'i' : ''}${flags & FS_APPEND_FL ? 'a' : ''}`
  return letters === '' ? 'none' : letters
}

function octal(mode: number): string {
  return mode.toString(8).padStart(4, '0')
}

function compareXattrs(expected: readonly Xattr[], actual: readonly Xattr[], found: Discrepancy[]): void {
  if (expected.length === 0 && actual.length === 0) return
  const values = new Map(actual.map(({ name, value }) => [name, value]))
  for (const { name, value } of expected) {
    const other = values.get(name)
    values.delete(name)
    if (other !== undefined && Buffer.compare(value, other) === 0) continue
    found.push({ what: `xattr ${printable(name)}`, expected: shownValue(value), actual: shownValue(other) })
  }
  for (const [name, value] of values) {
    found.push({ what: `xattr ${printable(name)}`, expected: 'absent', actual: shownValue(value) })
  }
}

const SHOWN_BYTES = 48

function shownValue(value: Uint8Array | undefined): string {
  if (value === undefined) return 'absent'
  const more = value.length > SHOWN_BYTES ? `… (${value.length} bytes)` : ''
  return `0x${Buffer.from(value.subarray(0, SHOWN_BYTES)).toString('hex')}${more}`
}

function compareContent(expected: ShownInode, actual: ShownInode): number | undefined {
  if (expected.stat.sizeBytes === 0) return undefined
  const left = expected.openData()
  try {
    const right = actual.openData()
    try {
      return firstDifference(left, right, expected.stat.sizeBytes)
    } finally {
      close(right)
    }
  } finally {
    close(left)
  }
}

const PIECE_BYTES = 64 * 1024
const END = Number.MAX_SAFE_INTEGER

/**
 * The offset of the first byte in which two open files differ, `undefined` if there is none; a missing byte differs
 * from every byte. Holes that both have are not read. `sizeBytes` is what the caller knows their size to be.
 */
export function firstDifference(left: number, right: number, sizeBytes = END): number | undefined {
  if (sizeBytes <= PIECE_BYTES) {
    // Most files: asking for holes and sizes would cost more than reading them.
    const [one, other] = [readAt(left, 0, sizeBytes), readAt(right, 0, sizeBytes)]
    return one.equals(other) ? undefined : differsAt(one, other)
  }
  const [leftBytes, rightBytes] = [statFd(left).sizeBytes, statFd(right).sizeBytes]
  const shared = Math.min(leftBytes, rightBytes)
  let at = 0
  let data = 0
  for (;;) {
    if (at >= data) {
      const [one, other] = [dataFrom(left, at), dataFrom(right, at)]
      at = Math.min(one?.start ?? END, other?.start ?? END)
      data = Math.min(one?.start === at ? one.end : END, other?.start === at ? other.end : END)
    }
    if (at >= shared) return leftBytes === rightBytes ? undefined : shared
    const length = Math.min(PIECE_BYTES, data - at, shared - at)
    const [one, other] = [readAt(left, at, length), readAt(right, at, length)]
    if (!one.equals(other)) return at + differsAt(one, other)
    at += length
  }
}

function differsAt(one: Buffer, other: Buffer): number {
  for (let i = 0; ; i++) if (one[i] !== other[i]) return i
}

// Where a file system cannot tell holes from data, all of it is data.
function dataFrom(fd: number, at: number): { start: number; end: number } | undefined {
  try {
    return nextData(fd, at)
  } catch (error) {
    if (errnoOf(error) !== 'EINVAL' && errnoOf(error) !== 'ENOTSUP') throw error
    return { start: at, end: END }
  }
}

/** A tree that can be compared, however it is read. `Ref` names a directory of it. */
export interface ComparableTree<Ref> {
  readonly root: Ref
  /** The root's own inode. */
  shownRoot(): ShownInode
  open(ref: Ref): ComparableDirectory<Ref>
}

export interface ComparableDirectory<Ref> {
  /** The names that may be there, sorted. */
  names(): readonly Name[]
  /** What a name shows; `undefined` when a lookup does not find it. Valid until `close`. */
  find(name: Name): { readonly inode: ShownInode; readonly child?: Ref } | undefined
  close(): void
}

/** A tree below an open directory: a mounted view, or a result. Nothing in it is followed, mounts are not entered. */
export class OpenTree implements ComparableTree<EntryPath> {
  readonly root = ROOT
  readonly fd: number
  readonly emulated: ReadonlyMap<EntryPath, number>

  /** `emulated`: flags that the tree would show if its first layer were mounted as an upper. */
  constructor(fd: number, emulated: ReadonlyMap<EntryPath, number> = new Map()) {
    this.fd = fd
    this.emulated = emulated
  }

  shownRoot(): ShownInode {
    return new TreeInode(this.fd, '', statFd(this.fd))
  }

  open(path: EntryPath): ComparableDirectory<EntryPath> {
    const fd = openBeneath(this.fd, path, O_DIRECTORY | O_NOFOLLOW)
    return {
      names: () => sortedDirents(fd).map(({ name }) => name),
      find: (name) => {
        const stat = tryStatAt(fd, name)
        if (stat === undefined) return undefined
        const emulated = this.emulated.size === 0 ? 0 : (this.emulated.get(join(path, name)) ?? 0)
        const inode = new TreeInode(fd, name, stat, emulated)
        return stat.isDirectory ? { inode, child: join(path, name) } : { inode }
      },
      close: () => close(fd),
    }
  }
}

/** The view of a stack, read without a mount. A name whose lookup fails in the kernel too is thrown as that errno. */
export class ResolvedTree implements ComparableTree<Directory> {
  readonly root: Directory
  readonly #stack: Stack

  constructor(stack: Stack) {
    this.#stack = stack
    this.root = rootDirectory(stack)
  }

  shownRoot(): ShownInode {
    return this.shownDirectory(this.root)
  }

  /** A directory's own inode. */
  shownDirectory(directory: Directory): ShownInode {
    return shownDirectory(this.#stack, directory)
  }

  open(directory: Directory): ComparableDirectory<Directory> {
    const view = new ViewDirectory(this.#stack, directory)
    return {
      names: () => view.candidates(),
      find: (name) => {
        const found = view.find(name)
        if (found.kind === 'absent') return undefined
        if (found.kind === 'broken') throw new NameBrokenError(found.errno, found.why)
        const inode = view.shown(found satisfies Present)
        return found.kind === 'directory' ? { inode, child: found.directory } : { inode }
      },
      close: () => view.close(),
    }
  }
}

/** A name for which a mount answers an errno. */
class NameBrokenError extends LsyncError {
  constructor(errno: string, why: string) {
    super(errno, why)
  }
}

/** One difference of two trees. Paths are bytes; `''` is the root. */
export interface TreeDifference extends Discrepancy {
  readonly path: EntryPath
}

/** What comparing two trees gave. */
export interface Comparison {
  readonly equal: boolean
  /** In path order, at most `limit`. */
  readonly differences: readonly TreeDifference[]
  /** How many there are in all. */
  readonly total: number
  /** Names looked at, the root included. */
  readonly entries: number
  readonly bytes: number
}

export interface CompareTreesOptions extends CompareOptions {
  /** How many differences are kept. Default 1,000. */
  readonly limit?: number
  /** Threads beside the calling one, where both trees are open ones. Default: as many as there are other CPUs, up to 3. */
  readonly workers?: number
  readonly signal?: AbortSignal | undefined
  readonly onProgress?: ((done: number) => void) | undefined
}

/** Two directories to be compared, one of each tree. */
export interface DirectoryPair<A, B> {
  readonly path: EntryPath
  readonly expected: A
  readonly actual: B
}

/** What comparing some directories gave. */
export interface ComparisonPart<A, B> {
  readonly differences: TreeDifference[]
  /** Names of inodes with several names, and the inode on each side. */
  readonly links: (readonly [path: EntryPath, expected: string, actual: string])[]
  readonly next: DirectoryPair<A, B>[]
  total: number
  entries: number
  bytes: number
}

export function emptyComparisonPart<A, B>(): ComparisonPart<A, B> {
  return { differences: [], links: [], next: [], total: 0, entries: 0, bytes: 0 }
}

const TURN_MS = 20
/** A helper thread takes about 60 ms to start, so trees that are compared sooner never pay for one. */
const ALONE_MS = 150
const SHARE = 32

/**
 * Compares two trees name by name, directory by directory: what `compareInodes` compares, and whether the same names
 * share an inode. Two open trees are shared out over threads. Holds the names of one directory a thread, a line for
 * each directory not yet visited, and one for each inode with several names.
 */
export async function compareTrees<A, B>(
  expected: ComparableTree<A>,
  actual: ComparableTree<B>,
  options: CompareTreesOptions = {},
): Promise<Comparison> {
  const run = new TreeComparison<A, B>(options)
  run.add(rootPart(expected, actual, options))
  const trees = expected instanceof OpenTree && actual instanceof OpenTree ? { expected, actual } : undefined
  const helpers = new Helpers(run as unknown as TreeComparison<EntryPath, EntryPath>, trees, options)
  try {
    const start = performance.now()
    let turn = start
    for (;;) {
      const pair = run.pending.pop()
      if (pair === undefined) {
        if (!helpers.areBusy) break
        await helpers.message()
      } else {
        const part = emptyComparisonPart<A, B>()
        compareDirectories(expected, actual, pair, options, part)
        run.add(part)
      }
      helpers.handOut()
      const now = performance.now()
      if (now - turn < TURN_MS) continue
      await new Promise(setImmediate)
      options.signal?.throwIfAborted()
      options.onProgress?.(run.entries)
      if (now - start > ALONE_MS) helpers.start()
      turn = now
    }
    return run.result()
  } finally {
    await helpers.close()
  }
}

/** What a helper is told: the trees, then directories of both to be compared. */
export type ToCompareWorker =
  | {
      readonly expectedFd: number
      readonly actualFd: number
      readonly emulated: ReadonlyMap<EntryPath, number>
      readonly options: CompareOptions & { limit?: number }
    }
  | { readonly paths: readonly EntryPath[]; readonly budgetMs: number }
  | EndMessage

/** What a helper answers. */
export type FromCompareWorker =
  | { readonly part: ComparisonPart<EntryPath, EntryPath> }
  | { readonly error: { readonly code: string | undefined; readonly message: string } }

interface Helper {
  readonly worker: Worker
  isBusy: boolean
}

/** Threads that compare directories of two open trees: an fd belongs to the process, so its number is enough. */
class Helpers {
  readonly #run: TreeComparison<EntryPath, EntryPath>
  readonly #trees: { readonly expected: OpenTree; readonly actual: OpenTree } | undefined
  readonly #options: CompareTreesOptions
  readonly #helpers: Helper[] = []
  #failure: Error | undefined
  #wake: (() => void) | undefined

  constructor(
    run: TreeComparison<EntryPath, EntryPath>,
    trees: { readonly expected: OpenTree; readonly actual: OpenTree } | undefined,
    options: CompareTreesOptions,
  ) {
    this.#run = run
    this.#trees = trees
    this.#options = options
  }

  get areBusy(): boolean {
    return this.#helpers.some(({ isBusy }) => isBusy)
  }

  start(): void {
    if (this.#trees === undefined || this.#helpers.length > 0) return
    const { expected, actual } = this.#trees
    const { content, timeGranularityNs, limit, flags = false, holes = false } = this.#options
    const options = {
      flags,
      holes,
      ...(content === undefined ? {} : { content }),
      ...(timeGranularityNs === undefined ? {} : { timeGranularityNs }),
      ...(limit === undefined ? {} : { limit }),
    }
    const count = this.#options.workers ?? Math.min(availableParallelism(), 4) - 1
    for (let i = 0; i < count; i++) {
      const worker = new Worker(new URL('./compare-worker.ts', import.meta.url))
      const helper: Helper = { worker, isBusy: false }
      worker.on('message', (message: FromCompareWorker) => this.#receive(helper, message))
      worker.on('error', (error: Error) =>
        this.#receive(helper, { error: { code: undefined, message: error.message } }),
      )
      const { fd: expectedFd, emulated } = expected
      worker.postMessage({ expectedFd, actualFd: actual.fd, emulated, options } satisfies ToCompareWorker)
      this.#helpers.push(helper)
    }
  }

  handOut(): void {
    if (this.#failure !== undefined) throw this.#failure
    const { pending } = this.#run
    for (const helper of this.#helpers) {
      // One stays for the calling thread.
      if (helper.isBusy || pending.length < 2) continue
      const paths = pending.splice(0, Math.min(SHARE, pending.length >> 1)).map(({ path }) => path)
      helper.isBusy = true
      helper.worker.postMessage({ paths, budgetMs: TURN_MS } satisfies ToCompareWorker)
    }
  }

  message(): Promise<void> {
    return new Promise((resolve) => {
      this.#wake = resolve
    })
  }

  async close(): Promise<void> {
    await Promise.all(this.#helpers.map(({ worker }) => endWorker(worker)))
  }

  #receive(helper: Helper, message: FromCompareWorker): void {
    helper.isBusy = false
    if ('part' in message) this.#run.add(message.part)
    else {
      const { code, message: text } = message.error
      this.#failure ??= code === undefined ? new Error(text) : new LsyncError(code, text)
    }
    this.#wake?.()
  }
}

function rootPart<A, B>(
  expected: ComparableTree<A>,
  actual: ComparableTree<B>,
  options: CompareTreesOptions,
): ComparisonPart<A, B> {
  const part = emptyComparisonPart<A, B>()
  part.entries = 1
  part.next.push({ path: ROOT, expected: expected.root, actual: actual.root })
  found(part, ROOT, compareMetadata(expected.shownRoot(), actual.shownRoot(), options), options)
  return part
}

/** Compares one directory of each tree; what lies below it is in `part.next`. */
export function compareDirectories<A, B>(
  expectedTree: ComparableTree<A>,
  actualTree: ComparableTree<B>,
  pair: DirectoryPair<A, B>,
  options: CompareTreesOptions,
  part: ComparisonPart<A, B>,
): void {
  const { path } = pair
  const expected = attempt(() => expectedTree.open(pair.expected))
  const actual = attempt(() => actualTree.open(pair.actual))
  try {
    if (expected.error !== actual.error) {
      const words = { expected: expected.error ?? 'none', actual: actual.error ?? 'none' }
      found(part, path, [{ what: 'error', ...words }], options)
    }
    if (expected.value === undefined || actual.value === undefined) return
    for (const name of union(expected.value.names(), actual.value.names())) {
      compareName(join(path, name), [expected.value, actual.value], name, options, part)
    }
  } finally {
    expected.value?.close()
    actual.value?.close()
  }
}

function compareName<A, B>(
  path: EntryPath,
  [expectedDir, actualDir]: readonly [ComparableDirectory<A>, ComparableDirectory<B>],
  name: Name,
  options: CompareTreesOptions,
  part: ComparisonPart<A, B>,
): void {
  const expected = attempt(() => expectedDir.find(name))
  const actual = attempt(() => actualDir.find(name))
  const [want, got] = [expected.value, actual.value]
  if (want === undefined && got === undefined && expected.error === actual.error) return
  part.entries++
  if (want === undefined || got === undefined) {
    const word = (one: typeof expected | typeof actual) =>
      one.error ?? (one.value === undefined ? 'absent' : kindOf(one.value.inode.stat))
    found(part, path, [{ what: 'existence', expected: word(expected), actual: word(actual) }], options)
    return
  }
  const compared = attempt(() => compareInodes(want.inode, got.inode, options))
  if (compared.value !== undefined) found(part, path, compared.value, options)
  else found(part, path, [{ what: 'error', expected: 'readable', actual: compared.error as string }], options)
  if (want.child !== undefined && got.child !== undefined) {
    part.next.push({ path, expected: want.child, actual: got.child })
    return
  }
  const { stat } = want.inode
  if (stat.isFile) part.bytes += stat.sizeBytes
  if (stat.nlink > 1 || got.inode.stat.nlink > 1) part.links.push([path, want.inode.group, got.inode.group])
}

function found<A, B>(
  part: ComparisonPart<A, B>,
  path: EntryPath,
  discrepancies: readonly Discrepancy[],
  { limit = DEFAULT_LIMIT }: CompareTreesOptions,
): void {
  part.total += discrepancies.length
  for (const discrepancy of discrepancies) {
    if (part.differences.length < limit) part.differences.push({ path, ...discrepancy })
  }
}

const DEFAULT_LIMIT = 1000

/** What is known so far, and what is left to do. */
class TreeComparison<A, B> {
  readonly pending: DirectoryPair<A, B>[] = []
  readonly #options: CompareTreesOptions
  readonly #whole = emptyComparisonPart<A, B>()
  readonly #links = new LinkPairs()

  constructor(options: CompareTreesOptions) {
    this.#options = options
  }

  get entries(): number {
    return this.#whole.entries
  }

  add(part: ComparisonPart<A, B>): void {
    const whole = this.#whole
    const { limit = DEFAULT_LIMIT } = this.#options
    whole.entries += part.entries
    whole.bytes += part.bytes
    whole.total += part.total
    whole.differences.push(...part.differences.slice(0, limit - whole.differences.length))
    for (const [path, expected, actual] of part.links) {
      const problem = this.#links.add(path, expected, actual)
      if (problem !== undefined) found(whole, path, [problem], this.#options)
    }
    for (let i = part.next.length - 1; i >= 0; i--) this.pending.push(part.next[i] as DirectoryPair<A, B>)
  }

  result(): Comparison {
    const { differences, total, entries, bytes } = this.#whole
    differences.sort((left, right) => (left.path < right.path ? -1 : left.path > right.path ? 1 : 0))
    return { equal: total === 0, differences, total, entries, bytes }
  }
}

/** Whether two trees share inodes among the same names, told as the names come. */
class LinkPairs {
  readonly #expected = new Map<string, { other: string; path: EntryPath }>()
  readonly #actual = new Map<string, { other: string; path: EntryPath }>()

  add(path: EntryPath, expected: string, actual: string): Discrepancy | undefined {
    const want = this.#expected.get(expected)
    const got = this.#actual.get(actual)
    if (want === undefined) this.#expected.set(expected, { other: actual, path })
    if (got === undefined) this.#actual.set(actual, { other: expected, path })
    const isWanted = want === undefined || want.other === actual
    const isOnly = got === undefined || got.other === expected
    if (isWanted && isOnly) return undefined
    const word = (first: { path: EntryPath } | undefined) =>
      first === undefined ? 'an inode of its own' : `linked with ${printable(first.path)}`
    return { what: 'links', expected: word(want), actual: word(got) }
  }
}

/** What reading gave, or the code of the failure that is its answer. */
export function attempt<T>(read: () => T): { value?: T; error?: string } {
  try {
    return { value: read() }
  } catch (error) {
    return { error: codeOf(error) }
  }
}

/** The code of a foreseen failure; everything else is thrown on. */
export function codeOf(error: unknown): string {
  if (error instanceof LsyncError) return error.code
  throw error
}

/** Two sorted lists of names as one. */
function* union(left: readonly Name[], right: readonly Name[]): Generator<Name> {
  let [i, j] = [0, 0]
  while (i < left.length || j < right.length) {
    const [one, other] = [left[i], right[j]]
    if (other === undefined || (one !== undefined && one < other)) {
      yield one as Name
      i++
    } else {
      yield other
      j++
      if (one === other) i++
    }
  }
}
