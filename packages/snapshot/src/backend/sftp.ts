import { type ByteString, bytesOf, printable, randomHex } from '@lsync/posix'
import {
  ConnectError,
  type Connection,
  ConnectionLostError,
  SFTP_CREATE,
  SFTP_READ,
  SFTP_TRUNCATE,
  SFTP_WRITE,
  SftpClient,
  SftpError,
  SshConnections,
  type SshOptions,
  spawnRemote,
} from '@lsync/ssh'
import {
  type Backend,
  type BackendCall,
  type ByteRange,
  DIRECTORIES,
  describeFile,
  type FileKind,
  FileMissingError,
  type FileRef,
  type ListedFile,
  lengthToRead,
  pathOf,
} from './backend.ts'
import { BackendAnswerError, BackendDeniedError, RepositoryAddressError } from './errors.ts'
import { ListingLimit, listedAt } from './listing.ts'
import { DEFAULT_IDLE_TIMEOUT_MS, REMOTE_SETTLE_MS, type RemoteOptions, Retries, TransientError } from './retries.ts'

const CONCURRENCY = 8
const TEMPORARY_PREFIX = '.lsync-'
const DIRECTORY_MODE = 0o700
const FILE_MODE = 0o600
// Requests of one file on their way at a time. OpenSSH takes 255 KiB in one, so that is 16 MiB.
const PIECES_AT_ONCE = 64
const DIRECTORIES_AT_ONCE = 8

export interface SftpOptions extends RemoteOptions {
  /** Keys and known_hosts. */
  readonly ssh?: SshOptions | undefined
  /** A program that is started instead of ssh2, with its arguments: `ssh -J jump`. */
  readonly rsh?: string | undefined
}

/** Where on which machine a repository lies. */
export interface SftpAddress {
  readonly user: string | undefined
  /** Name or number; an IPv6 address without brackets. */
  readonly host: string
  readonly port: number | undefined
  /** Absolute, or relative to the directory that the login leads to; without a slash at its end. */
  readonly path: ByteString
}

/**
 * Reads what restic's addresses have behind `sftp:`: `user@host:path`, or `//user@host:port/path`, in which a path that
 * begins with another slash is absolute.
 * @throws {RepositoryAddressError}
 */
export function parseSftpAddress(text: string): SftpAddress {
  const invalid = (why: string) => new RepositoryAddressError(`sftp:${text}`, why)
  const isUrl = text.startsWith('//')
  const form = isUrl
    ? /^\/\/(?:([^@/]*)@)?(\[[^\]/]*\]|[^:/@[\]]*)(?::(\d+))?\/(.*)$/s
    : /^(?:([^@/]*)@)?(\[[^\]/]*\]|[^:/@[\]]*)()?:(.*)$/s
  const [, user, host = '', port, path = ''] = form.exec(text) ?? []
  if (host === '') throw invalid('a host and a path are needed')
  if (user?.includes(':') === true) throw invalid('a password does not belong into an address')
  const bare = host.replace(/^\[|\]$/g, '')
  // What could be taken for an option of ssh is none.
  if (!/^[A-Za-z0-9_:][A-Za-z0-9._:%-]*$/.test(bare)) throw invalid('no such host name')
  if (user !== undefined && !/^[A-Za-z0-9_][A-Za-z0-9._+-]*\$?$/.test(user)) throw invalid('no such user name')
  if (port !== undefined && (Number(port) < 1 || Number(port) > 65535)) throw invalid('no such port')
  if (isUrl && /%(?![0-9A-Fa-f]{2})/.test(path)) throw invalid('a % is not followed by two hex digits')
  const bytes = bytesOf(path)
  const decoded = isUrl
    ? bytes.replace(/%([0-9A-Fa-f]{2})/g, (_, hex: string) => String.fromCharCode(Number.parseInt(hex, 16)))
    : bytes
  if (decoded === '' || decoded.includes('\0')) throw invalid('a path is needed')
  return {
    user,
    host: bare,
    port: port === undefined ? undefined : Number(port),
    path: decoded.replace(/(?<=[^/])\/+$/, '') as ByteString,
  }
}

/** A repository on a machine that is reached by ssh, of which nothing but its SFTP server is used. */
export class SftpBackend implements Backend {
  readonly location: string
  readonly concurrency: number
  readonly settleMs = REMOTE_SETTLE_MS
  readonly #address: SftpAddress
  readonly #options: SftpOptions
  readonly #connections: SshConnections
  readonly #retries: Retries
  readonly #closing = new AbortController()
  #client: Promise<SftpClient> | undefined

