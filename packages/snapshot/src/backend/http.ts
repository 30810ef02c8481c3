import http, { type IncomingHttpHeaders } from 'node:http'
import https from 'node:https'
import { BackendAnswerError } from './errors.ts'
import { IdleError, TransientError } from './retries.ts'

/** What an HTTP server answered, its body whole. */
export interface HttpAnswer {
  readonly status: number
  readonly headers: IncomingHttpHeaders
  readonly body: Buffer
}

export interface HttpRequest {
  readonly method: 'HEAD' | 'GET' | 'POST' | 'DELETE'
  readonly url: URL
  readonly headers?: Readonly<Record<string, string>>
  readonly body?: Uint8Array
  /** A longer body of the answer ends the attempt. */
  readonly maxBodyBytes: number
  readonly signal?: AbortSignal | undefined
}

export interface HttpClientOptions {
  readonly location: string
  readonly idleTimeoutMs: number
  readonly connections: number
  /** PEM of what to trust instead of the authorities that Node knows. */
  readonly ca?: string | undefined
}

/** HTTP as storage needs it: connections that stay open, bodies whole and bounded, silence noticed. */
export class HttpClient {
  readonly #options: HttpClientOptions
  readonly #plain: http.Agent
  readonly #tls: https.Agent

  constructor(options: HttpClientOptions) {
    this.#options = options
    const shared = { keepAlive: true, maxSockets: options.connections, scheduling: 'lifo' } as const
    this.#plain = new http.Agent(shared)
    this.#tls = new https.Agent({ ...shared, ...(options.ca === undefined ? {} : { ca: options.ca }) })
  }

  /**
   * One attempt.
   * @throws {TransientError} when the connection failed, stalled or ended early; {BackendAnswerError} on a body that is
   * too long; TLS's own errors as they are, since they stay
   */
  send(request: HttpRequest): Promise<HttpAnswer> {
    const { method, url, headers = {}, body, signal } = request
    const { idleTimeoutMs } = this.#options
    const isTls = url.protocol === 'https:'
    return new Promise((resolve, reject) => {
      const sent = (isTls ? https : http).request(url, {
        method,
        agent: isTls ? this.#tls : this.#plain,
        headers: body === undefined ? headers : { ...headers, 'Content-Length': body.length },
        ...(signal === undefined ? {} : { signal }),
      })
      const fail = (error: Error) => {
        reject(isLasting(error) ? error : new TransientError(error.message, { cause: error }))
        sent.destroy()
      }
      sent.setTimeout(idleTimeoutMs, () => fail(new IdleError(idleTimeoutMs)))
      sent.on('error', fail)
      sent.on('response', (answer) => {
        answer.on('error', fail)
        this.#collect(request, answer).then((content) => {
          resolve({ status: answer.statusCode ?? 0, headers: answer.headers, body: content })
          // An answer before the request was whole: the rest of that must not be taken for the next one.
          if (!sent.writableFinished) sent.destroy()
        }, fail)
      })
      sent.end(body)
    })
  }

  close(): void {
    this.#plain.destroy()
    this.#tls.destroy()
  }

  async #collect({ method, maxBodyBytes }: HttpRequest, answer: http.IncomingMessage): Promise<Buffer> {
    const tooLong = () =>
      new BackendAnswerError(method, this.#options.location, `its body is longer than ${maxBodyBytes} bytes`)
    const claimed = Number(answer.headers['content-length'] ?? 0)
    if (method !== 'HEAD' && claimed > maxBodyBytes) throw tooLong()
    const pieces: Buffer[] = []
    let bytes = 0
    for await (const piece of answer as AsyncIterable<Buffer>) {
      bytes += piece.length
      if (bytes > maxBodyBytes) throw tooLong()
      pieces.push(piece)
    }
    return pieces.length === 1 ? (pieces[0] as Buffer) : Buffer.concat(pieces, bytes)
  }
}

/** What a server says of when to come back. Source: RFC 9110, "Retry-After". */
export function retryAfterMs(headers: IncomingHttpHeaders): number | undefined {
  const text = headers['retry-after']
  if (text === undefined) return undefined
  const ms = /^\d+$/.test(text) ? Number(text) * 1000 : Date.parse(text) - Date.now()
  return Number.isNaN(ms) ? undefined : Math.max(0, ms)
}

/** Whether a status may be another one the next time. */
export function isTransientStatus(status: number): boolean {
  return status === 408 || status === 425 || status === 429 || (status >= 500 && ![501, 505, 507].includes(status))
}

// A name that does not exist, a certificate that is not trusted, and what our own code threw.
function isLasting(error: Error): boolean {
  const { code } = error as NodeJS.ErrnoException
  if (error instanceof BackendAnswerError) return true
  if (code === undefined) return !(error instanceof TransientError) && error.message !== 'aborted'
  if (code === 'ENOTFOUND' || code === 'ERR_INVALID_URL') return true
  return /^(ERR_TLS|ERR_SSL|CERT_|DEPTH_ZERO|SELF_SIGNED|UNABLE_TO|HOSTNAME_MISMATCH)/.test(code)
}
