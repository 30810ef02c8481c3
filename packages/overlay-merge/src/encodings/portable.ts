import {
  type ByteString,
  bytesOf,
  close,
  makeDevice,
  makeDirectory,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_RDONLY,
  openBeneath,
  readAt,
  statFd,
  textOf,
  writeAt,
} from '@lsync/posix'
import type { Entry, Meta, Xattr } from '../model/entry.ts'
import { parseRedirect } from '../model/marks.ts'
import { type EntryPath, isWithin, ROOT, split } from '../model/path.ts'
import { ArchiveBrokenError, LayerChangedError, LayerEntryRefusedError, LimitExceededError } from './errors.ts'
import { fillFrom, openDirectory, openNew, openRegular } from './inode.ts'
import { type LayerItem, type OpenContent, pathProblem, sortXattrs } from './item.ts'
import { DEFAULT_LIMITS } from './tar-members.ts'
import type { LayerSink } from './tree-sink.ts'

/*
 * The portable form: a layer on a store that has only plain files and directories (no devices, owners, attributes,
 * links, case or byte names needed), from which the exact layer can be restored, in either namespace.
 *
 *   LAYER/.lsync-layer.jsonl   the manifest, one JSON object a line, UTF-8, `\n`
 *   LAYER/data/BBBBBB/NNN      the bytes of one file each, in the order of the manifest from 0 on: BBBBBB is the number
 *                              divided by 1000 in at least six decimal digits, NNN the rest in three
 *
 * First line: {"format":"lsync-portable-layer","version":1}
 * Last line:  {"end":true,"entries":N}   N entry lines came before; without it the manifest was cut
 * Between: one line an entry; a directory before its content, in a directory first its whiteouts, then all else, each
 * by name bytes, each name followed at once by its subtree. The root comes first, with the path "".
 *
 *   path      string   relative to the layer root. Text in UTF-8; each byte that is not part of UTF-8 is a lone
 *                      surrogate U+DC80–U+DCFF (PEP 383), escaped as \udcXX by JSON. So are all strings marked (b)
 *   kind      string   file, directory, symlink, fifo, socket, character, block, whiteout
 *   mode      string   permission bits in octal, at most 7777                     all but whiteouts
 *   uid, gid  number   as on disk                                                 all but whiteouts
 *   atime     string   ns since 1970, decimal, may be negative                    all but whiteouts
 *   mtime     string   the same                                                   all but whiteouts
 *   xattrs    array    of [name (b), value in base64], by name bytes; the content's own attributes as a view shows
 *                      them: not escaped, without marks. Absent: none
 *   size      number   bytes                                                      files
 *   data      number   number of the data file. Absent: size 0, metacopy, or a further name of a group
 *   group     number   names with the same number are one inode; data is with the first. Absent: one name only
 *   target    string   (b) what a symlink holds                                   symlinks
 *   device    array    [major, minor]                                             character, block
 *   opaque    true     hides what is below                                        directories
 *   redirect  string   (b) value of NS.redirect                                   directories, metacopies
 *   metacopy  string   value of NS.metacopy in base64, mostly ""                  files without data of their own
 *   protattr  string   value of NS.protattr in base64
 *   form      string   "xattr" for a whiteout that was stored so; absent: device  whiteouts
 */

/** The name of the manifest in a portable layer. */
export const MANIFEST = '.lsync-layer.jsonl' as ByteString
const DATA = 'data' as ByteString
export const FORMAT = 'lsync-portable-layer'
export const VERSION = 1
const PER_DIRECTORY = 1000
const WRITE_BYTES = 256 * 1024
const MAX_LINE_BYTES = 8 * 1024 * 1024

