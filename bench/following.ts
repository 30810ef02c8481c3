import { appendFileSync, mkdirSync, rmSync, unlinkSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import { findProgram, startCommand } from './command.ts'
import { compare, count, figure, find } from './compare.ts'
import { type Daemon, measureRest, startDaemon } from './daemon.ts'
import { type Cost, measureCommand } from './measure.ts'
import type { Goal, Row, Series } from './report.ts'
import { openPlace } from './state.ts'
import { describe, freshTargets, makeSource, newState, type SyncContext, workloadOf } from './sync-trees.ts'
import { listFiles, writeDirectories } from './workload.ts'

const goals = {
  changes: { text: '≤ 50 ms', limit: 50, bound: 'most' },
  latency: { text: '≤ tick + 100 ms', limit: 1100, bound: 'most' },
  restMemory: { text: '≤ 120 MB', limit: 120, bound: 'most' },
  restReady: { text: '≤ 1 s', limit: 1000, bound: 'most' },
  restart: { text: '≤ 3 s', limit: 3000, bound: 'most' },
} as const satisfies Record<string, Goal>

const COLLECTED_MS = 100
const noCost: Cost = { wallMs: 0, syncMs: 0, userMs: 0, systemMs: 0, maxRssMiB: 0, exitCode: 0, complaint: '' }

type DaemonRequest = { source: string; target: string; stateDir: string; sourceChoice?: string; arrivals?: string }

/** Starts a sync in a process that answers: the library of this tree, whose start is no part of what is measured. */
function startSync({ scratch }: SyncContext, request: DaemonRequest): Promise<Daemon> {
  const command = [process.execPath, join(import.meta.dirname, 'sync-daemon.ts'), JSON.stringify(request)]
  return startDaemon(scratch, command, (line) => line.startsWith('{"ready"'))
}

/** Starts the command itself, and waits for a line of its output. */
function startCommandLine(
  { scratch, options }: SyncContext,
  { source, target, stateDir }: DaemonRequest,
  isReady: (line: string) => boolean,
  ...more: string[]
): Promise<Daemon> {
  return startDaemon(scratch, [options.lsync, 'sync', source, target, '--state', stateDir, ...more], isReady)
}

const isWatching = (line: string): boolean => line.startsWith('watched by')
const isSafe = (line: string): boolean => line.startsWith('{"type":"checkpoint"')

async function askJson<T>(daemon: Daemon, line: string): Promise<T> {
  return JSON.parse(await daemon.ask(line)) as T
}

type Flushed = { tookMs: number; isSettled: boolean; failures: number }

/** Flushes until nothing is left, and says what the last flush took. */
async function flush(daemon: Daemon): Promise<Flushed> {
  for (let attempt = 0; ; attempt++) {
    const flushed = await askJson<Flushed>(daemon, 'flush')
    if (flushed.failures > 0) throw new Error(`lsync could not carry over ${flushed.failures} names`)
    if (flushed.isSettled || attempt > 20) return flushed
  }
}

/** Changes some files of a tree in place, removes a few and makes as many anew; a hundred changes touch a hundred names. */
function changeFiles(root: string, files: readonly string[], changes: number, round: number): void {
  const stride = Math.max(1, Math.floor(files.length / changes))
  for (let change = 0; change < changes; change++) {
    const file = join(root, files[(change * stride + round) % files.length] ?? '')
    if (change % 10 === 0) writeFileSync(join(dirname(file), `made-${round}-${change}`), 'made')
    else if (change % 10 === 1 && round > 0)
      unlinkSync(
        join(
          dirname(join(root, files[((change - 1) * stride + round - 1) % files.length] ?? '')),
          `made-${round - 1}-${change - 1}`,
        ),
      )
    else appendFileSync(file, `round ${round}\n`)
  }
}

/** A tree that is changed in rounds, with places for what lsync and rsync make of it. */
type Trial = {
  files: number
  source: string
  target: string
  lsync: Series
  /** The first run of rsync. */
  copy: () => Promise<void>
  /** Changes some files; what the round before left to write back is no part of this one. */
  change: (round: number) => Promise<void>
  /** A run of rsync, whose cost counts if the round does. */
  rsync: (round: number, counts?: boolean) => Promise<void>
}

/** Runs a trial for each size of tree. */
async function runTrials(
  context: SyncContext,
  row: 'changes' | 'restart',
  peer: string,
  run: (trial: Trial) => Promise<void>,
): Promise<{ series: Series[]; hasRsync: boolean }> {
  const { options, scratch, programs, progress, missing } = context
  const most = Math.max(...options.followed)
  const series: Series[] = []
  const hasRsync = findProgram('rsync') !== undefined
  if (!hasRsync) missing({ name: 'rsync -aHAX', reason: 'rsync is not installed' })
  for (const files of options.followed) {
    const workload = workloadOf(options, files, most)
    progress(`${row}: making ${count(files)} files`)
    const source = await makeSource(context, workload, `${row}-${files}`)
    const open = freshTargets(context, workload, `${row}-${files}`)
    const [ours, theirs] = [await open(), hasRsync ? await open() : undefined]
    const names = listFiles(workload)
    const lsync: Series = { peer, x: files, samples: [] }
    const rsync: Series = { peer: 'rsync -aHAX', x: files, samples: [] }
    series.push(lsync, ...(hasRsync ? [rsync] : []))
    try {
      await run({
        files,
        source: source.path,
        target: ours.path,
        lsync,
        copy: async () => {
          if (theirs !== undefined) await startCommand(['rsync', '-aHAX', `${source.path}/`, `${theirs.path}/`])
        },
        change: async (round) => {
          for (const path of [source.path, ours.path]) await startCommand(['sync', '-f', path])
          changeFiles(source.path, names, options.changes, round)
        },
        rsync: async (round, counts = true) => {
          if (theirs === undefined) return
          progress(`round ${round}: rsync at ${count(files)}`)
          const cost = await measureCommand({
            command: ['rsync', '-aHAX', '--delete', `${source.path}/`, `${theirs.path}/`],
            cwd: scratch.folder('measure/cwd'),
            folder: scratch.folder('measure'),
            measureProgram: programs.measure,
            syncDirectory: theirs.path,
          })
          if (counts) rsync.samples.push({ round, ...cost })
        },
      })
    } finally {
      await ours.close()
      await theirs?.close()
      source.close()
    }
  }
  return { series, hasRsync }
}

export async function* measureChanges(context: SyncContext): AsyncGenerator<Row> {
  const { options, progress } = context
  const most = Math.max(...options.followed)
  const peer = 'lsync, tick to barrier'
  const { series, hasRsync } = await runTrials(context, 'changes', peer, async (trial) => {
    const { files, source, target, lsync } = trial
    progress(`changes: the first sync of ${count(files)} files`)
    const daemon = await startSync(context, { source, target, stateDir: newState(context) })
    try {
      await flush(daemon)
      await trial.copy()
      // The first round finds caches cold that are warm in a daemon that runs.
      for (let round = 0; round < options.runs + 1; round++) {
        await trial.change(round)
        progress(`round ${round}: lsync at ${count(files)}`)
        // As in a daemon, whose tick ends later than its changes: what is read in the moment of its change is read twice.
        await delay(COLLECTED_MS)
        const { tookMs } = await flush(daemon)
        if (round > 0) lsync.samples.push({ round, ...noCost, wallMs: tookMs })
        await trial.rsync(round, round > 0)
      }
    } finally {
      await daemon.stop()
    }
  })
  yield {
    id: 'changes',
    title: `${count(options.changes)} changes in a tree that is followed`,
    setting: describe(options, workloadOf(options, most), 'to a second file system of the same kind'),
    fs: options.fs,
    variable: 'files',
    series,
    comparisons: [
      ...options.followed.map((x) =>
        figure(`lsync at ${count(x)} files, tick to barrier`, find(series, peer, x), 'ms', goals.changes),
      ),
      ...(hasRsync
        ? options.followed.map((x) =>
            compare(`rsync -aHAX ÷ lsync at ${count(x)}`, find(series, 'rsync -aHAX', x), find(series, peer, x), [
              'rsync',
              'lsync',
            ]),
          )
        : []),
    ],
    notes: [
      `lsync: from the call of flush, ${COLLECTED_MS} ms after the last change, until all of it is durable; rsync: one run, nothing made durable`,
    ],
  }
}

/** A percentile of some figures. */
function percentile(values: readonly number[], share: number): number {
  const sorted = [...values].sort((left, right) => left - right)
  return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * share))] ?? Number.NaN
}

