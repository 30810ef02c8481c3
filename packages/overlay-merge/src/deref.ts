import {
  type ByteString,
  close,
  FS_APPEND_FL,
  FS_IMMUTABLE_FL,
  getXattr,
  type HostPath,
  LsyncError,
  link,
  makeDirectory,
  makeNode,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_RDONLY,
  openat,
  openBeneath,
  openRoot,
  PosixError,
  printable,
  S_IFCHR,
  statAt,
  statFd,
  syncFileSystem,
  tryLink,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import { copyObject, resultMeta } from './effects.ts'
import { finishDirectory } from './encodings/inode.ts'
import { Journal, placeOf, TREE } from './journal.ts'
import { publish, realTarget } from './merge.ts'
import type { Meta, Xattr } from './model/entry.ts'
import { type EntryPath, join, type Name, ROOT, split } from './model/path.ts'
import type { Problem } from './plan.ts'
import type { Progress } from './planning.ts'
import { LayerInvalidError, OutputExistsError } from './problems.ts'
import { recoverJournal } from './recover.ts'
import { type Directory, layerAt, type Source, type Stack } from './resolve.ts'
import { assertMergeable } from './safety.ts'
import { closeStack, openStack, type StackRequest } from './stack.ts'
import { type Present, realStack, rootFrom, ViewDirectory } from './view.ts'

export interface DerefRequest extends StackRequest {
  /** The upper to make; not there yet. */
  readonly output: HostPath
  /** The workdir of the upper, where it was mounted with index=on. */
  readonly workdir?: HostPath
  /** Only say what would be made. */
  readonly dryRun?: boolean
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: Progress) => void
}

/** What unfolding an upper gave. Sizes in bytes, times in ms. */
export interface DerefReport {
  readonly output: HostPath
  readonly directories: number
  /** Everything that is neither a directory nor a whiteout; names of one inode count each. */
  readonly objects: number
  readonly whiteouts: number
  readonly bytes: number
  readonly unfoldedDirectories: number
  readonly unfoldedFiles: number
  /** What no upper without redirects can hold exactly. Empty for most uppers. */
  readonly inexact: readonly { readonly path: EntryPath; readonly why: string }[]
  readonly dryRun: boolean
  readonly elapsedMs: number
}

/** An upper of which a part is in the index of its workdir, which belongs to this very upper. */
export class IndexUnsupportedError extends LsyncError {
  constructor(path: EntryPath) {
    super('INDEX_UNSUPPORTED', `${printable(path)} has hard links in an index (index=on)`, {
      path,
      hint: 'merge the layers with --workdir instead',
    })
  }
}

/**
 * Makes a new upper that shows the same view over the same lowers without any redirect or metacopy: renamed directories
 * become opaque ones with all their content, metacopies become whole files, whiteouts stay (as devices), link groups
 * stay together. It can then be mounted with `userxattr` after a change of namespace, with `nofollow`, or be exported.
 * Built beside its final name, published by one rename, durable when this returns; `recover` removes what a crash left.
 * @throws {LayerInvalidError} where the kernel could not show the upper either
 */
