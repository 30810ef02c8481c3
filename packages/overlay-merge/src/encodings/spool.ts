import { type ByteString, close, errnoOf, truncate, tryRename, tryUnlink, writeAt } from '@lsync/posix'
import { LayerEntryRefusedError } from './errors.ts'
import { openNew, openRegular } from './inode.ts'
import type { LayerItem } from './item.ts'
import type { Segment, TarMember } from './tar-members.ts'

/** Keeps the data of an archive's files, by number, until it is known what the archive makes of them. */
export interface Spool {
  /** Takes the body of a member, to its end. */
  put(number: number, member: TarMember, body: AsyncIterable<Uint8Array>): Promise<void>
  /** How an item gives its data. */
  dataOf(number: number): Pick<LayerItem, 'openContent' | 'takeContent'>
}

/** Keeps the data in numbered files. */
export class DirectorySpool implements Spool {
  readonly #fd: number

  /** An open directory, on the volume of the result if it can be. It stays the caller's. */
  constructor(fd: number) {
    this.#fd = fd
  }

  async put(number: number, member: TarMember, body: AsyncIterable<Uint8Array>): Promise<void> {
    const fd = this.create(number)
    try {
      for await (const { offset, bytes } of piecesOf(member, body)) writeAt(fd, offset, bytes, member.name)
      if (member.segments !== undefined) setSize(fd, member)
    } finally {
      close(fd)
    }
  }

  /** An open, empty file for data. Whoever asked for it closes it. */
  create(number: number): number {
    return openNew(this.#fd, spoolName(number))
  }

  /** Removes the data, unless it was taken. */
  drop(number: number): void {
    tryUnlink(this.#fd, spoolName(number))
  }

  dataOf(number: number): Pick<LayerItem, 'openContent' | 'takeContent'> {
    const spool = spoolName(number)
    return {
      openContent: () => openRegular(this.#fd, spool),
      // EXDEV and the like: then it is copied.
      takeContent: (dirfd, name) => tryRename(this.#fd, spool, dirfd, name) === undefined,
    }
  }
}

function spoolName(number: number): ByteString {
  return number.toString(36) as ByteString
}

/** The body of a member as pieces of the file, in order. What lies between them, and after the last one, is zeros. */
export async function* piecesOf(
  member: TarMember,
  body: AsyncIterable<Uint8Array>,
): AsyncGenerator<{ readonly offset: number; readonly bytes: Uint8Array }> {
  const segments: readonly Segment[] = member.segments ?? [{ offset: 0, sizeBytes: member.sizeBytes }]
  let index = 0
  let done = 0
  for await (const chunk of body) {
    for (let at = 0; at < chunk.length; ) {
      const segment = segments[index]
      if (segment === undefined) throw new Error('more data than the header said')
      const count = Math.min(segment.sizeBytes - done, chunk.length - at)
      if (count > 0) yield { offset: segment.offset + done, bytes: chunk.subarray(at, at + count) }
      at += count
      done += count
      if (done === segment.sizeBytes) {
        index++
        done = 0
      }
    }
  }
}

function setSize(fd: number, member: TarMember): void {
  try {
    truncate(fd, member.sizeBytes, member.name)
  } catch (error) {
    if (errnoOf(error) !== 'EFBIG' && errnoOf(error) !== 'EINVAL') throw error
    throw new LayerEntryRefusedError(member.name, 'it is larger than the file system allows')
  }
}
