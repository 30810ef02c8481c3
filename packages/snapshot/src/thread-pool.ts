import { parentPort, Worker } from 'node:worker_threads'
import { LsyncError } from '@lsync/posix'
import type { PreparedThreads, ThreadUse } from './prepared-threads.ts'

// Starting a worker costs some 50 ms, so a small job is done by the calling thread alone.
const ALONE_MS = 25

/** Something that does jobs with synchronous calls, in whatever thread it was made. */
export interface Doer<Job, Result> {
  run(job: Job): Result | Promise<Result>
  close(): void
}

type ToThread<Init, Job> = { readonly init: Init } | { readonly id: number; readonly job: Job }

type FromThread<Result> =
  | { readonly loaded: true }
  | { readonly ready: true }
  | { readonly id: number; readonly result: Result }
  | { readonly id: number; readonly error: TravellingError }

/** An error as it travels: its class is known by its code. */
export interface TravellingError {
  readonly name: string
  readonly message: string
  readonly stack: string | undefined
  readonly code: string | undefined
  readonly path: string | undefined
  readonly hint: string | undefined
}

interface Waiting<Job, Result> {
  readonly job: Job
  readonly transfer: readonly ArrayBuffer[]
  readonly resolve: (result: Result) => void
  readonly reject: (error: unknown) => void
}

/** A worker thread. */
export interface Thread {
  readonly worker: Worker
  /** Resolves when it has loaded its code, or never will. */
  readonly loaded: Promise<void>
}

interface Member<Job, Result> extends Thread {
  readonly jobs: Map<number, Waiting<Job, Result>>
  isReady: boolean
}

// One job at work and one that waits.
const IN_FLIGHT = 2

/** Does jobs in the calling thread, and in worker threads as well when there is more to do. */
export class ThreadPool<Init, Job, Result> {
  readonly #init: Init
  readonly #use: ThreadUse
  readonly #threads: PreparedThreads
  readonly #width: number
  readonly #own: Doer<Job, Result>
  readonly #members: Member<Job, Result>[] = []
  #queue: Waiting<Job, Result>[] = []
  #aloneMs = 0
  #nextId = 0
  #isRunning = false

  /** Of `width` threads one is the calling one, where `own` does jobs. Those that are prepared for this begin at once. */
  constructor(
    use: ThreadUse,
    init: Init,
    own: Doer<Job, Result>,
    options: { readonly width: number; readonly threads: PreparedThreads },
  ) {
    this.#use = use
    this.#init = init
    this.#own = own
    this.#width = options.width
    this.#threads = options.threads
    if (this.#threads.has(use)) this.#start()
  }

  /** Does a job. Memory in `transfer` is given away. */
  run(job: Job, transfer: readonly ArrayBuffer[] = []): Promise<Result> {
    return new Promise((resolve, reject) => {
      this.#queue.push({ job, transfer, resolve, reject })
      this.#handOut()
    })
  }

  /** Has each worker thread that does jobs do this one. */
  runEach(job: Job): Promise<Result[]> {
    const ready = this.#members.filter(({ isReady }) => isReady)
    return Promise.all(
      ready.map(
        (member) =>
          new Promise<Result>((resolve, reject) => this.#send(member, { job, transfer: [], resolve, reject })),
      ),
    )
  }

  async close(): Promise<void> {
    await Promise.all(this.#members.map(endThread))
    this.#own.close()
  }

  #handOut(): void {
    for (let load = 0; load < IN_FLIGHT; load++) {
      for (const member of this.#members) {
        if (!member.isReady || member.jobs.size > load) continue
        const waiting = this.#queue.shift()
        if (waiting === undefined) return
        this.#send(member, waiting)
      }
    }
    if (!this.#isRunning && this.#queue.length > 0) this.#runOwn()
  }

  #send({ worker, jobs }: Member<Job, Result>, waiting: Waiting<Job, Result>): void {
    const id = this.#nextId++
    jobs.set(id, waiting)
    worker.postMessage({ id, job: waiting.job } satisfies ToThread<Init, Job>, waiting.transfer)
  }

  #runOwn(): void {
    this.#isRunning = true
    setImmediate(async () => {
      const waiting = this.#queue.shift()
      const start = performance.now()
      try {
        if (waiting !== undefined) waiting.resolve(await this.#own.run(waiting.job))
      } catch (error) {
        waiting?.reject(error)
      }
      this.#isRunning = false
      this.#aloneMs += performance.now() - start
      if (this.#aloneMs > ALONE_MS) this.#start()
      if (this.#queue.length > 0) this.#handOut()
    })
  }

  #start(): void {
    while (this.#members.length < this.#width - 1) {
      const thread = this.#threads.take(this.#use)
      const { worker } = thread
      const member: Member<Job, Result> = { ...thread, jobs: new Map(), isReady: false }
      worker.on('message', (message: FromThread<Result>) => {
        if ('loaded' in message) return
        if ('ready' in message) {
          member.isReady = true
          this.#handOut()
          return
        }
        const waiting = member.jobs.get(message.id)
        member.jobs.delete(message.id)
        if ('error' in message) waiting?.reject(unpackError(message.error))
        else waiting?.resolve(message.result)
        this.#handOut()
      })
      worker.on('error', (error) => {
        for (const { reject } of [...member.jobs.values(), ...this.#queue]) reject(error)
        member.jobs.clear()
        this.#queue = []
      })
      worker.postMessage({ init: this.#init } satisfies ToThread<Init, Job>)
      this.#members.push(member)
    }
  }
}

/** Starts a thread of a module whose first message says that it is loaded. */
export function startThread(module: URL): Thread {
  const worker = new Worker(module)
  const loaded = new Promise<void>((resolve) => {
    worker.once('message', () => resolve())
    worker.once('exit', () => resolve())
  })
  return { worker, loaded }
}

/** Ends a thread. Not while it loads koffi: a native module that is interrupted there takes the process with it. */
export async function endThread({ worker, loaded }: Thread): Promise<void> {
  await loaded
  await worker.terminate()
}

/** Makes a worker's module one that does the jobs of a pool. */
export function serveJobs<Init, Job, Result>(make: (init: Init) => Doer<Job, Result>): void {
  let doer: Doer<Job, Result> | undefined
  parentPort?.on('message', async (message: ToThread<Init, Job>) => {
    if ('init' in message) {
      doer = make(message.init)
      parentPort?.postMessage({ ready: true } satisfies FromThread<Result>)
      return
    }
    const { id, job } = message
    try {
      const result = await (doer as Doer<Job, Result>).run(job)
      parentPort?.postMessage({ id, result } satisfies FromThread<Result>)
    } catch (error) {
      parentPort?.postMessage({ id, error: packError(error) } satisfies FromThread<Result>)
    }
  })
  parentPort?.postMessage({ loaded: true } satisfies FromThread<Result>)
}

export function packError(error: unknown): TravellingError {
  const { name, message, stack } = error instanceof Error ? error : new Error(String(error))
  const { code, path, hint } = error instanceof LsyncError ? error : {}
  return { name, message, stack, code, path, hint }
}

export function unpackError({ name, message, stack, code, path, hint }: TravellingError): Error {
  const detail = { ...(path === undefined ? {} : { path }), ...(hint === undefined ? {} : { hint }) }
  const error = code === undefined ? new Error(message) : new LsyncError(code, message, detail)
  error.name = name
  if (stack !== undefined) error.stack = stack
  return error
}
