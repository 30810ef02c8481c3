import type { Hash } from 'node:crypto'
import { createHash } from 'node:crypto'
import {
  type ByteString,
  close,
  errnoOf,
  FS_APPEND_FL,
  FS_IMMUTABLE_FL,
  getInodeFlags,
  getXattr,
  type HostPath,
  listXattrs,
  nextData,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  openat,
  openRoot,
  printable,
  readAt,
  readDirents,
  readSymlink,
  S_IFBLK,
  S_IFCHR,
  S_IFDIR,
  S_IFIFO,
  S_IFLNK,
  S_IFREG,
  S_IFSOCK,
  type Stat,
  statFd,
  tryStatAt,
} from '@lsync/posix'

export type NodeType = 'file' | 'directory' | 'symlink' | 'fifo' | 'socket' | 'character' | 'block' | 'error'

/** Everything about one name that a merge has to keep. */
export interface Node {
  readonly type: NodeType
  readonly mode: number
  readonly uid: number
  readonly gid: number
  readonly mtimeNs: bigint
  /** Sorted by name; values in hex. */
  readonly xattrs: ReadonlyMap<string, string>
  /** Content up to 48 bytes as it is (latin1), else `sha1:…`; files only. */
  readonly content?: string
  readonly sizeBytes?: number
  /** Bytes that are not in a hole; files of 64 KiB and more only. */
  readonly dataBytes?: number
  readonly allocatedBytes?: number
  readonly target?: string
  readonly rdev?: number
  /** Every name of the inode, sorted, where there are several. */
  readonly links?: readonly string[]
  readonly nlink: number
  /** chattr(1) letters `i` and `a`. */
  readonly flags: string
  /** The errno of what failed, when something about the name could not be read. */
  readonly error?: string
}

/** A whole tree by path (bytes, no leading slash); `''` is the root. */
export type Tree = ReadonlyMap<string, Node>

const SHOWN_BYTES = 48
export const HOLE_BYTES = 64 * 1024
const typeNames = new Map<number, NodeType>([
  [S_IFREG, 'file'],
  [S_IFDIR, 'directory'],
  [S_IFLNK, 'symlink'],
  [S_IFIFO, 'fifo'],
  [S_IFSOCK, 'socket'],
  [S_IFCHR, 'character'],
  [S_IFBLK, 'block'],
])

/**
 * Reads a tree by lookup: a listed name that lstat does not find is not there (overlay-format §1, phantom names).
 * What cannot be read becomes a node with `error`, so that two views that fail alike compare equal.
 */
export function readTree(root: string): Tree {
  const tree = new Map<string, Node>()
  const groups = new Map<string, string[]>()
  const fd = openRoot(root as HostPath)
  try {
    readDirectory(fd, '', statFd(fd), tree, groups)
  } finally {
    close(fd)
  }
  for (const paths of groups.values()) {
    if (paths.length < 2) continue
    paths.sort()
    for (const path of paths) tree.set(path, { ...(tree.get(path) as Node), links: paths })
  }
  return new Map([...tree].sort(([left], [right]) => (left < right ? -1 : left > right ? 1 : 0)))
}

function readDirectory(
  fd: number,
  path: string,
  stat: Stat,
  tree: Map<string, Node>,
  groups: Map<string, string[]>,
): void {
  let error: string | undefined
  const names: ByteString[] = []
  try {
    readDirents(fd, (name) => names.push(name))
  } catch (cause) {
    error = errnoOf(cause) ?? 'unknown'
  }
  const base = { ...metaOf(stat), xattrs: readXattrs(fd, ''), flags: flagsOf(fd) }
  tree.set(path, error === undefined ? base : { ...base, error })
  names.sort()
  for (const name of names) {
    const childPath = path === '' ? name : `${path}/${name}`
    try {
      readNode(fd, name, childPath, tree, groups)
    } catch (cause) {
      const code = errnoOf(cause)
      if (code === undefined) throw cause
      tree.set(childPath, {
        type: 'error',
        mode: 0,
        uid: 0,
        gid: 0,
        mtimeNs: 0n,
        xattrs: new Map(),
        nlink: 0,
        flags: '',
        error: code,
      })
    }
  }
}

