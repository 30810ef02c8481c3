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
    } else if (options.content !== false) {
      const at = compareContent(expected, actual)
      if (at !== undefined) found.push({ what: 'content', expected: `as is at byte ${at}`, actual: 'other bytes' })
    }
  }
  return found
}

/** What `compareInodes` compares besides type, target, device, size and content. */
export function compareMetadata(expected: ShownInode, actual: ShownInode, options: CompareOptions = {}): Discrepancy[] {
  const found: Discrepancy[] = []
  const [want, got] = [expected.stat, actual.stat]
  if (want.permissions !== got.permissions) {
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
  return found
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
      return firstDifference(left, right)
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
 * from every byte. Holes that both have are not read.
 */
export function firstDifference(left: number, right: number): number | undefined {
  let at = 0
  let data = 0
  for (;;) {
    if (at >= data) {
      const [one, other] = [dataFrom(left, at), dataFrom(right, at)]
      if (one === undefined && other === undefined) return undefinedIfEqualEnds(left, right)
      const start = Math.min(one?.start ?? END, other?.start ?? END)
      data = Math.min(one?.start === start ? one.end : END, other?.start === start ? other.end : END)
      at = start
    }
    const length = Math.min(PIECE_BYTES, data - at)
    const [one, other] = [readAt(left, at, length), readAt(right, at, length)]
    const common = Math.min(one.length, other.length)
    if (one.compare(other, 0, common, 0, common) !== 0) {
      for (let i = 0; i < common; i++) if (one[i] !== other[i]) return at + i
    }
    if (one.length !== other.length) return at + common
    if (common < length) return undefined
    at += length
  }
}

function undefinedIfEqualEnds(left: number, right: number): number | undefined {
  const [one, other] = [statFd(left).sizeBytes, statFd(right).sizeBytes]
  return one === other ? undefined : Math.min(one, other)
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
  readonly #fd: number

  constructor(fd: number) {
    this.#fd = fd
  }

  shownRoot(): ShownInode {
    return new TreeInode(this.#fd, '', statFd(this.#fd))
  }

  open(path: EntryPath): ComparableDirectory<EntryPath> {
    const fd = openBeneath(this.#fd, path, O_DIRECTORY | O_NOFOLLOW)
    return {
      names: () => sortedDirents(fd).map(({ name }) => name),
      find: (name) => {
        const stat = tryStatAt(fd, name)
        if (stat === undefined) return undefined
        const inode = new TreeInode(fd, name, stat)
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
    return shownDirectory(this.#stack, this.root)
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
  readonly signal?: AbortSignal | undefined
  readonly onProgress?: ((done: number) => void) | undefined
}

const TURN_MS = 20

/**
 * Compares two trees name by name, directory by directory: what `compareInodes` compares, and whether the same names
 * share an inode. Holds the names of one directory, a line for each directory not yet visited, and one for each inode
 * with several names.
 */
export async function compareTrees<A, B>(
  expected: ComparableTree<A>,
  actual: ComparableTree<B>,
  options: CompareTreesOptions = {},
): Promise<Comparison> {
  const run = new TreeComparison(expected, actual, options)
  let turn = performance.now()
  while (run.step()) {
    if (performance.now() - turn < TURN_MS) continue
    await new Promise(setImmediate)
    options.signal?.throwIfAborted()
    options.onProgress?.(run.entries)
    turn = performance.now()
  }
  return run.result()
}

interface PairOfDirectories<A, B> {
  readonly path: EntryPath
  readonly expected: A
  readonly actual: B
}

class TreeComparison<A, B> {
  entries = 1
  readonly #expected: ComparableTree<A>
  readonly #actual: ComparableTree<B>
  readonly #options: CompareTreesOptions
  readonly #pending: PairOfDirectories<A, B>[] = []
  readonly #differences: TreeDifference[] = []
  readonly #links = new LinkPairs()
  #total = 0
  #bytes = 0

  constructor(expected: ComparableTree<A>, actual: ComparableTree<B>, options: CompareTreesOptions) {
    this.#expected = expected
    this.#actual = actual
    this.#options = options
    this.#pending.push({ path: ROOT, expected: expected.root, actual: actual.root })
    this.#add(ROOT, compareMetadata(expected.shownRoot(), actual.shownRoot(), options))
  }

  /** Compares one directory; `false` when none is left. */
  step(): boolean {
    const pair = this.#pending.pop()
    if (pair === undefined) return false
    const { path } = pair
    const [expected, actual] = [this.#open(this.#expected, pair.expected), this.#open(this.#actual, pair.actual)]
    try {
      if (expected.error !== actual.error) {
        this.#add(path, [{ what: 'error', expected: expected.error ?? 'none', actual: actual.error ?? 'none' }])
      }
      if (expected.directory === undefined || actual.directory === undefined) return true
      const children: PairOfDirectories<A, B>[] = []
      for (const name of union(expected.directory.names(), actual.directory.names())) {
        const child = this.#compareName(join(path, name), name, expected.directory, actual.directory)
        if (child !== undefined) children.push(child)
      }
      this.#pending.push(...children.reverse())
      return true
    } finally {
      expected.directory?.close()
      actual.directory?.close()
    }
  }

  result(): Comparison {
    const differences = this.#differences.sort((left, right) => (left.path < right.path ? -1 : 1))
    return { equal: this.#total === 0, differences, total: this.#total, entries: this.entries, bytes: this.#bytes }
  }

  #open<Ref>(tree: ComparableTree<Ref>, ref: Ref): { directory?: ComparableDirectory<Ref>; error?: string } {
    try {
      return { directory: tree.open(ref) }
    } catch (error) {
      return { error: codeOf(error) }
    }
  }

  #compareName(
    path: EntryPath,
    name: Name,
    expectedDir: ComparableDirectory<A>,
    actualDir: ComparableDirectory<B>,
  ): PairOfDirectories<A, B> | undefined {
    const expected = attempt(() => expectedDir.find(name))
    const actual = attempt(() => actualDir.find(name))
    const [want, got] = [expected.value, actual.value]
    if (want === undefined && got === undefined && expected.error === actual.error) return undefined
    this.entries++
    if (want === undefined || got === undefined) {
      const word = (one: typeof expected | typeof actual) =>
        one.error ?? (one.value === undefined ? 'absent' : kindOf(one.value.inode.stat))
      this.#add(path, [{ what: 'existence', expected: word(expected), actual: word(actual) }])
      return undefined
    }
    const compared = attempt(() => compareInodes(want.inode, got.inode, this.#options))
    if (compared.error !== undefined) {
      this.#add(path, [{ what: 'error', expected: 'readable', actual: compared.error }])
    } else this.#add(path, compared.value as Discrepancy[])
    if (want.child !== undefined && got.child !== undefined) {
      return { path, expected: want.child, actual: got.child }
    }
    if (want.inode.stat.isFile) this.#bytes += want.inode.stat.sizeBytes
    if (want.inode.stat.nlink > 1 || got.inode.stat.nlink > 1) {
      const problem = this.#links.add(path, want.inode.group, got.inode.group)
      if (problem !== undefined) this.#add(path, [problem])
    }
    return undefined
  }

  #add(path: EntryPath, found: readonly Discrepancy[]): void {
    this.#total += found.length
    const limit = this.#options.limit ?? 1000
    for (const discrepancy of found) {
      if (this.#differences.length < limit) this.#differences.push({ path, ...discrepancy })
    }
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

function attempt<T>(read: () => T): { value?: T; error?: string } {
  try {
    return { value: read() }
  } catch (error) {
    return { error: codeOf(error) }
  }
}

function codeOf(error: unknown): string {
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
