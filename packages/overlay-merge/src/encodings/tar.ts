import { type ByteString, close, nextData, readAt } from '@lsync/posix'
import type { Entry, Meta } from '../model/entry.ts'
import { MARKS, type Namespace } from '../model/marks.ts'
import { type EntryPath, join, ROOT, split } from '../model/path.ts'
import { aclToText } from './acl-text.ts'
import { OPAQUE_MARKER, refuseReservedName, WHITEOUT_PREFIX } from './aufs.ts'
import { ChunkQueue } from './chunk-queue.ts'
import { decompress } from './compression.ts'
import { LayerChangedError, NeedsDerefError, NotExpressibleError } from './errors.ts'
import { ACL_ACCESS, ACL_DEFAULT } from './inode.ts'
import type { LayerItem, Loss } from './item.ts'
import { marksOf } from './kernel.ts'
import { LayerIndex, type LayerIndexOptions } from './layer-index.ts'
import { BLOCK_BYTES, encodeHeader, encodePax, formatTime, paddingOf, type UstarFields } from './tar-header.ts'
import { DEFAULT_LIMITS, readTarMembers, type Segment, type TarLimits } from './tar-members.ts'
import { type LayerSink, reportProtattr } from './tree-sink.ts'

export interface TarReadOptions extends LayerIndexOptions {
  readonly limits?: Partial<TarLimits>
  readonly signal?: AbortSignal
  /** Called for each member, with the compressed bytes read so far. */
  readonly onMember?: (name: ByteString, compressedBytes: number) => void
}

/**
 * Reads an archive, plain, gzip or zstd, into an index whose `items` are the layer. The data of files goes to the
 * spool; nothing is written under a name from the archive.
 * @throws {ArchiveBrokenError | LimitExceededError | LayerEntryRefusedError}
 */
export async function readTarLayer(
  source: AsyncIterable<Uint8Array>,
  options: TarReadOptions,
): Promise<{ index: LayerIndex; compressedBytes: number }> {
  let compressedBytes = 0
  const counted = (async function* () {
    for await (const chunk of untilAborted(source, options.signal)) {
      compressedBytes += chunk.length
      yield chunk
    }
  })()
  const limits = { ...DEFAULT_LIMITS, ...options.limits }
  const index = new LayerIndex(options)
  try {
    const { chunks } = await decompress(counted)
    for await (const { member, body } of readTarMembers(chunks, limits, () => compressedBytes)) {
      options.signal?.throwIfAborted()
      await index.add(member, body)
      options.onMember?.(member.name, compressedBytes)
    }
  } finally {
    // Lets the source go after a failure. Not awaited: a source that hangs would make the failure hang too.
    counted.return(undefined).catch(() => undefined)
  }
  return { index, compressedBytes }
}

/** The chunks, until the signal comes, also while none does. */
async function* untilAborted(source: AsyncIterable<Uint8Array>, signal?: AbortSignal): AsyncGenerator<Uint8Array> {
  if (signal === undefined) {
    yield* source
    return
  }
  const iterator = source[Symbol.asyncIterator]()
  let giveUp: (reason: unknown) => void = () => undefined
  const stop = () => giveUp(signal.reason)
  signal.addEventListener('abort', stop)
  try {
    for (;;) {
      signal.throwIfAborted()
      // A promise of its own for each chunk: one that all of them race against would hold them to the end of the archive.
      const next = await new Promise<IteratorResult<Uint8Array>>((resolve, reject) => {
        giveUp = reject
        iterator.next().then(resolve, reject)
      })
      if (next.done === true) return
      yield next.value
    }
  } finally {
    signal.removeEventListener('abort', stop)
    iterator.return?.().catch(() => undefined)
  }
}

export interface TarSinkOptions {
  /** `oci`: whiteouts as `.wh.` files. A namespace: a raw layer, device whiteouts and marks as attributes. */
  readonly form: 'oci' | Namespace | 'plain'
  /** Write files with holes as GNU sparse files (pax 1.0), which GNU tar, bsdtar and lsync read. Else holes are zeros. */
  readonly sparse?: boolean
  readonly onLoss?: (loss: Loss) => void
  readonly onBytes?: (bytes: number) => void
}

/** What tar cannot tell apart from the file's own name, so that archives are the same on every run. */
const MARKER_META: Meta = { mode: 0, uid: 0, gid: 0, atimeNs: 0n, mtimeNs: 0n, xattrs: [] }
const CHUNK_BYTES = 256 * 1024
// What the octal fields of a header hold; beyond, and for fractions and bytes, there is pax.
const MAX_ID = 0o7_777_777
const MAX_SECONDS = 0x7fff_ffff