export interface Line {
  readonly path: string
  readonly kind: 'file' | 'directory' | 'symlink' | 'fifo' | 'socket' | 'character' | 'block' | 'whiteout'
  readonly mode?: string
  readonly uid?: number
  readonly gid?: number
  readonly atime?: string
  readonly mtime?: string
  readonly xattrs?: readonly (readonly [string, string])[]
  readonly size?: number
  readonly data?: number
  readonly group?: number
  readonly target?: string
  readonly device?: readonly [number, number]
  readonly opaque?: true
  readonly redirect?: string
  readonly metacopy?: string
  readonly protattr?: string
  readonly form?: 'xattr'
}

export interface PortableSinkOptions {
  readonly onBytes?: (bytes: number) => void
}

/**
 * Writes a portable layer beneath an open, empty directory. Items come with whiteouts first and with attributes as a
 * view shows them (`translateItem(item, namespace, undefined)`).
 */
export class PortableSink implements LayerSink {
  readonly #dataFd: number
  readonly #manifestFd: number
  readonly #options: PortableSinkOptions
  readonly #groups = new Map<string, number>()
  #lines: string[] = []
  #buffered = 0
  #offset = 0
  #entries = 0
  #files = 0
  #bucket: { readonly name: ByteString; readonly fd: number } | undefined
  #isOpen = true

  constructor(rootFd: number, options: PortableSinkOptions = {}) {
    this.#options = options
    this.#manifestFd = openNew(rootFd, MANIFEST)
    makeDirectory(rootFd, DATA, 0o700)
    this.#dataFd = openDirectory(rootFd, DATA)
    this.#write({ format: FORMAT, version: VERSION })
  }

  add(item: LayerItem): void {
    const { entry } = item
    this.#entries++
    let group: number | undefined
    let isFurtherName = false
    if (entry.kind !== 'directory' && entry.kind !== 'whiteout' && entry.linkGroup !== undefined) {
      group = this.#groups.get(entry.linkGroup)
      isFurtherName = group !== undefined
      group ??= this.#groups.size
      this.#groups.set(entry.linkGroup, group)
    }
    let data: number | undefined
    if (entry.kind === 'file' && entry.sizeBytes > 0 && item.openContent !== undefined && !isFurtherName) {
      data = this.#files++
      this.#writeData(data, item.openContent(), entry)
    }
    this.#write(lineOf(item, group, data))
  }

  finish(): void {
    this.#write({ end: true, entries: this.#entries })
    this.#flush()
  }

