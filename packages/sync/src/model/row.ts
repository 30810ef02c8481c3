import type { ByteString } from '@lsync/posix'

// What the index holds of one name: an image of 92 bytes (23 little-endian words) and the name. The image is laid out
// for a comparison with the words of `struct statx` without making objects: docs/format.md, "Rows of the index".

export const ROW_BYTES = 92
// Owner, group, type and mode.
const UID_AT = 4
const NAME_LENGTH_AT = 14
const FLAGS_AT = 15
const IDENTITY_AT = 16
const CHANGE_AT = 36
const MODIFICATION_AT = 48
const SIZE_AT = 60
const REF_AT = 68
const META_HASH_AT = 76
const CONTENT_HASH_AT = 84

const S_IFMT = 0o170000
const S_IFREG = 0o100000
const S_IFDIR = 0o040000
const S_IFLNK = 0o120000
const S_IFCHR = 0o020000
const S_IFBLK = 0o060000

/** The words of `struct statx` that an image takes over (posix `STATX_WORD`). */
export interface StatWords {
  readonly [index: number]: number
}

const NO_CHANGE = '\0'.repeat(12)

/** One name of the upper as the target has it (index), or as it was seen now. */
export class Row {
  readonly name: ByteString
  readonly image: Buffer

  constructor(name: ByteString, image: Buffer) {
    this.name = name
    this.image = image
  }

  /** S_IF*. */
  get type(): number {
    return this.image.readUInt16LE(12) & S_IFMT
  }
  get mode(): number {
    return this.image.readUInt16LE(12) & 0o7777
  }
  get isFile(): boolean {
    return this.type === S_IFREG
  }
  get isDirectory(): boolean {
    return this.type === S_IFDIR
  }
  get isSymlink(): boolean {
    return this.type === S_IFLNK
  }
  /** The kernel's whiteouts are all links of one inode, which says nothing. */
  get isWhiteout(): boolean {
    return this.type === S_IFCHR && this.ref === 0
  }
  get nlink(): number {
    return this.image.readUInt32LE(0)
  }
  get uid(): number {
    return this.image.readUInt32LE(4)
  }
  get gid(): number {
    return this.image.readUInt32LE(8)
  }
  /** FS_IMMUTABLE_FL | FS_APPEND_FL. */
  get inodeFlags(): number {
    return this.image[FLAGS_AT] as number
  }
  /** Inode number and time of birth: the same for no two inodes of a file system, as a Map key. */
  get identity(): string {
    return this.image.toString('latin1', IDENTITY_AT, CHANGE_AT)
  }
  /** The time of the last change of anything about the inode, as a comparable string. */
  get change(): string {
    return this.image.toString('latin1', CHANGE_AT, MODIFICATION_AT)
  }
  /** Whether the change time says that nothing changes unseen. */
  get isSettled(): boolean {
    return this.change !== NO_CHANGE
  }
  /** Whether another look at it found the same: see `isUnchanged`. */
  isSameLook(seen: Row): boolean {
    return (
      this.image.compare(seen.image, CHANGE_AT, REF_AT, CHANGE_AT, REF_AT) === 0 &&
      this.image.compare(seen.image, UID_AT, NAME_LENGTH_AT, UID_AT, NAME_LENGTH_AT) === 0
    )
  }
  get sizeBytes(): number {
    return this.image.readUInt32LE(SIZE_AT + 4) * 0x1_0000_0000 + this.image.readUInt32LE(SIZE_AT)
  }
  get mtimeNs(): bigint {
    return this.image.readBigInt64LE(MODIFICATION_AT) * 1_000_000_000n + BigInt(this.image.readUInt32LE(56))
  }
  /** Directory: its id. File: the id of its block hashes, 0 without. Device: its number. */
  get ref(): number {
    return this.image.readUIntLE(REF_AT, 6)
  }
  /** xxh64 of the attributes; 0 for none. */
  get metaHash(): bigint {
    return this.image.readBigUInt64LE(META_HASH_AT)
  }
  /** xxh64 of the content; 0 where it is not known. */
  get contentHash(): bigint {
    return this.image.readBigUInt64LE(CONTENT_HASH_AT)
  }

  /** What it is, without what tells which inode: another one may be the same. */
  withoutInode(): Row {
    const image = Buffer.from(this.image)
    image.fill(0, IDENTITY_AT, MODIFICATION_AT)
    return new Row(this.name, image)
  }

  /** The same inode with other things known of it. */
  with(known: { name?: ByteString; ref?: number; metaHash?: bigint; contentHash?: bigint; settled?: false }): Row {
    const image = Buffer.from(this.image)
    if (known.ref !== undefined) image.writeUIntLE(known.ref, REF_AT, 6)
    if (known.metaHash !== undefined) writeHash(image, META_HASH_AT, known.metaHash)
    if (known.contentHash !== undefined) writeHash(image, CONTENT_HASH_AT, known.contentHash)
    if (known.settled === false) image.fill(0, CHANGE_AT, MODIFICATION_AT)
    const name = known.name ?? this.name
    image[NAME_LENGTH_AT] = name.length
    return new Row(name, image)
  }
}

const hash = new BigUint64Array(1)
const hashBytes = Buffer.from(hash.buffer)

// Buffer.writeBigUInt64LE takes a bigint apart byte by byte.
function writeHash(image: Buffer, at: number, value: bigint): void {
  hash[0] = value
  hashBytes.copy(image, at)
}

// A first pass makes millions of images: words are put together here, where it costs least, and copied at once.
const imageWords = new Uint32Array(ROW_BYTES / 4)
const imageBytes = Buffer.from(imageWords.buffer)