/**
 * Writes a layer as a tar archive in pax format. Reproducible: the same items give the same bytes; access times,
 * user names and inode numbers are not written. Items come with whiteouts first, as the OCI specification wants.
 * Not by tar-stream: it takes all text for UTF-8, a mode of 0 for 0644, and cuts owners beyond 262143.
 * @throws {NotExpressibleError | NeedsDerefError | LayerChangedError}
 */
export class TarSink implements LayerSink {
  readonly #options: TarSinkOptions
  readonly #queue = new ChunkQueue()
  readonly #links = new Map<string, EntryPath>()
  readonly #label: string

  constructor(options: TarSinkOptions) {
    this.#options = options
    this.#label = options.form === 'oci' ? 'an OCI layer' : 'a tar archive'
  }

  /** The archive. Must be read while items are added, or `add` waits. */
  chunks(): AsyncIterable<Uint8Array> {
    return this.#queue.chunks()
  }

  async add(item: LayerItem): Promise<void> {
    const { entry } = item
    const { form, onLoss } = this.#options
    if (entry.kind === 'whiteout') return this.#addWhiteout(entry.path)
    this.#check(entry)
    if (entry.kind === 'special' && entry.type === 'socket') {
      onLoss?.({ path: entry.path, what: 'a socket' })
      return
    }
    if (item.protattr !== undefined && (form === 'oci' || form === 'plain')) reportProtattr(item, this.#options)
    if (entry.kind !== 'directory' && entry.linkGroup !== undefined) {
      const first = this.#links.get(entry.linkGroup)
      if (first !== undefined) return this.#put(entry.path, '1', entry.meta, { linkName: first, withoutXattrs: true })
      this.#links.set(entry.linkGroup, entry.path)
    }
    const meta = this.#metaOf(item)
    switch (entry.kind) {
      case 'directory':
        await this.#put(entry.path, '5', meta)
        if (form === 'oci' && entry.opaque && entry.path !== ROOT) {
          await this.#put(join(entry.path, OPAQUE_MARKER), '0', MARKER_META)
        }
        return
      case 'symlink':
        return this.#put(entry.path, '2', meta, { linkName: entry.target })
      case 'special':
        return this.#put(entry.path, entry.type === 'fifo' ? '6' : entry.type === 'block' ? '4' : '3', meta, {
          rdev: entry.rdev,
        })
      case 'file':
        return this.#addFile(item, entry, meta)
    }
  }

  async finish(): Promise<void> {
    await this.#queue.push(Buffer.alloc(2 * BLOCK_BYTES))
    this.#queue.end()
  }

  close(): void {
    this.#queue.end()
  }

  /** Ends the archive with an error, which its reader gets. */
  fail(error: unknown): void {
    this.#queue.fail(error)
  }

  #check(entry: Entry): void {
    const { form } = this.#options
    if (form === 'oci') refuseReservedName(entry.path, split(entry.path).name, this.#label)
    if (form === 'oci' || form === 'plain') {
      if (entry.kind === 'directory' && entry.redirect !== undefined && !entry.opaque) {
        throw new NeedsDerefError(entry.path, this.#label, 'redirect')
      }
      if (entry.kind === 'file' && entry.metacopy !== undefined) {
        throw new NeedsDerefError(entry.path, this.#label, 'metacopy')
      }
    }
    if (form === 'plain' && entry.kind === 'directory' && entry.opaque) {
      this.#options.onLoss?.({ path: entry.path, what: 'opaque mark' })
    }
    if (form !== 'trusted' && form !== 'user' && entry.kind === 'special') {
      if (entry.type === 'character' && entry.rdev === 0) {
        throw new NotExpressibleError(entry.path, this.#label, 'a character device 0:0', 'remove it')
      }
    }
  }

  async #addWhiteout(path: EntryPath): Promise<void> {
    const { form } = this.#options
    if (form === 'plain') {
      const hint = 'merge the layer with what lies below it, or choose another form'
      throw new NotExpressibleError(path, this.#label, 'a whiteout', hint)
    }
    if (form !== 'oci') return this.#put(path, '3', MARKER_META, { rdev: 0 })
    const { parent, name } = split(path)
    return this.#put(join(parent, `${WHITEOUT_PREFIX}${name}` as ByteString), '0', MARKER_META)
  }

  #metaOf(item: LayerItem): Meta {
    const { entry } = item
    if (entry.kind === 'whiteout') return MARKER_META
    const { form, onLoss } = this.#options
    const { meta } = entry
    if (form === 'trusted' || form === 'user') {
      return { ...meta, xattrs: [...meta.xattrs, ...marksOf(item, MARKS[form])] }
    }
    if (form !== 'oci') return meta
    // An importer would store these as they are, and they would come alive.
    const xattrs = meta.xattrs.filter(({ name }) => !/^(trusted|user)\.overlay\./.test(name))
    if (xattrs.length === meta.xattrs.length) return meta
    for (const { name } of meta.xattrs) {
      if (/^(trusted|user)\.overlay\./.test(name)) onLoss?.({ path: entry.path, what: `attribute ${name}` })
    }
    return { ...meta, xattrs }
  }

  async #addFile(item: LayerItem, entry: Entry & { kind: 'file' }, meta: Meta): Promise<void> {
    const { path, sizeBytes } = entry
    if (item.openContent === undefined) {
      // A metacopy of a raw layer: one hole, which is written as a hole or it would cost its size.
      await this.#putFile(path, meta, sizeBytes, sizeBytes === 0 ? undefined : [], undefined)
      return
    }
    const { fd, stat } = item.openContent()
    try {
      if (stat.sizeBytes !== sizeBytes) throw new LayerChangedError(path)
      const mayBeSparse = this.#options.sparse === true && stat.blocks * 512 < sizeBytes
      const segments = mayBeSparse ? segmentsOf(fd, sizeBytes) : undefined
      await this.#putFile(path, meta, sizeBytes, segments, fd)
    } finally {
      close(fd)
    }
  }

  async #putFile(
    path: EntryPath,
    meta: Meta,
    sizeBytes: number,
    segments: readonly Segment[] | undefined,
    fd: number | undefined,
  ): Promise<void> {
    if (segments === undefined) {
      await this.#put(path, '0', meta, { sizeBytes, body: () => readPieces(fd, [{ offset: 0, sizeBytes }], path) })
      return
    }
    const map = sparseMap(segments, sizeBytes)
    const dataBytes = segments.reduce((sum, segment) => sum + segment.sizeBytes, 0)
    await this.#put(path, '0', meta, {
      sizeBytes: map.length + dataBytes,
      realSizeBytes: sizeBytes,
      *body() {
        yield map
        yield* readPieces(fd, segments, path)
      },
    })
  }

  async #put(path: EntryPath, type: string, meta: Meta, more: MemberMore = {}): Promise<void> {
    const { fields, records } = headersOf(path, type, meta, more)
    const queue = this.#queue
    if (records.length > 0) {
      const bytes = encodePax(records)
      await queue.push(encodeHeader({ name: 'PaxHeaders/member', type: 'x', sizeBytes: bytes.length }))
      await queue.push(bytes)
      await queue.push(Buffer.alloc(paddingOf(bytes.length)))
    }
    await queue.push(encodeHeader(fields))
    const { sizeBytes = 0, body } = more
    if (body === undefined) return
    for (const piece of body()) {
      this.#options.onBytes?.(piece.length)
      await queue.push(piece)
    }
    await queue.push(Buffer.alloc(paddingOf(sizeBytes)))
  }
}

