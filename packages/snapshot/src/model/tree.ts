import { type ByteString, bytesOf, type Ino, LsyncError, textOf } from '@lsync/posix'
import { formatTime, isSameTime, isTime, jsonText, parseTime, quoteName, unquoteName } from './go-text.ts'
import { goModeOf, isNodeType, modeOf, type NodeType } from './mode.ts'

/** The id of a file or an object of a repository: a SHA-256 in hexadecimal. */
export type ObjectId = string

/** An extended attribute: its name in bytes, its value. */
export type Xattr = readonly [name: ByteString, value: Buffer]

/**
 * One name in a tree. Times stay the text that the repository has; `timeOf` reads them. Source: restic's design document,
 * "Trees and Data".
 */
export interface TreeNode {
  readonly name: ByteString
  readonly type: NodeType
  /** As `st_mode`. */
  readonly mode: number
  readonly mtime: string
  readonly atime: string
  readonly ctime: string
  readonly uid: number
  readonly gid: number
  /** Names of owner and group where the snapshot was made; `''` where it had none. */
  readonly user: string
  readonly group: string
  readonly inode: Ino
  /** `st_dev`, as the kernel encodes it. */
  readonly deviceId: Ino
  readonly sizeBytes: number
  /** Hard links; 0 where that means nothing. */
  readonly links: number
  readonly linkTarget: ByteString
  readonly xattrs: readonly Xattr[]
  /** What a device node stands for, as mknod(2) takes it. */
  readonly device: number
  /** The chunks of a file, in order; `undefined` for everything else. */
  readonly content: readonly ObjectId[] | undefined
  /** The tree of a directory. */
  readonly subtree: ObjectId | undefined
}

/** A node without what the two things that can hang from it: the state of its inode. */
export type NodeMeta = Omit<TreeNode, 'content' | 'subtree'>

/** A directory of which nothing is known: root's, for all to read, from 1970. Without its tree. */
export function bareDirectory(name: ByteString): TreeNode {
  const time = formatTime(0n)
  return {
    name,
    type: 'dir',
    mode: modeOf('dir', 0o755),
    mtime: time,
    atime: time,
    ctime: time,
    uid: 0,
    gid: 0,
    user: '',
    group: '',
    inode: 0,
    deviceId: 0,
    sizeBytes: 0,
    links: 0,
    linkTarget: '' as ByteString,
    xattrs: [],
    device: 0,
    content: undefined,
    subtree: undefined,
  }
}

/** A node as the text that its tree has of it. Field by field in the order of the format's first writer. */
export function encodeNode(node: TreeNode): string {
  const { type, user, group, inode, deviceId, sizeBytes, links, linkTarget, xattrs, device, content, subtree } = node
  const target = linkTarget === '' ? '' : linkText(linkTarget)
  return (
    `{"name":${jsonText(quoteName(node.name))},"type":"${type}"${field('mode', goModeOf(node.mode))}` +
    `,"mtime":"${node.mtime}","atime":"${node.atime}","ctime":"${node.ctime}","uid":${node.uid},"gid":${node.gid}` +
    (user === '' ? '' : `,"user":${jsonText(user)}`) +
    (group === '' ? '' : `,"group":${jsonText(group)}`) +
    `${field('inode', inode)}${field('device_id', deviceId)}${field('size', sizeBytes)}${field('links', links)}${target}` +
    (xattrs.length === 0 ? '' : `,"extended_attributes":[${xattrs.map(xattrText).join(',')}]`) +
    `${field('device', device)},"content":${content === undefined ? 'null' : idsText(content)}` +
    `${subtree === undefined ? '' : `,"subtree":"${subtree}"`}}`
  )
}

function field(name: string, value: Ino): string {
  return value === 0 ? '' : `,"${name}":${value}`
}

function idsText(ids: readonly ObjectId[]): string {
  return ids.length === 0 ? '[]' : `["${ids.join('","')}"]`
}

// Text that is not UTF-8 cannot be told in JSON. Readers that do not know the second field show U+FFFD, as they always did.
function linkText(target: ByteString): string {
  const text = textOf(target)
  if (text.isWellFormed()) return `,"linktarget":${jsonText(text)}`
  return `,"linktarget":${jsonText(text.toWellFormed())},"linktarget_raw":"${base64(target)}"`
}

function xattrText([name, value]: Xattr): string {
  const text = textOf(name)
  const raw = text.isWellFormed() ? '' : `,"name_raw":"${base64(name)}"`
  return `{"name":${jsonText(text.toWellFormed())},"value":${value.length === 0 ? '""' : `"${value.toString('base64')}"`}${raw}}`
}

function base64(bytes: ByteString): string {
  return Buffer.from(bytes, 'latin1').toString('base64')
}

/** The content of a tree object as text, of nodes that are encoded already, in order of their names' bytes. */
export function treeText(nodes: readonly string[]): string {
  return `{"nodes":[${nodes.join(',')}]}\n`
}

/** As `treeText`, in bytes. */
export function encodeTree(nodes: readonly string[]): Buffer {
  return Buffer.from(treeText(nodes))
}

/** A tree that no snapshot can have: not JSON, fields of the wrong kind, or names that would lead elsewhere. */
export class TreeInvalidError extends LsyncError {
  constructor(why: string) {
    super('TREE_INVALID', `a directory in the repository is not valid: ${why}`, { hint: 'see `lsync snapshot check`' })
  }
}

/**
 * The nodes of a tree object, in order of their names' bytes.
 *
 * Repositories come from elsewhere, so nothing is taken on trust: a name is one path component, numbers are in range.
 * @throws {TreeInvalidError}
 */
