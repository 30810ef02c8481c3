import { pipeline, Readable } from 'node:stream'
import { type ByteString, makeDevice } from '@lsync/posix'
import tar from 'tar-stream'
import type { Xattr } from '../model/entry.ts'
import { aclFromText } from './acl-text.ts'
import { ByteReader } from './compression.ts'
import { ArchiveBrokenError, LayerEntryRefusedError, LimitExceededError } from './errors.ts'
import { sortXattrs } from './item.ts'
import {
  BLOCK_BYTES,
  decodeHeader,
  decodePax,
  encodeHeader,
  isZeroBlock,
  type PaxRecords,
  paddingOf,
  parseTime,
  type TarHeader,
} from './tar-header.ts'

/** Guards against archives that expand without end. What passes one is refused by name. */
export interface TarLimits {
  /** Members, extended headers not counted. */
  readonly maxEntries: number
  /** Size of all files together, holes included. */
  readonly maxBytes: number
  /** Archive bytes for each compressed byte, once the archive is past `ratioFromBytes`. */
  readonly maxRatio: number
  readonly ratioFromBytes: number
  /** Extended headers (pax, GNU long names, sparse maps) of one member. */
  readonly maxHeaderBytes: number
}

export const DEFAULT_LIMITS: TarLimits = {
  maxEntries: 5_000_000,
  maxBytes: 2 ** 40,
  // gzip cannot pass 1032; real layers stay below 100.
  maxRatio: 1000,
  ratioFromBytes: 256 * 2 ** 20,
  maxHeaderBytes: 4 * 2 ** 20,
}

/** A piece of a sparse file that holds data. */
export interface Segment {
  readonly offset: number
  readonly sizeBytes: number
}

/** One member of an archive with all that its headers say, names as bytes and not yet judged. */
export interface TarMember {
  readonly name: ByteString
  readonly type: 'file' | 'link' | 'symlink' | 'character' | 'block' | 'directory' | 'fifo'
  readonly linkName: ByteString
  readonly mode: number
  readonly uid: number
  readonly gid: number
  readonly mtimeNs: bigint
  /** As `mtimeNs` where the archive does not tell. */
  readonly atimeNs: bigint
  /** Size of the file when it is unpacked. */
  readonly sizeBytes: number
  readonly rdev: number
  /** Sorted by name. */
  readonly xattrs: readonly Xattr[]
  /** Sparse files: where the body's bytes belong, in order. */
  readonly segments?: readonly Segment[]
  /** What was not understood. */
  readonly losses: readonly string[]
}

type Chunks = AsyncIterable<Uint8Array>

/**
 * The members of a tar archive in their order. The body must be read, or left alone, before the next member is asked
 * for. Understands ustar, pax (binary values too), GNU long names, GNU sparse files (old, 0.0, 0.1, 1.0), base-256
 * numbers, `SCHILY.xattr`, `LIBARCHIVE.xattr`, `SCHILY.acl`.
 *
 * tar-stream frames the bodies. It takes pax values for UTF-8 and knows no sparse files, so all headers are taken out
 * below it, and what it gets is an archive of bare ustar headers.
 * @throws {ArchiveBrokenError | LimitExceededError | LayerEntryRefusedError}
 */
export async function* readTarMembers(
  source: Chunks,
  limits: TarLimits = DEFAULT_LIMITS,
  compressedBytes?: () => number,
): AsyncGenerator<{ member: TarMember; body: Chunks }> {
  const members: TarMember[] = []
  const filter = new HeaderFilter(source, limits, compressedBytes, (member) => members.push(member))
  const extract = tar.extract()
  let failure: unknown
  pipeline(Readable.from(filter.chunks(), { objectMode: true }), extract, (error) => {
    failure = error ?? undefined
  })
  try {
    for await (const body of extract) {
      const member = members.shift()
      if (member === undefined) throw new Error('tar-stream found a member that the filter did not')
      yield { member, body: body as unknown as Chunks }
      body.resume()
    }
  } catch (error) {
    throw failure ?? error
  }
  if (failure !== undefined) throw failure
}