/** The image of what statx(2) has just found. `ref` is the device number of devices, else 0. */
export function writeImage(image: Buffer, at: number, words: StatWords, nameLength: number): void {
  const mode = (words[7] as number) & 0xffff
  imageWords[0] = words[4] as number // nlink
  imageWords[1] = words[5] as number // uid
  imageWords[2] = words[6] as number // gid
  imageWords[3] = mode | ((nameLength & 0xff) << 16) | (((words[2] as number) & 0x30) << 24)
  imageWords[4] = words[8] as number // ino
  imageWords[5] = words[9] as number
  imageWords[6] = words[20] as number // birth
  imageWords[7] = words[21] as number
  imageWords[8] = words[22] as number
  imageWords[9] = words[24] as number // change
  imageWords[10] = words[25] as number
  imageWords[11] = words[26] as number
  imageWords[12] = words[28] as number // modification
  imageWords[13] = words[29] as number
  imageWords[14] = words[30] as number
  imageWords[15] = words[10] as number // size
  imageWords[16] = words[11] as number
  const type = mode & S_IFMT
  const isDevice = type === S_IFCHR || type === S_IFBLK
  imageWords[17] = isDevice ? deviceOf(words[32] as number, words[33] as number) : 0
  imageWords.fill(0, 18)
  imageBytes.copy(image, at)
}

// glibc's makedev; Linux has 12 bits of major and 20 of minor numbers, so it fits into 32.
function deviceOf(major: number, minor: number): number {
  return (minor & 0xff) + (major & 0xfff) * 0x100 + (minor >>> 8) * 0x100000
}

/**
 * Whether a row says the same of an inode as statx(2) just did. The change time covers all that is not compared. It does not
 * cover what a look in the middle of a change may find: the kernel sets the change time before the other times and the mode,
 * and statx(2) takes no lock, so that they can be of before and the change time of after.
 */
export function isUnchanged(page: Buffer, at: number, words: StatWords): boolean {
  return (
    page.readUInt32LE(at + 36) === words[24] &&
    page.readUInt32LE(at + 44) === words[26] &&
    page.readUInt32LE(at + 16) === words[8] &&
    page.readUInt32LE(at + 20) === words[9] &&
    page.readUInt32LE(at + 60) === words[10] &&
    page.readUInt32LE(at + 64) === words[11] &&
    page.readUInt32LE(at + 40) === words[25] &&
    page.readUInt32LE(at + 56) === words[30] &&
    page.readUInt32LE(at + 48) === words[28] &&
    page.readUInt32LE(at + 52) === words[29] &&
    page.readUInt16LE(at + 12) === ((words[7] as number) & 0xffff) &&
    page.readUInt32LE(at + 4) === words[5] &&
    page.readUInt32LE(at + 8) === words[6]
  )
}

/** How long a row with a name of so many bytes is: rows are padded to whole words. */
export function rowLength(nameLength: number): number {
  return ROW_BYTES + ((nameLength + 3) & ~3)
}

/** Calls `visit` for every row of a page, in its order. */
export function eachRow(page: Buffer, visit: (name: ByteString, at: number) => void): void {
  for (let at = 0; at < page.length; ) {
    const length = page[at + NAME_LENGTH_AT] as number
    visit(page.toString('latin1', at + ROW_BYTES, at + ROW_BYTES + length) as ByteString, at)
    at += rowLength(length)
  }
}

/** The row at a place of a page; its image is a copy. */
export function rowAt(page: Buffer, at: number): Row {
  const length = page[at + NAME_LENGTH_AT] as number
  const name = page.toString('latin1', at + ROW_BYTES, at + ROW_BYTES + length) as ByteString
  return new Row(name, Buffer.from(page.subarray(at, at + ROW_BYTES)))
}

/** Where a name is in a page, or -1. */
export function findRow(page: Buffer, name: ByteString): number {
  for (let at = 0; at < page.length; ) {
    const length = page[at + NAME_LENGTH_AT] as number
    if (length === name.length && page.toString('latin1', at + ROW_BYTES, at + ROW_BYTES + length) === name) return at
    at += rowLength(length)
  }
  return -1
}

/** A page with a row put in the place of the one with its name, or added. */
export function withRow(page: Buffer, row: Row): Buffer {
  const bytes = rowBytes(row)
  const at = findRow(page, row.name)
  if (at < 0) return Buffer.concat([page, bytes])
  const copy = Buffer.from(page)
  bytes.copy(copy, at)
  return copy
}

/** A page without a name. */
export function withoutRow(page: Buffer, name: ByteString): Buffer {
  const at = findRow(page, name)
  if (at < 0) return page
  return Buffer.concat([page.subarray(0, at), page.subarray(at + rowLength(name.length))])
}

/** A row as it stands in a page. */
export function rowBytes(row: Row): Buffer {
  const { name, image } = row
  const bytes = Buffer.allocUnsafe(rowLength(name.length))
  image.copy(bytes, 0)
  bytes[NAME_LENGTH_AT] = name.length
  bytes.write(name, ROW_BYTES, 'latin1')
  for (let at = ROW_BYTES + name.length; at < bytes.length; at++) bytes[at] = 0
  return bytes
}

/** Which of 2^bits pages a name is in (FNV-1a). */
export function pageOf(name: ByteString, bits: number): number {
  if (bits === 0) return 0
  let hash = 0x811c_9dc5
  for (let i = 0; i < name.length; i++) hash = Math.imul(hash ^ name.charCodeAt(i), 0x0100_0193)
  return (hash >>> 0) & ((1 << bits) - 1)
}
