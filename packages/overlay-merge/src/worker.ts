import { parentPort, threadId } from 'node:worker_threads'
import { LsyncError } from '@lsync/posix'
import type { EndMessage } from './end-worker.ts'
import { type Job, type JobResult, type WorkInit, Workshop } from './work.ts'

/** What the pool sends: a new workshop, a job for it, or that there are no more. */
export type ToWorker = { readonly init: WorkInit; readonly tag: string } | { readonly job: Job } | EndMessage

/** What a worker sends: that it can begin, or how a job ended (`isPart`: what it has given so far). */
export type FromWorker =
  | { readonly ready: true }
  | { readonly result: JobResult; readonly isPart?: true }
  | { readonly error: TravellingError }

/** An error as it travels: its class is known by its code. */
export interface TravellingError {
  readonly name: string
  readonly message: string
  readonly stack?: string | undefined
  readonly code?: string
  readonly path?: string | undefined
  readonly syscall?: string | undefined
  readonly hint?: string | undefined
}

let workshop: Workshop | undefined

parentPort?.on('message', (message: ToWorker) => {
  if ('end' in message) {
    parentPort?.close()
    return
  }
  if ('init' in message) {
    const isFirst = workshop === undefined
    workshop = new Workshop(message.init, `${message.tag}-${threadId}`)
    if (isFirst) send({ ready: true })
    return
  }
  try {
    send({ result: (workshop as Workshop).run(message.job, (result) => send({ result, isPart: true })) })
  } catch (error) {
    send({ error: packed(error) })
  }
})

function send(message: FromWorker): void {
  parentPort?.postMessage(message)
}

function packed(error: unknown): TravellingError {
  const { name, message, stack } = error instanceof Error ? error : new Error(String(error))
  if (!(error instanceof LsyncError)) return { name, message, stack }
  const { code, path, syscall, hint } = error
  return { name, message, stack, code, path, syscall, hint }
}