  /** @throws {RepositoryAddressError} */
  constructor(address: string, options: SftpOptions = {}) {
    this.#address = parseSftpAddress(address)
    this.#options = options
    this.#connections = new SshConnections(options.ssh)
    const { user, host, port, path } = this.#address
    const place = host.includes(':') ? `[${host}]` : host
    const where = `${user === undefined ? '' : `${user}@`}${place}${port === undefined ? '' : `:${port}`}`
    this.location = `sftp://${where}/${printable(path)}`
    this.concurrency = options.concurrency ?? CONCURRENCY
    this.#retries = new Retries(this.location, options)
  }

  async create({ signal }: BackendCall = {}): Promise<void> {
    await this.#call('creating the repository', signal, async (client) => {
      await makeDirectories(client, this.#address.path)
      await Promise.all(Object.values(DIRECTORIES).map((name) => makeDirectory(client, this.#path(name))))
      const there = new Set((await client.readdir(this.#path(DIRECTORIES.pack))).map(({ name }) => name))
      const names = Array.from({ length: 256 }, (_, i) => i.toString(16).padStart(2, '0') as ByteString)
      const missing = names.filter((name) => !there.has(name))
      await Promise.all(missing.map((name) => makeDirectory(client, this.#path(`${DIRECTORIES.pack}/${name}`))))
    })
  }

  async *list(kind: FileKind, { signal }: BackendCall = {}): AsyncGenerator<ListedFile> {
    if (kind === 'config') {
      const found = await this.stat({ kind, name: '' }, { signal })
      if (found !== undefined) yield { name: '', ...found }
      return
    }
    const limit = new ListingLimit(`listing ${DIRECTORIES[kind]}`, this.location, this.#options)
    if (kind !== 'pack') {
      yield* await this.#names(kind, '', limit, signal)
      return
    }
    const folders = await this.#folders(limit, signal)
    for (let at = 0; at < folders.length; at += DIRECTORIES_AT_ONCE) {
      const some = folders.slice(at, at + DIRECTORIES_AT_ONCE)
      const lists = await Promise.all(some.map((folder) => this.#names(kind, `${folder}/`, limit, signal)))
      for (const list of lists) yield* list
    }
  }

  async stat(file: FileRef, { signal }: BackendCall = {}): Promise<{ readonly sizeBytes: number } | undefined> {
    const what = `looking for ${describeFile(file)}`
    const found = await this.#call(what, signal, (client) => client.lstat(this.#path(pathOf(file))))
    return found === undefined ? undefined : { sizeBytes: this.#sizeOf(found.sizeBytes, what) }
  }

  async get(file: FileRef, range?: ByteRange, { signal }: BackendCall = {}): Promise<Buffer> {
    const what = `reading ${describeFile(file)}`
    const content = await this.#call(what, signal, async (client) => {
      const handle = await client.open(this.#path(pathOf(file)), SFTP_READ).catch((error: unknown) => {
        if (error instanceof SftpError && error.code === 'ENOENT') return undefined
        throw error
      })
      if (handle === undefined) return undefined
      try {
        const { sizeBytes } = await client.fstat(handle, pathOf(file))
        const length = lengthToRead(file, this.location, range, this.#sizeOf(sizeBytes, what))
        return await readPieces(client, handle, range?.offset ?? 0, length, signal)
      } finally {
        await client.close(handle)
      }
    })
    if (content === undefined) throw new FileMissingError(file, this.location)
    return content
  }

  async put(
    file: FileRef,
    content: Uint8Array,
    { signal, exclusive }: BackendCall & { readonly exclusive?: boolean } = {},
  ): Promise<boolean> {
    const path = pathOf(file)
    const directory = path.includes('/') ? path.slice(0, path.lastIndexOf('/') + 1) : ''
    // One name for all attempts, so that those that were cut off leave nothing.
    const temporary = this.#path(`${directory}${TEMPORARY_PREFIX}${randomHex(8)}`)
    const target = this.#path(path)
    if (exclusive === true && (await this.stat(file, { signal })) !== undefined) return false
    try {
      return await this.#call(`storing ${describeFile(file)}`, signal, async (client) => {
        const handle = await openNew(client, temporary, this.#path(directory))
        try {
          await writePieces(client, handle, content, signal)
          const { sizeBytes } = await client.fstat(handle, temporary)
          // Servers have been seen to answer yes to writes on a full disk.
          if (sizeBytes !== content.length) throw new Error(`the server kept ${sizeBytes} of ${content.length} bytes`)
          await syncIfKnown(client, handle, path)
          if (exclusive === true && !(await publishNew(client, temporary, target))) {
            // An attempt of ours whose answer was lost may have been the first.
            return (await this.get(file, undefined, { signal })).equals(content)
          }
          if (exclusive !== true) await publish(client, temporary, target)
          // SFTP cannot sync a directory. On journalling file systems this carries the new name to the disk, too.
          await syncIfKnown(client, handle, path)
        } finally {
          await client.close(handle)
        }
        return true
      })
    } catch (error) {
      const client = await this.#client?.catch(() => undefined)
      await client?.remove(temporary).catch(() => undefined)
      throw error
    }
  }

  async delete(file: FileRef, { signal }: BackendCall = {}): Promise<boolean> {
    // Asked first, since a second attempt cannot tell whether the first one had removed it.
    if ((await this.stat(file, { signal })) === undefined) return false
    await this.#call(`deleting ${describeFile(file)}`, signal, (client) => removed(client, this.#path(pathOf(file))))
    return true
  }

  async close(): Promise<void> {
    // What is still being connected is given up.
    this.#closing.abort()
    const client = await this.#client?.catch(() => undefined)
    client?.end()
  }

  async #folders(limit: ListingLimit, signal: AbortSignal | undefined): Promise<string[]> {
    const entries = await this.#entries(DIRECTORIES.pack, limit, signal)
    return entries.map(({ name }) => name).filter((name) => /^[0-9a-f]{2}$/.test(name))
  }

  async #names(
    kind: Exclude<FileKind, 'config'>,
    folder: string,
    limit: ListingLimit,
    signal: AbortSignal | undefined,
  ): Promise<ListedFile[]> {
    const entries = await this.#entries(`${DIRECTORIES[kind]}/${folder}`, limit, signal)
    return entries.flatMap(({ name, sizeBytes }) => listedAt(kind, `${folder}${name}`, sizeBytes) ?? [])
  }

  /** What is in a directory; nothing in one that is not there. */
  #entries(
    directory: string,
    limit: ListingLimit,
    signal: AbortSignal | undefined,
  ): Promise<{ readonly name: string; readonly sizeBytes: number }[]> {
    return this.#call(`listing ${directory}`, signal, async (client) => {
      const found: { name: string; sizeBytes: number }[] = []
      try {
        for await (const some of client.readdirInParts(this.#path(directory))) {
          signal?.throwIfAborted()
          // Empty parts without end count, too.
          limit.count(1 + some.length)
          for (const { name, attributes } of some) found.push({ name, sizeBytes: attributes.sizeBytes ?? -1 })
        }
      } catch (error) {
        if (!(error instanceof SftpError && error.code === 'ENOENT')) throw error
      }
      return found
    })
  }

  #path(path: string): ByteString {
    return `${this.#address.path === '/' ? '' : this.#address.path}/${path}`.replace(/\/+$/, '') as ByteString
  }

  #sizeOf(sizeBytes: number | undefined, what: string): number {
    if (sizeBytes !== undefined && Number.isSafeInteger(sizeBytes) && sizeBytes >= 0) return sizeBytes
    throw new BackendAnswerError(what, this.location, 'it does not say how long the file is')
  }

  #call<T>(what: string, signal: AbortSignal | undefined, attempt: (client: SftpClient) => Promise<T>): Promise<T> {
    return this.#retries.run(what, signal, async () => {
      const connecting = this.#connect()
      try {
        return await orAborted(
          connecting.then((client) => attempt(client)),
          signal,
        )
      } catch (error) {
        if (error instanceof ConnectionLostError || error instanceof ConnectError) {
          if (this.#client === connecting) this.#client = undefined
          throw new TransientError(error.message, { cause: error })
        }
        this.#retries.sawAnswer()
        if (!(error instanceof SftpError)) throw error
        if (error.code === 'EACCES') throw new BackendDeniedError(what, this.location, { cause: error })
        throw new Error(error.message, { cause: error })
      }
    })
  }

  #connect(): Promise<SftpClient> {
    this.#client ??= this.#open()
    return this.#client
  }

