import { isMark, MARKS, type MarkNames, type Namespace, NotAFileError, readXattrs } from '@lsync/overlay-merge'
import {
  type ByteString,
  close,
  errnoOf,
  hasWriters,
  O_NOATIME,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  openat,
  rawStatFd,
  readShared,
  readSymlink,
  STATX_WORD,
} from '@lsync/posix'
import {
  BLOCK_BYTES,
  BLOCKS_FROM_BYTES,
  BlockHashes,
  changedBlocks,
  extentsOf,
  hashOf,
  metaHashOf,
  readBlock,
  SMALL_BYTES,
} from './content.ts'
import type { Shown } from './describe.ts'
import type { EntryKind, Extent, RawMeta, TreePath } from './model/operation.ts'
import { ROW_BYTES, Row, writeImage } from './model/row.ts'
import { limitExtents } from './protocol/operation-codec.ts'
import { type Sink, sendExtents } from './sink.ts'

/** What is known of a name once it was sent. */
export interface Sent {
  /** As it was when it was read; its `ref` is not set for files with block hashes. */
  readonly row: Row
  /** It changed while it was read, or so shortly before that its change time cannot tell: it is to be looked at again. */
  readonly isUnsettled: boolean
  readonly blocks: Buffer | undefined
  /** Bytes of content that travelled. */
  readonly bytes: number
  readonly how: 'nothing' | 'meta' | 'blocks' | 'whole'
}

const RETRIES = 3
// Where the kernel has no finer time for an inode that was just looked at, two changes within a tick of its clock look
// like one (multigrain times came with Linux 6.13).
const RACY_MS = 30

/** The attributes that travel: those that only mean something on this node, with these inodes, stay. */
export function keptAttributes(namespace: Namespace): (name: ByteString) => boolean {
  const marks: MarkNames = MARKS[namespace]
  const tied = new Set<string>([marks.origin, marks.impure, marks.nlink, `${marks.prefix}upper`, `${marks.prefix}uuid`])
  return (name) => !tied.has(name) || !isMark(name, marks)
}

export interface SendContext {
  readonly sink: Sink
  readonly keeps: (attribute: ByteString) => boolean
  /** The upper's file system lists all ACLs. It is one: no directory on another is entered. */
  readonly listsAcls: boolean
  /** The upper's file system gives each change after a look another time. */
  readonly hasFineTimes: boolean
}

/** Metadata of what an image describes. `name` is beneath `dirfd`, `''` the fd itself. */
export function metaOf(
  row: Row,
  dirfd: number,
  name: ByteString | '',
  { keeps, listsAcls }: Pick<SendContext, 'keeps' | 'listsAcls'>,
): RawMeta {
  const { mode, uid, gid, mtimeNs, inodeFlags } = row
  const xattrs = readXattrs(dirfd, name, keeps, listsAcls)
  return {
    mode,
    uid,
    gid,
    mtimeNs,
    inodeFlags,
    xattrs: xattrs.length === 0 ? NO_XATTRS : xattrs.map((xattr) => [xattr.name, xattr.value] as const),
  }
}
const NO_XATTRS: RawMeta['xattrs'] = []

/** The row of what statx(2) has just found. */
export function rowOf(name: ByteString, words: Uint32Array): Row {
  const image = Buffer.allocUnsafe(ROW_BYTES)
  writeImage(image, 0, words, name.length)
  return new Row(name, image)
}

/** Whether a change time is too young to tell the next change from this one. */
export function isRacy(row: Row, { hasFineTimes }: Pick<SendContext, 'hasFineTimes'>): boolean {
  // Inodes of 128 bytes (old ext4) have whole seconds.
  if (hasFineTimes && row.image.readUInt32LE(44) !== 0) return false
  const seconds = Number(row.image.readBigInt64LE(36))
  return Date.now() - (seconds * 1000 + row.image.readUInt32LE(44) / 1e6) < RACY_MS
}

let noAtime = O_NOATIME

