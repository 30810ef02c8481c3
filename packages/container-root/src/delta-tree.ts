import { isMark, MARKS, type MarkNames, type Namespace, readXattrs, writeMeta } from '@lsync/overlay-merge'
import {
  AT_FDCWD,
  type ByteString,
  DT_DIR,
  DT_UNKNOWN,
  getXattr,
  type HostPath,
  listXattrs,
  makeDirectory,
  makeNode,
  O_NOFOLLOW,
  openBeneath,
  openRoot,
  readDirents,
  S_IFCHR,
  statAt,
  statFd,
  tryLink,
  withFd,
} from '@lsync/posix'
import type { Difference, Differences, TreePath } from '@lsync/sync'
import { DIRECTORY_FLAGS } from './directory.ts'
import type { Changed } from './last-delta.ts'

export interface DeltaRequest {
  /** Nobody writes to it meanwhile. */
  readonly upper: HostPath
  /** What the copy of the upper, which will lie beneath the delta, has otherwise. */
  readonly differences: Differences
  readonly namespace: Namespace
  /** The directory to be made, on the upper's file system: files are hard links of those in the upper. */
  readonly to: HostPath
}

/** Why a difference cannot be a layer of its own on top of the copy. */
class Inexpressible extends Error {}

/** The one value of the opaque mark that closes a directory: `y`. */
const CLOSED = 0x79

/**
 * Makes a layer which, laid over the copy of an upper, shows what the upper shows: what changed as a whole, whiteouts for what went, and
 * directories that lead there, open towards the copy. Gives `undefined` where no such layer says it exactly: redirects, whose
 * meaning depends on what lies directly beneath, and directories that would have to hide the copy and show what it lies on.
 * What is there then is for the caller to remove. Names are counted with whiteouts, without directories that only lead to others.
 */
export function buildDelta(request: DeltaRequest): Changed | undefined {
  try {
    return withFd(openRoot(request.upper, O_NOFOLLOW), (upperFd) => new DeltaTree(request, upperFd).build())
  } catch (error) {
    if (error instanceof Inexpressible) return undefined
    throw error
  }
}

class DeltaTree {
  readonly #upperFd: number
  readonly #request: DeltaRequest
  readonly #marks: MarkNames
  #toFd = -1
  /** Directories of the delta, parents first: open towards the copy, or as they are in the upper, with their marks. */
  readonly #directories = new Map<TreePath, 'open' | 'exact'>()
  /** Of the exact ones, those that have to hide something of the copy. */
  readonly #closed = new Set<TreePath>()
  #names = 0
  #bytes = 0

  constructor(request: DeltaRequest, upperFd: number) {
    this.#request = request
    this.#upperFd = upperFd
    this.#marks = MARKS[request.namespace]
  }