export async function* measureLatency(context: SyncContext): AsyncGenerator<Row> {
  const { options, progress } = context
  const workload = workloadOf(options, 1000)
  const more = options.rate * options.seconds * 2
  const source = await makeSource(context, workload, 'latency', more)
  const open = freshTargets(context, { ...workload, files: workload.files + more }, 'latency')
  const shares = { p50: 0.5, p99: 0.99, most: 1 } as const
  const series = Object.keys(shares).map((peer): Series => ({ peer: `lsync, ${peer}`, x: 0, samples: [] }))
  try {
    for (let round = 0; round < Math.min(options.runs, 3); round++) {
      progress(`round ${round + 1}: ${count(options.rate)} changes a second for ${options.seconds} s`)
      const target = await open()
      const busy = join(source.path, `busy-${round}`)
      const arrivals = join(target.path, `busy-${round}`)
      mkdirSync(busy)
      try {
        const request = { source: source.path, target: target.path, stateDir: newState(context), arrivals }
        // Until the directory is there, nothing can arrive in it.
        const first = await startSync(context, { ...request, arrivals: target.path })
        await flush(first)
        await first.stop()
        const daemon = await startSync(context, request)
        try {
          await flush(daemon)
          await askJson(daemon, 'latencies')
          const writer = [process.execPath, join(import.meta.dirname, 'writer.ts')]
          await startCommand([...writer, busy, String(options.rate), String(options.seconds)])
          await flush(daemon)
          const { latenciesMs } = await askJson<{ latenciesMs: number[] }>(daemon, 'latencies')
          if (latenciesMs.length < options.rate * options.seconds * 0.99) throw new Error('some changes did not arrive')
          for (const [index, share] of Object.values(shares).entries())
            series[index]?.samples.push({ round, ...noCost, wallMs: percentile(latenciesMs, share) })
        } finally {
          await daemon.stop()
        }
      } finally {
        await target.close()
        rmSync(busy, { recursive: true })
      }
    }
  } finally {
    source.close()
  }
  yield {
    id: 'latency',
    title: 'from a change until it is durable',
    setting: `${count(options.rate)} new files a second for ${options.seconds} s, tick 1 s`,
    fs: options.fs,
    series,
    comparisons: [
      figure('half of the changes within', series[0], 'ms'),
      figure('99 of 100 changes within', series[1], 'ms', goals.latency),
    ],
    notes: [
      'each file is named after the microsecond of its making; it counts when the barrier after its arrival is reached',
    ],
  }
}

