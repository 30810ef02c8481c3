import { existsSync, mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { findProgram, runCommand, startCommand } from './command.ts'
import { compare, compareGrowth, count, figure, find } from './compare.ts'
import { measureCommand } from './measure.ts'
import { type Moosefs, moosefsPrograms, startMoosefs } from './moosefs.ts'
import type { Context, Rows } from './question.ts'
import { formatMs, type Goal, type Row, type Series } from './report.ts'
import { handMover, lsyncMovers, type Mover, type Node, type Stamps, standstillMs, wholeMover } from './root-movers.ts'
import { type Sshd, startSshd, whyNoSshd } from './sshd.ts'
import { type Fs, openPlace, type Place, writeTree } from './state.ts'
import { summarize } from './statistics.ts'
import { estimateTreeBytes, type Workload, writeChanged, writeLower } from './workload.ts'

/** Everything that the rows of `bench root` can be told. Sizes are counts of files. */
export type RootOptions = {
  lsync: string
  runs: number
  seed: number
  /** Where the home and the node of the row solidify lie. */
  fs: Fs
  target?: string
  /** What lies below, and what is changed, in the row solidify. */
  curve: readonly number[]
  dirty: number
  /** Files of the root in the rows switch and changed, and how many of them are changed in switch and size. */
  files: number
  changes: number
  /** Changed files in the row changed. */
  changed: readonly number[]
  /** Files of the root in the row size. */
  sizes: readonly number[]
  skip: readonly string[]
}

type RootContext = Context<RootOptions>

/** The rows of `bench root` by id, in the order in which they run. */
export const rootRows: Rows<RootOptions> = {
  solidify: { question: 'what does a version cost, whatever lies below?', rows: measureSolidify },
  switch: { question: 'how long does a container stand still when it goes to another node?', rows: measureSwitch },
  changed: { question: 'how does that grow with what was changed?', rows: measureByChanges },
  size: { question: 'how does that grow with the root?', rows: measureBySize },
}

const goals = {
  solidify: { text: '≤ 1 s', limit: 1000, bound: 'most' },
  flat: { text: '≤ 0.1 (flat)', limit: 0.1, bound: 'most' },
  standstill: { text: '≤ 2 s', limit: 2000, bound: 'most' },
  hand: { text: '≥ 20 ×', limit: 20, bound: 'least' },
} as const satisfies Record<string, Goal>

const HAND = 'stop, rsync the upper, hard-link merge, remount'
const WHOLE = 'stop, rsync -aHAX of the whole root over ssh'
const LATE = 'lsync switch, all written at the stop'
/** Above this the files of a root hold no bytes: a small file takes 69 KiB of a MooseFS. */
const MOST_FULL_ON_MOOSEFS = 10_000
const MOST_FULL = 200_000

/** Whether the rows need a network namespace of their own: a MooseFS does. */
export function rootNeedsNetwork(rows: readonly string[]): boolean {
  return rows.some((row) => row !== 'solidify')
}

function workloadOf({ seed }: RootOptions, files: number, isFull: boolean): Workload {
  return { files, changes: 0, seed, content: isFull ? 'full' : 'empty', overlayOptions: [] }
}

/** Runs a command under the clock, with everything before it on the disk. */
async function measured({ scratch, programs }: RootContext, command: readonly string[], directory: string) {
  await startCommand(['sync'])
  const cost = await measureCommand({
    command,
    cwd: scratch.folder('measure/cwd'),
    folder: scratch.folder('measure'),
    measureProgram: programs.measure,
    syncDirectory: directory,
  })
  await scratch.checkInterrupted()
  return cost
}

async function* measureSolidify(context: RootContext): AsyncGenerator<Row> {
  const { options, scratch, progress } = context
  const isFull = Math.max(...options.curve) <= MOST_FULL
  const series: Series[] = []
  for (const files of options.curve) {
    const workload = workloadOf(options, files, isFull)
    progress(`solidify: making ${count(files)} files`)
    const place = await openPlace(scratch, {
      fs: options.fs,
      ...(options.target === undefined ? {} : { target: options.target }),
      name: `solidify-${files}`,
      sizeBytes: 2 * estimateTreeBytes(files, workload.content) + 2 ** 29,
      inodes: Math.ceil(files * 2.2 + (options.runs * files) / 40) + options.runs * 1000 + 5000,
    })
    try {
      series.push(...(await solidifyIn(context, place, workload)))
    } finally {
      place.close()
    }
  }
  const most = options.curve.at(-1) ?? 0
  yield {
    id: 'solidify',
    title: 'a version of a stopped container, by what lies below',
    setting: `${count(options.dirty)} changed files above up to ${count(most)} ${isFull ? 'small' : 'empty'} ones, home and node on one ${options.fs === 'target' ? 'disk' : `${options.fs} in memory`}`,
    fs: options.fs,
    variable: 'files below',
    series,
    comparisons: [
      ...options.curve.map((x) =>
        figure(
          `lsync solidify at ${count(x)}`,
          find(series, 'lsync solidify', x),
          'ms',
          x === most ? goals.solidify : undefined,
        ),
      ),
      compareGrowth(series, 'lsync solidify', goals.flat),
      compareGrowth(series, HAND),
      ...options.curve.map((x) =>
        compare(`${HAND} ÷ lsync at ${count(x)}`, find(series, HAND, x), find(series, 'lsync solidify', x), [
          HAND,
          'lsync',
        ]),
      ),
    ],
    notes: ['both from before the unmount until it is mounted again; the time to start lsync is part of its own'],
  }
}

/** Both ways on one place: each has a base of its own, and a new version of it in every round. */
async function solidifyIn(context: RootContext, place: Place, workload: Workload): Promise<Series[]> {
  const { options, scratch, programs, progress } = context
  const base = join(place.root, 'base')
  mkdirSync(base)
  await writeLower(base, workload, scratch)
  const state = join(place.upperRoot, 'state')
  const { lsync } = options
  await startCommand([
    lsync,
    'root',
    'init',
    'lab',
    '--home',
    join(place.root, 'home'),
    '--base',
    base,
    '--state',
    state,
  ])
  runCommand([lsync, 'root', 'mount', 'lab', '--state', state])
  const merged = join(state, 'roots/lab/merged')
  const unmount = scratch.onCleanup(() => runCommand(['umount', '--lazy', merged]))
  // Nobody is on another node, so what moves is the version alone: from the node to itself.
  const nodes = [{ disk: place.upperRoot, store: place.root }] as const
  const hand = handOnOneNode(nodes[0], base, programs.floor)
  const unmountHand = scratch.onCleanup(() => runCommand(['umount', '--lazy', hand.view]))
  const ways = [
    { name: 'lsync solidify', view: merged, command: () => [lsync, 'solidify', 'lab', '--state', state] },
    hand,
  ].filter(({ name }) => !options.skip.some((word) => name.includes(word)))
  const series = ways.map(({ name }): Series => ({ peer: name, x: workload.files, samples: [] }))
  try {
    for (let round = 0; round < options.runs; round++)
      for (const [index, way] of ways.entries()) {
        progress(`round ${round + 1}: ${way.name} at ${count(workload.files)}`)
        const last = writeChanged(way.view, workload, { count: options.dirty, round })
        const cost = await measured(context, way.command(), place.root)
        series[index]?.samples.push({ round, ...cost, ...missingAfter(join(way.view, last), cost) })
      }
  } finally {
    unmountHand()
    unmount()
  }
  return series
}

/** What is there after a command that ended well must be there: else it has failed all the same. */
function missingAfter(path: string, { exitCode }: { exitCode: number }) {
  return exitCode !== 0 || existsSync(path) ? {} : { exitCode: 1, complaint: `${path} is not there afterwards` }
}

function handOnOneNode({ disk, store }: Node, base: string, floor: string) {
  const at = (name: string): string => join(disk, 'hand', name)
  for (const name of ['versions', 'upper', 'work', 'merged']) mkdirSync(at(name), { recursive: true })
  let version = 0
  const lower = (number: number): string => (number === 0 ? base : join(store, 'hand/versions', String(number)))
  const mount = (number: number): string =>
    `mount -t overlay overlay -o lowerdir=${lower(number)},upperdir=${at('upper')},workdir=${at('work')} ${at('merged')}`
  runCommand(['/bin/sh', '-c', mount(0)])
  return {
    name: HAND,
    view: at('merged'),
    command(): readonly string[] {
      const from = lower(version++)
      const to = lower(version)
      const steps = [
        `umount ${at('merged')}`,
        `rsync -aHAX ${at('upper')}/ ${at('synced')}/`,
        `cp -al ${from} ${to}`,
        `${floor} -n trusted -r ${at('synced')} ${to}`,
        `mv ${at('upper')} ${at(`upper-${version}`)}`,
        `mkdir ${at('upper')}`,
        mount(version),
      ]
      return ['/bin/sh', '-ec', steps.join('\n')]
    },
  }
}

/** Two nodes with a disk each, a MooseFS that each has mounted by itself, and an sshd. */
type Cluster = { moosefs: Moosefs; nodes: readonly [Node, Node]; sshd: Sshd; stop: () => void }

async function startCluster({ scratch }: RootContext, name: string): Promise<Cluster> {
  const moosefs = await startMoosefs(scratch)
  const second = moosefs.mountAgain(`${name}-second`)
  const disks: Place[] = []
  for (const index of [1, 2])
    disks.push(await openPlace(scratch, { fs: 'ext4', name: `${name}-${index}`, sizeBytes: 2 ** 32, inodes: 400_000 }))
  const [one, two] = disks as [Place, Place]
  const sshd = await startSshd(scratch)
  return {
    moosefs,
    nodes: [
      { disk: one.root, store: moosefs.root },
      { disk: two.root, store: second.root },
    ],
    sshd,
    stop() {
      sshd.stop()
      for (const disk of disks) disk.close()
      second.unmount()
      moosefs.stop()
    },
  }
}

/** Why the rows that need two nodes and a MooseFS cannot be had here; `undefined` when they can. */
function whyNoCluster(): string | undefined {
  const absent = [...moosefsPrograms, 'rsync'].filter((program) => findProgram(program) === undefined)
  return absent.length > 0 ? `${absent.join(', ')} not installed` : whyNoSshd()
}

/** One contest: a root of a size, and so many files changed in it before each move. */
type Contest = { files: number; changes: number; x: number }

type Moves = { series: Series[]; wholeMs: Map<string, number[]> }

/** Moves a root back and forth in each way, in turns. The time of a sample is that in which the container stood still. */
async function runMovers(context: RootContext, contests: readonly Contest[], id: string): Promise<Moves> {
  const { options, scratch, progress, missing } = context
  const moves: Moves = { series: [], wholeMs: new Map() }
  for (const [index, { files, changes, x }] of contests.entries()) {
    const cluster = await startCluster(context, `${id}-${index}`)
    const stamps: Stamps = { stopped: join(scratch.path, 'stopped'), started: join(scratch.path, 'started') }
    let all: Mover[] = []
    try {
      const workload = workloadOf(options, files, Math.max(...contests.map((one) => one.files)) <= MOST_FULL_ON_MOOSEFS)
      progress(`${id}: making ${count(files)} files on a MooseFS`)
      const base = join(cluster.moosefs.root, 'base')
      mkdirSync(base)
      await writeTree(scratch, 'moosefs', base, workload)
      const request = {
        ...{ scratch, programs: context.programs, lsync: options.lsync, sshd: cluster.sshd, nodes: cluster.nodes },
        ...{ base: 'base', clone: (from: string, to: string) => ['mfsmakesnapshot', from, to], stamps },
      }
      all = [...(await lsyncMovers(request)), await handMover(request), await wholeMover(request)]
      const movers = all.filter(({ name }) => !options.skip.some((word) => name.includes(word)))
      for (const { name } of all)
        if (!movers.some((mover) => mover.name === name)) missing({ name, reason: 'skipped as asked' })
      const series = movers.map(({ name }): Series => ({ peer: name, x, samples: [] }))
      for (let round = 0; round < options.runs; round++)
        for (const [turn] of movers.entries()) {
          const at = (turn + round) % movers.length
          const mover = movers[at] as Mover
          progress(`${id}: round ${round + 1} of ${mover.name}${x === 0 ? '' : ` at ${count(x)}`}`)
          const sample = await move(context, mover, { workload, changes, round: round * movers.length + turn, stamps })
          series[at]?.samples.push({ ...sample, round })
          if (sample.exitCode === 0)
            moves.wholeMs.set(mover.name, [...(moves.wholeMs.get(mover.name) ?? []), sample.wholeMs])
        }
      moves.series.push(...series)
    } finally {
      for (const mover of all) mover.close()
      cluster.stop()
    }
  }
  return moves
}

async function move(
  context: RootContext,
  mover: Mover,
  { workload, changes, round, stamps }: { workload: Workload; changes: number; round: number; stamps: Stamps },
) {
  await mover.prepare()
  for (const path of Object.values(stamps)) rmSync(path, { force: true })
  const last = writeChanged(mover.changesAt(), workload, { count: changes, round })
  const mark = `written-by-${round}`
  writeFileSync(join(mover.view(), mark), mark)
  const cost = await measured(context, mover.command(), context.scratch.path)
  const wholeMs = cost.wallMs
  const stoodMs = standstillMs(stamps)
  if (cost.exitCode !== 0 || stoodMs === undefined) {
    return { ...cost, wholeMs, exitCode: cost.exitCode || 1, complaint: cost.complaint || 'it was not started again' }
  }
  mover.moved()
  const gone = [last, mark].find((path) => !existsSync(join(mover.view(), path)))
  const lost = gone === undefined ? {} : { exitCode: 1, complaint: `${gone} did not go with it` }
  return { ...cost, wholeMs, wallMs: stoodMs, ...lost }
}

const SHOWN = 'what is shown is the time from the end of the stop hook to the beginning of the start hook'

function wholeNotes({ wholeMs }: Moves): string[] {
  const times = [...wholeMs].map(([name, values]) => `${name} ${formatMs(summarize(values)?.median ?? 0)}`)
  return [SHOWN, `the whole command took: ${times.join('; ')}`]
}

const SETTING = 'over a MooseFS 3.0 of one chunkserver that each node has mounted; disks of the nodes: ext4 in memory'

async function* measureSwitch(context: RootContext): AsyncGenerator<Row> {
  const { options } = context
  const reason = whyNoCluster()
  if (reason !== undefined) return context.missing({ name: 'row switch', reason })
  const { files, changes } = options
  const moves = await runMovers(context, [{ files, changes, x: 0 }], 'switch')
  const { series } = moves
  yield {
    id: 'switch',
    title: 'how long a container stands still when it goes to another node',
    setting: `${count(changes)} changed files in a root of ${count(files)}, ${SETTING}`,
    fs: 'moosefs',
    series,
    comparisons: [
      figure('lsync switch', find(series, 'lsync switch'), 'ms', goals.standstill),
      figure(LATE, find(series, LATE), 'ms', goals.standstill),
      compare(`${HAND} ÷ lsync`, find(series, HAND), find(series, 'lsync switch'), [HAND, 'lsync'], goals.hand),
      compare(`${HAND} ÷ ${LATE}`, find(series, HAND), find(series, LATE), [HAND, 'lsync']),
      compare(`${WHOLE} ÷ lsync`, find(series, WHOLE), find(series, 'lsync switch'), [WHOLE, 'lsync']),
    ],
    notes: wholeNotes(moves),
  }
}

async function* measureByChanges(context: RootContext): AsyncGenerator<Row> {
  const { options } = context
  const reason = whyNoCluster()
  if (reason !== undefined) return context.missing({ name: 'row changed', reason })
  const { files } = options
  const contests = options.changed.map((changes) => ({ files, changes, x: changes }))
  const moves = await runMovers({ ...context, options: { ...options, runs: 1 } }, contests, 'changed')
  yield {
    id: 'changed',
    title: 'how long a container stands still, by what it has changed',
    setting: `a root of ${count(files)} files, ${SETTING}`,
    fs: 'moosefs',
    variable: 'changed files',
    series: moves.series,
    comparisons: growthOf(moves.series),
    notes: [SHOWN],
  }
}

async function* measureBySize(context: RootContext): AsyncGenerator<Row> {
  const { options } = context
  const reason = whyNoCluster()
  if (reason !== undefined) return context.missing({ name: 'row size', reason })
  const { changes } = options
  const contests = options.sizes.map((files) => ({ files, changes, x: files }))
  const moves = await runMovers({ ...context, options: { ...options, runs: 1 } }, contests, 'size')
  const isFull = Math.max(...options.sizes) <= MOST_FULL_ON_MOOSEFS
  yield {
    id: 'size',
    title: 'how long a container stands still, by the size of its root',
    setting: `${count(changes)} changed files, ${isFull ? '' : 'the others are empty, '}${SETTING}`,
    fs: 'moosefs',
    variable: 'files of the root',
    series: moves.series,
    comparisons: growthOf(moves.series),
    notes: [SHOWN],
  }
}

const growthOf = (series: readonly Series[]) =>
  ['lsync switch', LATE, HAND, WHOLE].map((peer) => compareGrowth(series, peer))
