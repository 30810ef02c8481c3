import {
  allocate,
  type ByteString,
  close,
  copyData,
  errnoOf,
  getInodeFlags,
  getXattr,
  LsyncError,
  listsAcls,
  listXattrs,
  makeDirectory,
  makeNode,
  makeSymlink,
  O_CREAT,
  O_DIRECTORY,
  O_EXCL,
  O_NOATIME,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_PATH,
  O_RDONLY,
  O_WRONLY,
  openat,
  printable,
  readInto,
  removeXattr,
  S_IFBLK,
  S_IFCHR,
  S_IFIFO,
  S_IFSOCK,
  type Stat,
  setInodeFlags,
  setModeAt,
  setModeFd,
  setOwner,
  setTimes,
  setXattr,
  statFd,
  withFd,
  writeFrom,
} from '@lsync/posix'
import type { Meta, WhiteoutForm, Xattr } from '../model/entry.ts'
import type { MarkNames } from '../model/marks.ts'

/** A name turned out to be another kind of inode when it was opened: somebody changed the layer meanwhile. */
export class NotAFileError extends LsyncError {
  constructor(path: string) {
    super('NOT_A_FILE', `${printable(path)} is no longer a regular file`, {
      path,
      hint: 'stop whatever changes the layer, then start again',
    })
  }
}

export type InodeKind = 'file' | 'directory' | 'symlink' | 'special'
export type SpecialType = 'fifo' | 'socket' | 'character' | 'block'

export const ACL_ACCESS = 'system.posix_acl_access' as ByteString
export const ACL_DEFAULT = 'system.posix_acl_default' as ByteString
export const CAPABILITY = 'security.capability' as ByteString

const NO_XATTRS: readonly Xattr[] = []
// An ACL of owner, group and others alone says what the mode says. The kernel's file systems drop such a one; what
// `setfacl -b` leaves on MooseFS is one. Source: linux/posix_acl_xattr.h, a header of 4 bytes and 8 for each entry.
const ACL_OF_MODE_BYTES = 4 + 3 * 8
/** The type bits of `st_mode` of a special file. */
export const SPECIAL_MODES: Readonly<Record<SpecialType, number>> = {
  fifo: S_IFIFO,
  socket: S_IFSOCK,
  character: S_IFCHR,
  block: S_IFBLK,
}
// Below this size one read and one write are cheaper than a reflink or the search for holes (measured on ext4, xfs).
const SMALL_BYTES = 16 * 1024
const small = allocate(SMALL_BYTES)

/**
 * The attributes of `name` beneath `dirfd` (of the fd itself for `''`) that `keep` wants (all, without it), sorted by
 * name bytes. ACLs are among them also where the file system does not list them. One list call where there are none, and
 * one more to find out what the file system lists where the caller does not say (`lists`, from `listsAcls`).
 */
export function readXattrs(
  dirfd: number,
  name: ByteString | '',
  keep?: (attribute: ByteString) => boolean,
  lists: boolean = listsAcls(dirfd),
): readonly Xattr[] {
  const names = listXattrs(dirfd, name)
  const hidden = hiddenAcls(dirfd, name, names, lists)
  if (names.length === 0 && hidden.length === 0) return NO_XATTRS
  const xattrs: Xattr[] = []
  for (const attribute of names.sort()) {
    if (isStorageXattr(attribute) || (keep !== undefined && !keep(attribute))) continue
    const value = getXattr(dirfd, name, attribute)
    // Listed and gone again: somebody removed it in between, which is the same as never having been there.
    if (value !== undefined) xattrs.push({ name: attribute, value })
  }
  if (hidden.length === 0) return xattrs
  return [...xattrs, ...hidden].sort((left, right) => (left.name < right.name ? -1 : 1))
}

/**
 * The ACLs of an inode that its file system has and does not list; `listed` are the attributes that it lists, `lists` is what
 * `listsAcls` says.
 */
export function hiddenAcls(
  dirfd: number,
  name: ByteString | '',
  listed: readonly ByteString[],
  lists: boolean,
): readonly Xattr[] {
  if (lists) return NO_XATTRS
  const found: Xattr[] = []
  for (const attribute of [ACL_ACCESS, ACL_DEFAULT]) {
    if (listed.includes(attribute)) continue
    const value = getXattr(dirfd, name, attribute)
    if (value === undefined || (attribute === ACL_ACCESS && value.length <= ACL_OF_MODE_BYTES)) continue
    found.push({ name: attribute, value })
  }
  return found
}

