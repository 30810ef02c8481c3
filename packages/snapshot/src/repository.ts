import { randomBytes } from 'node:crypto'
import { promisify } from 'node:util'
import { zstdCompress, zstdDecompress } from 'node:zlib'
import { allocate, LsyncError } from '@lsync/posix'
import { type Backend, describeFile, type FileKind, type FileRef, pathOf } from './backend/backend.ts'
import { CachingBackend } from './backend/cache.ts'
import { type Polynomial, parsePolynomial, polynomialText, randomPolynomial } from './chunk/polynomial.ts'
import { eachOf } from './concurrent.ts'
import { type CipherKey, createEngine, type Engine } from './crypto/engine.ts'
import { hashOf, openBytes, sealBytes } from './crypto/sealer.ts'
import { decodeIndex, type IndexedPack, scanIndex } from './index-file.ts'
import { type KeyInfo, newMasterKey, openMasterKey, type PasswordCost, readKeyFile, writeKey } from './key-file.ts'
import { decodeSnapshot, encodeSnapshot, type Snapshot } from './model/snapshot.ts'
import { decodeTree, isId, type ObjectId, type TreeNode } from './model/tree.ts'
import { type Location, ObjectTable } from './object-table.ts'
import { type ObjectKind, type PackedObject, readPackHeader } from './pack.ts'
import { PreparedThreads, type ThreadUse } from './prepared-threads.ts'

const compress = promisify(zstdCompress)
const decompress = promisify(zstdDecompress)

/** The first byte of a file in format version 2: what follows is a zstd frame. */
const COMPRESSED_JSON = 2
const MAX_JSON_BYTES = 512 * 1024 * 1024
/** How much smaller an index becomes by compression. */
const EXPECTED_RATIO = 3
const MOST_CHUNK_BYTES = 8 * 1024 * 1024
/** What an object takes in a compressed index: 32 bytes of its id, which nothing compresses, and some of its place. */
const INDEXED_BYTES = 42
// Sizes of files are what somebody else says.
const MOST_RESERVED = 1 << 22

/** A repository's config. */
export interface RepositoryConfig {
  readonly version: 1 | 2
  readonly id: string
  readonly chunker_polynomial: string
}

/** There is no repository where one was expected. */
export class RepositoryMissingError extends LsyncError {
  constructor(location: string) {
    super('REPOSITORY_MISSING', `there is no repository in ${location}`, {
      hint: 'make one with `lsync snapshot init`',
    })
  }
}

/** A repository was to be made where one is. */
export class RepositoryExistsError extends LsyncError {
  constructor(location: string) {
    super('REPOSITORY_EXISTS', `there is a repository in ${location} already`, { hint: 'name another place' })
  }
}

/** The repository is of a form that this program does not know. */
export class RepositoryUnsupportedError extends LsyncError {
  constructor(location: string, why: string) {
    super('REPOSITORY_UNSUPPORTED', `the repository in ${location} cannot be used: ${why}`, {
      hint: 'use a newer lsync, or restic',
    })
  }
}

/** A file of the repository is not what was written. */
export class FileDamagedError extends LsyncError {
  constructor(file: FileRef, why: string) {
    super('REPOSITORY_FILE_DAMAGED', `${describeFile(file)} is damaged: ${why}`, {
      path: pathOf(file),
      hint: 'see `lsync snapshot check`',
    })
  }
}

/** An object that something refers to is in no index. */
export class ObjectMissingError extends LsyncError {
  constructor(kind: ObjectKind, id: ObjectId) {
    super('OBJECT_MISSING', `${kind === 'tree' ? 'a directory' : 'a piece of a file'} (${id.slice(0, 8)}) is missing`, {
      path: id,
      hint: '`lsync snapshot repair index` finds it again if it is in a pack',
    })
  }
}

/** An object is not what its id says. */
export class ObjectDamagedError extends LsyncError {
  constructor(location: Location, why: string) {
    const what = location.kind === 'tree' ? 'a directory' : 'a piece of a file'
    super(
      'OBJECT_DAMAGED',
      `${what} (${location.id.slice(0, 8)}) in pack ${location.packId.slice(0, 8)} is damaged: ${why}`,
      { path: location.id, hint: 'see `lsync snapshot check --read-data`' },
    )
  }
}

export interface OpenOptions {
  readonly password: string
  /** Where this machine keeps what it has read of any repository that is not on it. Absent: nowhere. */
  readonly cacheDirectory?: string | undefined
  /** What the repository is opened for: threads for it start while the key is derived. */
  readonly threads?: { readonly for: ThreadUse; readonly width?: number | undefined } | undefined
  readonly signal?: AbortSignal | undefined
}

