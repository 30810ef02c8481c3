import type { ByteString } from '@lsync/posix'
import { LsyncError, printable } from '@lsync/posix'
import type { Connection } from './connection.ts'
import { ConnectionLostError, ProtocolError } from './errors.ts'

// SFTP version 3 as OpenSSH speaks it, with names as bytes, which ssh2's own SFTP takes for UTF-8.
// Source: draft-ietf-secsh-filexfer-02, and OpenSSH's PROTOCOL file for the extensions.

const INIT = 1
const VERSION = 2
const STATUS = 101
const HANDLE = 102
const DATA = 103
const NAME = 104
const ATTRS = 105
const EXTENDED_REPLY = 201
const REQUEST = {
  open: 3,
  close: 4,
  read: 5,
  write: 6,
  lstat: 7,
  fstat: 8,
  setstat: 9,
  fsetstat: 10,
  opendir: 11,
  readdir: 12,
  remove: 13,
  mkdir: 14,
  rmdir: 15,
  realpath: 16,
  rename: 18,
  readlink: 19,
  symlink: 20,
  extended: 200,
} as const

const STATUS_OK = 0
const STATUS_EOF = 1
/** SSH_FX_*, by the errno that says the same; the server tells no more than `failure` for all others. */
const STATUS_CODES: Readonly<Record<number, { readonly code: string }>> = {
  2: { code: 'ENOENT' },
  3: { code: 'EACCES' },
  5: { code: 'SFTP_FAILURE' },
  6: { code: 'CONNECTION_LOST' },
  7: { code: 'CONNECTION_LOST' },
  8: { code: 'ENOTSUP' },
}

export const SFTP_READ = 1
export const SFTP_WRITE = 2
export const SFTP_CREATE = 8
export const SFTP_TRUNCATE = 16
export const SFTP_EXCLUSIVE = 32

const ATTR_SIZE = 1
const ATTR_OWNER = 2
const ATTR_MODE = 4
const ATTR_TIMES = 8

const MAX_PACKET_BYTES = 1 << 20
const MAX_NAMES = 100_000
const MAX_EXTENSIONS = 256
// As many as a server answers at once without being the one that waits; each holds a packet at most.
const MAX_OPEN = 256
const DEFAULT_WRITE_BYTES = 32 << 10
const MAX_WRITE_BYTES = 256 << 10

/** The server says no. `code` is an errno's name where SFTP has one for it. */
export class SftpError extends LsyncError {
  constructor(code: string, path: string, said: string) {
    super(code, `${printable(path)}: the SFTP server says: ${said}`, { path })
  }
}

export interface SftpAttributes {
  readonly sizeBytes?: number
  readonly uid?: number
  readonly gid?: number
  /** With the type. */
  readonly mode?: number
  /** Seconds since 1970; SFTP has nothing finer. */
  readonly mtime?: number
}

export interface SftpEntry {
  readonly name: ByteString
  readonly attributes: SftpAttributes
  /** How many names it has, where the server's line for people says so, as `ls -l` does (SFTP has no field for it). */
  readonly links?: number
}

type Reply = { readonly type: number; readonly body: Buffer }

interface Waiting {
  readonly resolve: (reply: Reply) => void
  readonly reject: (error: unknown) => void
}

type Part = number | ByteString | Buffer | Uint8Array | SftpAttributes | bigint

/**
 * The client's end of SFTP over any stream. Calls are pipelined: the server carries them out in the order in which they
 * were made, so a call may be made before the one that it builds on was answered. Believes nothing that the server says.
 */
export class SftpClient {
  readonly #connection: Connection
  readonly #extensions = new Map<string, string>()
  readonly #waiting = new Map<number, Waiting>()
  readonly #blocked: (() => void)[] = []
  #open = 0
  #nextId = 1
  #received: Buffer = Buffer.alloc(0)
  #failure: unknown
  #version: { resolve: () => void; reject: (error: unknown) => void } | undefined
  #heardAt = performance.now()
  #timer: NodeJS.Timeout | undefined
  #writeBytes = DEFAULT_WRITE_BYTES
  #isEnding = false

