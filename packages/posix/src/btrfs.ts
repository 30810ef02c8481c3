import type { ByteString } from './bytes.ts'
import { errnoName, PosixError } from './errors.ts'
import { fileSystemMagic, MAGIC_BTRFS } from './filesystem.ts'
import { allocate, entering, errno, libcFunction } from './native.ts'
import { statFd } from './stat.ts'

const ioctlNative = libcFunction('ioctl', 'i', 'ipp')

// linux/btrfs.h; both argument structures are 4096 bytes long.
const BTRFS_IOC_SUBVOL_CREATE = 0x5000_940e
const BTRFS_IOC_SNAP_DESTROY = 0x5000_940f
const BTRFS_IOC_SNAP_CREATE_V2 = 0x5000_9417
const BTRFS_SUBVOL_RDONLY = 2
const SUBVOLUME_ROOT_INO = 256
const NAME_MAX = 255

const args = allocate(4096)

/** Whether an open directory is the root of a btrfs subvolume. */
export function isSubvolume(fd: number): boolean {
  const stat = statFd(fd)
  return stat.isDirectory && stat.ino === SUBVOLUME_ROOT_INO && fileSystemMagic(fd) === MAGIC_BTRFS
}

/** Makes an empty btrfs subvolume `name` in an open directory. Source: linux/btrfs.h, BTRFS_IOC_SUBVOL_CREATE. */
export function createSubvolume(dirfd: number, name: ByteString): void {
  writeName(name, 8)
  call(dirfd, BTRFS_IOC_SUBVOL_CREATE, 'BTRFS_IOC_SUBVOL_CREATE', name)
}

/**
 * Makes `name` in an open directory a snapshot of the subvolume whose root is open as `source`. Subvolumes inside the
 * source come out as empty directories. Source: linux/btrfs.h, BTRFS_IOC_SNAP_CREATE_V2.
 */
export function snapshotSubvolume(source: number, dirfd: number, name: ByteString, readOnly = false): void {
  writeName(name, 56)
  args.buffer.writeBigInt64LE(BigInt(source), 0)
  args.buffer.writeBigUInt64LE(BigInt(readOnly ? BTRFS_SUBVOL_RDONLY : 0), 16)
  call(dirfd, BTRFS_IOC_SNAP_CREATE_V2, 'BTRFS_IOC_SNAP_CREATE_V2', name)
}

/**
 * Deletes the subvolume `name` with all its content; the space comes back in the background. Needs CAP_SYS_ADMIN, or
 * the mount option user_subvol_rm_allowed. Source: linux/btrfs.h, BTRFS_IOC_SNAP_DESTROY.
 */
export function deleteSubvolume(dirfd: number, name: ByteString): void {
  writeName(name, 8)
  call(dirfd, BTRFS_IOC_SNAP_DESTROY, 'BTRFS_IOC_SNAP_DESTROY', name)
}

function writeName(name: ByteString, at: number): void {
  if (name.length > NAME_MAX) throw new PosixError('ENAMETOOLONG', { syscall: 'ioctl', path: name })
  if (name.includes('\0')) throw new PosixError('EINVAL', { syscall: 'ioctl', path: name })
  args.buffer.fill(0, 0, at + NAME_MAX + 1)
  args.buffer.write(name, at, 'latin1')
}

function call(dirfd: number, request: number, syscall: string, name: ByteString): void {
  entering(syscall, name)
  if (ioctlNative(dirfd, request, args.address) >= 0) return
  throw new PosixError(errnoName(errno()), { syscall, path: name })
}
