import type { ByteString } from './bytes.ts'
import { errnoName, PosixError } from './errors.ts'
import { allocate, cString, entering, errno, fail, libcFunction } from './native.ts'

const renameNative = libcFunction('renameat2', 'i', 'ipipu')
const linkNative = libcFunction('linkat', 'i', 'ipipi')
const unlinkNative = libcFunction('unlinkat', 'i', 'ipi')
const mkdirNative = libcFunction('mkdirat', 'i', 'ipu')
const mknodNative = libcFunction('mknodat', 'i', 'ipup')
const symlinkNative = libcFunction('symlinkat', 'i', 'pip')
const readlinkNative = libcFunction('readlinkat', 'l', 'ippp')

export const RENAME_NOREPLACE = 1
export const RENAME_EXCHANGE = 2
export const RENAME_WHITEOUT = 4
const AT_REMOVEDIR = 0x200
const AT_EMPTY_PATH = 0x1000

// Mostly both names are the same, and one C string does.
function callWithNames(
  native: typeof renameNative,
  fromDir: number,
  from: ByteString,
  toDir: number,
  to: ByteString,
  flags: number,
): number {
  const name = cString(from)
  return native(fromDir, name, toDir, from === to ? name : cString(to, 1), flags)
}

/** renameat2(2): moves `from` beneath `fromDir` to `to` beneath `toDir`. Flags are RENAME_*. */
export function rename(fromDir: number, from: ByteString, toDir: number, to: ByteString, flags = 0): void {
  entering('renameat2', to)
  if (callWithNames(renameNative, fromDir, from, toDir, to, flags) < 0) fail('renameat2', to)
}

/** As `rename`, but gives the errno name back instead of throwing it; `undefined` when it was done. */
export function tryRename(
  fromDir: number,
  from: ByteString,
  toDir: number,
  to: ByteString,
  flags = 0,
): string | undefined {
  entering('renameat2', to)
  return callWithNames(renameNative, fromDir, from, toDir, to, flags) < 0 ? errnoName(errno()) : undefined
}

/** linkat(2): a further name for an inode; a symlink itself is linked, not what it points to. */
export function link(fromDir: number, from: ByteString, toDir: number, to: ByteString): void {
  entering('linkat', to)
  if (callWithNames(linkNative, fromDir, from, toDir, to, 0) < 0) fail('linkat', to)
}

/** As `link`, but gives the errno name back instead of throwing it; `undefined` when it was done. */
export function tryLink(fromDir: number, from: ByteString, toDir: number, to: ByteString): string | undefined {
  entering('linkat', to)
  return callWithNames(linkNative, fromDir, from, toDir, to, 0) < 0 ? errnoName(errno()) : undefined
}

/** Gives an open file (O_TMPFILE or O_PATH) a name. Needs CAP_DAC_READ_SEARCH. */
export function linkFd(fd: number, toDir: number, to: ByteString): void {
  entering('linkat', to)
  if (linkNative(fd, cString(''), toDir, cString(to, 1), AT_EMPTY_PATH) < 0) fail('linkat', to)
}

/** Removes a name that is not a directory. `false` when there was none. */
export function unlink(dirfd: number, name: ByteString): boolean {
  const code = tryUnlink(dirfd, name)
  if (code === undefined) return true
  if (code === 'ENOENT') return false
  throw new PosixError(code, { syscall: 'unlinkat', path: name })
}

/** As `unlink`, but gives the errno name back instead of throwing it; `undefined` when it was done. */
export function tryUnlink(dirfd: number, name: ByteString): string | undefined {
  entering('unlinkat', name)
  return unlinkNative(dirfd, cString(name), 0) < 0 ? errnoName(errno()) : undefined
}

/** Removes an empty directory. `false` when there was none. */
export function removeDirectory(dirfd: number, name: ByteString): boolean {
  entering('rmdir', name)
  if (unlinkNative(dirfd, cString(name), AT_REMOVEDIR) >= 0) return true
  const code = errnoName(errno())
  if (code === 'ENOENT') return false
  throw new PosixError(code, { syscall: 'rmdir', path: name })
}

/** mkdirat(2). The mode is subject to the umask; set it afterwards. */
export function makeDirectory(dirfd: number, name: ByteString, mode: number): void {
  entering('mkdirat', name)
  if (mkdirNative(dirfd, cString(name), mode) < 0) fail('mkdirat', name)
}

/** mknodat(2) of a fifo, socket or device. `mode` holds the type, `device` comes from `Stat.rdev` or `makeDevice`. */
export function makeNode(dirfd: number, name: ByteString, mode: number, device: number): void {
  entering('mknodat', name)
  if (mknodNative(dirfd, cString(name), mode, device) < 0) fail('mknodat', name)
}

/** symlinkat(2): `name` becomes a symlink that holds `target`. */
export function makeSymlink(target: ByteString, dirfd: number, name: ByteString): void {
  entering('symlinkat', name)
  if (symlinkNative(cString(target), dirfd, cString(name, 1)) < 0) fail('symlinkat', name)
}

const targetOut = allocate(4096)

/** What a symlink holds. */
export function readSymlink(dirfd: number, name: ByteString): ByteString {
  const length = readlinkNative(dirfd, cString(name), targetOut.address, 4096)
  if (length < 0) fail('readlinkat', name)
  return targetOut.buffer.toString('latin1', 0, length) as ByteString
}