export async function* measureRestart(context: SyncContext): AsyncGenerator<Row> {
  const { options, progress } = context
  const most = Math.max(...options.followed)
  const { series } = await runTrials(context, 'restart', 'lsync', async (trial) => {
    const { files, source, target, lsync } = trial
    const request = { source, target, stateDir: newState(context) }
    progress(`restart: the first sync of ${count(files)} files`)
    const first = await startSync(context, request)
    await flush(first)
    await first.stop('SIGKILL')
    await trial.copy()
    for (let round = 0; round < options.runs; round++) {
      await trial.change(round)
      progress(`round ${round}: lsync at ${count(files)}`)
      const daemon = await startCommandLine(context, request, isSafe, '--json')
      lsync.samples.push({ round, ...(await measureRest(daemon, 0)) })
      await daemon.stop('SIGKILL')
      await trial.rsync(round)
    }
  })
  yield {
    id: 'restart',
    title: 'restart after SIGKILL: until all is safe again',
    setting: describe(options, workloadOf(options, most), `${count(options.changes)} of them changed meanwhile`),
    fs: options.fs,
    variable: 'files',
    series,
    comparisons: [
      ...options.followed.map((x) =>
        figure(
          `lsync at ${count(x)} files`,
          find(series, 'lsync', x),
          'ms',
          x === 1_000_000 ? goals.restart : undefined,
        ),
      ),
      ...options.followed.map((x) =>
        compare(`rsync -aHAX ÷ lsync at ${count(x)}`, find(series, 'rsync -aHAX', x), find(series, 'lsync', x), [
          'rsync',
          'lsync',
        ]),
      ),
    ],
    notes: [
      'lsync: from the start of the process until its first checkpoint; it looks at the source alone, where rsync looks at both sides',
    ],
  }
}