export function decodeTree(content: Buffer): TreeNode[] {
  const raw = parseJson(content)
  const list = (raw as { nodes?: unknown } | null)?.nodes
  // A writer in Go gives an empty list as null.
  if (list === null) return []
  if (!Array.isArray(list)) throw new TreeInvalidError('it has no list of nodes')
  let last = ''
  return list.map((item: unknown) => {
    const node = decodeNode(item)
    if (node.name <= last) throw new TreeInvalidError('its names are not in order, or one is there twice')
    last = node.name
    return node
  })
}

// Numbers beyond 2^53 would be rounded: inode numbers can be larger.
const LARGE_NUMBER = /"(?:inode|device_id|device)":\d{16}/

function parseJson(content: Buffer): unknown {
  try {
    const text = content.toString()
    if (!LARGE_NUMBER.test(text)) return JSON.parse(text)
    return JSON.parse(text, (_key, value: unknown, context?: { source?: string }) =>
      typeof value === 'number' && !Number.isSafeInteger(value) && /^\d+$/.test(context?.source ?? '')
        ? BigInt(context?.source as string)
        : value,
    )
  } catch {
    throw new TreeInvalidError('it is not JSON')
  }
}

type Raw = Readonly<Record<string, unknown>>

function decodeNode(item: unknown): TreeNode {
  const raw = item as Raw
  if (typeof raw !== 'object' || raw === null) throw new TreeInvalidError('a node is not an object')
  const name = typeof raw['name'] === 'string' ? unquoteName(raw['name']) : undefined
  if (name === undefined || !isComponent(name)) throw new TreeInvalidError('a name is not one component of a path')
  const { type } = raw
  if (!isNodeType(type)) throw new TreeInvalidError(`a node is of an unknown type`)
  return {
    name,
    type,
    mode: modeOf(type, count(raw, 'mode', 2 ** 32)),
    mtime: time(raw, 'mtime'),
    atime: time(raw, 'atime'),
    ctime: time(raw, 'ctime'),
    uid: count(raw, 'uid', 2 ** 32),
    gid: count(raw, 'gid', 2 ** 32),
    user: text(raw, 'user'),
    group: text(raw, 'group'),
    inode: large(raw, 'inode'),
    deviceId: large(raw, 'device_id'),
    sizeBytes: count(raw, 'size'),
    links: count(raw, 'links'),
    linkTarget: bytes(raw, 'linktarget'),
    xattrs: decodeXattrs(raw['extended_attributes']),
    device: count(raw, 'device'),
    content: type === 'file' ? decodeIds(raw['content']) : undefined,
    subtree: type === 'dir' ? decodeId(raw['subtree']) : undefined,
  }
}

/** Whether a name is one that a directory can have. */
export function isComponent(name: string): boolean {
  return name !== '' && name !== '.' && name !== '..' && name.length <= 255 && !/[/\0]/.test(name)
}

function count(raw: Raw, name: string, limit = Number.MAX_SAFE_INTEGER + 1): number {
  const value = raw[name] ?? 0
  if (typeof value === 'number' && Number.isInteger(value) && value >= 0 && value < limit) return value
  throw new TreeInvalidError(`${name} is out of range`)
}

function large(raw: Raw, name: string): Ino {
  const value = raw[name] ?? 0
  if (typeof value === 'bigint' && value < 2n ** 64n) return value
  return count(raw, name)
}

function text(raw: Raw, name: string): string {
  const value = raw[name] ?? ''
  if (typeof value === 'string') return value
  throw new TreeInvalidError(`${name} is not text`)
}

function bytes(raw: Raw, name: string): ByteString {
  const exact = raw[`${name}_raw`]
  if (typeof exact === 'string') return Buffer.from(exact, 'base64').toString('latin1') as ByteString
  return bytesOf(text(raw, name).toWellFormed())
}

let lastTime = ''

function time(raw: Raw, name: string): string {
  const value = raw[name] ?? '1970-01-01T00:00:00Z'
  if (typeof value === 'string' && (value === lastTime || isTime(value))) {
    // Most nodes have the same time several times.
    lastTime = value
    return value
  }
  throw new TreeInvalidError(`${name} is not a time`)
}

function decodeXattrs(list: unknown): Xattr[] {
  if (list === undefined || list === null) return []
  if (!Array.isArray(list)) throw new TreeInvalidError('attributes are not a list')
  return list.map((item: unknown) => {
    const raw = (item ?? {}) as Raw
    const name = bytes(raw, 'name')
    if (name === '' || name.length > 255 || name.includes('\0')) throw new TreeInvalidError('an attribute has no name')
    const value = raw['value'] ?? ''
    if (typeof value !== 'string') throw new TreeInvalidError('an attribute has no value')
    return [name, Buffer.from(value, 'base64')]
  })
}

function decodeIds(list: unknown): ObjectId[] {
  if (list === null || list === undefined) return []
  if (!Array.isArray(list)) throw new TreeInvalidError('content is not a list')
  return list.map(decodeId)
}

function decodeId(value: unknown): ObjectId {
  if (isId(value)) return value
  throw new TreeInvalidError('an id is not one')
}

/** Whether a value is an id: 64 hexadecimal digits. */
export function isId(value: unknown): value is ObjectId {
  return typeof value === 'string' && /^[0-9a-f]{64}$/.test(value)
}

/** The ns since 1970 of a time of a node, which `decodeTree` has checked. */
export function timeOf(text: string): bigint {
  return parseTime(text) as bigint
}

/** Whether a file is the one that an older tree has: nobody can change a file without changing its ctime. */
export function isUnchanged(node: NodeMeta, older: TreeNode): boolean {
  return (
    node.type === older.type &&
    node.inode === older.inode &&
    node.sizeBytes === older.sizeBytes &&
    isSameTime(node.ctime, older.ctime) &&
    isSameTime(node.mtime, older.mtime)
  )
}
