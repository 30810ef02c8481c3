import { type ByteString, nextData, readShared, type Stat } from '@lsync/posix'
import createXxhash from 'xxhash-wasm'
import type { Extent } from './model/operation.ts'

const { h64Raw } = await createXxhash()

/** Files up to this size are read whole and hashed as they are; larger ones by blocks. */
export const SMALL_BYTES = 64 * 1024
/** The unit in which a larger file is compared with what was sent before. */
export const BLOCK_BYTES = 128 * 1024
/** From this size on the hashes of the blocks are kept, so that only blocks that changed travel. */
export const BLOCKS_FROM_BYTES = 1 << 20
/** In place of the hash of a block that is a hole as a whole. */
const HOLE_HASH = 0n

/** xxh64 of some bytes, never 0, which stands for what is not known. */
export function hashOf(bytes: Uint8Array): bigint {
  return h64Raw(bytes) || 1n
}

/** xxh64 of the attributes of an inode; 0 for none. */
export function metaHashOf(xattrs: readonly (readonly [ByteString, Uint8Array])[]): bigint {
  if (xattrs.length === 0) return 0n
  const parts: Uint8Array[] = []
  for (const [name, value] of xattrs) {
    const head = Buffer.from(`${name}\0${value.length}\0`, 'latin1')
    parts.push(head, value)
  }
  return hashOf(Buffer.concat(parts))
}

/** Where an open file holds data, up to `sizeBytes`. Source: lseek(2), SEEK_DATA. */
export function extentsOf(fd: number, stat: Pick<Stat, 'sizeBytes' | 'blocks'>): Extent[] {
  const { sizeBytes } = stat
  if (sizeBytes === 0) return []
  // A file without holes has a block for each of its bytes; asking for them would cost two calls.
  if (sizeBytes <= SMALL_BYTES && stat.blocks * 512 >= sizeBytes) return [[0, sizeBytes]]
  const extents: Extent[] = []
  for (let at = 0; at < sizeBytes; ) {
    const data = nextData(fd, at)
    if (data === undefined || data.start >= sizeBytes) break
    const end = Math.min(data.end, sizeBytes)
    extents.push([data.start, end - data.start])
    at = end
  }
  return extents
}

/** The parts of `extents` that lie in a range. */
export function clip(extents: readonly Extent[], from: number, to: number): Extent[] {
  const parts: Extent[] = []
  for (const [offset, length] of extents) {
    const start = Math.max(offset, from)
    const end = Math.min(offset + length, to)
    if (start < end) parts.push([start, end - start])
  }
  return parts
}

/** What lies in a range and not in `extents`. */
export function gaps(extents: readonly Extent[], from: number, to: number): Extent[] {
  const parts: Extent[] = []
  let at = from
  for (const [offset, length] of clip(extents, from, to)) {
    if (offset > at) parts.push([at, offset - at])
    at = offset + length
  }
  if (at < to) parts.push([at, to - at])
  return parts
}

/** Extents of which neighbours that touch are one. */
export function joined(extents: readonly Extent[]): Extent[] {
  const result: Extent[] = []
  for (const [offset, length] of extents) {
    const last = result.at(-1)
    if (last !== undefined && last[0] + last[1] === offset) result[result.length - 1] = [last[0], last[1] + length]
    else result.push([offset, length])
  }
  return result
}

/** Hashes of the blocks of a larger file, built up block by block. */
export class BlockHashes {
  readonly bytes: Buffer
  #count = 0

  constructor(sizeBytes: number) {
    this.bytes = Buffer.alloc(Math.ceil(sizeBytes / BLOCK_BYTES) * 8)
  }

  /** The next block; `undefined` for a hole. */
  add(block: Uint8Array | undefined): void {
    this.bytes.writeBigUInt64LE(block === undefined ? HOLE_HASH : hashOf(block), this.#count++ * 8)
  }

  /** The hash of the whole content. */
  get contentHash(): bigint {
    return hashOf(this.bytes)
  }
}

/**
 * Reads a block of an open file, holes as zeros; `undefined` when it is a hole as a whole. The bytes are valid until the
 * next read or write of this thread.
 */
export function readBlock(
  fd: number,
  extents: readonly Extent[],
  index: number,
  sizeBytes: number,
): Buffer | undefined {
  const start = index * BLOCK_BYTES
  const end = Math.min(start + BLOCK_BYTES, sizeBytes)
  if (!overlaps(extents, start, end)) return undefined
  const bytes = readShared(fd, start, end - start)
  if (bytes.length === end - start) return bytes
  // It has become shorter meanwhile, which its change time will show.
  return Buffer.concat([bytes], end - start)
}

// Extents ascend, and a file may have thousands: a binary search keeps a block at a constant price.
function overlaps(extents: readonly Extent[], from: number, to: number): boolean {
  let low = 0
  let high = extents.length
  while (low < high) {
    const middle = (low + high) >>> 1
    const [offset, length] = extents[middle] as Extent
    if (offset + length <= from) low = middle + 1
    else high = middle
  }
  const found = extents[low]
  return found !== undefined && found[0] < to
}

/** Which blocks of a file have another hash than before, as extents to send and holes to punch. */
export function changedBlocks(
  before: Uint8Array,
  after: Uint8Array,
  extents: readonly Extent[],
  sizeBytes: number,
): { readonly extents: Extent[]; readonly holes: Extent[] } {
  const old = Buffer.from(before.buffer, before.byteOffset, before.byteLength)
  const now = Buffer.from(after.buffer, after.byteOffset, after.byteLength)
  const changed: Extent[] = []
  const holes: Extent[] = []
  for (let at = 0; at < now.length; at += 8) {
    if (at + 8 <= old.length && old.readBigUInt64LE(at) === now.readBigUInt64LE(at)) continue
    const start = (at / 8) * BLOCK_BYTES
    const end = Math.min(start + BLOCK_BYTES, sizeBytes)
    changed.push(...clip(extents, start, end))
    holes.push(...gaps(extents, start, end))
  }
  return { extents: joined(changed), holes: joined(holes) }
}
