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
