import {
  type Backend,
  type BackendCall,
  type ByteRange,
  DIRECTORIES,
  describeFile,
  type FileKind,
  FileMissingError,
  type FileRef,
  FileTooLargeError,
  isFileName,
  type ListedFile,
  lengthToRead,
  MAX_FILE_BYTES,
} from './backend.ts'
import { BackendAnswerError, BackendDeniedError, RepositoryAddressError, withoutPassword } from './errors.ts'
import { type HttpAnswer, HttpClient, type HttpRequest, isTransientStatus, retryAfterMs } from './http.ts'
import { ListingLimit } from './listing.ts'
import { DEFAULT_IDLE_TIMEOUT_MS, REMOTE_SETTLE_MS, type RemoteOptions, Retries, TransientError } from './retries.ts'

const LISTING_V2 = 'application/vnd.x.restic.rest.v2'
const CONCURRENCY = 8
// Nearly three million packs, which of the usual 16 MiB are 45 TiB.
const MAX_LISTING_BYTES = 256 << 20
const MAX_MESSAGE_BYTES = 64 << 10

export interface RestOptions extends RemoteOptions {
  /** For servers that ask for it; what the address has goes before. */
  readonly username?: string | undefined
  readonly password?: string | undefined
  /** PEM of the certificates to trust instead of the authorities that Node knows. */
  readonly ca?: string | undefined
}

/**
 * A repository behind a server that speaks restic's REST protocol: rest-server, `rclone serve restic`.
 * Source: restic's reference, "REST Backend".
 */
export class RestBackend implements Backend {
  readonly location: string
  readonly concurrency: number
  readonly settleMs = REMOTE_SETTLE_MS
  readonly #options: RestOptions
  readonly #base: URL
  readonly #authorization: string | undefined
  readonly #client: HttpClient
  readonly #retries: Retries

