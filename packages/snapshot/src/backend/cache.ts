import { createHash, randomBytes } from 'node:crypto'
import { mkdir, open, readdir, rename, rm, stat, unlink, utimes, writeFile } from 'node:fs/promises'
import { homedir } from 'node:os'
import {
  type Backend,
  type BackendCall,
  type ByteRange,
  DIRECTORIES,
  type FileKind,
  type FileRef,
  isFileName,
  type ListedFile,
} from './backend.ts'

export interface CacheOptions {
  /** Of one repository: nothing else is in it. Made if it is not there. */
  readonly directory: string
  /** More is not kept; what was used longest ago goes first. Default 1 GiB. */
  readonly maxBytes?: number
}

const MAX_BYTES = 1024 * 1024 * 1024
const KINDS = ['snapshot', 'index', 'pack'] as const
type CachedKind = (typeof KINDS)[number]
// Told to programs that make backups: https://bford.info/cachedir/
const TAG = 'Signature: 8a477f597d28d172789f06886806bc55\n# What lsync has read from repositories. It may be removed.\n'

interface Entry {
  readonly kind: CachedKind
  sizeBytes: number
  usedMs: number
  /** Its content was compared with its name by this process. */
  isVerified: boolean
}

/** Where caches lie unless it is said otherwise: `$XDG_CACHE_HOME/lsync`, or `~/.cache/lsync`. */
export function defaultCacheDirectory(): string {
  const { XDG_CACHE_HOME: home } = process.env
  return `${home?.startsWith('/') === true ? home : `${homedir()}/.cache`}/lsync`
}

/**
 * A backend that keeps snapshots, indexes and the packs of trees on this machine, so that they travel once. They are as
 * they lie in the repository: sealed.
 *
 * The cache is not trusted: a file counts when its content is what its name says, and is fetched anew otherwise. A cache
 * that cannot be written to costs time and nothing else.
 */
export class CachingBackend implements Backend {
  readonly location: string
  readonly concurrency: number
  readonly settleMs: number
  readonly #inner: Backend
  readonly #directory: string
  readonly #maxBytes: number
  readonly #entries = new Map<string, Entry>()
  readonly #fetching = new Map<string, Promise<Buffer>>()
  #totalBytes = 0
  #ready: Promise<void> | undefined
  /** It could not be read, or not be written to: then it is left alone. */
  #isBroken = false

  constructor(inner: Backend, { directory, maxBytes = MAX_BYTES }: CacheOptions) {
    this.#inner = inner
    this.#directory = directory
    this.#maxBytes = maxBytes
    this.location = inner.location
    this.concurrency = inner.concurrency
    this.settleMs = inner.settleMs
  }

  create(call?: BackendCall): Promise<void> {
    return this.#inner.create(call)
  }

