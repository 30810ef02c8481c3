import { mountOf } from './mountinfo.ts'
import { allocate, fail, libcFunction } from './native.ts'

const fstatfsNative = libcFunction('fstatfs', 'i', 'ip')

export const MAGIC_BTRFS = 0x9123_683e
export const MAGIC_OVERLAY = 0x794c_7630
export const MAGIC_FUSE = 0x6573_5546
export const MAGIC_TMPFS = 0x0102_1994
export const MAGIC_NFS = 0x6969

// statfs(2) and linux/magic.h; for mounts that mountinfo does not show.
const NAMES = new Map<number, string>([
  [0xef53, 'ext4'], // ext2 and ext3 have the same
  [0x5846_5342, 'xfs'],
  [MAGIC_BTRFS, 'btrfs'],
  [MAGIC_TMPFS, 'tmpfs'],
  [MAGIC_OVERLAY, 'overlay'],
  [MAGIC_FUSE, 'fuse'],
  [MAGIC_NFS, 'nfs'],
  [0x00c3_6400, 'ceph'],
  [0x4d44, 'vfat'],
  [0x2011_bab0, 'exfat'],
  [0x7366_746e, 'ntfs3'],
  [0xe0f5_e1e2, 'erofs'],
  [0x7371_7368, 'squashfs'],
  [0x9660, 'iso9660'],
  [0x2fc1_2fc1, 'zfs'],
  [0xf2f5_2010, 'f2fs'],
  [0xca45_1a4e, 'bcachefs'],
  [0x0102_1997, '9p'],
  [0xff53_4d42, 'cifs'],
  [0xfe53_4d42, 'smb2'],
  [0x8584_58f6, 'ramfs'],
  [0x9fa0, 'proc'],
  [0x6265_6572, 'sysfs'],
])

// Those that list every ACL that an inode has (or have none). An overlay lists what its layers list, a FUSE server what
// it likes: MooseFS 3.0 has ACLs and lists none.
const LIST_ACLS = new Set(['ext4', 'xfs', 'btrfs', 'tmpfs', 'f2fs', 'bcachefs', 'zfs', 'erofs', 'squashfs', 'iso9660'])

const ST_RDONLY = 1
const ST_NOSUID = 2
const ST_NODEV = 4
const ST_NOEXEC = 8

/** What fstatfs(2) and mountinfo say of the file system that holds an open file. Free space is what a user may take. */
export interface FileSystemInfo {
  /** As in mountinfo (`ext4`, `fuse.mfs`), else by its magic number (`ext4`, `fuse`, `0x1234`). */
  readonly type: string
  readonly magic: number
  readonly blockBytes: number
  readonly totalBytes: number
  readonly freeBytes: number
  /** 0 where inodes are not counted (btrfs). */
  readonly totalInodes: number
  readonly freeInodes: number
  readonly maxNameBytes: number
  /** The flags of the mount that the file was opened through. */
  readonly flags: {
    readonly readOnly: boolean
    readonly noSuid: boolean
    readonly noDev: boolean
    readonly noExec: boolean
  }
}

// struct statfs is 120 bytes, with the same layout on all 64-bit architectures.
const out = allocate(120)

function statfs(fd: number): void {
  if (fstatfsNative(fd, out.address) < 0) fail('fstatfs', '')
}

/** The number in linux/magic.h of the file system that holds an open file (O_PATH will do). */
export function fileSystemMagic(fd: number): number {
  statfs(fd)
  return out.buffer.readUInt32LE(0)
}

/**
 * Whether listxattr(2) names the POSIX ACLs of whatever lies on the file system of an open file (O_PATH will do). Where
 * it does not, they have to be asked for by name. Half a microsecond.
 */
export function listsAcls(fd: number): boolean {
  return LIST_ACLS.has(NAMES.get(fileSystemMagic(fd)) ?? '')
}

/** The file system that holds an open file (O_PATH will do). Node's own `statfs` lacks flags and name length. */
export function fileSystemOf(fd: number): FileSystemInfo {
  const magic = fileSystemMagic(fd)
  const { buffer } = out
  const field = (at: number) => Number(buffer.readBigUInt64LE(at))
  const blockBytes = field(72) || field(8)
  const bits = field(80)
  const info = {
    magic,
    blockBytes,
    totalBytes: field(16) * blockBytes,
    freeBytes: field(32) * blockBytes,
    totalInodes: field(40),
    freeInodes: field(48),
    maxNameBytes: field(64),
    flags: {
      readOnly: (bits & ST_RDONLY) !== 0,
      noSuid: (bits & ST_NOSUID) !== 0,
      noDev: (bits & ST_NODEV) !== 0,
      noExec: (bits & ST_NOEXEC) !== 0,
    },
  }
  return { type: mountOf(fd)?.type ?? NAMES.get(magic) ?? `0x${magic.toString(16)}`, ...info }
}
