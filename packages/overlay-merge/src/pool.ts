import { Worker } from 'node:worker_threads'
import { LsyncError } from '@lsync/posix'
import { type Job, type JobResult, type WorkInit, Workshop } from './work.ts'
import type { ToWorker, TravellingError } from './worker.ts'

// Starting a worker costs about 60 ms, so work that the calling thread finishes sooner never pays for one.
const ALONE_MS = 60

interface Member {
  readonly worker: Worker
  take: ((answer: { result?: JobResult; error?: TravellingError }) => void) | undefined
}

export interface PoolOptions {
  /** Worker threads; 0 for none. */
  readonly workers: number
  /** How long the calling thread works before it starts them. */
  readonly aloneMs?: number
  readonly signal?: AbortSignal | undefined
}

/**
 * Runs jobs: in the calling thread at first and when `workers` is 0, else in worker threads, each busy with one job at
 * a time. The kernel calls are synchronous, so the number of workers is the number of calls in flight.
 */
export class Pool {
  readonly #workers: number
  readonly #alone: number
  readonly #signal: AbortSignal | undefined
  readonly #members: Member[] = []
  #init: WorkInit
  #own: Workshop
  #aloneMs = 0
  #generation = 0

  constructor(init: WorkInit, options: PoolOptions) {
    this.#init = init
    this.#workers = options.workers
    this.#alone = options.aloneMs ?? ALONE_MS
    this.#signal = options.signal
    this.#own = new Workshop(init, this.#tag())
  }

  /** Gives all workers more to know. No job may be under way. */
  prepare(init: WorkInit): void {
    this.#init = init
    this.#generation++
    this.#own = new Workshop(init, this.#tag())
    for (const { worker } of this.#members) worker.postMessage({ init, tag: this.#tag() } satisfies ToWorker)
  }

  /**
   * Runs jobs until `next` has none left and all are done. `done` gets each result in the order of completion, and
   * may make more work for `next`. Stops at the first error, after the jobs under way.
   */
  async drain(next: (idle: number) => Job | undefined, done: (result: JobResult) => void): Promise<void> {
    while (this.#workers === 0 || (this.#aloneMs < this.#alone && this.#members.length === 0)) {
      this.#signal?.throwIfAborted()
      const job = next(1)
      if (job === undefined) return
      const start = performance.now()
      done(this.#own.run(job))
      this.#aloneMs += performance.now() - start
      // A caller's timers, signals and progress get their turn between jobs.
      if (this.#aloneMs > 20) await new Promise(setImmediate)
    }
    this.#start()
    await this.#share(next, done)
  }

  #start(): void {
    while (this.#members.length < this.#workers) {
      const worker = new Worker(new URL('./worker.ts', import.meta.url))
      const member: Member = { worker, take: undefined }
      worker.on('message', (answer) => {
        const { take } = member
        member.take = undefined
        take?.(answer)
      })
      worker.on('error', (error) => {
        const { take } = member
        member.take = undefined
        take?.({ error: { name: error.name, message: error.message, stack: error.stack } })
      })
      worker.postMessage({ init: this.#init, tag: this.#tag() } satisfies ToWorker)
      this.#members.push(member)
    }
  }

  #share(next: (idle: number) => Job | undefined, done: (result: JobResult) => void): Promise<void> {
    return new Promise((resolve, reject) => {
      let failure: unknown
      const advance = () => {
        const idle = this.#members.filter(({ take }) => take === undefined)
        for (const [index, member] of idle.entries()) {
          if (failure === undefined && this.#signal?.aborted === true) failure = this.#signal.reason
          if (failure !== undefined) break
          const job = next(idle.length - index)
          if (job === undefined) break
          member.take = (answer) => {
            if (answer.error !== undefined) failure ??= unpacked(answer.error)
            else {
              try {
                done(answer.result as JobResult)
              } catch (error) {
                failure ??= error
              }
            }
            advance()
          }
          member.worker.postMessage({ job } satisfies ToWorker)
        }
        if (this.#members.every(({ take }) => take === undefined)) {
          if (failure === undefined) resolve()
          else reject(failure)
        }
      }
      advance()
    })
  }

  #tag(): string {
    return `t${process.pid}-${this.#generation}`
  }

  /** How many jobs can be under way. */
  get width(): number {
    return Math.max(1, this.#workers)
  }

  async close(): Promise<void> {
    await Promise.all(this.#members.map(({ worker }) => worker.terminate()))
    this.#members.length = 0
  }
}

function unpacked(error: TravellingError): Error {
  const { name, message, stack, code, path, syscall, hint } = error
  const detail = Object.fromEntries(Object.entries({ path, syscall, hint }).filter(([, value]) => value !== undefined))
  const thrown = code === undefined ? new Error(message) : new LsyncError(code, message, detail)
  thrown.name = name
  if (stack !== undefined) thrown.stack = stack
  return thrown
}
