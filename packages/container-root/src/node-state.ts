import { mkdirSync } from 'node:fs'
import { hostname } from 'node:os'
import {
  type ByteString,
  bytesOf,
  close,
  fsync,
  type HostPath,
  LsyncError,
  makeDirectory,
  mountsBeneath,
  O_DIRECTORY,
  O_RDONLY,
  openat,
  openRoot,
  printable,
  randomHex,
  readDirents,
  realPath,
  rename,
  tryLock,
  tryStatAt,
  unmount,
  withFd,
} from '@lsync/posix'
import { DIRECTORY_FLAGS, ensureDirectory, isOursAlone, makeLocked, namesIn, tryOpenDirectory } from './directory.ts'
import { LayerCache } from './layer-cache.ts'
import { createRecord, type RecordPlace, readRecord, removeRecord, replaceRecord } from './record-file.ts'
import {
  CacheRecord,
  ErrorsRecord,
  NodeRecord,
  NodeRootRecord,
  RECORD_ID,
  RootName,
  SolidifyRecord,
} from './records.ts'
import { sweepGone, throwAway } from './throw-away.ts'

/** Nothing is known of a root of this name on this node. */
export class RootUnknownError extends LsyncError {
  constructor(name: string, state: string) {
    super('ROOT_UNKNOWN', `there is no root ${printable(name)} in ${printable(state)}`, {
      path: state,
      hint: 'name its home with --home, or another state with --state',
    })
  }
}

/** A root of this name is on this node already, and of another home. */
export class RootNameTakenError extends LsyncError {
  constructor(name: string, home: string) {
    super('ROOT_NAME_TAKEN', `the root ${printable(name)} of this node has its home in ${printable(home)}`, {
      path: home,
      hint: 'choose another name, or another --state',
    })
  }
}

/** Another process works on the same root. */
export class RootBusyError extends LsyncError {
  constructor(path: string, why = 'another lsync works on it') {
    super('ROOT_BUSY', `${printable(path)} is in use: ${why}`, { path, hint: 'wait for it to end' })
  }
}

/** The state of a node cannot be used: others could write it. */
export class StateUntrustedError extends LsyncError {
  constructor(path: string) {
    super('STATE_UNTRUSTED', `${printable(path)} does not belong to this user alone`, {
      path,
      hint: 'give it to the user that lsync runs as, with mode 0700, once it is known who wrote what is in it',
    })
  }
}

const ERRORS_JSON = 'errors.json' as ByteString
const NODE_JSON = 'node.json' as ByteString
const CACHE_JSON = 'cache.json' as ByteString
const CONFIG_JSON = 'config.json' as ByteString
const SOLIDIFY_JSON = 'solidify.json' as ByteString
const ROOTS = 'roots' as ByteString
const JOURNAL = 'journal' as ByteString
const SCRATCH = 'scratch-'
const STAGING = 'staging' as ByteString

/** Where the state of a node is: `LSYNC_STATE`, or /var/lib/lsync. */
export function defaultNodeState(): HostPath {
  return bytesOf(process.env['LSYNC_STATE'] ?? '/var/lib/lsync') as HostPath
}

/** The state of a node, by docs/format.md, "The state of a node". */
export class NodeState {
  readonly path: HostPath
  readonly node: NodeRecord

  private constructor(path: HostPath, node: NodeRecord) {
    this.path = path
    this.node = node
  }

  /** Opens the state, and makes it with an id of its own where it is missing. @throws {StateUntrustedError} */
  static open(path: HostPath = defaultNodeState()): NodeState {
    mkdirSync(Buffer.from(path, 'latin1'), { recursive: true, mode: 0o700 })
    const real = realPath(path)
    return withFd(openRoot(real), (fd) => {
      if (!isOursAlone(fd)) throw new StateUntrustedError(real)
      ensureDirectory(fd, ROOTS)
      const place = { fd, path: real }
      createRecord(place, NODE_JSON, NodeRecord.parse({ format: 1, id: randomHex(16), name: hostname().slice(0, 200) }))
      return new NodeState(real, readRecord(place, NODE_JSON, NodeRecord) as NodeRecord)
    })
  }

  /**
   * The cache of this node's layers; `undefined` where nobody has asked for one. `limitBytes` is how much it may hold from now on; what is
   * beyond that, and not mounted, goes.
   */
  async openCache(limitBytes?: number): Promise<LayerCache | undefined> {
    const limit = withFd(openRoot(this.path), (fd) => {
      const place = { fd, path: this.path }
      if (limitBytes !== undefined) replaceRecord(place, CACHE_JSON, CacheRecord.parse({ format: 1, limitBytes }))
      return readRecord(place, CACHE_JSON, CacheRecord)?.limitBytes
    })
    if (limit === undefined) return undefined
    const cache = await LayerCache.open({ directory: `${this.path}/cache` as HostPath, limitBytes: limit })
    if (limitBytes !== undefined) cache.evict()
    return cache
  }