  async *list(kind: FileKind, call?: BackendCall): AsyncIterable<ListedFile> {
    const seen = new Set<string>()
    for await (const file of this.#inner.list(kind, call)) {
      seen.add(file.name)
      yield file
    }
    if (!isCached(kind)) return
    await this.#prepare()
    for (const [name, entry] of this.#entries) if (entry.kind === kind && !seen.has(name)) await this.#drop(name)
  }

  stat(file: FileRef, call?: BackendCall): Promise<{ readonly sizeBytes: number } | undefined> {
    return this.#inner.stat(file, call)
  }

  async get(file: FileRef, range?: ByteRange, call?: BackendCall): Promise<Buffer> {
    const { kind, name } = file
    const isWanted = kind === 'pack' ? call?.isForTrees === true : isCached(kind)
    if (!isWanted || !isFileName(name)) return this.#inner.get(file, range, call)
    call?.signal?.throwIfAborted()
    await this.#prepare()
    if (this.#isBroken) return this.#inner.get(file, range, call)
    const cached = await this.#read(name, range)
    if (cached !== undefined) return cached
    const content = await this.#fetch(file, call)
    return range === undefined
      ? Buffer.from(content)
      : Buffer.from(content.subarray(range.offset, range.offset + range.length))
  }

  async put(
    file: FileRef,
    content: Uint8Array,
    call?: BackendCall & { readonly exclusive?: boolean },
  ): Promise<boolean> {
    const isNew = await this.#inner.put(file, content, call)
    const { kind, name } = file
    // Of a pack it is not known here whether it is one of trees.
    if (kind !== 'pack' && isCached(kind) && isFileName(name)) {
      await this.#prepare()
      await this.#keep(kind, name, content)
    }
    return isNew
  }

  async delete(file: FileRef, call?: BackendCall): Promise<boolean> {
    const wasThere = await this.#inner.delete(file, call)
    await this.#drop(file.name)
    return wasThere
  }

  async tidy(call?: BackendCall): Promise<number> {
    return (await this.#inner.tidy?.(call)) ?? 0
  }

  close(): Promise<void> {
    return this.#inner.close()
  }

  #prepare(): Promise<void> {
    this.#ready ??= this.#open()
    return this.#ready
  }

  async #open(): Promise<void> {
    try {
      for (const kind of KINDS) {
        const directory = `${this.#directory}/${DIRECTORIES[kind]}`
        await mkdir(directory, { recursive: true, mode: 0o700 })
        for (const name of await readdir(directory)) {
          const path = `${directory}/${name}`
          if (!isFileName(name)) await rm(path, { recursive: true, force: true })
          else {
            const { size, mtimeMs } = await stat(path)
            this.#entries.set(name, { kind, sizeBytes: size, usedMs: mtimeMs, isVerified: false })
            this.#totalBytes += size
          }
        }
      }
      await writeFile(`${this.#directory}/CACHEDIR.TAG`, TAG, { mode: 0o600 })
      await this.#makeRoom(0)
    } catch {
      // Without a cache everything works.
      this.#isBroken = true
    }
  }

  /** What the cache has; `undefined` when it has nothing, or something else. */
  async #read(name: string, range: ByteRange | undefined): Promise<Buffer | undefined> {
    const entry = this.#entries.get(name)
    if (entry === undefined) return undefined
    try {
      const file = await open(this.#pathOf(entry.kind, name), 'r')
      try {
        if (!entry.isVerified) {
          const content = await file.readFile()
          if (nameOf(content) !== name) throw new Error('it was changed')
          entry.isVerified = true
        }
        const { size } = await file.stat()
        const offset = Math.min(range?.offset ?? 0, size)
        const buffer = Buffer.alloc(Math.min(range?.length ?? Infinity, size - offset))
        const { bytesRead } = await file.read(buffer, 0, buffer.length, offset)
        // A whole file is compared each time: nothing else would notice what happened to it meanwhile.
        if (bytesRead !== buffer.length || (range === undefined && nameOf(buffer) !== name))
          throw new Error('it was changed')
        if (Date.now() - entry.usedMs > 60_000) await utimes(this.#pathOf(entry.kind, name), new Date(), new Date())
        entry.usedMs = Date.now()
        return buffer
      } finally {
        await file.close()
      }
    } catch {
      await this.#drop(name)
      return undefined
    }
  }

  #fetch(file: FileRef, call: BackendCall | undefined): Promise<Buffer> {
    const { kind, name } = file
    const running = this.#fetching.get(name)
    // The other call may have been given up, which is no reason for this one to fail.
    if (running !== undefined) return running.catch(() => this.#inner.get(file, undefined, call))
    const fetched = this.#inner.get(file, undefined, call).then(async (content) => {
      if (isCached(kind)) await this.#keep(kind, name, content)
      return content
    })
    this.#fetching.set(name, fetched)
    const done = () => this.#fetching.delete(name)
    fetched.then(done, done)
    return fetched
  }

  async #keep(kind: CachedKind, name: string, content: Uint8Array): Promise<void> {
    // What is damaged in the repository is not kept: it may be mended.
    if (this.#entries.has(name) || content.length > this.#maxBytes || nameOf(content) !== name) return
    const temporary = `${this.#directory}/${DIRECTORIES[kind]}/.${randomBytes(8).toString('hex')}`
    try {
      await this.#makeRoom(content.length)
      await writeFile(temporary, content, { flag: 'wx', mode: 0o600 })
      await rename(temporary, this.#pathOf(kind, name))
      this.#entries.set(name, { kind, sizeBytes: content.length, usedMs: Date.now(), isVerified: true })
      this.#totalBytes += content.length
    } catch {
      this.#isBroken = true
      await unlink(temporary).catch(() => undefined)
    }
  }

  async #makeRoom(bytes: number): Promise<void> {
    if (this.#totalBytes + bytes <= this.#maxBytes) return
    const oldest = [...this.#entries].sort(([, left], [, right]) => left.usedMs - right.usedMs)
    for (const [name] of oldest) {
      if (this.#totalBytes + bytes <= this.#maxBytes) return
      await this.#drop(name)
    }
  }

  async #drop(name: string): Promise<void> {
    const entry = this.#entries.get(name)
    if (entry === undefined) return
    this.#entries.delete(name)
    this.#totalBytes -= entry.sizeBytes
    await unlink(this.#pathOf(entry.kind, name)).catch(() => undefined)
  }

  #pathOf(kind: CachedKind, name: string): string {
    return `${this.#directory}/${DIRECTORIES[kind]}/${name}`
  }
}

function isCached(kind: FileKind): kind is CachedKind {
  return (KINDS as readonly FileKind[]).includes(kind)
}

function nameOf(content: Uint8Array): string {
  return createHash('sha256').update(content).digest('hex')
}
