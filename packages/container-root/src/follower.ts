import { createConnection, createServer, type Server, type Socket } from 'node:net'
import { createInterface } from 'node:readline'
import { setTimeout as delay } from 'node:timers/promises'
import { type ByteString, errnoOf, LsyncError, unlink } from '@lsync/posix'
import { readableStatus, type Sync, SyncRequestError, type SyncStatus } from '@lsync/sync'
import { z } from 'zod'
import { LeaseHeldError, LeaseLostError } from './lease.ts'
import { type NodeRoot, RootBusyError } from './node-state.ts'

const SOCKET = 'follower.sock' as ByteString
const MAX_LINE = 1 << 20

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

const Answer = z.union([
  z.object({ result: z.unknown() }),
  z.object({ error: z.object({ code: z.string(), message: z.string(), hint: z.string().optional() }) }),
])

/**
 * Lets the commands on this node talk to the process that follows a root, over a socket in its state: one JSON object a line,
 * answered by one. `{"do":"pause"}` holds until the connection ends, so nobody has to clear up after a command that was killed.
 */
export class FollowerSocket {
  readonly #server: Server
  readonly #root: NodeRoot
  readonly #clients = new Set<Socket>()
  readonly #following: Follower
  #pausing = 0

  private constructor(server: Server, root: NodeRoot, following: Follower) {
    this.#server = server
    this.#root = root
    this.#following = following
  }

  /** Listens. The caller knows that nobody else follows the root. */
  static async listen(root: NodeRoot, following: Follower): Promise<FollowerSocket> {
    // What a killed one left.
    unlink(root.fd, SOCKET)
    const server = createServer()
    const socket = new FollowerSocket(server, root, following)
    server.on('connection', (client) => socket.#serve(client))
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject)
      server.listen(placeOf(root), resolve)
    })
    return socket
  }

  async close(): Promise<void> {
    for (const client of this.#clients) client.destroy()
    await new Promise((resolve) => this.#server.close(resolve))
    unlink(this.#root.fd, SOCKET)
  }

  #serve(client: Socket): void {
    let hasPaused = false
    this.#clients.add(client)
    client.on('error', () => client.destroy())
    client.on('close', () => {
      this.#clients.delete(client)
      if (hasPaused && --this.#pausing === 0) this.#following.resume()
    })
    createInterface({ input: client }).on('line', (line) => {
      const verb = verbIn(line)
      if (verb === 'pause' && !hasPaused) {
        hasPaused = true
        this.#pausing++
      }
      void this.#answer(verb).then((answer) => client.write(`${JSON.stringify(answer)}\n`))
    })
  }

  async #answer(verb: string): Promise<z.infer<typeof Answer>> {
    try {
      if (verb === 'pause') {
        await this.#following.pause()
        return { result: null }
      }
      if (verb === 'status') return { result: this.#following.status ?? null }
      throw new SyncRequestError(`${verb} is nothing to ask for`, 'ask for pause or status')
    } catch (error) {
      const { code = 'BUG', message, hint } = error as Error & { code?: string; hint?: string }
      return { error: { code, message, ...(hint === undefined ? {} : { hint }) } }
    }
  }
}

/** Until it is given back, whoever follows the root leaves its upper alone. `undefined` where nobody does. */
export async function pauseFollower(root: NodeRoot, signal?: AbortSignal): Promise<{ giveBack(): void } | undefined> {
  const client = await connect(root)
  if (client === undefined) return undefined
  try {
    await ask(client, 'pause', signal)
    // The process need not stay for it.
    client.unref()
    return { giveBack: () => client.destroy() }
  } catch (error) {
    client.destroy()
    throw error
  }
}

/** The state of the sync of whoever follows the root; `undefined` where nobody does, or it is paused. */
export async function followerStatus(root: NodeRoot, signal?: AbortSignal): Promise<SyncStatus | undefined> {
  const client = await connect(root)
  if (client === undefined) return undefined
  try {
    return ((await ask(client, 'status', signal)) as SyncStatus | null) ?? undefined
  } finally {
    client.destroy()
  }
}

/** Whether a process follows the root, or is about to when those that paused it are done. */
export async function isFollowed(root: NodeRoot): Promise<boolean> {
  const client = await connect(root)
  client?.destroy()
  return client !== undefined
}

// By the fd: a path to a socket is short.
function placeOf(root: NodeRoot): string {
  return `/proc/self/fd/${root.fd}/${SOCKET}`
}

async function connect(root: NodeRoot): Promise<Socket | undefined> {
  const client = createConnection(placeOf(root))
  try {
    await new Promise<void>((resolve, reject) => {
      client.once('connect', resolve)
      client.once('error', reject)
    })
    return client
  } catch (error) {
    const code = errnoOf(error)
    if (code === 'ENOENT' || code === 'ECONNREFUSED') return undefined
    throw error
  }
}

async function ask(client: Socket, verb: string, signal: AbortSignal | undefined): Promise<unknown> {
  const line = await new Promise<string>((resolve, reject) => {
    createInterface({ input: client }).once('line', resolve)
    client.once('close', () => reject(new Error('the process that follows the root ended')))
    client.on('error', reject)
    signal?.addEventListener('abort', () => reject(signal.reason), { once: true })
    client.write(`${JSON.stringify({ do: verb })}\n`)
  })
  const answer = Answer.parse(JSON.parse(line))
  if (!('error' in answer)) return answer.result
  const { code, message, hint } = answer.error
  throw new LsyncError(code, message, hint === undefined ? {} : { hint })
}

function verbIn(line: string): string {
  try {
    const { do: verb } = line.length > MAX_LINE ? {} : (JSON.parse(line) as { do?: unknown })
    return String(verb)
  } catch {
    return ''
  }
}
