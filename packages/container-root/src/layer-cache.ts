import { readFileSync, utimesSync, writeFileSync } from 'node:fs'
import { mkdir, stat } from 'node:fs/promises'
import { convertLayer, type Namespace, removeTree } from '@lsync/overlay-merge'
import {
  type ByteString,
  close,
  fsync,
  type HostPath,
  hasOtherOpeners,
  LsyncError,
  makeDirectory,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  openat,
  openRoot,
  overlayUsers,
  PosixError,
  printable,
  RENAME_NOREPLACE,
  randomHex,
  rename,
  textOf,
  tryLock,
  tryRename,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import { z } from 'zod'
import { DIRECTORY_FLAGS, namesIn, tryOpenDirectory } from './directory.ts'
import { RECORD_ID } from './records.ts'
import { copyDurably, openSealed } from './sealed-layer.ts'

/** `cached.json` of a layer in a node's cache. `docs/format.md`, "The cache of a node". */
export const CachedLayer = z.strictObject({
  format: z.literal(1),
  form: z.enum(['tree', 'erofs']),
  /** An image's size; of a tree its content and a block for each name. */
  sizeBytes: z.int().nonnegative(),
})
export type CachedLayer = z.infer<typeof CachedLayer>

/** Where a layer can be copied from: a directory in kernel form, or an image. */
export interface LayerSource {
  readonly form: 'tree' | 'erofs'
  readonly path: HostPath
  /** Whose marks a directory has. Default `trusted`. */
  readonly namespace?: Namespace
}

/** The root of a layer, open for a mount. */
export interface OpenedLayer {
  readonly fd: number
  close(): void
}

export interface LayerCacheOptions {
  /** A local directory, made if need be. */
  readonly directory: HostPath
  /** How much may lie in it. What is mounted stays even so. */
  readonly limitBytes: number
}

/** One layer in the cache, for reports. */
export interface CacheEntry extends CachedLayer {
  readonly id: string
  readonly usedAtMs: number
}

/** The cache is full of what is mounted, or the layer alone is larger than it may be. */
export class CacheFullError extends LsyncError {
  constructor(directory: HostPath, id: string, sizeBytes: number, limitBytes: number) {
    super('CACHE_FULL', `layer ${id} (${sizeBytes} bytes) has no place in ${printable(directory)}`, {
      path: directory,
      hint: `raise the limit of the cache (${limitBytes} bytes), or unmount roots that are not needed`,
    })
  }
}

const FILLING = /^\.fill-[0-9a-f]{16}$/
const GONE = /^\.gone-[0-9a-f]{16}$/
const RECORD = 'cached.json'
const TREE = 'tree' as ByteString
const IMAGE = 'layer.erofs' as ByteString
const NAME_BYTES = 4096

/**
 * Layers of homes, copied to a local disk, so that a root is mounted from near by. Whatever is in it is whole: an entry appears by one rename
 * when it is durable, and goes by one. Several processes may use one cache.
 */
export class LayerCache {
  readonly #directory: HostPath
  readonly #limitBytes: number
  readonly #filling = new Map<string, Promise<void>>()

  private constructor({ directory, limitBytes }: LayerCacheOptions) {
    this.#directory = directory
    this.#limitBytes = limitBytes
  }

  /** Opens a cache, and clears away what killed processes left half made. */
  static async open(options: LayerCacheOptions): Promise<LayerCache> {
    await mkdir(textOf(options.directory), { recursive: true, mode: 0o700 })
    const cache = new LayerCache(options)
    cache.#in((fd) => {
      for (const name of namesIn(fd)) {
        if (GONE.test(name) || (FILLING.test(name) && isUnlocked(fd, name))) removeTree(fd, name)
      }
    })
    return cache
  }

  /**
   * The root of a cached layer as an fd that an overlay takes for a lower, and that the caller closes when it is mounted: until
   * then, and while it is mounted, the layer stays. `undefined` where the cache does not have it.
   */
  openLayer(id: string): OpenedLayer | undefined {
    const entry = this.#tryOpenEntry(id)
    if (entry === undefined) return undefined
    try {
      // Held until the mount is there: eviction wants it exclusively.
      if (!tryLock(entry, 'shared') || !this.#isThere(id)) {
        close(entry)
        return undefined
      }
      const { form } = recordIn(entry)
      const fd =
        form === 'tree'
          ? openat(entry, TREE, DIRECTORY_FLAGS)
          : openSealed(`/proc/self/fd/${entry}/${IMAGE}` as HostPath)
      const now = new Date()
      utimesSync(`/proc/self/fd/${entry}/${RECORD}`, now, now)
      return {
        fd,
        close() {
          close(fd)
          close(entry)
        },
      }
    } catch (cause) {
      close(entry)
      throw cause
    }
  }

  has(id: string): boolean {
    return this.#isThere(id)
  }

  /** What is in the cache, last used first. */
  entries(): CacheEntry[] {
    return this.#in((fd) =>
      namesIn(fd)
        .filter((name) => RECORD_ID.test(name))
        .flatMap((id) => {
          const entry = this.#tryOpenEntry(id)
          if (entry === undefined) return []
          return withFd(entry, () => {
            const used = tryStatAt(entry, RECORD as ByteString)
            return used === undefined ? [] : [{ id, ...recordIn(entry), usedAtMs: Number(used.mtimeNs / 1_000_000n) }]
          })
        }),
    ).sort((left, right) => right.usedAtMs - left.usedAtMs)
  }

  /**
   * Copies a layer into the cache, durably, unless it is there. What was used longest ago makes room.
   * @throws {CacheFullError}, and what reading the layer throws
   */
  async fill(id: string, source: LayerSource, signal?: AbortSignal): Promise<void> {
    if (!RECORD_ID.test(id)) throw new PosixError('EINVAL', { syscall: 'cache', path: id })
    while (!this.#isThere(id)) {
      const filling = this.#filling.get(id)
      if (filling !== undefined) {
        // Whoever began it may be told to stop; then this one begins anew.
        await filling.catch(() => undefined)
        signal?.throwIfAborted()
        continue
      }
      const mine = this.#fill(id, source, signal).finally(() => this.#filling.delete(id))
      this.#filling.set(id, mine)
      await mine
    }
  }

  /** Fills one after the other, in the order given. What has no place is left out: how many are there now. */
  async prefetch(
    layers: readonly { readonly id: string; readonly source: LayerSource }[],
    signal?: AbortSignal,
  ): Promise<number> {
    let there = 0
    for (const { id, source } of layers) {
      try {
        await this.fill(id, source, signal)
        there++
      } catch (cause) {
        if (!(cause instanceof CacheFullError)) throw cause
      }
    }
    return there
  }

  /** Removes what was used longest ago until `roomBytes` more would fit, and nothing that is mounted. Whether they do. */
  evict(roomBytes = 0): boolean {
    if (roomBytes > this.#limitBytes) return false
    const entries = this.entries()
    let total = entries.reduce((sum, { sizeBytes }) => sum + sizeBytes, roomBytes)
    for (const { id, sizeBytes } of entries.reverse()) {
      if (total <= this.#limitBytes) break
      if (this.#remove(id)) total -= sizeBytes
    }
    return total <= this.#limitBytes
  }

  async #fill(id: string, source: LayerSource, signal: AbortSignal | undefined): Promise<void> {
    const name = `.fill-${randomHex(8)}` as ByteString
    const fd = this.#in((cacheFd) => {
      makeDirectory(cacheFd, name, 0o700)
      return openat(cacheFd, name, DIRECTORY_FLAGS)
    })
    try {
      tryLock(fd, 'exclusive')
      const sizeBytes = await this.#copy(id, source, `${this.#directory}/${name}` as HostPath, signal)
      writeFileSync(`/proc/self/fd/${fd}/${RECORD}`, `${JSON.stringify({ format: 1, form: source.form, sizeBytes })}\n`)
      withFd(openat(fd, RECORD as ByteString, O_RDONLY | O_NOFOLLOW), (record) => fsync(record))
      fsync(fd)
      if (!this.evict(sizeBytes)) throw new CacheFullError(this.#directory, id, sizeBytes, this.#limitBytes)
      this.#in((cacheFd) => {
        const code = tryRename(cacheFd, name, cacheFd, id as ByteString, RENAME_NOREPLACE)
        if (code !== undefined && code !== 'EEXIST') throw new PosixError(code, { syscall: 'renameat2', path: id })
        fsync(cacheFd)
      })
    } finally {
      close(fd)
      this.#in((cacheFd) => removeTree(cacheFd, name))
    }
  }

  async #copy(id: string, source: LayerSource, to: HostPath, signal: AbortSignal | undefined): Promise<number> {
    if (source.form === 'erofs') {
      const { size } = await stat(textOf(source.path))
      // Said before it is copied, where that can be known.
      if (!this.evict(size)) throw new CacheFullError(this.#directory, id, size, this.#limitBytes)
      await copyDurably(textOf(source.path), `${textOf(to)}/${IMAGE}`, signal)
      return size
    }
    const form = source.namespace === 'user' ? 'kernel-user' : 'kernel-trusted'
    const { bytes, entries } = await convertLayer({
      from: source.path,
      fromForm: form,
      to: `${to}/${TREE}` as HostPath,
      toForm: form,
      ...(signal && { signal }),
    })
    return bytes + entries * NAME_BYTES
  }

  #remove(id: string): boolean {
    const entry = this.#tryOpenEntry(id)
    if (entry === undefined) return false
    return withFd(entry, () => {
      if (!tryLock(entry, 'exclusive') || isMounted(entry)) return false
      return this.#in((fd) => {
        const gone = `.gone-${randomHex(8)}` as ByteString
        rename(fd, id as ByteString, fd, gone)
        fsync(fd)
        removeTree(fd, gone)
        return true
      })
    })
  }

  #isThere(id: string): boolean {
    return RECORD_ID.test(id) && this.#in((fd) => tryStatAt(fd, id as ByteString) !== undefined)
  }

  #tryOpenEntry(id: string): number | undefined {
    if (!RECORD_ID.test(id)) return undefined
    return this.#in((fd) => tryOpenDirectory(fd, id as ByteString))
  }

  #in<T>(use: (fd: number) => T): T {
    return withFd(openRoot(this.#directory), use)
  }
}

/** Whether an overlay anywhere has the entry's tree as a layer, or the kernel or anybody else its image open. */
function isMounted(entry: number): boolean {
  const image = tryStatAt(entry, IMAGE)
  if (image !== undefined)
    return withFd(openat(entry, IMAGE, O_RDONLY | O_NOFOLLOW | O_NONBLOCK), (fd) => hasOtherOpeners(fd) !== false)
  return overlayUsers(entry).uses.length > 0
}

function recordIn(entry: number): CachedLayer {
  return CachedLayer.parse(JSON.parse(readFileSync(`/proc/self/fd/${entry}/${RECORD}`, 'utf8')))
}

function isUnlocked(fd: number, name: ByteString): boolean {
  return withFd(openat(fd, name, DIRECTORY_FLAGS), (entry) => tryLock(entry, 'exclusive'))
}
