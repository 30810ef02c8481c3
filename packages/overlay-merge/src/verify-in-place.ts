import { createHash } from 'node:crypto'
import {
  close,
  errnoOf,
  type HostPath,
  type MountOptions,
  nextData,
  printable,
  readAt,
  S_IFBLK,
  S_IFCHR,
  S_IFLNK,
  writeAt,
} from '@lsync/posix'
import {
  attempt,
  type ComparableTree,
  codeOf,
  type Discrepancy,
  flagLetters,
  kindOf,
  OpenTree,
  ResolvedTree,
  type TreeDifference,
} from './compare.ts'
import type { Namespace } from './model/marks.ts'
import { type EntryPath, join, type Name, ROOT } from './model/path.ts'
import { openTemporaryPlan, type Progress } from './planning.ts'
import { closeStack, openStack } from './stack.ts'
import { emulatedFlags, mountForReading, type VerifyReport } from './verify.ts'
import type { ShownInode } from './view.ts'

/** The stack whose view is written down. */
export interface RecordViewRequest {
  /** Top first, the upper with them. */
  readonly layers: readonly HostPath[]
  /** Data-only lowers. */
  readonly data?: readonly HostPath[]
  readonly namespace?: Namespace
  /** The workdir of the first layer: it is then mounted (read-only) as an upper, as index=on needs. */
  readonly workdir?: HostPath
  /** Further mount options, such as `{ index: 'on', xino: 'off' }`. */
  readonly options?: MountOptions
  /** `resolver`: do not mount, read the layers as the merge does. Default: mount, and resolve only without privilege. */
  readonly by?: 'mount' | 'resolver'
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: Progress) => void
}

/** What a stack showed, in a file without a name. Close it. */
export interface RecordedView {
  readonly by: 'mount' | 'resolver'
  /** Why the kernel was not asked. */
  readonly why?: string
  /** Names, the root included. */
  readonly entries: number
  readonly fd: number
  close(): void
}

/**
 * Writes down what a stack shows, so that it can be compared with a result that uses the stack up. Mounts as `verify`
 * does, reads every file, changes nothing, and leaves nothing mounted: a merge may follow. Holds the names of one
 * directory, a line for each directory not yet visited, and one for each inode with several names. The file lies in
 * TMPDIR, some 200 bytes an entry.
 * @throws {PosixError} when the kernel does not mount the stack for another reason than privilege
 */
export async function recordView(request: RecordViewRequest): Promise<RecordedView> {
  const opened: (() => void)[] = []
  const fd = openTemporaryPlan()
  try {
    const { tree, by, why } = openView(request, opened, true)
    const file = new LineWriter(fd)
    const entries = await record(tree, file, new Pace(request, 'scan'))
    file.flush()
    return { by, ...(why === undefined ? {} : { why }), entries, fd, close: () => close(fd) }
  } catch (error) {
    close(fd)
    throw error
  } finally {
    for (const release of opened.reverse()) release()
  }
}

/** The result that should be what was written down. */
export interface CompareWithRecordRequest
  extends Pick<RecordViewRequest, 'data' | 'namespace' | 'options' | 'signal' | 'onProgress'> {
  /** The layer that the stack was folded into: what a mount of it shows is compared. */
  readonly against: HostPath
  /** What lies beneath it, top first. */
  readonly againstLowers?: readonly HostPath[]
  /** Times within one grain are equal, for results on file systems with coarse times. Default 1n. */
  readonly timeGranularityNs?: bigint
  /** How many differences are given. Default 1,000. */
  readonly limit?: number
}

/** Compares what a result shows with what was written down, in the words of `verify` and with the same means. */
export async function compareWithRecord(
  recorded: RecordedView,
  request: CompareWithRecordRequest,
): Promise<VerifyReport> {
  const start = performance.now()
  const opened: (() => void)[] = []
  try {
    const layers = [request.against, ...(request.againstLowers ?? [])]
    const { tree } = openView({ ...request, layers, by: recorded.by }, opened, false)
    const comparison = new RecordComparison(tree, new RecordReader(recorded.fd), request)
    await comparison.run(new Pace(request, 'verify'))
    const { by, why } = recorded
    return { ...comparison.result(), by, ...(why === undefined ? {} : { why }), elapsedMs: performance.now() - start }
  } finally {
    for (const release of opened.reverse()) release()
  }
}