export async function* measureAtRest(context: SyncContext): AsyncGenerator<Row> {
  const { options, scratch, progress, missing } = context
  const place = await openPlace(scratch, { fs: 'tmpfs', name: 'rest', sizeBytes: 0, inodes: 0 })
  try {
    progress(`rest: making ${count(options.directories)} directories`)
    const [root, copy] = [join(place.root, 'upper'), join(place.root, 'copy')]
    mkdirSync(root)
    await writeDirectories(root, options.directories * 50, scratch)
    const watcher = (choice: string) => (): Promise<Daemon> => {
      const command = [process.execPath, join(import.meta.dirname, 'watcher.ts'), root, choice]
      return startDaemon(scratch, command, (line) => line.startsWith('ready '))
    }
    const request = { source: root, target: copy, stateDir: newState(context) }
    progress('rest: the first sync')
    const first = await startSync(context, request)
    await flush(first)
    await first.stop()
    const peers: Record<string, () => Promise<Daemon>> = {
      'lsync, following': () => startCommandLine(context, request, isWatching),
      'its fanotify source alone': watcher('fanotify'),
      'its chokidar source alone': watcher('chokidar'),
    }
    if (findProgram('lsyncd') === undefined) missing({ name: 'lsyncd', reason: 'lsyncd is not installed' })
    else {
      const { command, isReady } = lsyncd(context, root, join(place.root, 'lsyncd-copy'))
      peers['lsyncd'] = () => startDaemon(scratch, command, isReady)
    }
    const series: Series[] = []
    for (const [name, start] of Object.entries(peers)) {
      if (options.skip.some((word) => name.includes(word))) {
        missing({ name, reason: 'skipped as asked' })
        continue
      }
      const own: Series = { peer: name, x: 0, samples: [] }
      series.push(own)
      for (let round = 0; round < Math.min(options.runs, 3); round++) {
        progress(`round ${round + 1}: ${name}`)
        own.samples.push({ round, ...(await measureDaemon(context, start)) })
      }
    }
    const lsync = find(series, 'lsync, following')
    yield {
      id: 'rest',
      title: 'at rest',
      setting: `${count(options.directories)} directories on tmpfs, looked at for ${options.restSeconds} s`,
      fs: 'tmpfs',
      series,
      comparisons: [
        figure('lsync: every change is seen after', lsync, 'ms', goals.restReady),
        figure('lsync: resident memory', lsync, 'MB', goals.restMemory),
        ...series
          .filter(({ peer }) => peer !== 'lsync, following')
          .flatMap((own) => [
            figure(`${own.peer}: after`, own, 'ms'),
            figure(`${own.peer}: resident memory`, own, 'MB'),
          ]),
      ],
      notes: [
        `median: from the start of the process until every later change is seen; processor: used in ${options.restSeconds} s at rest`,
        'lsyncd: ready when its first rsync has ended',
      ],
    }
  } finally {
    place.close()
  }
}

/** lsyncd on a tree, and the line with which it says that it watches. */
function lsyncd(context: SyncContext, source: string, target: string) {
  const config = join(context.scratch.folder('lsyncd'), 'lsyncd.lua')
  mkdirSync(target)
  const quoted = (text: string): string => JSON.stringify(text)
  const rsync = 'rsync = { archive = true, acls = true, xattrs = true, hard_links = true }'
  writeFileSync(
    config,
    `settings { nodaemon = true }
sync { default.rsync, source = ${quoted(source)}, target = ${quoted(target)}, delay = 1, ${rsync} }
`,
  )
  const isReady = (line: string): boolean => line.includes('Startup of') && line.includes('finished')
  return { command: ['lsyncd', '-nodaemon', config], isReady }
}

async function measureDaemon({ scratch, options }: SyncContext, start: () => Promise<Daemon>): Promise<Cost> {
  try {
    const daemon = await start()
    try {
      // The comparison that follows each start of lsync is no part of its rest.
      await new Promise((resolve) => setTimeout(resolve, options.settleSeconds * 1000))
      return await measureRest(daemon, options.restSeconds)
    } finally {
      await daemon.stop()
    }
  } catch (error) {
    if (scratch.interruptedBy !== undefined) throw error
    return { ...noCost, exitCode: 1, complaint: error instanceof Error ? error.message : String(error) }
  }
}