  /** The names of the roots on this node, sorted. */
  rootNames(): string[] {
    const names = withFd(openRoot(`${this.path}/roots` as HostPath), namesIn)
    return names.filter((name) => RootName.safeParse(name).success)
  }

  /**
   * A root on this node; close it.
   * @throws {RootUnknownError} where there is none of this name, and `create` does not make one
   */
  openRoot(name: string, options: { readonly create?: boolean } = {}): NodeRoot {
    if (!RootName.safeParse(name).success) throw new RootUnknownError(name, this.path)
    const path = `${this.path}/roots/${name}` as HostPath
    return withFd(openRoot(`${this.path}/roots` as HostPath), (rootsFd) => {
      if (tryStatAt(rootsFd, name as ByteString) === undefined) {
        if (options.create !== true) throw new RootUnknownError(name, this.path)
        ensureDirectory(rootsFd, name as ByteString)
      }
      const fd = openat(rootsFd, name as ByteString, DIRECTORY_FLAGS)
      try {
        if (!isOursAlone(fd)) throw new StateUntrustedError(path)
        for (const directory of ['merged', 'replicas', JOURNAL, 'index']) ensureDirectory(fd, directory as ByteString)
        return new NodeRoot(path, fd)
      } catch (error) {
        close(fd)
        throw error
      }
    })
  }
}

/** What a node has of one root: its records, upper, replicas. */
export class NodeRoot {
  readonly path: HostPath
  readonly fd: number
  #last: Promise<unknown> = Promise.resolve()

  constructor(path: HostPath, fd: number) {
    this.path = path
    this.fd = fd
  }

  /**
   * Runs `use` when what this object was asked for before is done, and while no other process works on this root.
   * @throws {RootBusyError}
   */
  locked<T>(use: () => Promise<T>): Promise<T> {
    const result = this.#last.then(() => this.#withLock(use))
    this.#last = result.catch(() => undefined)
    return result
  }

