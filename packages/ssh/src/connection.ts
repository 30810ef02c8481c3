import type { Readable, Writable } from 'node:stream'

/** Bytes both ways, whatever carries them. */
export interface Connection {
  readonly readable: Readable
  readonly writable: Writable
  /** Why it came to its end, as far as is known there. */
  explain(): Promise<Error | undefined>
  /** Ends it at once. */
  destroy(): void
}
