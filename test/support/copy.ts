import {
  type ByteString,
  FS_APPEND_FL,
  FS_IMMUTABLE_FL,
  getInodeFlags,
  getXattr,
  type HostPath,
  link,
  listXattrs,
  makeDirectory,
  makeNode,
  makeSymlink,
  nextData,
  O_CREAT,
  O_DIRECTORY,
  O_EXCL,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  O_RDWR,
  openat,
  openBeneath,
  openRoot,
  readAt,
  readDirents,
  readSymlink,
  S_IFLNK,
  setInodeFlags,
  setModeAt,
  setModeFd,
  setOwner,
  setTimes,
  setXattr,
  statAt,
  statFd,
  truncate,
  tryStatAt,
  withFd,
  writeAt,
} from '@lsync/posix'
import { ACLS } from './tree.ts'

/**
 * Copies a tree as `cp -a` would, everything kept: the tests' own copy, plain and slow. It stands in for `mv` between
 * layers where rename answers EXDEV, and for the engine while the oracle is checked against itself.
 */
export function copyTree(from: string, to: string): void {
  const flagged: Flagged[] = []
  withFd(openRoot(from as HostPath), (source) =>
    withFd(openRoot(to as HostPath), (target) => {
      copyInside(source, target, { copied: new Map(), flagged, root: target }, '')
      // Last, since nothing can be linked to or made in what is immutable.
      for (const { path, flags } of flagged) {
        withFd(openBeneath(target, path as ByteString, O_RDONLY | O_NONBLOCK), (fd) =>
          setInodeFlags(fd, getInodeFlags(fd) | flags),
        )
      }
    }),
  )
}

type Flagged = { path: string; flags: number }

/** What one copy knows while it runs. The first copy of each inode is known by its path beneath `root`. */
interface Copying {
  readonly root: number
  readonly copied: Map<string, string>
  readonly flagged: Flagged[]
}

/**
 * Copies `name` beneath one directory fd to `newName` beneath another, as mv does: hard links inside what is copied are
 * kept, chattr flags are not.
 */
export function copyBeneath(fromDir: number, name: ByteString, toDir: number, newName: ByteString): void {
  copyName(fromDir, name, toDir, newName, { root: toDir, copied: new Map(), flagged: [] }, newName)
}

function copyInside(source: number, target: number, copying: Copying, path: string): void {
  const names: ByteString[] = []
  readDirents(source, (name) => names.push(name))
  for (const name of names.sort()) {
    copyName(source, name, target, name, copying, path === '' ? name : `${path}/${name}`)
  }
  finish(source, '', target, '')
  noteFlags(source, path, copying)
}

function copyName(
  fromDir: number,
  name: ByteString,
  toDir: number,
  newName: ByteString,
  copying: Copying,
  path: string,
): void {
  const stat = tryStatAt(fromDir, name)
  if (stat === undefined) return
  if (stat.isDirectory) {
    makeDirectory(toDir, newName, 0o700)
    withFd(openat(fromDir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (source) =>
      withFd(openat(toDir, newName, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (target) =>
        copyInside(source, target, copying, path),
      ),
    )
    return
  }
  const inode = `${stat.dev}:${stat.ino}`
  const first = copying.copied.get(inode)
  if (first !== undefined) {
    const slash = first.lastIndexOf('/')
    const parent = first.slice(0, Math.max(0, slash)) as ByteString
    withFd(openBeneath(copying.root, parent, O_RDONLY | O_DIRECTORY), (directory) =>
      link(directory, first.slice(slash + 1) as ByteString, toDir, newName),
    )
    return
  }
  copying.copied.set(inode, path)
  if (stat.isFile) {
    withFd(openat(fromDir, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK), (source) =>
      withFd(openat(toDir, newName, O_RDWR | O_CREAT | O_EXCL, 0o600), (target) => {
        copyBytes(source, target, stat.sizeBytes)
        finish(source, '', target, '')
        noteFlags(source, path, copying)
      }),
    )
    return
  }
  if (stat.type === S_IFLNK) makeSymlink(readSymlink(fromDir, name), toDir, newName)
  else makeNode(toDir, newName, stat.type | 0o600, stat.rdev)
  finish(fromDir, name, toDir, newName)
}

function noteFlags(source: number, path: string, copying: Copying): void {
  const flags = getInodeFlags(source) & (FS_IMMUTABLE_FL | FS_APPEND_FL)
  if (flags !== 0) copying.flagged.push({ path, flags })
}

function copyBytes(source: number, target: number, sizeBytes: number): void {
  for (let at = 0; ; ) {
    const data = nextData(source, at)
    if (data === undefined) break
    writeAt(target, data.start, readAt(source, data.start, data.end - data.start))
    at = data.end
  }
  truncate(target, sizeBytes)
}

function finish(fromDir: number, name: ByteString | '', toDir: number, newName: ByteString | ''): void {
  const stat = name === '' ? statFd(fromDir) : statAt(fromDir, name)
  setOwner(toDir, newName, stat.uid, stat.gid)
  if (stat.type !== S_IFLNK) {
    if (newName === '') setModeFd(toDir, stat.permissions)
    else setModeAt(toDir, newName, stat.permissions)
  }
  for (const attribute of new Set([...listXattrs(fromDir, name), ...ACLS])) {
    const value = getXattr(fromDir, name, attribute)
    if (value !== undefined) setXattr(toDir, newName, attribute, value)
  }
  setTimes(toDir, newName, stat.atimeNs, stat.mtimeNs)
}
