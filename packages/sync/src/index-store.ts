import { randomBytes } from 'node:crypto'
import { closeSync, openSync, readSync, realpathSync, statSync } from 'node:fs'
import { type ByteString, type FileHandle, LsyncError } from '@lsync/posix'
import { type Database, open, type RootDatabase } from 'lmdb'
import { MAX_BITS, PAGE_BYTES, pageRows } from './index-pages.ts'
import type { DirectoryRecord, IndexChange, NamePlace } from './model/index-change.ts'
import type { TreePath } from './model/operation.ts'
import { eachRow, findRow, pageOf, type Row, rowAt, rowBytes, rowLength, withoutRow, withRow } from './model/row.ts'
import { addMapped, removeMapped, whileMapping } from './rest.ts'

/** The index is of a version that this lsync does not know. */
export class IndexVersionError extends LsyncError {
  constructor(path: string, version: unknown) {
    super('INDEX_VERSION', `the index ${path} has version ${String(version)}`, {
      path,
      hint: 'use the lsync that made it, or remove the directory: the next sync then compares the whole tree',
    })
  }
}

/** The index is no index any more. */
export class IndexDamagedError extends LsyncError {
  constructor(path: string) {
    super('INDEX_DAMAGED', `the index ${path} is damaged`, {
      path,
      hint: 'check the disk, and remove that directory: then the next sync with --adopt sends what differs at the target',
    })
  }
}

/** The id of the root directory. Its own row is the only one of directory 0, under the empty name. */
export const ROOT_ID = 1

interface IndexMeta {
  readonly version: 1
  /** Names this index to targets. */
  readonly root: string
  readonly sequence: number
  readonly nextDirectory: number
  readonly nextBlocks: number
  /** What the upper's root directory is, so that another one under its path is noticed. */
  readonly upper: string
}

/** How long the calling thread may be kept busy at a time. */
const TURN_MS = 5
const META_KEY = Buffer.from('meta')
const EMPTY = Buffer.alloc(0)

// LMDB maps its file and believes it: what is no database ends the process. Its two meta pages say which page is the root;
// 0 pages stand before a file has any.
function assertDatabase(path: string): void {
  const file = `${path}/data.mdb`
  const sizeBytes = statSync(file, { throwIfNoEntry: false })?.size ?? 0
  if (sizeBytes === 0) return
  const bytes = Buffer.alloc(2 * MOST_PAGE_BYTES)
  const fd = openSync(file, 'r')
  try {
    readSync(fd, bytes, 0, bytes.length, 0)
  } finally {
    closeSync(fd)
  }
  const pageBytes = bytes.readUInt32LE(LMDB_PAGE_BYTES_AT)
  const isPage = pageBytes >= 512 && pageBytes <= MOST_PAGE_BYTES
  const isMeta = (at: number) => {
    const root = bytes.readBigInt64LE(at + LMDB_ROOT_AT)
    return bytes.readUInt32LE(at + LMDB_MAGIC_AT) === LMDB_MAGIC && root * BigInt(pageBytes) < BigInt(sizeBytes)
  }
  if (!isPage || sizeBytes < 2 * pageBytes || !isMeta(0) || !isMeta(pageBytes)) throw new IndexDamagedError(path)
}

// struct MDB_meta of lmdb 0.9.90, behind a page header of 24 bytes.
const LMDB_MAGIC = 0xbeef_c0de
const LMDB_MAGIC_AT = 24
const LMDB_PAGE_BYTES_AT = 48
const LMDB_ROOT_AT = 136
const MOST_PAGE_BYTES = 65_536

/** The file of an index as the kernel names it. */
function realFileOf(path: string): string {
  return `${realpathSync.native(path, 'latin1')}/data.mdb`
}

function openTables(path: string) {
  assertDatabase(path)
  const env: RootDatabase<Buffer, Buffer> = open({
    path,
    maxDbs: 8,
    encoding: 'binary',
    keyEncoding: 'binary',
    // Grown as needed; the address space is not memory.
    mapSize: 1 << 30,
  })
  const table = (name: string): Database<Buffer, Buffer> =>
    env.openDB({ name, encoding: 'binary', keyEncoding: 'binary' })
  return {
    env,
    /** 'meta': JSON. */
    meta: table('meta'),
    /** Directory id and page number: rows. */
    pages: table('pages'),
    /** Directory id: its record. */
    directories: table('directories'),
    /** File handle: directory id. */
    handles: table('handles'),
    /** Inode identity: its names, where it has several. */
    names: table('names'),
    /** Directory id, of those that are pending. */
    pending: table('pending'),
    /** Blocks id: xxh64 of each block. */
    blocks: table('blocks'),
  }
}

