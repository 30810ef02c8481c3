import { afterAll, beforeAll } from 'vitest'

/** Something that tests share: it is there while they run. */
export interface Shared<T> {
  readonly current: T
}

/**
 * One thing for all tests of the surrounding `describe` (or file): `start` runs before the first of them, and what `stop`
 * does after the last. `what` is for the message of whoever asks too early.
 */
export function useShared<T>(
  what: string,
  start: () => Promise<T> | T,
  stop: (shared: T) => Promise<void> | void,
  startWithinMs = 60_000,
): Shared<T> {
  let shared: { readonly value: T } | undefined
  beforeAll(async () => {
    shared = { value: await start() }
  }, startWithinMs)
  afterAll(async () => {
    if (shared !== undefined) await stop(shared.value)
    shared = undefined
  }, 60_000)
  return {
    get current() {
      if (shared === undefined) throw new Error(`${what} is there only while tests run`)
      return shared.value
    },
  }
}