  async #open(): Promise<SftpClient> {
    const address = { ...this.#address, scheme: 'sftp' as const }
    const { rsh, idleTimeoutMs = DEFAULT_IDLE_TIMEOUT_MS } = this.#options
    const { signal } = this.#closing
    const connection: Connection =
      rsh === undefined
        ? await this.#connections.subsystem(address, 'sftp', signal)
        : spawnRemote(rsh, address, { subsystem: 'sftp' }, signal)
    return SftpClient.start(connection, idleTimeoutMs)
  }
}

/** The promise, or the signal's reason, whichever comes first. What was begun goes on by itself. */
async function orAborted<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return promise
  const { promise: aborted, reject } = Promise.withResolvers<never>()
  const abort = () => reject(signal.reason)
  signal.addEventListener('abort', abort, { once: true })
  try {
    return await Promise.race([promise, aborted])
  } finally {
    signal.removeEventListener('abort', abort)
  }
}

async function makeDirectories(client: SftpClient, path: ByteString): Promise<void> {
  if ((await client.lstat(path)) !== undefined) return
  const slash = path.lastIndexOf('/')
  if (slash > 0) await makeDirectories(client, path.slice(0, slash) as ByteString)
  await makeDirectory(client, path)
}

async function makeDirectory(client: SftpClient, path: ByteString): Promise<void> {
  try {
    await client.mkdir(path, DIRECTORY_MODE)
  } catch (error) {
    // SFTP has no word for a name that is taken.
    if (!(error instanceof SftpError) || (await client.lstat(path)) === undefined) throw error
  }
}

