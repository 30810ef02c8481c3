import { Worker } from 'node:worker_threads'
import { LsyncError } from '@lsync/posix'
import { giveBackMemory } from './rest.ts'
import { remoteFileSystemOf } from './source/remote.ts'
import type { FromWorker, ToWorker, TravellingError } from './sync-worker.ts'
import type { Job, JobResults, SessionInit } from './work.ts'

/** How many threads all roots of a process share. */
const WIDTH = 2
/** How many there may be while a target answers over a network: each of its calls waits far longer than it works. */
const REMOTE_WIDTH = 8
/** Encoded bytes of one worker that the target has not taken yet. */
const CREDIT_BYTES = 4 << 20
/** So long after the last round memory is given back. */
const REST_MS = 2000
const REST_FROM_BYTES = 16 << 20

interface Member {
  readonly lane: number
  readonly worker: Worker
  readonly credit: Int32Array
  task: Task | undefined
  readonly closing: Map<number, () => void>
  rested: (() => void) | undefined
  isDead: boolean
}

interface Task {
  readonly session: number
  readonly job: Job
  readonly deliver: Deliver
  readonly pay: Pay
  readonly resolve: (done: JobDone<Job['do']>) => void
  readonly reject: (error: unknown) => void
  readonly deliveries: Promise<void>[]
}

/** Hands a worker's encoded operations to a target; resolves when it has carried them out. */
export type Deliver = (lane: number, batch: Uint8Array) => Promise<void>

/** Resolves when so many bytes that a worker has written may have been. */
export type Pay = (bytes: number) => Promise<void>

export interface JobDone<K extends Job['do']> {
  readonly result: JobResults[K]
}

/**
 * Threads that do the work of all sessions of this process: system calls are synchronous, and none is made in the
 * thread that embeds this. They start with the first session and end with the last.
 */
class WorkerPool {
  readonly #members: Member[] = []
  readonly #queue: Task[] = []
  readonly #sessions = new Map<number, SessionInit>()
  #nextSession = 1
  #most = WIDTH
  #failure: unknown
  #restTimer: NodeJS.Timeout | undefined
  /** Memory of the process when it was given back last. */
  #restBytes = 0

