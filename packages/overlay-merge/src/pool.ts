import { Worker } from 'node:worker_threads'
import { LsyncError, randomHex } from '@lsync/posix'
import { endWorker } from './end-worker.ts'
import { type Job, type JobResult, type WorkInit, Workshop } from './work.ts'
import type { FromWorker, ToWorker, TravellingError } from './worker.ts'

// Starting a worker takes about 50 ms, so work that the calling thread finishes sooner never pays for one.
const ALONE_MS = 25
// One job at work and one that waits, so that a worker is not idle while the calling thread works itself.
const IN_FLIGHT = 2
// Up to so many threads the calling one is one of them. With more, each waits for a network, and none may hold up the
// handing out.
const SHARED_WIDTH = 4
/**
 * How long a job of cloning goes on with what it finds itself before it gives the rest back: what one thread finds, the
 * others get only then.
 */
export const TURN_MS = 6

interface Member {
  readonly worker: Worker
  ready: boolean
  inFlight: number
}

/** Takes one thread's share off the end of what waits, so that all that look for work find some. */
export function takeShare<T>(pending: T[], idle: number): T[] {
  return pending.splice(-Math.min(64, Math.max(1, Math.ceil(pending.length / (idle * 2)))))
}

/**
 * Hands out a list in pieces of at most `size`, smaller ones towards its end, after the jobs of `first`; `done` gets what
 * each piece gave.
 */
export function drainList<T>(
  pool: Pool,
  items: readonly T[],
  size: number,
  jobOf: (piece: readonly T[]) => Job,
  done: (result: JobResult) => void = () => undefined,
  first: readonly Job[] = [],
): Promise<void> {
  const before = [...first]
  let at = 0
  return pool.drain((idle) => {
    const job = before.pop()
    if (job !== undefined) return job
    if (at >= items.length) return undefined
    const start = at
    at += Math.min(size, Math.ceil((items.length - at) / (idle * 2)))
    return jobOf(items.slice(start, at))
  }, done)
}

export interface PoolOptions {
  /** Threads at work, the calling one included; 0 and 1 mean that one alone. */
  readonly workers: number
  readonly signal?: AbortSignal | undefined
  /** Tells quickly whether the work will pay for workers, which then start at once. */
  readonly expectsMuch?: () => boolean
}

/**
 * Runs jobs in the calling thread and, when there is enough to do, in worker threads. The kernel calls are synchronous,
 * so the number of threads is the number of calls in flight.
 */
export class Pool {
  readonly #width: number
  readonly #signal: AbortSignal | undefined
  readonly #members: Member[] = []
  #init: WorkInit
  #own: Workshop
  #aloneMs = 0
  #generation = 0
  #wake: (() => void) | undefined
  #done: ((result: JobResult) => void) | undefined
  #failure: unknown

  constructor(init: WorkInit, options: PoolOptions) {
    this.#init = init
    this.#width = Math.max(1, options.workers)
    this.#signal = options.signal
    this.#own = new Workshop(init, this.#tag())
    const isShared = this.#width > 1 && this.#width <= SHARED_WIDTH
    if (isShared && options.expectsMuch?.() === true) this.#start()
  }

