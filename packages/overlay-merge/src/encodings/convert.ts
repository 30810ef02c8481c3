import { createHash } from 'node:crypto'
import { createReadStream, realpathSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { Readable, type Writable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import {
  type ByteString,
  close,
  errnoOf,
  fsync,
  type HostPath,
  hostPath,
  LsyncError,
  makeDirectory,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_RDONLY,
  openBeneath,
  openRoot,
  PosixError,
  printable,
  RENAME_NOREPLACE,
  randomHex,
  readDirents,
  seesTrustedXattrs,
  statFd,
  syncFileSystem,
  tryRename,
  tryStatAt,
  writeAt,
} from '@lsync/posix'
import { removeTree } from '../effects.ts'
import type { Meta } from '../model/entry.ts'
import { isMark, MARKS, type Namespace } from '../model/marks.ts'
import type { EntryPath } from '../model/path.ts'
import { OutputExistsError, PrivilegeMissingError } from '../problems.ts'
import { aufsTreeForm, readAufsTree } from './aufs.ts'
import { ReaderGoneError } from './chunk-queue.ts'
import { type Compression, compress } from './compression.ts'
import { openDirectory, openNew, readMeta } from './inode.ts'
import { type ItemOrder, type LayerItem, type Loss, translateItem } from './item.ts'
import { kernelTreeForm, readKernelLayer } from './kernel.ts'
import { plainTreeForm, readPlainTree } from './plain.ts'
import { applyPolicy, type EntryPolicy } from './policy.ts'
import { PortableSink, readPortableLayer } from './portable.ts'
import { DirectorySpool } from './spool.ts'
import { readTarLayer, TarSink } from './tar.ts'
import type { TarLimits } from './tar-members.ts'
import { type LayerSink, reportInodeFlags, type TreeForm, TreeSink } from './tree-sink.ts'

/**
 * How a layer is stored.
 * - `kernel-trusted`, `kernel-user`: a directory as overlayfs has it, device whiteouts. Both whiteouts are read
 * - `xattr-whiteouts`: the same with whiteouts as attributes, for lowers where no device can be made
 * - `aufs`: a directory with `.wh.` files. `fuse-overlayfs`: the upper of one; read only
 * - `plain`: a directory without any marks
 * - `tar`: the tar of a kernel layer as it is. `plain-tar`: the tar of a plain tree (docker export)
 * - `oci`: a layer of a container image
 * - `portable`: files that any store can hold, see portable.ts
 */
export type LayerForm =
  | 'kernel-trusted'
  | 'kernel-user'
  | 'xattr-whiteouts'
  | 'aufs'
  | 'fuse-overlayfs'
  | 'plain'
  | 'tar'
  | 'plain-tar'
  | 'oci'
  | 'portable'

export interface ConvertProgress {
  readonly phase: 'read' | 'write'
  readonly entries: number
  readonly bytes: number
  readonly path: ByteString
}

interface CommonOptions extends EntryPolicy {
  /** Whose marks the forms `tar` and `xattr-whiteouts` use. Default `trusted`. */
  readonly namespace?: Namespace
  readonly limits?: Partial<TarLimits>
  /** Leave out what the target cannot hold, and report it, instead of failing. */
  readonly lossy?: boolean
  /** The layers beneath, top first: directories that an archive only implies take their metadata from there. */
  readonly beneath?: readonly HostPath[]
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: ConvertProgress) => void
  /** Wait until the result is on stable storage. Default true. */
  readonly durable?: boolean
}

interface ArchiveOptions {
  /** Archives only. Default `none`. */
  readonly compression?: Compression
  readonly level?: number
  /** Write files with holes as sparse files, which not every reader of images understands. */
  readonly sparse?: boolean
}

/** A layer that comes item by item from whoever has it. */
export interface LayerReader {
  /**
   * Each directory before its content, and its whiteouts before the rest. Attributes are escaped as `fromForm` has them.
   * `spool` is a place for data, on the volume of the result if it is a directory; what is put there may be taken.
   */
  readItems(spool: DirectorySpool): AsyncIterable<LayerItem>
}

export interface ConvertRequest extends CommonOptions, ArchiveOptions {
  /** A directory, an archive, the bytes of an archive, or what has the items. */
  readonly from: HostPath | AsyncIterable<Uint8Array> | LayerReader
  readonly fromForm: LayerForm
  /** Must not exist, or be an empty directory. */
  readonly to: HostPath | Writable
  readonly toForm: LayerForm
}

export interface ConvertReport {
  readonly entries: number
  /** Content of files. */
  readonly bytes: number
  readonly losses: readonly Loss[]
  /** Archives: what was written, and its digests, `sha256:…` of the compressed bytes and of the tar (OCI's diff id). */
  readonly archive?: { readonly bytes: number; readonly digest: string; readonly diffId: string }
}

/** The result would lie inside the layer that is read. */
export class TargetInsideSourceError extends LsyncError {
  constructor(path: string) {
    super('TARGET_INSIDE_SOURCE', `${printable(path)} lies inside the layer that is read`, {
      path,
      hint: 'name a target outside of it',
    })
  }
}

/**
 * Turns a layer from one form into another. The result appears under its name whole or not at all: it is made beside
 * it in a hidden directory, which goes away in any case, synced, and renamed.
 * @throws {LsyncError} what the form cannot express (NOT_EXPRESSIBLE, NEEDS_DEREF), what the target cannot hold
 * (TARGET_CANNOT_HOLD), what is refused from outside (ENTRY_REFUSED, ARCHIVE_BROKEN, LIMIT_EXCEEDED), OUTPUT_EXISTS
 */
export async function convertLayer(request: ConvertRequest): Promise<ConvertReport> {
  request.signal?.throwIfAborted()
  const run = new Conversion(request)
  if (typeof request.to !== 'string') return await run.toStream(request.to)
  return await run.toPath(request.to)
}

export interface ImportRequest extends CommonOptions {
  readonly from: HostPath | AsyncIterable<Uint8Array>
  readonly form: LayerForm
  readonly to: HostPath
  /** What to make. Default: a kernel layer in `namespace`. */
  readonly toForm?: LayerForm
}

/** Makes a kernel layer (or what `toForm` says) of a layer in any form. See `convertLayer`. */
export function importLayer({ form, toForm, ...request }: ImportRequest): Promise<ConvertReport> {
  return convertLayer({ ...request, fromForm: form, toForm: toForm ?? kernelForm(request.namespace) })
}

export interface ExportRequest extends CommonOptions, ArchiveOptions {
  readonly from: HostPath | LayerReader
  readonly form: LayerForm
  /** What `from` is. Default: a kernel layer in `namespace`. */
  readonly fromForm?: LayerForm
  readonly to: HostPath | Writable
}

/** Writes a kernel layer (or what `fromForm` says) in another form, to a path or a stream. See `convertLayer`. */
export function exportLayer({ form, fromForm, ...request }: ExportRequest): Promise<ConvertReport> {
  return convertLayer({ ...request, toForm: form, fromForm: fromForm ?? kernelForm(request.namespace) })
}

function kernelForm(namespace: Namespace = 'trusted'): LayerForm {
  return namespace === 'trusted' ? 'kernel-trusted' : 'kernel-user'
}

/** Whether a form is one file. */
export function isArchiveForm(form: LayerForm): boolean {
  return form === 'tar' || form === 'plain-tar' || form === 'oci'
}

function namespaceOf(form: LayerForm, namespace: Namespace = 'trusted'): Namespace | undefined {
  if (form === 'kernel-trusted') return 'trusted'
  if (form === 'kernel-user') return 'user'
  return form === 'xattr-whiteouts' || form === 'tar' ? namespace : undefined
}

const ORDER: ItemOrder = 'whiteouts-first'
const RESULT = 'result' as ByteString
const SPOOL = 'spool' as ByteString
const TURN_MS = 50

class Conversion {
  readonly #request: ConvertRequest
  readonly #losses: Loss[] = []
  readonly #onLoss = (loss: Loss): void => {
    this.#losses.push(loss)
  }
  readonly #onBytes = (bytes: number): void => {
    this.#bytes += bytes
  }
  #entries = 0
  #bytes = 0
  #turnEnd = performance.now() + TURN_MS

  constructor(request: ConvertRequest) {
    this.#request = request
  }

  async toPath(to: HostPath): Promise<ConvertReport> {
    const { from, toForm, durable = true } = this.#request
    const slash = to.replace(/\/+$/, '').lastIndexOf('/')
    const name = to.replace(/\/+$/, '').slice(slash + 1) as ByteString
    const parent = (slash < 0 ? '.' : slash === 0 ? '/' : to.slice(0, slash)) as HostPath
    if (name === '' || name === '.' || name === '..') throw new OutputExistsError(to)
    if (typeof from === 'string') refuseInside(from, parent, to)
    const parentFd = openRoot(parent)
    try {
      checkFree(parentFd, name, to, !isArchiveForm(toForm))
      return await inScratch(parentFd, async (scratchFd) => {
        const archive = isArchiveForm(toForm)
          ? await this.#writeArchiveFile(scratchFd, durable)
          : await this.#writeTree(scratchFd, durable)
        this.#request.signal?.throwIfAborted()
        moveInPlace(scratchFd, parentFd, name, to, !isArchiveForm(toForm))
        if (durable) fsync(parentFd)
        return this.#report(archive)
      })
    } finally {
      close(parentFd)
    }
  }

  async toStream(stream: Writable): Promise<ConvertReport> {
    const { toForm, fromForm, from } = this.#request
    if (!isArchiveForm(toForm)) throw new TypeError(`the form ${toForm} is a directory, and cannot go to a stream`)
    const write = (chunks: AsyncIterable<Uint8Array>) => pipeline(Readable.from(chunks, { objectMode: false }), stream)
    if (!isArchiveForm(fromForm) && !isReader(from)) return this.#report(await this.#writeArchive(undefined, write))
    const spoolParent = openRoot(hostPath(tmpdir()))
    try {
      return await inScratch(spoolParent, async (fd) => this.#report(await this.#writeArchive(fd, write)))
    } finally {
      close(spoolParent)
    }
  }

  #report(archive: ConvertReport['archive']): ConvertReport {
    const { onProgress } = this.#request
    onProgress?.({ phase: 'write', entries: this.#entries, bytes: this.#bytes, path: '' as ByteString })
    return {
      entries: this.#entries,
      bytes: this.#bytes,
      losses: this.#losses,
      ...(archive === undefined ? {} : { archive }),
    }
  }

  async #writeTree(scratchFd: number, durable: boolean): Promise<undefined> {
    makeDirectory(scratchFd, RESULT, 0o700)
    const rootFd = openDirectory(scratchFd, RESULT)
    try {
      const sink = this.#treeSink(rootFd)
      try {
        await this.#pump(scratchFd, sink)
        await sink.finish()
      } finally {
        sink.close()
      }
      if (durable) syncFileSystem(rootFd)
    } finally {
      close(rootFd)
    }
  }

  #treeSink(rootFd: number): LayerSink {
    const { toForm, lossy = false } = this.#request
    const shared = { onLoss: this.#onLoss, onBytes: this.#onBytes }
    if (toForm === 'portable') return new PortableSink(rootFd, { onBytes: this.#onBytes })
    return new TreeSink(rootFd, { ...shared, form: this.#treeForm(), lossy })
  }

  #treeForm(): TreeForm {
    const { toForm, namespace = 'trusted' } = this.#request
    switch (toForm) {
      case 'kernel-trusted':
        return kernelTreeForm('trusted', 'device')
      case 'kernel-user':
        return kernelTreeForm('user', 'device')
      case 'xattr-whiteouts':
        return kernelTreeForm(namespace, 'xattr')
      case 'aufs':
        return aufsTreeForm()
      case 'plain':
        return plainTreeForm(this.#onLoss)
      default:
        throw new TypeError(`the form ${toForm} is not one to write`)
    }
  }

  async #writeArchiveFile(scratchFd: number, durable: boolean): Promise<ConvertReport['archive']> {
    const fd = openNew(scratchFd, RESULT)
    try {
      const archive = await this.#writeArchive(scratchFd, async (chunks) => {
        let offset = 0
        for await (const chunk of chunks) {
          writeAt(fd, offset, chunk)
          offset += chunk.length
        }
      })
      if (durable) fsync(fd)
      return archive
    } finally {
      close(fd)
    }
  }

  async #writeArchive(
    scratchFd: number | undefined,
    write: (chunks: AsyncIterable<Uint8Array>) => Promise<void>,
  ): Promise<ConvertReport['archive']> {
    const { toForm, namespace, compression = 'none', level, sparse = false } = this.#request
    const form = toForm === 'oci' ? 'oci' : (namespaceOf(toForm, namespace) ?? 'plain')
    const sink = new TarSink({ form, sparse, onLoss: this.#onLoss, onBytes: this.#onBytes })
    const inner = new Tally()
    const outer = compression === 'none' ? inner : new Tally()
    const tarred = inner.count(sink.chunks())
    const writing = write(outer === inner ? tarred : outer.count(compress(tarred, compression, level)))
    // Its failure is asked for below; until then it is nobody's.
    writing.catch(() => undefined)
    try {
      await this.#pump(scratchFd, sink)
      await sink.finish()
    } catch (error) {
      sink.fail(error)
      const failure = await writing.then(
        () => undefined,
        (cause: unknown) => cause,
      )
      throw error instanceof ReaderGoneError && failure !== undefined ? failure : error
    }
    await writing
    return { bytes: outer.bytes, digest: outer.digest(), diffId: inner.digest() }
  }

  async #pump(scratchFd: number | undefined, sink: LayerSink): Promise<void> {
    const { fromForm, toForm, namespace, signal, onProgress } = this.#request
    const fromNamespace = namespaceOf(fromForm, namespace)
    const toNamespace = namespaceOf(toForm, namespace)
    for await (const raw of this.#items(scratchFd)) {
      if (performance.now() > this.#turnEnd) {
        // System calls do not yield: without a pause no signal and no progress would come through.
        onProgress?.({ phase: 'write', entries: this.#entries, bytes: this.#bytes, path: raw.entry.path })
        await new Promise((resolve) => setImmediate(resolve))
        this.#turnEnd = performance.now() + TURN_MS
      }
      signal?.throwIfAborted()
      const item = applyPolicy(raw, this.#request, this.#onLoss)
      if (item === undefined) continue
      reportInodeFlags(item, this.#onLoss)
      const adding = sink.add(translateItem(item, fromNamespace, toNamespace))
      if (adding !== undefined) await adding
      this.#entries++
    }
  }

  async *#items(scratchFd: number | undefined): AsyncGenerator<LayerItem> {
    const { from, fromForm, namespace } = this.#request
    if (isReader(from)) {
      yield* withSpool(scratchFd, (fd) => from.readItems(new DirectorySpool(fd)))
      return
    }
    if (isArchiveForm(fromForm)) {
      yield* this.#archiveItems(scratchFd)
      return
    }
    if (typeof from !== 'string') throw new TypeError(`the form ${fromForm} is a directory, not a stream`)
    const marks = namespaceOf(fromForm, namespace)
    if (marks === 'trusted' && !seesTrustedXattrs()) throw new PrivilegeMissingError(from)
    const fd = openRoot(from)
    try {
      yield* this.#treeItems(fd, marks)
    } finally {
      close(fd)
    }
  }

  #treeItems(fd: number, marks: Namespace | undefined): Generator<LayerItem, void, undefined> {
    const { fromForm, limits } = this.#request
    const options = { order: ORDER, onLoss: this.#onLoss }
    if (marks !== undefined) return readKernelLayer(fd, { ...options, namespace: marks })
    if (fromForm === 'plain') return readPlainTree(fd, options)
    if (fromForm === 'portable') return readPortableLayer(fd, limits === undefined ? {} : { limits })
    return readAufsTree(fd, { ...options, variant: fromForm === 'fuse-overlayfs' ? 'fuse-overlayfs' : 'aufs' })
  }

  async *#archiveItems(scratchFd: number | undefined): AsyncGenerator<LayerItem> {
    const { from, fromForm, namespace, limits, signal, beneath = [], onProgress } = this.#request
    if (isReader(from)) throw new TypeError('items are no archive')
    const beneathFds = beneath.map((path) => openRoot(path))
    const opened = typeof from === 'string' ? createReadStream(Buffer.from(from, 'latin1')) : undefined
    const source = opened ?? (from as AsyncIterable<Uint8Array>)
    const losses = this.#onLoss
    let members = 0
    const onMember = (path: ByteString, bytes: number) => {
      members++
      if (onProgress === undefined || performance.now() < this.#turnEnd) return
      onProgress({ phase: 'read', entries: members, bytes, path })
      this.#turnEnd = performance.now() + TURN_MS
    }
    try {
      yield* withSpool(scratchFd, async function* (spoolFd) {
        const { index } = await readTarLayer(source, {
          form: fromForm === 'oci' ? 'oci' : (namespaceOf(fromForm, namespace) ?? 'plain'),
          spool: new DirectorySpool(spoolFd),
          onLoss: losses,
          ...(limits === undefined ? {} : { limits }),
          ...(signal === undefined ? {} : { signal }),
          ...(beneath.length === 0 ? {} : { impliedMeta: (path: EntryPath) => metaBeneath(beneathFds, path) }),
          onMember,
        })
        yield* index.items(ORDER)
      })
    } finally {
      opened?.destroy()
      for (const fd of beneathFds) close(fd)
    }
  }
}

function isReader(from: ConvertRequest['from']): from is LayerReader {
  return typeof from !== 'string' && 'readItems' in from
}

async function* withSpool(
  scratchFd: number | undefined,
  items: (spoolFd: number) => AsyncIterable<LayerItem>,
): AsyncGenerator<LayerItem> {
  if (scratchFd === undefined) throw new Error('there is no place for the data of files')
  makeDirectory(scratchFd, SPOOL, 0o700)
  const fd = openDirectory(scratchFd, SPOOL)
  try {
    yield* items(fd)
  } finally {
    close(fd)
  }
}

/** Counts and hashes what passes. */
class Tally {
  readonly #hash = createHash('sha256')
  #digest: string | undefined
  bytes = 0

  async *count(chunks: AsyncIterable<Uint8Array>): AsyncGenerator<Uint8Array> {
    for await (const chunk of chunks) {
      this.#hash.update(chunk)
      this.bytes += chunk.length
      yield chunk
    }
  }

  digest(): string {
    this.#digest ??= `sha256:${this.#hash.digest('hex')}`
    return this.#digest
  }
}

/** The metadata of a directory in the first layer that has the name. */
function metaBeneath(fds: readonly number[], path: EntryPath): Meta | undefined {
  for (const fd of fds) {
    let directory: number
    try {
      directory = openBeneath(fd, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
    } catch (error) {
      if (errnoOf(error) === 'ENOENT') continue
      return undefined
    }
    try {
      return readMeta(
        directory,
        '',
        statFd(directory),
        (name) => !isMark(name, MARKS.trusted) && !isMark(name, MARKS.user),
      )
    } finally {
      close(directory)
    }
  }
  return undefined
}

async function inScratch<T>(parentFd: number, use: (fd: number) => Promise<T>): Promise<T> {
  const name = `.lsync-layer-${randomHex(8)}` as ByteString
  makeDirectory(parentFd, name, 0o700)
  try {
    const fd = openDirectory(parentFd, name)
    try {
      return await use(fd)
    } finally {
      close(fd)
    }
  } finally {
    removeTree(parentFd, name)
  }
}

function refuseInside(from: HostPath, parent: HostPath, to: HostPath): void {
  const real = (path: HostPath) => realpathSync.native(Buffer.from(path, 'latin1'), 'latin1')
  const source = real(from)
  if (`${real(parent)}/`.startsWith(`${source}/`)) throw new TargetInsideSourceError(to)
}

function checkFree(parentFd: number, name: ByteString, to: HostPath, isTree: boolean): void {
  const stat = tryStatAt(parentFd, name)
  if (stat === undefined) return
  if (!isTree || !stat.isDirectory || !isEmptyDirectory(parentFd, name)) throw new OutputExistsError(to)
}

function isEmptyDirectory(parentFd: number, name: ByteString): boolean {
  const fd = openDirectory(parentFd, name)
  try {
    let count = 0
    readDirents(fd, () => count++)
    return count === 0
  } finally {
    close(fd)
  }
}

function moveInPlace(scratchFd: number, parentFd: number, name: ByteString, to: HostPath, isTree: boolean): void {
  let code = tryRename(scratchFd, RESULT, parentFd, name, RENAME_NOREPLACE)
  if (code === undefined) return
  // FUSE and network file systems have no such flag; and an empty directory may be replaced.
  if (code === 'EINVAL' || code === 'ENOSYS' || code === 'ENOTSUP' || code === 'EEXIST') {
    checkFree(parentFd, name, to, isTree)
    code = tryRename(scratchFd, RESULT, parentFd, name)
  }
  if (code === 'EEXIST' || code === 'ENOTEMPTY') throw new OutputExistsError(to)
  if (code !== undefined) throw new PosixError(code, { syscall: 'renameat2', path: to })
}
