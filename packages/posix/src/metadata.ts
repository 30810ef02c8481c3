import type { ByteString } from './bytes.ts'
import { errnoName, PosixError } from './errors.ts'
import { allocate, cString, entering, errno, fail, libcFunction } from './native.ts'
import { O_NOFOLLOW, O_PATH, openat, withFd } from './open.ts'

const fchmodat2Native = libcFunction('syscall', 'l', 'lipuu')
const chmodNative = libcFunction('chmod', 'i', 'pu')
const fchmodNative = libcFunction('fchmod', 'i', 'iu')
const fchownatNative = libcFunction('fchownat', 'i', 'ipuui')
const utimensatNative = libcFunction('utimensat', 'i', 'ippi')
const futimensNative = libcFunction('futimens', 'i', 'ip')
const ioctlNative = libcFunction('ioctl', 'i', 'ipp')

const AT_SYMLINK_NOFOLLOW = 0x100
const AT_EMPTY_PATH = 0x1000
const FS_IOC_GETFLAGS = 0x8008_6601
const FS_IOC_SETFLAGS = 0x4008_6602

/** Inode flags of chattr(1): immutable and append-only. */
export const FS_IMMUTABLE_FL = 0x10
export const FS_APPEND_FL = 0x20

const SYS_fchmodat2 = 452

/** Sets the permission bits of `name`, never through a symlink (fchmodat2(2); before Linux 6.6 by an O_PATH fd). */
export function setModeAt(dirfd: number, name: ByteString, mode: number): void {
  entering('fchmodat2', name)
  if (fchmodat2Native(SYS_fchmodat2, dirfd, cString(name), mode & 0o7777, AT_SYMLINK_NOFOLLOW) >= 0) return
  if (errnoName(errno()) !== 'ENOSYS') fail('fchmodat2', name)
  withFd(openat(dirfd, name, O_PATH | O_NOFOLLOW), (fd) => {
    if (chmodNative(cString(`/proc/self/fd/${fd}`), mode & 0o7777) < 0) fail('chmod', name)
  })
}

/** fchmod(2). */
export function setModeFd(fd: number, mode: number, path = ''): void {
  entering('fchmod', path)
  if (fchmodNative(fd, mode & 0o7777) < 0) fail('fchmod', path)
}

/** fchownat(2) of `name` (of the fd itself for `''`), not following symlinks. Clears setuid and capabilities of files. */
export function setOwner(dirfd: number, name: ByteString | '', uid: number, gid: number): void {
  entering('fchownat', name)
  const flags = name === '' ? AT_EMPTY_PATH : AT_SYMLINK_NOFOLLOW
  if (fchownatNative(dirfd, cString(name), uid, gid, flags) < 0) fail('fchownat', name)
}

const times = allocate(32)
const timeWords = new Uint32Array(times.buffer.buffer, times.buffer.byteOffset, 8)

/** Sets access and modification time in ns since 1970; symlinks are not followed; `''` is the fd itself. */
export function setTimes(dirfd: number, name: ByteString | '', atimeNs: bigint, mtimeNs: bigint): void {
  entering('utimensat', name)
  writeTime(0, atimeNs)
  writeTime(4, mtimeNs)
  const result =
    name === ''
      ? futimensNative(dirfd, times.address)
      : utimensatNative(dirfd, cString(name), times.address, AT_SYMLINK_NOFOLLOW)
  if (result < 0) fail('utimensat', name)
}

function writeTime(at: number, timeNs: bigint): void {
  let seconds = timeNs / 1_000_000_000n
  let nanoseconds = timeNs % 1_000_000_000n
  if (nanoseconds < 0n) {
    seconds -= 1n
    nanoseconds += 1_000_000_000n
  }
  // By halves: a typed array takes 32 bits at once, and ns fit into the lower half.
  const whole = Number(seconds)
  timeWords[at] = whole
  timeWords[at + 1] = Math.floor(whole / 0x1_0000_0000)
  timeWords[at + 2] = Number(nanoseconds)
}

const flagsOut = allocate(8)

/** Inode flags (chattr) of an open file or directory; 0 where the file system has none. */
export function getInodeFlags(fd: number): number {
  if (ioctlNative(fd, FS_IOC_GETFLAGS, flagsOut.address) < 0) {
    const code = errnoName(errno())
    if (code === 'ENOTTY' || code === 'ENOTSUP' || code === 'ENOSYS' || code === 'EINVAL') return 0
    throw new PosixError(code, { syscall: 'FS_IOC_GETFLAGS', path: '' })
  }
  return flagsOut.buffer.readUInt32LE(0)
}

/** Sets the inode flags of an open file or directory. */
export function setInodeFlags(fd: number, flags: number, path = ''): void {
  entering('FS_IOC_SETFLAGS', path)
  flagsOut.buffer.writeUInt32LE(flags, 0)
  if (ioctlNative(fd, FS_IOC_SETFLAGS, flagsOut.address) < 0) fail('FS_IOC_SETFLAGS', path)
}
