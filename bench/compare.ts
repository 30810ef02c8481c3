import { type Comparison, type Goal, ratioOf, type Series, spreadOf, succeeded } from './report.ts'
import { fitExponent, summarize } from './statistics.ts'

/** A count of things, for people. */
export const count = (value: number): string => value.toLocaleString('en')

/** The series of one peer on one workload. */
export const find = (series: readonly Series[], peer: string, x = 0): Series | undefined =>
  series.find((candidate) => candidate.peer === peer && candidate.x === x)

/** A ratio of two peers as a figure, with the reason where it cannot be had. */
export function compare(
  label: string,
  dividend: Series | undefined,
  divisor: Series | undefined,
  names: readonly [string, string],
  goal?: Goal,
): Comparison {
  const comparison: Comparison = { label, unit: '×', ...(goal === undefined ? {} : { goal }) }
  const measured = ratioOf(dividend, divisor)
  if (measured !== undefined) return { ...comparison, measured }
  const absent = [dividend, divisor].flatMap((series, index) =>
    series === undefined
      ? [`${names[index]} is missing`]
      : succeeded(series).length === 0
        ? [`${names[index]} failed`]
        : [],
  )
  return { ...comparison, remark: [...new Set(absent)].join(', ') || 'no common round' }
}

/** How often each other peer's time holds lsync's. */
export function compareOthers(series: readonly Series[], except: readonly string[], x = 0): Comparison[] {
  const lsync = find(series, 'lsync', x)
  return series
    .filter((other) => other.x === x && other.peer !== 'lsync' && !except.includes(other.peer))
    .map((other) => compare(`${other.peer} ÷ lsync`, other, lsync, [other.peer, 'lsync']))
}

/** How steeply a peer's time grows over the last step of its sizes: 1 is linear. */
export function compareGrowth(series: readonly Series[], peer: string, goal?: Goal): Comparison {
  const points = series
    .filter((candidate) => candidate.peer === peer && succeeded(candidate).length > 0)
    .map((candidate) => ({ x: candidate.x, y: spreadOf(candidate, 'wallMs')?.median ?? 0 }))
  // Below, the time to start the program drowns the growth.
  const fitted = fitExponent(points.slice(-2))
  const measured = fitted === undefined ? undefined : summarize([fitted])
  return {
    label: `${peer}: exponent of growth over the last step`,
    unit: '',
    ...(goal === undefined ? {} : { goal }),
    ...(measured === undefined ? { remark: 'too few points' } : { measured }),
  }
}

/** A figure of one series, with a goal. */
export function figure(label: string, series: Series | undefined, unit: 'ms' | 'MB', goal?: Goal): Comparison {
  const measured = spreadOf(series, unit === 'ms' ? 'wallMs' : 'maxRssMiB')
  const base: Comparison = { label, unit, ...(goal === undefined ? {} : { goal }) }
  return measured === undefined ? { ...base, remark: 'missing or failed' } : { ...base, measured }
}
