import { readShared, SHARED_BYTES } from '@lsync/posix'
import { Applier, type ApplierOptions, type ContentOperation, type PlainOperation } from './applier.ts'
import type { TreePath } from './model/operation.ts'
import { MAX_CONTENT_BYTES, OperationEncoder, splitKeep } from './protocol/operation-codec.ts'

/** Where a worker's operations go. */
export interface Sink {
  /** Throws where the target refuses, if that is known at once. */
  run(operation: PlainOperation): void
  /** Begins a file; its content follows, extent by extent. */
  open(operation: ContentOperation): ContentSink
  /** A directory is new at the target, and nothing is in it that was not sent now. */
  adopt(path: TreePath): void
  /** Between stretches of work, in which others may have moved directories. */
  forget(): void
  /** Everything was handed over when it returns. */
  flush(): void
}

/** A file that is being sent. Exactly one of `finish` and `discard` ends it. */
export interface ContentSink {
  /** The next bytes, which belong at `offset`, and are the caller's again when it returns. */
  write(offset: number, bytes: Uint8Array): void
  finish(): void
  discard(): void
}

/** Carries operations out in this thread. */
export class DirectSink implements Sink {
  readonly applier: Applier
  readonly #pay: ((bytes: number) => void) | undefined

  /** `pay` is told of pieces of large files as they are written, and waits where a rate wants it. */
  constructor(options: ApplierOptions, pay?: (bytes: number) => void) {
    this.applier = new Applier(options)
    this.#pay = pay
  }

  run(operation: PlainOperation): void {
    this.applier.apply(operation)
  }

  open(operation: ContentOperation): ContentSink {
    const writer = this.applier.open(operation)
    return this.#pay === undefined || operation.sizeBytes < PAID_BYTES ? writer : paid(writer, this.#pay)
  }

  adopt(path: TreePath): void {
    this.applier.adopt(path)
  }

  // Who goes on in a directory says so: it may be another thread, or this one for another reason.
  forget(): void {
    this.applier.disown()
    this.applier.forget()
  }

  flush(): void {}
}

// Smaller files are paid for as a whole, with others.
const PAID_BYTES = 1 << 20

function paid(writer: ContentSink, pay: (bytes: number) => void): ContentSink {
  let unpaid = 0
  return {
    write: (offset, bytes) => {
      writer.write(offset, bytes)
      unpaid += bytes.length
      if (unpaid < PAID_BYTES) return
      pay(unpaid)
      unpaid = 0
    },
    finish: () => writer.finish(),
    discard: () => writer.discard(),
  }
}

/** Writes operations down and hands them over in batches; `emit` waits when too much is under way. */
export class EncodedSink implements Sink {
  readonly #encoder = new OperationEncoder(600 << 10)
  readonly #emit: (batch: Uint8Array<ArrayBuffer>) => void

  constructor(emit: (batch: Uint8Array<ArrayBuffer>) => void) {
    this.#emit = emit
  }

  run(operation: PlainOperation): void {
    for (const part of operation.do === 'keep' ? splitKeep(operation) : [operation]) {
      this.#encoder.operation(part)
      this.#flushIfFull()
    }
  }

  open(operation: ContentOperation): ContentSink {
    this.#encoder.operation(operation)
    return {
      write: (_, bytes) => {
        for (let at = 0; at < bytes.length; at += MAX_CONTENT_BYTES) {
          this.#encoder.content(bytes.subarray(at, at + MAX_CONTENT_BYTES))
          this.#flushIfFull()
        }
      },
      finish: () => {
        this.#encoder.finish()
        this.#flushIfFull()
      },
      discard: () => this.#encoder.abort(),
    }
  }

  // The far end knows of those that it has made itself.
  adopt(): void {}

  forget(): void {}

  flush(): void {
    if (this.#encoder.sizeBytes > 0) this.#emit(this.#encoder.take())
  }

  #flushIfFull(): void {
    if (this.#encoder.isFull) this.flush()
  }
}

/** Sends the extents of an open file. */
export function sendExtents(fd: number, operation: ContentOperation, to: ContentSink): void {
  for (const [offset, length] of operation.extents) {
    for (let at = offset; at < offset + length; at += SHARED_BYTES) {
      const want = Math.min(SHARED_BYTES, offset + length - at)
      const bytes = readShared(fd, at, want)
      // A file that has become shorter is noticed by its change time; what was promised is sent nonetheless.
      to.write(at, bytes.length === want ? bytes : Buffer.concat([bytes], want))
    }
  }
}
