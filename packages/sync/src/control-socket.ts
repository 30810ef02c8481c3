import { existsSync, mkdirSync } from 'node:fs'
import { close, type HostPath, hostPath, LsyncError, openRoot, printable, textOf } from '@lsync/posix'
import { LineConnection, LineSocket } from './line-socket.ts'
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

const SOCKET = 'control.sock'

/**
 * Lets other processes of this user talk to a sync over a socket in its state directory. docs/format.md, "Control socket of
 * a sync".
 */
export class ControlSocket {
  readonly #socket: LineSocket
  readonly #stateFd: number

  private constructor(socket: LineSocket, stateFd: number) {
    this.#socket = socket
    this.#stateFd = stateFd
  }

  /**
   * Listens for a sync.
   * @throws {SyncRunningError} if another process does for the same upper
   */
  static async listen(sync: Sync, stateDir: string): Promise<ControlSocket> {
    mkdirSync(stateDir, { recursive: true, mode: 0o700 })
    const stateFd = openRoot(hostPath(stateDir))
    try {
      const other = await LineConnection.open(stateFd, SOCKET)
      other?.close()
      if (other !== undefined) throw new SyncRunningError(stateDir)
      const answer = (request: Record<string, unknown>) => carryOut(sync, request)
      return new ControlSocket(await LineSocket.listen(stateFd, SOCKET, () => ({ answer })), stateFd)
    } catch (error) {
      close(stateFd)
      throw error
    }
  }

  async close(): Promise<void> {
    await this.#socket.close()
    close(this.#stateFd)
  }
}

async function carryOut(sync: Sync, request: Record<string, unknown>): Promise<unknown> {
  switch (request['do']) {
    case 'flush':
      return sync.flush({ sweep: request['sweep'] === true })
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
        `${String(request['do'])} is nothing to ask a sync for`,
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
  const connection = await connect(options.stateDir ?? defaultStateDir(source))
  if (connection === undefined) throw new SyncNotRunningError(source)
  try {
    const answer = await connection.ask({ do: verb, sweep: options.sweep === true }, options.signal)
    if (answer === undefined) throw new SyncNotRunningError(source)
    return answer.result as ControlAnswers[V]
  } finally {
    connection.close()
  }
}

async function connect(stateDir: string): Promise<LineConnection | undefined> {
  if (!existsSync(stateDir)) return undefined
  const stateFd = openRoot(hostPath(stateDir))
  try {
    return await LineConnection.open(stateFd, SOCKET)
  } finally {
    close(stateFd)
  }
}
