import type { ObjectTable } from './object-table.ts'
import type { Pack } from './pack.ts'
import type { PreparedThreads } from './prepared-threads.ts'
import { type PartTask, type SaveInit, type SaveResult, Saver, type SaveTask, type SealedRest } from './save.ts'
import type { FromSaveWorker, ToSaveWorker } from './snapshot-worker.ts'
import { endThread, type Thread, unpackError } from './thread-pool.ts'

// Starting a worker costs some 50 ms, so a small tree is saved by the calling thread alone.
const ALONE_MS = 25
// One list of tasks at work and one that waits, so that a thread is not idle while results are looked at.
const IN_FLIGHT = 2
const BATCH = 16

interface Member extends Thread {
  ready: boolean
  inFlight: number
}

/** What hands out work to a pool, and takes the results. */
export interface SaveWork {
  /** The next tasks, at most so many; none: nothing to do at the moment. */
  next(limit: number): readonly (SaveTask | PartTask)[]
  done(result: SaveResult): void
  /** Whether results may come that make more work, or nothing is left. */
  readonly isComplete: boolean
  /** Resolves when there is something to do again although no thread is at work: something was read, or written. */
  wait(): Promise<void>
}

/** Saves directories in the calling thread, and in worker threads as well when there is more to do. */
export class SavePool {
  readonly own: Saver
  readonly #init: SaveInit
  readonly #table: ObjectTable
  readonly #width: number
  readonly #threads: PreparedThreads
  #isSmall: boolean
  readonly #signal: AbortSignal | undefined
  readonly #members: Member[] = []
  /** How many segments of the table all threads know. */
  #segments: number
  #aloneMs = 0
  #failure: unknown
  #wake: (() => void) | undefined
  #deliver: (result: SaveResult) => void = () => undefined
  #packs: Pack[] = []
  #rests: SealedRest[] = []
  readonly #spares: SharedArrayBuffer[] = []

  /**
   * Of `width` threads one is the calling one. Those that are prepared begin at once. `isSmall`: there is so little to do
   * that others would be ready when it is done; they wait for `useAll`.
   */
  constructor(
    init: SaveInit,
    table: ObjectTable,
    options: {
      readonly width: number
      readonly isSmall: boolean
      readonly threads: PreparedThreads
      readonly signal: AbortSignal | undefined
    },
  ) {
    this.#init = init
    this.#table = table
    this.#width = options.width
    this.#threads = options.threads
    this.#signal = options.signal
    this.own = new Saver(init)
    this.#segments = init.segments.length
    this.#isSmall = options.isSmall
    if (!this.#isSmall && this.#threads.has('create')) this.#start()
  }

  /** Memory of a pack that has been written: a thread gets it with its next tasks. */
  recycle(memory: ArrayBufferLike): void {
    // What is not shared is small, and no use to a thread that fills packs.
    if (memory instanceof SharedArrayBuffer) this.#spares.push(memory)
  }

  /** There is more to do than it seemed. */
  useAll(): void {
    this.#isSmall = false
  }

  /** Runs until the work is complete. Stops at the first error, which it throws when no thread is at work any more. */
  async run(work: SaveWork): Promise<void> {
    this.#deliver = (result) => work.done(result)
    for (;;) {
      if (this.#signal?.aborted === true) this.#failure ??= this.#signal.reason
      if (this.#failure === undefined) this.#handOut(work)
      if (this.#failure === undefined && this.#runOwn(work)) {
        // Reads, writes and messages of workers get their turn.
        await new Promise(setImmediate)
        continue
      }
      const isBusy = this.#members.some(({ inFlight }) => inFlight > 0)
      if (this.#failure !== undefined && !isBusy) throw this.#failure
      if (work.isComplete && !isBusy) return
      await (isBusy || this.#isStarting ? Promise.race([this.#message(), work.wait()]) : work.wait())
    }
  }

  /** What lies in all threads: packs that are full enough, and the rest. No work may be under way. */
  async takeRest(): Promise<{ readonly packs: readonly Pack[]; readonly rests: readonly SealedRest[] }> {
    for (const { worker, ready } of this.#members) {
      if (ready) worker.postMessage({ takeRest: true } satisfies ToSaveWorker)
    }
    const expected = this.#members.filter(({ ready }) => ready).length * 2
    while (this.#rests.length < expected && this.#failure === undefined) await this.#message()
    if (this.#failure !== undefined) throw this.#failure
    return { packs: [...this.own.finishLarge(), ...this.#packs], rests: [...this.own.takeRest(), ...this.#rests] }
  }

  async close(): Promise<void> {
    await Promise.all(this.#members.map(endThread))
    this.own.close()
  }

  get #isStarting(): boolean {
    return this.#members.some(({ ready }) => !ready)
  }

  #handOut(work: SaveWork): void {
    this.#table.grow()
    for (const segment of this.#table.segments.slice(this.#segments)) {
      this.own.attach(segment)
      for (const { worker } of this.#members) worker.postMessage({ segment } satisfies ToSaveWorker)
      this.#segments++
    }
    for (let load = 0; load < IN_FLIGHT; load++) {
      for (const member of this.#members) {
        if (!member.ready || member.inFlight > load) continue
        const tasks = work.next(BATCH)
        if (tasks.length === 0) return
        member.inFlight++
        member.worker.postMessage({ tasks, spare: this.#spares.pop() } satisfies ToSaveWorker)
      }
    }
  }

  #runOwn(work: SaveWork): boolean {
    const tasks = work.next(1)
    if (tasks.length === 0) return false
    const start = performance.now()
    const spare = this.#spares.pop()
    if (spare !== undefined) this.own.recycle(spare)
    work.done(this.own.save(tasks))
    this.#aloneMs += performance.now() - start
    if (!this.#isSmall && this.#aloneMs > ALONE_MS) this.#start()
    return true
  }

  #message(): Promise<void> {
    return new Promise((resolve) => {
      this.#wake = resolve
    })
  }

  #start(): void {
    while (this.#members.length < this.#width - 1) {
      const thread = this.#threads.take('create')
      const { worker } = thread
      const member: Member = { ...thread, ready: false, inFlight: 0 }
      worker.on('message', (message: FromSaveWorker) => this.#receive(member, message))
      worker.on('error', (error) => {
        member.inFlight = 0
        this.#failure ??= error
        this.#awake()
      })
      const segments = this.#table.segments.slice(0, this.#segments)
      worker.postMessage({ init: { ...this.#init, segments } } satisfies ToSaveWorker)
      this.#members.push(member)
    }
  }

  #receive(member: Member, message: FromSaveWorker): void {
    if ('loaded' in message) return
    if ('ready' in message) member.ready = true
    else if ('rest' in message) {
      this.#packs.push(...message.packs)
      this.#rests.push(...message.rest)
    } else {
      member.inFlight--
      if ('error' in message) this.#failure ??= unpackError(message.error)
      else {
        try {
          this.#deliver(message.result)
        } catch (error) {
          this.#failure ??= error
        }
      }
    }
    this.#awake()
  }

  #awake(): void {
    const wake = this.#wake
    this.#wake = undefined
    wake?.()
  }
}
