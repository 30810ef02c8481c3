import { parentPort, threadId } from 'node:worker_threads'
import { LsyncError, takeOwnUmask } from '@lsync/posix'
import { collectGarbage } from './rest.ts'
import { type Job, type JobResults, type SessionInit, Workshop } from './work.ts'

/** What the pool says to a worker. */
export type ToWorker =
  | { readonly open: SessionInit }
  | { readonly close: number }
  /** Nothing has happened for a while. */
  | { readonly rest: true }
  | {
      readonly session: number
      readonly job: Job
      /** Bytes that may still be handed over; the worker takes from it, the pool gives back. */
      readonly credit: Int32Array
    }

/** What a worker says to the pool. */
export type FromWorker =
  | { readonly batch: Uint8Array<ArrayBuffer> }
  /** So many bytes of one file were written, and it waits until they are paid for. */
  | { readonly written: number }
  | { readonly result: JobResults[keyof JobResults] }
  | { readonly error: TravellingError }
  | { readonly closed: number }
  | { readonly rested: true }

/** An error on its way between threads. */
export interface TravellingError {
  readonly name: string
  readonly message: string
  readonly stack: string | undefined
  readonly code: string | undefined
  readonly path: string | undefined
  readonly syscall: string | undefined
  readonly hint: string | undefined
}

const workshops = new Map<number, Workshop>()
const hasOwnUmask = takeOwnUmask()
let credit: Int32Array | undefined

function emit(batch: Uint8Array<ArrayBuffer>): void {
  const { length } = batch
  parentPort?.postMessage({ batch } satisfies FromWorker, [batch.buffer])
  if (credit === undefined) return
  // The calling thread gives back what the target has taken; until then nothing more is read from the disk.
  for (let left = Atomics.sub(credit, 0, length) - length; left <= 0; left = Atomics.load(credit, 0)) {
    Atomics.wait(credit, 0, left)
  }
}

function pay(bytes: number): void {
  if (credit === undefined) return
  const whole = Atomics.load(credit, 0)
  Atomics.sub(credit, 0, bytes)
  parentPort?.postMessage({ written: bytes } satisfies FromWorker)
  // Nobody else takes from it while a worker writes itself.
  for (let left = whole - bytes; left < whole; left = Atomics.load(credit, 0)) Atomics.wait(credit, 0, left)
}

parentPort?.on('message', (message: ToWorker) => {
  if ('open' in message) {
    workshops.set(message.open.session, new Workshop(message.open, { emit, pay, hasOwnUmask }))
    return
  }
  if ('close' in message) {
    const workshop = workshops.get(message.close)
    workshops.delete(message.close)
    workshop?.close()
    parentPort?.postMessage({ closed: message.close } satisfies FromWorker)
    return
  }
  if ('rest' in message) {
    collectGarbage()
    parentPort?.postMessage({ rested: true } satisfies FromWorker)
    return
  }
  try {
    credit = message.credit
    const workshop = workshops.get(message.session)
    if (workshop === undefined) throw new Error(`worker ${threadId} does not know session ${message.session}`)
    const result = workshop.run(message.job)
    const transfer = result !== undefined && 'arena' in result ? [result.arena.buffer] : []
    parentPort?.postMessage({ result } satisfies FromWorker, transfer)
  } catch (error) {
    parentPort?.postMessage({ error: packed(error) } satisfies FromWorker)
  }
})

function packed(error: unknown): TravellingError {
  const { name, message, stack } = error instanceof Error ? error : new Error(String(error))
  const detail = error instanceof LsyncError ? error : undefined
  return {
    name,
    message,
    stack,
    code: detail?.code,
    path: detail?.path,
    syscall: detail?.syscall,
    hint: detail?.hint,
  }
}
