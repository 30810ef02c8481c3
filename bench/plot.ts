import { formatMs, type Row, type Series, spreadOf } from './report.ts'
import type { Spread } from './statistics.ts'

/** lsync has a colour of its own in every plot; the others take theirs in order. */
const palette = {
  light: { ground: '#ffffff', ink: '#1f2328', faint: '#59636e', grid: '#d8dee4', goal: '#b42318' },
  dark: { ground: '#0d1117', ink: '#e6edf3', faint: '#9198a1', grid: '#30363d', goal: '#ff8a80' },
}
const lsyncColour = { light: '#1f6feb', dark: '#58a6ff' }
const otherColours = [
  { light: '#bc6c0b', dark: '#e3a04f' },
  { light: '#1a7f64', dark: '#3fb99b' },
  { light: '#8250df', dark: '#b392f0' },
  { light: '#bf3989', dark: '#f778ba' },
  { light: '#57606a', dark: '#aab4be' },
]

const width = 800

function styleSheet(): string {
  const rules = (mode: 'light' | 'dark'): string => {
    const { ground, ink, faint, grid, goal } = palette[mode]
    const colours = [lsyncColour, ...otherColours].map(
      (colour, index) =>
        `.s${index}{fill:${colour[mode]}}.l${index}{stroke:${colour[mode]};fill:none;stroke-width:2;stroke-linejoin:round}`,
    )
    return [
      `.ground{fill:${ground}}.ink{fill:${ink}}.faint{fill:${faint}}.grid{stroke:${grid}}.whisker{stroke:${ink}}`,
      `.goal{stroke:${goal}}.guide{stroke:${faint};stroke-dasharray:2 4;fill:none}`,
      ...colours,
    ].join('')
  }
  return [
    'text{font-family:system-ui,-apple-system,"Segoe UI","DejaVu Sans",sans-serif;font-size:12px}',
    '.title{font-size:16px;font-weight:600}.end{text-anchor:end}.middle{text-anchor:middle}',
    rules('light'),
    `@media (prefers-color-scheme:dark){${rules('dark')}}`,
  ].join('')
}

const escapeText = (text: string): string =>
  text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;')

const round = (value: number): string => value.toFixed(1)

function text(x: number, y: number, classes: string, content: string): string {
  return `<text x="${round(x)}" y="${round(y)}" class="${classes}">${escapeText(content)}</text>`
}

function line(x1: number, y1: number, x2: number, y2: number, classes: string): string {
  return `<line x1="${round(x1)}" y1="${round(y1)}" x2="${round(x2)}" y2="${round(y2)}" class="${classes}"/>`
}

/** Breaks a sentence into lines of at most `limit` characters. */
function wrap(sentence: string, limit: number): string[] {
  const lines: string[] = []
  for (const word of sentence.split(' ')) {
    const last = lines.at(-1)
    if (last === undefined || last.length + word.length + 1 > limit) lines.push(word)
    else lines[lines.length - 1] = `${last} ${word}`
  }
  return lines
}

function drawFrame(row: Row, height: number, subtitle: readonly string[], body: readonly string[]): string {
  const title = `${row.title} (${row.fs})`
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${round(height)}" width="${width}" height="${round(height)}" role="img">`,
    `<title>${escapeText(title)}</title>`,
    `<style>${styleSheet()}</style>`,
    `<rect class="ground" width="${width}" height="${round(height)}" rx="6"/>`,
    text(24, 34, 'title ink', title),
    ...subtitle.map((words, index) => text(24, 54 + index * 16, 'faint', words)),
    ...body,
    '</svg>',
    '',
  ].join('\n')
}

/** A scale from values to pixels, with the values that deserve a grid line. */
type Scale = { at: (value: number) => number; ticks: number[] }

function linearScale(most: number, from: number, to: number): Scale {
  const rough = most / 5
  const magnitude = 10 ** Math.floor(Math.log10(rough))
  const step = ([1, 2, 5].find((candidate) => candidate * magnitude >= rough) ?? 10) * magnitude
  const end = Math.ceil(most / step) * step
  const ticks = Array.from({ length: Math.round(end / step) + 1 }, (_, index) => index * step)
  return { at: (value) => from + ((to - from) * value) / end, ticks }
}

