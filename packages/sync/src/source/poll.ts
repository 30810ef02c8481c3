import { Worker } from 'node:worker_threads'
import type { FromPollWorker, ToPollWorker } from './poll-worker.ts'
import type { BlindSpot, Hint, Source, SourceRequest } from './source.ts'

/** One thread that looks at all the roots of a process that are polled, one directory after the other. */
class PollThread {
  readonly #worker = new Worker(new URL('./poll-worker.ts', import.meta.url))
  readonly #roots = new Map<number, { handle: (hint: Hint) => void; ended: () => void }>()
  readonly #tickets = new Map<number, () => void>()
  #count = 0

  constructor() {
    this.#worker.on('message', (message: FromPollWorker) => this.#receive(message))
    this.#worker.on('error', (error) => this.#fail(error))
  }

  get isIdle(): boolean {
    return this.#roots.size === 0
  }

  /** Resolves when the first pass, with which later ones are compared, is complete. */
  async add(rootFd: number, intervalMs: number, handle: (hint: Hint) => void): Promise<number> {
    const id = ++this.#count
    this.#roots.set(id, { handle, ended: () => undefined })
    await this.#ticketed((ticket) => this.#post({ add: id, rootFd, intervalMs, ticket }))
    return id
  }

  drain(root: number): Promise<void> {
    return this.#ticketed((ticket) => this.#post({ drain: root, ticket }))
  }

  #ticketed(ask: (ticket: number) => void): Promise<void> {
    return new Promise((resolve) => {
      const ticket = ++this.#count
      this.#tickets.set(ticket, resolve)
      ask(ticket)
    })
  }

  /** When it resolves, the thread has let go of the root's descriptor. */
  async remove(id: number): Promise<void> {
    const root = this.#roots.get(id)
    if (root === undefined) return
    await new Promise<void>((resolve) => {
      root.ended = resolve
      this.#post({ remove: id })
    })
    this.#roots.delete(id)
  }

  async end(): Promise<void> {
    await this.#worker.terminate()
  }

  #post(message: ToPollWorker): void {
    this.#worker.postMessage(message)
  }

  #receive(message: FromPollWorker): void {
    if ('drained' in message) {
      this.#tickets.get(message.drained)?.()
      this.#tickets.delete(message.drained)
    } else if ('removed' in message) this.#roots.get(message.removed)?.ended()
    else {
      const root = this.#roots.get(message.root)
      if ('failed' in message) root?.handle({ kind: 'lost', reason: message.failed })
      else for (const hint of message.hints) root?.handle(hint)
    }
  }

  #fail(error: Error): void {
    if (thread === this) thread = undefined
    for (const { handle, ended } of this.#roots.values()) {
      handle({ kind: 'lost', reason: `the polling thread ended: ${error.message}` })
      ended()
    }
    for (const resolve of this.#tickets.values()) resolve()
    this.#tickets.clear()
  }
}

let thread: PollThread | undefined

/**
 * Looks at every directory of a root again and again and compares names, inodes and times with the last look: the only way
 * to see what other machines write to a shared file system. Costs a stat of every file each time, in a thread of its own,
 * at most a quarter of a core.
 */
export class PollSource implements Source {
  readonly kind = 'poll'
  readonly blindSpots: readonly BlindSpot[]
  readonly #request: SourceRequest
  #thread: PollThread | undefined
  #id: number | undefined

  constructor(request: SourceRequest) {
    this.#request = request
    this.blindSpots = [
      {
        code: 'POLL_DELAY',
        message: `Changes are seen when their directory is next looked at, every ${request.pollIntervalMs / 1000} s at best.`,
      },
    ]
  }

  async start(handle: (hint: Hint) => void): Promise<void> {
    thread ??= new PollThread()
    this.#thread = thread
    this.#id = await thread.add(this.#request.rootFd, this.#request.pollIntervalMs, handle)
  }

  async drain(): Promise<void> {
    if (this.#id !== undefined) await this.#thread?.drain(this.#id)
  }

  async stop(): Promise<void> {
    const [stopped, id] = [this.#thread, this.#id]
    this.#thread = undefined
    this.#id = undefined
    if (stopped === undefined || id === undefined) return
    await stopped.remove(id)
    if (!stopped.isIdle) return
    if (thread === stopped) thread = undefined
    await stopped.end()
  }
}
