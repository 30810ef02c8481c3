/** Runs `work` on every item, at most `width` at a time. Stops handing out at the first error, which it throws. */
export async function eachOf<T>(
  items: Iterable<T> | AsyncIterable<T>,
  width: number,
  work: (item: T) => Promise<void>,
): Promise<void> {
  const running = new Set<Promise<void>>()
  let failure: unknown
  let failed = false
  for await (const item of items) {
    const job = work(item).then(
      () => {
        running.delete(job)
      },
      (error: unknown) => {
        running.delete(job)
        if (!failed) failure = error
        failed = true
      },
    )
    running.add(job)
    if (running.size >= width) await Promise.race(running)
    if (failed) break
  }
  await Promise.all(running)
  if (failed) throw failure
}

/**
 * Does everything on a stack, the last first and at most `width` at a time; `visit` may push more. After a failure
 * nothing new begins, and the first one is thrown when what is under way has ended.
 */
export async function drainStack<T>(stack: T[], width: number, visit: (item: T) => Promise<void>): Promise<void> {
  let active = 0
  let failure: unknown
  let hasFailed = false
  await new Promise<void>((resolve) => {
    const next = () => {
      while (!hasFailed && active < width) {
        const item = stack.pop()
        if (item === undefined) break
        active++
        visit(item)
          .catch((error: unknown) => {
            if (!hasFailed) failure = error
            hasFailed = true
          })
          .finally(() => {
            active--
            next()
          })
      }
      if (active === 0) resolve()
    }
    next()
  })
  if (hasFailed) throw failure
}
