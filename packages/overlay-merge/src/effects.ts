import {
  type ByteString,
  close,
  DT_DIR,
  DT_UNKNOWN,
  deleteSubvolume,
  errnoOf,
  FS_APPEND_FL,
  FS_IMMUTABLE_FL,
  fsync,
  getInodeFlags,
  getXattr,
  handleAt,
  isSubvolume,
  O_CREAT,
  O_DIRECTORY,
  O_EXCL,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  O_RDWR,
  openat,
  openByHandle,
  PosixError,
  readAt,
  readDirents,
  readSymlink,
  removeDirectory,
  rename,
  S_IFBLK,
  S_IFCHR,
  S_IFDIR,
  S_IFIFO,
  type Stat,
  setInodeFlags,
  setModeFd,
  setTimes,
  setXattr,
  statFd,
  truncate,
  tryRename,
  tryStatAt,
  tryTypeAt,
  tryUnlink,
  unlink,
  withFd,
  writeAt,
} from '@lsync/posix'
import {
  createInode,
  fillFrom,
  openRegular,
  readMeta,
  type SpecialType,
  type WriteMetaOptions,
} from './encodings/inode.ts'
import type { Meta, Xattr } from './model/entry.ts'
import { isMark, type MarkNames } from './model/marks.ts'

/**
 * The metadata that an entry of a layer has in a result: no marks; escaped attributes stay escaped in a layer and lose
 * one level where the result is `plain`. Source: overlay-format "internal xattrs", escaping.
 */
export function resultMeta(dirfd: number, name: ByteString | '', stat: Stat, marks: MarkNames, plain: boolean): Meta {
  const meta = readMeta(dirfd, name, stat, (attribute) => !isMark(attribute, marks))
  if (!plain || !meta.xattrs.some((xattr) => xattr.name.startsWith(marks.escape))) return meta
  return { ...meta, xattrs: meta.xattrs.map((xattr) => unescapeXattr(xattr, marks)) }
}

function unescapeXattr(xattr: Xattr, marks: MarkNames): Xattr {
  if (!xattr.name.startsWith(marks.escape)) return xattr
  return { ...xattr, name: (marks.prefix + xattr.name.slice(marks.escape.length)) as ByteString }
}

/** The inode flags that stand in the way of changes. */
export const PROTECTION = FS_IMMUTABLE_FL | FS_APPEND_FL

// Symlinks, sockets and devices without a driver have no flags to take off; a vanished entry neither.
const UNFLAGGED = ['ELOOP', 'ENXIO', 'ENODEV', 'ENOENT']