export interface InitOptions extends OpenOptions {
  /** 1 only for old readers: nothing is compressed in it. */
  readonly version?: 1 | 2
  /** Cuts content as another repository does, so that both share chunks when one is copied. */
  readonly polynomial?: Polynomial
  /** For machines where the default is too much, or where there is no password worth guessing. */
  readonly passwordCost?: PasswordCost
}

/** An open repository: files and objects in the clear. */
export class Repository {
  readonly backend: Backend
  readonly config: RepositoryConfig
  readonly key: CipherKey
  readonly keyId: ObjectId
  readonly engine: Engine
  readonly threads: PreparedThreads
  #table = new ObjectTable()
  readonly #loadedIndexes = new Set<ObjectId>()
  /** Packs of our latest index, whose places are not in the table yet. */
  #unplaced: readonly { readonly id: ObjectId; readonly header: Buffer }[] = []

  private constructor(
    backend: Backend,
    key: CipherKey,
    keyId: ObjectId,
    config: RepositoryConfig,
    threads = new PreparedThreads(),
  ) {
    this.backend = backend
    this.key = key
    this.keyId = keyId
    this.config = config
    this.engine = createEngine(key)
    this.threads = threads
  }

  /**
   * Makes a repository. The config is written last: before it is there, there is no repository.
   * @throws {RepositoryExistsError}
   */
  static async init(backend: Backend, options: InitOptions): Promise<Repository> {
    const { password, signal, version = 2 } = options
    if ((await backend.stat(CONFIG, { signal })) !== undefined) throw new RepositoryExistsError(backend.location)
    await backend.create({ signal })
    const master = newMasterKey()
    const keyId = await writeKey(backend, master, password, { signal }, options.passwordCost)
    const polynomial = options.polynomial ?? randomPolynomial()
    const config = { version, id: randomBytes(32).toString('hex'), chunker_polynomial: polynomialText(polynomial) }
    const repository = new Repository(backend, master, keyId, config)
    const sealed = sealBytes(repository.engine, Buffer.from(JSON.stringify(config)))
    if (!(await backend.put(CONFIG, sealed, { signal, exclusive: true }))) {
      await backend.delete({ kind: 'key', name: keyId })
      throw new RepositoryExistsError(backend.location)
    }
    return repository
  }

  /**
   * Opens a repository.
   * @throws {RepositoryMissingError} {PasswordWrongError} {KeyInvalidError} {RepositoryUnsupportedError}
   */
  static async open(backend: Backend, options: OpenOptions): Promise<Repository> {
    const { signal } = options
    if ((await backend.stat(CONFIG, { signal })) === undefined) throw new RepositoryMissingError(backend.location)
    const threads = new PreparedThreads(options.threads?.for, options.threads?.width)
    try {
      return await Repository.#openWith(backend, options, threads)
    } catch (error) {
      await threads.close()
      throw error
    }
  }

