import {
  type ByteString,
  close,
  getXattr,
  makeDevice,
  type Stat,
  setModeFd,
  setTimes,
  statFd,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import type { Xattr } from '../model/entry.ts'
import { opaqueMeaning } from '../model/marks.ts'
import { type EntryPath, join, ROOT } from '../model/path.ts'
import { LayerEntryRefusedError, NeedsDerefError, NotExpressibleError } from './errors.ts'
import { openDirectory, openNew } from './inode.ts'
import { type ItemOrder, isValidName, type LayerItem, NAME_MAX, type ReadOptions } from './item.ts'
import { completed, plainEntry, type RawInode, readInode, readRootInode } from './kernel.ts'
import type { TreeForm } from './tree-sink.ts'
import { MountGuard, sortedNames, type TreeReader, walkTree } from './walk.ts'

/** What a whiteout's name begins with, in a tree and in an OCI layer. */
export const WHITEOUT_PREFIX = '.wh.'
/** The file that makes its directory opaque. */
export const OPAQUE_MARKER = '.wh..wh..opq' as ByteString
const BOOKKEEPING_PREFIX = '.wh..wh.'

/** What a name means in the `.wh.` form. */
export type WhName =
  | { readonly means: 'name' }
  | { readonly means: 'whiteout'; readonly name: ByteString }
  | { readonly means: 'opaque' }
  /** AUFS's own files (`.wh..wh.aufs`, `.wh..wh.orph`, `.wh..wh.plnk` and the like): no part of the layer. */
  | { readonly means: 'bookkeeping' }
  /** `.wh.`, `.wh..`, `.wh...`: taken at its word it would delete the directory or its parent. */
  | { readonly means: 'invalid' }

/** Total; the name is one component. Source: OCI image layer specification, "whiteouts"; overlay-format §10. */
export function parseWhName(name: string): WhName {
  if (!name.startsWith(WHITEOUT_PREFIX)) return { means: 'name' }
  if (name === OPAQUE_MARKER) return { means: 'opaque' }
  if (name.startsWith(BOOKKEEPING_PREFIX)) return { means: 'bookkeeping' }
  const hidden = name.slice(WHITEOUT_PREFIX.length)
  return isValidName(hidden) ? { means: 'whiteout', name: hidden as ByteString } : { means: 'invalid' }
}

export interface AufsReadOptions extends ReadOptions {
  /**
   * `fuse-overlayfs`: an upper that it wrote, which has device whiteouts, opaque marks in attributes, a `.wh..opq`
   * device beside `.wh..wh..opq`, and real owners and modes in attributes; all of it is understood and left out.
   */
  readonly variant?: 'aufs' | 'fuse-overlayfs'
}

/**
 * A tree in the `.wh.` form. A name beats its own whiteout; a directory does too, and hides what is below.
 * @throws {LayerEntryRefusedError} on `.wh.`, `.wh..`, `.wh...`, and on markers that are not empty files
 */
export function readAufsTree(rootFd: number, options: AufsReadOptions = {}): Generator<LayerItem, void, undefined> {
  const fuse = options.variant === 'fuse-overlayfs'
  const guard = new MountGuard(rootFd)
  // Of the directory listed last at each depth; a name is only read while its directory is the innermost.
  const whiteouts = new Map<EntryPath, ReadonlySet<ByteString>>()
  const reader: TreeReader = {
    root(fd) {
      const entry = plainEntry(ROOT, fuse ? realInode(readRootInode(fd)) : readRootInode(fd))
      return completed({ entry }, fd, '.' as ByteString, statFd(fd))
    },
    list(fd, path) {
      const listing = listMarkers(fd, path, fuse, options.onLoss)
      for (const known of whiteouts.keys()) if (!isAncestor(known, path)) whiteouts.delete(known)
      if (listing.whiteouts.size > 0) whiteouts.set(path, listing.whiteouts)
      return orderNames(listing, options.order ?? 'path')
    },
    read(fd, path, name) {
      const full = join(path, name)
      const isWhitedOut = whiteouts.get(path)?.has(name) === true
      const stat = tryStatAt(fd, name)
      if (stat === undefined) {
        return isWhitedOut ? { entry: { kind: 'whiteout', path: full, form: 'device' } } : undefined
      }
      guard.check(full, stat)
      if (stat.isWhiteoutDevice) return { entry: { kind: 'whiteout', path: full, form: 'device' } }
      const inode = readInode(fd, name, stat)
      const entry = plainEntry(full, fuse ? realInode(inode) : inode)
      if (entry.kind !== 'directory') return completed({ entry }, fd, name, stat)
      const opaque = isWhitedOut || hasOpaqueMarker(fd, name, fuse)
      return completed({ entry: { ...entry, opaque } }, fd, name, stat)
    },
  }
  return walkTree(rootFd, reader)
}

function isAncestor(known: EntryPath, path: EntryPath): boolean {
  return known === '' || path === known || path.startsWith(`${known}/`)
}

interface Listing {
  readonly names: readonly ByteString[]
  /** Names that a marker hides below, whether or not the layer has them itself. */
  readonly whiteouts: ReadonlySet<ByteString>
}

function listMarkers(fd: number, path: EntryPath, fuse: boolean, onLoss: ReadOptions['onLoss']): Listing {
  const names: ByteString[] = []
  const whiteouts = new Set<ByteString>()
  for (const name of sortedNames(fd)) {
    const meaning = parseWhName(name)
    const full = join(path, name)
    if (meaning.means === 'name') names.push(name)
    else if (meaning.means === 'bookkeeping') onLoss?.({ path: full, what: 'bookkeeping of AUFS' })
    else if (meaning.means === 'invalid') throw invalidMarker(full)
    else {
      const stat = tryStatAt(fd, name)
      if (stat === undefined) continue
      // fuse-overlayfs puts a device of this name, which hides nothing, into every opaque directory.
      if (fuse && name === '.wh..opq' && stat.isWhiteoutDevice) continue
      checkMarker(full, stat)
      if (meaning.means === 'whiteout') whiteouts.add(meaning.name)
    }
  }
  return { names, whiteouts }
}

/** Refuses `.wh.`, `.wh..` and `.wh...`. */
export function invalidMarker(path: EntryPath): LayerEntryRefusedError {
  return new LayerEntryRefusedError(path, 'it would white out its own directory or the one above')
}

function checkMarker(path: EntryPath, stat: Stat): void {
  if (stat.isWhiteoutDevice || (stat.isFile && stat.sizeBytes === 0)) return
  const hint = 'read the tree as a kernel layer or a plain tree if .wh. names are ordinary there'
  throw new LayerEntryRefusedError(path, 'a whiteout marker is an empty file', hint)
}

function orderNames({ names, whiteouts }: Listing, order: ItemOrder): readonly ByteString[] {
  if (whiteouts.size === 0) return names
  const present = new Set(names)
  const hidden = [...whiteouts].filter((name) => !present.has(name)).sort()
  return order === 'whiteouts-first' ? [...hidden, ...names] : [...names, ...hidden].sort()
}

const FUSE_OPAQUE = ['trusted.overlay.opaque', 'user.overlay.opaque', 'user.fuseoverlayfs.opaque'] as ByteString[]

function hasOpaqueMarker(dirfd: number, name: ByteString, fuse: boolean): boolean {
  const fd = openDirectory(dirfd, name)
  try {
    if (tryStatAt(fd, OPAQUE_MARKER) !== undefined) return true
    return fuse && FUSE_OPAQUE.some((mark) => opaqueMeaning(getXattr(fd, '', mark)) === 'closed')
  } finally {
    close(fd)
  }
}

const OVERRIDES = [
  'security.fuseoverlayfs.override_stat',
  'user.fuseoverlayfs.override_stat',
  'user.containers.override_stat',
]

function isFuseXattr(name: string): boolean {
  return (
    OVERRIDES.includes(name) ||
    name.startsWith('trusted.overlay.') ||
    name.startsWith('user.overlay.') ||
    name.startsWith('user.fuseoverlayfs.')
  )
}

/** An inode of a fuse-overlayfs upper as its mount shows it: `uid:gid:mode[:type]` in an attribute wins. */
export function realInode(raw: RawInode): RawInode {
  const override = raw.meta.xattrs.find((xattr) => OVERRIDES.includes(xattr.name))
  const xattrs = raw.meta.xattrs.filter((xattr) => !isFuseXattr(xattr.name))
  const plain = { ...raw, meta: { ...raw.meta, xattrs } } as RawInode
  return override === undefined ? plain : overridden(plain, override)
}

function overridden(raw: RawInode, override: Xattr): RawInode {
  const text = Buffer.from(override.value).toString('latin1')
  const match = /^([0-9]+):([0-9]+):([0-7]+)(?::([a-z]+)(?:-([0-9]+)-([0-9]+))?)?/.exec(text)
  if (match === null) return raw
  const [, uid, gid, mode, type, major, minor] = match
  const meta = { ...raw.meta, uid: Number(uid), gid: Number(gid), mode: Number.parseInt(mode as string, 8) & 0o7777 }
  // Where nodes cannot be made, an empty file stands for one.
  if (raw.kind === 'file' && (type === 'block' || type === 'char')) {
    const rdev = makeDevice(Number(major ?? 0), Number(minor ?? 0))
    return { kind: 'special', meta, type: type === 'block' ? 'block' : 'character', rdev }
  }
  if (raw.kind === 'file' && type === 'pipe') return { kind: 'special', meta, type: 'fifo', rdev: 0 }
  if (raw.kind === 'file' && type === 'socket') return { kind: 'special', meta, type: 'socket', rdev: 0 }
  return { ...raw, meta }
}

/** Refuses an entry whose own name would be taken for a marker. */
export function refuseReservedName(path: EntryPath, name: string, label: string): void {
  if (!name.startsWith(WHITEOUT_PREFIX)) return
  const hint = 'rename it, or choose a kernel or portable form'
  throw new NotExpressibleError(path, label, `a name that begins with ${WHITEOUT_PREFIX}`, hint)
}

/** How a tree in the `.wh.` form is written. */
export function aufsTreeForm(): TreeForm {
  const label = 'a tree with .wh. whiteouts'
  return {
    label,
    check(entry) {
      refuseReservedName(entry.path, entry.path.slice(entry.path.lastIndexOf('/') + 1), label)
      if (entry.kind === 'directory' && entry.redirect !== undefined && !entry.opaque) {
        throw new NeedsDerefError(entry.path, label, 'redirect')
      }
      if (entry.kind === 'file' && entry.metacopy !== undefined)
        throw new NeedsDerefError(entry.path, label, 'metacopy')
    },
    writeWhiteout(dirfd, name, path) {
      if (name.length > NAME_MAX - WHITEOUT_PREFIX.length) {
        const hint = 'choose a kernel or portable form, or an OCI layer'
        throw new NotExpressibleError(path, label, 'a whiteout of a name longer than 251 bytes', hint)
      }
      putMarker(dirfd, `${WHITEOUT_PREFIX}${name}` as ByteString)
    },
    beginDirectory(fd, { entry }) {
      if (entry.kind === 'directory' && entry.opaque && entry.path !== ROOT) putMarker(fd, OPAQUE_MARKER)
    },
  }
}

function putMarker(dirfd: number, name: ByteString): void {
  withFd(openNew(dirfd, name), (fd) => {
    setModeFd(fd, 0, name)
    setTimes(fd, '', 0n, 0n)
  })
}