  close(): void {
    if (!this.#isOpen) return
    this.#isOpen = false
    if (this.#bucket !== undefined) close(this.#bucket.fd)
    close(this.#dataFd)
    close(this.#manifestFd)
  }

  #write(line: object): void {
    const text = `${JSON.stringify(line)}\n`
    this.#lines.push(text)
    this.#buffered += text.length
    if (this.#buffered >= WRITE_BYTES) this.#flush()
  }

  #flush(): void {
    const bytes = Buffer.from(this.#lines.join(''))
    writeAt(this.#manifestFd, this.#offset, bytes, MANIFEST)
    this.#offset += bytes.length
    this.#lines = []
    this.#buffered = 0
  }

  #writeData(number: number, content: OpenContent, entry: Entry & { kind: 'file' }): void {
    const { fd: from, stat } = content
    try {
      if (stat.sizeBytes !== entry.sizeBytes) throw new LayerChangedError(entry.path)
      const { bucket, name } = dataName(number)
      if (this.#bucket?.name !== bucket) {
        if (this.#bucket !== undefined) close(this.#bucket.fd)
        makeDirectory(this.#dataFd, bucket, 0o700)
        this.#bucket = { name: bucket, fd: openDirectory(this.#dataFd, bucket) }
      }
      const to = openNew(this.#bucket.fd, name)
      try {
        fillFrom(from, to, stat, entry.path, true)
      } finally {
        close(to)
      }
    } finally {
      close(from)
    }
    this.#options.onBytes?.(entry.sizeBytes)
  }
}

/** Where the data file of a number is: its directory beneath `data`, and its name. */
export function dataName(number: number): { bucket: ByteString; name: ByteString } {
  const bucket = String(Math.floor(number / PER_DIRECTORY)).padStart(6, '0')
  const name = String(number % PER_DIRECTORY).padStart(3, '0')
  return { bucket: bucket as ByteString, name: name as ByteString }
}

function base64(bytes: Uint8Array): string {
  return Buffer.from(bytes).toString('base64')
}

/** The fields of an entry's line. */
export function lineOf({ entry, protattr }: LayerItem, group: number | undefined, data: number | undefined): Line {
  const path = textOf(entry.path)
  if (entry.kind === 'whiteout') {
    return { path, kind: 'whiteout', ...(entry.form === 'xattr' ? { form: 'xattr' as const } : {}) }
  }
  const { meta } = entry
  const common = {
    mode: meta.mode.toString(8),
    uid: meta.uid,
    gid: meta.gid,
    atime: String(meta.atimeNs),
    mtime: String(meta.mtimeNs),
    ...(meta.xattrs.length === 0
      ? {}
      : { xattrs: meta.xattrs.map(({ name, value }) => [textOf(name), base64(value)] as const) }),
    ...(group === undefined ? {} : { group }),
    ...(protattr === undefined ? {} : { protattr: base64(protattr) }),
  }
  switch (entry.kind) {
    case 'directory':
      return {
        path,
        kind: 'directory',
        ...common,
        ...(entry.opaque ? { opaque: true as const } : {}),
        ...(entry.redirect === undefined ? {} : { redirect: textOf(entry.redirect) }),
      }
    case 'symlink':
      return { path, kind: 'symlink', ...common, target: textOf(entry.target) }
    case 'special': {
      const isDevice = entry.type === 'character' || entry.type === 'block'
      return { path, kind: entry.type, ...common, ...(isDevice ? { device: splitDevice(entry.rdev) } : {}) }
    }
    case 'file': {
      const { metacopy } = entry
      return {
        path,
        kind: 'file',
        ...common,
        size: entry.sizeBytes,
        ...(data === undefined ? {} : { data }),
        ...(metacopy === undefined ? {} : { metacopy: base64(metacopy.digest ?? new Uint8Array(0)) }),
        ...(metacopy?.redirect === undefined ? {} : { redirect: textOf(metacopy.redirect) }),
      }
    }
  }
}

/** Major and minor of what `makeDevice` made. Source: glibc gnu_dev_major(3). */
export function splitDevice(rdev: number): readonly [number, number] {
  const device = BigInt(rdev)
  const major = ((device >> 8n) & 0xfffn) | ((device >> 32n) & 0xffff_f000n)
  const minor = (device & 0xffn) | ((device >> 12n) & 0xffff_ff00n)
  return [Number(major), Number(minor)]
}

export interface PortableReadOptions {
  readonly limits?: { readonly maxEntries?: number; readonly maxBytes?: number }
}

/**
 * The items of a portable layer, whiteouts first, attributes as a view shows them. The manifest is taken for hostile:
 * every field is checked, and data is only read from beneath `data/`, never through a symlink. Streams.
 * @throws {ArchiveBrokenError | LayerEntryRefusedError | LimitExceededError | PosixError}
 */
export function* readPortableLayer(
  rootFd: number,
  options: PortableReadOptions = {},
): Generator<LayerItem, void, undefined> {
  const { fd } = openRegular(rootFd, MANIFEST)
  try {
    for (const { item } of readManifest(readLines(fd), rootFd, options)) yield item
  } finally {
    close(fd)
  }
}

/** An item with the numbers that the manifest gives it. */
export interface ManifestItem {
  readonly item: LayerItem
  /** Of its data file. */
  readonly data: number | undefined
  readonly group: number | undefined
}

/**
 * The items of a manifest, line by line, without the `\n`. `rootFd` is where their data is opened; nothing is read before
 * somebody asks for it.
 * @throws {ArchiveBrokenError | LayerEntryRefusedError | LimitExceededError}
 */
export function* readManifest(
  lines: Iterable<string>,
  rootFd: number,
  options: PortableReadOptions = {},
): Generator<ManifestItem, void, undefined> {
  const { maxEntries = DEFAULT_LIMITS.maxEntries, maxBytes = DEFAULT_LIMITS.maxBytes } = options.limits ?? {}
  const order = new OrderCheck()
  const groups = new Map<number, Entry>()
  let entries = 0
  let total = 0
  let state: 'start' | 'entries' | 'end' = 'start'
  for (const line of lines) {
    const object = parseLine(line)
    if (state === 'start') {
      if (object['format'] !== FORMAT) throw new ArchiveBrokenError('is not a portable layer')
      if (object['version'] !== VERSION) {
        const hint = 'use the version of lsync that wrote it, or a later one'
        throw new ArchiveBrokenError(`is of version ${String(object['version'])}, which is unknown`, '', { hint })
      }
      state = 'entries'
      continue
    }
    if (state === 'end') throw new ArchiveBrokenError('goes on after its end line')
    if (object['end'] === true) {
      if (object['entries'] !== entries) throw new ArchiveBrokenError('has lost entries')
      state = 'end'
      continue
    }
    const item = itemOf(object, rootFd, groups)
    const { entry } = item
    order.check(entry)
    entries++
    if (entries > maxEntries) throw new LimitExceededError(entry.path, 'maxEntries', maxEntries)
    total += entry.kind === 'file' ? entry.sizeBytes : 0
    if (total > maxBytes) throw new LimitExceededError(entry.path, 'maxBytes', maxBytes)
    // Both were checked with the rest of the line.
    yield { item, data: object['data'] as number | undefined, group: object['group'] as number | undefined }
  }
  if (state !== 'end') throw new ArchiveBrokenError('ends too early: its end line is missing')
}

function* readLines(fd: number): Generator<string> {
  let rest: Buffer = Buffer.alloc(0)
  for (let at = 0; ; ) {
    const chunk = readAt(fd, at, WRITE_BYTES)
    at += chunk.length
    if (chunk.length === 0) break
    rest = Buffer.concat([rest, chunk])
    let start = 0
    for (let end = rest.indexOf(0x0a); end >= 0; end = rest.indexOf(0x0a, start)) {
      yield rest.toString('utf8', start, end)
      start = end + 1
    }
    rest = rest.subarray(start)
    if (rest.length > MAX_LINE_BYTES) throw new LimitExceededError(MANIFEST, 'the length of a line', MAX_LINE_BYTES)
  }
  if (rest.length > 0) throw new ArchiveBrokenError('ends in the middle of a line')
}

type Fields = Readonly<Record<string, unknown>>

function parseLine(line: string): Fields {
  let value: unknown
  try {
    value = JSON.parse(line)
  } catch (cause) {
    throw new ArchiveBrokenError('has a line that is not JSON', '', { cause })
  }
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw new ArchiveBrokenError('has a line that is not an object')
  }
  return value as Fields
}

/** Whether entries come in the order that the form promises; then no name can come twice, and every parent is there. */
class OrderCheck {
  readonly #stack: { readonly path: EntryPath; last: string; isPastWhiteouts: boolean; whiteouts: Set<string> }[] = []

  check(entry: Entry): void {
    const { path } = entry
    if (path === ROOT) {
      if (this.#stack.length > 0 || entry.kind !== 'directory') throw wrongOrder(path)
      this.#enter(path)
      return
    }
    const { parent, name } = split(path)
    let level = this.#stack.at(-1)
    while (level !== undefined && level.path !== parent && isWithin(parent, level.path) === false) {
      this.#stack.pop()
      level = this.#stack.at(-1)
    }
    if (level === undefined || level.path !== parent) throw wrongOrder(path)
    const isWhiteout = entry.kind === 'whiteout'
    if (!isWhiteout && !level.isPastWhiteouts) {
      level.isPastWhiteouts = true
      level.last = ''
    }
    if (isWhiteout === level.isPastWhiteouts || name <= level.last || (!isWhiteout && level.whiteouts.has(name))) {
      throw wrongOrder(path)
    }
    level.last = name
    if (isWhiteout) level.whiteouts.add(name)
    if (entry.kind === 'directory') this.#enter(path)
  }

  #enter(path: EntryPath): void {
    this.#stack.push({ path, last: '', isPastWhiteouts: false, whiteouts: new Set() })
  }
}

function wrongOrder(path: EntryPath): LayerEntryRefusedError {
  return new LayerEntryRefusedError(path, 'it comes twice, or not where the form wants it')
}

class FieldReader {
  readonly #fields: Fields
  readonly path: EntryPath

  constructor(fields: Fields) {
    this.#fields = fields
    this.path = ROOT
    const path = this.text('path') as ByteString as EntryPath
    const problem = path === ROOT ? undefined : pathProblem(path)
    if (problem !== undefined) throw new LayerEntryRefusedError(path, problem)
    this.path = path
  }

  has(key: string): boolean {
    return this.#fields[key] !== undefined
  }

  wrong(key: string): LayerEntryRefusedError {
    return new LayerEntryRefusedError(this.path, `its field ${JSON.stringify(key)} is not what the form wants`)
  }

  text(key: string): ByteString {
    const value = this.#fields[key]
    if (typeof value !== 'string' || value.includes('\0')) throw this.wrong(key)
    return bytesOf(value)
  }

  number(key: string, max: number): number {
    return this.#checkNumber(key, this.#fields[key], max)
  }

  #checkNumber(key: string, value: unknown, max: number): number {
    if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < 0 || value > max) throw this.wrong(key)
    return value
  }

  mode(): number {
    const text = this.text('mode')
    if (!/^[0-7]{1,4}$/.test(text)) throw this.wrong('mode')
    return Number.parseInt(text, 8)
  }

  time(key: string): bigint {
    const text = this.text(key)
    if (!/^-?[0-9]{1,20}$/.test(text)) throw this.wrong(key)
    return BigInt(text)
  }

  bytes(key: string, text: unknown = this.#fields[key]): Buffer {
    if (typeof text !== 'string' || !/^[A-Za-z0-9+/]*={0,2}$/.test(text)) throw this.wrong(key)
    return Buffer.from(text, 'base64')
  }

  xattrs(): readonly Xattr[] {
    const list = this.#fields['xattrs']
    if (list === undefined) return []
    if (!Array.isArray(list)) throw this.wrong('xattrs')
    const xattrs = list.map((pair: unknown) => {
      if (!Array.isArray(pair) || typeof pair[0] !== 'string') throw this.wrong('xattrs')
      const name = bytesOf(pair[0])
      if (name === '' || name.length > 255 || name.includes('\0')) throw this.wrong('xattrs')
      return { name, value: this.bytes('xattrs', pair[1]) }
    })
    if (new Set(xattrs.map(({ name }) => name)).size !== xattrs.length) throw this.wrong('xattrs')
    return sortXattrs(xattrs)
  }

  device(): number {
    const value = this.#fields['device']
    if (!Array.isArray(value) || value.length !== 2) throw this.wrong('device')
    return makeDevice(this.#checkNumber('device', value[0], 0xfff), this.#checkNumber('device', value[1], 0xf_ffff))
  }
}

function itemOf(fields: Fields, rootFd: number, groups: Map<number, Entry>): LayerItem {
  const from = new FieldReader(fields)
  const { path } = from
  const kind = from.text('kind')
  if (kind === 'whiteout') {
    if (path === ROOT) throw from.wrong('kind')
    return {
      entry: { kind: 'whiteout', path, form: from.has('form') && from.text('form') === 'xattr' ? 'xattr' : 'device' },
    }
  }
  const meta: Meta = {
    mode: from.mode(),
    uid: from.number('uid', 0xffff_fffe),
    gid: from.number('gid', 0xffff_fffe),
    atimeNs: from.time('atime'),
    mtimeNs: from.time('mtime'),
    xattrs: from.xattrs(),
  }
  const group = from.has('group') ? from.number('group', Number.MAX_SAFE_INTEGER) : undefined
  const link = group === undefined ? {} : { linkGroup: String(group) }
  const protattr = from.has('protattr') ? { protattr: from.bytes('protattr') } : {}
  const entry = entryOf(from, kind, meta, link)
  const first = group === undefined ? undefined : groups.get(group)
  if (first !== undefined) checkSameInode(first, entry, from)
  else if (group !== undefined) groups.set(group, entry)
  const item: LayerItem = { entry, ...protattr }
  if (entry.kind !== 'file' || entry.metacopy !== undefined) return item
  if (from.has('data')) {
    const number = from.number('data', Number.MAX_SAFE_INTEGER)
    return { ...item, openContent: () => openData(rootFd, number, entry.sizeBytes) }
  }
  if (entry.sizeBytes > 0 && first === undefined) throw from.wrong('data')
  return item
}

function entryOf(from: FieldReader, kind: string, meta: Meta, link: { linkGroup?: string }): Entry {
  const { path } = from
  switch (kind) {
    case 'directory': {
      const redirect = from.has('redirect') ? { redirect: redirectOf(from) } : {}
      return { kind: 'directory', path, meta, opaque: from.has('opaque'), ...redirect }
    }
    case 'symlink': {
      const target = from.text('target')
      if (target === '' || target.length > 4095) throw from.wrong('target')
      return { kind: 'symlink', path, meta, target, ...link }
    }
    case 'fifo':
    case 'socket':
      return { kind: 'special', path, meta, type: kind, rdev: 0, ...link }
    case 'character':
    case 'block': {
      const rdev = from.device()
      if (kind === 'character' && rdev === 0) throw from.wrong('device')
      return { kind: 'special', path, meta, type: kind, rdev, ...link }
    }
    case 'file': {
      const sizeBytes = from.number('size', Number.MAX_SAFE_INTEGER)
      const file = { kind: 'file', path, meta, sizeBytes, ...link } as const
      if (!from.has('metacopy')) return file
      const value = from.bytes('metacopy')
      const digest = value.length === 0 ? {} : { digest: value }
      return { ...file, metacopy: { ...(from.has('redirect') ? { redirect: redirectOf(from) } : {}), ...digest } }
    }
    default:
      throw from.wrong('kind')
  }
}

function redirectOf(from: FieldReader) {
  const parsed = parseRedirect(Buffer.from(from.text('redirect'), 'latin1'))
  if (!parsed.ok) throw from.wrong('redirect')
  return parsed.redirect
}

function checkSameInode(first: Entry, entry: Entry, from: FieldReader): void {
  const isSame =
    first.kind === entry.kind &&
    (first.kind !== 'file' || entry.kind !== 'file' || first.sizeBytes === entry.sizeBytes) &&
    (first.kind !== 'special' || entry.kind !== 'special' || first.type === entry.type)
  if (!isSame) throw from.wrong('group')
}

function openData(rootFd: number, number: number, sizeBytes: number): OpenContent {
  const { bucket, name } = dataName(number)
  const path = `${DATA}/${bucket}` as ByteString
  const dirfd = openBeneath(rootFd, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
  try {
    const content = openRegular(dirfd, name)
    if (statFd(content.fd).sizeBytes === sizeBytes) return content
    close(content.fd)
    throw new ArchiveBrokenError('has a data file of the wrong size', `${path}/${name}`)
  } finally {
    close(dirfd)
  }
}
