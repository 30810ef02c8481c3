import { randomBytes } from 'node:crypto'
import { constants, statfsSync } from 'node:fs'
import { type FileHandle, link, mkdir, open, readdir, rename, stat, unlink } from 'node:fs/promises'
import { errnoOf, type HostPath, printable } from '@lsync/posix'
import {
  type Backend,
  type BackendCall,
  type ByteRange,
  DIRECTORIES,
  type FileKind,
  FileMissingError,
  type FileRef,
  isFileName,
  type ListedFile,
  lengthToRead,
  pathOf,
} from './backend.ts'
import { OpenPacks } from './open-packs.ts'

const DIRECTORY_MODE = 0o700
// As restic has them: nobody changes a file of a repository.
const FILE_MODE = 0o400
const NO_LINKS: ReadonlySet<string> = new Set(['EPERM', 'ENOTSUP', 'ENOSYS', 'EMLINK'])
const SHARED_SETTLE_MS = 200
// ext4, xfs, btrfs, tmpfs, overlay (statfs(2)).
const LOCAL_FILE_SYSTEMS: ReadonlySet<number> = new Set([0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994, 0x794c_7630])
const TEMPORARY_PREFIX = '.lsync-'
const TEMPORARY = /^\.lsync-[0-9a-f]{16}$/

/**
 * A repository in a directory. The directory belongs to the user and is trusted, so these are plain calls of Node's
 * thread pool, many at a time.
 */
export class LocalBackend implements Backend {
  readonly location: string
  readonly concurrency = 4
  readonly settleMs: number
  readonly directory: HostPath
  readonly #root: Buffer
  readonly #open = new OpenPacks()