/** Opens a regular file of the upper: never a symlink, never waiting, without touching its access time. */
export function openSource(dirfd: number, name: ByteString): number {
  try {
    return openat(dirfd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | noAtime)
  } catch (error) {
    const code = errnoOf(error)
    if (code === 'ELOOP' || code === 'ENXIO') throw new NotAFileError(name)
    if (code !== 'EPERM' || noAtime === 0) throw error
    // Only the owner and root may ask for it.
    noAtime = 0
    return openat(dirfd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
  }
}

/** What the target has under a name already. */
export interface Known {
  readonly row: Row
  readonly blocks: Uint8Array | undefined
  /** Other names of its inode see what is written. */
  readonly isShared: boolean
  /** Only so much of the row is known. */
  readonly shown?: Shown
}

/**
 * Sends a regular file: nothing, its metadata, the blocks that changed, or all of it. A file that changes while it is
 * read is read again, at most three times; then what was read last counts, and it is unsettled.
 */
export function sendFile(
  context: SendContext,
  dirfd: number,
  name: ByteString,
  path: TreePath,
  known: Known | undefined,
): Sent
/** As above; `undefined` for a file that has other names, which has to be seen with them. */
export function sendFile(
  context: SendContext,
  dirfd: number,
  name: ByteString,
  path: TreePath,
  known: Known | undefined,
  only: 'single',
): Sent | undefined
export function sendFile(
  context: SendContext,
  dirfd: number,
  name: ByteString,
  path: TreePath,
  known: Known | undefined,
  only?: 'single',
): Sent | undefined {
  const fd = openSource(dirfd, name)
  try {
    for (let attempt = 0; ; attempt++) {
      const words = rawStatFd(fd)
      const blocks = words[STATX_WORD.blocks] as number
      const row = rowOf(name, words)
      if (!row.isFile) throw new NotAFileError(name)
      if (only === 'single' && row.nlink > 1) return undefined
      const isLast = attempt >= RETRIES
      const sent = sendOnce(context, fd, row, blocks, path, known, isLast)
      if (sent !== undefined) return sent
    }
  } finally {
    close(fd)
  }
}

function sendOnce(
  context: SendContext,
  fd: number,
  row: Row,
  allocated: number,
  path: TreePath,
  known: Known | undefined,
  isLast: boolean,
): Sent | undefined {
  const { sink } = context
  const meta = metaOf(row, fd, '', context)
  const metaHash = metaHashOf(meta.xattrs)
  const { sizeBytes } = row
  // After the look at the inode and before the content is read: a mapping that comes later changes the times when it
  // first writes, one that is there now need not. Then the next hint of this name is about the content.
  const hasWriter = hasWriters(fd)
  const settle = (more: { contentHash: bigint }, isUnsettled: boolean): Row =>
    row.with({ metaHash, ...more, ...(isUnsettled || hasWriter === true ? { settled: false as const } : {}) })
  // The times change before the content does: where nobody can say that no one is writing, a young time says nothing of it.
  const isRacyNow = isRacy(row, hasWriter === undefined ? { hasFineTimes: false } : context)

  if (sizeBytes <= SMALL_BYTES && allocated * 512 >= sizeBytes) {
    const bytes = sizeBytes === 0 ? NOTHING : readShared(fd, 0, sizeBytes)
    if (bytes.length < sizeBytes && !isLast) return undefined
    const isUnsettled = isRacyNow || bytes.length < sizeBytes
    const contentHash = hashOf(bytes)
    const next = settle({ contentHash }, isUnsettled)
    const how = compare(known, next, contentHash)
    if (how !== 'content') return withoutContent(sink, how, path, meta, next, isUnsettled, undefined)
    const extents: Extent[] = bytes.length === 0 ? [] : [[0, bytes.length]]
    const to = sink.open(fileOperation(known, path, meta, bytes.length, extents))
    try {
      to.write(0, bytes)
    } catch (error) {
      to.discard()
      throw error
    }
    to.finish()
    return { row: next, isUnsettled, blocks: undefined, bytes: bytes.length, how: 'whole' }
  }

  const extents = limitExtents(extentsOf(fd, { sizeBytes, blocks: allocated }))
  const count = Math.ceil(sizeBytes / BLOCK_BYTES)
  const hashes = new BlockHashes(sizeBytes)
  const keepsBlocks = sizeBytes >= BLOCKS_FROM_BYTES
  const hasChanged = () => rowOf(row.name, rawStatFd(fd)).change !== row.change
  if (known !== undefined) {
    // Where something is known, reading twice is cheaper than sending once what the target has.
    for (let index = 0; index < count; index++) hashes.add(readBlock(fd, extents, index, sizeBytes))
    const how = compare(known, row.with({ metaHash }), hashes.contentHash)
    if (how !== 'content') {
      if (hasChanged() && !isLast) return undefined
      const isUnsettled = isRacyNow || hasChanged()
      const next = settle({ contentHash: hashes.contentHash }, isUnsettled)
      return withoutContent(sink, how, path, meta, next, isUnsettled, keepsBlocks ? hashes.bytes : undefined)
    }
  }
  const patch = known?.blocks === undefined ? undefined : changedBlocks(known.blocks, hashes.bytes, extents, sizeBytes)
  const patchBytes = patch?.extents.reduce((sum, [, length]) => sum + length, 0) ?? Number.POSITIVE_INFINITY
  const dataBytes = extents.reduce((sum, [, length]) => sum + length, 0)
  const isPatch = patch !== undefined && patchBytes <= dataBytes / 2
  const operation = isPatch
    ? ({
        do: 'patch',
        path,
        meta,
        sizeBytes,
        extents: limitExtents(patch.extents),
        holes: patch.holes,
        shared: known?.isShared === true,
      } as const)
    : fileOperation(known, path, meta, sizeBytes, extents)
  const to = sink.open(operation)
  try {
    if (known === undefined) {
      // One pass reads, hashes and sends.
      for (let index = 0; index < count; index++) {
        const block = readBlock(fd, extents, index, sizeBytes)
        hashes.add(block)
        if (block !== undefined) writeClipped(to, extents, index, block)
      }
    } else sendExtents(fd, operation, to)
    if (hasChanged() && !isLast) {
      to.discard()
      return undefined
    }
  } catch (error) {
    to.discard()
    throw error
  }
  to.finish()
  const changed = hasChanged()
  const isUnsettled = isRacyNow || changed
  // In one pass the hashes are of the very bytes that were sent; in two the file may have been written to in between.
  const isExact = known === undefined || (!changed && !hasWriter)
  return {
    row: settle({ contentHash: isExact ? hashes.contentHash : 0n }, isUnsettled),
    isUnsettled,
    blocks: keepsBlocks && isExact ? hashes.bytes : undefined,
    bytes: isPatch ? patchBytes : dataBytes,
    how: isPatch ? 'blocks' : 'whole',
  }
}

const NOTHING = Buffer.alloc(0)

/** A file that replaces what is there; where other names must see it, it is written over instead. */
function fileOperation(
  known: Known | undefined,
  path: TreePath,
  meta: RawMeta,
  sizeBytes: number,
  extents: readonly Extent[],
) {
  if (known?.isShared !== true) return { do: 'file', path, meta, sizeBytes, extents } as const
  const holes: Extent[] = []
  let at = 0
  for (const [offset, length] of extents) {
    if (offset > at) holes.push([at, offset - at])
    at = offset + length
  }
  if (at < sizeBytes) holes.push([at, sizeBytes - at])
  return { do: 'patch', path, meta, sizeBytes, extents, holes, shared: true } as const
}

// Extents and blocks have different borders; what a receiver gets is cut at both.
function writeClipped(
  to: { write(offset: number, bytes: Uint8Array): void },
  extents: readonly Extent[],
  index: number,
  block: Buffer,
): void {
  const start = index * BLOCK_BYTES
  const end = start + block.length
  let low = 0
  let high = extents.length
  while (low < high) {
    const middle = (low + high) >>> 1
    const [offset, length] = extents[middle] as Extent
    if (offset + length <= start) low = middle + 1
    else high = middle
  }
  for (let at = low; at < extents.length; at++) {
    const [offset, length] = extents[at] as Extent
    if (offset >= end) break
    const from = Math.max(offset, start)
    const until = Math.min(offset + length, end)
    to.write(from, block.subarray(from - start, until - start))
  }
}

function compare(known: Known | undefined, next: Row, contentHash: bigint): 'nothing' | 'meta' | 'content' {
  if (known === undefined) return 'content'
  const { row, shown } = known
  if (shown !== undefined) return compareShown(row, next, shown)
  if (row.sizeBytes !== next.sizeBytes || row.contentHash !== contentHash || row.contentHash === 0n) return 'content'
  return hasSameMeta(row, next) ? 'nothing' : 'meta'
}

function compareShown(row: Row, next: Row, { owner }: Shown): 'nothing' | 'meta' | 'content' {
  const seconds = next.mtimeNs / SECOND_NS
  if (row.sizeBytes !== next.sizeBytes || row.mtimeNs !== seconds * SECOND_NS) return 'content'
  const isSame = row.mode === next.mode && (!owner || (row.uid === next.uid && row.gid === next.gid))
  return isSame ? 'nothing' : 'meta'
}

const SECOND_NS = 1_000_000_000n

/** Whether metadata is the same on both sides, as far as a target has it. */
export function hasSameMeta(row: Row, next: Row): boolean {
  return (
    row.mode === next.mode &&
    row.uid === next.uid &&
    row.gid === next.gid &&
    row.mtimeNs === next.mtimeNs &&
    row.metaHash === next.metaHash &&
    row.inodeFlags === next.inodeFlags
  )
}

function withoutContent(
  sink: Sink,
  how: 'nothing' | 'meta',
  path: TreePath,
  meta: RawMeta,
  row: Row,
  isUnsettled: boolean,
  blocks: Buffer | undefined,
): Sent {
  if (how === 'meta') sink.run({ do: 'meta', path, kind: 'file', meta })
  return { row, isUnsettled, blocks, bytes: 0, how }
}

/** Sends a symlink or special file: `row` was made from a stat of just now. */
export function sendOther(context: SendContext, dirfd: number, row: Row, path: TreePath, known: Row | undefined): Sent {
  const { sink } = context
  const meta = metaOf(row, dirfd, row.name, context)
  const isUnsettled = isRacy(row, context)
  const next = row.with({
    metaHash: metaHashOf(meta.xattrs),
    ...(isUnsettled ? { settled: false as const } : {}),
  })
  const result = (how: Sent['how']): Sent => ({ row: next, isUnsettled, blocks: undefined, bytes: 0, how })
  // What a symlink holds and what a device is never change for one inode; whiteouts are all alike.
  if (known !== undefined && known.type === row.type && known.ref === row.ref) {
    if (hasSameMeta(known, next)) return result('nothing')
    const kind: EntryKind = row.isSymlink ? 'symlink' : 'special'
    sink.run({ do: 'meta', path, kind, meta })
    return result('meta')
  }
  if (row.isSymlink) sink.run({ do: 'symlink', path, meta, target: readSymlink(dirfd, row.name) })
  else sink.run({ do: 'special', path, meta, type: row.type, rdev: row.ref })
  return result('whole')
}