  build(): Changed {
    const { to, differences } = this.#request
    makeDirectory(AT_FDCWD, to, 0o700)
    return withFd(openRoot(to, O_NOFOLLOW), (toFd) => {
      this.#toFd = toFd
      this.#directories.set('' as TreePath, 'open')
      for (const difference of differences.names) if (difference.path !== '') this.#add(difference)
      // Each directory's times would change with what is made in it.
      for (const [path, form] of [...this.#directories].reverse()) this.#finish(path, form)
      return { names: this.#names, bytes: this.#bytes }
    })
  }

  #add({ path, had, has, isSameInode, hasSameAttributes }: Difference): void {
    if (this.#isInCopiedTree(path)) return
    switch (has) {
      case 'nothing':
        // A whiteout that goes uncovers what lies beneath the copy.
        if (had === 'whiteout') throw new Inexpressible()
        this.#whiteOut(path)
        return
      case 'whiteout':
        this.#whiteOut(path)
        return
      case 'directory':
        // It goes on with what the copy has there, and with the marks that it has there.
        if (isSameInode && (hasSameAttributes || !this.#hasLayerMarks(path))) {
          this.#open(path)
          this.#names++
          return
        }
        if (had !== 'nothing' && !this.#hidesBelow(path)) throw new Inexpressible()
        this.#lead(path)
        this.#copyTree(path, had !== 'nothing')
        return
      case 'other':
        // Its data would be looked for in the copy first.
        if (had !== 'nothing' && !hasSameAttributes && this.#marksOf(path).includes(this.#marks.metacopy)) {
          throw new Inexpressible()
        }
        this.#lead(path)
        this.#in(this.#upperFd, path, (from, name) => this.#in(this.#toFd, path, (to) => this.#link(from, name, to)))
    }
  }

  #isInCopiedTree(path: TreePath): boolean {
    for (let end = path.lastIndexOf('/'); end > 0; end = path.lastIndexOf('/', end - 1)) {
      if (this.#directories.get(path.slice(0, end) as TreePath) === 'exact') return true
    }
    return false
  }

  /** Attributes of a name in the upper. */
  #marksOf(path: TreePath): readonly ByteString[] {
    return path === ''
      ? listXattrs(this.#upperFd, '')
      : this.#in(this.#upperFd, path, (fd, name) => listXattrs(fd, name))
  }

  /** Whether a directory says of itself how it goes on below. */
  #hasLayerMarks(path: TreePath): boolean {
    const { opaque, redirect } = this.#marks
    const attributes = this.#marksOf(path)
    return attributes.includes(opaque) || attributes.includes(redirect)
  }

  /** Whether a directory of the upper shows nothing of what lies beneath the upper. */
  #hidesBelow(path: TreePath): boolean {
    for (let at: string = path; ; at = at.slice(0, Math.max(0, at.lastIndexOf('/')))) {
      const isClosed = withFd(openBeneath(this.#upperFd, at as TreePath, DIRECTORY_FLAGS), (fd) => {
        const opaque = getXattr(fd, '', this.#marks.opaque)
        return opaque?.length === 1 && opaque[0] === CLOSED
      })
      if (isClosed || at === '') return isClosed
    }
  }

  /** The directories on the way to a name. */
  #lead(path: TreePath): void {
    const slash = path.lastIndexOf('/')
    if (slash >= 0) this.#open(path.slice(0, slash) as TreePath)
  }

  #open(path: TreePath): void {
    if (this.#directories.has(path)) return
    this.#lead(path)
    this.#make(path, 'open')
  }

  #make(path: TreePath, form: 'open' | 'exact'): void {
    this.#in(this.#toFd, path, (fd, name) => makeDirectory(fd, name, 0o700))
    this.#directories.set(path, form)
  }

  #whiteOut(path: TreePath): void {
    this.#lead(path)
    this.#in(this.#toFd, path, (fd, name) => makeNode(fd, name, S_IFCHR, 0))
    this.#names++
  }

  #link(from: number, name: ByteString, to: number): void {
    const stat = statAt(from, name)
    this.#names++
    // All whiteouts of an upper are one inode, which has as many names as it can have.
    if (stat.isWhiteoutDevice) {
      makeNode(to, name, S_IFCHR, 0)
      return
    }
    // What cannot be linked (chattr +i, +a) no image could hold exactly.
    if (tryLink(from, name, to, name) !== undefined) throw new Inexpressible()
    if (!stat.isFile) return
    this.#bytes += stat.sizeBytes
    const { whiteout, redirect } = this.#marks
    const attributes = listXattrs(from, name)
    if (this.#isBetween && (attributes.includes(whiteout) || attributes.includes(redirect))) throw new Inexpressible()
  }

  /** Something is between the delta and what lies beneath the upper. */
  get #isBetween(): boolean {
    return !this.#request.differences.isTargetEmpty
  }

  /** A directory that the copy lacks, with all in it. `isClosed`: the copy has something else there. */
  #copyTree(path: TreePath, isClosed: boolean): void {
    this.#make(path, 'exact')
    this.#names++
    if (isClosed) this.#closed.add(path)
    const children: ByteString[] = []
    withFd(openBeneath(this.#upperFd, path, DIRECTORY_FLAGS), (from) =>
      withFd(openBeneath(this.#toFd, path, DIRECTORY_FLAGS), (to) => {
        if (this.#isBetween && getXattr(from, '', this.#marks.redirect) !== undefined) throw new Inexpressible()
        readDirents(from, (name, type) => {
          if (type === DT_DIR || (type === DT_UNKNOWN && statAt(from, name).isDirectory)) children.push(name)
          else this.#link(from, name, to)
        })
      }),
    )
    for (const name of children) this.#copyTree(`${path}/${name}` as TreePath, false)
  }

  /** Gives a directory its metadata, once everything is in it. */
  #finish(path: TreePath, form: 'open' | 'exact'): void {
    const { opaque, redirect, metacopy, whiteout, protattr } = this.#marks
    const kept = new Set<string>(form === 'exact' ? [opaque, redirect, metacopy, whiteout, protattr] : [protattr])
    withFd(openBeneath(this.#upperFd, path, DIRECTORY_FLAGS), (from) =>
      withFd(openBeneath(this.#toFd, path, DIRECTORY_FLAGS), (to) => {
        const stat = statFd(from)
        if (stat.isProtected) throw new Inexpressible()
        const { permissions: mode, uid, gid, atimeNs, mtimeNs } = stat
        const found = readXattrs(from, '', (name) => kept.has(name) || !isMark(name, this.#marks))
        const xattrs = this.#closed.has(path)
          ? [...found.filter(({ name }) => name !== opaque), { name: opaque, value: Buffer.of(CLOSED) }]
          : found
        writeMeta(to, '', 'directory', { mode, uid, gid, atimeNs, mtimeNs, xattrs }, {})
      }),
    )
  }

  #in<T>(root: number, path: TreePath, use: (fd: number, name: ByteString) => T): T {
    const slash = path.lastIndexOf('/')
    const parent = (slash < 0 ? '' : path.slice(0, slash)) as TreePath
    const name = path.slice(slash + 1) as ByteString
    return withFd(openBeneath(root, parent, DIRECTORY_FLAGS), (fd) => use(fd, name))
  }
}
