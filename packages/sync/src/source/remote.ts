import { type FileSystemInfo, fileSystemOf, MAGIC_FUSE, MAGIC_NFS } from '@lsync/posix'

// linux/magic.h: file systems whose files other machines change, of which this kernel hears nothing.
const REMOTE = new Map<number, string>([
  [MAGIC_FUSE, 'FUSE'],
  [MAGIC_NFS, 'NFS'],
  [0x00c3_6400, 'CephFS'],
  [0xff53_4d42, 'CIFS'],
  [0xfe53_4d42, 'SMB'],
  [0x0102_1997, '9p'],
  [0x0bd0_0bd0, 'Lustre'],
  [0x4750_4653, 'GPFS'],
  [0x013111a8, 'IBRIX'],
  [0x5346_414f, 'AFS'],
  [0x7375_7245, 'Coda'],
  [0x0116_1970, 'GFS2'],
  [0x7461_636f, 'OCFS2'],
])

/** What the file system of an open directory is called when other machines may change it; `undefined` when none can. */
export function remoteFileSystemOf(fd: number): string | undefined {
  const info: FileSystemInfo = fileSystemOf(fd)
  const name = REMOTE.get(info.magic)
  return name === undefined ? undefined : info.type.startsWith('fuse.') ? `${name} (${info.type.slice(5)})` : name
}
