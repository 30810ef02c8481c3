import { mkdirSync, statSync, writeFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { isolation, runIsolated } from './isolate.ts'
import { describeMachine } from './machine.ts'
import { type MergeOptions, mergeRows } from './merge.ts'
import { type MissingPeer, peerVersions } from './peers.ts'
import { drawRow } from './plot.ts'
import { compilePrograms } from './program.ts'
import type { Context, Rows } from './question.ts'
import { formatHead, formatJson, formatRow, formatSummary, type Report, type Row } from './report.ts'
import { type RootOptions, rootNeedsNetwork, rootRows } from './root.ts'
import { Scratch } from './scratch.ts'
import { keeperVersions, type SnapshotOptions, snapshotNeedsNetwork, snapshotRows } from './snapshot.ts'
import type { Fs } from './state.ts'
import { syncNeedsNetwork, syncRows } from './sync.ts'
import { carrierVersions } from './sync-peers.ts'
import type { SyncOptions } from './sync-trees.ts'

const help = `Measures lsync against other ways to do the same job, side by side in one run.

  pnpm bench merge --quick                      every row at a small size, in half a minute
  pnpm bench merge --target /srv/data --only in-place    on your own file system
  pnpm bench root --only switch                 a container goes to another node
  pnpm bench sync --only local,ssh              a first sync beside rsync, cp, tar and unison

Usage: bench QUESTION [options]      bench list      bench --help

What is run
  --only ROW[,ROW]       only these rows (see bench list)
  --fs FS[,FS]           ext4, xfs, btrfs: images of its own in memory; tmpfs; moosefs: a server of its own
                         (default: ext4, and btrfs, moosefs, xfs for the row growth; sync takes one)
  --target DIR           in a folder of this directory instead, which is removed afterwards
  --files N              files of the lower (50,000), or of what is synced (100,000)
  --changes N            changes made to them through a kernel overlay mount (10,000), or to a followed tree (100)
  --overlay OPTION[,…]   options of that mount, such as redirect_dir=on,metacopy=on
  --seed N               another seed makes another workload (1)
  --content full|empty   whether the files of the lower hold bytes (full up to 200,000 files)
  --runs N               runs of each command, in turns (5)
  --cache warm|cold      walk the trees before each run, or start from a fresh mount (warm)
  --growth N,N,…         files below in the row growth (10000,100000,1000000)
  --growth-changes N     changes in the row growth (1,000)
  --curve N,N,…          files below in the row curve (1000,10000,100000,1000000)
  --entries N            entries in the row memory (1,000,000)
  --moosefs-files N      files of the row moosefs of sync and snapshot (3,000)
  --followed N,N,…       files in the rows changes and restart (1000,10000,100000; 1000000 takes some minutes)
  --rate N, --seconds N  new files a second in the row latency (1,000), and for how long (20)
  --directories N        directories of the row rest (100,000)
  --changed N,N,…        changed files in the row changed (10,100,1000,3000)
  --sizes N,N,…          files of the root in the row size (1000,10000,30000)
  --rest-seconds N       how long that row looks at each program (10)
  --quick                small sizes and three runs, in half a minute

Against what
  --lsync PATH           the lsync to measure (node_modules/.bin/lsync)
  --peer NAME=PATH       another program that merges in place, called as PATH UPPER LOWER;
                         overlayfs-tools=PATH is called as PATH merge -f -l LOWER -u UPPER
  --skip WORD[,WORD]     leave out the commands with such a word in their name, such as rsync,cp
  --check                compare each result to the kernel's view, and say what differs

What comes out
  --json FILE            machine, options, every sample, medians and ratios
  --svg DIR              one plot for each row
  --scratch DIR          where images and mount points lie (/dev/shm)

It prints figures next to their goals and asserts nothing: the exit code is 0 whether they are met or not.
Every mount lives in a namespace of its own and ends with the run. Without root, --target and tmpfs still work,
with overlay mounts in a user namespace.
`

const options = {
  only: { type: 'string' },
  fs: { type: 'string' },
  target: { type: 'string' },
  files: { type: 'string' },
  changes: { type: 'string' },
  overlay: { type: 'string' },
  seed: { type: 'string' },
  content: { type: 'string' },
  runs: { type: 'string' },
  cache: { type: 'string' },
  growth: { type: 'string' },
  'growth-changes': { type: 'string' },
  curve: { type: 'string' },
  entries: { type: 'string' },
  'moosefs-files': { type: 'string' },
  followed: { type: 'string' },
  rate: { type: 'string' },
  seconds: { type: 'string' },
  directories: { type: 'string' },
  'rest-seconds': { type: 'string' },
  changed: { type: 'string' },
  sizes: { type: 'string' },
  quick: { type: 'boolean' },
  lsync: { type: 'string' },
  peer: { type: 'string', multiple: true },
  skip: { type: 'string' },
  check: { type: 'boolean' },
  json: { type: 'string' },
  svg: { type: 'string' },
  scratch: { type: 'string' },
  help: { type: 'boolean', short: 'h' },
} as const

/** The command line cannot be understood. */
class UsageError extends Error {}

type Values = ReturnType<typeof parse>['values']

function parse() {
  try {
    // pnpm passes the -- of `pnpm bench -- merge` on.
    const args = process.argv.slice(2).filter((word, index) => index > 0 || word !== '--')
    return parseArgs({ args, options, allowPositionals: true })
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message : String(error))
  }
}

