import { Agent as HttpAgent } from 'node:http'
import { Agent as HttpsAgent } from 'node:https'
import { type Readable, Transform } from 'node:stream'
import type * as Sdk from '@aws-sdk/client-s3'
import { LsyncError } from '@lsync/posix'
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
  type ListedFile,
  lengthToRead,
  MAX_FILE_BYTES,
  pathOf,
} from './backend.ts'
import { BackendAnswerError, BackendDeniedError, RepositoryAddressError } from './errors.ts'
import { isTransientStatus } from './http.ts'
import { ListingLimit, listedAt } from './listing.ts'
import { DEFAULT_IDLE_TIMEOUT_MS, REMOTE_SETTLE_MS, type RemoteOptions, Retries, TransientError } from './retries.ts'

const CONCURRENCY = 8
const MULTIPART_FROM_BYTES = 64 << 20
const PART_BYTES = 16 << 20
const PARTS_AT_ONCE = 4
// A page of a thousand keys is a third of a megabyte.
const MAX_MESSAGE_BYTES = 16 << 20
const SIGNED_OUT = new Set(['CredentialsProviderError', 'InvalidAccessKeyId', 'SignatureDoesNotMatch', 'ExpiredToken'])
const TRANSIENT = new Set([
  ...['SlowDown', 'RequestTimeout', 'RequestTimeTooSkewed', 'InternalError', 'ServiceUnavailable', 'TimeoutError'],
  ...['ThrottlingException', 'OperationAborted', 'ConditionalRequestConflict'],
])

export interface S3Options extends RemoteOptions {
  /** Default: what the address or the SDK's configuration says, else us-east-1. */
  readonly region?: string | undefined
  /** `virtual`: the bucket is a part of the host's name. `auto`: so at Amazon, `path` elsewhere. Default `auto`. */
  readonly style?: 'auto' | 'path' | 'virtual' | undefined
  /** PEM of the certificates to trust instead of the authorities that Node knows. */
  readonly ca?: string | undefined
  /** Files from this size on go up in parts. Default 64 MiB. */
  readonly multipartFromBytes?: number
  /** Size of a part, 5 MiB at least. Default 16 MiB. */
  readonly partBytes?: number
  /** Files on a page of a listing. Default: the server's, usually 1000. */
  readonly pageFiles?: number
}

/** Where in an object store a repository lies. */
export interface S3Address {
  /** `https://host:port` */
  readonly endpoint: string
  readonly bucket: string
  /** Ends with a slash, or is empty. */
  readonly prefix: string
}

/**
 * Reads `https://host/bucket/prefix`, `host/bucket/prefix` or `//host/bucket/prefix`, what restic's addresses have
 * behind `s3:`.
 * @throws {RepositoryAddressError}
 */
