import { close, fstat, open, read } from 'node:fs'
import { promisify } from 'node:util'

const openAsync = promisify(open)
const readAsync = promisify(read)
const statAsync = promisify(fstat)
const closeAsync = promisify(close)

const MOST_OPEN = 16
const IDLE_MS = 500

interface OpenFile {
  readonly fd: number
  readonly sizeBytes: number
  users: number
  /** Out of the list: whoever uses it last closes it. */
  isDropped: boolean
}

/**
 * Files that are read from, kept open a moment for the next range: a restore asks the same pack for thousands of pieces,
 * and opening, asking for the size and closing would cost more than reading.
 */
export class OpenPacks {
  readonly #files = new Map<string, Promise<OpenFile>>()
  #timer: NodeJS.Timeout | undefined

  /** Runs `use` with an open file and its size. Throws what open(2) throws. */
  async withFile<T>(path: Buffer, use: (file: OpenFile) => Promise<T>): Promise<T> {
    const key = path.toString('latin1')
    const opening = this.#files.get(key) ?? openFile(path)
    // The latest one is the last to be dropped.
    this.#files.delete(key)
    this.#files.set(key, opening)
    let file: OpenFile
    try {
      file = await opening
    } catch (error) {
      if (this.#files.get(key) === opening) this.#files.delete(key)
      throw error
    }
    file.users++
    try {
      return await use(file)
    } finally {
      file.users--
      if (file.isDropped && file.users === 0) await closeAsync(file.fd)
      await this.#limit()
      this.#timer ??= setTimeout(() => this.drop(), IDLE_MS).unref()
    }
  }

  /** Reads until `length` bytes or the end of the file. */
  async readAt({ fd }: { readonly fd: number }, offset: number, length: number): Promise<Buffer> {
    const content = Buffer.allocUnsafeSlow(length)
    let done = 0
    while (done < length) {
      const { bytesRead } = await readAsync(fd, content, done, length - done, offset + done)
      if (bytesRead === 0) break
      done += bytesRead
    }
    return content.subarray(0, done)
  }

  /** Closes what nobody reads from, and forgets the rest. */
  async drop(): Promise<void> {
    clearTimeout(this.#timer)
    this.#timer = undefined
    const files = [...this.#files.values()]
    this.#files.clear()
    await Promise.all(files.map(dropFile))
  }

  async #limit(): Promise<void> {
    while (this.#files.size > MOST_OPEN) {
      const [oldest] = this.#files
      if (oldest === undefined) return
      this.#files.delete(oldest[0])
      await dropFile(oldest[1])
    }
  }
}

async function openFile(path: Buffer): Promise<OpenFile> {
  const fd = await openAsync(path, 'r')
  try {
    return { fd, sizeBytes: (await statAsync(fd)).size, users: 0, isDropped: false }
  } catch (error) {
    await closeAsync(fd)
    throw error
  }
}

async function dropFile(opening: Promise<OpenFile>): Promise<void> {
  const file = await opening.catch(() => undefined)
  if (file === undefined) return
  file.isDropped = true
  if (file.users === 0) await closeAsync(file.fd)
}
