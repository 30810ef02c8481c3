import { memoryOver } from '@lsync/posix'
import type { ObjectId } from './model/tree.ts'
import type { TableSegment } from './object-table.ts'
import type { Pack } from './pack.ts'
import type { SaveCounts, Saver, SealedRest } from './save.ts'
import type { Doer } from './thread-pool.ts'

/** Chunks to store, or what lies in a thread to be given back. */
export type StoreJob =
  | {
      readonly kind: 'chunks'
      /** One chunk after the other. */
      readonly content: SharedArrayBuffer
      readonly lengths: readonly number[]
      /** The table as it is by now. */
      readonly segments: readonly TableSegment[]
      /** Memory for a pack. */
      readonly spare: ArrayBufferLike | undefined
    }
  | { readonly kind: 'rest' }

/** What one job did. */
export interface StoreResult {
  readonly ids: readonly ObjectId[]
  readonly packs: readonly Pack[]
  readonly rests: readonly SealedRest[]
  readonly counts: Pick<SaveCounts, 'objectsAdded' | 'addedBytes'>
}

/** Stores chunks that were cut elsewhere. The saver is its own from then on. */
export class ChunkStorer implements Doer<StoreJob, StoreResult> {
  readonly #saver: Saver
  #segments: number

  /** `segments`: how many of the table the saver knows. */
  constructor(saver: Saver, segments: number) {
    this.#saver = saver
    this.#segments = segments
  }

  /** Makes new segments of the table known. */
  attach(segments: readonly TableSegment[]): void {
    for (const segment of segments.slice(this.#segments)) {
      this.#saver.attach(segment)
      this.#segments++
    }
  }

  run(job: StoreJob): StoreResult {
    if (job.kind === 'rest') {
      const packs = this.#saver.finishLarge()
      return { ids: [], rests: this.#saver.takeRest(), ...this.#taken(packs) }
    }
    this.attach(job.segments)
    if (job.spare !== undefined) this.#saver.recycle(job.spare)
    const memory = memoryOver(job.content)
    let at = 0
    const ids = job.lengths.map((length) => {
      at += length
      return this.#saver.storeChunk(memory, at - length, length)
    })
    return { ids, rests: [], ...this.#taken([]) }
  }

  close(): void {
    this.#saver.close()
  }

  #taken(more: readonly Pack[]): Pick<StoreResult, 'packs' | 'counts'> {
    const { packs, counts } = this.#saver.takeStored()
    return { packs: [...packs, ...more], counts }
  }
}