const TYPES: Readonly<Record<string, TarMember['type']>> = {
  '0': 'file',
  '7': 'file',
  S: 'file',
  '1': 'link',
  '2': 'symlink',
  '3': 'character',
  '4': 'block',
  '5': 'directory',
  '6': 'fifo',
}
const MAX_SEGMENTS = 1_000_000

/** Extended headers that apply to the next member. */
interface Extended {
  records: PaxRecords
  /** Records of GNU sparse 0.0, whose keys repeat. */
  repeated: number[]
  longName?: ByteString
  longLink?: ByteString
  bytes: number
}

/** Takes an archive apart and puts it together again with bare headers. */
class HeaderFilter {
  readonly #bytes: ByteReader
  readonly #limits: TarLimits
  readonly #compressedBytes: (() => number) | undefined
  readonly #onMember: (member: TarMember) => void
  #global: PaxRecords = new Map()
  #entries = 0
  #total = 0

  constructor(
    source: Chunks,
    limits: TarLimits,
    compressedBytes: (() => number) | undefined,
    onMember: (member: TarMember) => void,
  ) {
    this.#bytes = new ByteReader(source)
    this.#limits = limits
    this.#compressedBytes = compressedBytes
    this.#onMember = onMember
  }

  async *chunks(): AsyncGenerator<Buffer> {
    let extended = noneExtended()
    let last = ''
    for (;;) {
      const block = await this.#bytes.take(BLOCK_BYTES)
      if (block.length < BLOCK_BYTES) throw new ArchiveBrokenError('ends too early, after', last)
      const header = decodeHeader(block)
      if (header === undefined) break
      if (await this.#takeExtended(header, extended)) continue
      const { member, bodyBytes } = await this.#complete(header, block, extended)
      last = member.name
      extended = noneExtended()
      this.#count(member)
      this.#onMember(member)
      yield encodeHeader({ name: 'member', type: '0', sizeBytes: bodyBytes })
      yield* this.#body(bodyBytes, member.name)
    }
    if (extended.bytes > 0) throw new ArchiveBrokenError('ends after an extended header', last)
    await this.#end(last)
    yield Buffer.alloc(2 * BLOCK_BYTES)
  }

  async *#body(sizeBytes: number, name: ByteString): AsyncGenerator<Buffer> {
    for (let left = sizeBytes + paddingOf(sizeBytes); left > 0; ) {
      const piece = await this.#bytes.some(Math.min(left, 256 * 1024))
      if (piece.length === 0) throw new ArchiveBrokenError('ends too early, in', name)
      left -= piece.length
      this.#checkRatio(name)
      yield piece
    }
  }