interface MemberMore {
  readonly linkName?: ByteString
  readonly rdev?: number
  /** Of the body. */
  readonly sizeBytes?: number
  /** Of the file, when the body is sparse. */
  readonly realSizeBytes?: number
  readonly withoutXattrs?: boolean
  readonly body?: () => Iterable<Buffer>
}

/** The header of a member, and the pax records for what does not fit there. Pure. */
function headersOf(
  path: EntryPath,
  type: string,
  meta: Meta,
  more: MemberMore,
): { fields: UstarFields & { readonly name: string }; records: [string, Uint8Array | string][] } {
  const name = type === '5' ? (path === ROOT ? './' : `${path}/`) : path
  const { linkName = '', sizeBytes = 0, realSizeBytes, rdev = 0 } = more
  const records: [string, Uint8Array | string][] = []
  // Where bytes are not UTF-8, POSIX wants this first, for readers that convert names.
  if (!isUtf8(name) || !isUtf8(linkName)) records.push(['hdrcharset', 'BINARY'])
  const isShort = name.length <= 100 && isAscii(name)
  if (realSizeBytes !== undefined) {
    records.push(['GNU.sparse.major', '1'], ['GNU.sparse.minor', '0'], ['GNU.sparse.name', name])
    records.push(['GNU.sparse.realsize', String(realSizeBytes)])
  } else if (!isShort) records.push(['path', name])
  if (linkName.length > 100 || !isAscii(linkName)) records.push(['linkpath', linkName])
  if (sizeBytes > 0o77_777_777_777) records.push(['size', String(sizeBytes)])
  if (meta.uid > MAX_ID) records.push(['uid', String(meta.uid)])
  if (meta.gid > MAX_ID) records.push(['gid', String(meta.gid)])
  const seconds = meta.mtimeNs / 1_000_000_000n
  const isPlainTime = meta.mtimeNs >= 0n && meta.mtimeNs % 1_000_000_000n === 0n && seconds <= MAX_SECONDS
  if (!isPlainTime) records.push(['mtime', formatTime(meta.mtimeNs)])
  for (const xattr of more.withoutXattrs === true ? [] : meta.xattrs) {
    if (xattr.name === ACL_ACCESS || xattr.name === ACL_DEFAULT) {
      // GNU tar --acls and bsdtar take ACLs from text alone, container runtimes from the attribute alone.
      const text = aclToText(xattr.value)
      const key = xattr.name === ACL_ACCESS ? 'SCHILY.acl.access' : 'SCHILY.acl.default'
      if (text !== undefined) records.push([key, text])
    }
    // A record's key ends at its first equals sign.
    if (!xattr.name.includes('=')) records.push([`SCHILY.xattr.${xattr.name}`, xattr.value])
    else records.push([`LIBARCHIVE.xattr.${escapeUrl(xattr.name)}`, Buffer.from(xattr.value).toString('base64')])
  }
  const sparseName = 'GNUSparseFile.0/member'
  const shortName = realSizeBytes !== undefined ? sparseName : isShort ? name : shortened(name)
  return {
    records,
    fields: {
      name: shortName,
      type,
      sizeBytes: type === '0' ? sizeBytes : 0,
      mode: meta.mode,
      uid: Math.min(meta.uid, MAX_ID),
      gid: Math.min(meta.gid, MAX_ID),
      mtimeSeconds: Math.max(0, Math.min(Number(seconds), MAX_SECONDS)),
      linkName: linkName.length <= 100 && isAscii(linkName) ? linkName : shortened(linkName),
      ...deviceOf(rdev),
    },
  }
}

