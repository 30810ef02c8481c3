import { createHash } from 'node:crypto'
import { close, errnoOf, type HostPath, LsyncError, type MountOptions, nextData, printable, readAt } from '@lsync/posix'
import { writeAt } from '@lsync/posix'
import { type ComparableTree, type Discrepancy, kindOf, OpenTree, ResolvedTree, type TreeDifference } from './compare.ts'
import type { Namespace } from './model/marks.ts'
import { type EntryPath, join, type Name, ROOT } from './model/path.ts'
import { openTemporaryPlan, type Progress } from './planning.ts'
import { closeStack, openStack } from './stack.ts'
import { mountForReading, type VerifyReport } from './verify.ts'
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
    const { tree, by, why } = openView(request, opened)
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
    const { tree } = openView({ ...request, layers, by: recorded.by }, opened)
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
): { tree: AnyTree; by: 'mount' | 'resolver'; why?: string } {
  let why = 'asked for'
  if (request.by !== 'resolver') {
    try {
      const fd = mountForReading(request, opened)
      opened.push(() => close(fd))
      return { tree: new OpenTree(fd) as AnyTree, by: 'mount' }
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

async function contentOf({ stat, openData }: ShownInode, pace: Pace): Promise<{ content?: string }> {
  return {}
}
