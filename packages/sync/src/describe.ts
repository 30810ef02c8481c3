import { NotAFileError, openRegular, readXattrs } from '@lsync/overlay-merge'
import {
  type ByteString,
  close,
  errnoOf,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_RDONLY,
  openBeneath,
  rawStatFd,
  readAt,
  readDirents,
  STATX_WORD,
  withFd,
} from '@lsync/posix'
import {
  BLOCK_BYTES,
  BLOCKS_FROM_BYTES,
  BlockHashes,
  extentsOf,
  hashOf,
  metaHashOf,
  readBlock,
  SMALL_BYTES,
} from './content.ts'
import type { TreePath } from './model/operation.ts'
import { Row } from './model/row.ts'
import { type Known, rowOf } from './send.ts'
import { checkPath, STATE_INSIDE } from './target-path.ts'

/** A regular file of a target, with one name, as far as one of an upper can be compared with it. */
export interface DescribedFile {
  readonly name: ByteString
  /** Image of its row, without what tells its inode. */
  readonly image: Uint8Array
  /** Hashes of its blocks, where it has so many bytes that they are kept. */
  readonly blocks: Uint8Array | undefined
  /**
   * The target shows size, mode, whole seconds of the time of modification, and with `owner` owner and group, no more: the rest of
   * the image says nothing, and what is alike in size and time is taken for the same content.
   */
  readonly shown?: Shown
}

export interface Shown {
  readonly owner: boolean
}

/** A part of what is in a directory of a target. */
export interface Description {
  readonly files: readonly DescribedFile[]
  /** Nothing comes after the last of them. */
  readonly isWhole: boolean
}

/** What a target has in a directory that is carried over anew. */
export interface TargetListing {
  /** The file under a name, if it may be the one that the upper has there, of so many bytes. */
  known(name: ByteString, sizeBytes: number): Known | undefined
  close(): void
}

export const NO_LISTING: TargetListing = { known: () => undefined, close: () => undefined }

// A part of a description reads about so much, and is about so long.
const PART_READ_BYTES = 64 << 20
const PART_BYTES = 256 << 10
/** Hashes of more blocks do not travel: then the content decides as a whole. */
export const MAX_DESCRIBED_BLOCKS_BYTES = 128 << 10

/**
 * Describes the files of a directory beneath `rootFd` whose names come after one, in the order of their bytes. A directory
 * that is not there has none.
 */
export function describeDirectory(rootFd: number, path: TreePath, after: ByteString | ''): Description {
  const fd = tryOpenAsked(rootFd, path)
  if (fd === undefined) return { files: [], isWhole: true }
  return withFd(fd, () => {
    const names = namesIn(fd, path).filter((name) => name > after)
    const files: DescribedFile[] = []
    let readBytes = 0
    let bytes = 0
    for (const name of names.sort()) {
      if (readBytes >= PART_READ_BYTES || bytes >= PART_BYTES) return { files, isWhole: false }
      const file = describeFile(fd, name, () => true)
      if (file === undefined) continue
      const blocks = (file.blocks?.length ?? 0) > MAX_DESCRIBED_BLOCKS_BYTES ? undefined : file.blocks
      files.push({ ...file, blocks })
      readBytes += new Row(name, Buffer.from(file.image)).sizeBytes
      bytes += name.length + file.image.length + (blocks?.length ?? 0)
    }
    return { files, isWhole: true }
  })
}

/** What is in a directory of a target of this machine; each file is read when it is asked for. */
export function openListing(rootFd: number, path: TreePath): TargetListing {
  const fd = tryOpenAsked(rootFd, path)
  if (fd === undefined) return NO_LISTING
  const names = new Set(namesIn(fd, path))
  return {
    known(name, sizeBytes) {
      if (!names.has(name)) return undefined
      // What has another size is read only where single blocks may be the same.
      const mayBeSame = (size: number) =>
        size === sizeBytes || (size >= BLOCKS_FROM_BYTES && sizeBytes >= BLOCKS_FROM_BYTES)
      return knownOf(describeFile(fd, name, mayBeSame))
    },
    close: () => close(fd),
  }
}

