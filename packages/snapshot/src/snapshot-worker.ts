import { parentPort } from 'node:worker_threads'
import type { TableSegment } from './object-table.ts'
import type { Pack } from './pack.ts'
import { type PartTask, type SaveInit, type SaveResult, Saver, type SaveTask, type SealedRest } from './save.ts'
import { packError, type TravellingError } from './thread-pool.ts'

/** What the pool sends. */
export type ToSaveWorker =
  | { readonly init: SaveInit }
  | { readonly segment: TableSegment }
  | { readonly tasks: readonly (SaveTask | PartTask)[]; readonly spare: ArrayBufferLike | undefined }
  | { readonly takeRest: true }

/** What a worker sends: that its code is there, that it can begin, what it did, what it has left, or why it stopped. */
export type FromSaveWorker =
  | { readonly loaded: true }
  | { readonly ready: true }
  | { readonly result: SaveResult }
  | { readonly packs: readonly Pack[]; readonly rest: readonly SealedRest[] }
  | { readonly error: TravellingError }

let saver: Saver | undefined

parentPort?.on('message', (message: ToSaveWorker) => {
  try {
    if ('init' in message) {
      saver = new Saver(message.init)
      send({ ready: true })
    } else if ('segment' in message) saver?.attach(message.segment)
    else if ('tasks' in message) {
      if (message.spare !== undefined) saver?.recycle(message.spare)
      const result = (saver as Saver).save(message.tasks)
      send({ result }, result.packs)
    } else {
      const packs = (saver as Saver).finishLarge()
      const rest = (saver as Saver).takeRest()
      send({ packs, rest }, [...packs, ...rest])
    }
  } catch (error) {
    send({ error: packError(error) })
  }
})
send({ loaded: true })

/** `filled`: their memory is handed over, if it is not shared, and never copied. */
function send(message: FromSaveWorker, filled: readonly { readonly content: Uint8Array }[] = []): void {
  const buffers = filled.map(({ content }) => content.buffer)
  parentPort?.postMessage(
    message,
    buffers.filter((buffer) => buffer instanceof ArrayBuffer),
  )
}
