import {
  type ByteString,
  close,
  O_DIRECTORY,
  O_RDONLY,
  openBeneath,
  readDirents,
  type Stat,
  statFd,
} from '@lsync/posix'
import { type EntryPath, join, ROOT } from '../model/path.ts'
import { SubmountError } from '../problems.ts'
import { openDirectory } from './inode.ts'
import type { LayerItem } from './item.ts'

/** How one form of layer tree is read; the walk calls it with open directories. */
export interface TreeReader {
  /** The item of the root, whose fd this is. */
  root(fd: number): LayerItem
  /** The names to read in an open directory, in the order in which they shall come. */
  list(fd: number, path: EntryPath): readonly ByteString[]
  /** What the layer has under a name of `list`; `undefined` when it has gone or is nothing of the layer's. */
  read(fd: number, path: EntryPath, name: ByteString): LayerItem | undefined
}

const OPEN_LEVELS = 64

interface Level {
  readonly path: EntryPath
  fd: number
  readonly names: readonly ByteString[]
  next: number
}

/**
 * Every item of a tree, a directory before its content. Holds the names of one directory per level and at most 64
 * descriptors, however deep the tree is; paths beyond PATH_MAX are fine. Follows no symlink.
 */
export function* walkTree(rootFd: number, reader: TreeReader): Generator<LayerItem, void, undefined> {
  yield reader.root(rootFd)
  const stack: Level[] = [{ path: ROOT, fd: rootFd, names: reader.list(rootFd, ROOT), next: 0 }]
  try {
    for (let level = stack.at(-1); level !== undefined; level = stack.at(-1)) {
      const name = level.names[level.next++]
      if (name === undefined) {
        stack.pop()
        if (level.fd !== rootFd) close(level.fd)
        continue
      }
      if (level.fd < 0) level.fd = openBeneath(rootFd, level.path, O_RDONLY | O_DIRECTORY)
      const item = reader.read(level.fd, level.path, name)
      if (item === undefined) continue
      yield item
      if (item.entry.kind !== 'directory') continue
      const path = join(level.path, name)
      const fd = openDirectory(level.fd, name)
      const child: Level = { path, fd, names: [], next: 0 }
      stack.push(child)
      stack[stack.length - 1] = { ...child, names: reader.list(fd, path) }
      const far = stack[stack.length - 1 - OPEN_LEVELS]
      if (far !== undefined && far.fd !== rootFd && far.fd >= 0) {
        close(far.fd)
        far.fd = -1
      }
    }
  } finally {
    for (const level of stack) if (level.fd !== rootFd && level.fd >= 0) close(level.fd)
  }
}

/** The names in an open directory, sorted by bytes. */
export function sortedNames(fd: number): ByteString[] {
  const names: ByteString[] = []
  readDirents(fd, (name) => names.push(name))
  return names.sort()
}

/** Refuses names on another mount than the layer's root: what overlayfs shows there lies beneath the mount. */
export class MountGuard {
  readonly #mountId: number

  constructor(rootFd: number) {
    this.#mountId = statFd(rootFd).mountId
  }

  /** @throws {SubmountError} */
  check(path: EntryPath, stat: Stat): void {
    if (stat.mountId !== this.#mountId) throw new SubmountError(path)
  }
}

/** Link groups of what has further names: unique within one device, so also across btrfs subvolumes. */
export function linkGroupOf(stat: Stat): { linkGroup?: string } {
  return stat.nlink > 1 && !stat.isDirectory ? { linkGroup: `${stat.dev}:${stat.ino}` } : {}
}
