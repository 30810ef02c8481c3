import type { Difference } from './fingerprint.ts'
import type { Machine } from './machine.ts'
import type { Cost } from './measure.ts'
import { type Spread, summarize } from './statistics.ts'

/** One measured run of one peer. */
export type Sample = Cost & { round: number }

/** All runs of one peer on one workload. */
export type Series = {
  peer: string
  /** What the workload was varied in, with `Row.variable`; 0 without. */
  x: number
  samples: Sample[]
  /** What `--check` found. */
  difference?: Difference
}

/** A goal of performance.md. */
export type Goal = { text: string; limit: number; bound: 'most' | 'least' }

/** One figure that a row is about, next to its goal. */
export type Comparison = {
  label: string
  unit: '×' | 'ms' | 'MB' | ''
  goal?: Goal
  /** Absent when a peer is missing or failed: `remark` then says so. */
  measured?: Spread
  remark?: string
}

/** One row of performance.md, measured. */
export type Row = {
  id: string
  title: string
  /** File system and workload, for people. */
  setting: string
  fs: string
  /** What `Series.x` counts, where the workload is varied. */
  variable?: string
  series: Series[]
  /** What `--check` compares results with; the kernel's view where this is absent. */
  checkedAgainst?: string
  comparisons: Comparison[]
  notes: string[]
}

/** Everything one run of the harness found out. */
export type Report = {
  tool: 'lsync bench'
  formatVersion: 1
  question: string
  startedAt: string
  elapsedMs: number
  machine: Machine
  options: Record<string, unknown>
  versions: Record<string, string>
  missing: { name: string; reason: string }[]
  rows: Row[]
}

/** Samples of the runs that ended well. */
export function succeeded(series: Series | undefined): Sample[] {
  return series?.samples.filter(({ exitCode }) => exitCode === 0) ?? []
}

/** Median and spread of one cost over the runs that ended well. */
export function spreadOf(series: Series | undefined, cost: 'wallMs' | 'syncMs' | 'maxRssMiB'): Spread | undefined {
  return summarize(succeeded(series).map((sample) => sample[cost]))
}

/**
 * Time of `dividend` in units of `divisor`, paired by round, so that what disturbs the machine for a
 * while disturbs both sides.
 */
export function ratioOf(dividend: Series | undefined, divisor: Series | undefined): Spread | undefined {
  const others = new Map(succeeded(divisor).map((sample) => [sample.round, sample.wallMs]))
  return summarize(
    succeeded(dividend).flatMap(({ round, wallMs }) => {
      const other = others.get(round)
      return other === undefined ? [] : [wallMs / other]
    }),
  )
}

/** Whether a measured figure reaches its goal; `undefined` where one of them is lacking. */
export function meetsGoal({ goal, measured }: Comparison): boolean | undefined {
  if (goal === undefined || measured === undefined) return undefined
  return goal.bound === 'most' ? measured.median <= goal.limit : measured.median >= goal.limit
}

/** Time with three significant digits and the unit that suits it. */
export function formatMs(ms: number): string {
  if (ms < 1000) return `${formatFigure(ms)} ms`
  return `${formatFigure(ms / 1000)} s`
}

/** A figure with three significant digits, whole from 100 on. */
export function formatFigure(value: number): string {
  if (value >= 100) return Math.round(value).toLocaleString('en')
  return value.toFixed(value >= 10 ? 1 : 2)
}

/** Aligns cells in columns below a head: figures to the right, words to the left. */
function formatTable(lines: readonly (readonly string[])[]): string {
  const widths: number[] = []
  const figures: boolean[] = []
  for (const [row, line] of lines.entries())
    for (const [column, cell] of line.entries()) {
      widths[column] = Math.max(widths[column] ?? 0, cell.length)
      if (row > 0 && cell !== '') figures[column] = (figures[column] ?? true) && /^[\d–<]/.test(cell)
    }
  const align = (cell: string, column: number): string =>
    figures[column] === true ? cell.padStart(widths[column] ?? 0) : cell.padEnd(widths[column] ?? 0)
  return lines.map((line) => `  ${line.map(align).join('  ')}`.trimEnd()).join('\n')
}

const checkedAgainst = (row: Row): string => row.checkedAgainst ?? "the kernel's view"

function formatSeries(row: Row): string {
  const varied = row.variable !== undefined
  const checked = row.series.some(({ difference }) => difference !== undefined)
  const head = [
    'command',
    ...(varied ? [row.variable ?? ''] : []),
    'median',
    'min – max',
    'to write back',
    'processor',
    'peak',
  ]
  const lines = row.series.map((series) => {
    const wall = spreadOf(series, 'wallMs')
    const first = [series.peer, ...(varied ? [series.x.toLocaleString('en')] : [])]
    const failed = series.samples.filter(({ exitCode }) => exitCode !== 0)
    const failure = failed[0] === undefined ? '' : `failed ${failed.length} ×: exit code ${failed[0].exitCode}`
    if (wall === undefined) return [...first, failure]
    const cpu = summarize(succeeded(series).map(({ userMs, systemMs }) => userMs + systemMs))
    return [
      ...first,
      formatMs(wall.median),
      wall.samples === 1 ? '–' : `${formatMs(wall.min)} – ${formatMs(wall.max)}`,
      formatMs(spreadOf(series, 'syncMs')?.median ?? 0),
      formatMs(cpu?.median ?? 0),
      `${formatFigure(spreadOf(series, 'maxRssMiB')?.median ?? 0)} MB`,
      ...(checked ? [formatDifference(series.difference)] : []),
      ...(failure === '' ? [] : [failure]),
    ]
  })
  return formatTable([[...head, ...(checked ? [`${checkedAgainst(row)}?`] : [])], ...lines])
}

