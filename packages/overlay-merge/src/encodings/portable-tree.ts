import type { ByteString } from '@lsync/posix'
import { MARKS, type MarkNames, type Namespace } from '../model/marks.ts'
import { type EntryPath, join, ROOT, split } from '../model/path.ts'
import { sortXattrs, translateItem } from './item.ts'
import { decodeKernelInode, marksOf, type RawInode } from './kernel.ts'
import { FORMAT, lineOf, MANIFEST, readManifest, VERSION } from './portable.ts'

/*
 * A portable layer that is kept while its upper changes: the tree is known here, only its data and its manifest lie
 * there. Data files are never written to again: what changes gets a new number.
 */

/** An inode of such a layer, as it stands in the upper. Names of one inode share it. */
export interface PortableInode {
  raw: RawInode
  /** The number of its data file; `undefined` for a file without bytes, and for all that is no file. */
  data: number | undefined
}

/** A name, with those beneath it where it is a directory. */
export interface PortableName {
  readonly inode: PortableInode
  readonly children: Map<ByteString, PortableName> | undefined
}

export { MANIFEST as PORTABLE_MANIFEST }

/**
 * The lines of the manifest, each with its `\n`. Marks are understood as those of `namespace`.
 * @throws {MarkInvalidError} where the kernel's lookup would fail
 */
export function* writeManifest(root: PortableName, namespace: Namespace): Generator<string, void, undefined> {
  yield `${JSON.stringify({ format: FORMAT, version: VERSION })}\n`
  const links = countNames(root)
  const groups = new Map<PortableInode, number>()
  const marks = MARKS[namespace]
  let entries = 0
  function* walk(name: PortableName, path: EntryPath): Generator<string, void, undefined> {
    const { inode, children } = name
    const item = translateItem(decodeKernelInode(path, inode.raw, marks), namespace, undefined)
    let group: number | undefined
    const isFurther = groups.has(inode)
    if (item.entry.kind !== 'whiteout' && (links.get(inode) ?? 0) > 1) {
      group = groups.get(inode) ?? groups.size
      groups.set(inode, group)
    }
    const hasData = item.entry.kind === 'file' && item.entry.metacopy === undefined && !isFurther
    entries++
    yield `${JSON.stringify(lineOf(item, group, hasData ? inode.data : undefined))}\n`
    if (children === undefined) return
    const isWhiteout = (child: PortableName) =>
      decodeKernelInode(path, child.inode.raw, marks).entry.kind === 'whiteout' && child.children === undefined
    const sorted = [...children].sort(([left], [right]) => (left < right ? -1 : 1))
    for (const wanted of [true, false]) {
      for (const [child, value] of sorted) {
        if (isWhiteout(value) === wanted) yield* walk(value, join(path, child))
      }
    }
  }
  yield* walk(root, ROOT)
  yield `${JSON.stringify({ end: true, entries })}\n`
}

function countNames(root: PortableName): Map<PortableInode, number> {
  const counts = new Map<PortableInode, number>()
  const count = ({ inode, children }: PortableName): void => {
    if (inode.raw.kind !== 'directory') counts.set(inode, (counts.get(inode) ?? 0) + 1)
    for (const child of children?.values() ?? []) count(child)
  }
  count(root)
  return counts
}

/** The tree of which these are the lines, without their `\n`. What no form carries (marks of identity) is gone. */
export function readPortableTree(lines: Iterable<string>, namespace: Namespace): PortableName | undefined {
  const marks = MARKS[namespace]
  const groups = new Map<number, PortableInode>()
  const directories = new Map<EntryPath, PortableName>()
  for (const { item, data, group } of readManifest(lines, NOWHERE)) {
    const known = group === undefined ? undefined : groups.get(group)
    const inode = known ?? { raw: rawOf(translateItem(item, undefined, namespace), marks), data }
    if (group !== undefined) groups.set(group, inode)
    const { path } = item.entry
    const name: PortableName = { inode, children: inode.raw.kind === 'directory' ? new Map() : undefined }
    if (name.children !== undefined) directories.set(path, name)
    if (path === ROOT) continue
    const { parent, name: own } = split(path)
    directories.get(parent)?.children?.set(own, name)
  }
  return directories.get(ROOT)
}

// Data is not read here.
const NOWHERE = -1
const EMPTY_META = { mode: 0, uid: 0, gid: 0, atimeNs: 0n, mtimeNs: 0n, xattrs: [] } as const

/** The inode that a kernel layer has for an item. */
function rawOf(item: Parameters<typeof marksOf>[0], marks: MarkNames): RawInode {
  const { entry } = item
  if (entry.kind === 'whiteout') {
    return entry.form === 'device'
      ? { kind: 'special', meta: EMPTY_META, type: 'character', rdev: 0 }
      : {
          kind: 'file',
          sizeBytes: 0,
          meta: { ...EMPTY_META, xattrs: [{ name: marks.whiteout, value: Buffer.alloc(0) }] },
        }
  }
  const meta = { ...entry.meta, xattrs: sortXattrs([...entry.meta.xattrs, ...marksOf(item, marks)]) }
  switch (entry.kind) {
    case 'directory':
      return { kind: 'directory', meta }
    case 'file':
      return { kind: 'file', meta, sizeBytes: entry.sizeBytes }
    case 'symlink':
      return { kind: 'symlink', meta, target: entry.target }
    case 'special':
      return { kind: 'special', meta, type: entry.type, rdev: entry.rdev }
  }
}