/**
 * What an inode carries besides its data. `stat` is the caller's fresh stat of the same name. `keep` leaves overlay
 * marks out: `(name) => !isMark(name, marks)`.
 */
export function readMeta(
  dirfd: number,
  name: ByteString | '',
  stat: Stat,
  keep?: (attribute: ByteString) => boolean,
): Meta {
  return metaOf(stat, readXattrs(dirfd, name, keep))
}

/** The `Meta` of a stat and of attributes that were read already. */
export function metaOf(stat: Stat, xattrs: readonly Xattr[] = NO_XATTRS): Meta {
  return {
    mode: stat.permissions,
    uid: stat.uid,
    gid: stat.gid,
    atimeNs: stat.atimeNs,
    mtimeNs: stat.mtimeNs,
    xattrs,
  }
}

/** Whether what is created in this open directory gets ACLs that nobody asked for. Ask once per parent directory. */
export function inheritsAcls(dirfd: number): boolean {
  return getXattr(dirfd, '', ACL_DEFAULT) !== undefined
}

export interface WriteMetaOptions {
  /** The inode is new and its parent has a default ACL (`inheritsAcls`): remove what it got from there. */
  readonly dropInheritedAcls?: boolean
  /** The inode is old: attributes that `meta` lacks are removed, those that this names excepted. */
  readonly removeOthers?: (attribute: ByteString) => boolean
  /** chattr flags (FS_IMMUTABLE_FL | FS_APPEND_FL), added after everything else. Files and directories only. */
  readonly inodeFlags?: number
  /** What the inode is like, if that is known: owner and mode that are right are not set again. */
  readonly old?: Pick<Stat, 'uid' | 'gid' | 'permissions'> | undefined
  /** Leave the times alone, for a directory whose children are still to come. */
  readonly withoutTimes?: boolean
}

/**
 * Gives an inode its metadata, in the one order that loses nothing: owner, mode, ACLs, other attributes,
 * `security.capability`, times, flags. `name` is beneath `dirfd`, never followed; `''` is the open fd itself
 * (files and directories).
 * Source: overlay-format §7: chown clears setuid and capabilities, setting an ACL rewrites the mode, chmod its mask.
 */
export function writeMeta(
  dirfd: number,
  name: ByteString | '',
  kind: InodeKind,
  meta: Meta,
  options: WriteMetaOptions = {},
): void {
  const { xattrs } = meta
  const { old } = options
  const isOwned = old !== undefined && old.uid === meta.uid && old.gid === meta.gid
  if (!isOwned) setOwner(dirfd, name, meta.uid, meta.gid)
  const removed = options.removeOthers === undefined ? 0 : removeOtherXattrs(dirfd, name, xattrs, options.removeOthers)
  // user.* needs write permission, which root always has and the mode to come may deny to others.
  if (xattrs.length > 0) setXattrs(dirfd, name, kind, xattrs, isUserXattr)
  if (kind !== 'symlink') {
    // MooseFS gives the mode the group's permissions of an ACL that goes, so the mode comes after that.
    if (options.dropInheritedAcls === true) {
      removeXattr(dirfd, name, ACL_ACCESS)
      if (kind === 'directory') removeXattr(dirfd, name, ACL_DEFAULT)
    }
    // Attributes that come or go can be ACLs, which have their say in the mode.
    const isAsIs = xattrs.length === 0 && removed === 0 && options.dropInheritedAcls !== true
    // A new owner takes setuid and setgid away and nothing else.
    const keepsMode = old !== undefined && (isOwned || (old.permissions & SET_ID) === 0)
    if (!(keepsMode && isAsIs && old.permissions === meta.mode)) {
      if (name === '') setModeFd(dirfd, meta.mode)
      else setModeAt(dirfd, name, meta.mode)
    }
  }
  if (xattrs.length > 0) {
    setXattrs(dirfd, name, kind, xattrs, isAcl)
    setXattrs(dirfd, name, kind, xattrs, isOrdinaryXattr)
    setXattrs(dirfd, name, kind, xattrs, isCapability)
  }
  if (options.withoutTimes !== true) setTimes(dirfd, name, meta.atimeNs, meta.mtimeNs)
  if (options.inodeFlags !== undefined && options.inodeFlags !== 0) addFlags(dirfd, name, options.inodeFlags)
}

