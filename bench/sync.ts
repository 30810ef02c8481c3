import { mkdirSync, rmSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { findProgram, startCommand } from './command.ts'
import { compare, compareGrowth, compareOthers, count, find } from './compare.ts'
import { compareFingerprints, type Fingerprint, takeFingerprint } from './fingerprint.ts'
import { measureAtRest, measureChanges, measureLatency, measureRestart } from './following.ts'
import { measureCommand } from './measure.ts'
import { moosefsPrograms } from './moosefs.ts'
import type { Rows } from './question.ts'
import type { Goal, Row, Series } from './report.ts'
import { type Sshd, startSshd, whyNoSshd } from './sshd.ts'
import { keepsWholeSeconds, openPlace } from './state.ts'
import { type Carrier, type Carriers, localCarriers, sshCarriers } from './sync-peers.ts'
import {
  describe,
  freshTargets,
  makeSource,
  mostFullFiles,
  newState,
  type OpenTarget,
  type SyncContext,
  type SyncOptions,
  workloadOf,
} from './sync-trees.ts'

/** The rows of `bench sync` by id, in the order in which they run. */
export const syncRows: Rows<SyncOptions> = {
  local: { question: 'what does a first sync to a local tree cost?', rows: measureLocal },
  ssh: { question: 'what does a first sync over ssh cost?', rows: measureSsh },
  moosefs: { question: 'what does a first sync to a MooseFS cost?', rows: measureMoosefs },
  changes: { question: 'what do some changes cost in a tree that is followed?', rows: measureChanges },
  latency: { question: 'when is a change durable?', rows: measureLatency },
  rest: { question: 'what does following cost while nothing happens?', rows: measureAtRest },
  restart: { question: 'how long does it take after a crash until all is safe again?', rows: measureRestart },
  curve: { question: 'how does a first sync grow with the tree?', rows: measureCurve },
}

const goals = {
  localCp: { text: '≤ 0.55 ×', limit: 0.55, bound: 'most' },
  localRsync: { text: '≤ 0.35 ×', limit: 0.35, bound: 'most' },
  ssh: { text: '≤ 0.5 ×', limit: 0.5, bound: 'most' },
  moosefs: { text: '≤ 0.25 ×', limit: 0.25, bound: 'most' },
  linear: { text: '≤ 1 (linear)', limit: 1, bound: 'most' },
} as const satisfies Record<string, Goal>

/** What the carriers of one contest run on. */
type Contest = { source: string; open: OpenTarget; carriers: Carriers; x: number }

/** Runs all carriers in turns, beginning with another one in each round. */
async function runCarriers(context: SyncContext, contest: Contest, runs: number): Promise<Series[]> {
  const { options, missing } = context
  const { carriers, x } = contest
  for (const absent of carriers.missing) missing(absent)
  const isSkipped = ({ name }: Carrier): boolean => options.skip.some((word) => name.includes(word))
  for (const { name } of carriers.carriers.filter(isSkipped)) missing({ name, reason: 'skipped as asked' })
  const chosen = carriers.carriers.filter((carrier) => !isSkipped(carrier))
  const series = chosen.map(({ name }): Series => ({ peer: name, x, samples: [] }))
  for (let round = 0; round < runs; round++)
    for (let index = 0; index < chosen.length; index++) {
      const at = (index + round) % chosen.length
      const [carrier, own] = [chosen[at], series[at]]
      if (carrier !== undefined && own !== undefined)
        await runCarrier(context, contest, { carrier, series: own, round })
    }
  return series
}

async function runCarrier(
  context: SyncContext,
  { source, open }: Contest,
  { carrier, series, round }: { carrier: Carrier; series: Series; round: number },
): Promise<void> {
  const { scratch, programs, options, progress } = context
  await scratch.checkInterrupted()
  progress(`round ${round + 1}: ${carrier.name}${series.x === 0 ? '' : ` at ${count(series.x)}`}`)
  const target = await open()
  try {
    // The inodes of a live upper are in memory.
    await startCommand(['/bin/sh', '-c', 'find "$1" -printf %s >/dev/null', 'sh', source])
    const cost = await measureCommand({
      command: carrier.command(source, target.path),
      cwd: scratch.folder('measure/cwd'),
      folder: scratch.folder('measure'),
      measureProgram: programs.measure,
      syncDirectory: target.path,
    })
    await scratch.checkInterrupted()
    series.samples.push({ round, ...cost })
    if (!options.check || round > 0 || cost.exitCode !== 0) return
    progress(`comparing what ${carrier.name} made`)
    // It tries a file, which is not to show in the target.
    const wholeSeconds = keepsWholeSeconds(dirname(target.path))
    const read = (path: string): Promise<Fingerprint> => takeFingerprint(programs.fingerprint, path, { wholeSeconds })
    series.difference = compareFingerprints(await read(source), await read(target.path))
  } finally {
    await target.close()
  }
}

function request(context: SyncContext) {
  return { lsync: context.options.lsync, state: () => newState(context) }
}

async function* measureLocal(context: SyncContext): AsyncGenerator<Row> {
  const { options } = context
  const workload = workloadOf(options, options.files)
  context.progress(`local: making ${count(options.files)} files`)
  const source = await makeSource(context, workload, 'local')
  try {
    const contest = {
      source: source.path,
      open: freshTargets(context, workload, 'local'),
      carriers: localCarriers(request(context)),
      x: 0,
    }
    const series = await runCarriers(context, contest, options.runs)
    const lsync = find(series, 'lsync')
    yield {
      id: 'local',
      title: 'first sync to a local tree',
      setting: describe(options, workload, 'to a second file system of the same kind'),
      fs: options.fs,
      series,
      checkedAgainst: 'the source',
      comparisons: [
        compare('lsync ÷ cp -a', lsync, find(series, 'cp -a'), ['lsync', 'cp -a'], goals.localCp),
        compare('lsync ÷ rsync -aHAX', lsync, find(series, 'rsync -aHAX'), ['lsync', 'rsync'], goals.localRsync),
        ...compareOthers(series, ['cp -a', 'rsync -aHAX']),
      ],
      notes: durabilityNotes,
    }
  } finally {
    source.close()
  }
}

const durabilityNotes = ['lsync has written everything back when it ends; the others leave that to the kernel']

async function* measureSsh(context: SyncContext): AsyncGenerator<Row> {
  const { options, scratch } = context
  const reason = whyNoSshd()
  if (reason !== undefined) return context.missing({ name: 'row ssh', reason })
  const workload = workloadOf(options, options.files)
  context.progress(`ssh: making ${count(options.files)} files`)
  const source = await makeSource(context, workload, 'ssh')
  let sshd: Sshd | undefined
  try {
    sshd = await startSshd(scratch)
    const contest = {
      source: source.path,
      open: freshTargets(context, workload, 'ssh'),
      carriers: sshCarriers({ ...request(context), sshd }),
      x: 0,
    }
    const series = await runCarriers(context, contest, options.runs)
    const rsync = find(series, 'rsync -aHAX -e ssh')
    const names = ['lsync', 'rsync'] as const
    yield {
      id: 'ssh',
      title: 'first sync over ssh on loopback',
      setting: describe(options, workload, 'to a second file system of the same kind'),
      fs: options.fs,
      series,
      checkedAgainst: 'the source',
      comparisons: [
        compare('lsync ÷ rsync -aHAX -e ssh', find(series, 'lsync'), rsync, names, goals.ssh),
        compare('lsync --rsh ssh ÷ rsync -aHAX -e ssh', find(series, 'lsync --rsh ssh'), rsync, names),
        ...compareOthers(series, ['rsync -aHAX -e ssh', 'lsync --rsh ssh']),
      ],
      notes: durabilityNotes,
    }
  } finally {
    sshd?.stop()
    source.close()
  }
}

async function* measureMoosefs(context: SyncContext): AsyncGenerator<Row> {
  const { options, scratch } = context
  const absent = moosefsPrograms.filter((program) => findProgram(program) === undefined)
  if (absent.length > 0) return context.missing({ name: 'row moosefs', reason: `${absent.join(', ')} not installed` })
  const workload = workloadOf(options, options.moosefsFiles)
  context.progress(`moosefs: making ${count(workload.files)} files`)
  const source = await makeSource(context, workload, 'moosefs')
  try {
    const place = await openPlace(scratch, { fs: 'moosefs', name: 'moosefs', sizeBytes: 0, inodes: 0 })
    try {
      let serial = 0
      const open: OpenTarget = async () => {
        const path = join(place.root, `copy-${serial++}`)
        mkdirSync(path)
        return { path, close: async () => rmSync(path, { recursive: true, force: true }) }
      }
      const { carriers, missing } = localCarriers(request(context))
      const contest = { source: source.path, open, carriers: { carriers, missing }, x: 0 }
      const series = await runCarriers(context, contest, options.runs)
      const names = ['lsync', 'rsync'] as const
      yield {
        id: 'moosefs',
        title: 'first sync to a MooseFS',
        setting: describe(options, workload, 'to a MooseFS 3.0 of one chunkserver'),
        fs: 'moosefs',
        series,
        checkedAgainst: 'the source',
        comparisons: [
          compare('lsync ÷ rsync -aHAX', find(series, 'lsync'), find(series, 'rsync -aHAX'), names, goals.moosefs),
          ...compareOthers(series, ['rsync -aHAX']),
        ],
        notes: [],
      }
    } finally {
      place.close()
    }
  } finally {
    source.close()
  }
}

async function* measureCurve(context: SyncContext): AsyncGenerator<Row> {
  const { options, progress } = context
  const most = Math.max(...options.curve)
  const series: Series[] = []
  for (const files of options.curve) {
    const workload = workloadOf(options, files, most)
    progress(`curve: making ${count(files)} files`)
    const source = await makeSource(context, workload, `curve-${files}`)
    try {
      const { carriers, missing } = localCarriers(request(context))
      const some = carriers.filter(({ name }) => ['lsync', 'cp -a', 'rsync -aHAX'].includes(name))
      const open = freshTargets(context, workload, `curve-${files}`)
      const contest = { source: source.path, open, carriers: { carriers: some, missing }, x: files }
      series.push(...(await runCarriers(context, contest, Math.min(options.runs, 3))))
    } finally {
      source.close()
    }
  }
  yield {
    id: 'curve',
    title: 'first sync to a local tree, by size',
    setting: describe(options, workloadOf(options, most), 'and fewer, to a second file system of the same kind'),
    fs: options.fs,
    variable: 'files',
    series,
    checkedAgainst: 'the source',
    comparisons: [
      compareGrowth(series, 'lsync', goals.linear),
      compareGrowth(series, 'cp -a'),
      compareGrowth(series, 'rsync -aHAX'),
      ...options.curve.map((x) =>
        compare(`lsync ÷ rsync -aHAX at ${count(x)}`, find(series, 'lsync', x), find(series, 'rsync -aHAX', x), [
          'lsync',
          'rsync',
        ]),
      ),
    ],
    notes: most > mostFullFiles ? ['the files are empty, so that they fit in memory'] : [],
  }
}

/** Whether the rows need a network namespace of their own: a MooseFS does. */
export function syncNeedsNetwork(rows: readonly string[]): boolean {
  return rows.includes('moosefs')
}
