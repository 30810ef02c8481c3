import {
  type ByteString,
  close,
  errnoOf,
  FS_APPEND_FL,
  FS_IMMUTABLE_FL,
  link,
  makeDirectory,
  makeNode,
  makeSymlink,
  O_DIRECTORY,
  O_RDONLY,
  openBeneath,
  PosixError,
  removeXattr,
  setModeAt,
  setModeFd,
  setOwner,
  setTimes,
  setXattr,
  truncate,
  tryClone,
} from '@lsync/posix'
import type { Entry, Meta, Xattr } from '../model/entry.ts'
import type { Namespace } from '../model/marks.ts'
import { type EntryPath, isWithin, type Name, ROOT, split } from '../model/path.ts'
import { TargetCannotHoldError } from '../problems.ts'
import { LayerChangedError, LayerEntryRefusedError } from './errors.ts'
import {
  ACL_ACCESS,
  ACL_DEFAULT,
  fillFrom,
  type InodeKind,
  openDirectory,
  openNew,
  openRegular,
  SPECIAL_MODES,
  writeMeta,
} from './inode.ts'
import { isValidName, type LayerItem, type Loss, type OpenContent } from './item.ts'

/** Takes the items of a layer, a directory before its content, and writes them down. */
export interface LayerSink {
  add(item: LayerItem): void | Promise<void>
  /** Writes what had to wait for the last item. */
  finish(): void | Promise<void>
  /** Gives back descriptors; what was written so far is the caller's to remove. Also after `finish`. */
  close(): void
}

/** What distinguishes the forms that are directory trees. */
export interface TreeForm {
  /** For messages: `a plain tree`. */
  readonly label: string
  /** Whose marks the form uses, so that attributes that look like them are escaped. */
  readonly namespace?: Namespace
  /** @throws {LsyncError} when the form cannot hold the entry */
  check?(entry: Entry): void
  /** Attributes beside the entry's own. `hasWhiteouts`: the directory holds whiteouts. */
  marks?(item: LayerItem, hasWhiteouts: boolean): readonly Xattr[]
  writeWhiteout(dirfd: number, name: Name, path: EntryPath): void
  /** Called for each new directory, before anything is put in it. */
  beginDirectory?(fd: number, item: LayerItem): void
}

export interface TreeSinkOptions {
  readonly form: TreeForm
  /** Leave out what the target cannot hold, and report it, instead of failing. */
  readonly lossy?: boolean
  readonly onLoss?: (loss: Loss) => void
  readonly onBytes?: (bytes: number) => void
}

interface Level {
  readonly item: LayerItem & { entry: Entry & { kind: 'directory' } }
  fd: number
  hasWhiteouts: boolean
}

const OPEN_LEVELS = 64
// What a file system says that has no place for something, as opposed to one that is full or broken.
const CANNOT = new Set(['EPERM', 'ENOTSUP', 'EINVAL', 'E2BIG', 'ERANGE', 'EOVERFLOW', 'ENOSYS', 'ENODATA'])

/** Writes a layer as a tree beneath an open, empty directory. Every name is created exclusively in a held directory. */
export class TreeSink implements LayerSink {
  readonly #rootFd: number
  readonly #options: TreeSinkOptions
  readonly #stack: Level[] = []
  readonly #links = new Map<string, EntryPath>()
  #reflink = true

  constructor(rootFd: number, options: TreeSinkOptions) {
    this.#rootFd = rootFd
    this.#options = options
    // What the parent directory hands down to new directories is no part of the layer.
    removeXattr(rootFd, '', ACL_ACCESS)
    removeXattr(rootFd, '', ACL_DEFAULT)
  }

  add(item: LayerItem): void {
    const { entry } = item
    this.#options.form.check?.(entry)
    if (entry.path === ROOT) {
      if (entry.kind !== 'directory' || this.#stack.length > 0) {
        throw new LayerEntryRefusedError(ROOT, 'the root comes once, first, and is a directory')
      }
      this.#begin({ ...item, entry }, this.#rootFd)
      return
    }
    const { parent, name } = split(entry.path)
    if (!isValidName(name)) throw new LayerEntryRefusedError(entry.path, 'its name is none')
    const level = this.#enter(parent, entry.path)
    try {
      this.#put(item, level, name)
    } catch (error) {
      if (error instanceof PosixError && error.code === 'EEXIST') {
        throw new LayerEntryRefusedError(entry.path, 'the layer has this name twice')
      }
      throw error
    }
  }

