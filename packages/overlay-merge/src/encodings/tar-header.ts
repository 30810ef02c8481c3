import type { ByteString } from '@lsync/posix'
import { ArchiveBrokenError } from './errors.ts'

/** The size of a tar block in bytes. */
export const BLOCK_BYTES = 512

/** The fields of one 512-byte header, as they stand. Numbers may be negative only in base 256. */
export interface TarHeader {
  readonly name: ByteString
  readonly mode: number
  readonly uid: number
  readonly gid: number
  readonly sizeBytes: number
  readonly mtimeSeconds: number
  /** The type flag as a character; NUL is given as `0`. */
  readonly type: string
  readonly linkName: ByteString
  readonly isGnu: boolean
  readonly major: number
  readonly minor: number
}

const CHECKSUM_AT = 148

/**
 * Reads a header block. `undefined` for a block of zeros, which ends an archive.
 * @throws {ArchiveBrokenError} on a wrong checksum or a number field that is none
 * Source: POSIX.1-2018 pax, "ustar interchange format"; GNU tar manual, "Basic Tar Format".
 */
export function decodeHeader(block: Buffer): TarHeader | undefined {
  if (isZeroBlock(block)) return undefined
  const stored = number(block, CHECKSUM_AT, 8, 'checksum')
  const sums = checksums(block)
  // Some old archivers summed signed bytes; both are accepted everywhere.
  if (stored !== sums.unsigned && stored !== sums.signed)
    throw new ArchiveBrokenError('has a header with a wrong checksum')
  const magic = block.toString('latin1', 257, 265)
  const isGnu = magic === 'ustar  \0'
  const isPosix = magic.startsWith('ustar\0')
  let name = text(block, 0, 100)
  if (isPosix) {
    const prefix = text(block, 345, 155)
    if (prefix !== '') name = `${prefix}/${name}` as ByteString
  }
  const flag = block[156] as number
  const hasDevice = flag === 0x33 || flag === 0x34
  return {
    name,
    mode: number(block, 100, 8, 'mode', name),
    uid: number(block, 108, 8, 'uid', name),
    gid: number(block, 116, 8, 'gid', name),
    sizeBytes: number(block, 124, 12, 'size', name),
    mtimeSeconds: number(block, 136, 12, 'mtime', name),
    type: flag === 0 ? '0' : String.fromCharCode(flag),
    linkName: text(block, 157, 100),
    isGnu,
    // Other types leave anything in there.
    major: hasDevice ? number(block, 329, 8, 'device', name) : 0,
    minor: hasDevice ? number(block, 337, 8, 'device', name) : 0,
  }
}

/** Whether a block ends the archive. */
export function isZeroBlock(block: Buffer): boolean {
  for (let i = 0; i < BLOCK_BYTES; i++) if (block[i] !== 0) return false
  return true
}

function checksums(block: Buffer): { unsigned: number; signed: number } {
  let unsigned = 8 * 32
  let signed = 8 * 32
  for (let i = 0; i < BLOCK_BYTES; i++) {
    if (i >= CHECKSUM_AT && i < CHECKSUM_AT + 8) continue
    const byte = block[i] as number
    unsigned += byte
    signed += byte > 127 ? byte - 256 : byte
  }
  return { unsigned, signed }
}

function text(block: Buffer, at: number, length: number): ByteString {
  const end = block.indexOf(0, at)
  return block.toString('latin1', at, end < 0 || end > at + length ? at + length : end) as ByteString
}

function number(block: Buffer, at: number, length: number, field: string, name = ''): number {
  const lead = block[at] as number
  if ((lead & 0x80) !== 0) {
    let value = BigInt(lead & 0x7f)
    for (let i = 1; i < length; i++) value = (value << 8n) | BigInt(block[at + i] as number)
    if ((lead & 0x40) !== 0) value -= 1n << BigInt(8 * length - 1)
    const result = Number(value)
    if (!Number.isSafeInteger(result)) throw new ArchiveBrokenError(`has an impossible ${field}`, name)
    return result
  }
  const digits = block
    .toString('latin1', at, at + length)
    .replace(/\0.*$/s, '')
    .trim()
  if (digits === '') return 0
  if (!/^[0-7]+$/.test(digits)) throw new ArchiveBrokenError(`has a ${field} that is no number`, name)
  return Number.parseInt(digits, 8)
}

/** Writes a number field: octal where it fits, else base 256 (GNU). */
function putNumber(block: Buffer, at: number, length: number, value: number): void {
  const digits = value < 0 ? undefined : value.toString(8)
  if (digits !== undefined && digits.length < length) {
    block.write(`${digits.padStart(length - 1, '0')}\0`, at, 'latin1')
    return
  }
  let rest = BigInt(value)
  for (let i = length - 1; i >= 0; i--) {
    block[at + i] = Number(rest & 0xffn)
    rest >>= 8n
  }
  block[at] = (block[at] as number) | 0x80
}