type AnyTree = ComparableTree<unknown>

function openView(
  request: RecordViewRequest,
  opened: (() => void)[],
  isUpper: boolean,
): { tree: AnyTree; by: 'mount' | 'resolver'; why?: string } {
  let why = 'asked for'
  if (request.by !== 'resolver') {
    try {
      const fd = mountForReading(request, opened)
      opened.push(() => close(fd))
      return { tree: new OpenTree(fd, isUpper ? emulatedFlags(request) : undefined) as AnyTree, by: 'mount' }
    } catch (error) {
      if (errnoOf(error) !== 'EPERM' || request.by === 'mount') throw error
      why = 'mounting needs CAP_SYS_ADMIN'
    }
  }
  const [upper, ...lowers] = request.layers
  const stack = openStack({ ...request, upper: upper as HostPath, lowers }, false)
  opened.push(() => closeStack(stack))
  return { tree: new ResolvedTree(stack) as AnyTree, by: 'resolver', why }
}

/** A directory begins; the names in it follow. Directories come in path order, component by component. */
interface DirectoryLine {
  readonly directory: EntryPath
  /** It cannot be listed. */
  readonly error?: string
}

/** One name of the directory, or its root (`''`). Names are bytes, a character each. */
interface EntryLine {
  readonly name: Name
  /** The lookup or reading fails. */
  readonly error?: string
  readonly inode?: InodeLine
}

interface InodeLine {
  readonly kind: string
  readonly mode: number
  readonly uid: number
  readonly gid: number
  readonly mtimeNs: string
  readonly xattrs: readonly (readonly [name: string, base64: string])[]
  readonly sizeBytes?: number
  /** SHA-256 of what is not zero. Absent: the file is empty, or has it at `first`. */
  readonly content?: string
  readonly target?: string
  readonly rdev?: number
  /** chattr flags `i` and `a`, where there are some. */
  readonly flags?: string
  /** Inodes with several names: the first one in the order of the record. */
  readonly first?: EntryPath
}

async function record(tree: AnyTree, file: LineWriter, pace: Pace): Promise<number> {
  const links = new Map<string, EntryPath>()
  file.add({ name: '' as Name, inode: metadataOf(tree.shownRoot()) } satisfies EntryLine)
  let entries = 1
  const pending: { path: EntryPath; ref: unknown }[] = [{ path: ROOT, ref: tree.root }]
  for (let next = pending.pop(); next !== undefined; next = pending.pop()) {
    const { path, ref } = next
    const { value: directory, error } = attempt(() => tree.open(ref))
    file.add({ directory: path, ...(error === undefined ? {} : { error }) } satisfies DirectoryLine)
    if (directory === undefined) continue
    try {
      const children: typeof pending = []
      for (const name of directory.names()) {
        const found = attempt(() => directory.find(name))
        if (found.value === undefined && found.error === undefined) continue
        entries++
        const child = join(path, name)
        if (found.value === undefined) file.add({ name, error: found.error as string } satisfies EntryLine)
        else file.add({ name, ...(await describe(found.value.inode, child, links, pace)) } satisfies EntryLine)
        if (found.value?.child !== undefined) children.push({ path: child, ref: found.value.child })
        await pace.turn(entries)
      }
      pending.push(...children.reverse())
    } finally {
      directory.close()
    }
  }
  return entries
}

async function describe(
  inode: ShownInode,
  path: EntryPath,
  links: Map<string, EntryPath>,
  pace: Pace,
): Promise<Omit<EntryLine, 'name'>> {
  try {
    const { stat } = inode
    const line = metadataOf(inode)
    if (stat.isDirectory || stat.nlink === 1) return { inode: { ...line, ...(await contentOf(inode, pace)) } }
    const first = links.get(inode.group)
    if (first !== undefined) return { inode: { ...line, first } }
    links.set(inode.group, path)
    return { inode: { ...line, first: path, ...(await contentOf(inode, pace)) } }
  } catch (error) {
    return { error: codeOf(error) }
  }
}