  get width(): number {
    return Math.max(WIDTH, this.#members.length)
  }

  /** Starts the threads for a session that is about to be opened: what it needs can be opened meanwhile. */
  warm(): void {
    while (this.#members.length < WIDTH) this.#start(this.#members.length)
  }

  open(init: Omit<SessionInit, 'session'>): number {
    const session = this.#nextSession++
    const whole = { ...init, session }
    for (const { worker } of this.#members) worker.postMessage({ open: whole } satisfies ToWorker)
    this.#sessions.set(session, whole)
    if (isRemote(init.delivery)) this.#most = REMOTE_WIDTH
    this.warm()
    return session
  }

  /** Ends a session; its fds may be closed when it resolves. */
  async close(session: number): Promise<void> {
    if (!this.#sessions.delete(session)) return
    await Promise.all(
      // One that has died closes nothing any more, and holds nothing either.
      this.#members
        .filter(({ isDead }) => !isDead)
        .map(
          (member) =>
            new Promise<void>((resolve) => {
              member.worker.ref()
              member.closing.set(session, resolve)
              member.worker.postMessage({ close: session } satisfies ToWorker)
            }),
        ),
    )
    await this.cool()
  }

  /** Ends the threads if no session has any use for them. */
  async cool(): Promise<void> {
    // A session that is being closed still waits for the answers of these threads: the last one ends them.
    if (this.#sessions.size === 0 && this.#members.every(({ closing }) => closing.size === 0)) {
      this.#most = WIDTH
      this.#failure = undefined
      await Promise.all(this.#members.splice(0).map(({ worker }) => worker.terminate()))
    }
  }

  /**
   * Says that a round of some sync has ended. When none of them does anything for a while, the memory that the work took
   * is given back, unless there was so little of it since the last time that it is not worth it.
   */
  ended(): void {
    clearTimeout(this.#restTimer)
    this.#restTimer = setTimeout(() => this.#rest(), REST_MS)
    this.#restTimer.unref()
  }

  #rest(): void {
    if (process.memoryUsage.rss() < this.#restBytes + REST_FROM_BYTES) return
    if (!this.#isIdle) {
      this.ended()
      return
    }
    // The last of them to answer is followed by this thread.
    let waiting = this.#members.length
    const rested = () => {
      if (--waiting > 0) return
      if (giveBackMemory()) this.#restBytes = process.memoryUsage.rss()
      else this.ended()
    }
    for (const member of this.#members) {
      member.rested = rested
      member.worker.postMessage({ rest: true } satisfies ToWorker)
    }
  }

  get #isIdle(): boolean {
    return this.#queue.length === 0 && this.#members.every(({ task }) => task === undefined)
  }

  /** Does a job in the next free thread. Resolves when its operations have been carried out by the target, too. */
  run<K extends Job['do']>(
    session: number,
    job: Extract<Job, { do: K }>,
    deliver: Deliver,
    pay: Pay,
  ): Promise<JobResults[K]> {
    return new Promise((resolve, reject) => {
      this.#queue.push({
        session,
        job,
        deliver,
        pay,
        resolve: ({ result }) => resolve(result as JobResults[K]),
        reject,
        deliveries: [],
      })
      this.#next()
    })
  }

  #start(lane: number): void {
    const worker = new Worker(new URL('./sync-worker.ts', import.meta.url))
    const credit = new Int32Array(new SharedArrayBuffer(4))
    credit[0] = CREDIT_BYTES
    const member: Member = {
      lane,
      worker,
      credit,
      task: undefined,
      closing: new Map(),
      rested: undefined,
      isDead: false,
    }
    worker.on('message', (message: FromWorker) => this.#receive(member, message))
    worker.on('error', (error) => this.#fail(member, error))
    worker.on('exit', (code) => this.#fail(member, new Error(`a worker ended with code ${code}`)))
    // The process may end while nothing is under way.
    worker.unref()
    for (const open of this.#sessions.values()) worker.postMessage({ open } satisfies ToWorker)
    this.#members.push(member)
  }

  #next(): void {
    // One more for each job that finds none free, so that a few names never pay for eight.
    const free = this.#members.filter(({ task }) => task === undefined).length
    if (this.#queue.length > free && this.#members.length < this.#most) this.#start(this.#members.length)
    for (const member of this.#members) {
      if (member.task !== undefined) continue
      const task = this.#queue.shift()
      if (task === undefined) return
      if (this.#failure !== undefined) {
        task.reject(this.#failure)
        continue
      }
      member.task = task
      member.worker.ref()
      const { session, job } = task
      member.worker.postMessage({ session, job, credit: member.credit } satisfies ToWorker)
    }
  }

  #receive(member: Member, message: FromWorker): void {
    if ('rested' in message) {
      member.rested?.()
      member.rested = undefined
      return
    }
    if ('closed' in message) {
      member.closing.get(message.closed)?.()
      member.closing.delete(message.closed)
      release(member)
      return
    }
    const { task } = member
    if (task === undefined) return
    if ('batch' in message || 'written' in message) {
      const length = 'batch' in message ? message.batch.length : message.written
      const begun = 'batch' in message ? task.deliver(member.lane, message.batch) : task.pay(length)
      const delivery = begun.finally(() => {
        Atomics.add(member.credit, 0, length)
        Atomics.notify(member.credit, 0)
      })
      // Its failure is the job's, which waits for it; until then it must not count as unhandled.
      delivery.catch(() => undefined)
      task.deliveries.push(delivery)
      return
    }
    member.task = undefined
    release(member)
    if ('error' in message) task.reject(unpacked(message.error))
    else {
      const { result } = message
      Promise.all(task.deliveries).then(() => task.resolve({ result }), task.reject)
    }
    this.#next()
  }

  #fail(failed: Member, error: unknown): void {
    // Those that were told to end are no members any more; and of one that has died, the first error says why.
    if (!this.#members.includes(failed) || failed.isDead) return
    failed.isDead = true
    for (const resolve of failed.closing.values()) resolve()
    failed.closing.clear()
    this.#failure = error
    for (const { task } of this.#members) task?.reject(error)
    for (const task of this.#queue.splice(0)) task.reject(error)
  }
}

/** The process may end when nobody waits for this thread any more. */
function release({ worker, task, closing }: Member): void {
  if (task === undefined && closing.size === 0) worker.unref()
}

function isRemote(delivery: SessionInit['delivery']): boolean {
  return delivery.mode === 'direct' && remoteFileSystemOf(delivery.rootFd) !== undefined
}

function unpacked(error: TravellingError): Error {
  const { name, message, stack, code, path, syscall, hint } = error
  const detail = Object.fromEntries(Object.entries({ path, syscall, hint }).filter(([, value]) => value !== undefined))
  const thrown = code === undefined ? new Error(message) : new LsyncError(code, message, detail)
  thrown.name = name
  if (stack !== undefined) thrown.stack = stack
  return thrown
}

/** The threads of this process. */
export const workers = new WorkerPool()