/** What a ustar header holds; absent numbers are 0. */
export interface UstarFields {
  readonly name: string
  readonly type: string
  readonly sizeBytes: number
  readonly mode?: number
  readonly uid?: number
  readonly gid?: number
  readonly mtimeSeconds?: number
  readonly linkName?: string
  readonly major?: number
  readonly minor?: number
}

/** A header block. Names are cut at 100 bytes; what is larger or finer belongs into pax records. */
export function encodeHeader(fields: UstarFields): Buffer {
  const block = Buffer.alloc(BLOCK_BYTES)
  block.write(fields.name.slice(0, 100), 0, 'latin1')
  putNumber(block, 100, 8, fields.mode ?? 0)
  putNumber(block, 108, 8, fields.uid ?? 0)
  putNumber(block, 116, 8, fields.gid ?? 0)
  putNumber(block, 124, 12, fields.sizeBytes)
  putNumber(block, 136, 12, fields.mtimeSeconds ?? 0)
  block.write(fields.type, 156, 'latin1')
  block.write((fields.linkName ?? '').slice(0, 100), 157, 'latin1')
  block.write('ustar\x0000', 257, 'latin1')
  putNumber(block, 329, 8, fields.major ?? 0)
  putNumber(block, 337, 8, fields.minor ?? 0)
  block.write(`${checksumOf(block)}\0 `, CHECKSUM_AT, 'latin1')
  return block
}

function checksumOf(block: Buffer): string {
  return checksums(block).unsigned.toString(8).padStart(6, '0')
}

/** The records of an extended header: key (bytes) to raw value, in their order; the last of equal keys counts. */
export type PaxRecords = Map<string, Buffer>

/**
 * Reads `LENGTH KEY=VALUE\n` records. Values are bytes: POSIX wants UTF-8, but attributes and old names are not.
 * `repeated` gets each record as it comes, for GNU sparse 0.0, whose keys repeat.
 * @throws {ArchiveBrokenError}
 */
export function decodePax(bytes: Buffer, repeated?: (key: string, value: Buffer) => void): PaxRecords {
  const records: PaxRecords = new Map()
  let at = 0
  while (at < bytes.length) {
    // Some writers pad with NULs.
    if (bytes[at] === 0) break
    const space = bytes.indexOf(0x20, at)
    const digits = space < 0 || space - at > 12 ? '' : bytes.toString('latin1', at, space)
    if (!/^[0-9]+$/.test(digits)) throw new ArchiveBrokenError('has an extended header that cannot be read')
    const end = at + Number(digits)
    if (end > bytes.length || end <= space + 1 || bytes[end - 1] !== 0x0a) {
      throw new ArchiveBrokenError('has an extended header record of a wrong length')
    }
    const equals = bytes.indexOf(0x3d, space)
    if (equals < 0 || equals >= end) throw new ArchiveBrokenError('has an extended header record without a value')
    const key = bytes.toString('latin1', space + 1, equals)
    const value = bytes.subarray(equals + 1, end - 1)
    repeated?.(key, value)
    records.set(key, value)
    at = end
  }
  return records
}

/** Writes records, in the order given. */
export function encodePax(records: Iterable<readonly [string, Uint8Array | string]>): Buffer {
  const parts: Uint8Array[] = []
  for (const [key, value] of records) {
    const bytes = typeof value === 'string' ? Buffer.from(value, 'latin1') : value
    const rest = key.length + bytes.length + 3
    let length = rest + String(rest).length
    if (String(length).length > String(rest).length) length = rest + String(length).length
    parts.push(Buffer.from(`${length} ${key}=`, 'latin1'), bytes, NEWLINE)
  }
  return Buffer.concat(parts)
}

const NEWLINE = Buffer.from('\n')

/** How many bytes of padding follow `sizeBytes` of data. */
export function paddingOf(sizeBytes: number): number {
  const over = sizeBytes % BLOCK_BYTES
  return over === 0 ? 0 : BLOCK_BYTES - over
}

/** A pax time (`-12.5`) in ns; digits beyond ns are cut. `undefined` when it is none. */
export function parseTime(text: string): bigint | undefined {
  const match = /^(-?)([0-9]{1,18})(?:\.([0-9]*))?$/.exec(text)
  if (match === null) return undefined
  const ns = BigInt(match[2] as string) * 1_000_000_000n + BigInt((match[3] ?? '').slice(0, 9).padEnd(9, '0'))
  return match[1] === '-' ? -ns : ns
}

/** A time in ns as pax has it: seconds, and a fraction without trailing zeros. */
export function formatTime(timeNs: bigint): string {
  const absolute = timeNs < 0n ? -timeNs : timeNs
  const fraction = (absolute % 1_000_000_000n).toString().padStart(9, '0').replace(/0+$/, '')
  return `${timeNs < 0n ? '-' : ''}${absolute / 1_000_000_000n}${fraction === '' ? '' : `.${fraction}`}`
}