/** What every kind of inode has; `contentOf` adds what a file holds. */
function metadataOf(inode: ShownInode): InodeLine {
  const { stat, xattrs, protection } = inode
  return {
    kind: kindOf(stat),
    mode: stat.permissions,
    uid: stat.uid,
    gid: stat.gid,
    mtimeNs: String(stat.mtimeNs),
    xattrs: xattrs.map(({ name, value }) => [name, Buffer.from(value).toString('base64')]),
    ...(stat.isFile ? { sizeBytes: stat.sizeBytes } : {}),
    ...(stat.type === S_IFLNK ? { target: inode.target } : {}),
    ...(stat.type === S_IFCHR || stat.type === S_IFBLK ? { rdev: stat.rdev } : {}),
    ...(protection === 0 ? {} : { flags: flagLetters(protection) }),
  }
}

const PIECE_BYTES = 64 * 1024
const ZEROS = Buffer.alloc(PIECE_BYTES)

/** A digest of the pieces that are not all zero, each with its offset: the same wherever the holes are. */
async function contentOf(inode: ShownInode, pace: Pace): Promise<{ content?: string }> {
  const { isFile, sizeBytes } = inode.stat
  if (!isFile || sizeBytes === 0) return {}
  const fd = inode.openData()
  try {
    const hash = createHash('sha256')
    const offset = Buffer.alloc(8)
    let dataEnd = 0
    for (let at = 0; at < sizeBytes; at += PIECE_BYTES) {
      if (at >= dataEnd) {
        const data = dataFrom(fd, at)
        if (data === undefined) break
        at = Math.max(at, data.start - (data.start % PIECE_BYTES))
        dataEnd = data.end
      }
      const piece = readAt(fd, at, PIECE_BYTES)
      if (piece.length === 0) break
      if (piece.compare(ZEROS, 0, piece.length) !== 0) {
        offset.writeBigUInt64LE(BigInt(at))
        hash.update(offset).update(piece)
      }
      await pace.turn()
    }
    return { content: hash.digest('base64') }
  } finally {
    close(fd)
  }
}

// Where a file system cannot tell holes from data, all of it is data.
function dataFrom(fd: number, at: number): { start: number; end: number } | undefined {
  try {
    return nextData(fd, at)
  } catch (error) {
    if (errnoOf(error) !== 'EINVAL' && errnoOf(error) !== 'ENOTSUP') throw error
    return { start: at, end: Number.MAX_SAFE_INTEGER }
  }
}

/** Walks a tree in the order of a record, beside it. Of a name that only one has, nothing beneath is looked at. */
class RecordComparison {
  readonly #tree: AnyTree
  readonly #record: RecordReader
  readonly #request: CompareWithRecordRequest
  readonly #links = new LinkPairs()
  readonly #differences: TreeDifference[] = []
  #total = 0
  #entries = 1
  #bytes = 0

  constructor(tree: AnyTree, record: RecordReader, request: CompareWithRecordRequest) {
    this.#tree = tree
    this.#record = record
    this.#request = request
  }

