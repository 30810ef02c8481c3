import { setTimeout as delay } from 'node:timers/promises'
import { LineConnection, LineSocket, readableStatus, type Sync, SyncRequestError, type SyncStatus } from '@lsync/sync'
import { LeaseHeldError, LeaseLostError } from './lease.ts'
import { type NodeRoot, RootBusyError } from './node-state.ts'

const SOCKET = 'follower.sock'

/** What a follower needs of the root. */
export interface FollowerHost {
  start(): Promise<void>
  /** Ends the sync, if there is one. */
  stop(): Promise<void>
  sync(): Sync | undefined
  /** Whether there is an upper to be followed. */
  isNeeded(): boolean
  onProblem(error: Error): void
}

const LOOK_MS = 250
const LONGEST_MS = 30_000

/** Keeps a sync of a root's upper running, whichever upper that is. */
export class Follower {
  readonly #host: FollowerHost
  #isPaused = false
  #wake = new AbortController()

  constructor(host: FollowerHost) {
    this.#host = host
  }

  /** Of the sync, its names as text; `undefined` while there is none. */
  get status(): SyncStatus | undefined {
    const sync = this.#host.sync()
    return sync === undefined ? undefined : readableStatus(sync.status)
  }

  /** Leaves the upper alone until `resume`. */
  async pause(): Promise<void> {
    this.#isPaused = true
    await this.#host.stop()
  }

  resume(): void {
    this.#isPaused = false
    this.#wake.abort()
  }

  /** Until it is aborted. @throws {LeaseLostError}, {LeaseHeldError} once another node has the root */
  async run(signal: AbortSignal): Promise<void> {
    let waitMs = LOOK_MS
    while (!signal.aborted) {
      const isWaiting = this.#isPaused || this.#host.sync() !== undefined || !this.#host.isNeeded()
      waitMs = isWaiting || (await this.#start(signal)) ? LOOK_MS : Math.min(2 * waitMs, LONGEST_MS)
      this.#wake = new AbortController()
      await delay(waitMs, undefined, { signal: AbortSignal.any([signal, this.#wake.signal]) }).catch(() => undefined)
    }
  }

  async #start(signal: AbortSignal): Promise<boolean> {
    try {
      await this.#host.start()
      return true
    } catch (error) {
      if (error instanceof LeaseLostError || error instanceof LeaseHeldError) throw error
      // A command that is at work paused this one, or is about to.
      if (!(error instanceof RootBusyError) && !signal.aborted) this.#host.onProblem(error as Error)
      return false
    }
  }
}

/**
 * Lets the commands on this node talk to the process that follows a root, over a socket in its state. `{"do":"pause"}` holds
 * until the connection ends, so nobody has to clear up after a command that was killed. The caller knows that nobody else
 * follows the root.
 */
export async function listenForCommands(root: NodeRoot, follower: Follower): Promise<LineSocket> {
  let pausing = 0
  return LineSocket.listen(root.fd, SOCKET, () => {
    let hasPaused = false
    return {
      answer: async ({ do: verb }) => {
        if (verb === 'status') return follower.status
        if (verb !== 'pause')
          throw new SyncRequestError(`${String(verb)} is nothing to ask for`, 'ask for pause or status')
        if (!hasPaused) pausing++
        hasPaused = true
        await follower.pause()
        return undefined
      },
      onClose: () => {
        if (hasPaused && --pausing === 0) follower.resume()
      },
    }
  })
}

/** Until it is given back, whoever follows the root leaves its upper alone. `undefined` where nobody does. */
export async function pauseFollower(root: NodeRoot, signal?: AbortSignal): Promise<{ giveBack(): void } | undefined> {
  const connection = await LineConnection.open(root.fd, SOCKET)
  if (connection === undefined) return undefined
  try {
    await ask(connection, 'pause', signal)
    // The process need not stay for it.
    connection.unref()
    return { giveBack: () => connection.close() }
  } catch (error) {
    connection.close()
    throw error
  }
}

/** The state of the sync of whoever follows the root; `undefined` where nobody does, or it is paused. */
export async function followerStatus(root: NodeRoot, signal?: AbortSignal): Promise<SyncStatus | undefined> {
  const connection = await LineConnection.open(root.fd, SOCKET)
  if (connection === undefined) return undefined
  try {
    return ((await ask(connection, 'status', signal)) as SyncStatus | null) ?? undefined
  } finally {
    connection.close()
  }
}

/** Whether a process follows the root, or is about to when those that paused it are done. */
export async function isFollowed(root: NodeRoot): Promise<boolean> {
  const connection = await LineConnection.open(root.fd, SOCKET)
  connection?.close()
  return connection !== undefined
}

async function ask(connection: LineConnection, verb: string, signal: AbortSignal | undefined): Promise<unknown> {
  const answer = await connection.ask({ do: verb }, signal)
  if (answer === undefined) throw new Error('the process that follows the root ended')
  return answer.result
}