function logScale(least: number, most: number, from: number, to: number): Scale {
  const first = Math.floor(Math.log10(least) + 1e-9)
  const last = Math.max(first + 1, Math.ceil(Math.log10(most) - 1e-9))
  const ticks = Array.from({ length: last - first + 1 }, (_, index) => 10 ** (first + index))
  return { at: (value) => from + ((to - from) * (Math.log10(value) - first)) / (last - first), ticks }
}

/** Colour of each peer, the same for all its series. */
function colourIndexes(series: readonly Series[]): Map<string, number> {
  const indexes = new Map<string, number>()
  let next = 0
  for (const { peer } of series)
    if (!indexes.has(peer)) indexes.set(peer, peer.startsWith('lsync') ? 0 : 1 + (next++ % otherColours.length))
  return indexes
}

function formatTick(value: number, isTime: boolean): string {
  if (!isTime) return `${value} MB`
  if (value === 0) return '0'
  return value < 1000 ? `${Number(value.toPrecision(3))} ms` : `${Number((value / 1000).toPrecision(3))} s`
}

function drawBars(row: Row): string | undefined {
  const isTime = row.id !== 'memory'
  const bars = row.series.flatMap((series) => {
    const spread = spreadOf(series, isTime ? 'wallMs' : 'maxRssMiB')
    const goal = row.comparisons.find(({ label, unit }) => label === series.peer && unit !== '×')?.goal?.limit
    return spread === undefined ? [] : [{ peer: series.peer, spread, goal }]
  })
  if (bars.length === 0) return undefined
  const most = Math.max(...bars.flatMap(({ spread, goal }) => [spread.max, goal ?? 0]))
  const least = Math.min(...bars.map(({ spread }) => spread.min))
  const isLog = most / least > 40
  const hasGoal = bars.some(({ goal }) => goal !== undefined)
  const remarks = [...(hasGoal ? ['red marks are goals'] : []), ...(isLog ? ['logarithmic scale'] : [])]
  const subtitle = wrap([row.setting, ...remarks].join('; '), 115)
  const top = 62 + subtitle.length * 16
  const pitch = 36
  const bottom = top + bars.length * pitch + 6
  const left = 40 + 7 * Math.max(...bars.map(({ peer }) => peer.length))
  const right = width - 90
  const scale = isLog ? logScale(least * 0.999, most, left, right) : linearScale(most, left, right)
  const colours = colourIndexes(row.series)
  const body = scale.ticks.flatMap((tick) => [
    line(scale.at(tick), top, scale.at(tick), bottom, 'grid'),
    text(scale.at(tick), bottom + 18, 'faint middle', formatTick(tick, isTime)),
  ])
  for (const [index, { peer, spread, goal }] of bars.entries()) {
    const middle = top + index * pitch + pitch / 2 + 2
    const end = scale.at(spread.median)
    const label = isTime ? formatMs(spread.median) : `${Math.round(spread.median)} MB`
    body.push(
      text(left - 12, middle + 4, 'ink end', peer),
      `<rect x="${round(left)}" y="${round(middle - 10)}" width="${round(Math.max(1, end - left))}" height="20" rx="2" class="s${colours.get(peer) ?? 0}"/>`,
      ...drawWhisker(scale.at(spread.min), scale.at(spread.max), middle),
      text(Math.max(end, scale.at(spread.max)) + 8, middle + 4, 'ink', label),
    )
    if (goal !== undefined)
      body.push(`<g stroke-width="2">${line(scale.at(goal), middle - 15, scale.at(goal), middle + 15, 'goal')}</g>`)
  }
  return drawFrame(row, bottom + 36, subtitle, body)
}

function drawWhisker(from: number, to: number, middle: number): string[] {
  if (to - from < 1) return []
  return [
    line(from, middle, to, middle, 'whisker'),
    line(from, middle - 4, from, middle + 4, 'whisker'),
    line(to, middle - 4, to, middle + 4, 'whisker'),
  ]
}