  finish(): void {
    while (this.#stack.length > 0) this.#leave()
  }

  close(): void {
    for (const level of this.#stack) if (level.fd >= 0 && level.fd !== this.#rootFd) close(level.fd)
    this.#stack.length = 0
  }

  #begin(item: Level['item'], fd: number): void {
    this.#stack.push({ item, fd, hasWhiteouts: false })
    const far = this.#stack[this.#stack.length - 1 - OPEN_LEVELS]
    if (far !== undefined && far.fd >= 0 && far.fd !== this.#rootFd) {
      close(far.fd)
      far.fd = -1
    }
    this.#options.form.beginDirectory?.(fd, item)
  }

  /** Leaves directories until the one that holds the next item is the innermost. */
  #enter(parent: EntryPath, path: EntryPath): Level {
    for (;;) {
      const level = this.#stack.at(-1)
      if (level === undefined) throw new LayerEntryRefusedError(path, 'its directory is not in the layer')
      const { path: at } = level.item.entry
      if (at === parent) return this.#reopened(level)
      if (isWithin(parent, at)) throw new LayerEntryRefusedError(path, 'its directory is not in the layer')
      this.#leave()
    }
  }

  #reopened(level: Level): Level {
    if (level.fd < 0) level.fd = openBeneath(this.#rootFd, level.item.entry.path, O_RDONLY | O_DIRECTORY)
    return level
  }

  #leave(): void {
    const level = this.#stack.at(-1)
    if (level === undefined) return
    this.#reopened(level)
    this.#writeMeta(level.fd, '', 'directory', level.item, level.hasWhiteouts)
    this.#stack.pop()
    if (level.fd !== this.#rootFd) close(level.fd)
  }

  #put(item: LayerItem, level: Level, name: Name): void {
    const { entry } = item
    const { form } = this.#options
    if (entry.kind === 'directory') {
      makeDirectory(level.fd, name, 0o700)
      this.#begin({ ...item, entry }, openDirectory(level.fd, name))
      return
    }
    if (entry.kind === 'whiteout') {
      level.hasWhiteouts = true
      this.#attempt(entry.path, 'a whiteout', () => form.writeWhiteout(level.fd, name, entry.path))
      return
    }
    if (entry.linkGroup !== undefined) {
      const first = this.#links.get(entry.linkGroup)
      if (first === undefined) this.#links.set(entry.linkGroup, entry.path)
      else if (this.#attempt(entry.path, 'a hard link', () => this.#link(first, level.fd, name))) return
      // The data may have been moved to the first name.
      else if (entry.kind === 'file' && entry.metacopy === undefined) {
        const { takeContent: _, ...rest } = item
        item = { ...rest, openContent: () => this.#openWritten(first) }
      }
    }
    switch (entry.kind) {
      case 'file':
        this.#putFile(item, entry, level.fd, name)
        return
      case 'symlink':
        makeSymlink(entry.target, level.fd, name)
        this.#writeMeta(level.fd, name, 'symlink', item)
        return
      case 'special': {
        const { type, rdev } = entry
        const make = () => makeNode(level.fd, name, SPECIAL_MODES[type] | 0o600, rdev)
        const what = type === 'fifo' || type === 'socket' ? `a ${type}` : `a ${type} device`
        if (this.#attempt(entry.path, what, make)) this.#writeMeta(level.fd, name, 'special', item)
      }
    }
  }

  #openWritten(path: EntryPath): OpenContent {
    const { parent, name } = split(path)
    const dirfd = openBeneath(this.#rootFd, parent, O_RDONLY | O_DIRECTORY)
    try {
      return openRegular(dirfd, name)
    } finally {
      close(dirfd)
    }
  }

  #link(first: EntryPath, dirfd: number, name: Name): void {
    const { parent, name: firstName } = split(first)
    const firstDir = openBeneath(this.#rootFd, parent, O_RDONLY | O_DIRECTORY)
    try {
      link(firstDir, firstName, dirfd, name)
    } finally {
      close(firstDir)
    }
  }

  #putFile(item: LayerItem, entry: Entry & { kind: 'file' }, dirfd: number, name: Name): void {
    if (item.takeContent?.(dirfd, name) === true) {
      this.#writeMeta(dirfd, name, 'file', item)
      this.#options.onBytes?.(entry.sizeBytes)
      return
    }
    const to = openNew(dirfd, name)
    try {
      if (item.openContent !== undefined) this.#fill(item.openContent(), to, entry)
      // A metacopy is a hole of the right size.
      else if (entry.metacopy !== undefined) truncate(to, entry.sizeBytes, entry.path)
      else if (entry.sizeBytes > 0) throw new Error('a file came without its data')
      this.#writeMeta(to, '', 'file', item)
    } finally {
      close(to)
    }
    this.#options.onBytes?.(entry.sizeBytes)
  }

  #fill(content: OpenContent, to: number, entry: Entry & { kind: 'file' }): void {
    const { fd: from, stat } = content
    try {
      if (stat.sizeBytes !== entry.sizeBytes) throw new LayerChangedError(entry.path)
      // Cheaper small than shared: see fillFrom.
      if (this.#reflink && stat.sizeBytes > 16 * 1024) {
        if (tryClone(from, to, entry.path)) return
        this.#reflink = false
      }
      fillFrom(from, to, stat, entry.path, false)
    } finally {
      close(from)
    }
  }

