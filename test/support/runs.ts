import type fc from 'fast-check'

/**
 * How often a property runs: `base` times, multiplied by the environment variable LSYNC_TEST_RUNS (default 1). With
 * LSYNC_TEST_SEED (and
 * LSYNC_TEST_PATH) the runs are those that fast-check printed with a failure.
 */
export function runs(base: number): fc.Parameters<unknown> {
  const factor = Number(process.env['LSYNC_TEST_RUNS'] ?? 1)
  const seed = process.env['LSYNC_TEST_SEED']
  const path = process.env['LSYNC_TEST_PATH']
  return {
    numRuns: Math.max(1, Math.round(base * factor)),
    // Shrinking mounts and merges again and again: it ends here with the smallest case so far.
    interruptAfterTimeLimit: timeLimit(SHRINK_MS),
    markInterruptAsFailure: false,
    ...(seed === undefined ? {} : { seed: Number(seed) }),
    ...(path === undefined ? {} : { path }),
  }
}

const SHRINK_MS = Number(process.env['LSYNC_TEST_SHRINK_MS'] ?? 60_000)

/** How long such a test may take at most, in ms; three times that of its property. */
export function timeLimit(baseMs = 3 * SHRINK_MS): number {
  return baseMs * Math.max(1, Number(process.env['LSYNC_TEST_RUNS'] ?? 1))
}
