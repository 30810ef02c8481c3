import { setTimeout as delay } from 'node:timers/promises'
import { LsyncError } from '@lsync/posix'
import { BackendError } from './backend.ts'

/** One attempt that failed, and what comes now. */
export interface RetryEvent {
  /** `storing pack 1a2b3c4d`. */
  readonly what: string
  readonly location: string
  readonly error: unknown
  readonly delayMs: number
}

/** How a remote backend copes with failures. */
export interface RemoteOptions {
  /** An attempt during which nothing comes or goes for this long has failed. Default 60 s. */
  readonly idleTimeoutMs?: number
  /** A call that fails is repeated until it has taken this long. Default 15 min. */
  readonly retryForMs?: number
  /** The same while the storage has never answered, since then the address may be wrong. Default 30 s. */
  readonly firstAnswerWithinMs?: number
  /** Before the second attempt; doubled each time, up to 30 s. Default 500 ms. */
  readonly firstDelayMs?: number
  /** How many calls are worth having in flight. */
  readonly concurrency?: number
  /** A list of more files is taken for one without an end. Default four million. */
  readonly maxListedFiles?: number
  /** Told before each wait. */
  readonly onRetry?: (event: RetryEvent) => void
}

/** How long what lies behind a server may take until every client sees it. As long as restic waits between two looks. */
export const REMOTE_SETTLE_MS = 200
export const DEFAULT_IDLE_TIMEOUT_MS = 60_000
const DEFAULT_RETRY_FOR_MS = 15 * 60_000
const DEFAULT_FIRST_ANSWER_MS = 30_000
const DEFAULT_FIRST_DELAY_MS = 500
const LONGEST_DELAY_MS = 30_000

/** An attempt failed, and another may succeed. */
export class TransientError extends Error {
  /** What the server asks for. */
  readonly retryAfterMs: number | undefined

  constructor(message: string, detail: { readonly retryAfterMs?: number | undefined; readonly cause?: unknown } = {}) {
    super(message, detail.cause === undefined ? undefined : { cause: detail.cause })
    this.retryAfterMs = detail.retryAfterMs
  }
}

/** Nothing came or went for too long. */
export class IdleError extends TransientError {
  constructor(idleTimeoutMs: number) {
    super(`nothing came or went for ${idleTimeoutMs / 1000} s`)
  }
}

/** Repeats what failed, with growing pauses, within a limit of time. */
export class Retries {
  readonly #location: string
  readonly #options: RemoteOptions
  #hasAnswered = false

  constructor(location: string, options: RemoteOptions) {
    this.#location = location
    this.#options = options
  }

  /** The storage is there: from now on it is worth waiting for. */
  sawAnswer(): void {
    this.#hasAnswered = true
  }

  /**
   * Runs `attempt` (counted from 0) until it succeeds. A `TransientError` is worth another try, an `LsyncError` is the
   * result, and anything else becomes a `BackendError`.
   */
  async run<T>(what: string, signal: AbortSignal | undefined, attempt: (count: number) => Promise<T>): Promise<T> {
    const start = performance.now()
    for (let count = 0; ; count++) {
      signal?.throwIfAborted()
      try {
        const result = await attempt(count)
        this.sawAnswer()
        return result
      } catch (error) {
        // Whatever an abort made fail, its reason is the news.
        signal?.throwIfAborted()
        if (error instanceof LsyncError) throw error
        const leftMs = this.#limitMs() - (performance.now() - start)
        if (!(error instanceof TransientError) || leftMs <= 0) {
          throw new BackendError(what, this.#location, { cause: error })
        }
        const delayMs = Math.min(this.#delayMs(count, error), leftMs)
        this.#options.onRetry?.({ what, location: this.#location, error, delayMs })
        await pause(delayMs, signal)
      }
    }
  }

  #limitMs(): number {
    const { retryForMs = DEFAULT_RETRY_FOR_MS, firstAnswerWithinMs = DEFAULT_FIRST_ANSWER_MS } = this.#options
    return this.#hasAnswered ? retryForMs : Math.min(retryForMs, firstAnswerWithinMs)
  }

  #delayMs(count: number, { retryAfterMs }: TransientError): number {
    const { firstDelayMs = DEFAULT_FIRST_DELAY_MS } = this.#options
    const grown = Math.min(LONGEST_DELAY_MS, firstDelayMs * 2 ** Math.min(count, 20))
    // Spread, so that many clients do not come back at once.
    return Math.max(grown * (0.5 + Math.random() / 2), Math.min(retryAfterMs ?? 0, LONGEST_DELAY_MS))
  }
}

async function pause(delayMs: number, signal: AbortSignal | undefined): Promise<void> {
  try {
    await delay(delayMs, undefined, signal === undefined ? {} : { signal })
  } catch {
    signal?.throwIfAborted()
  }
}