  async #withLock<T>(use: () => Promise<T>): Promise<T> {
    const fd = openat(this.fd, '.' as ByteString, O_RDONLY | O_DIRECTORY)
    try {
      if (!tryLock(fd, 'exclusive', this.path)) throw new RootBusyError(this.path)
      sweepGone(this.fd)
      this.#sweepScratch()
      withFd(openat(this.fd, 'replicas' as ByteString, DIRECTORY_FLAGS), sweepGone)
      return await use()
    } finally {
      close(fd)
    }
  }

  close(): void {
    close(this.fd)
  }

  get upperPath(): HostPath {
    return `${this.path}/upper` as HostPath
  }

  get mergedPath(): HostPath {
    return `${this.path}/merged` as HostPath
  }

  /** For the sync of the upper. */
  get indexPath(): HostPath {
    return `${this.path}/index` as HostPath
  }

  readConfig(): NodeRootRecord | undefined {
    return readRecord(this.#place, CONFIG_JSON, NodeRootRecord)
  }

  writeConfig(config: NodeRootRecord): void {
    replaceRecord(this.#place, CONFIG_JSON, NodeRootRecord.parse(config))
  }

  /** What failed last, the newest first. */
  lastErrors(): ErrorsRecord['errors'] {
    return readRecord(this.#place, ERRORS_JSON, ErrorsRecord)?.errors ?? []
  }

  /** Keeps what failed, so that `status` can tell. It never fails itself: what it is about matters more. */
  noteError(verb: string, error: unknown): void {
    try {
      const { code = 'BUG', message } = error as Error & { code?: unknown }
      const noted = {
        atMs: Date.now(),
        verb,
        code: String(code).slice(0, 100),
        message: String(message).slice(0, 4000),
      }
      const [last, ...others] = this.lastErrors()
      // The same again and again takes the place of itself.
      const isSame = last?.verb === verb && last.code === noted.code && last.message === noted.message
      const errors = [noted, ...(last === undefined || isSame ? [] : [last]), ...others].slice(0, 10)
      replaceRecord(this.#place, ERRORS_JSON, { format: 1, errors })
    } catch {}
  }

  readSolidify(): SolidifyRecord | undefined {
    return this.#inJournal((place) => readRecord(place, SOLIDIFY_JSON, SolidifyRecord))
  }

  writeSolidify(record: SolidifyRecord): void {
    this.#inJournal((place) => replaceRecord(place, SOLIDIFY_JSON, SolidifyRecord.parse(record)))
  }

  removeSolidify(): void {
    this.#inJournal((place) => removeRecord(place, SOLIDIFY_JSON))
  }

  /** Whether something lies in this root's directory under the name. */
  has(name: string): boolean {
    return tryStatAt(this.fd, name as ByteString) !== undefined
  }

  /** Whether the upper holds any name. */
  hasChanges(): boolean {
    if (!this.has('upper')) return false
    let count = 0
    withFd(openat(this.fd, 'upper' as ByteString, DIRECTORY_FLAGS), (fd) => readDirents(fd, () => count++))
    return count > 0
  }

  /** Makes `upper` of what `fill` makes in a directory, durably; whatever was left of an earlier attempt goes. */
  makeUpper(fill: (fd: number) => void): void {
    const next = 'upper.next' as ByteString
    throwAway(this.fd, next)
    makeDirectory(this.fd, next, 0o700)
    withFd(openat(this.fd, next, DIRECTORY_FLAGS), (fd) => {
      fill(fd)
      fsync(fd, this.path)
    })
    rename(this.fd, next, this.fd, 'upper' as ByteString)
    this.makeWork()
    fsync(this.fd, this.path)
  }

  /** An empty work directory: what an earlier mount left in it means nothing to the next one. */
  makeWork(): void {
    throwAway(this.fd, 'work' as ByteString)
    makeDirectory(this.fd, 'work' as ByteString, 0o700)
  }

  /** The upper becomes the local replica of the layer that was made of it. May be repeated. */
  keepReplica(id: string): void {
    withFd(openat(this.fd, 'replicas' as ByteString, DIRECTORY_FLAGS), (replicas) => {
      if (tryStatAt(replicas, id as ByteString) !== undefined || !this.has('upper')) return
      rename(this.fd, 'upper' as ByteString, replicas, id as ByteString)
      fsync(replicas, this.path)
      fsync(this.fd, this.path)
    })
  }

  /** The ids of the layers that this node has a replica of. */
  replicas(): string[] {
    const names = withFd(openat(this.fd, 'replicas' as ByteString, DIRECTORY_FLAGS), namesIn)
    return names.filter((name) => RECORD_ID.test(name))
  }

  /** The local replica of a layer: an fd to be closed. `undefined` where there is none. */
  openReplica(id: string): number | undefined {
    return withFd(openat(this.fd, 'replicas' as ByteString, DIRECTORY_FLAGS), (fd) =>
      tryOpenDirectory(fd, id as ByteString),
    )
  }

  removeReplica(id: string): void {
    withFd(openat(this.fd, 'replicas' as ByteString, DIRECTORY_FLAGS), (fd) => {
      throwAway(fd, id as ByteString)
    })
  }

  /** Forgets what the sync of the upper knew: the next upper begins anew. */
  clearIndex(): void {
    throwAway(this.fd, 'index' as ByteString)
    ensureDirectory(this.fd, 'index' as ByteString)
  }

  /** A directory of this node for a while; what a killed process left of it, mounts included, goes with the next command. */
  async withScratch<T>(use: (path: HostPath) => Promise<T>): Promise<T> {
    const { fd, name } = makeLocked(this.fd, SCRATCH)
    try {
      return await use(`${this.path}/${name}` as HostPath)
    } finally {
      withFd(fd, () => throwAway(this.fd, name))
    }
  }

  #sweepScratch(): void {
    for (const name of namesIn(this.fd)) {
      const fd = name.startsWith(SCRATCH) ? tryOpenDirectory(this.fd, name) : undefined
      if (fd === undefined) continue
      withFd(fd, () => {
        if (!tryLock(fd, 'exclusive')) return
        for (const { target } of mountsBeneath(`${this.path}/${name}` as HostPath)) unmount(target, { lazy: true })
        throwAway(this.fd, name)
      })
    }
  }

  /** Where a copy of the upper is kept on this node while it is to be sealed: made with its parents. */
  makeStaging(upperId: string): HostPath {
    ensureDirectory(this.fd, STAGING)
    withFd(openat(this.fd, STAGING, DIRECTORY_FLAGS), (fd) => ensureDirectory(fd, upperId as ByteString))
    return `${this.path}/${STAGING}/${upperId}` as HostPath
  }

  /** Removes that copy. */
  clearStaging(): void {
    throwAway(this.fd, STAGING)
  }

  /** Removes the upper with all that is in it. */
  discardUpper(): void {
    throwAway(this.fd, 'upper' as ByteString)
  }

  get #place(): RecordPlace {
    return { fd: this.fd, path: this.path }
  }

  #inJournal<T>(use: (place: RecordPlace) => T): T {
    return withFd(openat(this.fd, JOURNAL, DIRECTORY_FLAGS), (fd) =>
      use({ fd, path: `${this.path}/${JOURNAL}` as HostPath }),
    )
  }
}
