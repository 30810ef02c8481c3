/** Whoever read the bytes stopped reading; what happened there is the error that counts. */
export class ReaderGoneError extends Error {
  constructor() {
    super('the reader of the archive went away')
  }
}

const BATCH_BYTES = 64 * 1024
const AHEAD_BYTES = 1024 * 1024

/**
 * Bytes from one who pushes to one who reads, gathered into larger pieces. The pusher waits while the reader is more
 * than 1 MiB behind, so memory stays bounded.
 */
export class ChunkQueue {
  #parts: Uint8Array[] = []
  #bytes = 0
  #state: 'open' | 'ended' | 'failed' | 'gone' = 'open'
  #error: unknown
  #onPush: () => void = () => undefined
  #onTake: () => void = () => undefined

  /** @throws {ReaderGoneError} */
  async push(bytes: Uint8Array): Promise<void> {
    if (this.#state !== 'open') throw new ReaderGoneError()
    this.#parts.push(bytes)
    this.#bytes += bytes.length
    if (this.#bytes >= BATCH_BYTES) this.#onPush()
    while (this.#bytes > AHEAD_BYTES && this.#state === 'open') {
      await new Promise<void>((resolve) => {
        this.#onTake = resolve
      })
    }
  }

  end(): void {
    if (this.#state === 'open') this.#state = 'ended'
    this.#onPush()
    this.#onTake()
  }

  /** The reader gets this error in the place of the end. */
  fail(error: unknown): void {
    if (this.#state === 'open') {
      this.#state = 'failed'
      this.#error = error
    }
    this.#onPush()
    this.#onTake()
  }

  /** For one reader. */
  async *chunks(): AsyncGenerator<Uint8Array> {
    try {
      for (;;) {
        while (this.#bytes < BATCH_BYTES && this.#state === 'open') {
          await new Promise<void>((resolve) => {
            this.#onPush = resolve
          })
        }
        if (this.#state === 'failed') throw this.#error
        if (this.#parts.length === 0) return
        const batch = Buffer.concat(this.#parts)
        this.#parts = []
        this.#bytes = 0
        this.#onTake()
        yield batch
      }
    } finally {
      this.#state = 'gone'
      this.#onTake()
    }
  }
}