  #checkRatio(name: string): void {
    const { maxRatio, ratioFromBytes } = this.#limits
    const { position } = this.#bytes
    if (this.#compressedBytes === undefined || position < ratioFromBytes) return
    if (position > maxRatio * this.#compressedBytes()) throw new LimitExceededError(name, 'maxRatio', maxRatio)
  }

  /** After the first block of zeros: another one or the end, then anything (padding), read for the decompressor's sake. */
  async #end(last: string): Promise<void> {
    const second = await this.#bytes.take(BLOCK_BYTES)
    if (second.length === BLOCK_BYTES && !isZeroBlock(second)) {
      throw new ArchiveBrokenError('goes on after its end mark, after', last)
    }
    while ((await this.#bytes.some(1 << 20)).length > 0) this.#checkRatio(last)
  }

  /** Whether the header was an extended one, which is then read. */
  async #takeExtended(header: TarHeader, extended: Extended): Promise<boolean> {
    const { type, sizeBytes } = header
    if (!'xXgLKV'.includes(type)) return false
    if (sizeBytes < 0) throw new ArchiveBrokenError('has an extended header of negative size', header.name)
    extended.bytes += sizeBytes + 1
    const { maxHeaderBytes } = this.#limits
    if (extended.bytes > maxHeaderBytes) throw new LimitExceededError(header.name, 'maxHeaderBytes', maxHeaderBytes)
    const padded = sizeBytes + paddingOf(sizeBytes)
    const body = await this.#bytes.take(padded)
    if (body.length < padded) throw new ArchiveBrokenError('ends too early, in', header.name)
    const bytes = body.subarray(0, sizeBytes)
    if (type === 'L') extended.longName = cText(bytes)
    else if (type === 'K') extended.longLink = cText(bytes)
    else if (type === 'g') this.#global = new Map([...this.#global, ...decodePax(bytes)])
    else if (type !== 'V') {
      const records = decodePax(bytes, (key, value) => {
        if (key === 'GNU.sparse.offset' || key === 'GNU.sparse.numbytes') extended.repeated.push(paxNumber(key, value))
      })
      for (const [key, value] of records) extended.records.set(key, value)
    }
    return true
  }

  async #complete(
    header: TarHeader,
    block: Buffer,
    extended: Extended,
  ): Promise<{ member: TarMember; bodyBytes: number }> {
    const { records } = extended
    const text = (key: string) => records.get(key)?.toString('latin1')
    // A global header may set what is common to all members, but not what each must have of its own.
    const common = (key: string) => text(key) ?? this.#global.get(key)?.toString('latin1')
    const name = (text('GNU.sparse.name') ?? text('path') ?? extended.longName ?? header.name) as ByteString
    const linkName = (text('linkpath') ?? extended.longLink ?? header.linkName) as ByteString
    let type = TYPES[header.type]
    if (type === undefined) {
      const hint = 'repack it with `tar --format=posix`'
      throw new LayerEntryRefusedError(
        name,
        `the archive gives it the unknown type ${JSON.stringify(header.type)}`,
        hint,
      )
    }
    if (type === 'file' && header.type !== 'S' && name.endsWith('/')) {
      if (header.sizeBytes !== 0) throw new LayerEntryRefusedError(name, 'it is a directory by its name, and has data')
      type = 'directory'
    }
    if (name.includes('\0') || linkName.includes('\0')) throw new LayerEntryRefusedError(name, 'a NUL is in its name')
    const hasBody = type === 'file'
    const size = records.get('size')
    let bodyBytes = hasBody ? (size === undefined ? header.sizeBytes : paxNumber('size', size)) : 0
    if (bodyBytes < 0) throw new ArchiveBrokenError('has a negative size', name)
    let sizeBytes = bodyBytes
    let segments: Segment[] | undefined
    if (hasBody) {
      const sparse = await this.#sparseOf(header, block, extended, bodyBytes, name)
      if (sparse !== undefined) {
        ;({ segments, sizeBytes, bodyBytes } = sparse)
        checkSegments(segments, sizeBytes, bodyBytes, name)
      }
    }
    const mtimeNs = timeOf(common('mtime'), name) ?? BigInt(header.mtimeSeconds) * 1_000_000_000n
    const losses: string[] = []
    const member: TarMember = {
      name,
      type,
      linkName,
      mode: header.mode & 0o7777,
      uid: numberOf('uid', common('uid'), name) ?? header.uid,
      gid: numberOf('gid', common('gid'), name) ?? header.gid,
      mtimeNs,
      atimeNs: timeOf(common('atime'), name) ?? mtimeNs,
      sizeBytes,
      rdev: makeDevice(
        numberOf('device', text('SCHILY.devmajor'), name) ?? header.major,
        numberOf('device', text('SCHILY.devminor'), name) ?? header.minor,
      ),
      xattrs: xattrsOf(records, losses),
      ...(segments === undefined ? {} : { segments }),
      losses,
    }
    for (const id of [member.uid, member.gid]) {
      if (id < 0 || id >= 0xffff_ffff) throw new LayerEntryRefusedError(name, 'its owner is no user id')
    }
    return { member, bodyBytes }
  }

