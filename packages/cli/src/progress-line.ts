/** How far one phase of an operation is, and since when (ms) it runs. */
export interface ProgressState {
  readonly phase: string
  readonly done: number
  readonly total?: number
  readonly startMs: number
}

/** One line: phase, done of total, share, rate, time left. What is not known yet is left out. */
export function progressLine({ phase, done, total, startMs }: ProgressState, nowMs: number): string {
  const elapsedMs = nowMs - startMs
  const rate = elapsedMs >= 200 ? done / (elapsedMs / 1000) : undefined
  const parts = [phase.padEnd(8)]
  if (total !== undefined && total > 0) {
    parts.push(`${countOf(done)}/${countOf(total)}`, `${Math.floor((Math.min(done, total) / total) * 100)}%`)
  } else if (done > 0) parts.push(countOf(done))
  if (rate !== undefined && rate > 0) {
    parts.push(`${countOf(Math.round(rate))}/s`)
    if (total !== undefined && total > done) parts.push(`ETA ${clockOf((total - done) / rate)}`)
  }
  return parts.join('  ')
}

/** A count as people read it: `12,345`. */
export function countOf(count: number): string {
  return String(count).replace(/\B(?=(\d{3})+$)/g, ',')
}

/** A size as people read it: `1.4 GB`. */
export function sizeOf(sizeBytes: number): string {
  if (sizeBytes < 1000) return `${sizeBytes} B`
  const power = Math.min(5, Math.floor(Math.log10(sizeBytes) / 3))
  return `${(sizeBytes / 1000 ** power).toFixed(1)} ${' kMGTP'[power]}B`
}

/** A duration as people read it: `0.35 s`, `2 min 5 s`. */
export function durationOf(ms: number): string {
  const seconds = ms / 1000
  if (seconds < 10) return `${seconds.toFixed(2)} s`
  if (seconds < 60) return `${seconds.toFixed(1)} s`
  const minutes = Math.floor(Math.round(seconds) / 60)
  return `${minutes} min ${Math.round(seconds) - minutes * 60} s`
}

function clockOf(seconds: number): string {
  const whole = Math.ceil(seconds)
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60]
  const two = (value: number) => String(value).padStart(2, '0')
  return hours > 0 ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`
}
