import {
  type ByteString,
  DT_CHR,
  DT_REG,
  DT_UNKNOWN,
  getInodeFlags,
  getXattr,
  readDirents,
  readSymlink,
  S_IFBLK,
  S_IFCHR,
  S_IFDIR,
  S_IFIFO,
  S_IFLNK,
  S_IFREG,
  S_IFSOCK,
  type Stat,
  statFd,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import type { Entry, Meta, WhiteoutForm, Xattr } from '../model/entry.ts'
import { isMark, MARKS, type MarkNames, type Namespace, opaqueMeaning, parseRedirect } from '../model/marks.ts'
import { type EntryPath, join, ROOT } from '../model/path.ts'
import { MarkInvalidError, NeedsDerefError } from './errors.ts'
import { createWhiteout, metaOf, openDirectory, openRegular, readXattrs } from './inode.ts'
import type { LayerItem, ReadOptions } from './item.ts'
import type { TreeForm } from './tree-sink.ts'
import { linkGroupOf, MountGuard, type TreeReader, walkTree } from './walk.ts'

/** An inode as it stands in a layer, before its marks are understood. `meta.xattrs` holds the marks too. */
export type RawInode =
  | { readonly kind: 'file'; readonly meta: Meta; readonly sizeBytes: number; readonly linkGroup?: string }
  | { readonly kind: 'directory'; readonly meta: Meta }
  | { readonly kind: 'symlink'; readonly meta: Meta; readonly target: ByteString; readonly linkGroup?: string }
  | {
      readonly kind: 'special'
      readonly meta: Meta
      readonly type: 'fifo' | 'socket' | 'character' | 'block'
      readonly rdev: number
      readonly linkGroup?: string
    }

/**
 * What an inode means in a layer whose marks these are: whiteouts in both forms, opaque, redirect, metacopy. Marks of
 * identity (origin, impure, nlink, uuid, upper) are dropped, since they are wrong in any other place.
 * @throws {MarkInvalidError} where the kernel's lookup would fail (redirect values, metacopy headers)
 * Source: overlay-format §1–5.
 */
export function decodeKernelInode(
  path: EntryPath,
  raw: RawInode,
  marks: MarkNames,
): { entry: Entry; protattr?: Uint8Array } {
  if (raw.kind === 'special') {
    if (raw.type === 'character' && raw.rdev === 0) return { entry: { kind: 'whiteout', path, form: 'device' } }
  }
  const found = raw.meta.xattrs.some((xattr) => isMark(xattr.name, marks))
    ? new Map(raw.meta.xattrs.filter((xattr) => isMark(xattr.name, marks)).map(({ name, value }) => [name, value]))
    : undefined
  if (found === undefined) return { entry: plainEntry(path, raw) }
  const meta: Meta = { ...raw.meta, xattrs: raw.meta.xattrs.filter((xattr) => !isMark(xattr.name, marks)) }
  const protattr = found.get(marks.protattr)
  const extra = protattr === undefined ? {} : { protattr }
  if (raw.kind === 'directory') {
    // On the root both mean nothing.
    const opaque = path !== ROOT && opaqueMeaning(found.get(marks.opaque)) === 'closed'
    const redirect = path === ROOT ? {} : redirectOf(path, found.get(marks.redirect))
    return { entry: { kind: 'directory', path, meta, opaque, ...redirect }, ...extra }
  }
  if (raw.kind !== 'file') return { entry: plainEntry(path, { ...raw, meta }), ...extra }
  if (raw.sizeBytes === 0 && found.has(marks.whiteout)) return { entry: { kind: 'whiteout', path, form: 'xattr' } }
  const value = found.get(marks.metacopy)
  // A redirect on a file with its own data is a leftover that means nothing.
  if (value === undefined) return { entry: plainEntry(path, { ...raw, meta }), ...extra }
  if (value.length > 0 && value.length < 4) throw new MarkInvalidError(path, 'its metacopy mark is too short')
  const digest = value.length === 0 ? {} : { digest: value }
  const metacopy = { ...redirectOf(path, found.get(marks.redirect)), ...digest }
  return { entry: { ...fileEntry(path, { ...raw, meta }), metacopy }, ...extra }
}

function redirectOf(path: EntryPath, value: Uint8Array | undefined) {
  if (value === undefined) return {}
  const parsed = parseRedirect(value)
  if (!parsed.ok) throw new MarkInvalidError(path, `its redirect is one that the kernel refuses (${parsed.errno})`)
  return { redirect: parsed.redirect }
}

function fileEntry(path: EntryPath, raw: RawInode & { kind: 'file' }) {
  const { meta, sizeBytes, linkGroup } = raw
  return { kind: 'file', path, meta, sizeBytes, ...(linkGroup === undefined ? {} : { linkGroup }) } as const
}

/** The entry of an inode whose attributes mean nothing to the form. */
export function plainEntry(path: EntryPath, raw: RawInode): Entry {
  switch (raw.kind) {
    case 'file':
      return fileEntry(path, raw)
    case 'directory':
      return { kind: 'directory', path, meta: raw.meta, opaque: false }
    case 'symlink':
    case 'special':
      return { ...raw, path }
  }
}

/** Reads the inode `name` in an open directory, all attributes included. */
export function readInode(dirfd: number, name: ByteString, stat: Stat): RawInode {
  const meta = metaOf(stat, readXattrs(dirfd, name))
  const group = linkGroupOf(stat)
  switch (stat.type) {
    case S_IFREG:
      return { kind: 'file', meta, sizeBytes: stat.sizeBytes, ...group }
    case S_IFDIR:
      return { kind: 'directory', meta }
    case S_IFLNK:
      return { kind: 'symlink', meta, target: readSymlink(dirfd, name), ...group }
    case S_IFIFO:
      return { kind: 'special', meta, type: 'fifo', rdev: 0, ...group }
    case S_IFSOCK:
      return { kind: 'special', meta, type: 'socket', rdev: 0, ...group }
    case S_IFCHR:
      return { kind: 'special', meta, type: 'character', rdev: stat.rdev, ...group }
    case S_IFBLK:
      return { kind: 'special', meta, type: 'block', rdev: stat.rdev, ...group }
    default:
      throw new MarkInvalidError(name, 'its type is unknown')
  }
}

/** Reads the root of a layer by its open fd. */
export function readRootInode(fd: number): RawInode & { kind: 'directory' } {
  return { kind: 'directory', meta: metaOf(statFd(fd), readXattrs(fd, '')) }
}

/**
 * A layer directory as the kernel has it, marks of one namespace understood and both forms of whiteouts. Holds the
 * names of one directory per level. `rootFd` stays the caller's; several readers may run at once.
 *
 * `trusted.*` attributes are invisible without CAP_SYS_ADMIN, silently: the caller checks for it first.
 * @throws {MarkInvalidError | SubmountError | PosixError}
 */
export function readKernelLayer(
  rootFd: number,
  options: ReadOptions & { readonly namespace: Namespace },
): Generator<LayerItem, void, undefined> {
  const marks = MARKS[options.namespace]
  const guard = new MountGuard(rootFd)
  const reader: TreeReader = {
    root: (fd) => completed(decodeKernelInode(ROOT, readRootInode(fd), marks), fd, '.' as ByteString, statFd(fd)),
    list: (fd) => listNames(fd, marks, options.order === 'whiteouts-first'),
    read(fd, path, name) {
      const stat = tryStatAt(fd, name)
      if (stat === undefined) return undefined
      const full = join(path, name)
      guard.check(full, stat)
      if (stat.isWhiteoutDevice) return { entry: { kind: 'whiteout', path: full, form: 'device' } }
      return completed(decodeKernelInode(full, readInode(fd, name, stat), marks), fd, name, stat)
    },
  }
  return walkTree(rootFd, reader)
}

/** The item with its way to the data, where it has data of its own, and with its flags, where it has any. */
export function completed(item: LayerItem, dirfd: number, name: ByteString, stat: Stat): LayerItem {
  const { entry } = item
  const flagged = stat.isProtected ? { ...item, inodeFlags: flagsOf(dirfd, name, entry) } : item
  if (entry.kind !== 'file' || entry.metacopy !== undefined) return flagged
  return { ...flagged, openContent: () => openRegular(dirfd, name) }
}

function flagsOf(dirfd: number, name: ByteString, entry: Entry): number {
  if (entry.kind === 'file') return withFd(openRegular(dirfd, name).fd, getInodeFlags)
  return entry.kind === 'directory' ? withFd(openDirectory(dirfd, name), getInodeFlags) : 0
}

function listNames(fd: number, marks: MarkNames, whiteoutsFirst: boolean): ByteString[] {
  const names: ByteString[] = []
  const whiteouts: ByteString[] = []
  const doubtful: [ByteString, number][] = []
  readDirents(fd, (name, type) => {
    // Other calls must wait until the listing is done.
    if (whiteoutsFirst && (type === DT_CHR || type === DT_REG || type === DT_UNKNOWN)) doubtful.push([name, type])
    else names.push(name)
  })
  for (const [name] of doubtful) (isWhiteout(fd, name, marks) ? whiteouts : names).push(name)
  names.sort()
  return whiteouts.length === 0 ? names : [...whiteouts.sort(), ...names]
}

function isWhiteout(fd: number, name: ByteString, marks: MarkNames): boolean {
  const stat = tryStatAt(fd, name)
  if (stat === undefined) return false
  if (stat.isWhiteoutDevice) return true
  return stat.isFile && stat.sizeBytes === 0 && getXattr(fd, name, marks.whiteout) !== undefined
}

const YES = Buffer.from('y')
const HINT = Buffer.from('x')
const EMPTY = Buffer.alloc(0)

/**
 * The marks that an entry carries in a kernel layer. `hasXattrWhiteouts`: the directory holds some, so that the kernel
 * must be told to look for them when it lists the directory.
 */
export function marksOf(item: LayerItem, marks: MarkNames, hasXattrWhiteouts = false): Xattr[] {
  const { entry, protattr } = item
  const xattrs: Xattr[] = []
  if (entry.kind === 'directory') {
    if (entry.opaque && entry.path !== ROOT) xattrs.push({ name: marks.opaque, value: YES })
    else if (hasXattrWhiteouts) xattrs.push({ name: marks.opaque, value: HINT })
    if (entry.redirect !== undefined)
      xattrs.push({ name: marks.redirect, value: Buffer.from(entry.redirect, 'latin1') })
  }
  if (entry.kind === 'file' && entry.metacopy !== undefined) {
    const { redirect, digest } = entry.metacopy
    xattrs.push({ name: marks.metacopy, value: digest ?? EMPTY })
    if (redirect !== undefined) xattrs.push({ name: marks.redirect, value: Buffer.from(redirect, 'latin1') })
  }
  if (protattr !== undefined) xattrs.push({ name: marks.protattr, value: protattr })
  return xattrs
}

/**
 * How a kernel layer is written. `whiteouts: 'device'` suits an upper and a lower; `'xattr'` only a lower, on a file
 * system without device nodes.
 */
export function kernelTreeForm(namespace: Namespace, whiteouts: WhiteoutForm): TreeForm {
  const marks = MARKS[namespace]
  const label = `a kernel layer in ${namespace}.overlay`
  return {
    label,
    namespace,
    marks: (item, hasWhiteouts) => marksOf(item, marks, hasWhiteouts && whiteouts === 'xattr'),
    check(entry) {
      if (namespace === 'trusted') return
      // A mount with userxattr follows no redirects, and knows metacopies only into data-only layers.
      if (entry.kind === 'directory' && entry.redirect !== undefined) {
        throw new NeedsDerefError(entry.path, label, 'redirect')
      }
      if (entry.kind === 'file' && entry.metacopy !== undefined && entry.metacopy.redirect?.startsWith('/') !== true) {
        throw new NeedsDerefError(entry.path, label, 'metacopy')
      }
    },
    writeWhiteout: (dirfd, name) => createWhiteout(dirfd, name, whiteouts, marks),
  }
}