const SET_ID = 0o6000
// XFS lists its own storage of an ACL beside the ACL itself; copied, it would stand for an ACL on any other XFS.
const isStorageXattr = (name: string) => name.startsWith('trusted.SGI_ACL_')
const isUserXattr = (name: string) => name.startsWith('user.')
const isAcl = (name: string) => name.startsWith('system.posix_acl_')
const isCapability = (name: string) => name === CAPABILITY
const isOrdinaryXattr = (name: string) => !isUserXattr(name) && !isAcl(name) && !isCapability(name)

function setXattrs(
  dirfd: number,
  name: ByteString | '',
  kind: InodeKind,
  xattrs: readonly Xattr[],
  chosen: (attribute: string) => boolean,
): void {
  for (const xattr of xattrs) {
    if (!chosen(xattr.name)) continue
    try {
      setXattr(dirfd, name, xattr.name, xattr.value)
    } catch (error) {
      // An owner without privilege may not write user.* while the old mode forbids writing. Only those are set before
      // the mode, which puts right what is changed here.
      if (errnoOf(error) !== 'EACCES' || kind === 'symlink' || !isUserXattr(xattr.name)) throw error
      if (name === '') setModeFd(dirfd, 0o700)
      else setModeAt(dirfd, name, 0o700)
      setXattr(dirfd, name, xattr.name, xattr.value)
    }
  }
}

function removeOtherXattrs(
  dirfd: number,
  name: ByteString | '',
  wanted: readonly Xattr[],
  removable: (attribute: ByteString) => boolean,
): number {
  const listed = listXattrs(dirfd, name)
  // Removing what is not there is fine, and so is one round trip more where the file system does not list it.
  const present = listsAcls(dirfd) ? listed : new Set([...listed, ACL_ACCESS, ACL_DEFAULT])
  let removed = 0
  for (const attribute of present) {
    if (isStorageXattr(attribute) || !removable(attribute)) continue
    if (wanted.some((xattr) => xattr.name === attribute)) continue
    removeXattr(dirfd, name, attribute)
    removed++
  }
  return removed
}

/**
 * Adds inode flags (chattr) to a file or a directory. The file system's own flags stay: without the one that says so,
 * ext4 would rewrite the file without extents.
 */
export function addFlags(dirfd: number, name: ByteString | '', flags: number): void {
  const add = (fd: number) => setInodeFlags(fd, getInodeFlags(fd) | flags, name)
  if (name === '') add(dirfd)
  else withFd(openat(dirfd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK), add)
}

/** What to create. A directory gets no times and no mode but 0700 before its children are there: `finishDirectory`. */
export type NewInode =
  | { readonly kind: 'file'; readonly meta: Meta; readonly fill?: (fd: number) => void }
  | { readonly kind: 'directory' }
  | { readonly kind: 'symlink'; readonly meta: Meta; readonly target: ByteString }
  | { readonly kind: 'special'; readonly meta: Meta; readonly type: SpecialType; readonly rdev: number }

/**
 * Creates `name` beneath `dirfd` exclusively (EEXIST if there is one, also a dangling symlink), with data and metadata
 * in the order of `writeMeta`. A file is filled by `fill`, which gets its fd open for writing.
 */
export function createInode(dirfd: number, name: ByteString, inode: NewInode, options: WriteMetaOptions = {}): void {
  switch (inode.kind) {
    case 'file': {
      const fd = openNew(dirfd, name, inode.meta.mode & PERMISSIONS)
      try {
        inode.fill?.(fd)
        writeMeta(fd, '', 'file', inode.meta, { old: statFd(fd), ...options })
      } finally {
        close(fd)
      }
      return
    }
    case 'directory':
      makeDirectory(dirfd, name, 0o700)
      return
    case 'symlink':
      makeSymlink(inode.target, dirfd, name)
      writeMeta(dirfd, name, 'symlink', inode.meta, options)
      return
    case 'special':
      makeNode(dirfd, name, SPECIAL_MODES[inode.type] | 0o600, inode.rdev)
      writeMeta(dirfd, name, 'special', inode.meta, options)
      return
  }
}