function drawCurves(row: Row): string | undefined {
  const points = row.series.flatMap((series) => {
    const spread = spreadOf(series, 'wallMs')
    return spread === undefined ? [] : [{ peer: series.peer, x: series.x, spread }]
  })
  if (points.length === 0) return undefined
  const subtitle = wrap(
    `${row.title.includes('fifth') ? `largest: ${row.setting}` : row.setting}; both scales logarithmic`,
    115,
  )
  const top = 70 + subtitle.length * 16
  const bottom = top + 320
  const peers = [...new Set(points.map(({ peer }) => peer))]
  const [left, right] = [80, width - 40 - 7 * Math.max(...peers.map((peer) => peer.length))]
  const xs = points.map(({ x }) => x)
  const [leastX, mostX] = [Math.min(...xs), Math.max(...xs)]
  const least = Math.min(...points.map(({ spread }) => spread.min))
  const most = Math.max(...points.map(({ spread }) => spread.max))
  const horizontal = logScale(leastX, mostX, left, right)
  const vertical = logScale(least, most, bottom, top)
  const colours = colourIndexes(row.series)
  const body = [
    ...vertical.ticks.flatMap((tick) => [
      line(left, vertical.at(tick), right, vertical.at(tick), 'grid'),
      text(left - 10, vertical.at(tick) + 4, 'faint end', formatTick(tick, true)),
    ]),
    ...horizontal.ticks.flatMap((tick) => [
      line(horizontal.at(tick), top, horizontal.at(tick), bottom, 'grid'),
      text(horizontal.at(tick), bottom + 20, 'faint middle', tick.toLocaleString('en')),
    ]),
    text((left + right) / 2, bottom + 42, 'ink middle', row.variable ?? ''),
    ...drawGuide(points, horizontal, vertical),
  ]
  const labels: { y: number; peer: string }[] = []
  for (const peer of peers) {
    const own = points.filter((point) => point.peer === peer).sort((before, after) => before.x - after.x)
    const index = colours.get(peer) ?? 0
    const path = own.map(({ x, spread }) => `${round(horizontal.at(x))},${round(vertical.at(spread.median))}`)
    body.push(`<polyline points="${path.join(' ')}" class="l${index}"/>`)
    for (const { x, spread } of own) body.push(...drawPoint(horizontal.at(x), spread, vertical, index))
    const last = own.at(-1)
    if (last !== undefined) labels.push({ y: vertical.at(last.spread.median), peer })
  }
  labels.sort((before, after) => before.y - after.y)
  let lowest = Number.NEGATIVE_INFINITY
  for (const { y, peer } of labels) {
    // Names stand at the ends of their lines, moved down where two would overlap.
    lowest = Math.max(y, lowest + 16)
    body.push(text(right + 14, lowest + 4, `s${colours.get(peer) ?? 0}`, peer))
  }
  return drawFrame(row, bottom + 60, subtitle, body)
}

function drawPoint(x: number, spread: Spread, vertical: Scale, colour: number): string[] {
  const [low, high] = [vertical.at(spread.min), vertical.at(spread.max)]
  const whisker =
    low - high < 8
      ? []
      : [
          line(x, low, x, high, 'whisker'),
          line(x - 4, low, x + 4, low, 'whisker'),
          line(x - 4, high, x + 4, high, 'whisker'),
        ]
  const dot = `<circle cx="${round(x)}" cy="${round(vertical.at(spread.median))}" r="4" class="s${colour}"/>`
  return [...whisker, dot]
}

/** A dotted line of linear growth from the lowest first point, clipped to the plot. */
function drawGuide(points: readonly { x: number; spread: Spread }[], horizontal: Scale, vertical: Scale): string[] {
  const start = [...points].sort((left, right) => left.x - right.x || left.spread.median - right.spread.median)[0]
  const mostX = horizontal.ticks.at(-1) ?? 1
  const mostY = vertical.ticks.at(-1) ?? 1
  if (start === undefined) return []
  const factor = Math.min(mostX / start.x, mostY / start.spread.median)
  const [x, y] = [horizontal.at(start.x * factor), vertical.at(start.spread.median * factor)]
  return [
    line(horizontal.at(start.x), vertical.at(start.spread.median), x, y, 'guide'),
    text(x - 6, Math.max(y, vertical.at(mostY)) - 6, 'faint end', 'linear'),
  ]
}

/** Draws a row as an SVG document for light and dark pages; `undefined` when nothing of it could be measured. */
export function drawRow(row: Row): string | undefined {
  return row.variable === undefined ? drawBars(row) : drawCurves(row)
}