  static async #openWith(
    backend: Backend,
    { password, signal, cacheDirectory }: OpenOptions,
    threads: PreparedThreads,
  ): Promise<Repository> {
    const { keyId, master } = await openMasterKey(backend, password, { signal })
    const engine = createEngine(master)
    const plain = openBytes(engine, await backend.get(CONFIG, undefined, { signal }))
    engine.close()
    if (plain === undefined) throw new FileDamagedError(CONFIG, 'its MAC is wrong')
    const config = parseConfig(plain, backend.location)
    const isCached = cacheDirectory !== undefined && backend.directory === undefined && isId(config.id)
    const used = isCached ? new CachingBackend(backend, { directory: `${cacheDirectory}/${config.id}` }) : backend
    return new Repository(used, master, keyId, config, threads)
  }

  /** Where every object lies that an index names, as far as indexes were read. */
  get table(): ObjectTable {
    this.#place()
    return this.#table
  }

  /** Forgets what indexes said, after packs were moved or removed. */
  resetIndex(): void {
    this.#table = new ObjectTable()
    this.#unplaced = []
    this.#loadedIndexes.clear()
  }

  /** Where content is cut. */
  get polynomial(): Polynomial {
    return parsePolynomial(this.config.chunker_polynomial)
  }

  /** Whether objects and files are compressed. */
  get compresses(): boolean {
    return this.config.version >= 2
  }

  /** Gives memory of keys back, and ends threads that were prepared for nothing. The backend stays open. */
  close(): void {
    this.engine.close()
    void this.threads.close()
  }

  /**
   * The JSON of a file of the kinds index, snapshot, lock.
   * @throws {FileMissingError} {FileDamagedError}
   */
  async readFile(kind: FileKind, name: ObjectId, signal?: AbortSignal): Promise<Buffer> {
    const file = { kind, name }
    const sealed = await this.backend.get(file, undefined, { signal })
    if (hashOf(sealed) !== name) throw new FileDamagedError(file, 'its content is not what its name says')
    const plain = openBytes(this.engine, sealed)
    if (plain === undefined) throw new FileDamagedError(file, 'its MAC is wrong')
    const first = plain[0]
    if (first === 0x5b || first === 0x7b) return plain
    if (first !== COMPRESSED_JSON) throw new FileDamagedError(file, 'its encoding is unknown')
    try {
      // Memory for the result is taken in pieces of `chunkSize`: small ones cost an index three times as much.
      const chunkSize = chunkSizeFor(plain.length * EXPECTED_RATIO)
      return await decompress(plain.subarray(1), { maxOutputLength: MAX_JSON_BYTES, chunkSize })
    } catch {
      throw new FileDamagedError(file, 'it is no zstd frame, or an absurdly large one')
    }
  }

  /** Writes a file of JSON, durable when it resolves. Returns its id. */
  async writeFile(kind: FileKind, json: Buffer, signal?: AbortSignal): Promise<ObjectId> {
    const plain = this.compresses
      ? Buffer.concat([Buffer.of(COMPRESSED_JSON), await compress(json, { chunkSize: chunkSizeFor(json.length) })])
      : json
    const sealed = sealBytes(this.engine, plain)
    const name = hashOf(sealed)
    await this.backend.put({ kind, name }, sealed, { signal })
    return name
  }

  /** The ids of all files of a kind. */
  async listIds(kind: FileKind, signal?: AbortSignal): Promise<ObjectId[]> {
    const ids: ObjectId[] = []
    for await (const { name } of this.backend.list(kind, { signal })) ids.push(name)
    return ids.sort()
  }

  /** One index file. @throws {FileDamagedError} {IndexInvalidError} */
  async readIndex(id: ObjectId, signal?: AbortSignal): Promise<IndexedPack[]> {
    return decodeIndex(id, await this.readFile('index', id, signal))
  }

  /**
   * Reads all index files that were not read yet into `table`. Snapshots that one means to read are listed before. Where
   * one is gone that was read, somebody has pruned meanwhile: all are read anew.
   */
  async loadIndex(signal?: AbortSignal): Promise<void> {
    const listed = new Map<ObjectId, number>()
    for await (const { name, sizeBytes } of this.backend.list('index', { signal })) listed.set(name, sizeBytes)
    if ([...this.#loadedIndexes].some((id) => !listed.has(id))) this.resetIndex()
    const ids = [...listed.keys()].filter((id) => !this.#loadedIndexes.has(id)).sort()
    const totalBytes = ids.reduce((sum, id) => sum + (listed.get(id) ?? 0), 0)
    if (this.#loadedIndexes.size === 0) this.table.reserve(Math.min(totalBytes / INDEXED_BYTES, MOST_RESERVED))
    await eachOf(ids, this.backend.concurrency, async (id) => {
      const content = await this.readFile('index', id, signal)
      const rows = scanIndex(content)
      if (rows === undefined) this.addPacks(decodeIndex(id, content))
      else this.table.addRows(rows)
      this.#loadedIndexes.add(id)
    })
  }

  /** Makes objects of packs known. */
  addPacks(packs: readonly IndexedPack[]): void {
    for (const { id, objects } of packs) {
      const number = this.table.addPack(id)
      for (const object of objects) this.table.add(number, object)
    }
  }

  /** Makes the objects of packs known that an index file of ours names, by their plain headers. */
  addIndexOfHeaders(id: ObjectId, packs: readonly { readonly id: ObjectId; readonly header: Buffer }[]): void {
    this.#place()
    // Most who write do not read any more.
    this.#unplaced = packs
    this.#loadedIndexes.add(id)
  }

  #place(): void {
    if (this.#unplaced.length === 0) return
    for (const pack of this.#unplaced) this.#table.addHeader(this.#table.addPack(pack.id), pack.header)
    this.#unplaced = []
  }

  /**
   * The content of an object, checked against its id.
   * @throws {ObjectMissingError} {ObjectDamagedError} {FileMissingError}
   */
  async readObject(kind: ObjectKind, id: ObjectId, signal?: AbortSignal): Promise<Buffer> {
    const location = this.table.locate(kind, id)
    if (location === undefined) throw new ObjectMissingError(kind, id)
    const { packId, offset, length } = location
    const isForTrees = kind === 'tree'
    const sealed = await this.backend.get({ kind: 'pack', name: packId }, { offset, length }, { signal, isForTrees })
    return this.openObject(location, sealed)
  }

  /** The content of an object from its sealed bytes. @throws {ObjectDamagedError} */
  openObject(location: Location, sealed: Buffer): Buffer {
    const { id, length, uncompressedLength } = location
    if (sealed.length !== length) throw new ObjectDamagedError(location, 'its pack is too short')
    const plain = openBytes(this.engine, sealed)
    if (plain === undefined) throw new ObjectDamagedError(location, 'its MAC is wrong')
    const content = uncompressedLength === undefined ? plain : this.#decompress(location, plain, uncompressedLength)
    if (hashOf(content) !== id) throw new ObjectDamagedError(location, 'its content is not what its id says')
    return content
  }

  #decompress(location: Location, frame: Buffer, length: number): Buffer {
    const content = allocate(Math.max(1, length))
    const source = allocate(Math.max(1, frame.length))
    frame.copy(source.buffer)
    if (this.engine.decompress(source, 0, frame.length, content, 0, length) !== length) {
      throw new ObjectDamagedError(location, 'it does not decompress to its length')
    }
    return content.buffer.subarray(0, length)
  }

  /** The nodes of a directory. @throws {TreeInvalidError} and as `readObject` */
  async readTree(id: ObjectId, signal?: AbortSignal): Promise<TreeNode[]> {
    return decodeTree(await this.readObject('tree', id, signal))
  }

  /** The objects of a pack by its header. @throws {PackDamagedError} */
  async readPack(packId: ObjectId, sizeBytes: number, signal?: AbortSignal): Promise<PackedObject[]> {
    const file = { kind: 'pack', name: packId } as const
    return readPackHeader(
      packId,
      sizeBytes,
      (offset, length) => this.backend.get(file, { offset, length }, { signal }),
      (sealed) => openBytes(this.engine, sealed),
    )
  }

  /** One snapshot by its full id. */
  async readSnapshot(id: ObjectId, signal?: AbortSignal): Promise<Snapshot> {
    return decodeSnapshot(id, await this.readFile('snapshot', id, signal))
  }

  /** Stores a snapshot. Everything that it refers to is durable and indexed by now. */
  async writeSnapshot(snapshot: Omit<Snapshot, 'id'>, signal?: AbortSignal): Promise<ObjectId> {
    return this.writeFile('snapshot', encodeSnapshot(snapshot), signal)
  }

  /** The keys of the repository, oldest first. */
  async listKeys(signal?: AbortSignal): Promise<KeyInfo[]> {
    const keys: KeyInfo[] = []
    for (const id of await this.listIds('key', signal)) {
      const { created, username, hostname } = await readKeyFile(this.backend, id, { signal })
      keys.push({ id, created, username, hostname, isCurrent: id === this.keyId })
    }
    return keys.sort((left, right) => (left.created < right.created ? -1 : 1))
  }

  /** Adds a password. Returns the id of its key. */
  async addKey(password: string, signal?: AbortSignal, cost?: PasswordCost): Promise<ObjectId> {
    return writeKey(this.backend, this.key, password, { signal }, cost)
  }

  /** Removes a password's key. @throws {KeyInUseError} for the one that opened the repository */
  async removeKey(id: ObjectId, signal?: AbortSignal): Promise<boolean> {
    if (id === this.keyId) throw new KeyInUseError(id)
    return this.backend.delete({ kind: 'key', name: id }, { signal })
  }
}

/** The key that opened the repository was to be removed. */
export class KeyInUseError extends LsyncError {
  constructor(id: ObjectId) {
    super('KEY_IN_USE', `key ${id.slice(0, 8)} is the one that opened the repository`, {
      hint: 'open it with another password',
    })
  }
}

function chunkSizeFor(sizeBytes: number): number {
  return Math.max(1024, Math.min(MOST_CHUNK_BYTES, sizeBytes))
}

const CONFIG: FileRef = { kind: 'config', name: '' }

function parseConfig(plain: Buffer, location: string): RepositoryConfig {
  let raw: Partial<RepositoryConfig>
  try {
    raw = JSON.parse(plain.toString()) as Partial<RepositoryConfig>
  } catch {
    throw new FileDamagedError(CONFIG, 'it is not JSON')
  }
  const { version, id, chunker_polynomial } = raw
  if (version !== 1 && version !== 2) {
    throw new RepositoryUnsupportedError(location, `its format version is ${String(version).slice(0, 20)}`)
  }
  return { version, id: String(id ?? ''), chunker_polynomial: String(chunker_polynomial ?? '') }
}
