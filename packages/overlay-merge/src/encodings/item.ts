import type { ByteString, Stat } from '@lsync/posix'
import type { Entry, Meta, Xattr } from '../model/entry.ts'
import { MARKS, type Namespace } from '../model/marks.ts'
import { components, type EntryPath } from '../model/path.ts'

/** A regular file that is open for reading. Whoever opened it closes it. */
export interface OpenContent {
  readonly fd: number
  readonly stat: Stat
}

/** One name of a layer on its way from one form to another. */
export interface LayerItem {
  readonly entry: Entry
  /** Files with data (not a metacopy). Valid until the next item is asked for; gives the data of the layer itself. */
  readonly openContent?: () => OpenContent
  /** The data lies in a file that may be moved away: puts it at `name` beneath `dirfd`, if that is the same volume. */
  readonly takeContent?: (dirfd: number, name: ByteString) => boolean
  /** Files of an archive: the number under which the spool has the data, of a metacopy the hole that it is. */
  readonly spooled?: number
  /** The raw value of `NS.protattr` (chattr flags that the view emulates). */
  readonly protattr?: Uint8Array
  /** chattr flags of the inode itself, which no form carries: FS_IMMUTABLE_FL, FS_APPEND_FL. */
  readonly inodeFlags?: number
}

/** Something that a form or a target could not hold, or that was left out on purpose. */
export interface Loss {
  readonly path: EntryPath
  readonly what: string
}

/**
 * In which order a directory's names come. Always: a directory before what is in it, each name followed at once by its
 * subtree. `path`: names by their bytes. `whiteouts-first`: the directory's whiteouts by their bytes, then the rest.
 */
export type ItemOrder = 'path' | 'whiteouts-first'

/** What every reader can be told. */
export interface ReadOptions {
  readonly order?: ItemOrder
  /** Called for what is left out. */
  readonly onLoss?: (loss: Loss) => void
}

export const NAME_MAX = 255

/** Whether a name can be one component of a path on any Linux file system. */
export function isValidName(name: string): boolean {
  return name !== '' && name !== '.' && name !== '..' && name.length <= NAME_MAX && !/[/\0]/.test(name)
}

/** Why a path from outside cannot be used beneath a root, or `undefined` when it can. */
export function pathProblem(path: EntryPath): string | undefined {
  for (const name of components(path)) {
    if (name === '..') return 'it leads out of the layer (..)'
    if (name.length > NAME_MAX) return `a component is longer than ${NAME_MAX} bytes`
    if (!isValidName(name)) return 'it is not a plain path relative to the layer root'
  }
  return undefined
}

/**
 * The attributes as another form stores them. A kernel layer keeps an attribute of the container that looks like a
 * mark of its namespace one level deeper (`NS.overlay.foo`); everything else keeps it as it is seen.
 * Source: overlay-format §5, escaping.
 */
export function translateXattrs(
  xattrs: readonly Xattr[],
  from: Namespace | undefined,
  to: Namespace | undefined,
): readonly Xattr[] {
  if (from === to || xattrs.length === 0) return xattrs
  let changed = false
  const translated = xattrs.map((xattr) => {
    const name = escapeName(unescapeName(xattr.name, from), to)
    if (name === xattr.name) return xattr
    changed = true
    return { name, value: xattr.value }
  })
  return changed ? sortXattrs(translated) : xattrs
}

function unescapeName(name: ByteString, from: Namespace | undefined): ByteString {
  if (from === undefined || !name.startsWith(MARKS[from].escape)) return name
  return (MARKS[from].prefix + name.slice(MARKS[from].escape.length)) as ByteString
}

function escapeName(name: ByteString, to: Namespace | undefined): ByteString {
  if (to === undefined || !name.startsWith(MARKS[to].prefix)) return name
  return (MARKS[to].escape + name.slice(MARKS[to].prefix.length)) as ByteString
}

/** The attributes in the order of `Meta.xattrs`. */
export function sortXattrs(xattrs: readonly Xattr[]): Xattr[] {
  return [...xattrs].sort((left, right) => (left.name < right.name ? -1 : left.name > right.name ? 1 : 0))
}

/** The item with other attributes. */
export function withXattrs(item: LayerItem, xattrs: readonly Xattr[]): LayerItem {
  const { entry } = item
  if (entry.kind === 'whiteout' || entry.meta.xattrs === xattrs) return item
  return { ...item, entry: { ...entry, meta: { ...entry.meta, xattrs } } }
}

/** The item as a form with another namespace (or none) stores it. */
export function translateItem(item: LayerItem, from: Namespace | undefined, to: Namespace | undefined): LayerItem {
  if (item.entry.kind === 'whiteout') return item
  return withXattrs(item, translateXattrs(item.entry.meta.xattrs, from, to))
}

/** Metadata for what no layer described: root's, nobody may write, the epoch. */
export const DEFAULT_DIRECTORY_META: Meta = { mode: 0o755, uid: 0, gid: 0, atimeNs: 0n, mtimeNs: 0n, xattrs: [] }