type IndexTables = ReturnType<typeof openTables>

/**
 * What a target holds of an upper, by directory id and name, so that moving a directory changes one record. Reads see
 * what was committed; `commit` is one transaction, durable when it resolves.
 */
export class IndexStore {
  readonly path: string
  readonly #tables: IndexTables
  #meta: IndexMeta

  private constructor(path: string, tables: IndexTables, meta: IndexMeta) {
    this.path = path
    this.#tables = tables
    this.#meta = meta
  }

  /**
   * Opens the index of an upper, or makes an empty one; also where the one that is there is of another directory.
   * @throws {IndexVersionError} if it was made by a later lsync
   */
  static async open(path: string, upper: string): Promise<IndexStore> {
    const tables = openTables(path)
    addMapped(realFileOf(path))
    const stored = tables.meta.get(META_KEY)
    const meta = stored === undefined ? undefined : (JSON.parse(stored.toString()) as IndexMeta)
    if (meta !== undefined && meta.version !== 1) {
      await tables.env.close()
      throw new IndexVersionError(path, meta.version)
    }
    const index = new IndexStore(path, tables, meta ?? newMeta(upper))
    if (meta === undefined || meta.upper !== upper) await index.reset(upper)
    return index
  }

  /**
   * Opens an index as it is, whatever it is of.
   * @throws {IndexVersionError} if it was made by a later lsync
   */
  static async openExisting(path: string): Promise<IndexStore> {
    const tables = openTables(path)
    const stored = tables.meta.get(META_KEY)
    const meta = stored === undefined ? newMeta('') : (JSON.parse(stored.toString()) as IndexMeta)
    if (meta.version === 1) return new IndexStore(path, tables, meta)
    await tables.env.close()
    throw new IndexVersionError(path, meta.version)
  }