  async run(pace: Pace): Promise<void> {
    const root = this.#record.entry()?.inode as InodeLine
    this.#add(ROOT, this.#metadata(root, metadataOf(this.#tree.shownRoot())))
    const pending: { path: EntryPath; ref: unknown }[] = [{ path: ROOT, ref: this.#tree.root }]
    for (let next = pending.pop(); next !== undefined; next = pending.pop()) {
      const { path, ref } = next
      const expected = this.#record.directory(path)
      const { value: directory, error } = attempt(() => this.#tree.open(ref))
      if (expected.error !== error) {
        this.#add(path, [{ what: 'error', expected: expected.error ?? 'none', actual: error ?? 'none' }])
      }
      if (directory === undefined) continue
      try {
        if (expected.error !== undefined) continue
        const children: typeof pending = []
        for (const { name, line } of this.#names(directory.names())) {
          const found = attempt(() => directory.find(name))
          if (line === undefined && found.value === undefined && found.error === undefined) continue
          this.#entries++
          const child = join(path, name)
          const isDirectory = await this.#name(child, line, found, pace)
          if (isDirectory) children.push({ path: child, ref: found.value?.child })
          await pace.turn(this.#entries)
        }
        pending.push(...children.reverse())
      } finally {
        directory.close()
      }
    }
  }

  result(): Pick<VerifyReport, 'equal' | 'differences' | 'total' | 'entries' | 'bytes'> {
    const differences = this.#differences.sort((left, right) => (left.path < right.path ? -1 : 1))
    return { equal: this.#total === 0, differences, total: this.#total, entries: this.#entries, bytes: this.#bytes }
  }

  /** The names of the record's directory and of the tree's as one list. */
  *#names(names: readonly Name[]): Generator<{ name: Name; line: EntryLine | undefined }> {
    let line = this.#record.entry()
    for (const name of names) {
      for (; line !== undefined && line.name < name; line = this.#record.entry()) yield { name: line.name, line }
      const isRecorded = line?.name === name
      yield { name, line: isRecorded ? line : undefined }
      if (isRecorded) line = this.#record.entry()
    }
    for (; line !== undefined; line = this.#record.entry()) yield { name: line.name, line }
  }

  /** Compares one name; whether both have a directory there. */
  async #name(path: EntryPath, line: EntryLine | undefined, found: Found, pace: Pace): Promise<boolean> {
    const { value } = found
    const want = line?.inode
    if (want === undefined || value === undefined) {
      const expected = line?.error ?? want?.kind ?? 'absent'
      const actual = found.error ?? (value === undefined ? 'absent' : kindOf(value.inode.stat))
      if (expected !== actual) this.#add(path, [{ what: 'existence', expected, actual }])
      return false
    }
    const { inode, child } = value
    try {
      this.#add(path, await this.#inode(path, want, inode, pace))
    } catch (error) {
      this.#add(path, [{ what: 'error', expected: 'readable', actual: codeOf(error) }])
    }
    return want.kind === 'directory' && child !== undefined
  }

  async #inode(path: EntryPath, want: InodeLine, inode: ShownInode, pace: Pace): Promise<Discrepancy[]> {
    const got = metadataOf(inode)
    if (want.kind !== got.kind) return [{ what: 'type', expected: want.kind, actual: got.kind }]
    const found = this.#metadata(want, got)
    if (want.target !== got.target) {
      found.push({ what: 'target', expected: printable(want.target ?? ''), actual: printable(got.target ?? '') })
    }
    if (want.rdev !== got.rdev) found.push({ what: 'device', expected: String(want.rdev), actual: String(got.rdev) })
    if (want.sizeBytes !== got.sizeBytes) {
      found.push({ what: 'size', expected: String(want.sizeBytes), actual: String(got.sizeBytes) })
    } else if (want.content !== undefined) {
      const { content } = await contentOf(inode, pace)
      if (want.content !== content) found.push({ what: 'content', expected: 'as it was', actual: 'other bytes' })
    }
    this.#bytes += got.sizeBytes ?? 0
    if (want.kind !== 'directory' && (want.first !== undefined || inode.stat.nlink > 1)) {
      const problem = this.#links.add(path, want.first ?? path, inode.group)
      if (problem !== undefined) found.push(problem)
    }
    return found
  }

  #metadata(want: InodeLine, got: InodeLine): Discrepancy[] {
    const found: Discrepancy[] = []
    if (want.mode !== got.mode) found.push({ what: 'mode', expected: octal(want.mode), actual: octal(got.mode) })
    if (want.uid !== got.uid || want.gid !== got.gid) {
      found.push({ what: 'owner', expected: `${want.uid}:${want.gid}`, actual: `${got.uid}:${got.gid}` })
    }
    const grain = this.#request.timeGranularityNs ?? 1n
    if (want.mtimeNs !== got.mtimeNs && BigInt(want.mtimeNs) / grain !== BigInt(got.mtimeNs) / grain) {
      found.push({ what: 'times', expected: want.mtimeNs, actual: got.mtimeNs })
    }
    if (want.flags !== got.flags) {
      found.push({ what: 'flags', expected: want.flags ?? 'none', actual: got.flags ?? 'none' })
    }
    const values = new Map(got.xattrs)
    for (const [name, value] of want.xattrs) {
      const other = values.get(name)
      values.delete(name)
      if (value === other) continue
      found.push({ what: `xattr ${printable(name)}`, expected: shownValue(value), actual: shownValue(other) })
    }
    for (const [name, value] of values) {
      found.push({ what: `xattr ${printable(name)}`, expected: 'absent', actual: shownValue(value) })
    }
    return found
  }

  #add(path: EntryPath, found: readonly Discrepancy[]): void {
    this.#total += found.length
    const limit = this.#request.limit ?? 1000
    for (const discrepancy of found) {
      if (this.#differences.length < limit) this.#differences.push({ path, ...discrepancy })
    }
  }
}

interface Found {
  readonly value?: { readonly inode: ShownInode; readonly child?: unknown } | undefined
  readonly error?: string
}

function octal(mode: number): string {
  return mode.toString(8).padStart(4, '0')
}

const SHOWN_BYTES = 48

function shownValue(base64: string | undefined): string {
  if (base64 === undefined) return 'absent'
  const value = Buffer.from(base64, 'base64')
  const more = value.length > SHOWN_BYTES ? `… (${value.length} bytes)` : ''
  return `0x${value.toString('hex', 0, SHOWN_BYTES)}${more}`
}

/** Whether the names that share an inode are the ones that shared one, told as the names come. */
class LinkPairs {
  readonly #groupOf = new Map<EntryPath, string>()
  readonly #firstOf = new Map<string, { first: EntryPath; path: EntryPath }>()

  add(path: EntryPath, first: EntryPath, group: string): Discrepancy | undefined {
    const wanted = this.#groupOf.get(first)
    const got = this.#firstOf.get(group)
    if (wanted === undefined) this.#groupOf.set(first, group)
    if (got === undefined) this.#firstOf.set(group, { first, path })
    if ((wanted ?? group) === group && (got?.first ?? first) === first) return undefined
    const word = (other: EntryPath | undefined) =>
      other === undefined || other === path ? 'an inode of its own' : `linked with ${printable(other)}`
    return { what: 'links', expected: word(first), actual: word(got?.path) }
  }
}

const FLUSH_BYTES = 1 << 20

class LineWriter {
  readonly #fd: number
  #offset = 0
  #buffered = ''

  constructor(fd: number) {
    this.#fd = fd
  }

  add(line: DirectoryLine | EntryLine): void {
    this.#buffered += `${JSON.stringify(line)}\n`
    if (this.#buffered.length >= FLUSH_BYTES) this.flush()
  }

  flush(): void {
    const bytes = Buffer.from(this.#buffered)
    writeAt(this.#fd, this.#offset, bytes)
    this.#offset += bytes.length
    this.#buffered = ''
  }
}

/** Reads a record once, forwards. */
class RecordReader {
  readonly #lines: Iterator<DirectoryLine | EntryLine>
  #next: DirectoryLine | EntryLine | undefined

  constructor(fd: number) {
    this.#lines = linesOf(fd)
    this.#advance()
  }

  /** The next name of the directory; `undefined` when it has no more. */
  entry(): EntryLine | undefined {
    const line = this.#next
    if (line === undefined || 'directory' in line) return undefined
    this.#advance()
    return line
  }

  /** Goes on to a directory that was recorded, and was not reached yet. */
  directory(path: EntryPath): DirectoryLine {
    for (;;) {
      const line = this.#next
      if (line === undefined) throw new Error(`the record has no directory ${printable(path)}`)
      this.#advance()
      if ('directory' in line && line.directory === path) return line
    }
  }

  #advance(): void {
    const { value, done } = this.#lines.next()
    this.#next = done === true ? undefined : value
  }
}

function* linesOf(fd: number): Generator<DirectoryLine | EntryLine, undefined> {
  let rest = Buffer.alloc(0)
  for (let at = 0; ; at += FLUSH_BYTES) {
    const chunk = readAt(fd, at, FLUSH_BYTES)
    if (chunk.length === 0) return undefined
    const bytes = Buffer.concat([rest, chunk])
    let start = 0
    for (let end = bytes.indexOf(10); end >= 0; end = bytes.indexOf(10, start)) {
      yield JSON.parse(bytes.toString('utf8', start, end)) as DirectoryLine | EntryLine
      start = end + 1
    }
    rest = bytes.subarray(start)
  }
}

const TURN_MS = 20

/** Lets signals and progress through now and then. */
class Pace {
  readonly #options: Pick<RecordViewRequest, 'signal' | 'onProgress'>
  readonly #phase: Progress['phase']
  #entries = 0
  #last = performance.now()

  constructor(options: Pick<RecordViewRequest, 'signal' | 'onProgress'>, phase: Progress['phase']) {
    this.#options = options
    this.#phase = phase
  }

  async turn(entries = this.#entries): Promise<void> {
    this.#entries = entries
    if (performance.now() - this.#last < TURN_MS) return
    await new Promise(setImmediate)
    this.#options.signal?.throwIfAborted()
    this.#options.onProgress?.({ phase: this.#phase, done: entries })
    this.#last = performance.now()
  }
}
