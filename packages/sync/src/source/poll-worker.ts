import { parentPort } from 'node:worker_threads'
import { PollTree } from './poll-tree.ts'
import type { Hint } from './source.ts'

/** What the main thread asks for. Descriptors belong to the process, so their numbers travel. */
export type ToPollWorker =
  | { readonly add: number; readonly rootFd: number; readonly intervalMs: number; readonly ticket: number }
  /** A whole pass that begins now or later is to be reported under this number. */
  | { readonly drain: number; readonly ticket: number }
  | { readonly remove: number }

export type FromPollWorker =
  | { readonly root: number; readonly hints: readonly Hint[] }
  | { readonly drained: number }
  | { readonly removed: number }
  | { readonly root: number; readonly failed: string }

// A pass works for so long at a time, and then rests three times as long unless somebody waits for it: never more than a
// quarter of one core.
const SLICE_MS = 20
const REST = 3

class PolledRoot {
  readonly #id: number
  readonly #tree: PollTree
  readonly #intervalMs: number
  #waiting: number[]
  #running: number[] = []
  #wake: (() => void) | undefined
  #stopped = false

  constructor({ add, rootFd, intervalMs, ticket }: Extract<ToPollWorker, { add: number }>) {
    this.#id = add
    this.#tree = new PollTree(rootFd, Date.now)
    this.#intervalMs = intervalMs
    this.#waiting = [ticket]
  }

  drain(ticket: number): void {
    this.#waiting.push(ticket)
    this.#wake?.()
  }

  stop(): void {
    this.#stopped = true
    this.#wake?.()
  }

  async run(): Promise<void> {
    while (!this.#stopped) {
      const startedAt = performance.now()
      this.#running = this.#waiting.splice(0)
      await this.#pass()
      for (const ticket of this.#running.splice(0)) send({ drained: ticket })
      await this.#rest(startedAt + this.#intervalMs - performance.now())
    }
    for (const ticket of [...this.#waiting, ...this.#running]) send({ drained: ticket })
  }

  async #pass(): Promise<void> {
    let hints: Hint[] = []
    let sliceAt = performance.now()
    const flush = () => {
      if (hints.length > 0) send({ root: this.#id, hints })
      hints = []
    }
    try {
      for (const found of this.#tree.pass()) {
        if (this.#stopped) return
        hints.push(...found)
        const workedMs = performance.now() - sliceAt
        if (workedMs < SLICE_MS) continue
        flush()
        // The rest ends as soon as somebody waits.
        await new Promise(setImmediate)
        if (this.#running.length === 0 && this.#waiting.length === 0) await this.#rest(workedMs * REST)
        sliceAt = performance.now()
      }
      flush()
    } catch (error) {
      flush()
      send({ root: this.#id, failed: (error as Error).message })
    }
  }

  #rest(ms: number): Promise<void> {
    if (ms <= 0 || this.#stopped || this.#waiting.length > 0) return Promise.resolve()
    return new Promise((resolve) => {
      const done = () => {
        clearTimeout(timer)
        this.#wake = undefined
        resolve()
      }
      const timer = setTimeout(done, ms)
      this.#wake = done
    })
  }
}

const roots = new Map<number, PolledRoot>()

parentPort?.on('message', (message: ToPollWorker) => {
  if ('add' in message) {
    const root = new PolledRoot(message)
    roots.set(message.add, root)
    root.run().then(() => {
      roots.delete(message.add)
      send({ removed: message.add })
    })
  } else if ('drain' in message) roots.get(message.drain)?.drain(message.ticket)
  else roots.get(message.remove)?.stop()
})

function send(message: FromPollWorker): void {
  parentPort?.postMessage(message)
}