  async #sparseOf(
    header: TarHeader,
    block: Buffer,
    { records, repeated }: Extended,
    bodyBytes: number,
    name: ByteString,
  ): Promise<{ segments: Segment[]; sizeBytes: number; bodyBytes: number } | undefined> {
    if (header.type === 'S') return { ...(await this.#oldSparse(block, name)), bodyBytes }
    const number = (key: string) => numberOf(key, records.get(key)?.toString('latin1'), name)
    if (number('GNU.sparse.major') === 1 && number('GNU.sparse.minor') === 0) {
      const sizeBytes = number('GNU.sparse.realsize')
      if (sizeBytes === undefined) throw new ArchiveBrokenError('has a sparse file without a size', name)
      return { sizeBytes, ...(await this.#sparseMap(bodyBytes, name)) }
    }
    const sizeBytes = number('GNU.sparse.size') ?? number('GNU.sparse.realsize')
    if (sizeBytes === undefined) return undefined
    const map = records.get('GNU.sparse.map')
    const numbers = map === undefined ? repeated : map.toString('latin1').split(',').filter(Boolean).map(Number)
    return { segments: pairs(numbers, name), sizeBytes, bodyBytes }
  }

  /** The map at the start of a body: a count, then offsets and sizes, one a line, padded to a block. */
  async #sparseMap(bodyBytes: number, name: ByteString): Promise<{ segments: Segment[]; bodyBytes: number }> {
    const numbers: number[] = []
    let wanted = 1
    let digits = ''
    let left = bodyBytes
    while (numbers.length < wanted) {
      const block = left >= BLOCK_BYTES ? await this.#bytes.take(BLOCK_BYTES) : Buffer.alloc(0)
      if (block.length < BLOCK_BYTES) throw new ArchiveBrokenError('has a sparse map that does not end', name)
      left -= BLOCK_BYTES
      for (let i = 0; i < BLOCK_BYTES && numbers.length < wanted; i++) {
        const byte = block[i] as number
        if (byte !== 0x0a) digits += String.fromCharCode(byte)
        else {
          numbers.push(numberOf('sparse map', digits, name) ?? 0)
          digits = ''
        }
        if (digits.length > 20) throw new ArchiveBrokenError('has a sparse map that cannot be read', name)
        if (numbers.length === 1) wanted = 1 + 2 * Math.min(numbers[0] as number, MAX_SEGMENTS + 1)
      }
    }
    return { segments: pairs(numbers.slice(1), name), bodyBytes: left }
  }

  /** GNU's first form: the map in the header and in extension blocks after it. */
  async #oldSparse(block: Buffer, name: ByteString): Promise<{ segments: Segment[]; sizeBytes: number }> {
    const numbers: number[] = []
    const collect = (from: Buffer, at: number, count: number) => {
      for (let i = 0; i < count; i++) {
        const field = at + i * 24
        if (from[field] === 0 && from[field + 12] === 0) return
        numbers.push(oldNumber(from, field, name), oldNumber(from, field + 12, name))
      }
    }
    collect(block, 386, 4)
    const sizeBytes = oldNumber(block, 483, name)
    for (let more = block[482] !== 0; more; ) {
      const extension = await this.#bytes.take(BLOCK_BYTES)
      if (extension.length < BLOCK_BYTES) throw new ArchiveBrokenError('ends too early, in', name)
      collect(extension, 0, 21)
      more = extension[504] !== 0
      if (numbers.length > 2 * MAX_SEGMENTS) throw new ArchiveBrokenError('has an endless sparse map', name)
    }
    return { segments: pairs(numbers, name), sizeBytes }
  }

  #count(member: TarMember): void {
    const { maxEntries, maxBytes } = this.#limits
    this.#entries++
    if (this.#entries > maxEntries) throw new LimitExceededError(member.name, 'maxEntries', maxEntries)
    this.#total += member.sizeBytes
    if (this.#total > maxBytes) throw new LimitExceededError(member.name, 'maxBytes', maxBytes)
  }
}

function noneExtended(): Extended {
  return { records: new Map(), repeated: [], bytes: 0 }
}

function cText(bytes: Buffer): ByteString {
  const end = bytes.indexOf(0)
  return bytes.toString('latin1', 0, end < 0 ? bytes.length : end) as ByteString
}

function paxNumber(key: string, value: Buffer): number {
  return numberOf(key, value.toString('latin1'), '') ?? 0
}

function numberOf(key: string, text: string | undefined, name: string): number | undefined {
  if (text === undefined || text === '') return undefined
  const value = /^[0-9]{1,16}$/.test(text) ? Number(text) : Number.NaN
  if (!Number.isSafeInteger(value)) throw new ArchiveBrokenError(`has an impossible ${key}`, name)
  return value
}

function timeOf(text: string | undefined, name: string): bigint | undefined {
  if (text === undefined || text === '') return undefined
  const time = parseTime(text)
  if (time === undefined) throw new ArchiveBrokenError('has an impossible time', name)
  return time
}

function oldNumber(block: Buffer, at: number, name: string): number {
  if (((block[at] as number) & 0x80) !== 0) {
    const value = block.readUIntBE(at + 6, 6)
    return value
  }
  const digits = block
    .toString('latin1', at, at + 12)
    .replace(/\0.*$/s, '')
    .trim()
  if (!/^[0-7]*$/.test(digits)) throw new ArchiveBrokenError('has a sparse map that cannot be read', name)
  return digits === '' ? 0 : Number.parseInt(digits, 8)
}

function pairs(numbers: readonly number[], name: string): Segment[] {
  if (numbers.length % 2 !== 0 || numbers.length > 2 * MAX_SEGMENTS) {
    throw new ArchiveBrokenError('has a sparse map that cannot be read', name)
  }
  const segments: Segment[] = []
  for (let i = 0; i < numbers.length; i += 2) {
    segments.push({ offset: numbers[i] as number, sizeBytes: numbers[i + 1] as number })
  }
  return segments
}

function checkSegments(segments: readonly Segment[], sizeBytes: number, bodyBytes: number, name: string): void {
  let end = 0
  let data = 0
  for (const segment of segments) {
    const stop = segment.offset + segment.sizeBytes
    if (!(segment.offset >= end && segment.sizeBytes >= 0 && stop <= sizeBytes)) {
      throw new ArchiveBrokenError('has a sparse map with overlapping or misplaced pieces', name)
    }
    end = stop
    data += segment.sizeBytes
  }
  if (data !== bodyBytes) throw new ArchiveBrokenError('has a sparse file whose map and data differ in size', name)
}

const SCHILY = 'SCHILY.xattr.'
const LIBARCHIVE = 'LIBARCHIVE.xattr.'

function xattrsOf(records: PaxRecords, losses: string[]): readonly Xattr[] {
  const found = new Map<string, Uint8Array>()
  for (const [key, value] of records) {
    if (key.startsWith(SCHILY)) found.set(key.slice(SCHILY.length), Buffer.from(value))
    else if (key.startsWith(LIBARCHIVE)) {
      const name = unescapeUrl(key.slice(LIBARCHIVE.length))
      // bsdtar writes both; the raw one needs no trust in a second encoding.
      if (!records.has(SCHILY + name)) found.set(name, Buffer.from(value.toString('latin1'), 'base64'))
    } else if (key === 'SCHILY.acl.access' || key === 'SCHILY.acl.default') {
      const kind = key === 'SCHILY.acl.access' ? 'access' : 'default'
      const name = `system.posix_acl_${kind}`
      if (records.has(SCHILY + name)) continue
      const acl = aclFromText(value.toString('latin1'), kind)
      if (acl === undefined) losses.push(`${key} (it names users that only its own host knows)`)
      else if (acl.length > 0) found.set(name, acl)
    }
  }
  if (found.size === 0) return []
  const xattrs: Xattr[] = []
  for (const [name, value] of found) {
    if (isStorable(name, value)) xattrs.push({ name: name as ByteString, value })
    else losses.push(`attribute ${name} (no file system takes it)`)
  }
  return sortXattrs(xattrs)
}

/** Limits that the kernel sets on every file system. Source: xattr(7). */
function isStorable(name: string, value: Uint8Array): boolean {
  return (
    /^(user|trusted|security|system)\../s.test(name) &&
    !name.includes('\0') &&
    name.length <= 255 &&
    value.length <= 65536
  )
}

function unescapeUrl(text: string): string {
  return text.replace(/%([0-9a-fA-F]{2})/g, (_, hex: string) => String.fromCharCode(Number.parseInt(hex, 16)))
}
