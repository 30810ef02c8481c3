import { chmodSync, renameSync, rmSync } from 'node:fs'
import { createConnection, createServer, type Server, type Socket } from 'node:net'
import { createInterface, type Interface } from 'node:readline'
import { errnoOf, LsyncError } from '@lsync/posix'
import { SyncRequestError } from './sync.ts'

/** What one client of a socket is given: its requests are answered here, and its end is told. */
export interface LineClient {
  /** One request; what it gives goes back as `result`, what it throws as `error`. */
  answer(request: Record<string, unknown>): Promise<unknown>
  onClose?(): void
}

type Answer =
  | { readonly result: unknown }
  | { readonly error: { readonly code: string; readonly message: string; readonly hint?: string | undefined } }

// Requests are a verb and a few switches; an answer, which comes from this user's own process, may be long.
const MAX_REQUEST = 4096

/**
 * A unix socket that other processes of this user ask: one JSON object a line, answered by one, `{"result":…}` or
 * `{"error":{"code":…,"message":…,"hint":…}}`. Its directory is an open one, for a path to a socket may have 107 bytes.
 */
export class LineSocket {
  readonly #server: Server
  readonly #path: string
  readonly #clients = new Set<Socket>()

  private constructor(server: Server, path: string) {
    this.#server = server
    this.#path = path
  }

  /** Listens in the place of whoever did before: the caller knows that nobody does. The directory stays open until `close`. */
  static async listen(dirFd: number, name: string, openClient: () => LineClient): Promise<LineSocket> {
    const path = placeOf(dirFd, name)
    const fresh = `${path}.new`
    rmSync(fresh, { force: true })
    const server = createServer()
    const socket = new LineSocket(server, path)
    server.on('connection', (client) => socket.#serve(client, openClient()))
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject)
      server.listen(fresh, resolve)
    })
    // It appears with the mode that it keeps.
    chmodSync(fresh, 0o600)
    renameSync(fresh, path)
    return socket
  }

  async close(): Promise<void> {
    for (const client of this.#clients) client.destroy()
    await new Promise((resolve) => this.#server.close(resolve))
    rmSync(this.#path, { force: true })
  }

  #serve(client: Socket, { answer, onClose }: LineClient): void {
    this.#clients.add(client)
    client.on('error', () => client.destroy())
    client.on('close', () => {
      this.#clients.delete(client)
      onClose?.()
    })
    let rest = 0
    client.on('data', (bytes: Buffer) => {
      const end = bytes.lastIndexOf(10)
      rest = end === -1 ? rest + bytes.length : bytes.length - end - 1
      // A line without an end would grow here for ever.
      if (rest > MAX_REQUEST) client.destroy()
    })
    const lines = createInterface({ input: client })
    // It emits the errors of its input once more.
    lines.on('error', () => undefined)
    lines.on('line', (line) => {
      void answerTo(line, answer).then((result) => client.write(`${JSON.stringify(result)}\n`))
    })
  }
}

/** A connection to the process that listens. */
export class LineConnection {
  readonly #socket: Socket
  readonly #lines: Interface

  private constructor(socket: Socket) {
    this.#socket = socket
    this.#lines = createInterface({ input: socket })
    // Of a connection that is reset `close` tells as well. Both have the error: readline emits what its input does.
    socket.on('error', () => undefined)
    this.#lines.on('error', () => undefined)
  }

  /** `undefined` where nobody listens. */
  static async open(dirFd: number, name: string): Promise<LineConnection | undefined> {
    const socket = createConnection(placeOf(dirFd, name))
    try {
      await new Promise<void>((resolve, reject) => {
        socket.once('connect', resolve)
        socket.once('error', reject)
      })
      return new LineConnection(socket)
    } catch (error) {
      const code = errnoOf(error)
      if (code === 'ENOENT' || code === 'ECONNREFUSED') return undefined
      throw error
    }
  }

  /**
   * One question at a time. What it was answered; `undefined` if the other process ended before.
   * @throws {LsyncError} with the code, the message and the hint of the other process
   */
  async ask(request: Record<string, unknown>, signal?: AbortSignal): Promise<{ readonly result: unknown } | undefined> {
    const socket = this.#socket
    const answered = new AbortController()
    try {
      const line = await new Promise<string | undefined>((resolve, reject) => {
        this.#lines.once('line', resolve)
        socket.once('close', () => resolve(undefined))
        signal?.addEventListener('abort', () => reject(signal.reason), { signal: answered.signal })
        socket.write(`${JSON.stringify(request)}\n`)
      })
      if (line === undefined) return undefined
      const answer = JSON.parse(line) as Answer
      if (!('error' in answer)) return answer
      const { code, message, hint } = answer.error
      throw new LsyncError(code, message, hint === undefined ? {} : { hint })
    } finally {
      answered.abort()
    }
  }

  /** The process may end while this is open. */
  unref(): void {
    this.#socket.unref()
  }

  close(): void {
    this.#socket.destroy()
  }
}

// By the open directory: its own path may be too long for a socket.
function placeOf(dirFd: number, name: string): string {
  return `/proc/self/fd/${dirFd}/${name}`
}

async function answerTo(line: string, answer: LineClient['answer']): Promise<Answer> {
  try {
    return { result: (await answer(requestIn(line))) ?? null }
  } catch (error) {
    const { code = 'BUG', message, hint } = error as Error & { code?: string; hint?: string }
    return { error: { code, message, ...(hint === undefined ? {} : { hint }) } }
  }
}

function requestIn(line: string): Record<string, unknown> {
  try {
    const request: unknown = JSON.parse(line)
    if (typeof request === 'object' && request !== null) return request as Record<string, unknown>
  } catch {
    // Said below, as of any line that is no object.
  }
  throw new SyncRequestError(`a line that is not understood: ${line.slice(0, 80)}`, 'send one JSON object a line')
}
