import { mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { findProgram, startCommand } from './command.ts'
import { compare, compareOthers, count, find } from './compare.ts'
import { measureRest, startDaemon } from './daemon.ts'
import { compareFingerprints, type Fingerprint, takeFingerprint } from './fingerprint.ts'
import { measureCommand } from './measure.ts'
import { moosefsPrograms } from './moosefs.ts'
import type { Context, Rows } from './question.ts'
import { type Comparison, type Goal, type Row, type Series, spreadOf, succeeded } from './report.ts'
import { type Sshd, startSshd, whyNoSshd } from './sshd.ts'
import { type Fs, keepsWholeSeconds, openPlace, type Place } from './state.ts'
import { fitExponent, summarize } from './statistics.ts'
import { type Carrier, type Carriers, localCarriers, sshCarriers } from './sync-peers.ts'
import { estimateTreeBytes, type Workload, writeDirectories, writeLower } from './workload.ts'

/** Everything that the rows of `bench sync` can be told. Sizes are counts of files. */
export type SyncOptions = {
  lsync: string
  runs: number
  /** Files of the first sync, local and over ssh. */
  files: number
  /** Files of the first sync to MooseFS. */
  moosefsFiles: number
  seed: number
  fs: Fs
  target?: string
  /** Directories of the row rest, and how long it looks at each daemon. */
  directories: number
  restSeconds: number
  /** Sizes of the row curve. */
  curve: readonly number[]
  check: boolean
  skip: readonly string[]
}

type SyncContext = Context<SyncOptions>

/** The rows of `bench sync` by id, in the order in which they run. */
export const syncRows: Rows<SyncOptions> = {
  local: { question: 'what does a first sync to a local tree cost?', rows: measureLocal },
  ssh: { question: 'what does a first sync over ssh cost?', rows: measureSsh },
  moosefs: { question: 'what does a first sync to a MooseFS cost?', rows: measureMoosefs },
  rest: { question: 'what does a watch cost while nothing happens?', rows: measureAtRest },
  curve: { question: 'how does a first sync grow with the tree?', rows: measureCurve },
}

const goals = {
  localCp: { text: '≤ 0.55 ×', limit: 0.55, bound: 'most' },
  localRsync: { text: '≤ 0.35 ×', limit: 0.35, bound: 'most' },
  ssh: { text: '≤ 0.5 ×', limit: 0.5, bound: 'most' },
  moosefs: { text: '≤ 0.25 ×', limit: 0.25, bound: 'most' },
  restMemory: { text: '≤ 120 MB', limit: 120, bound: 'most' },
  restReady: { text: '≤ 1 s', limit: 1000, bound: 'most' },
  linear: { text: '≤ 1 (linear)', limit: 1, bound: 'most' },
} as const satisfies Record<string, Goal>

/** Above this, the content of a tree and its copy would take more memory than a machine may have to spare. */
const mostFullFiles = 200_000

function workloadOf(options: SyncOptions, files: number, mostFiles = files): Workload {
  const content = mostFiles > mostFullFiles ? 'empty' : 'full'
  return { files, changes: 0, seed: options.seed, content, overlayOptions: [] }
}

function describe(options: SyncOptions, workload: Workload, to: string): string {
  const where =
    options.fs === 'target' ? `${options.target}` : options.fs === 'tmpfs' ? 'tmpfs' : `${options.fs} in memory`
  return `${count(workload.files)} ${workload.content === 'full' ? 'small' : 'empty'} files on ${where}, ${to}`
}

/** A tree to carry, and where it came from. */
type Source = { path: string; close: () => void }

async function makeSource(context: SyncContext, workload: Workload, name: string): Promise<Source> {
  const place = await openFor(context, context.options.fs, `${name}-source`, workload)
  const path = join(place.root, 'upper')
  mkdirSync(path)
  await writeLower(path, workload, context.scratch)
  await startCommand(['sync', '-f', path])
  return { path, close: place.close }
}

function openFor(
  { scratch, options }: SyncContext,
  fs: Fs,
  name: string,
  { files, content }: Workload,
): Promise<Place> {
  return openPlace(scratch, {
    fs,
    ...(options.target === undefined ? {} : { target: options.target }),
    name,
    sizeBytes: estimateTreeBytes(files, content) + 2 ** 29,
    inodes: Math.ceil(files * 1.1) + 5000,
  })
}

/** Opens an empty place for one run. */
type OpenTarget = () => Promise<{ path: string; close: () => Promise<void> }>

/** A file system of its own for each run, so that none begins where another one has left holes. */
function freshTargets(context: SyncContext, workload: Workload, name: string): OpenTarget {
  let serial = 0
  return async () => {
    const place = await openFor(context, context.options.fs, `${name}-target-${serial++}`, workload)
    const path = join(place.root, 'copy')
    mkdirSync(path)
    return { path, close: async () => place.close() }
  }
}

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

let states = 0

/** A new empty folder for what a program remembers of a sync. */
function newState({ scratch }: SyncContext): string {
  return scratch.folder(`sync-state/${states++}`)
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

async function* measureAtRest(context: SyncContext): AsyncGenerator<Row> {
  const { options, scratch, progress, missing } = context
  const entries = options.directories * 50
  const place = await openPlace(scratch, { fs: 'tmpfs', name: 'rest', sizeBytes: 0, inodes: 0 })
  try {
    progress(`rest: making ${count(options.directories)} directories`)
    const root = join(place.root, 'upper')
    mkdirSync(root)
    await writeDirectories(root, entries, scratch)
    const watcher = (choice: string): string[] => [
      process.execPath,
      join(import.meta.dirname, 'watcher.ts'),
      root,
      choice,
    ]
    const isReady = (line: string): boolean => line.startsWith('ready ')
    const daemons: { name: string; command: string[]; isReady: (line: string) => boolean }[] = [
      { name: 'fanotify', command: watcher('fanotify'), isReady },
      { name: 'chokidar', command: watcher('chokidar'), isReady },
    ]
    if (findProgram('lsyncd') === undefined) missing({ name: 'lsyncd', reason: 'lsyncd is not installed' })
    else daemons.push({ name: 'lsyncd', ...lsyncd(context, root, join(place.root, 'copy')) })
    const series: Series[] = []
    for (const { name, command, isReady } of daemons) {
      if (options.skip.some((word) => name.includes(word))) {
        missing({ name, reason: 'skipped as asked' })
        continue
      }
      const own: Series = { peer: name, x: 0, samples: [] }
      series.push(own)
      for (let round = 0; round < Math.min(options.runs, 3); round++) {
        progress(`round ${round + 1}: ${name}`)
        own.samples.push({ round, ...(await measureDaemon(context, command, isReady)) })
      }
    }
    const figure = (label: string, peer: string, unit: 'ms' | 'MB', goal?: Goal): Comparison => {
      const measured = spreadOf(find(series, peer), unit === 'ms' ? 'wallMs' : 'maxRssMiB')
      const base: Comparison = { label, unit, ...(goal === undefined ? {} : { goal }) }
      return measured === undefined ? { ...base, remark: `${peer} failed` } : { ...base, measured }
    }
    yield {
      id: 'rest',
      title: 'a watch at rest',
      setting: `${count(options.directories)} directories on tmpfs, looked at for ${options.restSeconds} s`,
      fs: 'tmpfs',
      series,
      comparisons: [
        figure('fanotify: ready after', 'fanotify', 'ms', goals.restReady),
        figure('fanotify: resident memory', 'fanotify', 'MB', goals.restMemory),
        ...series
          .filter(({ peer }) => peer !== 'fanotify')
          .flatMap(({ peer }) => [
            figure(`${peer}: ready after`, peer, 'ms'),
            figure(`${peer}: resident memory`, peer, 'MB'),
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
  return {
    command: ['lsyncd', '-nodaemon', config],
    isReady: (line: string) => line.includes('Startup of') && line.includes('finished'),
  }
}

async function measureDaemon(
  { scratch, options }: SyncContext,
  command: readonly string[],
  isReady: (line: string) => boolean,
) {
  const failure = (error: unknown) => ({
    wallMs: 0,
    syncMs: 0,
    userMs: 0,
    systemMs: 0,
    maxRssMiB: 0,
    exitCode: 1,
    complaint: error instanceof Error ? error.message : String(error),
  })
  try {
    const daemon = await startDaemon(scratch, command, isReady)
    try {
      return await measureRest(daemon, options.restSeconds)
    } finally {
      await daemon.stop()
    }
  } catch (error) {
    if (scratch.interruptedBy !== undefined) throw error
    return failure(error)
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
  const exponent = (peer: string, goal?: Goal): Comparison => {
    const points = series
      .filter((candidate) => candidate.peer === peer && succeeded(candidate).length > 0)
      .map((candidate) => ({ x: candidate.x, y: spreadOf(candidate, 'wallMs')?.median ?? 0 }))
    // Below, the time to start the program drowns the growth.
    const fitted = fitExponent(points.slice(-2))
    const measured = fitted === undefined ? undefined : summarize([fitted])
    return {
      label: `${peer}: exponent of growth over the last tenfold`,
      unit: '',
      ...(goal === undefined ? {} : { goal }),
      ...(measured === undefined ? { remark: 'too few points' } : { measured }),
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
      exponent('lsync', goals.linear),
      exponent('cp -a'),
      exponent('rsync -aHAX'),
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