  /** Forgets everything: from now on this is another index, which no target knows. */
  async reset(upper: string = this.#meta.upper): Promise<void> {
    const { env, pages, directories, handles, names, pending, blocks, meta } = this.#tables
    this.#meta = newMeta(upper)
    await whileMapping(async () => {
      await env.transaction(() => {
        for (const table of [pages, directories, handles, names, pending, blocks]) void table.clearAsync()
        void meta.put(META_KEY, Buffer.from(JSON.stringify(this.#meta)))
      })
      await env.flushed
    })
  }

  /** Names this index to targets. */
  get root(): string {
    return this.#meta.root
  }

  /** The last checkpoint. */
  get sequence(): number {
    return this.#meta.sequence
  }

  /** Takes so many new directory ids; the first of them. They are used up whether or not a commit follows. */
  takeDirectoryIds(count: number): number {
    const first = this.#meta.nextDirectory
    this.#meta = { ...this.#meta, nextDirectory: first + count }
    return first
  }

  takeBlocksIds(count: number): number {
    const first = this.#meta.nextBlocks
    this.#meta = { ...this.#meta, nextBlocks: first + count }
    return first
  }

  directory(id: number): DirectoryRecord | undefined {
    const value = this.#tables.directories.get(idKey(id))
    return value === undefined ? undefined : readDirectory(id, value)
  }

  /** The path of a directory; `undefined` when it or one above it is not in the index. */
  pathOf(id: number): TreePath | undefined {
    let path = ''
    for (let at = id; at !== ROOT_ID; ) {
      const record = this.directory(at)
      if (record === undefined) return undefined
      path = path === '' ? record.name : `${record.name}/${path}`
      at = record.parent
    }
    return path as TreePath
  }

  /** The ids of the next directories after one, ascending. */
  directoriesAfter(id: number, most: number): number[] {
    const keys = this.#tables.directories.getKeys({ start: idKey(id + 1), limit: most })
    return [...keys].map((key) => (key as Buffer).readUIntBE(0, 6))
  }

  get directoryCount(): number {
    return (this.#tables.directories.getStats() as { entryCount: number }).entryCount
  }

  byHandle(handle: FileHandle): number | undefined {
    return this.#tables.handles.get(handleKeyOf(handle))?.readUIntBE(0, 6)
  }

  row(directory: number, name: ByteString): Row | undefined {
    const page = this.#page(directory, name)
    if (page === undefined) return undefined
    const at = findRow(page, name)
    return at < 0 ? undefined : rowAt(page, at)
  }

  /** All rows of a directory. */
  rows(directory: number): Row[] {
    const rows: Row[] = []
    for (const page of this.pages(directory)) eachRow(page, (_, at) => rows.push(rowAt(page, at)))
    return rows
  }

  /** The pages of a directory that are not empty. */
  pages(directory: number): Buffer[] {
    return [...this.#tables.pages.getRange(rangeOf(directory))].map(({ value }) => value)
  }

  /** The names of an inode that has several, as far as they are in the index. */
  namesOf(identity: string): NamePlace[] {
    const value = this.#tables.names.get(Buffer.from(identity, 'latin1'))
    return value === undefined ? [] : readNames(value)
  }

  /** The names of inodes that had only this one when it was carried over. Looks at every row, 0.1 s for a million. */
  async findSingle(identities: ReadonlySet<string>): Promise<NamePlace[]> {
    const found: NamePlace[] = []
    const inos = new Set([...identities].map((identity) => Buffer.from(identity, 'latin1').readUInt32LE(0)))
    let turnEndsAt = performance.now() + TURN_MS
    for (const { key, value } of this.#tables.pages.getRange({})) {
      for (let at = 0; at < value.length; at += rowLength(value[at + 14] as number)) {
        if (!inos.has(value.readUInt32LE(at + 16))) continue
        const row = rowAt(value, at)
        if (row.isDirectory || row.nlink > 1 || !identities.has(row.identity)) continue
        found.push({ directory: (key as Buffer).readUIntBE(0, 6), name: row.name })
      }
      if (performance.now() < turnEndsAt) continue
      await new Promise(setImmediate)
      turnEndsAt = performance.now() + TURN_MS
    }
    return found
  }

  blocks(id: number): Buffer | undefined {
    return this.#tables.blocks.get(idKey(id))
  }

  /** The directories whose content is to be carried over anew. */
  pending(): number[] {
    return [...this.#tables.pending.getKeys({})].map((key) => (key as Buffer).readUIntBE(0, 6))
  }

  /** The directory that a path names, as far as the index knows it, and what is left of the path. */
  resolve(path: ByteString | ''): { readonly directory: number; readonly rest: readonly ByteString[] } {
    let directory = ROOT_ID
    const parts = (path === '' ? [] : path.split('/')) as ByteString[]
    for (const [depth, part] of parts.entries()) {
      const row = this.row(directory, part)
      if (row?.isDirectory !== true) return { directory, rest: parts.slice(depth) }
      directory = row.ref
    }
    return { directory, rest: [] }
  }

  /** Makes changes durable, and with them the number of the checkpoint that the target has stored before. */
  async commit(changes: readonly IndexChange[], sequence: number = this.#meta.sequence): Promise<void> {
    this.#meta = { ...this.#meta, sequence }
    const { env, meta } = this.#tables
    await whileMapping(async () => {
      await env.transaction(() => {
        for (const change of changes) this.#apply(change)
        void meta.put(META_KEY, Buffer.from(JSON.stringify(this.#meta)))
      })
      await env.flushed
    })
  }

  async close(): Promise<void> {
    removeMapped(realFileOf(this.path))
    await whileMapping(() => this.#tables.env.close())
  }

  #apply(change: IndexChange): void {
    switch (change.set) {
      case 'row':
        this.#putRow(change.directory, change.row)
        return
      case 'no row':
        this.#removeRow(change.directory, change.name)
        return
      case 'directory':
        this.#putDirectory(change.record)
        return
      case 'new directory': {
        const { id, parent, name, handle } = change
        this.#putDirectory({ id, parent, name, bits: 0, isPending: true, handle })
        return
      }
      case 'place': {
        const { id, parent, name } = change
        const record = this.directory(id)
        if (record !== undefined) this.#putDirectory({ ...record, parent, name })
        return
      }
      case 'pending': {
        const record = this.directory(change.id)
        if (record !== undefined) this.#putDirectory({ ...record, isPending: change.isPending })
        return
      }
      case 'no directory':
        this.#removeDirectory(change.id)
        return
      case 'pages':
        this.#replaceRows(change.directory, change.pages, change.keepsOthers)
        return
      case 'blocks':
        void this.#tables.blocks.put(idKey(change.id), toBuffer(change.hashes))
        return
      case 'no blocks':
        void this.#tables.blocks.remove(idKey(change.id))
        return
    }
  }

  #page(directory: number, name: ByteString): Buffer | undefined {
    const bits = directory === 0 ? 0 : this.directory(directory)?.bits
    return bits === undefined ? undefined : this.#tables.pages.get(pageKey(directory, pageOf(name, bits)))
  }

  #putRow(directory: number, row: Row): void {
    const bits = directory === 0 ? 0 : (this.directory(directory)?.bits ?? 0)
    const key = pageKey(directory, pageOf(row.name, bits))
    const page = this.#tables.pages.get(key) ?? EMPTY
    const at = findRow(page, row.name)
    if (at >= 0) this.#forget(directory, rowAt(page, at), row)
    if (hasLinks(row)) this.#addName(row.identity, { directory, name: row.name })
    const next = withRow(page, row)
    void this.#tables.pages.put(key, next)
    if (next.length > PAGE_BYTES && bits < MAX_BITS) this.#split(directory, bits)
  }

  #removeRow(directory: number, name: ByteString): void {
    const bits = directory === 0 ? 0 : (this.directory(directory)?.bits ?? 0)
    const key = pageKey(directory, pageOf(name, bits))
    const page = this.#tables.pages.get(key)
    if (page === undefined) return
    const at = findRow(page, name)
    if (at < 0) return
    this.#forget(directory, rowAt(page, at), undefined)
    const next = withoutRow(page, name)
    if (next.length === 0) void this.#tables.pages.remove(key)
    else void this.#tables.pages.put(key, next)
  }

  // What other tables know of a row that goes, or that another one takes the place of.
  #forget(directory: number, old: Row, next: Row | undefined): void {
    if (hasLinks(old) && !(next !== undefined && hasLinks(next) && next.identity === old.identity)) {
      this.#removeName(old.identity, { directory, name: old.name })
    }
  }

  #split(directory: number, bits: number): void {
    const record = this.directory(directory)
    if (record === undefined) return
    const pages = this.pages(directory)
    this.#putPages(directory, pageRows(pages, bits + 2))
  }

  #replaceRows(directory: number, pages: readonly Uint8Array[], keepsOthers: boolean): void {
    const old = this.rows(directory)
    if (old.length === 0) {
      this.#putPages(directory, pages)
      return
    }
    const rows = new Map<ByteString, Row>()
    for (const page of pages) eachRow(toBuffer(page), (name, at) => rows.set(name, rowAt(toBuffer(page), at)))
    for (const row of old) {
      const next = rows.get(row.name)
      if (next === undefined && keepsOthers) rows.set(row.name, row)
      else {
        this.#forget(directory, row, next)
        if (row.isDirectory && row.ref !== next?.ref && this.directory(row.ref)?.parent === directory) {
          this.#removeDirectory(row.ref)
        }
      }
    }
    this.#putPages(directory, pageRows([Buffer.concat([...rows.values()].map(rowBytes))]))
  }

  #putPages(directory: number, pages: readonly Uint8Array[]): void {
    const record = this.directory(directory)
    if (record === undefined) throw new Error(`directory ${directory} has rows and no record`)
    this.#removePages(directory)
    for (const [number, page] of pages.entries()) {
      if (page.length > 0) void this.#tables.pages.put(pageKey(directory, number), toBuffer(page))
    }
    const bits = Math.round(Math.log2(Math.max(1, pages.length)))
    if (bits !== record.bits) this.#putDirectory({ ...record, bits })
  }

  #removePages(directory: number): void {
    for (const key of [...this.#tables.pages.getKeys(rangeOf(directory))]) void this.#tables.pages.remove(key)
  }

  #putDirectory(record: DirectoryRecord): void {
    const key = idKey(record.id)
    const old = this.#tables.directories.get(key)
    if (old !== undefined) this.#forgetHandle(readDirectory(record.id, old), record.handle)
    void this.#tables.directories.put(key, writeDirectory(record))
    if (record.handle !== undefined) void this.#tables.handles.put(handleKeyOf(record.handle), key)
    if (record.isPending) void this.#tables.pending.put(key, EMPTY)
    else void this.#tables.pending.remove(key)
  }

  #forgetHandle({ id, handle }: DirectoryRecord, next: FileHandle | undefined): void {
    if (handle === undefined) return
    const key = handleKeyOf(handle)
    if (next !== undefined && handleKeyOf(next).equals(key)) return
    if (this.#tables.handles.get(key)?.readUIntBE(0, 6) === id) void this.#tables.handles.remove(key)
  }

  #removeDirectory(id: number): void {
    for (const queue = [id]; queue.length > 0; ) {
      const next = queue.pop() as number
      const record = this.directory(next)
      if (record === undefined) continue
      for (const row of this.rows(next)) {
        if (row.isDirectory) {
          // One that was moved away meanwhile is somewhere else now.
          if (this.directory(row.ref)?.parent === next) queue.push(row.ref)
          continue
        }
        this.#forget(next, row, undefined)
        if (row.isFile && row.ref !== 0 && row.nlink === 1) void this.#tables.blocks.remove(idKey(row.ref))
      }
      this.#removePages(next)
      this.#forgetHandle(record, undefined)
      void this.#tables.directories.remove(idKey(next))
      void this.#tables.pending.remove(idKey(next))
    }
  }

  #addName(identity: string, name: NamePlace): void {
    const names = this.namesOf(identity)
    if (names.some((other) => other.directory === name.directory && other.name === name.name)) return
    void this.#tables.names.put(Buffer.from(identity, 'latin1'), writeNames([...names, name]))
  }