/** Gives an open directory the metadata that had to wait for its children, times last. */
export function finishDirectory(fd: number, meta: Meta, options: WriteMetaOptions = {}): void {
  writeMeta(fd, '', 'directory', meta, options)
}

// What a file may have from its beginning. Mostly its owner and mode are right then, and one stat that tells so is a
// quarter of the price of setting both. Setuid has to wait for the owner.
const PERMISSIONS = 0o777

/** Creates an empty regular file exclusively and returns its fd, open for writing. The mode is subject to the umask. */
export function openNew(dirfd: number, name: ByteString, mode = 0o600): number {
  return openat(dirfd, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, mode)
}

/** Creates a whiteout: a character device 0:0, or an empty file with `NS.whiteout`. */
export function createWhiteout(dirfd: number, name: ByteString, form: WhiteoutForm, marks: MarkNames): void {
  if (form === 'device') makeNode(dirfd, name, S_IFCHR, 0)
  else {
    withFd(openNew(dirfd, name), (fd) => {
      setXattr(fd, '', marks.whiteout, YES)
      // Without privilege user.* can only be read where the file can.
      setModeFd(fd, 0o444, name)
    })
  }
}

const YES = Buffer.from('y')
let noAtime = O_NOATIME

/**
 * Opens a regular file for reading without following a symlink, without waiting on a fifo or waking a device, and
 * without touching its access time where that is allowed. Gives the fd and the stat of what was opened.
 * @throws {NotAFileError} if the name is (now) something else
 */
export function openRegular(dirfd: number, name: ByteString): { fd: number; stat: Stat } {
  let fd: number
  try {
    fd = openat(dirfd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | noAtime)
  } catch (error) {
    const code = errnoOf(error)
    if (code === 'ELOOP' || code === 'ENXIO') throw new NotAFileError(name)
    if (code !== 'EPERM' || noAtime === 0) throw error
    fd = openat(dirfd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
    // Only the owner and root may ask for it; not asking again saves a call for each file to come.
    noAtime = 0
  }
  try {
    const stat = statFd(fd)
    if (!stat.isFile) throw new NotAFileError(name)
    return { fd, stat }
  } catch (error) {
    close(fd)
    throw error
  }
}

/** Opens a directory beneath `dirfd` by one name, never through a symlink. */
export function openDirectory(dirfd: number, name: ByteString): number {
  return openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
}

/** Opens any inode by one name without side effects, for `linkFd` and the like. */
export function openHandle(dirfd: number, name: ByteString): number {
  return openat(dirfd, name, O_PATH | O_NOFOLLOW)
}

export interface CopyFileOptions extends WriteMetaOptions {
  readonly meta: Meta
  /** Try to share extents first, where the caller's probe found that source and target can. */
  readonly reflink?: boolean
}

/**
 * Copies a regular file to a new name, holes kept, and gives it `meta`. Ten system calls for a small file without
 * attributes. Returns the stat of the source as it was opened, so that the caller can tell whether it changed.
 * @throws {NotAFileError} if the source is not a regular file (any more)
 */
export function copyFile(
  fromDir: number,
  fromName: ByteString,
  toDir: number,
  toName: ByteString,
  options: CopyFileOptions,
): Stat {
  const { fd: from, stat } = openRegular(fromDir, fromName)
  try {
    const to = openNew(toDir, toName, options.meta.mode & PERMISSIONS)
    try {
      fillFrom(from, to, stat, toName, options.reflink === true)
      writeMeta(to, '', 'file', options.meta, { old: statFd(to), ...options })
    } finally {
      close(to)
    }
  } finally {
    close(from)
  }
  return stat
}

/** Copies the data of an open regular file into an empty one; `stat` is the stat of `from`. */
export function fillFrom(from: number, to: number, stat: Stat, path: string, reflink: boolean): void {
  const { sizeBytes } = stat
  if (sizeBytes === 0) return
  if (sizeBytes <= SMALL_BYTES && stat.blocks * 512 >= sizeBytes) {
    writeFrom(to, 0, small, 0, readInto(from, 0, small, 0, sizeBytes, path), path)
    return
  }
  copyData(from, to, sizeBytes, path, reflink)
}
