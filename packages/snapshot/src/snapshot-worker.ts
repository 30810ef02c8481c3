import { parentPort } from 'node:worker_threads'
import { LsyncError } from '@lsync/posix'
import type { TableSegment } from './object-table.ts'
import { type SaveInit, type SaveResult, Saver, type SaveTask, type SealedRest } from './save.ts'

/** What the pool sends. */
export type ToSaveWorker =
  | { readonly init: SaveInit }
  | { readonly segment: TableSegment }
  | { readonly tasks: readonly SaveTask[] }
  | { readonly takeRest: true }

/** What a worker sends: that it can begin, what it did, what it has left, or why it stopped. */
export type FromSaveWorker =
  | { readonly ready: true }
  | { readonly result: SaveResult }
  | { readonly rest: readonly SealedRest[] }
  | { readonly error: TravellingError }

/** An error as it travels: its class is known by its code. */
export interface TravellingError {
  readonly name: string
  readonly message: string
  readonly stack: string | undefined
  readonly code: string | undefined
  readonly path: string | undefined
  readonly hint: string | undefined
}

let saver: Saver | undefined

parentPort?.on('message', (message: ToSaveWorker) => {
  try {
    if ('init' in message) {
      saver = new Saver(message.init)
      send({ ready: true })
    } else if ('segment' in message) saver?.attach(message.segment)
    else if ('tasks' in message) {
      const result = (saver as Saver).save(message.tasks)
      // Packs are handed over, not copied.
      send(
        { result },
        result.packs.map(({ content }) => content.buffer as ArrayBuffer),
      )
    } else {
      const rest = (saver as Saver).takeRest()
      send(
        { rest },
        rest.map(({ content }) => content.buffer as ArrayBuffer),
      )
    }
  } catch (error) {
    send({ error: packed(error) })
  }
})

function send(message: FromSaveWorker, transfer: readonly ArrayBuffer[] = []): void {
  parentPort?.postMessage(message, transfer)
}

function packed(error: unknown): TravellingError {
  const { name, message, stack } = error instanceof Error ? error : new Error(String(error))
  const { code, path, hint } = error instanceof LsyncError ? error : {}
  return { name, message, stack, code, path, hint }
}
