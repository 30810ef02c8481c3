import { release } from 'node:os'
import { fileSystemOf } from '@lsync/posix'

// Those that have multigrain timestamps since Linux 6.13. Source: FS_MGTIME in their struct file_system_type.
const FINE: ReadonlySet<string> = new Set(['ext4', 'xfs', 'btrfs', 'tmpfs'])

/**
 * Whether each change of an inode gives it another change time than it had when somebody looked, however soon it comes: then
 * what a look finds needs no second one, but for a look in the middle of a change (`isUnchanged`). Source: Documentation/filesystems/multigrain-ts.rst.
 */
export function hasFineTimes(fd: number, kernel: string = release()): boolean {
  const [major = 0, minor = 0] = kernel.split('.').map(Number)
  return (major > 6 || (major === 6 && minor >= 13)) && FINE.has(fileSystemOf(fd).type)
}