  /** Gives all workers more to know. No job may be under way. */
  prepare(init: WorkInit): void {
    this.#init = init
    this.#generation++
    this.#own = new Workshop(init, this.#tag())
    for (const { worker } of this.#members) worker.postMessage({ init, tag: this.#tag() } satisfies ToWorker)
  }

  /**
   * Runs jobs until `next` has none left and all are done. `next` is told how many threads look for work; `done` gets
   * each result (or part of one) in the order of completion, and may make more work for `next`. Stops at the first error, after the jobs
   * under way.
   */
  async drain(next: (idle: number) => Job | undefined, done: (result: JobResult) => void): Promise<void> {
    this.#done = done
    this.#failure = undefined
    try {
      for (;;) {
        if (this.#signal?.aborted === true) this.#failure ??= this.#signal.reason
        if (this.#failure === undefined) this.#handOut(next)
        const job = this.#failure === undefined && this.#worksItself ? next(this.#idle + 1) : undefined
        if (job !== undefined) await this.#runOwn(job, done)
        else if (this.#members.some(({ inFlight }) => inFlight > 0)) await this.#message()
        else if (this.#failure !== undefined) throw this.#failure
        else if (this.#worksItself || !this.#isStarting) return
        else await this.#message()
      }
    } finally {
      this.#done = undefined
    }
  }

  get #worksItself(): boolean {
    return this.#width <= SHARED_WIDTH || !this.#members.some(({ ready }) => ready)
  }

  get #isStarting(): boolean {
    return this.#members.some(({ ready }) => !ready)
  }

  get #idle(): number {
    return this.#members.filter(({ ready, inFlight }) => ready && inFlight === 0).length
  }

  #handOut(next: (idle: number) => Job | undefined): void {
    for (let load = 0; load < IN_FLIGHT; load++) {
      for (const member of this.#members) {
        if (!member.ready || member.inFlight > load) continue
        const job = next(this.#members.length + 1)
        if (job === undefined) return
        member.inFlight++
        member.worker.postMessage({ job } satisfies ToWorker)
      }
    }
  }

  async #runOwn(job: Job, done: (result: JobResult) => void): Promise<void> {
    const start = performance.now()
    try {
      done(this.#own.run(job, done))
    } catch (error) {
      this.#failure ??= error
    }
    if (this.#width > 1 && this.#members.length === 0) {
      this.#aloneMs += performance.now() - start
      if (this.#aloneMs > ALONE_MS) this.#start()
    }
    // Messages of workers, and a caller's timers and signals, get their turn between jobs.
    if (this.#members.length > 0 || this.#aloneMs > ALONE_MS || this.#signal !== undefined) {
      await new Promise(setImmediate)
    }
  }

  #message(): Promise<void> {
    return new Promise((resolve) => {
      this.#wake = resolve
    })
  }

  #start(): void {
    const count = this.#width <= SHARED_WIDTH ? this.#width - 1 : this.#width
    while (this.#members.length < count) {
      const worker = new Worker(new URL('./worker.ts', import.meta.url), { resourceLimits: WORKER_LIMITS })
      const member: Member = { worker, ready: false, inFlight: 0 }
      worker.on('message', (message: FromWorker) => this.#receive(member, message))
      worker.on('error', (error) => this.#receive(member, { error }))
      worker.postMessage({ init: this.#init, tag: this.#tag() } satisfies ToWorker)
      this.#members.push(member)
    }
  }

  #receive(member: Member, message: FromWorker): void {
    if ('ready' in message) member.ready = true
    else {
      if ('error' in message || message.isPart !== true) member.inFlight--
      if ('error' in message) this.#failure ??= unpacked(message.error)
      else {
        try {
          this.#done?.(message.result)
        } catch (error) {
          this.#failure ??= error
        }
      }
    }
    const wake = this.#wake
    this.#wake = undefined
    wake?.()
  }

  // What an earlier run has put into the trash is still there when it is resumed, also by the same process.
  readonly #run = randomHex(6)

  #tag(): string {
    return `t${this.#run}-${this.#generation}`
  }

  async close(): Promise<void> {
    await Promise.all(this.#members.map(({ worker }) => endWorker(worker)))
    this.#members.length = 0
  }
}

// A worker holds some directories at a time; small young generations keep sixteen of them below 150 MB.
const WORKER_LIMITS = { maxYoungGenerationSizeMb: 4 }

function unpacked(error: TravellingError): Error {
  const { name, message, stack, code, path, syscall, hint } = error
  const detail = Object.fromEntries(Object.entries({ path, syscall, hint }).filter(([, value]) => value !== undefined))
  const thrown = code === undefined ? new Error(message) : new LsyncError(code, message, detail)
  thrown.name = name
  if (stack !== undefined) thrown.stack = stack
  return thrown
}
