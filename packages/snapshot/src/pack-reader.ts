import {
  type ByteString,
  close,
  errnoOf,
  type HostPath,
  type Memory,
  O_RDONLY,
  openat,
  openRoot,
  readInto,
} from '@lsync/posix'
import { FileMissingError, pathOf } from './backend/backend.ts'
import type { ObjectId } from './model/tree.ts'

const MOST_OPEN = 16

/** Reads packs of a repository that lies in a directory, with synchronous calls, for a thread of its own. */
export class PackReader {
  readonly #directory: HostPath
  readonly #root: number
  readonly #open = new Map<ObjectId, number>()

  /** @throws {PosixError} when the directory cannot be opened */
  constructor(directory: HostPath) {
    this.#directory = directory
    this.#root = openRoot(directory)
  }

  /**
   * Reads bytes of a pack into memory. Returns how many there were: fewer when the pack ends before.
   * @throws {FileMissingError} {PosixError}
   */
  read(packId: ObjectId, offset: number, length: number, to: Memory, toAt: number): number {
    return readInto(this.#fdOf(packId), offset, to, toAt, length, packId)
  }

  close(): void {
    for (const fd of this.#open.values()) close(fd)
    this.#open.clear()
    close(this.#root)
  }

  #fdOf(packId: ObjectId): number {
    const known = this.#open.get(packId)
    if (known !== undefined) return known
    const file = { kind: 'pack', name: packId } as const
    let fd: number
    try {
      fd = openat(this.#root, pathOf(file) as ByteString, O_RDONLY)
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') throw new FileMissingError(file, this.#directory, error)
      throw error
    }
    // The one that was opened first goes: packs are read one after the other.
    for (const [oldest, oldFd] of this.#open) {
      if (this.#open.size < MOST_OPEN) break
      this.#open.delete(oldest)
      close(oldFd)
    }
    this.#open.set(packId, fd)
    return fd
  }
}