  private constructor(connection: Connection, timeoutMs: number) {
    this.#connection = connection
    const { readable, writable } = connection
    readable.on('data', (chunk: Buffer) => this.#push(chunk))
    for (const stream of new Set([readable, writable])) {
      stream.on('error', (error) => void this.#lose(error))
      stream.on('close', () => void this.#lose())
    }
    readable.on('end', () => void this.#lose())
    this.#timer = setInterval(() => {
      const isWaiting = this.#waiting.size > 0 || this.#version !== undefined
      if (!isWaiting) this.#heardAt = performance.now()
      else if (performance.now() - this.#heardAt > timeoutMs) {
        this.#fail(new ConnectionLostError(`nothing came for ${Math.round(timeoutMs / 1000)} s`))
      }
    }, timeoutMs / 4)
  }

  /** @throws {ProtocolError} if what answers does not speak SFTP version 3 */
  static async start(connection: Connection, timeoutMs: number): Promise<SftpClient> {
    const client = new SftpClient(connection, timeoutMs)
    await new Promise<void>((resolve, reject) => {
      client.#version = { resolve, reject }
      connection.writable.write(Buffer.from([0, 0, 0, 5, INIT, 0, 0, 0, 3]))
    })
    client.#version = undefined
    if (client.has('limits@openssh.com')) await client.#askLimits()
    return client
  }

  /** Whether the server knows an extension. */
  has(extension: string): boolean {
    return this.#extensions.has(extension)
  }

  /** What ended the connection, once it has. */
  get failure(): unknown {
    return this.#failure
  }

  /** Of one write. */
  get writeBytes(): number {
    return this.#writeBytes
  }

  async open(path: ByteString, flags: number, mode = 0o600): Promise<Buffer> {
    return handleOf(await this.#call(REQUEST.open, path, path, flags, { mode }), path)
  }

  async close(handle: Buffer): Promise<void> {
    await this.#done(REQUEST.close, '', handle)
  }

  /** Bytes at an offset; fewer than asked for only at the end of the file. */
  async read(handle: Buffer, offset: number, length: number): Promise<Buffer> {
    const parts: Buffer[] = []
    let done = 0
    while (done < length) {
      const size = Math.min(length - done, this.#writeBytes)
      const reply = await this.#call(REQUEST.read, '', handle, BigInt(offset + done), size)
      if (reply.type === STATUS && reply.body.length >= 4 && reply.body.readUInt32BE(0) === STATUS_EOF) break
      expectType(reply, DATA, '')
      const bytes = new PacketReader(reply.body).bytes(size)
      if (bytes.length === 0) break
      parts.push(bytes)
      done += bytes.length
    }
    return Buffer.concat(parts)
  }

  /** At most `writeBytes`. */
  async write(handle: Buffer, offset: number, bytes: Uint8Array, path: string): Promise<void> {
    await this.#done(REQUEST.write, path, handle, BigInt(offset), bytes)
  }

  /** `undefined` where there is nothing. */
  async lstat(path: ByteString): Promise<SftpAttributes | undefined> {
    try {
      return attributesOf(await this.#call(REQUEST.lstat, path, path), path)
    } catch (error) {
      if (error instanceof SftpError && error.code === 'ENOENT') return undefined
      throw error
    }
  }

  async fstat(handle: Buffer, path: string): Promise<SftpAttributes> {
    return attributesOf(await this.#call(REQUEST.fstat, path, handle), path)
  }

  /** Follows a symlink at the end of `path`. */
  setstat(path: ByteString, attributes: SftpAttributes): Promise<void> {
    return this.#done(REQUEST.setstat, path, path, attributes)
  }

  /** With `lsetstat@openssh.com`: of a symlink itself. */
  lsetstat(path: ByteString, attributes: SftpAttributes): Promise<void> {
    return this.#done(REQUEST.extended, path, 'lsetstat@openssh.com' as ByteString, path, attributes)
  }

  fsetstat(handle: Buffer, attributes: SftpAttributes, path: string): Promise<void> {
    return this.#done(REQUEST.fsetstat, path, handle, attributes)
  }

  /** Every name but `.` and `..`. */
  async readdir(path: ByteString): Promise<SftpEntry[]> {
    const entries: SftpEntry[] = []
    for await (const some of this.readdirInParts(path)) {
      for (const entry of some) entries.push(entry)
      if (entries.length > MAX_NAMES * 100) throw new ProtocolError('a directory without end')
    }
    return entries
  }

  /** The same as the server sends it, some names at a time, so that whoever asks can stop. */
  async *readdirInParts(path: ByteString): AsyncGenerator<SftpEntry[]> {
    const handle = handleOf(await this.#call(REQUEST.opendir, path, path), path)
    try {
      for (;;) {
        const reply = await this.#call(REQUEST.readdir, path, handle)
        if (reply.type === STATUS && reply.body.length >= 4 && reply.body.readUInt32BE(0) === STATUS_EOF) return
        expectType(reply, NAME, path)
        const entries = [...new PacketReader(reply.body).names()]
        yield entries.filter(({ name }) => name !== '.' && name !== '..')
      }
    } finally {
      await this.close(handle)
    }
  }

  remove(path: ByteString): Promise<void> {
    return this.#done(REQUEST.remove, path, path)
  }

  mkdir(path: ByteString, mode: number): Promise<void> {
    return this.#done(REQUEST.mkdir, path, path, { mode })
  }

  rmdir(path: ByteString): Promise<void> {
    return this.#done(REQUEST.rmdir, path, path)
  }

  /** The path without symlinks, absolute. */
  async realpath(path: ByteString): Promise<ByteString> {
    return this.#oneName(REQUEST.realpath, path)
  }

  async readlink(path: ByteString): Promise<ByteString> {
    return this.#oneName(REQUEST.readlink, path)
  }

  async #oneName(type: number, path: ByteString): Promise<ByteString> {
    const reply = await this.#call(type, path, path)
    expectType(reply, NAME, path)
    const [entry] = new PacketReader(reply.body).names()
    if (entry === undefined) throw new ProtocolError('a name that is none')
    return entry.name
  }

  /** Replaces what is there with `posix-rename@openssh.com`; fails on it without. */
  rename(from: ByteString, to: ByteString): Promise<void> {
    return this.has('posix-rename@openssh.com')
      ? this.#done(REQUEST.extended, to, 'posix-rename@openssh.com' as ByteString, from, to)
      : this.#done(REQUEST.rename, to, from, to)
  }

  /** Needs `hardlink@openssh.com`. */
  hardlink(existing: ByteString, path: ByteString): Promise<void> {
    return this.#done(REQUEST.extended, path, 'hardlink@openssh.com' as ByteString, existing, path)
  }

  /** Needs `fsync@openssh.com`. */
  fsync(handle: Buffer, path: string): Promise<void> {
    return this.#done(REQUEST.extended, path, 'fsync@openssh.com' as ByteString, handle)
  }

  /** Needs `copy-data`: the server copies all of one file to another. */
  copyData(from: Buffer, to: Buffer, path: string): Promise<void> {
    return this.#done(REQUEST.extended, path, 'copy-data' as ByteString, from, 0n, 0n, to, 0n)
  }

  symlink(target: ByteString, path: ByteString): Promise<void> {
    // OpenSSH has the two in the wrong order, and everybody follows it.
    return this.#done(REQUEST.symlink, path, target, path)
  }

  /** Ends the connection in order. */
  end(): void {
    this.#isEnding = true
    this.#fail(new ConnectionLostError('it was closed'))
  }

  async #askLimits(): Promise<void> {
    const reply = await this.#call(REQUEST.extended, '', 'limits@openssh.com' as ByteString)
    if (reply.type !== EXTENDED_REPLY || reply.body.length < 24) return
    const write = Number(reply.body.readBigUInt64BE(16))
    const read = Number(reply.body.readBigUInt64BE(8))
    const least = Math.min(write || DEFAULT_WRITE_BYTES, read || DEFAULT_WRITE_BYTES)
    this.#writeBytes = Math.max(DEFAULT_WRITE_BYTES, Math.min(least, MAX_WRITE_BYTES))
  }

  async #done(type: number, path: string, ...parts: Part[]): Promise<void> {
    expectType(await this.#call(type, path, ...parts), undefined, path)
  }

  async #call(type: number, path: string, ...parts: Part[]): Promise<Reply> {
    if (this.#open >= MAX_OPEN) await new Promise<void>((resume) => this.#blocked.push(resume))
    if (this.#failure !== undefined) throw this.#failure
    this.#open++
    try {
      const reply = await this.#send(type, parts)
      if (reply.type === STATUS) throwStatus(reply, path)
      return reply
    } finally {
      this.#open--
      this.#blocked.shift()?.()
    }
  }

  async #send(type: number, parts: readonly Part[]): Promise<Reply> {
    const id = this.#nextId
    this.#nextId = id === 0xffff_ffff ? 1 : id + 1
    const reply = new Promise<Reply>((resolve, reject) => this.#waiting.set(id, { resolve, reject }))
    const buffers = parts.map(encodePart)
    const length = buffers.reduce((sum, buffer) => sum + buffer.length, 5)
    const head = Buffer.allocUnsafe(9)
    head.writeUInt32BE(length, 0)
    head[4] = type
    head.writeUInt32BE(id, 5)
    this.#connection.writable.write(Buffer.concat([head, ...buffers]))
    return reply
  }

  #push(chunk: Buffer): void {
    if (this.#failure !== undefined) return
    this.#heardAt = performance.now()
    try {
      this.#received = this.#received.length === 0 ? chunk : Buffer.concat([this.#received, chunk])
      let at = 0
      while (this.#received.length - at >= 4) {
        const length = this.#received.readUInt32BE(at)
        if (length < 5 || length > MAX_PACKET_BYTES) throw new ProtocolError(`an SFTP packet of ${length} bytes`)
        if (this.#received.length - at - 4 < length) break
        this.#packet(this.#received.subarray(at + 4, at + 4 + length))
        at += 4 + length
      }
      this.#received = this.#received.subarray(at)
    } catch (error) {
      this.#fail(error)
    }
  }

  #packet(packet: Buffer): void {
    const type = packet[0] as number
    if (this.#version !== undefined && type === VERSION) {
      if (packet.readUInt32BE(1) !== 3) throw new ProtocolError('another version of SFTP')
      const reader = new PacketReader(packet.subarray(5))
      for (let i = 0; !reader.isAtEnd; i++) {
        if (i > MAX_EXTENSIONS) throw new ProtocolError('extensions without end')
        this.#extensions.set(reader.text(), reader.text())
      }
      this.#version.resolve()
      return
    }
    const id = packet.readUInt32BE(1)
    const waiting = this.#waiting.get(id)
    if (waiting === undefined) throw new ProtocolError('an SFTP answer to nothing')
    this.#waiting.delete(id)
    waiting.resolve({ type, body: packet.subarray(5) })
  }

  async #lose(cause?: Error): Promise<void> {
    if (this.#failure !== undefined) return
    const reason = await this.#connection.explain()
    this.#fail(reason ?? new ConnectionLostError(cause?.message ?? 'it was closed from the other side', { cause }))
  }

  #fail(error: unknown): void {
    if (this.#failure !== undefined) return
    this.#failure = error
    clearInterval(this.#timer)
    this.#version?.reject(error)
    for (const { reject } of this.#waiting.values()) reject(error)
    this.#waiting.clear()
    for (const resume of this.#blocked.splice(0)) resume()
    if (this.#isEnding) this.#connection.writable.end()
    else this.#connection.destroy()
  }
}

function encodePart(part: Part): Buffer {
  if (typeof part === 'number') {
    const bytes = Buffer.allocUnsafe(4)
    bytes.writeUInt32BE(part)
    return bytes
  }
  if (typeof part === 'bigint') {
    const bytes = Buffer.allocUnsafe(8)
    bytes.writeBigUInt64BE(part)
    return bytes
  }
  if (typeof part === 'string') return encodePart(Buffer.from(part, 'latin1'))
  if (part instanceof Uint8Array) {
    const length = Buffer.allocUnsafe(4)
    length.writeUInt32BE(part.length)
    return Buffer.concat([length, part])
  }
  return encodeAttributes(part)
}

function encodeAttributes({ sizeBytes, uid, gid, mode, mtime }: SftpAttributes): Buffer {
  let flags = 0
  const numbers: (number | bigint)[] = []
  if (sizeBytes !== undefined) {
    flags |= ATTR_SIZE
    numbers.push(BigInt(sizeBytes))
  }
  if (uid !== undefined && gid !== undefined) {
    flags |= ATTR_OWNER
    numbers.push(uid, gid)
  }
  if (mode !== undefined) {
    flags |= ATTR_MODE
    numbers.push(mode)
  }
  if (mtime !== undefined) {
    flags |= ATTR_TIMES
    numbers.push(mtime, mtime)
  }
  return Buffer.concat([flags, ...numbers].map(encodePart))
}

function expectType({ type, body }: Reply, expected: number | undefined, path: string): void {
  if (expected === undefined ? type === STATUS : type === expected) return
  if (type === STATUS) throwStatus({ type, body }, path)
  throw new ProtocolError(`an SFTP answer of type ${type}`, { path })
}

/** Throws what a status says went wrong; the end of a file or directory is none of that. */
function throwStatus({ body }: Reply, path: string): void {
  const reader = new PacketReader(body)
  const status = reader.number()
  if (status === STATUS_OK || status === STATUS_EOF) return
  const code = STATUS_CODES[status]?.code ?? 'SFTP_FAILURE'
  const said = reader.isAtEnd ? `status ${status}` : printable(reader.text().slice(0, 200))
  if (code === 'CONNECTION_LOST') throw new ConnectionLostError(said)
  throw new SftpError(code, path, said)
}

function handleOf(reply: Reply, path: string): Buffer {
  expectType(reply, HANDLE, path)
  return Buffer.from(new PacketReader(reply.body).bytes(256))
}

function attributesOf(reply: Reply, path: string): SftpAttributes {
  expectType(reply, ATTRS, path)
  return new PacketReader(reply.body).attributes()
}

class PacketReader {
  readonly #bytes: Buffer
  #at = 0

  constructor(bytes: Buffer) {
    this.#bytes = bytes
  }

  get isAtEnd(): boolean {
    return this.#at >= this.#bytes.length
  }

  number(): number {
    if (this.#bytes.length - this.#at < 4) throw new ProtocolError('an SFTP answer that is cut short')
    this.#at += 4
    return this.#bytes.readUInt32BE(this.#at - 4)
  }

  bytes(limit: number): Buffer {
    const length = this.number()
    if (length > limit || length > this.#bytes.length - this.#at) throw new ProtocolError(`a string of ${length} bytes`)
    this.#at += length
    return this.#bytes.subarray(this.#at - length, this.#at)
  }

  text(): string {
    return this.bytes(MAX_PACKET_BYTES).toString('latin1')
  }

  attributes(): SftpAttributes {
    const flags = this.number()
    const size = (flags & ATTR_SIZE) === 0 ? undefined : this.number() * 0x1_0000_0000 + this.number()
    const owner = (flags & ATTR_OWNER) === 0 ? undefined : { uid: this.number(), gid: this.number() }
    const mode = (flags & ATTR_MODE) === 0 ? undefined : this.number()
    const times = (flags & ATTR_TIMES) === 0 ? undefined : [this.number(), this.number()]
    if (flags >= 0x8000_0000) for (let count = this.number(); count > 0; count--) void [this.text(), this.text()]
    return {
      ...(size === undefined ? {} : { sizeBytes: size }),
      ...owner,
      ...(mode === undefined ? {} : { mode }),
      ...(times === undefined ? {} : { mtime: times[1] as number }),
    }
  }

  *names(): Generator<SftpEntry> {
    const count = this.number()
    if (count > MAX_NAMES) throw new ProtocolError(`${count} names at once`)
    for (let i = 0; i < count; i++) {
      const name = this.text() as ByteString
      const links = /^[-a-zA-Z+.@]{10,11} +(\d{1,9}) /.exec(this.text())?.[1]
      const attributes = this.attributes()
      yield links === undefined ? { name, attributes } : { name, attributes, links: Number(links) }
    }
  }
}