  constructor(root: HostPath) {
    this.directory = root
    this.#root = Buffer.from(root, 'latin1')
    this.location = printable(root)
    this.settleMs = isShared(this.#root) ? SHARED_SETTLE_MS : 0
  }

  async create({ signal }: BackendCall = {}): Promise<void> {
    signal?.throwIfAborted()
    await mkdir(this.#root, { recursive: true, mode: DIRECTORY_MODE })
    for (const directory of Object.values(DIRECTORIES)) await makeDirectory(this.#path(directory))
    for (let first = 0; first < 256; first++) {
      await makeDirectory(this.#path(`data/${first.toString(16).padStart(2, '0')}`))
    }
    await this.#syncDirectory('data')
    await this.#syncDirectory('.')
  }

  async *list(kind: FileKind, { signal }: BackendCall = {}): AsyncGenerator<ListedFile> {
    if (kind === 'config') {
      const found = await this.stat({ kind, name: '' })
      if (found !== undefined) yield { name: '', ...found }
      return
    }
    const directories = kind === 'pack' ? await this.#packDirectories() : [DIRECTORIES[kind]]
    for (const directory of directories) {
      signal?.throwIfAborted()
      const names = (await this.#names(directory)).filter(isFileName)
      const found = await Promise.all(names.map((name) => statOf(this.#path(`${directory}/${name}`))))
      for (const [i, name] of names.entries()) {
        const file = found[i]
        // Deleted meanwhile: then it is not listed.
        if (file !== undefined) yield { name, ...file }
      }
    }
  }

  async stat(file: FileRef, { signal }: BackendCall = {}): Promise<{ readonly sizeBytes: number } | undefined> {
    signal?.throwIfAborted()
    return statOf(this.#path(pathOf(file)))
  }

  async get(file: FileRef, range?: ByteRange, { signal }: BackendCall = {}): Promise<Buffer> {
    signal?.throwIfAborted()
    try {
      return await this.#open.withFile(this.#path(pathOf(file)), async (opened) => {
        const length = lengthToRead(file, this.location, range, opened.sizeBytes)
        return this.#open.readAt(opened, range?.offset ?? 0, length)
      })
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') throw new FileMissingError(file, this.location, error)
      throw error
    }
  }

  async put(
    file: FileRef,
    content: Uint8Array,
    { signal, exclusive }: BackendCall & { readonly exclusive?: boolean } = {},
  ): Promise<boolean> {
    signal?.throwIfAborted()
    if (file.kind === 'config') await this.#open.drop()
    const path = pathOf(file)
    const directory = path.includes('/') ? path.slice(0, path.lastIndexOf('/')) : '.'
    const temporary = `${directory}/${TEMPORARY_PREFIX}${randomBytes(8).toString('hex')}`
    const handle = await this.#openNew(temporary, directory)
    try {
      try {
        await handle.writeFile(content)
        await handle.sync()
      } finally {
        await handle.close()
      }
      if (exclusive === true) return await this.#publishNew(temporary, path, directory)
      await rename(this.#path(temporary), this.#path(path))
    } catch (error) {
      await unlink(this.#path(temporary)).catch(() => undefined)
      throw error
    }
    await this.#syncDirectory(directory)
    return true
  }

  async delete(file: FileRef, { signal }: BackendCall = {}): Promise<boolean> {
    signal?.throwIfAborted()
    await this.#open.drop()
    try {
      await unlink(this.#path(pathOf(file)))
      return true
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') return false
      throw error
    }
  }

  async tidy({ signal }: BackendCall = {}): Promise<number> {
    let removed = 0
    for (const directory of [...Object.values(DIRECTORIES), ...(await this.#packDirectories()), '.']) {
      signal?.throwIfAborted()
      for (const name of await this.#names(directory)) {
        if (!TEMPORARY.test(name)) continue
        await unlink(this.#path(directory === '.' ? name : `${directory}/${name}`))
        removed++
      }
    }
    return removed
  }

  async close(): Promise<void> {
    await this.#open.drop()
  }

  /** Gives a file its name if nothing has it. Where there are no hard links, two at the same moment may both succeed. */
  async #publishNew(temporary: string, path: string, directory: string): Promise<boolean> {
    let isNew = true
    try {
      await link(this.#path(temporary), this.#path(path))
    } catch (error) {
      const code = errnoOf(error) ?? ''
      if (code !== 'EEXIST' && !NO_LINKS.has(code)) throw error
      isNew = code !== 'EEXIST' && (await statOf(this.#path(path))) === undefined
      if (isNew) await rename(this.#path(temporary), this.#path(path))
    }
    await unlink(this.#path(temporary)).catch((error: unknown) => {
      if (errnoOf(error) !== 'ENOENT') throw error
    })
    if (isNew) await this.#syncDirectory(directory)
    return isNew
  }

  async #packDirectories(): Promise<string[]> {
    const names = await this.#names(DIRECTORIES.pack)
    return names.filter((name) => /^[0-9a-f]{2}$/.test(name)).map((name) => `${DIRECTORIES.pack}/${name}`)
  }

  async #names(directory: string): Promise<string[]> {
    try {
      return await readdir(this.#path(directory))
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') return []
      throw error
    }
  }

  async #openNew(path: string, directory: string): Promise<FileHandle> {
    try {
      return await open(this.#path(path), 'wx', FILE_MODE)
    } catch (error) {
      if (errnoOf(error) !== 'ENOENT') throw error
      // Other tools make the folders of packs when they need them.
      await mkdir(this.#path(directory), { recursive: true, mode: DIRECTORY_MODE })
      return await open(this.#path(path), 'wx', FILE_MODE)
    }
  }

  async #syncDirectory(path: string): Promise<void> {
    const handle = await open(this.#path(path), constants.O_RDONLY | constants.O_DIRECTORY)
    try {
      await handle.sync()
    } catch (error) {
      // Some FUSE file systems cannot sync a directory.
      if (errnoOf(error) !== 'EINVAL' && errnoOf(error) !== 'ENOTSUP') throw error
    } finally {
      await handle.close()
    }
  }

  #path(path: string): Buffer {
    return path === '.' ? this.#root : Buffer.concat([this.#root, Buffer.from(`/${path}`)])
  }
}

/** Whether other machines may write to the file system: then what they do shows late. */
function isShared(root: Buffer): boolean {
  try {
    const { type } = statfsSync(root)
    return !LOCAL_FILE_SYSTEMS.has(type)
  } catch {
    // Not there yet.
    return true
  }
}

async function statOf(path: Buffer): Promise<{ readonly sizeBytes: number } | undefined> {
  try {
    return { sizeBytes: (await stat(path)).size }
  } catch (error) {
    if (errnoOf(error) === 'ENOENT' || errnoOf(error) === 'ENOTDIR') return undefined
    throw error
  }
}

async function makeDirectory(path: Buffer): Promise<void> {
  await mkdir(path, { mode: DIRECTORY_MODE }).catch((error: unknown) => {
    if (errnoOf(error) !== 'EEXIST') throw error
  })
}