/** A file of a target that shows this of it. */
export function describeShown(
  name: ByteString,
  file: {
    readonly mode: number
    readonly uid: number
    readonly gid: number
    readonly sizeBytes: number
    readonly mtime: number
  },
  shown: Shown,
): DescribedFile {
  const words = new Uint32Array(64)
  words[STATX_WORD.mode] = file.mode
  words[STATX_WORD.nlink] = 1
  words[STATX_WORD.uid] = file.uid
  words[STATX_WORD.gid] = file.gid
  new BigUint64Array(words.buffer)[STATX_WORD.size / 2] = BigInt(file.sizeBytes)
  words[STATX_WORD.modification] = file.mtime
  return { name, image: rowOf(name, words).image, blocks: undefined, shown }
}

/** What was described by a target elsewhere. */
export function listingOf(files: readonly DescribedFile[]): TargetListing {
  const byName = new Map(files.map((file) => [file.name, file]))
  return { known: (name) => knownOf(byName.get(name)), close: () => undefined }
}

function knownOf(file: DescribedFile | undefined): Known | undefined {
  if (file === undefined) return undefined
  const { name, image, blocks, shown } = file
  const bytes = Buffer.from(image.buffer, image.byteOffset, image.byteLength)
  return { row: new Row(name, bytes), blocks, isShared: false, ...(shown === undefined ? {} : { shown }) }
}

function namesIn(fd: number, path: TreePath): ByteString[] {
  const names: ByteString[] = []
  readDirents(fd, (name) => {
    if (path !== '' || !STATE_INSIDE.test(name)) names.push(name)
  })
  return names
}

/** As `tryOpenDirectory`, for a path that another side has sent. */
function tryOpenAsked(rootFd: number, path: TreePath): number | undefined {
  if (path !== '') checkPath(path)
  return tryOpenDirectory(rootFd, path)
}

/** `undefined` where no directory is there. */
export function tryOpenDirectory(rootFd: number, path: TreePath): number | undefined {
  try {
    return openBeneath(rootFd, path === '' ? ('.' as ByteString) : path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
  } catch (error) {
    const code = errnoOf(error)
    if (code === 'ENOENT' || code === 'ENOTDIR' || code === 'ELOOP') return undefined
    throw error
  }
}

/** `undefined` for what is no regular file, has several names, cannot be read, or is not worth it. */
function describeFile(
  dirfd: number,
  name: ByteString,
  isWanted: (sizeBytes: number) => boolean,
): DescribedFile | undefined {
  let fd: number
  try {
    fd = openRegular(dirfd, name).fd
  } catch (error) {
    // Whatever it is, what the upper has there takes its place.
    if (error instanceof NotAFileError || errnoOf(error) !== undefined) return undefined
    throw error
  }
  return withFd(fd, () => {
    const words = rawStatFd(fd)
    const row = rowOf(name, words)
    if (row.nlink > 1 || !isWanted(row.sizeBytes)) return undefined
    const xattrs = readXattrs(fd, '').map((xattr) => [xattr.name, xattr.value] as const)
    const { contentHash, blocks } = hashContent(fd, row.sizeBytes, words[STATX_WORD.blocks] as number)
    return { name, image: row.with({ metaHash: metaHashOf(xattrs), contentHash }).withoutInode().image, blocks }
  })
}

// As `sendFile` does it; a small file that has holes here and none there is sent again.
function hashContent(
  fd: number,
  sizeBytes: number,
  blocks: number,
): { readonly contentHash: bigint; readonly blocks: Buffer | undefined } {
  if (sizeBytes <= SMALL_BYTES && blocks * 512 >= sizeBytes) {
    return { contentHash: hashOf(sizeBytes === 0 ? NOTHING : readAt(fd, 0, sizeBytes)), blocks: undefined }
  }
  const extents = extentsOf(fd, { sizeBytes, blocks })
  const hashes = new BlockHashes(sizeBytes)
  for (let index = 0; index < Math.ceil(sizeBytes / BLOCK_BYTES); index++) {
    hashes.add(readBlock(fd, extents, index, sizeBytes))
  }
  const keepsBlocks = sizeBytes >= BLOCKS_FROM_BYTES
  return { contentHash: hashes.contentHash, blocks: keepsBlocks ? hashes.bytes : undefined }
}

const NOTHING = Buffer.alloc(0)
