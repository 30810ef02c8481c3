import { S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, S_IFSOCK } from '@lsync/posix'

/** What a node of a tree is, in the format's words. */
export type NodeType = 'file' | 'dir' | 'symlink' | 'fifo' | 'socket' | 'chardev' | 'dev'

// Go's io/fs.FileMode: the permission bits are the usual ones, everything else sits elsewhere.
const GO_DEVICE = 2 ** 26
const GO_SETUID = 2 ** 23
const GO_SETGID = 2 ** 22
const GO_STICKY = 2 ** 20
const GO_TYPES: readonly (readonly [bits: number, type: NodeType, format: number])[] = [
  [0, 'file', S_IFREG],
  [2 ** 31, 'dir', S_IFDIR],
  [2 ** 27, 'symlink', S_IFLNK],
  [2 ** 25, 'fifo', S_IFIFO],
  [2 ** 24, 'socket', S_IFSOCK],
  [GO_DEVICE + 2 ** 21, 'chardev', S_IFCHR],
  [GO_DEVICE, 'dev', S_IFBLK],
]
const byFormat = new Map(GO_TYPES.map(([bits, type, format]) => [format, { bits, type }]))
const formats = new Map(GO_TYPES.map(([, type, format]) => [type, format]))

/** The type of a node with this `st_mode`. */
export function nodeTypeOf(mode: number): NodeType {
  return kindOf(mode).type
}

/** The number that stands for an `st_mode` in a tree. */
export function goModeOf(mode: number): number {
  return (
    kindOf(mode).bits +
    (mode & 0o777) +
    ((mode & 0o4000) !== 0 ? GO_SETUID : 0) +
    ((mode & 0o2000) !== 0 ? GO_SETGID : 0) +
    ((mode & 0o1000) !== 0 ? GO_STICKY : 0)
  )
}

/** The `st_mode` of a node. Its type is what `type` says: the bits in the number repeat it. */
export function modeOf(type: NodeType, goMode: number): number {
  const has = (bit: number) => Math.floor(goMode / bit) % 2 === 1
  return (
    (formats.get(type) as number) |
    (goMode % 0o1000) |
    (has(GO_SETUID) ? 0o4000 : 0) |
    (has(GO_SETGID) ? 0o2000 : 0) |
    (has(GO_STICKY) ? 0o1000 : 0)
  )
}

/** Whether a text names a type. */
export function isNodeType(text: unknown): text is NodeType {
  return formats.has(text as NodeType)
}

function kindOf(mode: number): { bits: number; type: NodeType } {
  return byFormat.get(mode & S_IFMT) as { bits: number; type: NodeType }
}
