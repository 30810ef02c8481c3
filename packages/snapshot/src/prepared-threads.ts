import { endThread, startThread, type Thread } from './thread-pool.ts'

/** What threads can be prepared for. */
export type ThreadUse = 'create' | 'restore' | 'check' | 'store'

/** How many threads share the work by default, the calling one included. */
export const DEFAULT_WORKERS = 2

const MODULES: Readonly<Record<ThreadUse, URL>> = {
  create: new URL('./snapshot-worker.ts', import.meta.url),
  restore: new URL('./restore-worker.ts', import.meta.url),
  check: new URL('./check-worker.ts', import.meta.url),
  store: new URL('./store-worker.ts', import.meta.url),
}

/** Threads that load their code while something else is waited for, such as a key to be derived. */
export class PreparedThreads {
  readonly #use: ThreadUse | undefined
  readonly #threads: Thread[] = []

  /** `width`: as many as will work, of which the calling one need not be prepared. */
  constructor(use?: ThreadUse, width = DEFAULT_WORKERS) {
    this.#use = use
    while (use !== undefined && this.#threads.length < width - 1) this.#threads.push(startThread(MODULES[use]))
  }

  /** Whether there are any for this. */
  has(use: ThreadUse): boolean {
    return use === this.#use && this.#threads.length > 0
  }

  /** One that is prepared, or else a new one. It is the caller's to end. */
  take(use: ThreadUse): Thread {
    return (use === this.#use ? this.#threads.pop() : undefined) ?? startThread(MODULES[use])
  }

  /** Ends those that nobody took. */
  async close(): Promise<void> {
    await Promise.all(this.#threads.splice(0).map(endThread))
  }
}
