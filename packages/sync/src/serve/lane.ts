import { errnoOf, LsyncError } from '@lsync/posix'
import type { Applier, FileWriter } from '../applier.ts'
import type { Failure, Operation } from '../model/operation.ts'
import {
  type ContentOperation,
  hasContent,
  OperationDecoder,
  type OperationReceiver,
} from '../protocol/operation-codec.ts'

/** What one batch did. */
export interface BatchResult {
  readonly failures: readonly Failure[]
  /** The highest stage number that it used; -1 for none. */
  readonly highestStage: number
  /** How many came to their end. */
  readonly operations: number
}

/** Decides whether an operation may be carried out: `done` means that nothing has to be. Throws to refuse it. */
export type Guard = (operation: Operation) => 'go' | 'done'

/** Carries out what comes over one lane, in its order. The file at its end may stay open until the next batch. */
export class Lane implements OperationReceiver {
  readonly #decoder = new OperationDecoder()
  readonly #applier: Applier
  readonly #guard: Guard
  #failures: Failure[] = []
  #highestStage = -1
  #ended = 0
  #file: OpenFile | undefined

  constructor(applier: Applier, guard: Guard) {
    this.#applier = applier
    this.#guard = guard
  }

  /**
   * Carries out one batch. What fails is in the result, all else goes on.
   * @throws {ProtocolError} if the client breaks the protocol
   */
  run(batch: Uint8Array): BatchResult {
    this.#failures = []
    this.#highestStage = -1
    this.#ended = 0
    this.#decoder.decode(batch, this)
    // Between batches another lane may move a directory. A file that is open keeps its own.
    if (this.#file === undefined) this.#applier.forget()
    return { failures: this.#failures, highestStage: this.#highestStage, operations: this.#ended }
  }

  /** A barrier comes: directories that were made before it are not new any more. */
  disown(): void {
    this.#applier.disown()
  }

  /** Forgets the file whose end did not come. */
  end(): void {
    this.#file?.writer?.discard()
    this.#file = undefined
    this.#applier.forget()
  }

  operation(operation: Operation): void {
    if ('stage' in operation) this.#highestStage = Math.max(this.#highestStage, operation.stage)
    if (hasContent(operation)) {
      this.#file = { operation, writer: undefined, failure: undefined, extent: 0, done: 0 }
      this.#attempt(operation, () => {
        if (this.#guard(operation) === 'go') (this.#file as OpenFile).writer = this.#applier.open(operation)
      })
      return
    }
    this.#attempt(operation, () => {
      if (this.#guard(operation) === 'go') this.#applier.apply(operation)
    })
    this.#ended++
  }

  content(bytes: Uint8Array): void {
    const file = this.#file as OpenFile
    if (file.writer === undefined) return
    try {
      writeExtents(file, file.writer, bytes)
    } catch (error) {
      this.#fail(file.operation, error)
      const { writer } = file
      file.writer = undefined
      writer.discard()
    }
  }

  finish(): void {
    const { operation, writer } = this.#file as OpenFile
    this.#attempt(operation, () => writer?.finish())
    this.#endFile()
  }

  abort(): void {
    const { operation, writer } = this.#file as OpenFile
    this.#attempt(operation, () => writer?.discard())
    this.#endFile()
  }

  #endFile(): void {
    // What failed in an earlier batch counts where the file ended.
    const failure = this.#file?.failure
    if (failure !== undefined) this.#failures.push({ ...failure, index: this.#ended })
    this.#file = undefined
    this.#ended++
  }

  #attempt(operation: Operation, act: () => void): void {
    try {
      act()
    } catch (error) {
      this.#fail(operation, error)
    }
  }

  #fail(operation: Operation, error: unknown): void {
    const code = error instanceof LsyncError ? error.code : errnoOf(error)
    if (code === undefined) throw error
    const path = operation.do === 'rename' ? operation.to : operation.path
    const failure = { index: this.#ended, code, path, message: (error as Error).message }
    if (this.#file === undefined) this.#failures.push(failure)
    else this.#file.failure ??= failure
  }
}

interface OpenFile {
  readonly operation: ContentOperation
  /** `undefined`: it failed, or is not to be written; its content is passed over. */
  writer: FileWriter | undefined
  failure: Failure | undefined
  /** Index of the extent that the next byte belongs to, and how much of it is done. */
  extent: number
  done: number
}

function writeExtents(file: OpenFile, writer: FileWriter, bytes: Uint8Array): void {
  let at = 0
  while (at < bytes.length) {
    const [offset, length] = file.operation.extents[file.extent] as readonly [number, number]
    const size = Math.min(length - file.done, bytes.length - at)
    writer.write(offset + file.done, bytes.subarray(at, at + size))
    at += size
    file.done += size
    if (file.done < length) continue
    file.extent++
    file.done = 0
  }
}