  /** `address` is `https://user:password@host:port/path/`. @throws {RepositoryAddressError} */
  constructor(address: string, options: RestOptions = {}) {
    if (!/^https?:\/\//.test(address) || !URL.canParse(address)) {
      throw new RepositoryAddressError(`rest:${address}`, 'rest: is followed by http:// or https:// and a host')
    }
    this.#options = options
    const base = new URL(address)
    if (!base.pathname.endsWith('/')) base.pathname += '/'
    const username = decodeURIComponent(base.username) || (options.username ?? '')
    const password = decodeURIComponent(base.password) || (options.password ?? '')
    base.username = ''
    base.password = ''
    base.search = ''
    base.hash = ''
    this.#base = base
    this.location = `rest:${withoutPassword(base.href)}`
    this.concurrency = options.concurrency ?? CONCURRENCY
    this.#authorization =
      username === '' ? undefined : `Basic ${Buffer.from(`${username}:${password}`).toString('base64')}`
    this.#client = new HttpClient({
      location: this.location,
      idleTimeoutMs: options.idleTimeoutMs ?? DEFAULT_IDLE_TIMEOUT_MS,
      connections: this.concurrency,
      ca: options.ca,
    })
    this.#retries = new Retries(this.location, options)
  }

  async create({ signal }: BackendCall = {}): Promise<void> {
    const url = new URL('?create=true', this.#base)
    await this.#call('creating the repository', { method: 'POST', url, body: new Uint8Array(), signal })
  }

  async *list(kind: FileKind, { signal }: BackendCall = {}): AsyncGenerator<ListedFile> {
    if (kind === 'config') {
      const found = await this.stat({ kind, name: '' }, { signal })
      if (found !== undefined) yield { name: '', ...found }
      return
    }
    const what = `listing ${DIRECTORIES[kind]}`
    const answer = await this.#call(what, {
      method: 'GET',
      url: new URL(`${DIRECTORIES[kind]}/`, this.#base),
      headers: { Accept: LISTING_V2 },
      maxBodyBytes: MAX_LISTING_BYTES,
      accept: [404],
      signal,
    })
    // A server whose storage has no folders knows none that is empty.
    if (answer.status === 404) return
    const limit = new ListingLimit(what, this.location, this.#options)
    const isSized = answer.headers['content-type']?.startsWith(LISTING_V2) === true
    for (const element of jsonElements(answer.body, (reason) => new BackendAnswerError(what, this.location, reason))) {
      const { name, size } = isSized
        ? ((element ?? {}) as { name?: unknown; size?: unknown })
        : { name: element, size: 0 }
      if (typeof name !== 'string' || typeof size !== 'number' || !Number.isSafeInteger(size) || size < 0) {
        throw new BackendAnswerError(what, this.location, 'an entry of the list has no name or size')
      }
      limit.count(1)
      if (!isFileName(name)) continue
      const found = isSized ? { sizeBytes: size } : await this.stat({ kind, name }, { signal })
      if (found !== undefined) yield { name, ...found }
    }
  }

  async stat(file: FileRef, { signal }: BackendCall = {}): Promise<{ readonly sizeBytes: number } | undefined> {
    const what = `looking for ${describeFile(file)}`
    const { status, headers } = await this.#call(what, {
      method: 'HEAD',
      url: this.#urlOf(file),
      accept: [404],
      signal,
    })
    if (status === 404) return undefined
    const sizeBytes = Number(headers['content-length'])
    if (!Number.isSafeInteger(sizeBytes) || sizeBytes < 0) {
      throw new BackendAnswerError(what, this.location, 'it does not say how long the file is')
    }
    return { sizeBytes }
  }

  async get(file: FileRef, range?: ByteRange, { signal }: BackendCall = {}): Promise<Buffer> {
    const length = lengthToRead(file, this.location, range)
    if (range !== undefined && length === 0) {
      if ((await this.stat(file, { signal })) === undefined) throw new FileMissingError(file, this.location)
      return Buffer.alloc(0)
    }
    const what = `reading ${describeFile(file)}`
    const headers = range === undefined ? {} : { Range: `bytes=${range.offset}-${range.offset + length - 1}` }
    const request = { method: 'GET', url: this.#urlOf(file), headers, accept: [404, 416], signal } as const
    const limitBytes = MAX_FILE_BYTES[file.kind]
    const answer = await this.#call(what, { ...request, maxBodyBytes: limitBytes }).catch(async (error: unknown) => {
      if (!(error instanceof BackendAnswerError)) throw error
      const sizeBytes = (await this.stat(file, { signal }))?.sizeBytes ?? 0
      throw sizeBytes > limitBytes ? new FileTooLargeError(file, this.location, sizeBytes, limitBytes) : error
    })
    if (answer.status === 404) throw new FileMissingError(file, this.location)
    // The range begins at the end of the file or beyond it.
    if (answer.status === 416) return Buffer.alloc(0)
    if (range === undefined) return answer.body
    const start = answer.status === 206 ? 0 : range.offset
    return answer.body.subarray(start, start + length)
  }

  async put(
    file: FileRef,
    content: Uint8Array,
    { signal, exclusive }: BackendCall & { readonly exclusive?: boolean } = {},
  ): Promise<boolean> {
    if (exclusive === true && (await this.stat(file, { signal })) !== undefined) return false
    const what = `storing ${describeFile(file)}`
    const request = { method: 'POST', url: this.#urlOf(file), body: content, signal } as const
    const headers = { 'Content-Type': 'application/octet-stream' }
    const answer = await this.#call(what, { ...request, headers, accept: [403] })
    if (answer.status !== 403) return true
    // Servers that overwrite nothing say this of a file that is there, by an attempt of ours whose answer was lost too.
    const found = await this.stat(file, { signal })
    if (found === undefined) throw new BackendDeniedError(what, this.location)
    if (found.sizeBytes === content.length && (await this.get(file, undefined, { signal })).equals(content)) return true
    if (exclusive === true) return false
    await this.delete(file, { signal })
    await this.#call(what, { ...request, headers })
    return true
  }

  async delete(file: FileRef, { signal }: BackendCall = {}): Promise<boolean> {
    // Asked first, since a second attempt cannot tell whether the first one had removed it.
    if ((await this.stat(file, { signal })) === undefined) return false
    const url = this.#urlOf(file)
    await this.#call(`deleting ${describeFile(file)}`, { method: 'DELETE', url, accept: [404], signal })
    return true
  }

  async close(): Promise<void> {
    this.#client.close()
  }

  #urlOf({ kind, name }: FileRef): URL {
    return new URL(kind === 'config' ? 'config' : `${DIRECTORIES[kind]}/${name}`, this.#base)
  }

  /** The answer of a request that was carried out (2xx), or one that `accept` names. */
  #call(
    what: string,
    request: Omit<HttpRequest, 'maxBodyBytes'> & {
      readonly maxBodyBytes?: number
      readonly accept?: readonly number[]
    },
  ): Promise<HttpAnswer> {
    const { accept = [], maxBodyBytes = MAX_MESSAGE_BYTES } = request
    const headers = {
      ...request.headers,
      ...(this.#authorization === undefined ? {} : { Authorization: this.#authorization }),
    }
    return this.#retries.run(what, request.signal, async () => {
      const answer = await this.#client.send({ ...request, headers, maxBodyBytes })
      const { status } = answer
      if ((status >= 200 && status < 300) || accept.includes(status)) return answer
      const reason = `${status} ${firstWords(answer.body)}`.trim()
      if (isTransientStatus(status)) throw new TransientError(reason, { retryAfterMs: retryAfterMs(answer.headers) })
      this.#retries.sawAnswer()
      if (status === 401 || status === 403) {
        throw new BackendDeniedError(what, this.location, { cause: new Error(reason) })
      }
      if (status >= 300 && status < 400) {
        throw new BackendAnswerError(what, this.location, `it sends elsewhere, to ${answer.headers.location}`)
      }
      throw new Error(reason)
    })
  }
}

