/** Median of some samples and how far they lie apart. */
export type Spread = { median: number; min: number; max: number; samples: number }

/** Median, least and greatest of the given numbers; `undefined` of none. */
export function summarize(values: readonly number[]): Spread | undefined {
  if (values.length === 0) return undefined
  const sorted = [...values].sort((left, right) => left - right)
  const middle = sorted.length >> 1
  const upper = sorted[middle] ?? 0
  const median = sorted.length % 2 === 1 ? upper : ((sorted[middle - 1] ?? 0) + upper) / 2
  return { median, min: sorted[0] ?? 0, max: sorted.at(-1) ?? 0, samples: sorted.length }
}

/**
 * Exponent b of the power law y = a * x^b that fits the points best (least squares in the logarithms): 1 is linear growth,
 * 0 is none. `undefined` with fewer than two different x.
 */
export function fitExponent(points: readonly { x: number; y: number }[]): number | undefined {
  const logs = points.filter(({ x, y }) => x > 0 && y > 0).map(({ x, y }) => ({ x: Math.log(x), y: Math.log(y) }))
  const mean = (pick: (point: { x: number; y: number }) => number) =>
    logs.reduce((sum, point) => sum + pick(point), 0) / logs.length
  const meanX = mean(({ x }) => x)
  const meanY = mean(({ y }) => y)
  const variance = logs.reduce((sum, { x }) => sum + (x - meanX) ** 2, 0)
  if (logs.length < 2 || variance === 0) return undefined
  return logs.reduce((sum, { x, y }) => sum + (x - meanX) * (y - meanY), 0) / variance
}