function readCount(values: Values, name: keyof typeof options, otherwise: number): number {
  const text = values[name]
  if (text === undefined) return otherwise
  const number = Number(String(text).replaceAll('_', ''))
  if (!Number.isInteger(number) || number < 0) throw new UsageError(`--${name} needs a whole number, not ${text}`)
  return number
}

function readCounts(
  values: Values,
  name: 'growth' | 'curve' | 'followed' | 'changed' | 'sizes',
  otherwise: readonly number[],
): number[] {
  const text = values[name]
  if (text === undefined) return [...otherwise]
  const numbers = text.split(',').map(Number)
  if (numbers.some((number) => !Number.isInteger(number) || number < 1))
    throw new UsageError(`--${name} needs whole numbers with commas, not ${text}`)
  return numbers.sort((left, right) => left - right)
}

function readChoice<const Choice extends string>(
  values: Values,
  name: 'content' | 'cache',
  choices: readonly Choice[],
  otherwise: Choice,
): Choice {
  const text = values[name]
  if (text === undefined) return otherwise
  const choice = choices.find((candidate) => candidate === text)
  if (choice === undefined) throw new UsageError(`--${name} is one of ${choices.join(', ')}, not ${text}`)
  return choice
}

function readFs(values: Values): readonly Fs[] {
  if (values.target !== undefined) {
    if (values.fs !== undefined) throw new UsageError('--target and --fs exclude each other')
    if (!statSync(values.target, { throwIfNoEntry: false })?.isDirectory())
      throw new UsageError(`--target ${values.target} is not a directory`)
    return ['target']
  }
  const known = ['ext4', 'xfs', 'btrfs', 'tmpfs', 'moosefs'] as const
  return (values.fs ?? 'ext4').split(',').map((name) => {
    const fs = known.find((candidate) => candidate === name)
    if (fs === undefined) throw new UsageError(`--fs is of ${known.join(', ')}, not ${name}`)
    return fs
  })
}

function readLsync(values: Values): string {
  return resolve(values.lsync ?? join(import.meta.dirname, '..', 'node_modules', '.bin', 'lsync'))
}

const readWords = (text: string | undefined): string[] => (text ?? '').split(',').filter((word) => word !== '')