export function parseS3Address(text: string): S3Address {
  const parts = /^(?:(https?:)?\/\/)?((?:[^/?#@:[\]]+|\[[0-9A-Fa-f:.]+\])(?::\d+)?)\/+([^/?#@:]+)(\/[^?#]*)?$/.exec(
    text,
  )
  const [, scheme = 'https:', host = '', bucket = '', path = ''] = parts ?? []
  if (parts === null || !URL.canParse(`${scheme}//${host}`)) {
    throw new RepositoryAddressError(`s3:${text}`, 's3: is followed by a host and a bucket')
  }
  const prefix = path.split('/').filter(Boolean).join('/')
  return { endpoint: `${scheme}//${host}`, bucket, prefix: prefix === '' ? '' : `${prefix}/` }
}

interface Service {
  readonly sdk: typeof Sdk
  readonly client: Sdk.S3Client
}

/** What an attempt is made with. */
interface Attempt extends Service {
  readonly how: { readonly abortSignal?: AbortSignal }
}

/**
 * A repository in an object store that speaks S3, through Amazon's SDK, which finds the credentials as its
 * documentation says (variables, profiles, roles). Signatures cover the content of every upload.
 */
export class S3Backend implements Backend {
  readonly location: string
  readonly concurrency: number
  readonly settleMs = REMOTE_SETTLE_MS
  readonly #address: S3Address
  readonly #options: S3Options
  readonly #retries: Retries
  #service: Promise<Service> | undefined
  #hasConditions = true

  /** @throws {RepositoryAddressError} */
  constructor(address: string, options: S3Options = {}) {
    this.#address = parseS3Address(address)
    this.#options = options
    const { endpoint, bucket, prefix } = this.#address
    this.location = `s3:${endpoint}/${bucket}/${prefix}`
    this.concurrency = options.concurrency ?? CONCURRENCY
    this.#retries = new Retries(this.location, options)
  }

  async create({ signal }: BackendCall = {}): Promise<void> {
    const Bucket = this.#address.bucket
    const what = `creating the bucket ${Bucket}`
    const isThere = await this.#unlessMissing(`looking for the bucket ${Bucket}`, signal, ({ sdk, client, how }) =>
      client.send(new sdk.HeadBucketCommand({ Bucket }), how),
    )
    if (isThere !== undefined) return
    await this.#call(what, signal, async ({ sdk, client, how }) => {
      try {
        await client.send(new sdk.CreateBucketCommand({ Bucket }), how)
      } catch (error) {
        // Made meanwhile, or by an attempt whose answer was lost.
        if ((error as Error).name !== 'BucketAlreadyOwnedByYou') throw error
      }
    })
  }

  async *list(kind: FileKind, { signal }: BackendCall = {}): AsyncGenerator<ListedFile> {
    if (kind === 'config') {
      const found = await this.stat({ kind, name: '' }, { signal })
      if (found !== undefined) yield { name: '', ...found }
      return
    }
    const what = `listing ${DIRECTORIES[kind]}`
    const limit = new ListingLimit(what, this.location, this.#options)
    const prefix = `${this.#address.prefix}${DIRECTORIES[kind]}/`
    for (let token: string | undefined, isLast = false; !isLast; ) {
      const page = await this.#unlessMissing(what, signal, ({ sdk, client, how }) => {
        const { bucket: Bucket } = this.#address
        const request = { Bucket, Prefix: prefix, ContinuationToken: token, MaxKeys: this.#options.pageFiles }
        return client.send(new sdk.ListObjectsV2Command(request), how)
      })
      if (page === undefined) return
      limit.count(1 + (page.Contents?.length ?? 0))
      for (const { Key = '', Size = -1 } of page.Contents ?? []) {
        const found = Key.startsWith(prefix) ? listedAt(kind, Key.slice(prefix.length), Size) : undefined
        if (found !== undefined) yield found
      }
      isLast = page.IsTruncated !== true
      if (!isLast && (page.NextContinuationToken === undefined || page.NextContinuationToken === token)) {
        throw new BackendAnswerError(what, this.location, 'its list goes on without saying where')
      }
      token = page.NextContinuationToken
    }
  }

  async stat(file: FileRef, { signal }: BackendCall = {}): Promise<{ readonly sizeBytes: number } | undefined> {
    const what = `looking for ${describeFile(file)}`
    const found = await this.#unlessMissing(what, signal, ({ sdk, client, how }) =>
      client.send(new sdk.HeadObjectCommand(this.#objectOf(file)), how),
    )
    if (found === undefined) return undefined
    const sizeBytes = found.ContentLength ?? -1
    if (Number.isSafeInteger(sizeBytes) && sizeBytes >= 0) return { sizeBytes }
    throw new BackendAnswerError(what, this.location, 'it does not say how long the file is')
  }

  async get(file: FileRef, range?: ByteRange, { signal }: BackendCall = {}): Promise<Buffer> {
    const length = lengthToRead(file, this.location, range)
    if (range !== undefined && length === 0) {
      if ((await this.stat(file, { signal })) === undefined) throw new FileMissingError(file, this.location)
      return Buffer.alloc(0)
    }
    const what = `reading ${describeFile(file)}`
    const wanted = range === undefined ? {} : { Range: `bytes=${range.offset}-${range.offset + length - 1}` }
    const content = await this.#unlessMissing(what, signal, async ({ sdk, client, how }) => {
      const command = new sdk.GetObjectCommand({ ...this.#objectOf(file), ...wanted })
      const answer = await client.send(command, how).catch((error: unknown) => {
        // The range begins at the end of the file or beyond it.
        if (statusOf(error) === 416) return undefined
        throw error
      })
      if (answer === undefined) return Buffer.alloc(0)
      const body = answer.Body as Readable
      const claimed = answer.ContentLength ?? 0
      const limitBytes = range === undefined ? length : MAX_FILE_BYTES[file.kind]
      if (claimed > limitBytes) {
        body.destroy()
        throw new FileTooLargeError(file, this.location, claimed, limitBytes)
      }
      const bytes = await collect(body, limitBytes, () => this.#tooLong(what, limitBytes))
      if (range === undefined) return bytes
      // Servers that know no ranges send the whole file.
      const start = answer.ContentRange === undefined ? range.offset : 0
      return bytes.subarray(start, start + length)
    })
    if (content === undefined) throw new FileMissingError(file, this.location)
    return content
  }

  async put(
    file: FileRef,
    content: Uint8Array,
    { signal, exclusive }: BackendCall & { readonly exclusive?: boolean } = {},
  ): Promise<boolean> {
    if (exclusive === true) {
      if ((await this.stat(file, { signal })) !== undefined) return false
      const isPut = await this.#putNew(file, content, signal)
      if (isPut !== undefined) return isPut
    }
    if (content.length >= (this.#options.multipartFromBytes ?? MULTIPART_FROM_BYTES)) {
      await this.#putInParts(file, content, signal)
      return true
    }
    await this.#call(`storing ${describeFile(file)}`, signal, ({ sdk, client, how }) =>
      client.send(new sdk.PutObjectCommand({ ...this.#objectOf(file), Body: content }), how),
    )
    return true
  }

  async delete(file: FileRef, { signal }: BackendCall = {}): Promise<boolean> {
    // S3 says nothing of whether there was something to delete.
    if ((await this.stat(file, { signal })) === undefined) return false
    await this.#unlessMissing(`deleting ${describeFile(file)}`, signal, ({ sdk, client, how }) =>
      client.send(new sdk.DeleteObjectCommand(this.#objectOf(file)), how),
    )
    return true
  }

  async close(): Promise<void> {
    const service = await this.#service?.catch(() => undefined)
    service?.client.destroy()
  }

  /** Lets the server decide who is first; `undefined` where it cannot. */
  async #putNew(file: FileRef, content: Uint8Array, signal: AbortSignal | undefined): Promise<boolean | undefined> {
    if (!this.#hasConditions) return undefined
    const answer = await this.#call(`storing ${describeFile(file)}`, signal, async ({ sdk, client, how }) => {
      const command = new sdk.PutObjectCommand({ ...this.#objectOf(file), Body: content, IfNoneMatch: '*' })
      return await client.send(command, how).then(
        () => 'stored' as const,
        (error: unknown) => {
          if (statusOf(error) === 501) return 'unknown' as const
          if (statusOf(error) === 412) return 'refused' as const
          throw error
        },
      )
    })
    if (answer === 'stored') return true
    if (answer === 'refused') {
      // An attempt of ours whose answer was lost may have been the first.
      return (await this.get(file, undefined, { signal })).equals(content)
    }
    this.#hasConditions = false
    return undefined
  }

  async #putInParts(file: FileRef, content: Uint8Array, signal: AbortSignal | undefined): Promise<void> {
    const what = `storing ${describeFile(file)}`
    const { Bucket, Key } = this.#objectOf(file)
    const { UploadId } = await this.#call(what, signal, ({ sdk, client, how }) =>
      client.send(new sdk.CreateMultipartUploadCommand({ Bucket, Key }), how),
    )
    const upload = { Bucket, Key, UploadId }
    try {
      const Parts = await this.#putParts(upload, what, content, signal)
      await this.#call(what, signal, async ({ sdk, client, how }) => {
        const command = new sdk.CompleteMultipartUploadCommand({ ...upload, MultipartUpload: { Parts } })
        await client.send(command, how).catch(async (error: unknown) => {
          // Gone by an attempt of ours whose answer was lost.
          const isDone = (error as Error).name === 'NoSuchUpload'
          if (!isDone || (await this.stat(file, { signal }))?.sizeBytes !== content.length) throw error
        })
      })
    } catch (error) {
      const { sdk, client } = await this.#connect()
      // Parts of uploads that never end cost money. What cannot be reached cleans them up by the bucket's own rules.
      await client.send(new sdk.AbortMultipartUploadCommand(upload)).catch(() => undefined)
      throw error
    }
  }

  async #putParts(
    upload: { readonly Bucket: string; readonly Key: string; readonly UploadId: string | undefined },
    what: string,
    content: Uint8Array,
    signal: AbortSignal | undefined,
  ): Promise<{ PartNumber: number; ETag: string | undefined }[]> {
    const { partBytes = PART_BYTES } = this.#options
    const parts = Array.from({ length: Math.ceil(content.length / partBytes) }, (_, i) => i + 1)
    const done: { PartNumber: number; ETag: string | undefined }[] = []
    const rest = parts.values()
    const work = async () => {
      for (const PartNumber of rest) {
        const Body = content.subarray((PartNumber - 1) * partBytes, PartNumber * partBytes)
        const { ETag } = await this.#call(what, signal, ({ sdk, client, how }) =>
          client.send(new sdk.UploadPartCommand({ ...upload, PartNumber, Body }), how),
        )
        done.push({ PartNumber, ETag })
      }
    }
    await Promise.all(Array.from({ length: PARTS_AT_ONCE }, work))
    return done.sort((left, right) => left.PartNumber - right.PartNumber)
  }

  #objectOf(file: FileRef): { readonly Bucket: string; readonly Key: string } {
    return { Bucket: this.#address.bucket, Key: `${this.#address.prefix}${pathOf(file)}` }
  }

  #connect(): Promise<Service> {
    this.#service ??= this.#open()
    return this.#service
  }

  async #open(): Promise<Service> {
    // It takes a quarter of a second to load.
    const sdk = await import('@aws-sdk/client-s3')
    const { endpoint } = this.#address
    const { ca, style = 'auto', idleTimeoutMs = DEFAULT_IDLE_TIMEOUT_MS } = this.#options
    const { hostname } = new URL(endpoint)
    const [, regionOfHost] = /^s3[.-]([a-z0-9-]+)\.amazonaws\.com$/.exec(hostname) ?? []
    const isAmazon = hostname.endsWith('.amazonaws.com')
    const region = this.#options.region ?? regionOfHost ?? (isAmazon ? undefined : 'us-east-1')
    const agent = { keepAlive: true, maxSockets: this.concurrency + PARTS_AT_ONCE, ...(ca === undefined ? {} : { ca }) }
    const client = new sdk.S3Client({
      ...(region === undefined ? {} : { region }),
      // Without a region in its name, that of Amazon follows from the region.
      ...(isAmazon && regionOfHost === undefined ? {} : { endpoint }),
      forcePathStyle: style === 'auto' ? !isAmazon : style === 'path',
      // Repeated here, by the rules of all backends.
      maxAttempts: 1,
      // Many servers refuse bodies with trailing checksums. Signatures cover the content, and names are its hash.
      requestChecksumCalculation: 'WHEN_REQUIRED',
      responseChecksumValidation: 'WHEN_REQUIRED',
      requestHandler: {
        connectionTimeout: idleTimeoutMs,
        socketTimeout: idleTimeoutMs,
        httpAgent: new HttpAgent(agent),
        httpsAgent: new HttpsAgent(agent),
      },
    })
    client.middlewareStack.add(
      (next, context) => async (args) => {
        const result = await next(args)
        const { response } = result as { response: { body?: unknown; statusCode: number } }
        const name = context['commandName']
        // The SDK holds every other answer whole.
        if (name !== 'GetObjectCommand' || response.statusCode >= 300)
          response.body = this.#limited(response.body as Readable, String(name))
        return result
      },
      { step: 'deserialize', name: 'lsyncLimit', priority: 'low' },
    )
    return { sdk, client }
  }

  #limited(body: Readable, what: string): Readable {
    let bytes = 0
    const limit = new Transform({
      transform: (chunk: Buffer, _, done) => {
        bytes += chunk.length
        if (bytes > MAX_MESSAGE_BYTES) done(this.#tooLong(what, MAX_MESSAGE_BYTES))
        else done(null, chunk)
      },
    })
    body.once('error', (error) => limit.destroy(error))
    limit.once('close', () => body.destroy())
    return body.pipe(limit)
  }

  #tooLong(what: string, limitBytes: number): BackendAnswerError {
    return new BackendAnswerError(what, this.location, `its body is longer than ${limitBytes} bytes`)
  }

  /** `undefined` where the server says that there is no such thing. */
  #unlessMissing<T>(
    what: string,
    signal: AbortSignal | undefined,
    attempt: (by: Attempt) => Promise<T>,
  ): Promise<T | undefined> {
    return this.#call(what, signal, (by) =>
      attempt(by).catch((error: unknown) => {
        if (statusOf(error) === 404) return undefined
        throw error
      }),
    )
  }

  #call<T>(what: string, signal: AbortSignal | undefined, attempt: (by: Attempt) => Promise<T>): Promise<T> {
    const how = signal === undefined ? {} : { abortSignal: signal }
    return this.#retries.run(what, signal, async () => {
      try {
        return await attempt({ ...(await this.#connect()), how })
      } catch (error) {
        throw this.#meaningOf(error, what)
      }
    })
  }

  #meaningOf(error: unknown, what: string): unknown {
    if (!(error instanceof Error) || error instanceof LsyncError) return error
    const status = statusOf(error)
    const reason = error.message === 'UnknownError' ? error.name : error.message
    const message = status === undefined ? reason : `${status} ${reason}`
    if (SIGNED_OUT.has(error.name)) {
      const hint = 'set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE'
      return new BackendDeniedError(what, this.location, { hint, cause: error })
    }
    if (status === 401 || status === 403) return new BackendDeniedError(what, this.location, { cause: error })
    const isWorthIt = TRANSIENT.has(error.name) || (status === undefined ? isNetwork(error) : isTransientStatus(status))
    if (isWorthIt || status === 200) return new TransientError(message, { cause: error })
    return new Error(message, { cause: error })
  }
}

function statusOf(error: unknown): number | undefined {
  return (error as { $metadata?: { httpStatusCode?: number } } | undefined)?.$metadata?.httpStatusCode
}

function isNetwork(error: Error): boolean {
  const { code } = error as NodeJS.ErrnoException
  return code === undefined ? error.message === 'aborted' : /^(ECONN|EPIPE|EAI_AGAIN|ETIMEDOUT|EHOST|ENET)/.test(code)
}

async function collect(body: Readable, limitBytes: number, tooLong: () => Error): Promise<Buffer> {
  const pieces: Buffer[] = []
  let bytes = 0
  for await (const piece of body as AsyncIterable<Buffer>) {
    bytes += piece.length
    if (bytes > limitBytes) throw tooLong()
    pieces.push(piece)
  }
  return Buffer.concat(pieces, bytes)
}
