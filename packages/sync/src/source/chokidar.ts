import { mkdtempSync, type FSWatcher as NodeWatcher, watch as nodeWatch, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { basename } from 'node:path'
import {
  type ByteString,
  bytesOf,
  errnoOf,
  O_NOFOLLOW,
  O_PATH,
  openBeneath,
  pathOfFd,
  S_IFDIR,
  statFd,
  textOf,
  withFd,
} from '@lsync/posix'
import { type FSWatcher, watch } from 'chokidar'
import { SourceUnavailableError, WatchLimitError } from './errors.ts'
import type { BlindSpot, Hint, Source, SourceRequest } from './source.ts'

// How long a directory that has appeared is scanned again at each drain: chokidar goes down into it meanwhile.
const FRESH_MS = 10_000

/**
 * Watches with chokidar, which needs no privilege: one inotify watch for each directory. Its own events say what changed
 * only after a stat of its own, so the raw ones beneath them are taken, and what they mean is left to the index.
 */
export class ChokidarSource implements Source {
  readonly kind = 'chokidar'
  readonly #request: SourceRequest
  readonly #spots: BlindSpot[] = [...BLIND_SPOTS]
  /** Directories that have appeared, by path, with the time of it. */
  readonly #fresh = new Map<ByteString, number>()
  #base = ''
  #handle: (hint: Hint) => void = () => undefined
  #watcher: FSWatcher | undefined
  #marker: Marker | undefined

  constructor(request: SourceRequest) {
    this.#request = request
  }

  get blindSpots(): readonly BlindSpot[] {
    return this.#spots
  }

  /**
   * @throws {WatchLimitError} when the tree has more directories than the user may watch
   * @throws {SourceUnavailableError} when the root's own path is no text that chokidar could take
   */
  async start(handle: (hint: Hint) => void): Promise<void> {
    const { root, rootFd } = this.#request
    const path = pathOfFd(rootFd)
    this.#base = path === undefined ? '' : textOf(path)
    if (path === undefined || !isPlain(this.#base)) {
      throw new SourceUnavailableError('chokidar', root, 'its path is not UTF-8, or holds a backslash')
    }
    this.#handle = handle
    const watcher = watch(this.#base, {
      backend: 'native',
      ignoreInitial: true,
      followSymlinks: false,
      atomic: false,
      ignorePermissionErrors: true,
    })
    this.#watcher = watcher
    watcher.on('raw', (_, name, details) => this.#changed((details as { watchedPath: string }).watchedPath, name))
    // The watch is set in the same turn in which this is said, so a scan after it misses nothing between the two.
    watcher.on('addDir', (directory) => setImmediate(() => this.#appeared(this.#relative(directory))))
    try {
      this.#marker = new Marker()
      await new Promise<void>((resolve, reject) => {
        watcher.once('ready', resolve)
        watcher.on('error', (error) => {
          const limit = LIMITS.has(errnoOf(error) ?? '') ? new WatchLimitError(root, { cause: error }) : undefined
          reject(limit ?? error)
          this.#failed(limit ?? (error as Error))
        })
      })
    } catch (error) {
      await this.stop()
      if (LIMITS.has(errnoOf(error) ?? '')) throw new WatchLimitError(root, { cause: error })
      throw error
    }
  }

  async drain(): Promise<void> {
    await this.#marker?.pass()
    const now = performance.now()
    for (const [path, since] of this.#fresh) {
      if (now - since > FRESH_MS) this.#fresh.delete(path)
      else this.#say({ kind: 'tree', directory: { path } })
    }
  }

  async stop(): Promise<void> {
    const watcher = this.#watcher
    this.#watcher = undefined
    this.#marker?.close()
    this.#marker = undefined
    await watcher?.close()
  }

  #say(hint: Hint): void {
    if (this.#watcher !== undefined) this.#handle(hint)
  }

  #changed(directory: string, name: string | null): void {
    const path = this.#relative(directory)
    if (name === null || !isPlain(directory)) {
      this.#say({ kind: 'tree', directory: { path } })
      return
    }
    // libuv gives a change of the watched directory itself the directory's own name.
    if (name === basename(directory)) this.#say({ kind: 'name', directory: { path }, name: SELF })
    if (name.includes(REPLACEMENT)) {
      // Which name it is cannot be known, so all of them may have changed.
      this.#say({ kind: 'tree', directory: { path } })
      return
    }
    const child = bytesOf(name)
    this.#say({ kind: 'name', directory: { path }, name: child })
    const whole = (path === '' ? child : `${path}/${child}`) as ByteString
    if (this.#isDirectory(whole)) this.#appeared(whole)
  }

  /** A directory is new, or moved here with all that it holds. */
  #appeared(path: ByteString): void {
    this.#fresh.set(path, performance.now())
    this.#say({ kind: 'tree', directory: { path } })
  }

  #isDirectory(path: ByteString): boolean {
    try {
      return withFd(openBeneath(this.#request.rootFd, path, O_PATH | O_NOFOLLOW), (fd) => statFd(fd).type === S_IFDIR)
    } catch {
      return false // gone, or behind a symlink: its name has been said
    }
  }

  /** The part of a path below the root, up to what chokidar could not read as text. */
  #relative(path: string): ByteString {
    const below = path === this.#base ? '' : path.slice(this.#base.length + 1)
    const parts = below.split('/')
    const odd = parts.findIndex((part) => part.includes(REPLACEMENT))
    return bytesOf((odd < 0 ? parts : parts.slice(0, odd)).join('/'))
  }

  #failed(error: Error): void {
    if (error instanceof WatchLimitError && !this.#spots.includes(UNWATCHED)) this.#spots.push(UNWATCHED)
    this.#say({ kind: 'lost', reason: error.message })
  }
}

/**
 * A file of its own, in a directory of its own, that is watched too. All watches of a process's main loop share one queue,
 * so when a write to it is seen, all that came before has been seen.
 */
class Marker {
  readonly #directory = mkdtempSync(`${tmpdir()}/lsync-marker-`)
  readonly #watcher: NodeWatcher
  #seen: (() => void)[] = []

  constructor() {
    try {
      this.#watcher = nodeWatch(this.#directory, { persistent: false }, () => {
        for (const resolve of this.#seen.splice(0)) resolve()
      })
    } catch (error) {
      rmSync(this.#directory, { recursive: true, force: true })
      throw error
    }
  }

  async pass(): Promise<void> {
    // One event may be of an earlier write: what counts is one after that, and a write gives two at least.
    for (let turn = 0; turn < 2; turn++) {
      const seen = new Promise<void>((resolve) => this.#seen.push(resolve))
      writeFileSync(`${this.#directory}/marker`, 'x')
      await seen
    }
  }

  close(): void {
    this.#watcher.close()
    for (const resolve of this.#seen.splice(0)) resolve()
    rmSync(this.#directory, { recursive: true, force: true })
  }
}

// ENOSPC: max_user_watches; EMFILE: max_user_instances.
const LIMITS: ReadonlySet<string> = new Set(['ENOSPC', 'EMFILE'])
const SELF = '.' as ByteString
const REPLACEMENT = '\ufffd'

/** Whether chokidar hands a path on as it is: it takes backslashes for slashes, and strings for UTF-8. */
function isPlain(path: string): boolean {
  return !path.includes('\\') && !path.includes(REPLACEMENT) && path.isWellFormed()
}

const UNWATCHED: BlindSpot = {
  code: 'WATCH_LIMIT',
  message: 'The limit on inotify watches was reached: what happens in directories made since then is not seen.',
}

const BLIND_SPOTS: readonly BlindSpot[] = [
  { code: 'MAPPED_WRITES', message: 'Writes through a shared memory mapping are not seen.' },
  {
    code: 'QUEUE_OVERFLOW',
    message: 'When more happens at once than fs.inotify.max_queued_events, some of it is missed without a word.',
  },
  {
    code: 'ODD_DIRECTORIES',
    message: 'What happens in directories whose names are not UTF-8, or hold a backslash, is not seen.',
  },
]