async function openNew(client: SftpClient, path: ByteString, directory: ByteString): Promise<Buffer> {
  const flags = SFTP_WRITE | SFTP_CREATE | SFTP_TRUNCATE
  try {
    return await client.open(path, flags, FILE_MODE)
  } catch (error) {
    if (!(error instanceof SftpError) || error.code !== 'ENOENT') throw error
    // Other tools make the folders of packs when they need them.
    await makeDirectories(client, directory)
    return await client.open(path, flags, FILE_MODE)
  }
}

async function writePieces(
  client: SftpClient,
  handle: Buffer,
  content: Uint8Array,
  signal: AbortSignal | undefined,
): Promise<void> {
  await inPieces(content.length, client.writeBytes, signal, (offset, length) =>
    client.write(handle, offset, content.subarray(offset, offset + length), ''),
  )
}

/** What is there of a range; less where the file ends meanwhile. */
async function readPieces(
  client: SftpClient,
  handle: Buffer,
  offset: number,
  length: number,
  signal: AbortSignal | undefined,
): Promise<Buffer> {
  const content = Buffer.allocUnsafeSlow(length)
  let end = length
  await inPieces(length, client.writeBytes, signal, async (at, size) => {
    const piece = await client.read(handle, offset + at, size)
    piece.copy(content, at)
    if (piece.length < size) end = Math.min(end, at + piece.length)
  })
  return content.subarray(0, end)
}

async function inPieces(
  length: number,
  pieceBytes: number,
  signal: AbortSignal | undefined,
  use: (offset: number, length: number) => Promise<void>,
): Promise<void> {
  let next = 0
  const work = async () => {
    while (next < length) {
      signal?.throwIfAborted()
      const offset = next
      next += pieceBytes
      await use(offset, Math.min(pieceBytes, length - offset))
    }
  }
  await Promise.all(Array.from({ length: Math.min(PIECES_AT_ONCE, Math.ceil(length / pieceBytes)) }, work))
}

async function syncIfKnown(client: SftpClient, handle: Buffer, path: string): Promise<void> {
  if (client.has('fsync@openssh.com')) await client.fsync(handle, path)
}

async function publish(client: SftpClient, temporary: ByteString, path: ByteString): Promise<void> {
  try {
    await client.rename(temporary, path)
  } catch (error) {
    if (!(error instanceof SftpError) || client.has('posix-rename@openssh.com')) throw error
    // SFTP's own rename does not replace.
    await removed(client, path)
    await client.rename(temporary, path)
  }
}

/** `false` when something has the name. Without hard links there, two at the same moment may both succeed. */
async function publishNew(client: SftpClient, temporary: ByteString, path: ByteString): Promise<boolean> {
  const canLink = client.has('hardlink@openssh.com')
  try {
    if (canLink) await client.hardlink(temporary, path)
    else if ((await client.lstat(path)) === undefined) await client.rename(temporary, path)
    else throw new SftpError('SFTP_FAILURE', path, 'it is there')
  } catch (error) {
    if (!(error instanceof SftpError) || (await client.lstat(path)) === undefined) throw error
    await removed(client, temporary)
    return false
  }
  if (canLink) await removed(client, temporary)
  return true
}

async function removed(client: SftpClient, path: ByteString): Promise<void> {
  try {
    await client.remove(path)
  } catch (error) {
    if (!(error instanceof SftpError && error.code === 'ENOENT')) throw error
  }
}