  #removeName(identity: string, name: NamePlace): void {
    const names = this.namesOf(identity).filter(
      (other) => other.directory !== name.directory || other.name !== name.name,
    )
    const key = Buffer.from(identity, 'latin1')
    if (names.length === 0) void this.#tables.names.remove(key)
    else void this.#tables.names.put(key, writeNames(names))
  }
}

/** Whether a row's inode has several names that belong together. */
export function hasLinks(row: Row): boolean {
  return row.nlink > 1 && !row.isDirectory && !row.isWhiteout
}

function newMeta(upper: string): IndexMeta {
  const root = randomBytes(16).toString('hex')
  return { version: 1, root, sequence: 0, nextDirectory: ROOT_ID + 1, nextBlocks: 1, upper }
}

function idKey(id: number): Buffer {
  const key = Buffer.allocUnsafe(6)
  key.writeUIntBE(id, 0, 6)
  return key
}

function pageKey(directory: number, page: number): Buffer {
  const key = Buffer.allocUnsafe(8)
  key.writeUIntBE(directory, 0, 6)
  key.writeUInt16BE(page, 6)
  return key
}

function rangeOf(directory: number) {
  return { start: pageKey(directory, 0), end: pageKey(directory + 1, 0) }
}

function toBuffer(bytes: Uint8Array): Buffer {
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

function handleKeyOf({ type, bytes }: FileHandle): Buffer {
  const key = Buffer.allocUnsafe(4 + bytes.length)
  key.writeInt32LE(type, 0)
  Buffer.from(bytes).copy(key, 4)
  return key
}

function writeDirectory({ parent, name, bits, isPending, handle }: DirectoryRecord): Buffer {
  const handleKey = handle === undefined ? EMPTY : handleKeyOf(handle)
  const bytes = Buffer.allocUnsafe(9 + handleKey.length + name.length)
  bytes.writeUIntLE(parent, 0, 6)
  bytes[6] = bits
  bytes[7] = isPending ? 1 : 0
  bytes[8] = handleKey.length
  handleKey.copy(bytes, 9)
  bytes.write(name, 9 + handleKey.length, 'latin1')
  return bytes
}

function readDirectory(id: number, bytes: Buffer): DirectoryRecord {
  const handleEnd = 9 + (bytes[8] as number)
  return {
    id,
    parent: bytes.readUIntLE(0, 6),
    bits: bytes[6] as number,
    isPending: bytes[7] === 1,
    handle:
      handleEnd === 9 ? undefined : { type: bytes.readInt32LE(9), bytes: Buffer.from(bytes.subarray(13, handleEnd)) },
    name: bytes.toString('latin1', handleEnd) as ByteString,
  }
}

function writeNames(names: readonly NamePlace[]): Buffer {
  return Buffer.concat(
    names.map(({ directory, name }) => {
      const bytes = Buffer.allocUnsafe(7 + name.length)
      bytes.writeUIntLE(directory, 0, 6)
      bytes[6] = name.length
      bytes.write(name, 7, 'latin1')
      return bytes
    }),
  )
}

function readNames(bytes: Buffer): NamePlace[] {
  const names: NamePlace[] = []
  for (let at = 0; at < bytes.length; ) {
    const end = at + 7 + (bytes[at + 6] as number)
    names.push({ directory: bytes.readUIntLE(at, 6), name: bytes.toString('latin1', at + 7, end) as ByteString })
    at = end
  }
  return names
}