function readSyncOptions(values: Values): SyncOptions {
  const quick = values.quick === true
  const [fs = 'ext4', ...more] = readFs(values)
  if (more.length > 0 || fs === 'moosefs') throw new UsageError('sync takes one file system of ext4, xfs, btrfs, tmpfs')
  return {
    lsync: readLsync(values),
    runs: Math.max(1, readCount(values, 'runs', 3)),
    files: readCount(values, 'files', quick ? 2000 : 100_000),
    moosefsFiles: readCount(values, 'moosefs-files', quick ? 100 : 3000),
    seed: readCount(values, 'seed', 1),
    fs,
    ...(values.target === undefined ? {} : { target: resolve(values.target) }),
    followed: readCounts(values, 'followed', quick ? [300, 3000] : [1000, 10_000, 100_000]),
    changes: readCount(values, 'changes', quick ? 20 : 100),
    rate: readCount(values, 'rate', 1000),
    seconds: readCount(values, 'seconds', quick ? 3 : 20),
    directories: readCount(values, 'directories', quick ? 2000 : 100_000),
    restSeconds: readCount(values, 'rest-seconds', quick ? 1 : 10),
    settleSeconds: quick ? 2 : 10,
    curve: readCounts(values, 'curve', quick ? [300, 3000] : [1000, 10_000, 100_000, 1_000_000]),
    check: values.check === true,
    skip: readWords(values.skip),
  }
}

function readSnapshotOptions(values: Values): SnapshotOptions {
  const quick = values.quick === true
  const [fs = 'ext4', ...more] = readFs(values)
  if (more.length > 0 || fs === 'moosefs')
    throw new UsageError('snapshot takes one file system of ext4, xfs, btrfs, tmpfs')
  return {
    lsync: readLsync(values),
    runs: Math.max(1, readCount(values, 'runs', quick ? 1 : 3)),
    files: readCount(values, 'files', quick ? 2000 : 50_000),
    seed: readCount(values, 'seed', 1),
    fs,
    ...(values.target === undefined ? {} : { target: resolve(values.target) }),
    curve: readCounts(values, 'curve', quick ? [300, 3000] : [1000, 10_000, 100_000, 1_000_000]),
    changes: readCount(values, 'changes', quick ? 20 : 100),
    moosefsFiles: readCount(values, 'moosefs-files', quick ? 100 : 3000),
    check: values.check === true,
    skip: readWords(values.skip),
  }
}

function readRootOptions(values: Values): RootOptions {
  const quick = values.quick === true
  const [fs = 'ext4', ...more] = readFs(values)
  if (more.length > 0 || fs === 'moosefs') throw new UsageError('root takes one file system of ext4, xfs, btrfs, tmpfs')
  return {
    lsync: readLsync(values),
    runs: Math.max(1, readCount(values, 'runs', quick ? 1 : 3)),
    seed: readCount(values, 'seed', 1),
    fs,
    ...(values.target === undefined ? {} : { target: resolve(values.target) }),
    curve: readCounts(values, 'curve', quick ? [300, 3000] : [1000, 10_000, 100_000, 1_000_000]),
    dirty: 100,
    files: readCount(values, 'files', quick ? 200 : 10_000),
    changes: readCount(values, 'changes', quick ? 50 : 1000),
    changed: readCounts(values, 'changed', quick ? [10, 50] : [10, 100, 1000, 3000]),
    sizes: readCounts(values, 'sizes', quick ? [100, 300] : [1000, 10_000, 30_000]),
    skip: readWords(values.skip),
  }
}