/** The beginning of what a server says in words. */
function firstWords(body: Buffer): string {
  return body
    .subarray(0, 200)
    .toString('latin1')
    .replaceAll(/[^ -~]+/g, ' ')
    .trim()
}

// Each element for itself: the array as a whole would take many times its text.
function* jsonElements(text: Buffer, invalid: (reason: string) => Error): Generator<unknown> {
  const [QUOTE, BACKSLASH, OPEN, CLOSE, OPEN_LIST, CLOSE_LIST, COMMA] = [...Buffer.from('"\\{}[],')]
  const isSpace = (byte: number | undefined) => byte === 0x20 || byte === 0x0a || byte === 0x0d || byte === 0x09
  let at = 0
  while (isSpace(text[at])) at++
  if (text.subarray(at).equals(Buffer.from('null')) || text.subarray(at).equals(Buffer.from('null\n'))) return
  if (text[at++] !== OPEN_LIST) throw invalid('it is no list')
  let depth = 0
  let isString = false
  let start = at
  for (; at < text.length; at++) {
    const byte = text[at]
    if (isString) {
      if (byte === BACKSLASH) at++
      else if (byte === QUOTE) isString = false
    } else if (byte === QUOTE) isString = true
    else if (byte === OPEN || byte === OPEN_LIST) depth++
    else if (depth > 0 && (byte === CLOSE || byte === CLOSE_LIST)) depth--
    else if (depth === 0 && (byte === COMMA || byte === CLOSE_LIST)) {
      const element = text.toString('utf8', start, at)
      start = at + 1
      if (element.trim() !== '' || byte === COMMA) yield parsed(element, invalid)
      if (byte === CLOSE_LIST) return
    }
  }
  throw invalid('the list does not end')
}

function parsed(text: string, invalid: (reason: string) => Error): unknown {
  try {
    return JSON.parse(text)
  } catch {
    throw invalid('the list is not JSON')
  }
}
