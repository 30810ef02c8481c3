import { spawnSync } from 'node:child_process'
import {
  type ByteString,
  DT_DIR,
  fileSystemOf,
  type HostPath,
  isMooseFs,
  isSubvolume,
  LsyncError,
  MAGIC_BTRFS,
  mountOf,
  O_CREAT,
  O_DIRECTORY,
  O_EXCL,
  O_NOFOLLOW,
  O_RDONLY,
  O_RDWR,
  openat,
  openBeneath,
  pathOfFd,
  readDirents,
  S_IFLNK,
  snapshotSubvolume,
  statAt,
  statFd,
  textOf,
  tryClone,
  unlink,
  withFd,
  writeAt,
} from '@lsync/posix'
import type { CloneMethod, SnapshotMethod } from './clone.ts'
import { ACL_ACCESS, ACL_DEFAULT, inheritsAcls, readMeta, writeMeta } from './encodings/inode.ts'
import { type EntryPath, join, ROOT } from './model/path.ts'

/** The named way to clone does not work here. */
export class CloneImpossibleError extends LsyncError {
  constructor(method: CloneMethod, why: string) {
    super('CLONE_IMPOSSIBLE', `cannot clone by ${method}: ${why}`, {
      hint: 'leave --clone out, so that the cheapest way that works is chosen',
    })
  }
}

/** What a new version needs: the whole-tree ways, then the ways that go entry by entry. */
export interface CloneSite {
  readonly fromFd: number
  /** An open directory of the file system that the clone will be on. */
  readonly toFd: number
  /** The clone must be visited entry by entry anyway, since something in it changes its form. */
  readonly perEntry: boolean
}

/** Which ways work between two directories, the cheapest first. Tried for real, with a file of its own. */
export function cloneMethods(site: CloneSite): CloneMethod[] {
  const methods: CloneMethod[] = []
  const from = statFd(site.fromFd)
  const to = statFd(site.toFd)
  const isOneMount = from.mountId === to.mountId
  if (!site.perEntry) {
    if (isOneMount && isMooseFs(mountOf(site.toFd)) && hasTool()) methods.push('moosefs')
    if (fileSystemOf(site.toFd).magic === MAGIC_BTRFS && isOneMount && isSubvolume(site.fromFd)) methods.push('btrfs')
  }
  if (isOneMount && canReflink(site.toFd)) methods.push('reflink')
  if (isOneMount && from.dev === to.dev) methods.push('hardlink')
  methods.push('copy')
  return methods
}

/**
 * The way to clone: the one asked for, or the cheapest that works.
 * @throws {CloneImpossibleError} if the one asked for does not
 */
export function chooseClone(site: CloneSite, wanted: CloneMethod | 'auto'): CloneMethod {
  const methods = cloneMethods(site)
  if (wanted === 'auto') return methods[0] as CloneMethod
  if (!methods.includes(wanted)) throw new CloneImpossibleError(wanted, `here only ${methods.join(', ')} can`)
  return wanted
}

function hasTool(): boolean {
  return spawnSync('mfsmakesnapshot', ['-h'], { stdio: 'ignore' }).error === undefined
}

function canReflink(dirfd: number): boolean {
  const first = `.lsync-probe-${process.pid}-a` as ByteString
  const second = `.lsync-probe-${process.pid}-b` as ByteString
  const create = (name: ByteString) => openat(dirfd, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0o600)
  try {
    return withFd(create(first), (from) => {
      writeAt(from, 0, Buffer.alloc(4096, 1))
      return withFd(create(second), (to) => tryClone(from, to))
    })
  } finally {
    unlink(dirfd, first)
    unlink(dirfd, second)
  }
}

/** Whether a way clones a whole tree at once, and not entry by entry. */
export function isSnapshot(method: CloneMethod): method is SnapshotMethod {
  return method === 'moosefs' || method === 'btrfs'
}

/** Clones a whole tree at once as `name` beneath `toFd`, by a snapshot of its file system. */
export function snapshotTree(method: SnapshotMethod, fromFd: number, toFd: number, name: ByteString): void {
  if (method === 'btrfs') {
    snapshotSubvolume(fromFd, toFd, name)
    return
  }
  const from = pathOfFd(fromFd)
  const to = `${pathOfFd(toFd)}/${name}` as HostPath
  // Without -p it makes one file of every name of a hard-linked one.
  const { status, stderr, error } = spawnSync('mfsmakesnapshot', ['-p', textOf(from), textOf(to)], { encoding: 'utf8' })
  if (error !== undefined || status !== 0) {
    throw new CloneImpossibleError(method, (error?.message ?? stderr).trim() || `mfsmakesnapshot ended with ${status}`)
  }
  withFd(openat(toFd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (cloneFd) => undoInheritance(fromFd, cloneFd))
}

/**
 * A MooseFS snapshot gives what lies in a directory with the setgid bit its group, and what lies in one with a default ACL that ACL,
 * as if it were new (seen on 3.0). Where the source has such a directory, what lies in it gets its own again. Looks at
 * directories alone, and at the files of those.
 */
function undoInheritance(sourceFd: number, cloneFd: number): void {
  writeMeta(cloneFd, '', 'directory', readMeta(sourceFd, '', statFd(sourceFd)), AS_IT_WAS)
  const pending: EntryPath[] = [ROOT]
  for (let path = pending.pop(); path !== undefined; path = pending.pop()) {
    const at: EntryPath = path
    withFd(openBeneath(sourceFd, at, O_DIRECTORY | O_NOFOLLOW), (from) => {
      const inherited = (statFd(from).mode & S_ISGID) !== 0 || inheritsAcls(from)
      const names: ByteString[] = []
      readDirents(from, (name, type) => {
        if (type === DT_DIR) pending.push(join(at, name))
        if (inherited) names.push(name)
      })
      if (!inherited) return
      withFd(openBeneath(cloneFd, at, O_DIRECTORY | O_NOFOLLOW), (to) => {
        for (const name of names) {
          const stat = statAt(from, name)
          const kind = stat.isDirectory
            ? 'directory'
            : stat.isFile
              ? 'file'
              : stat.type === S_IFLNK
                ? 'symlink'
                : 'special'
          writeMeta(to, name, kind, readMeta(from, name, stat), AS_IT_WAS)
        }
      })
    })
  }
}

const S_ISGID = 0o2000
const AS_IT_WAS = { removeOthers: (name: string) => name === ACL_ACCESS || name === ACL_DEFAULT } as const

/** Whether a directory is on a file system where each call takes a trip over a network. */
export function isRemote(fd: number): boolean {
  const { type } = fileSystemOf(fd)
  return type.startsWith('fuse') || REMOTE.has(type)
}

const REMOTE = new Set(['nfs', 'nfs4', 'ceph', 'cifs', 'smb2', 'smb3', 'lustre', '9p'])