function deviceOf(rdev: number): { major: number; minor: number } {
  const device = BigInt(rdev)
  const major = ((device >> 8n) & 0xfffn) | ((device >> 32n) & ~0xfffn)
  const minor = (device & 0xffn) | ((device >> 12n) & 0xffff_ff00n)
  return { major: Number(major), minor: Number(minor) }
}

function shortened(name: string): string {
  return name.slice(0, 100).replace(/[^\x20-\x7e]/g, '_')
}

function isAscii(text: string): boolean {
  return /^[\x01-\x7f]*$/.test(text)
}

function isUtf8(bytes: string): boolean {
  if (isAscii(bytes)) return true
  try {
    utf8.decode(Buffer.from(bytes, 'latin1'))
    return true
  } catch {
    return false
  }
}

const utf8 = new TextDecoder('utf-8', { fatal: true })

function escapeUrl(name: string): string {
  return name.replace(
    /[^A-Za-z0-9._-]/g,
    (character) => `%${character.charCodeAt(0).toString(16).padStart(2, '0').toUpperCase()}`,
  )
}

/** The pieces of an open file that hold data; one empty piece at the end where it ends in a hole. */
function segmentsOf(fd: number, sizeBytes: number): Segment[] | undefined {
  const segments: Segment[] = []
  for (let at = 0; at < sizeBytes; ) {
    const data = nextData(fd, at)
    if (data === undefined) break
    const end = Math.min(data.end, sizeBytes)
    segments.push({ offset: data.start, sizeBytes: end - data.start })
    at = end
  }
  const [first] = segments
  return segments.length === 1 && first?.offset === 0 && first.sizeBytes === sizeBytes ? undefined : segments
}

/** The map of pax format 1.0. Source: GNU tar manual, "PAX Format, Version 1.0". */
function sparseMap(segments: readonly Segment[], sizeBytes: number): Buffer {
  const last = segments.at(-1)
  const isClosed = last !== undefined && last.offset + last.sizeBytes === sizeBytes
  // GNU tar takes the end of the last piece for the size of the file.
  const all = isClosed ? segments : [...segments, { offset: sizeBytes, sizeBytes: 0 }]
  const lines = [all.length, ...all.flatMap((segment) => [segment.offset, segment.sizeBytes])]
  const text = Buffer.from(`${lines.join('\n')}\n`)
  return Buffer.concat([text, Buffer.alloc(paddingOf(text.length))])
}

function* readPieces(fd: number | undefined, segments: readonly Segment[], path: EntryPath): Generator<Buffer> {
  if (fd === undefined) return
  for (const segment of segments) {
    for (let done = 0; done < segment.sizeBytes; ) {
      const piece = readAt(fd, segment.offset + done, Math.min(CHUNK_BYTES, segment.sizeBytes - done))
      if (piece.length === 0) throw new LayerChangedError(path)
      done += piece.length
      yield piece
    }
  }
}