function formatDifference(difference: Difference | undefined): string {
  if (difference === undefined) return ''
  if (difference.entries === 0) return 'equal'
  const reasons = Object.entries(difference.reasons).map(([reason, count]) => `${reason} ${count.toLocaleString('en')}`)
  return `${difference.entries.toLocaleString('en')} entries differ: ${reasons.join(', ')}`
}

function formatMeasured({ measured, unit, remark }: Comparison): string {
  if (measured === undefined) return remark ?? 'not measured'
  const figure = (value: number): string => (unit === 'ms' ? formatMs(value) : `${formatFigure(value)} ${unit}`.trim())
  const spread = measured.samples === 1 ? '' : ` (${figure(measured.min)} – ${figure(measured.max)})`
  return `${figure(measured.median)}${spread}`
}

function formatComparisons(row: Row): string {
  const lines = row.comparisons.map((comparison) => {
    const met = meetsGoal(comparison)
    const verdict = met === undefined ? '' : met ? 'met' : 'missed'
    return [comparison.label, formatMeasured(comparison), comparison.goal?.text ?? '', verdict]
  })
  return formatTable([['', 'measured', 'goal', ''], ...lines])
}

/** One row as text, as it is printed once it is measured. */
export function formatRow(row: Row): string {
  const complaints = row.series.flatMap(({ peer, x, samples }) =>
    samples
      .filter(({ exitCode }) => exitCode !== 0)
      .slice(0, 1)
      .map(
        ({ complaint }) =>
          `${peer}${x === 0 ? '' : ` at ${x.toLocaleString('en')}`} failed: ${complaint || 'silently'}`,
      ),
  )
  const examples = row.series.flatMap(({ peer, difference }) =>
    difference === undefined || difference.entries === 0
      ? []
      : [`${peer} differs from ${checkedAgainst(row)}, for example in ${difference.examples.slice(0, 3).join('; ')}`],
  )
  const notes = [...row.notes, ...complaints, ...examples].map((note) => `  - ${note}`)
  const parts = [
    `## ${row.id}: ${row.title}\n   ${row.setting}`,
    formatSeries(row),
    ...(row.comparisons.length === 0 ? [] : [formatComparisons(row)]),
    ...(notes.length === 0 ? [] : [notes.join('\n')]),
  ]
  return `${parts.join('\n\n')}\n`
}

/** What stands above the rows. */
export function formatHead(report: Report): string {
  const { machine } = report
  const lines = [
    `# bench ${report.question}, ${report.startedAt}`,
    `${machine.cpu}, ${machine.cores} cores, ${machine.memoryGiB} GiB, Linux ${machine.kernel}, ${machine.distribution}, Node ${machine.node}`,
    ...Object.entries(report.versions).map(([name, version]) => `${name}: ${version}`),
    ...report.missing.map(({ name, reason }) => `without ${name}: ${reason}`),
  ]
  if (machine.loadAtStart > machine.cores / 4)
    lines.push(`other work is going on here (load ${machine.loadAtStart}); trust the ratios more than the seconds`)
  return `${lines.join('\n')}\n`
}

/** The goals of all rows once more, for the end. */
export function formatSummary(rows: readonly Row[]): string {
  const lines = rows.flatMap((row) =>
    row.comparisons
      .filter(({ goal }) => goal !== undefined)
      .map((comparison) => {
        const met = meetsGoal(comparison)
        return [
          `${row.id} (${row.fs})`,
          comparison.label,
          formatMeasured(comparison),
          comparison.goal?.text ?? '',
          met === undefined ? '' : met ? 'met' : 'missed',
        ]
      }),
  )
  if (lines.length === 0) return ''
  return `# goals\n${formatTable([['row', 'figure', 'measured', 'goal', ''], ...lines])}\n`
}

/** The whole report as JSON, with medians and spreads beside the samples and a verdict on each goal (`met`). */
export function formatJson(report: Report): string {
  const rows = report.rows.map((row) => ({
    ...row,
    series: row.series.map((series) => ({
      ...series,
      summary: {
        wallMs: spreadOf(series, 'wallMs'),
        syncMs: spreadOf(series, 'syncMs'),
        maxRssMiB: spreadOf(series, 'maxRssMiB'),
      },
    })),
    comparisons: row.comparisons.map((comparison) => ({ ...comparison, met: meetsGoal(comparison) })),
  }))
  return `${JSON.stringify({ ...report, rows }, undefined, 2)}\n`
}
