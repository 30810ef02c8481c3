import { chmodSync, existsSync, mkdirSync, renameSync, unlinkSync } from 'node:fs'
import { createConnection, createServer, type Server, type Socket } from 'node:net'
import { createInterface } from 'node:readline'
import { errnoOf, type HostPath, LsyncError, printable, textOf } from '@lsync/posix'
import { defaultStateDir, type FlushReport, type Sync, SyncRequestError, type SyncStatus } from './sync.ts'

/** Nothing follows this upper. */
export class SyncNotRunningError extends LsyncError {
  constructor(source: HostPath) {
    super('SYNC_NOT_RUNNING', `no sync of ${printable(source)} is running`, {
      path: source,
      hint: 'start one: lsync sync UPPER TARGET; if it was started with --state DIR, name that, too',
    })
  }
}

/** Another process follows this upper, or uses its state. */
export class SyncRunningError extends LsyncError {
  constructor(stateDir: string) {
    super('SYNC_RUNNING', `another sync uses ${stateDir}`, {
      path: stateDir,
      hint: 'talk to that one (lsync sync status UPPER), or name another state directory',
    })
  }
}

/** What a running sync can be asked for, and what it answers. */
export interface ControlAnswers {
  flush: FlushReport
  pause: SyncStatus
  resume: SyncStatus
  status: SyncStatus
}
export type ControlVerb = keyof ControlAnswers

interface Answer {
  readonly result?: unknown
  readonly error?: { readonly code: string; readonly message: string; readonly hint?: string | undefined }
}

const SOCKET = 'control.sock'
const MAX_LINE = 4096

/**
 * Lets other processes of this user talk to a sync over a socket in its state directory: one JSON object a line,
 * `{"do":"flush","sweep":true}`, answered by one. docs/format.md, "Control socket of a sync".
 */
export class ControlSocket {
  readonly #server: Server
  readonly #path: string
  readonly #clients = new Set<Socket>()

  private constructor(server: Server, path: string) {
    this.#server = server
    this.#path = path
  }

  /**
   * Listens for a sync.
   * @throws {SyncRunningError} if another process does for the same upper
   */
  static async listen(sync: Sync, stateDir: string): Promise<ControlSocket> {
    mkdirSync(stateDir, { recursive: true, mode: 0o700 })
    const path = `${stateDir}/${SOCKET}`
    if (existsSync(path)) {
      if (await answers(path)) throw new SyncRunningError(stateDir)
      unlinkSync(path)
    }
    const server = createServer()
    const control = new ControlSocket(server, path)
    server.on('connection', (client) => control.#serve(client, sync))
    const fresh = `${path}.new`
    if (existsSync(fresh)) unlinkSync(fresh)
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject)
      server.listen(fresh, resolve)
    })
    // It appears with the mode that it keeps.
    chmodSync(fresh, 0o600)
    renameSync(fresh, path)
    return control
  }

  async close(): Promise<void> {
    for (const client of this.#clients) client.destroy()
    await new Promise((resolve) => this.#server.close(resolve))
    if (existsSync(this.#path)) unlinkSync(this.#path)
  }

  #serve(client: Socket, sync: Sync): void {
    this.#clients.add(client)
    client.on('error', () => client.destroy())
    client.on('close', () => this.#clients.delete(client))
    const lines = createInterface({ input: client, crlfDelay: Number.POSITIVE_INFINITY })
    lines.on('line', (line) => {
      void answer(sync, line).then((result) => client.write(`${JSON.stringify(result)}\n`))
    })
  }
}

async function answer(sync: Sync, line: string): Promise<Answer> {
  try {
    const request = line.length > MAX_LINE ? {} : (JSON.parse(line) as { do?: unknown; sweep?: unknown })
    return { result: await carryOut(sync, request) }
  } catch (error) {
    if (error instanceof LsyncError) return { error: { code: error.code, message: error.message, hint: error.hint } }
    const { code, message, hint } = new SyncRequestError(
      `not understood: ${String(error)}`,
      'send one JSON object a line',
    )
    return { error: { code, message, hint } }
  }
}

async function carryOut(sync: Sync, request: { do?: unknown; sweep?: unknown }): Promise<unknown> {
  switch (request.do) {
    case 'flush':
      return sync.flush({ sweep: request.sweep === true })
    case 'pause':
      sync.pause()
      return readableStatus(sync.status)
    case 'resume':
      sync.resume()
      return readableStatus(sync.status)
    case 'status':
      return readableStatus(sync.status)
    default:
      throw new SyncRequestError(
        `${String(request.do)} is nothing to ask a sync for`,
        'ask for flush, pause, resume or status',
      )
  }
}

/** A status whose names are text (`textOf`), as it is sent to other processes. */
export function readableStatus(status: SyncStatus): SyncStatus {
  return {
    ...status,
    source: textOf(status.source) as HostPath,
    targets: status.targets.map((target) => ({
      ...target,
      failures: target.failures.map((failure) => ({ ...failure, path: textOf(failure.path) as typeof failure.path })),
    })),
  }
}

/**
 * Asks the running sync of an upper for something.
 * @throws {SyncNotRunningError}
 */
export async function askSync<V extends ControlVerb>(
  source: HostPath,
  verb: V,
  options: { readonly stateDir?: string; readonly sweep?: boolean; readonly signal?: AbortSignal } = {},
): Promise<ControlAnswers[V]> {
  const path = `${options.stateDir ?? defaultStateDir(source)}/${SOCKET}`
  const client = createConnection(path)
  try {
    await new Promise<void>((resolve, reject) => {
      client.once('connect', resolve)
      client.once('error', reject)
      options.signal?.addEventListener('abort', () => reject(options.signal?.reason), { once: true })
    })
    client.write(`${JSON.stringify({ do: verb, sweep: options.sweep === true })}\n`)
    const line = await new Promise<string>((resolve, reject) => {
      createInterface({ input: client }).once('line', resolve)
      client.once('close', () => reject(new SyncNotRunningError(source)))
      options.signal?.addEventListener('abort', () => reject(options.signal?.reason), { once: true })
    })
    const { result, error } = JSON.parse(line) as Answer
    if (error !== undefined) throw new LsyncError(error.code, error.message, error.hint ? { hint: error.hint } : {})
    return result as ControlAnswers[V]
  } catch (error) {
    const code = errnoOf(error)
    if (code === 'ENOENT' || code === 'ECONNREFUSED') throw new SyncNotRunningError(source)
    throw error
  } finally {
    client.destroy()
  }
}

function answers(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const client = createConnection(path)
    client.once('connect', () => {
      client.destroy()
      resolve(true)
    })
    client.once('error', () => resolve(false))
  })
}