function readMergeOptions(values: Values): MergeOptions {
  const quick = values.quick === true
  const overlayOptions = readWords(values.overlay)
  // In a user namespace, the kernel keeps its marks in user.overlay.*.
  if (isolation()?.privileged === false && !overlayOptions.includes('userxattr')) overlayOptions.push('userxattr')
  return {
    lsync: readLsync(values),
    given: (values.peer ?? []).map((text) => {
      const [name = '', ...path] = text.split('=')
      if (name === '' || path.length === 0) throw new UsageError(`--peer needs NAME=PATH, not ${text}`)
      return { name, path: resolve(path.join('=')) }
    }),
    runs: Math.max(1, readCount(values, 'runs', quick ? 3 : 5)),
    files: readCount(values, 'files', quick ? 2000 : 50_000),
    changes: readCount(values, 'changes', quick ? 400 : 10_000),
    seed: readCount(values, 'seed', 1),
    fs: readFs(values),
    // A server of its own takes longer to start and fill than all other rows of a quick run together.
    growthFs: quick ? ['btrfs', 'xfs'] : ['btrfs', 'moosefs', 'xfs'],
    fsWasChosen: values.fs !== undefined || values.target !== undefined,
    ...(values.target === undefined ? {} : { target: resolve(values.target) }),
    overlayOptions,
    growth: readCounts(values, 'growth', quick ? [200, 2000] : [10_000, 100_000, 1_000_000]),
    growthChanges: readCount(values, 'growth-changes', quick ? 50 : 1000),
    curve: readCounts(values, 'curve', quick ? [300, 3000] : [1000, 10_000, 100_000, 1_000_000]),
    memoryEntries: readCount(values, 'entries', quick ? 20_000 : 1_000_000),
    content: readChoice(values, 'content', ['full', 'empty', 'auto'], 'auto'),
    cache: readChoice(values, 'cache', ['warm', 'cold'], 'warm'),
    skip: readWords(values.skip),
    check: values.check === true,
  }
}

/** One question with the options that were given: everything that does not depend on which one it is. */
type Asked = {
  name: string
  options: Record<string, unknown>
  /** Each row that is to be measured, ready to run. */
  rows: { id: string; run: (surroundings: Surroundings) => AsyncGenerator<Row> }[]
  needsNetwork: boolean
  versions: Record<string, string>
  /** What was left out before anything began. */
  leftOut: MissingPeer[]
}

type Surroundings = Omit<Context<unknown>, 'options'>

function chooseRows<Options>(values: Values, rows: Rows<Options>, options: Options): Asked['rows'] {
  const known = Object.keys(rows)
  const chosen = values.only?.split(',') ?? known
  const unknown = chosen.find((row) => !known.includes(row))
  if (unknown !== undefined) throw new UsageError(`no row ${unknown}; there are ${known.join(', ')}`)
  return Object.entries(rows)
    .filter(([id]) => chosen.includes(id))
    .map(([id, { rows: measureRows }]) => ({ id, run: (surroundings) => measureRows({ ...surroundings, options }) }))
}

const questions: Record<string, { rows: Rows<never>; ask: (values: Values) => Asked }> = {
  merge: {
    rows: mergeRows,
    ask(values) {
      const options = readMergeOptions(values)
      const rows = chooseRows(values, mergeRows, options)
      const hasGrowth = rows.some(({ id }) => id === 'growth')
      const growsOnMoosefs = !options.fsWasChosen && hasGrowth && options.growthFs.includes('moosefs')
      const reason = 'not with --quick, unless --fs names it'
      return {
        name: 'merge',
        options,
        rows,
        needsNetwork: options.fs.includes('moosefs') || growsOnMoosefs,
        versions: peerVersions(options),
        leftOut:
          values.quick === true && !options.fsWasChosen && hasGrowth ? [{ name: 'row growth on moosefs', reason }] : [],
      }
    },
  },
  sync: {
    rows: syncRows,
    ask(values) {
      const options = readSyncOptions(values)
      const rows = chooseRows(values, syncRows, options)
      return {
        name: 'sync',
        options,
        rows,
        needsNetwork: syncNeedsNetwork(rows.map(({ id }) => id)),
        versions: carrierVersions(options.lsync),
        leftOut: [],
      }
    },
  },
  root: {
    rows: rootRows,
    ask(values) {
      const options = readRootOptions(values)
      if (isolation()?.privileged === false) throw new UsageError('root mounts roots for real, and needs to be root')
      const rows = chooseRows(values, rootRows, options)
      return {
        name: 'root',
        options,
        rows,
        needsNetwork: rootNeedsNetwork(rows.map(({ id }) => id)),
        versions: carrierVersions(options.lsync),
        leftOut: [],
      }
    },
  },
  snapshot: {
    rows: snapshotRows,
    ask(values) {
      const options = readSnapshotOptions(values)
      const rows = chooseRows(values, snapshotRows, options)
      const versions = keeperVersions(options.lsync)
      const needsNetwork = snapshotNeedsNetwork(rows.map(({ id }) => id))
      return { name: 'snapshot', options, rows, needsNetwork, versions, leftOut: [] }
    },
  },
}

