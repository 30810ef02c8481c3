import { appendFileSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { findProgram, runCommand, startCommand, versionOf } from './command.ts'
import { compare, compareGrowth, compareOthers, count, find } from './compare.ts'
import { compareFingerprints, takeFingerprint } from './fingerprint.ts'
import { type Cost, measureCommand } from './measure.ts'
import { moosefsPrograms } from './moosefs.ts'
import type { Context, Rows } from './question.ts'
import type { Comparison, Goal, Row, Series } from './report.ts'
import { type Fs, keepsWholeSeconds, openPlace, type Place } from './state.ts'
import { summarize } from './statistics.ts'
import { estimateTreeBytes, listFiles, type Workload, writeLower } from './workload.ts'

/** Everything that the rows of `bench snapshot` can be told. Sizes are counts of files. */
export type SnapshotOptions = {
  lsync: string
  runs: number
  files: number
  seed: number
  fs: Fs
  target?: string
  /** Files of the row moosefs. */
  moosefsFiles: number
  /** Sizes of the rows changes and curve. */
  curve: readonly number[]
  /** Files that change in the row changes. */
  changes: number
  check: boolean
  skip: readonly string[]
}

type SnapshotContext = Context<SnapshotOptions>

/** The rows of `bench snapshot` by id, in the order in which they run. */
export const snapshotRows: Rows<SnapshotOptions> = {
  versions: { question: 'what do a first snapshot, one of nothing new and a restore cost?', rows: measureVersions },
  moosefs: { question: 'what do they cost with a repository on MooseFS?', rows: measureMoosefs },
  changes: { question: 'what does a snapshot of some changes cost when a journal knows them?', rows: measureChanges },
  curve: { question: 'how does a first snapshot grow with the tree?', rows: measureCurve },
}

const goals = {
  first: { text: '≤ 0.2 ×', limit: 0.2, bound: 'most' },
  restore: { text: '≤ 0.35 ×', limit: 0.35, bound: 'most' },
  size: { text: '≤ 1.02 ×', limit: 1.02, bound: 'most' },
  changes: { text: '≤ 0.02 ×', limit: 0.02, bound: 'most' },
  linear: { text: '≤ 1 (linear)', limit: 1, bound: 'most' },
} as const satisfies Record<string, Goal>

/** One program that keeps versions. Passwords are no secrets here. */
type Keeper = {
  name: string
  program: string
  init: (repository: string) => readonly string[]
  create: (repository: string, tree: string) => readonly string[]
  restore: (repository: string, target: string) => readonly string[]
  /** Where a restore puts the tree. */
  restored: (target: string, tree: string) => string
  /** Fails when the repository is not whole. */
  check: (repository: string) => readonly string[]
}

function keepers({ options, scratch }: SnapshotContext): Keeper[] {
  const cache = scratch.folder('snapshot-cache')
  const environment = ['env', 'LSYNC_PASSWORD=bench', 'RESTIC_PASSWORD=bench', `RESTIC_CACHE_DIR=${cache}/restic`]
  const borgEnvironment = [
    'env',
    'BORG_PASSPHRASE=bench',
    `BORG_BASE_DIR=${cache}/borg`,
    'BORG_RELOCATED_REPO_ACCESS_IS_OK=yes',
  ]
  const lsync = (repository: string, command: string, ...args: string[]) => [
    ...[...environment, options.lsync, 'snapshot', command, '-r', repository],
    ...args,
  ]
  const casync = (repository: string, command: string) => ['casync', command, `--store=${repository}/store.castr`]
  const restic = (repository: string, ...args: string[]) => [...environment, 'restic', '-q', '-r', repository, ...args]
  return [
    {
      name: 'lsync',
      program: options.lsync,
      init: (repository) => lsync(repository, 'init'),
      create: (repository, tree) => lsync(repository, 'create', tree),
      restore: (repository, target) => lsync(repository, 'restore', 'latest', target),
      restored: (target) => target,
      check: (repository) => restic(repository, 'check', '--read-data'),
    },
    {
      name: 'restic',
      program: 'restic',
      init: (repository) => restic(repository, 'init'),
      create: (repository, tree) => restic(repository, 'backup', tree),
      restore: (repository, target) => restic(repository, 'restore', 'latest', '--target', target),
      restored: (target, tree) => join(target, tree),
      check: (repository) => restic(repository, 'check', '--read-data'),
    },
    {
      name: 'borg',
      program: 'borg',
      init: (repository) => [...borgEnvironment, 'borg', 'init', '-e', 'repokey', repository],
      create: (repository, tree) => [
        ...borgEnvironment,
        'borg',
        'create',
        '-C',
        'zstd,3',
        `${repository}::{now:%s.%f}`,
        tree,
      ],
      restore: (repository, target) => [
        ...['sh', '-c', 'mkdir -p "$2" && cd "$2" && shift 2 && "$@" extract "$0::$("$@" list --short --last 1 "$0")"'],
        ...[repository, 'x', target, ...borgEnvironment, 'borg'],
      ],
      restored: (target, tree) => join(target, tree),
      check: (repository) => [...borgEnvironment, 'borg', 'check', '--verify-data', repository],
    },
    {
      name: 'casync',
      program: 'casync',
      init: (repository) => ['mkdir', repository],
      create: (repository, tree) => [
        ...casync(repository, 'make'),
        '--compression=zstd',
        `${repository}/tree.caidx`,
        tree,
      ],
      restore: (repository, target) => [...casync(repository, 'extract'), `${repository}/tree.caidx`, target],
      restored: (target) => target,
      // Reads every chunk.
      check: (repository) => [...casync(repository, 'digest'), `${repository}/tree.caidx`],
    },
  ]
}

/** Whether rows need a network of their own: MooseFS does. */
export function snapshotNeedsNetwork(rows: readonly string[]): boolean {
  return rows.includes('moosefs')
}

/** Versions of the programs that run here, for the record. */
export function keeperVersions(lsync: string): Record<string, string> {
  const versions: Record<string, string> = {}
  for (const [name, program, args] of [
    ['lsync', lsync, ['--version']],
    ['restic', 'restic', ['version']],
    ['borg', 'borg', ['--version']],
    ['casync', 'casync', ['--version']],
  ] as const) {
    if (name !== 'lsync' && findProgram(program) === undefined) continue
    const version = versionOf(program, args)
    if (version !== undefined) versions[name] = version
  }
  return versions
}

function chosenKeepers(context: SnapshotContext, names?: readonly string[]): Keeper[] {
  return keepers(context).filter(({ name, program }) => {
    if (names !== undefined && !names.includes(name)) return false
    const isSkipped = context.options.skip.some((word) => name.includes(word))
    const reason = isSkipped
      ? 'skipped as asked'
      : name !== 'lsync' && findProgram(program) === undefined
        ? `${program} is not installed`
        : undefined
    if (reason !== undefined) context.missing({ name, reason })
    return reason === undefined
  })
}

const mostFullFiles = 200_000
const changesProgram = join(import.meta.dirname, 'snapshot-changes.ts')

function workloadOf({ seed }: SnapshotOptions, files: number, mostFiles = files): Workload {
  return { files, changes: 0, seed, content: mostFiles > mostFullFiles ? 'empty' : 'full', overlayOptions: [] }
}

function openFor(
  { scratch, options }: SnapshotContext,
  name: string,
  { files, content }: Workload,
  fs = options.fs,
): Promise<Place> {
  return openPlace(scratch, {
    fs,
    ...(options.target === undefined ? {} : { target: options.target }),
    name,
    // A repository and a restored tree, or one tree.
    sizeBytes: 2.2 * estimateTreeBytes(files, content) + 2 ** 29,
    inodes: Math.ceil(files * 1.1) + 20_000,
  })
}

async function makeTree(
  context: SnapshotContext,
  workload: Workload,
  name: string,
): Promise<{ path: string; close: () => void }> {
  context.progress(`${name}: making ${count(workload.files)} files`)
  const place = await openFor(context, `${name}-tree`, workload)
  const path = join(place.root, 'tree')
  mkdirSync(path)
  await writeLower(path, workload, context.scratch)
  await startCommand(['sync', '-f', path])
  return { path, close: place.close }
}

/** What one life of a repository cost: from the first snapshot to the tree that came back. */
type Life = { first: Cost; again?: Cost; restore?: Cost; sizeBytes: number; difference?: Series['difference'] }

async function live(
  context: SnapshotContext,
  request: {
    keeper: Keeper
    tree: string
    workload: Workload
    name: string
    fs?: Fs
    isWhole: boolean
    isChecked: boolean
  },
): Promise<Life> {
  const { scratch, programs, progress } = context
  const { keeper, tree, workload, name } = request
  const place = await openFor(context, name, workload, request.fs)
  try {
    const repository = join(place.root, 'repository')
    const target = join(place.root, 'restored')
    const timed = async (command: readonly string[], what: string): Promise<Cost> => {
      await scratch.checkInterrupted()
      progress(`${name}: ${what}`)
      await startCommand(['/bin/sh', '-c', 'find "$1" -printf %s >/dev/null', 'sh', tree])
      await startCommand(['sync', '-f', place.root])
      return measureCommand({
        command,
        cwd: scratch.folder('measure/cwd'),
        folder: scratch.folder('measure'),
        measureProgram: programs.measure,
        syncDirectory: place.root,
      })
    }
    runCommand(keeper.init(repository))
    const first = await timed(keeper.create(repository, tree), 'first snapshot')
    const sizeBytes = sizeOf(repository)
    if (!request.isWhole) return { first, sizeBytes }
    const again = await timed(keeper.create(repository, tree), 'nothing new')
    const restore = await timed(keeper.restore(repository, target), 'restore')
    if (!request.isChecked) return { first, again, restore, sizeBytes }
    progress(`${name}: checking`)
    runCommand(keeper.check(repository))
    const wholeSeconds = keepsWholeSeconds(place.root)
    const read = (path: string) => takeFingerprint(programs.fingerprint, path, { wholeSeconds })
    const difference = compareFingerprints(await read(tree), await read(keeper.restored(target, tree)))
    return { first, again, restore, sizeBytes, difference }
  } finally {
    rmSync(scratch.folder('snapshot-cache'), { recursive: true, force: true })
    place.close()
  }
}

/** Bytes of all files beneath a directory. */
function sizeOf(directory: string): number {
  return readdirSync(directory, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .reduce((sum, entry) => sum + statSync(join(entry.parentPath, entry.name)).size, 0)
}

async function* measureVersions(context: SnapshotContext): AsyncGenerator<Row> {
  const { options } = context
  const setting = `${count(options.files)} small files on ${placeName(options)}, to a repository on another one`
  yield* measureLives(context, { files: options.files, fs: options.fs, setting, hasGoals: true })
}

async function* measureMoosefs(context: SnapshotContext): AsyncGenerator<Row> {
  const { options } = context
  const absent = moosefsPrograms.filter((program) => findProgram(program) === undefined)
  if (absent.length > 0) return context.missing({ name: 'row moosefs', reason: `${absent.join(', ')} not installed` })
  const setting = `${count(options.moosefsFiles)} small files on ${placeName(options)}; the repository, and what is restored, on MooseFS`
  yield* measureLives(context, { files: options.moosefsFiles, fs: 'moosefs', setting, hasGoals: false })
}

/** `fs`: where repositories and restored trees lie. */
async function* measureLives(
  context: SnapshotContext,
  request: { files: number; fs: Fs; setting: string; hasGoals: boolean },
): AsyncGenerator<Row> {
  const { options } = context
  const { files, fs, setting, hasGoals } = request
  const workload = workloadOf(options, files)
  const tree = await makeTree(context, workload, 'versions')
  try {
    const chosen = chosenKeepers(context)
    const series = chosen.map(({ name }) => ({
      first: { peer: name, x: 0, samples: [] } as Series,
      again: { peer: name, x: 0, samples: [] } as Series,
      restore: { peer: name, x: 0, samples: [] } as Series,
      sizes: [] as number[],
    }))
    for (let round = 0; round < options.runs; round++) {
      for (let index = 0; index < chosen.length; index++) {
        const at = (index + round) % chosen.length
        const [keeper, own] = [chosen[at], series[at]]
        if (keeper === undefined || own === undefined) continue
        const isChecked = options.check && round === 0
        const name = `round ${round + 1} ${keeper.name}`
        const life = await live(context, { keeper, tree: tree.path, workload, name, fs, isWhole: true, isChecked })
        own.first.samples.push({ round, ...life.first })
        if (life.again !== undefined) own.again.samples.push({ round, ...life.again })
        if (life.restore !== undefined) own.restore.samples.push({ round, ...life.restore })
        if (life.difference !== undefined) own.restore.difference = life.difference
        own.sizes.push(life.sizeBytes)
      }
    }
    const row = (id: 'first' | 'again' | 'restore', title: string, goal?: Goal): Row => {
      const all = series.map((own) => own[id])
      const main = compare('lsync ÷ restic', find(all, 'lsync'), find(all, 'restic'), ['lsync', 'restic'], goal)
      return {
        id,
        title,
        setting,
        fs,
        series: all,
        checkedAgainst: 'the source',
        comparisons: [
          main,
          durableComparison(all),
          ...(id === 'first' ? [sizeComparison(series)] : []),
          ...compareOthers(all, ['restic']),
        ],
        notes: contentNotes,
      }
    }
    yield row('first', 'first snapshot', hasGoals ? goals.first : undefined)
    yield row('again', 'a snapshot of nothing new')
    yield row('restore', 'restore into a new directory', hasGoals ? goals.restore : undefined)
  } finally {
    tree.close()
  }
}

const contentNotes = [
  'the content of the files is random: nothing in it can be compressed',
  'keys are derived anew by each command; casync has none, encrypts nothing and waits for no disk',
]

function placeName({ fs, target }: SnapshotOptions): string {
  return fs === 'target' ? `${target}` : fs === 'tmpfs' ? 'tmpfs' : `${fs} in memory`
}

/** With the time until everything is on disk: lsync waits for that before it ends, and restic does not for all of it. */
function durableComparison(all: readonly Series[]): Comparison {
  const whole = (peer: string) => {
    const series = find(all, peer)
    return series === undefined
      ? undefined
      : { ...series, samples: series.samples.map((sample) => ({ ...sample, wallMs: sample.wallMs + sample.syncMs })) }
  }
  return compare('until durable: lsync ÷ restic', whole('lsync'), whole('restic'), ['lsync', 'restic'])
}

function sizeComparison(series: readonly { first: Series; sizes: readonly number[] }[]): Comparison {
  const sizes = (peer: string) => series.find(({ first }) => first.peer === peer)?.sizes ?? []
  const ratios = sizes('lsync').flatMap((size, round) => {
    const other = sizes('restic')[round]
    return other === undefined ? [] : [size / other]
  })
  const measured = summarize(ratios)
  return {
    label: 'size: lsync ÷ restic',
    unit: '×',
    goal: goals.size,
    ...(measured === undefined ? { remark: 'no common round' } : { measured }),
  }
}

/** Snapshots after some files were written to: by walking the tree, and from the list of what changed. */
async function* measureChanges(context: SnapshotContext): AsyncGenerator<Row> {
  const { options, scratch, programs, progress } = context
  const most = Math.max(...options.curve)
  const series: Series[] = []
  for (const files of options.curve) {
    const workload = workloadOf(options, files, most)
    const tree = await makeTree(context, workload, `changes-${files}`)
    const names = listFiles(workload)
    const changed = Math.min(options.changes, files)
    try {
      for (const keeper of chosenKeepers(context, ['lsync', 'restic'])) {
        const own: Series = { peer: keeper.name, x: files, samples: [] }
        series.push(own)
        const name = `changes ${count(files)} ${keeper.name}`
        const place = await openFor(context, `changes-${files}-${keeper.name}`, workload)
        try {
          const repository = join(place.root, 'repository')
          runCommand(keeper.init(repository))
          progress(`${name}: first snapshot`)
          await startCommand(keeper.create(repository, tree.path))
          for (let round = 0; round < Math.min(options.runs, 3); round++) {
            await scratch.checkInterrupted()
            progress(`${name}: round ${round + 1}`)
            const paths = Array.from(
              { length: changed },
              (_, i) => names[(Math.floor((i * files) / changed) + round) % files] as string,
            )
            for (const path of paths) appendFileSync(join(tree.path, path), `${keeper.name} ${round} ${path}\n`)
            const list = join(scratch.folder('measure'), 'changes')
            writeFileSync(list, paths.join('\n'))
            await startCommand(['/bin/sh', '-c', 'find "$1" -printf %s >/dev/null', 'sh', tree.path])
            await startCommand(['sync', '-f', tree.path])
            const result = join(scratch.folder('measure'), 'elapsed')
            const isOurs = keeper.name === 'lsync'
            const command = isOurs
              ? ['env', 'LSYNC_PASSWORD=bench', process.execPath, changesProgram, repository, tree.path, list, result]
              : keeper.create(repository, tree.path)
            const cost = await measureCommand({
              command,
              cwd: scratch.folder('measure/cwd'),
              folder: scratch.folder('measure'),
              measureProgram: programs.measure,
              syncDirectory: place.root,
            })
            const isTimed = isOurs && cost.exitCode === 0
            own.samples.push({ round, ...cost, ...(isTimed ? { wallMs: Number(readFileSync(result, 'utf8')) } : {}) })
          }
        } finally {
          rmSync(scratch.folder('snapshot-cache'), { recursive: true, force: true })
          place.close()
        }
      }
    } finally {
      tree.close()
    }
  }
  const at = (peer: string) => find(series, peer, most)
  yield {
    id: 'changes',
    title: `a snapshot of ${options.changes} changed files, by the size of the tree`,
    setting: `up to ${count(most)} ${workloadOf(options, most).content === 'full' ? 'small' : 'empty'} files on ${placeName(options)}`,
    fs: options.fs,
    variable: 'files',
    series,
    comparisons: [
      compare(`${count(most)} files: lsync ÷ restic`, at('lsync'), at('restic'), ['lsync', 'restic'], goals.changes),
    ],
    notes: [
      'lsync is told what changed, as its journal would; timed is what its daemon does: indexes are read, no key is derived',
      'restic walks the tree, and is timed as a command',
    ],
  }
}

async function* measureCurve(context: SnapshotContext): AsyncGenerator<Row> {
  const { options } = context
  const most = Math.max(...options.curve)
  const series: Series[] = []
  for (const files of options.curve) {
    const workload = workloadOf(options, files, most)
    const tree = await makeTree(context, workload, `curve-${files}`)
    try {
      for (const keeper of chosenKeepers(context, ['lsync', 'restic'])) {
        const own: Series = { peer: keeper.name, x: files, samples: [] }
        for (let round = 0; round < Math.min(options.runs, 3); round++) {
          const name = `curve ${count(files)} round ${round + 1} ${keeper.name}`
          const { first } = await live(context, {
            keeper,
            tree: tree.path,
            workload,
            name,
            isWhole: false,
            isChecked: false,
          })
          own.samples.push({ round, ...first })
        }
        series.push(own)
      }
    } finally {
      tree.close()
    }
  }
  yield {
    id: 'curve',
    title: 'first snapshot, by size',
    setting: `${count(most)} ${workloadOf(options, most).content === 'full' ? 'small' : 'empty'} files and fewer on ${placeName(options)}`,
    fs: options.fs,
    variable: 'files',
    series,
    comparisons: [compareGrowth(series, 'lsync', goals.linear), compareGrowth(series, 'restic')],
    notes: [],
  }
}
