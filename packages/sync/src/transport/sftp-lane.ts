import { errnoOf, LsyncError } from '@lsync/posix'
import { ConnectionLostError } from '@lsync/ssh'
import type { Failure, Operation } from '../model/operation.ts'
import { type ContentOperation, hasContent, OperationDecoder } from '../protocol/operation-codec.ts'

export type PlainOperation = Exclude<Operation, ContentOperation>

/** What carries out operations without waiting for each other where it can. */
export interface OperationSink {
  apply(operation: PlainOperation): Promise<void>
  open(operation: ContentOperation): Promise<FileSink>
}

export interface FileSink {
  /** Bytes stay as they are until it resolves. */
  write(offset: number, bytes: Uint8Array): Promise<void>
  finish(): Promise<void>
  discard(): Promise<void>
}

/** A piece of a batch: one operation, or as much of a file as the batch holds. */
interface Unit {
  readonly operation: Operation
  readonly isStart: boolean
  readonly content: (readonly [offset: number, bytes: Uint8Array])[]
  end: 'finish' | 'abort' | undefined
  /** Position among the operations that ended; where it did not end, the one that it will have. */
  index: number
}

interface OpenFile {
  readonly operation: ContentOperation
  sink: FileSink | undefined
  failure: Failure | undefined
  extent: number
  done: number
}

// Files under way at once in a lane: each waits three times for the server.
const CONCURRENT = 64

/**
 * Carries out one lane over a line with latency: what makes new files goes on at once, everything else waits for all
 * before it.
 */
export class ConcurrentLane {
  readonly #decoder = new OperationDecoder()
  readonly #sink: OperationSink
  #file: OpenFile | undefined
  #before: Promise<unknown> = Promise.resolve()
  /** What ended it, once something has. */
  #failure: unknown

  constructor(sink: OperationSink) {
    this.#sink = sink
  }

  /** Batches are carried out one after the other, in the order of the calls. */
  run(batch: Uint8Array): Promise<readonly Failure[]> {
    const result = this.#before.then(() => {
      if (this.#failure !== undefined) throw this.#failure
      return this.#run(batch)
    })
    this.#before = result.catch((error) => {
      this.#failure ??= error
    })
    return result
  }

  /** Forgets the file whose end did not come. */
  async end(): Promise<void> {
    await this.#before
    await this.#file?.sink?.discard().catch(() => undefined)
    this.#file = undefined
  }

  async #run(batch: Uint8Array): Promise<readonly Failure[]> {
    const failures: Failure[] = []
    const running = new Map<string, Promise<void>>()
    let lost: unknown
    const drain = async () => {
      await Promise.all(running.values())
      if (lost !== undefined) throw lost
    }
    for (const unit of this.#unitsOf(batch)) {
      const { operation } = unit
      const path = operation.do === 'rename' ? operation.to : operation.path
      const isWhole = unit.isStart && unit.end !== undefined
      const isAlone = !((operation.do === 'file' && isWhole) || operation.do === 'symlink')
      if (isAlone || running.has(path)) await drain()
      if (running.size >= CONCURRENT) await Promise.race(running.values())
      const done = this.#carryOut(unit, failures)
        .catch((error) => {
          lost ??= error
        })
        .finally(() => running.delete(path))
      running.set(path, done)
      if (isAlone || lost !== undefined) await drain()
    }
    await drain()
    return failures.sort((left, right) => left.index - right.index)
  }

  #unitsOf(batch: Uint8Array): Unit[] {
    const units: Unit[] = []
    let ended = 0
    const add = (operation: Operation, isStart: boolean): Unit => {
      const unit: Unit = { operation, isStart, content: [], end: undefined, index: ended }
      units.push(unit)
      return unit
    }
    let unit = this.#file === undefined ? undefined : add(this.#file.operation, false)
    let position = this.#file === undefined ? undefined : { ...this.#file }
    this.#decoder.decode(batch, {
      operation: (operation) => {
        unit = add(operation, true)
        if (hasContent(operation)) position = { operation, sink: undefined, failure: undefined, extent: 0, done: 0 }
        else ended++
      },
      content: (bytes) => {
        const at = position as OpenFile
        for (let start = 0; start < bytes.length; ) {
          const [offset, length] = at.operation.extents[at.extent] as readonly [number, number]
          const size = Math.min(length - at.done, bytes.length - start)
          unit?.content.push([offset + at.done, bytes.subarray(start, start + size)])
          start += size
          at.done += size
          if (at.done < length) continue
          at.extent++
          at.done = 0
        }
      },
      finish: () => {
        ;(unit as Unit).end = 'finish'
        position = undefined
        ended++
      },
      abort: () => {
        ;(unit as Unit).end = 'abort'
        position = undefined
        ended++
      },
    })
    if (position !== undefined && unit !== undefined) this.#position = { extent: position.extent, done: position.done }
    return units
  }

  #position = { extent: 0, done: 0 }

  async #carryOut(unit: Unit, failures: Failure[]): Promise<void> {
    const { operation, index } = unit
    if (!hasContent(operation)) {
      const failure = await attempt(operation, index, () => this.#sink.apply(operation))
      if (failure !== undefined) failures.push(failure)
      return
    }
    const file: OpenFile = unit.isStart
      ? { operation, sink: undefined, failure: undefined, extent: 0, done: 0 }
      : (this.#file as OpenFile)
    if (unit.isStart) {
      file.failure = await attempt(operation, index, async () => {
        file.sink = await this.#sink.open(operation)
      })
    }
    const { sink } = file
    if (sink !== undefined) {
      file.failure ??= await attempt(operation, index, async () => {
        const results = await Promise.allSettled(unit.content.map(([offset, bytes]) => sink.write(offset, bytes)))
        for (const result of results) if (result.status === 'rejected') throw result.reason
      })
      if (file.failure !== undefined || unit.end === 'abort') {
        file.sink = undefined
        file.failure ??= await attempt(operation, index, () => sink.discard())
        if (file.failure !== undefined) await sink.discard().catch(() => undefined)
      } else if (unit.end === 'finish') file.failure = await attempt(operation, index, () => sink.finish())
    }
    if (unit.end === undefined) {
      this.#file = Object.assign(file, this.#position)
      return
    }
    if (this.#file === file) this.#file = undefined
    if (file.failure !== undefined) failures.push({ ...file.failure, index })
  }
}

async function attempt(operation: Operation, index: number, act: () => Promise<void>): Promise<Failure | undefined> {
  try {
    await act()
    return undefined
  } catch (error) {
    if (error instanceof ConnectionLostError) throw error
    const code = error instanceof LsyncError ? error.code : errnoOf(error)
    if (code === undefined) throw error
    const path = operation.do === 'rename' ? operation.to : operation.path
    return { index, code, path, message: (error as Error).message }
  }
}
