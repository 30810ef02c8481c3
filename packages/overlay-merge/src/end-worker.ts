import type { Worker } from 'node:worker_threads'

/** What ends a worker that listens for it. */
export interface EndMessage {
  readonly end: true
}

/**
 * Lets a worker end by itself once it has started and done what it was given. Terminating it while it loads koffi would
 * take the whole process with it.
 */
export function endWorker(worker: Worker): Promise<void> {
  return new Promise((resolve) => {
    const hasEnded = worker.threadId < 0
    if (hasEnded) {
      resolve()
      return
    }
    worker.once('exit', () => resolve())
    worker.postMessage({ end: true } satisfies EndMessage)
  })
}
