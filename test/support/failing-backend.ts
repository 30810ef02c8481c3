import type { Backend, BackendCall, ByteRange, FileKind, FileRef, ListedFile } from '@lsync/snapshot'

/** Everything was gone from one moment on, as after a crash. */
export class GoneError extends Error {
  constructor() {
    super('everything is gone')
  }
}

/**
 * A backend that is gone from its n-th change on: that change was made or was not made, and nobody is told. What lies there
 * then is what a crash at this moment leaves.
 */
export class FailingBackend implements Backend {
  readonly location: string
  readonly concurrency: number
  readonly settleMs = 0
  /** Changes so far. */
  changes = 0
  readonly #inner: Backend
  readonly #failAt: number
  readonly #when: 'before' | 'after'
  #isGone = false

  constructor(inner: Backend, failAt: number, when: 'before' | 'after') {
    this.#inner = inner
    this.#failAt = failAt
    this.#when = when
    this.location = inner.location
    this.concurrency = inner.concurrency
  }

  create(call?: BackendCall): Promise<void> {
    return this.#inner.create(call)
  }

  async *list(kind: FileKind, call?: BackendCall): AsyncIterable<ListedFile> {
    this.#assertThere()
    yield* this.#inner.list(kind, call)
  }

  async stat(file: FileRef, call?: BackendCall): Promise<{ readonly sizeBytes: number } | undefined> {
    this.#assertThere()
    return this.#inner.stat(file, call)
  }

  async get(file: FileRef, range?: ByteRange, call?: BackendCall): Promise<Buffer> {
    this.#assertThere()
    return this.#inner.get(file, range, call)
  }

  put(file: FileRef, content: Uint8Array, call?: BackendCall & { readonly exclusive?: boolean }): Promise<boolean> {
    return this.#change(() => this.#inner.put(file, content, call))
  }

  delete(file: FileRef, call?: BackendCall): Promise<boolean> {
    return this.#change(() => this.#inner.delete(file, call))
  }

  close(): Promise<void> {
    return this.#inner.close()
  }

  async #change<T>(make: () => Promise<T>): Promise<T> {
    this.#assertThere()
    if (this.changes++ < this.#failAt) return make()
    this.#isGone = true
    if (this.#when === 'after') await make()
    throw new GoneError()
  }

  #assertThere(): void {
    if (this.#isGone) throw new GoneError()
  }
}
