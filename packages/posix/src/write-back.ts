import type { ByteString } from './bytes.ts'
import { syncFileSystemAsync } from './durability.ts'
import { PosixError } from './errors.ts'
import { close, O_DIRECTORY, O_RDONLY, openat } from './open.ts'

/** So much is written between two beginnings; a file without content is about as much work as one of a page or two. */
const STEP_BYTES = 64 << 20
const FILE_BYTES = 4096

/**
 * Has a target written back while more is written to it, so that a barrier finds little left to do: to write small files
 * keeps the processors busy, and the disk that waits for it would have to do all of its work at the end.
 */
export class WriteBack {
  readonly #rootFd: number
  #bytes = 0
  #running: Promise<void> | undefined

  /** `rootFd` is open for as long as this is used. */
  constructor(rootFd: number) {
    this.#rootFd = rootFd
  }

  /** Says what was written since the last call. Never waits. */
  wrote(bytes: number, files: number): void {
    this.#bytes += bytes + files * FILE_BYTES
    if (this.#bytes < STEP_BYTES || this.#running !== undefined) return
    this.#bytes = 0
    this.#running = this.#begin().finally(() => {
      this.#running = undefined
    })
  }

  /** Resolves when nothing is under way. */
  async end(): Promise<void> {
    await this.#running
  }

  // Through an open file of its own: what could not be written back is told to each open file once, and the barrier has
  // to be told. Nobody misses what is said here.
  async #begin(): Promise<void> {
    try {
      const fd = openat(this.#rootFd, '.' as ByteString, O_RDONLY | O_DIRECTORY)
      await syncFileSystemAsync(fd).finally(() => close(fd))
    } catch (error) {
      if (!(error instanceof PosixError)) throw error
    }
  }
}