function printList(): void {
  for (const [name, { rows }] of Object.entries(questions)) {
    process.stdout.write(`${name}\n`)
    for (const [row, { question }] of Object.entries(rows)) process.stdout.write(`  ${row.padEnd(10)} ${question}\n`)
  }
}

async function main(): Promise<number> {
  const { values, positionals } = parse()
  const [question, ...surplus] = positionals
  if (values.help === true || question === 'help') {
    process.stdout.write(help)
    return 0
  }
  if (question === 'list') {
    printList()
    return 0
  }
  if (question === undefined) {
    process.stderr.write(help)
    return 2
  }
  const chosen = questions[question]
  if (chosen === undefined || surplus.length > 0)
    throw new UsageError(`no question ${positionals.join(' ')}; bench list names them`)
  const asked = chosen.ask(values)
  if (isolation() === undefined) return await runIsolated({ network: asked.needsNetwork })
  return await measure(values, asked)
}

async function measure(values: Values, asked: Asked): Promise<number> {
  const scratch = new Scratch(resolve(values.scratch ?? '/dev/shm'))
  const startedAt = new Date()
  const report: Report = {
    tool: 'lsync bench',
    formatVersion: 1,
    question: asked.name,
    startedAt: startedAt.toISOString(),
    elapsedMs: 0,
    machine: describeMachine(),
    options: { ...asked.options, rows: asked.rows.map(({ id }) => id) },
    versions: asked.versions,
    missing: [],
    rows: [],
  }
  const onTerminal = process.stderr.isTTY === true
  const progress = (text: string): void => {
    process.stderr.write(onTerminal ? `\r\x1b[K${text}` : `${text}\n`)
  }
  const clearProgress = (): void => {
    if (onTerminal) process.stderr.write('\r\x1b[K')
  }
  try {
    const programs = compilePrograms(scratch)
    process.stdout.write(`${formatHead(report)}\n`)
    const missing = (absent: { name: string; reason: string }): void => {
      if (report.missing.some(({ name }) => name === absent.name)) return
      report.missing.push(absent)
      clearProgress()
      process.stdout.write(`without ${absent.name}: ${absent.reason}\n`)
    }
    for (const absent of asked.leftOut) missing(absent)
    for (const { id, run } of asked.rows) {
      try {
        for await (const row of run({ scratch, programs, progress, missing })) {
          clearProgress()
          report.rows.push(row)
          process.stdout.write(`\n${formatRow(row)}`)
        }
      } catch (error) {
        if (scratch.interruptedBy !== undefined) throw error
        // One row that cannot be measured takes no others with it.
        missing({ name: `row ${id}`, reason: error instanceof Error ? error.message : String(error) })
      }
    }
    process.stdout.write(`\n${formatSummary(report.rows)}`)
    report.elapsedMs = Date.now() - startedAt.getTime()
    writeResults(values, report)
    return 0
  } catch (error) {
    if (scratch.interruptedBy === undefined) throw error
    clearProgress()
    process.stderr.write('bench: interrupted\n')
    return 130
  } finally {
    scratch.cleanup()
  }
}

function writeResults(values: Values, report: Report): void {
  if (values.json !== undefined) writeFileSync(values.json, formatJson(report))
  if (values.svg === undefined) return
  mkdirSync(values.svg, { recursive: true })
  for (const row of report.rows) {
    const path = join(values.svg, `${report.question}-${row.id}-${row.fs}.svg`)
    const picture = drawRow(row)
    if (picture === undefined) continue
    writeFileSync(path, picture)
    process.stderr.write(`wrote ${path}\n`)
  }
}

try {
  process.exitCode = await main()
} catch (error) {
  if (!(error instanceof UsageError)) throw error
  process.stderr.write(`bench: ${error.message}\n`)
  process.exitCode = 2
}