function readNode(
  parent: number,
  name: ByteString,
  path: string,
  tree: Map<string, Node>,
  groups: Map<string, string[]>,
): void {
  const stat = tryStatAt(parent, name)
  if (stat === undefined) return
  if (!stat.isDirectory) {
    const inode = `${stat.dev}:${stat.ino}`
    const group = groups.get(inode)
    if (group === undefined) groups.set(inode, [path])
    else if (!group.includes(path)) group.push(path) // a read that is tried again comes here again
  }
  const common = metaOf(stat)
  if (stat.isDirectory) {
    const fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
    try {
      readDirectory(fd, path, stat, tree, groups)
    } finally {
      close(fd)
    }
  } else if (stat.isFile) {
    const fd = openat(parent, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
    try {
      const holes = stat.sizeBytes < HOLE_BYTES ? {} : { dataBytes: dataBytesOf(fd), allocatedBytes: stat.blocks * 512 }
      tree.set(path, {
        ...common,
        xattrs: readXattrs(fd, ''),
        sizeBytes: stat.sizeBytes,
        content: contentOf(fd),
        ...holes,
        flags: flagsOf(fd),
      })
    } finally {
      close(fd)
    }
  } else {
    const xattrs = readXattrs(parent, name)
    const rest =
      stat.type === S_IFLNK
        ? { target: readSymlink(parent, name) }
        : stat.type === S_IFCHR || stat.type === S_IFBLK
          ? { rdev: stat.rdev }
          : {}
    tree.set(path, { ...common, xattrs, ...rest, flags: '' })
  }
}

function metaOf(stat: Stat) {
  return {
    type: typeNames.get(stat.type) ?? 'error',
    mode: stat.permissions,
    uid: stat.uid,
    gid: stat.gid,
    mtimeNs: stat.mtimeNs,
    nlink: stat.nlink,
  }
}

function readXattrs(fd: number, name: ByteString | ''): Map<string, string> {
  const values = new Map<string, string>()
  for (const attribute of new Set([...listXattrs(fd, name), ...ACLS].sort())) {
    // XFS lists its own storage of an ACL beside the ACL itself.
    if (attribute.startsWith('trusted.SGI_ACL_')) continue
    const value = getXattr(fd, name, attribute)
    if (value !== undefined) values.set(attribute, value.toString('hex'))
  }
  return values
}

// MooseFS has them and does not list them.
export const ACLS = ['system.posix_acl_access', 'system.posix_acl_default'] as ByteString[]

function flagsOf(fd: number): string {
  const flags = getInodeFlags(fd)
  return (flags & FS_IMMUTABLE_FL ? 'i' : '') + (flags & FS_APPEND_FL ? 'a' : '')
}

function contentOf(fd: number): string {
  const PIECE = 1 << 20
  let hash: Hash | undefined
  for (let at = 0; ; at += PIECE) {
    const piece = readAt(fd, at, PIECE)
    if (at === 0 && piece.length <= SHOWN_BYTES) return piece.toString('latin1')
    hash ??= createHash('sha1')
    hash.update(piece)
    if (piece.length < PIECE) return `sha1:${hash.digest('hex')}`
  }
}

function dataBytesOf(fd: number): number {
  let sum = 0
  let at = 0
  for (;;) {
    const data = nextData(fd, at)
    if (data === undefined) return sum
    sum += data.end - data.start
    at = data.end
  }
}

export interface DiffOptions {
  /** Whether a hole of the expected file must be one in the actual file. Default true; not on MooseFS (no SEEK_HOLE). */
  readonly holes?: boolean
  /** Whether the mode of a symlink counts, which means nothing and cannot be set. Default true. */
  readonly symlinkModes?: boolean
  /** Whether chattr flags count. Default true; a file system without them reports the loss. */
  readonly flags?: boolean
  /** Whether hard-link groups count. Default true. */
  readonly links?: boolean
  /** What the file system cannot hold, as it was measured: see `moosefs.ts`. Default 1n, exact. */
  readonly timeGranularityNs?: bigint
}

/** Every difference between two trees as one line each, in path order; none when they are equal. */
export function diffTrees(expected: Tree, actual: Tree, options: DiffOptions = {}): string[] {
  const lines: string[] = []
  for (const path of new Set([...expected.keys(), ...actual.keys()].sort())) {
    const label = path === '' ? '(root)' : printable(path)
    const want = expected.get(path)
    const got = actual.get(path)
    if (want === undefined) lines.push(`${label}: should not exist, but is a ${describe(got)}`)
    else if (got === undefined) lines.push(`${label}: missing, should be a ${describe(want)}`)
    else for (const line of diffNodes(want, got, options)) lines.push(`${label}: ${line}`)
  }
  return lines
}

function describe(node: Node | undefined): string {
  return node === undefined ? 'nothing' : node.error === undefined ? node.type : `${node.type} (${node.error})`
}

function diffNodes(want: Node, got: Node, options: DiffOptions): string[] {
  const lines: string[] = []
  const differs = (what: string, expected: unknown, actual: unknown) => {
    if (expected !== actual) lines.push(`${what} should be ${show(expected)}, is ${show(actual)}`)
  }
  differs('error', want.error, got.error)
  differs('type', want.type, got.type)
  if (want.type !== got.type) return lines
  if (want.type !== 'symlink' || options.symlinkModes !== false) {
    differs('mode', want.mode.toString(8), got.mode.toString(8))
  }
  differs('uid', want.uid, got.uid)
  differs('gid', want.gid, got.gid)
  differs('size', want.sizeBytes, got.sizeBytes)
  differs('content', want.content, got.content)
  const grain = options.timeGranularityNs ?? 1n
  if (want.mtimeNs / grain !== got.mtimeNs / grain) differs('mtime', want.mtimeNs, got.mtimeNs)
  differs('target', want.target, got.target)
  differs('rdev', want.rdev, got.rdev)
  if (options.links !== false) differs('links', want.links?.join(' '), got.links?.join(' '))
  if (options.flags !== false) differs('flags', want.flags, got.flags)
  for (const name of new Set([...want.xattrs.keys(), ...got.xattrs.keys()].sort())) {
    differs(`xattr ${printable(name)}`, want.xattrs.get(name), got.xattrs.get(name))
  }
  if (options.holes !== false && want.sizeBytes !== undefined && want.dataBytes !== undefined) {
    const holeBytes = want.sizeBytes - want.dataBytes
    const data = got.dataBytes ?? 0
    // Either figure alone can grow by itself: XFS takes cached pages over preallocated space for data, and preallocates.
    const allocated = Math.max(want.dataBytes, want.allocatedBytes ?? 0)
    const isFilled = data > want.dataBytes + HOLE_BYTES && (got.allocatedBytes ?? 0) > allocated + HOLE_BYTES
    if (holeBytes >= HOLE_BYTES && isFilled) {
      lines.push(`holes were lost: ${want.dataBytes} bytes of data became ${data}`)
    }
  }
  return lines
}

function show(value: unknown): string {
  return typeof value === 'string' ? `'${printable(value)}'` : String(value)
}

/** Names of a plain tree whose link count says that names outside the tree share their inode. */
export function strayLinks(tree: Tree): string[] {
  const stray: string[] = []
  for (const [path, node] of tree) {
    if (node.type === 'directory' || node.type === 'error') continue
    const names = node.links?.length ?? 1
    if (node.nlink !== names) stray.push(`${printable(path)}: ${node.nlink} links, ${names} names`)
  }
  return stray
}

/** A tree as a small literal for assertions: `{ 'd': 'dir', 'd/f': 'content', 'l': '-> target' }`, the root left out. */
export function outline(tree: Tree): Record<string, string> {
  const lines: Record<string, string> = {}
  for (const [path, node] of tree) {
    if (path === '') continue
    lines[printable(path)] =
      node.error ??
      (node.type === 'directory'
        ? 'dir'
        : node.type === 'file'
          ? (node.content as string)
          : node.type === 'symlink'
            ? `-> ${printable(node.target as string)}`
            : node.type)
  }
  return lines
}