  #writeMeta(dirfd: number, name: ByteString | '', kind: InodeKind, item: LayerItem, hasWhiteouts = false): void {
    const { entry } = item
    if (entry.kind === 'whiteout') return
    const marks = this.#options.form.marks?.(item, hasWhiteouts) ?? []
    if (item.protattr !== undefined && this.#options.form.namespace === undefined) reportProtattr(item, this.#options)
    const meta = marks.length === 0 ? entry.meta : { ...entry.meta, xattrs: [...entry.meta.xattrs, ...marks] }
    try {
      writeMeta(dirfd, name, kind, meta)
    } catch (error) {
      if (!isCannot(error)) throw error
      if (this.#options.lossy !== true) {
        throw cannotHold(entry.path, whatOf(error as PosixError, meta), error)
      }
      this.#writeMetaPiecewise(dirfd, name, kind, meta, entry.path)
    }
  }

  #writeMetaPiecewise(dirfd: number, name: ByteString | '', kind: InodeKind, meta: Meta, path: EntryPath): void {
    this.#attempt(path, `owner ${meta.uid}:${meta.gid}`, () => setOwner(dirfd, name, meta.uid, meta.gid))
    if (kind !== 'symlink') {
      this.#attempt(path, `mode ${meta.mode.toString(8)}`, () =>
        name === '' ? setModeFd(dirfd, meta.mode) : setModeAt(dirfd, name, meta.mode),
      )
    }
    // Sorted by name, so ACLs (system) come before user.* and after capabilities, which chmod keeps.
    for (const xattr of meta.xattrs) {
      this.#attempt(path, `attribute ${xattr.name}`, () => setXattr(dirfd, name, xattr.name, xattr.value))
    }
    this.#attempt(path, 'times', () => setTimes(dirfd, name, meta.atimeNs, meta.mtimeNs))
  }

  /** Whether it could be done; what the target cannot hold is a loss if losses are allowed, else an error. */
  #attempt(path: EntryPath, what: string, act: () => void): boolean {
    try {
      act()
      return true
    } catch (error) {
      if (!isCannot(error)) throw error
      if (this.#options.lossy !== true) throw cannotHold(path, what, error)
      this.#options.onLoss?.({ path, what })
      return false
    }
  }
}

function isCannot(error: unknown): boolean {
  const code = errnoOf(error)
  if (code === undefined) return false
  // ext4 says "no space" to an attribute that does not fit into its inode and block.
  if (code === 'ENOSPC') return (error as PosixError).syscall?.startsWith('setxattr') === true
  return CANNOT.has(code)
}

function whatOf(error: PosixError, meta: Meta): string {
  const { syscall } = error
  if (syscall === 'fchownat') return `owner ${meta.uid}:${meta.gid}`
  if (syscall?.startsWith('setxattr ') === true) return `attribute ${syscall.slice('setxattr '.length)}`
  return syscall === 'utimensat' ? 'times' : `mode ${meta.mode.toString(8)}`
}

/** Names the chattr flags of an inode, which no form carries. */
export function reportInodeFlags({ entry, inodeFlags = 0 }: LayerItem, onLoss: (loss: Loss) => void): void {
  const { path } = entry
  if ((inodeFlags & FS_IMMUTABLE_FL) !== 0) onLoss({ path, what: 'flag immutable (chattr +i)' })
  if ((inodeFlags & FS_APPEND_FL) !== 0) onLoss({ path, what: 'flag append-only (chattr +a)' })
}

/** Names the flags that a view emulates and the form cannot. */
export function reportProtattr(item: LayerItem, options: { readonly onLoss?: (loss: Loss) => void }): void {
  if (item.protattr === undefined) return
  const letters = Buffer.from(item.protattr).toString('latin1')
  options.onLoss?.({ path: item.entry.path, what: `flags of the view (chattr +${letters})` })
}

function cannotHold(path: EntryPath, what: string, cause: unknown): TargetCannotHoldError {
  const hint = 'run as root on another file system, use the portable form, or allow losses (--lossy)'
  return new TargetCannotHoldError(undefined, [{ what, path }], { hint, cause })
}
