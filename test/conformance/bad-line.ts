import { createHash } from 'node:crypto'
import type { Backend, FileRef } from '@lsync/snapshot'
import { onTestFinished } from 'vitest'
import type { Fault } from '../support/fault-proxy.ts'

/** Failures that cost no time, and a limit that only a broken backend reaches. */
export const QUICK = { firstDelayMs: 1, idleTimeoutMs: 3_000, retryForMs: 60_000, firstAnswerWithinMs: 60_000 }

/** What a line and a server behind HTTP do to requests. `truncatedAfterBytes`: of an answer, its head included. */
export function httpFaults(truncatedAfterBytes: number): readonly Fault[] {
  return [
    { kind: 'status', status: 503, headers: 'Retry-After: 0\r\n' },
    { kind: 'refuse' },
    { kind: 'cut', direction: 'up', afterBytes: 150 },
    { kind: 'cut', direction: 'down', afterBytes: 40 },
    { kind: 'status', status: 500 },
    // It was done, though nobody hears of it.
    { kind: 'status', status: 502, afterwards: true },
    { kind: 'truncate', afterBytes: truncatedAfterBytes },
    { kind: 'delay', delayMs: 50 },
  ]
}

/** What a file with this content is called. */
export function refOf(kind: 'pack' | 'index', content: Uint8Array): FileRef {
  return { kind, name: createHash('sha256').update(content).digest('hex') }
}

/** The backend, which is closed when the test ends. */
export function closing<T extends Backend>(backend: T): T {
  onTestFinished(() => backend.close())
  return backend
}