/** Takes the immutable and append-only flags off an entry that is to be changed, and gives back which it had. */
export function clearProtection(dirfd: number, name: ByteString | ''): number {
  let fd: number
  try {
    fd = openat(dirfd, (name === '' ? '.' : name) as ByteString, O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
  } catch (error) {
    if (UNFLAGGED.includes(errnoOf(error) ?? '')) return 0
    throw error
  }
  try {
    const flags = getInodeFlags(fd)
    const protection = flags & PROTECTION
    if (protection !== 0) setInodeFlags(fd, flags & ~protection, name)
    return protection
  } finally {
    close(fd)
  }
}

/** Runs a change; where flags forbid it, takes them off the given entries and runs it again. */
export function despiteProtection<T>(entries: readonly { dirfd: number; name: ByteString | '' }[], change: () => T): T {
  try {
    return change()
  } catch (error) {
    if (errnoOf(error) !== 'EPERM') throw error
    let cleared = false
    for (const { dirfd, name } of entries) cleared = clearProtection(dirfd, name) !== 0 || cleared
    if (!cleared) throw error
    return change()
  }
}

/** A place for what is taken away: directories go there whole by one rename and are emptied at the end. */
export interface Trash {
  readonly fd: number
  /** A name not used before in this trash. */
  next(): ByteString
}

/**
 * Runs a change of `name` that its own flags forbid: they come off for the moment. An inode that goes on under this or
 * another name is as protected afterwards as it was, also after a crash: with a trash, what is off is noted there.
 */
export function withoutProtection<T>(dirfd: number, name: ByteString | '', change: () => T, trash?: Trash): T {
  let fd: number
  try {
    fd = openat(dirfd, (name === '' ? '.' : name) as ByteString, O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
  } catch (error) {
    if (UNFLAGGED.includes(errnoOf(error) ?? '')) return change()
    throw error
  }
  return withFd(fd, () => {
    const flags = getInodeFlags(fd)
    if ((flags & PROTECTION) === 0) return change()
    const note = trash === undefined ? undefined : noteProtection(trash, fd, flags & PROTECTION)
    setInodeFlags(fd, flags & ~PROTECTION, name)
    try {
      return change()
    } finally {
      if (statFd(fd).nlink > 0) setInodeFlags(fd, flags, name)
      if (trash !== undefined && note !== undefined) unlink(trash.fd, note)
    }
  })
}

const NOTE_PREFIX = 'flags-'

/** What a note holds. The handle finds the inode under whatever name it has by then. */
interface ProtectionNote {
  readonly type: number
  readonly handle: string
  readonly flags: number
}

// Durable before the flags come off, so that one that was cut short stands for flags that are still there.
function noteProtection(trash: Trash, fd: number, flags: number): ByteString | undefined {
  const handle = handleAt(fd, '')
  if (handle === undefined) return undefined
  const name = `${NOTE_PREFIX}${trash.next()}` as ByteString
  const note: ProtectionNote = { type: handle.type, handle: handle.bytes.toString('base64'), flags }
  withFd(openat(trash.fd, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0o600), (file) => {
    writeAt(file, 0, Buffer.from(JSON.stringify(note)), name)
    fsync(file, name)
  })
  fsync(trash.fd, name)
  return name
}

/** Gives inodes back the flags that a run which was cut short had taken off for the moment. `mountFd`: any of theirs. */
export function restoreProtection(trashFd: number, mountFd: number): void {
  const names: ByteString[] = []
  readDirents(trashFd, (name) => {
    if (name.startsWith(NOTE_PREFIX)) names.push(name)
  })
  for (const name of names) {
    const text = withFd(openat(trashFd, name, O_RDONLY | O_NOFOLLOW), (file) => readAt(file, 0, 4096).toString('utf8'))
    const note = parseNote(text)
    if (note !== undefined) {
      const handle = { type: note.type, bytes: Buffer.from(note.handle, 'base64') }
      const fd = openByHandle(mountFd, handle, O_RDONLY | O_NONBLOCK)
      if (fd !== undefined) withFd(fd, () => setInodeFlags(fd, getInodeFlags(fd) | note.flags, name))
    }
    unlink(trashFd, name)
  }
}

function parseNote(text: string): ProtectionNote | undefined {
  try {
    return JSON.parse(text) as ProtectionNote
  } catch (error) {
    if (error instanceof SyntaxError) return undefined
    throw error
  }
}

/** Takes a name away, whatever it is. `false` when there was none. */
export function takeAway(dirfd: number, name: ByteString, trash: Trash): boolean {
  const code = tryUnlink(dirfd, name)
  if (code === undefined) return true
  if (code === 'ENOENT') return false
  if (code !== 'EISDIR' && code !== 'EPERM') throw new PosixError(code, { syscall: 'unlinkat', path: name })
  clearProtection(dirfd, '')
  if (tryTypeAt(dirfd, name) === S_IFDIR) {
    clearProtection(dirfd, name)
    rename(dirfd, name, trash.fd, trash.next())
    return true
  }
  return withoutProtection(
    dirfd,
    name,
    () => {
      unlink(dirfd, name)
      return true
    },
    trash,
  )
}

/**
 * Renames over whatever is there; a directory in the way goes to the trash first. Real inode flags of `from` go along.
 * `false` when `from` is gone.
 */
export function moveOver(fromDir: number, from: ByteString, toDir: number, to: ByteString, trash: Trash): boolean {
  for (let attempt = 0; ; attempt++) {
    const code = tryRename(fromDir, from, toDir, to)
    if (code === undefined) return true
    if (code === 'ENOENT' && tryStatAt(fromDir, from) === undefined) return false
    if (attempt < 3 && (code === 'EISDIR' || code === 'ENOTDIR' || code === 'ENOTEMPTY' || code === 'EEXIST')) {
      takeAway(toDir, to, trash)
      continue
    }
    if (attempt < 3 && code === 'EPERM') {
      clearProtection(fromDir, '')
      clearProtection(toDir, '')
      // The flags of what is in the way are asked before its type.
      const isOfOtherType = tryTypeAt(toDir, to) === S_IFDIR || tryTypeAt(fromDir, from) === S_IFDIR
      if (isOfOtherType && takeAway(toDir, to, trash)) continue
      const move = () => {
        const failed = tryRename(fromDir, from, toDir, to)
        if (failed !== undefined) throw new PosixError(failed, { syscall: 'renameat2', path: to })
      }
      withoutProtection(fromDir, from, () => withoutProtection(toDir, to, move, trash), trash)
      return true
    }
    throw new PosixError(code, { syscall: 'renameat2', path: to })
  }
}

/** Which of them an open file or directory really has. */
export function protectionOf(fd: number): number {
  return getInodeFlags(fd) & PROTECTION
}

/** As `protectionOf`, for a regular file by its name; `stat` saves opening those that have none. */
export function fileProtection(dirfd: number, name: ByteString, stat: Stat): number {
  if (!stat.isFile || !stat.isProtected) return 0
  return withFd(openat(dirfd, name, O_NOFOLLOW | O_NONBLOCK), protectionOf)
}

/** What is copied, and where its parts come from. */
export interface CopyRequest {
  readonly fromDir: number
  readonly from: ByteString
  readonly stat: Stat
  readonly meta: Meta
  /** A metacopy's data: another file. */
  readonly data?: { readonly dir: number; readonly name: ByteString }
  /** Only the size: the data is below. */
  readonly withoutData?: boolean
  readonly reflink: boolean
}

/** Creates a copy of one object that is not a directory under a new name. */
export function copyObject(request: CopyRequest, toDir: number, to: ByteString, options: WriteMetaOptions): void {
  const { fromDir, from, stat, meta } = request
  switch (stat.type) {
    case 0o100000:
      createInode(toDir, to, { kind: 'file', meta, fill: (fd) => fill(request, fd, to) }, options)
      return
    case 0o120000:
      createInode(toDir, to, { kind: 'symlink', meta, target: readSymlink(fromDir, from) }, options)
      return
    default:
      createInode(toDir, to, { kind: 'special', meta, type: specialType(stat), rdev: stat.rdev }, options)
  }
}

function fill(request: CopyRequest, to: number, name: ByteString): void {
  if (request.withoutData === true) {
    truncate(to, request.stat.sizeBytes, name)
    return
  }
  const source = request.data ?? { dir: request.fromDir, name: request.from }
  const { fd, stat } = openRegular(source.dir, source.name)
  withFd(fd, () => fillFrom(fd, to, stat, name, request.reflink))
}

function specialType(stat: Stat): SpecialType {
  if (stat.type === S_IFIFO) return 'fifo'
  if (stat.type === S_IFCHR) return 'character'
  return stat.type === S_IFBLK ? 'block' : 'socket'
}

/**
 * Fills the upper's metacopy inode with its data where it is, so that all its names get it. The marks stay for the step
 * that shows it: as long as `metacopy` is there, it can be done again.
 */
export function fillMetacopy(
  dirfd: number,
  name: ByteString,
  data: { readonly dir: number; readonly name: ByteString },
  marks: MarkNames,
): void {
  if (getXattr(dirfd, name, marks.metacopy) === undefined) return
  const { fd, stat } = openForFilling(dirfd, name)
  withFd(fd, () => {
    const capability = getXattr(fd, '', 'security.capability' as ByteString)
    const source = openRegular(data.dir, data.name)
    withFd(source.fd, () => {
      truncate(fd, 0, name)
      fillFrom(source.fd, fd, source.stat, name, true)
    })
    // Writing drops setuid and capabilities, and sets the time.
    restoreAfterWrite(fd, stat, capability)
  })
}

function openForFilling(dirfd: number, name: ByteString): { fd: number; stat: Stat } {
  const { fd, stat } = openRegular(dirfd, name)
  close(fd)
  return { fd: openat(dirfd, name, O_RDWR | O_NOFOLLOW | O_NONBLOCK), stat }
}

function restoreAfterWrite(fd: number, stat: Stat, capability: Buffer | undefined): void {
  setModeFd(fd, stat.permissions)
  if (capability !== undefined) setXattr(fd, '', 'security.capability' as ByteString, capability)
  setTimes(fd, '', stat.atimeNs, stat.mtimeNs)
}

/** Empties and removes a directory tree without following anything; what is gone already is fine. */
export function removeTree(dirfd: number, name: ByteString, trash?: Trash): void {
  // Depth first with one fd a level would run out of fds in a deep tree, so subdirectories are lifted to the top
  // beforehand: each level is emptied with its subdirectories renamed beside the root of the removal.
  const queue: ByteString[] = [name]
  let lifted = 0
  for (let current = queue.pop(); current !== undefined; current = queue.pop()) {
    const target = current
    let fd: number
    try {
      fd = openat(dirfd, target, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
    } catch (error) {
      const code = errnoOf(error)
      if (code === 'ENOENT') continue
      if (code !== 'ENOTDIR' && code !== 'ELOOP') throw error
      removeFile(dirfd, target, trash)
      continue
    }
    try {
      // No rename leads out of a subvolume, and it can be deleted whole.
      if (isSubvolume(fd)) {
        deleteSubvolume(dirfd, target)
        continue
      }
      const directories: ByteString[] = []
      const others: ByteString[] = []
      readDirents(fd, (child, type) => {
        const isDirectory = type === DT_DIR || (type === DT_UNKNOWN && tryStatAt(fd, child)?.isDirectory === true)
        ;(isDirectory ? directories : others).push(child)
      })
      for (const child of others) removeFile(fd, child, trash)
      for (const child of directories) {
        const isEmpty = despiteProtection(
          [
            { dirfd: fd, name: child },
            { dirfd: fd, name: '' },
          ],
          () => tryRemoveEmpty(fd, child),
        )
        if (isEmpty) continue
        const beside = `${name}.${process.pid}.${lifted++}` as ByteString
        despiteProtection(
          [
            { dirfd: fd, name: child },
            { dirfd: fd, name: '' },
          ],
          () => rename(fd, child, dirfd, beside),
        )
        queue.push(beside)
      }
    } finally {
      close(fd)
    }
    despiteProtection([{ dirfd, name: target }], () => removeDirectory(dirfd, target))
  }
}

/**
 * Removes a name that is not a directory; its absence is fine, and a directory stays. Other names of the inode stay as
 * protected as they were.
 */
export function removeFile(dirfd: number, name: ByteString, trash?: Trash): void {
  const code = tryUnlink(dirfd, name)
  if (code === undefined || code === 'ENOENT' || code === 'EISDIR') return
  if (code !== 'EPERM') throw new PosixError(code, { syscall: 'unlinkat', path: name })
  clearProtection(dirfd, '')
  withoutProtection(dirfd, name, () => unlink(dirfd, name), trash)
}

function tryRemoveEmpty(dirfd: number, name: ByteString): boolean {
  try {
    removeDirectory(dirfd, name)
    return true
  } catch (error) {
    const code = errnoOf(error)
    if (code === 'ENOTEMPTY' || code === 'EEXIST') return false
    throw error
  }
}