export async function deref(asked: DerefRequest): Promise<DerefReport> {
  const start = performance.now()
  const request = { ...realStack(asked), output: realTarget(asked.output) }
  const { output, upper, lowers, data = [], workdir } = request
  const dryRun = request.dryRun === true
  if (!dryRun) await clearUnfinished(output)
  const stack = openStack(request, false)
  try {
    assertMergeable({ mode: 'delta', upper, lowers, data, workdir, target: output, stack, dryRun })
    assertFree(output)
    if (dryRun) {
      const unfolding = new Unfolding(stack, undefined)
      await unfolding.run(request)
      return { output, ...unfolding.report(), dryRun, elapsedMs: performance.now() - start }
    }
    const journal = Journal.open(output, { create: true }) as Journal
    try {
      makeDirectory(journal.fd, TREE, 0o700)
      const treeFd = openat(journal.fd, TREE, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
      try {
        const unfolding = new Unfolding(stack, { treeFd, besideFd: journal.fd })
        await unfolding.run(request)
        request.onProgress?.({ phase: 'durable', done: 0 })
        syncFileSystem(treeFd, output)
        publish(journal, output)
        return { output, ...unfolding.report(), dryRun, elapsedMs: performance.now() - start }
      } finally {
        close(treeFd)
      }
    } finally {
      try {
        journal.remove()
      } finally {
        journal.close()
      }
    }
  } finally {
    closeStack(stack)
  }
}

async function clearUnfinished(output: HostPath): Promise<void> {
  const journal = Journal.open(output, { create: false })
  if (journal === undefined) return
  try {
    await recoverJournal(journal, {})
  } finally {
    journal.close()
  }
}

function assertFree(output: HostPath): void {
  const { parent, name } = placeOf(output)
  withFd(openRoot(parent), (fd) => {
    if (tryStatAt(fd, name) !== undefined) throw new OutputExistsError(output)
  })
}

/** A directory of the new upper. */
interface Frame {
  readonly directory: Directory
  /** Nothing from below may show in it, so it gets all that the view has. */
  readonly isClosed: boolean
  readonly meta: Meta
  readonly children: Frame[]
}

const TURN_MS = 20
const WHITEOUT = 'whiteout' as ByteString

/** The tree that is made, and a directory beside it. */
interface Site {
  readonly treeFd: number
  readonly besideFd: number
}

class Unfolding {
  readonly #stack: Stack
  readonly #site: Site | undefined
  readonly #first = new Map<string, { path: EntryPath; layer: number; nlink: number; count: number }>()
  readonly #problems: Problem[] = []
  readonly #inexact: DerefReport['inexact'][number][] = []
  #directories = 0
  #objects = 0
  #whiteouts = 0
  #bytes = 0
  #unfoldedDirectories = 0
  #unfoldedFiles = 0
  #reflink = true

  /** Without a site it only counts. */
  constructor(stack: Stack, site: Site | undefined) {
    this.#stack = stack
    this.#site = site
  }

  async run({ signal, onProgress }: Pick<DerefRequest, 'signal' | 'onProgress'>): Promise<void> {
    const root = rootFrom(this.#stack, 0)
    const upper = layerAt(this.#stack, 0)
    const stat = statFd(upper.fd)
    if (stat.isProtected) {
      this.#inexact.push({ path: ROOT, why: 'its flags (chattr) would be in the way of the mount of an upper' })
    }
    const meta = resultMeta(upper.fd, '', stat, upper.marks, false)
    const frames: Frame[] = [this.#enter({ directory: root, isClosed: false, meta, children: [] })]
    let turn = performance.now()
    for (let frame = frames.at(-1); frame !== undefined; frame = frames.at(-1)) {
      if (performance.now() - turn > TURN_MS) {
        await new Promise(setImmediate)
        signal?.throwIfAborted()
        onProgress?.({ phase: 'apply', done: this.#objects })
        turn = performance.now()
      }
      const child = frame.children.pop()
      if (child !== undefined) frames.push(this.#enter(child))
      else {
        this.#leave(frame)
        frames.pop()
      }
    }
    if (this.#problems.length > 0) throw new LayerInvalidError(this.#problems)
    this.#reportSplitGroups()
  }

  report(): Omit<DerefReport, 'output' | 'dryRun' | 'elapsedMs'> {
    return {
      directories: this.#directories,
      objects: this.#objects,
      whiteouts: this.#whiteouts,
      bytes: this.#bytes,
      unfoldedDirectories: this.#unfoldedDirectories,
      unfoldedFiles: this.#unfoldedFiles,
      inexact: this.#inexact,
    }
  }

  #enter(frame: Frame): Frame {
    const view = new ViewDirectory(this.#stack, frame.directory)
    try {
      const { path } = frame.directory
      const fill = (to: number | undefined) => {
        for (const name of frame.isClosed ? view.candidates() : view.topCandidates()) this.#name(view, name, frame, to)
      }
      if (this.#site === undefined) fill(undefined)
      else withFd(openBeneath(this.#site.treeFd, path, O_DIRECTORY | O_NOFOLLOW), fill)
      return frame
    } finally {
      view.close()
    }
  }

  #name(view: ViewDirectory, name: Name, frame: Frame, to: number | undefined): void {
    const path = join(frame.directory.path, name)
    const found = view.find(name)
    switch (found.kind) {
      case 'absent':
        if (!frame.isClosed) this.#whiteout(to, name)
        return
      case 'broken':
        this.#problems.push({ path, code: found.errno, why: found.why })
        return
      case 'object':
        this.#object(view, found, path, to)
        return
      case 'directory':
        if (to !== undefined) makeDirectory(to, name, 0o700)
        frame.children.push(this.#child(view, name, found, frame))
    }
  }

  #whiteout(to: number | undefined, name: Name): void {
    this.#whiteouts++
    if (this.#site === undefined || to === undefined) return
    const { besideFd } = this.#site
    // As the kernel does: all whiteouts are one inode, as long as it takes links.
    const code = tryLink(besideFd, WHITEOUT, to, name)
    if (code === undefined) return
    if (code !== 'ENOENT' && code !== 'EMLINK') throw new PosixError(code, { syscall: 'linkat', path: name })
    makeNode(to, name, S_IFCHR, 0)
    if (code === 'ENOENT') link(to, name, besideFd, WHITEOUT)
  }

  #child(view: ViewDirectory, name: Name, found: Extract<Present, { kind: 'directory' }>, frame: Frame): Frame {
    const { dirfd, source } = view.locate(found)
    const { marks } = layerAt(this.#stack, source.layer)
    const { top } = found
    const stat = statAt(dirfd, name)
    const isRenamed = top.redirect !== undefined && !top.opaque && source.layer === 0
    const isClosed = frame.isClosed || top.opaque || (isRenamed && !this.#mergesByName(view, name, found.directory))
    if (isClosed && isRenamed) this.#unfoldedDirectories++
    const meta = resultMeta(dirfd, name, stat, marks, false)
    const own: Xattr[] = [...meta.xattrs, ...this.#protection(view, found)]
    if (isClosed && !frame.isClosed) own.push({ name: layerAt(this.#stack, 0).marks.opaque, value: Buffer.from('y') })
    return { directory: found.directory, isClosed, meta: { ...meta, xattrs: own }, children: [] }
  }

  // An absolute redirect to the directory's own place, as a rename there and back leaves it.
  #mergesByName(view: ViewDirectory, name: Name, directory: Directory): boolean {
    const beneath = view.findBeneath(name)
    if (beneath.kind !== 'directory') return false
    const [, ...merged] = directory.sources
    const { sources } = beneath.directory
    return (
      merged.length === sources.length &&
      merged.every(({ layer, path }, index) => sources[index]?.layer === layer && sources[index]?.path === path)
    )
  }

  /** Flags that the view shows become the mark by which an upper shows them: real ones would stop the kernel itself. */
  #protection(view: ViewDirectory, found: Present): Xattr[] {
    const { protattr } = layerAt(this.#stack, 0).marks
    const inode = view.shown(found)
    const { source, dirfd, name } = view.locate(found)
    const hasMark = source.layer === 0 && found.top.attributes.includes(protattr)
    const mark = hasMark ? (getXattr(dirfd, name, protattr)?.toString('latin1') ?? '') : ''
    const flags = inode.stat.isProtected ? inode.flags : 0
    const isImmutable = mark.includes('i') || (flags & FS_IMMUTABLE_FL) !== 0
    const isAppendOnly = mark.includes('a') || (flags & FS_APPEND_FL) !== 0
    const letters = `${isImmutable ? 'i' : ''}${isAppendOnly ? 'a' : ''}`
    return letters === '' ? [] : [{ name: protattr, value: Buffer.from(letters) }]
  }

  #object(
    view: ViewDirectory,
    found: Extract<Present, { kind: 'object' }>,
    path: EntryPath,
    to: number | undefined,
  ): void {
    const { source, dirfd, name: from } = view.locate(found)
    const { name } = split(path)
    const inode = view.shown(found)
    const { stat, group } = inode
    this.#objects++
    if (source.layer === 0 && found.top.attributes.includes(layerAt(this.#stack, 0).marks.nlink)) {
      throw new IndexUnsupportedError(path)
    }
    if (found.top.metacopy !== undefined) this.#unfoldedFiles++
    if (stat.nlink > 1) {
      const first = this.#first.get(group)
      if (first !== undefined) {
        first.count++
        this.#linkTo(first.path, to, name)
        return
      }
      this.#first.set(group, { path, layer: source.layer, nlink: stat.nlink, count: 1 })
    }
    const meta = resultMeta(dirfd, from, stat, layerAt(this.#stack, source.layer).marks, false)
    const xattrs = [...meta.xattrs, ...this.#protection(view, found)]
    const request = { fromDir: dirfd, from, stat, meta: { ...meta, xattrs }, reflink: this.#reflink }
    const { data } = found
    if (data.layer === 'below') throw new Error('a stack without anything below it has all its data')
    if (data.layer !== source.layer || data.path !== source.path) {
      this.#copyWithData(request, { layer: data.layer, path: data.path }, to, name, path)
    } else if (to !== undefined) copyObject(request, to, name, {})
    this.#bytes += stat.isFile ? stat.sizeBytes : 0
  }

  #copyWithData(
    request: Parameters<typeof copyObject>[0],
    data: Source,
    to: number | undefined,
    name: Name,
    path: EntryPath,
  ): void {
    const at = split(data.path)
    withFd(openBeneath(layerAt(this.#stack, data.layer).fd, at.parent, O_DIRECTORY | O_NOFOLLOW), (dir) => {
      const { sizeBytes } = statAt(dir, at.name)
      if (sizeBytes !== request.stat.sizeBytes) {
        const why = `its data has ${sizeBytes} bytes and not ${request.stat.sizeBytes}: the lower was changed`
        this.#inexact.push({ path, why })
      }
      if (to !== undefined) copyObject({ ...request, data: { dir, name: at.name } }, to, name, {})
    })
  }

  #linkTo(first: EntryPath, to: number | undefined, name: Name): void {
    if (this.#site === undefined || to === undefined) return
    const at = split(first)
    withFd(openBeneath(this.#site.treeFd, at.parent, O_DIRECTORY | O_NOFOLLOW), (dirfd) =>
      link(dirfd, at.name, to, name),
    )
  }

  // Nothing changes in a directory any more once all below it is done.
  #leave(frame: Frame): void {
    this.#directories++
    if (this.#site === undefined) return
    withFd(openBeneath(this.#site.treeFd, frame.directory.path, O_DIRECTORY | O_NOFOLLOW), (fd) =>
      finishDirectory(fd, frame.meta, { removeOthers: (attribute) => attribute !== 'security.selinux' }),
    )
  }

  #reportSplitGroups(): void {
    for (const { path, layer, nlink, count } of this.#first.values()) {
      if (layer === 0 || count === nlink) continue
      this.#inexact.push({ path, why: 'it shares its inode with names outside the renamed directory' })
    }
  }
}
