import { existsSync } from 'node:fs'
import { findProgram, startCommand } from './command.ts'
import { compare, compareGrowth, compareOthers, count, find } from './compare.ts'
import { compareFingerprints, type Fingerprint, takeFingerprint } from './fingerprint.ts'
import { type ImageFs, makers } from './image.ts'
import { measureCommand } from './measure.ts'
import { moosefsPrograms } from './moosefs.ts'
import { cloneCommand, inPlacePeers, outputPeers, type Peer, type PeerRequest } from './peers.ts'
import type { Context, Rows } from './question.ts'
import { type Comparison, type Goal, type Row, type Series, spreadOf } from './report.ts'
import {
  type Fs,
  keepsWholeSeconds,
  mountView,
  openPlace,
  prepareKeptLower,
  prepareStates,
  type State,
  type States,
} from './state.ts'
import { estimateTreeBytes, makeEntries, type Workload, writeDirectories } from './workload.ts'

/** Everything that the rows of `bench merge` can be told. Sizes are counts of files. */
export type MergeOptions = {
  lsync: string
  given: readonly { name: string; path: string }[]
  runs: number
  files: number
  changes: number
  seed: number
  /** File systems of the rows in place and output; the row growth has its own unless these were chosen by the user. */
  fs: readonly Fs[]
  fsWasChosen: boolean
  growthFs: readonly Fs[]
  target?: string
  overlayOptions: readonly string[]
  /** Sizes of the lower in the row growth. */
  growth: readonly number[]
  /** Changes in the row growth, the same at each size. */
  growthChanges: number
  /** Sizes of the lower in the row curve; a fifth of the files is changed. */
  curve: readonly number[]
  memoryEntries: number
  content: 'auto' | Workload['content']
  /** Whether the trees are walked before each run, so that their inodes are in memory as they are under a live mount. */
  cache: 'warm' | 'cold'
  check: boolean
  /** Peers that are left out: each whose name holds one of these words. */
  skip: readonly string[]
}

type MergeContext = Context<MergeOptions>

/** The rows of `bench merge` by id, in the order in which they run. */
export const mergeRows: Rows<MergeOptions> = {
  'start-up': { question: 'what does it cost to start lsync?', rows: measureStartUp },
  'in-place': { question: 'what does folding an upper into its lower cost, with real changes?', rows: measureInPlace },
  output: { question: 'what does a new tree cost, made of hard links to the lower?', rows: measureOutput },
  growth: { question: 'does a new tree cost what the changes cost, whatever lies below?', rows: measureGrowth },
  curve: { question: 'how does the cost in place grow with the tree?', rows: measureCurve },
  memory: { question: 'how much memory does a merge take at a million entries?', rows: measureMemory },
}

const goals = {
  floor: { text: '≤ 1.5 ×', limit: 1.5, bound: 'most' },
  overlayfsTools: { text: '≥ 60 ×', limit: 60, bound: 'least' },
  output: { text: '≤ 1.2 ×', limit: 1.2, bound: 'most' },
  growth: { text: '≤ 1.1 ×', limit: 1.1, bound: 'most' },
  memory: { text: '≤ 150 MB', limit: 150, bound: 'most' },
  linear: { text: '≤ 1 (linear)', limit: 1, bound: 'most' },
  version: { text: '≤ 80 ms', limit: 80, bound: 'most' },
  emptyMerge: { text: '≤ 150 ms', limit: 150, bound: 'most' },
} as const satisfies Record<string, Goal>

/** Above this, the content of a tree and its copies would take more memory than a machine may have to spare. */
const mostFullFiles = 200_000

function workloadOf(options: MergeOptions, sizes: { files: number; changes: number; mostFiles?: number }): Workload {
  const { seed, overlayOptions } = options
  const automatic = (sizes.mostFiles ?? sizes.files) > mostFullFiles ? 'empty' : 'full'
  const content = options.content === 'auto' ? automatic : options.content
  return { files: sizes.files, changes: sizes.changes, seed, content, overlayOptions }
}

function peerRequest({ options, programs }: MergeContext, fs: Fs): PeerRequest {
  const { lsync, given, overlayOptions } = options
  return { lsync, given, programs, fs, overlayOptions }
}

/** Why a file system cannot be had here, or `undefined` when it can. */
function whyNot(fs: Fs): string | undefined {
  const privileged = process.getuid?.() === 0 && process.env.LSYNC_BENCH_ISOLATED !== 'user'
  if (fs !== 'target' && fs !== 'tmpfs' && !privileged) return 'mounting it needs root'
  const programs = fs in makers ? [makers[fs as ImageFs]] : fs === 'moosefs' ? moosefsPrograms : []
  const absent = programs.filter((program) => findProgram(program) === undefined)
  return absent.length === 0 ? undefined : `${absent.join(', ')} not installed`
}

function availableFs(context: MergeContext, list: readonly Fs[], row: string): Fs[] {
  return list.filter((fs) => {
    const reason = whyNot(fs)
    if (reason !== undefined) context.missing({ name: `row ${row} on ${fs}`, reason })
    return reason === undefined
  })
}

function describeWorkload(fs: Fs, workload: Workload, options: MergeOptions, least = workload.files): string {
  const where = fs === 'target' ? `${options.target}` : fs === 'tmpfs' ? 'tmpfs' : `${fs} in memory`
  const content = workload.content === 'full' ? 'small files' : 'empty files'
  const overlay = workload.overlayOptions.length === 0 ? '' : `, mounted with ${workload.overlayOptions.join(',')}`
  const files = least === workload.files ? count(least) : `${count(least)} to ${count(workload.files)}`
  return `${count(workload.changes)} changes into ${files} ${content} on ${where}${overlay}`
}

function describeChanges(changes: States['changes']): string {
  const list = Object.entries(changes).sort(([, left], [, right]) => right - left)
  return `changes: ${list.map(([kind, number]) => `${count(number)} ${kind}`).join(', ')}`
}

/** The kernel's answer to what a merge of a state must give. */
type KernelView = { fingerprint: Fingerprint; wholeSeconds: boolean }

/** Runs one peer once, on a state of its own, and adds the sample to its series. */
async function runPeer(
  context: MergeContext,
  request: { states: States; peer: Peer; series: Series; round: number; kernelView?: KernelView | undefined },
): Promise<void> {
  const { scratch, programs, options, progress } = context
  const { states, peer, series, round, kernelView } = request
  progress(`round ${round + 1}: ${peer.name}${series.x === 0 ? '' : ` at ${count(series.x)}`}`)
  await states.withState(async (state) => {
    // The walk comes before the mount: a mounted overlay may write marks as it is walked.
    if (options.cache === 'warm' && !states.keepsLower && states.fs !== 'moosefs')
      await startCommand(['/bin/sh', '-c', 'find "$1" "$2" -printf %s >/dev/null', 'sh', state.lower, state.upper])
    const unmount = peer.readsView ? mountView(scratch, state, options.overlayOptions) : () => undefined
    try {
      await startCommand(['sync', '-f', state.upper])
      await startCommand(['sync', '-f', state.root])
      const cost = await measureCommand({
        command: peer.command(state),
        cwd: scratch.folder('measure/cwd'),
        folder: scratch.folder('measure'),
        measureProgram: programs.measure,
        syncDirectory: state.root,
      })
      await scratch.checkInterrupted()
      series.samples.push({ round, ...cost })
      if (kernelView === undefined || cost.exitCode !== 0 || !existsSync(peer.result(state))) return
      const result = await takeFingerprint(programs.fingerprint, peer.result(state), kernelView)
      series.difference = compareFingerprints(kernelView.fingerprint, result)
    } finally {
      unmount()
    }
  })
}

/** A listing of more entries than this takes more memory and time than the look is worth. */
const mostCheckedFiles = 200_000

async function readKernelView(context: MergeContext, contest: Contest): Promise<KernelView | undefined> {
  const { scratch, programs, options, progress } = context
  if (!options.check || contest.x > mostCheckedFiles) return undefined
  progress("reading the kernel's view")
  return contest.states.withState(async (state) => {
    const unmount = mountView(scratch, state, options.overlayOptions)
    try {
      const wholeSeconds = keepsWholeSeconds(state.root)
      return { fingerprint: await takeFingerprint(programs.fingerprint, state.view, { wholeSeconds }), wholeSeconds }
    } finally {
      unmount()
    }
  })
}

/** One workload and the peers to run on it. */
type Contest = { states: States; peers: readonly Peer[]; x: number }

/**
 * Runs all peers of all contests in turns: in each round every peer once, beginning with another one each time, so that a
 * disturbance of the machine does not always meet the same peer.
 */
async function runContests(context: MergeContext, contests: readonly Contest[], runs: number): Promise<Series[]> {
  const isSkipped = ({ name }: Peer): boolean => context.options.skip.some((word) => name.includes(word))
  for (const { name } of contests.flatMap(({ peers }) => peers.filter(isSkipped)))
    context.missing({ name, reason: 'skipped as asked' })
  const entries = contests.flatMap(({ states, peers, x }) =>
    peers
      .filter((peer) => !isSkipped(peer))
      .map((peer) => ({ states, peer, series: { peer: peer.name, x, samples: [] } as Series })),
  )
  const views = new Map<States, KernelView | undefined>()
  for (const contest of contests) views.set(contest.states, await readKernelView(context, contest))
  for (let round = 0; round < runs; round++)
    for (let index = 0; index < entries.length; index++) {
      const entry = entries[(index + round) % entries.length]
      if (entry === undefined) continue
      // One look is enough: the states of all rounds are the same, and so are the results.
      const kernelView = round === 0 ? views.get(entry.states) : undefined
      await runPeer(context, { ...entry, round, kernelView })
    }
  return entries.map(({ series }) => series)
}

async function* measureInPlace(context: MergeContext): AsyncGenerator<Row> {
  const { options, scratch, progress } = context
  for (const fs of availableFs(context, options.fs, 'in-place')) {
    const workload = workloadOf(options, options)
    progress(`in-place on ${fs}: making ${count(workload.files)} files and ${count(workload.changes)} changes`)
    const states = await prepareStates({
      scratch,
      fs,
      ...targetOf(options),
      workload,
      copies: 1,
      name: `in-place-${fs}`,
    })
    try {
      const { peers, missing } = inPlacePeers(peerRequest(context, fs))
      for (const peer of missing) context.missing(peer)
      const series = await runContests(context, [{ states, peers, x: 0 }], options.runs)
      const lsync = find(series, 'lsync')
      const tools = find(series, 'overlayfs-tools')
      yield {
        id: 'in-place',
        title: 'merge --in-place',
        setting: describeWorkload(fs, workload, options),
        fs,
        series,
        comparisons: [
          compare('lsync ÷ floor', lsync, find(series, 'floor'), ['lsync', 'floor'], goals.floor),
          compare('overlayfs-tools ÷ lsync', tools, lsync, ['overlayfs-tools', 'lsync'], goals.overlayfsTools),
          ...compareOthers(series, ['floor', 'overlayfs-tools']),
        ],
        notes: [describeChanges(states.changes), floorNote],
      }
    } finally {
      states.dispose()
    }
  }
}

const floorNote = 'floor: a C program of one thread with the fewest system calls and no journal (bench/floor.c)'

async function* measureOutput(context: MergeContext): AsyncGenerator<Row> {
  const { options, scratch, progress } = context
  for (const fs of availableFs(context, options.fs, 'output')) {
    const workload = workloadOf(options, options)
    progress(`output on ${fs}: making ${count(workload.files)} files and ${count(workload.changes)} changes`)
    const states = await prepareStates({ scratch, fs, ...targetOf(options), workload, copies: 1, name: `output-${fs}` })
    try {
      // The lower is a plain folder here, on btrfs too: what a subvolume gains is the row growth.
      const clone = cloneCommand(fs === 'moosefs' ? fs : 'ext4')
      const { peers, missing } = outputPeers(peerRequest(context, fs), {
        clone,
        copiesView: true,
        copiesUpper: fs !== 'moosefs',
      })
      for (const peer of missing) context.missing(peer)
      const series = await runContests(context, [{ states, peers, x: 0 }], options.runs)
      const rival = `${clone.name} + floor`
      yield {
        id: 'output',
        title: 'merge --output, a new tree',
        setting: describeWorkload(fs, workload, options),
        fs,
        series,
        comparisons: [
          compare(`lsync ÷ (${rival})`, find(series, 'lsync'), find(series, rival), ['lsync', rival], goals.output),
          ...compareOthers(series, [rival]),
        ],
        notes: [
          describeChanges(states.changes),
          `${rival} moves the upper's files away, where lsync leaves the upper as it is`,
        ],
      }
    } finally {
      states.dispose()
    }
  }
}

async function* measureGrowth(context: MergeContext): AsyncGenerator<Row> {
  const { options, scratch, progress } = context
  const wanted = options.fsWasChosen ? options.fs : options.growthFs
  const [least = 0] = options.growth
  const most = options.growth.at(-1) ?? 0
  for (const fs of availableFs(context, wanted, 'growth')) {
    // On MooseFS, where a small file takes 69 KiB, the trees are made of empty ones.
    const mostFiles = fs === 'moosefs' ? mostFullFiles + 1 : most
    const sizes = options.growth.map((files) => ({
      ...workloadOf(options, { files, changes: options.growthChanges, mostFiles }),
      changedWithin: least,
    }))
    const clone = cloneCommand(fs)
    const entries = sizes.reduce((sum, { files }) => sum + files, 0)
    // Only clones that are copies of every inode need room for them.
    const copies = fs === 'btrfs' || fs === 'moosefs' ? 1 : 2
    const place = await openPlace(scratch, {
      fs,
      ...targetOf(options),
      name: `growth-${fs}`,
      sizeBytes:
        copies * sizes.reduce((sum, { files, content }) => sum + estimateTreeBytes(files, content), 0) +
        sizes.length * options.growthChanges * 60_000 +
        2 ** 30,
      inodes: copies * entries + sizes.length * options.growthChanges * 10 + 10_000,
    })
    try {
      const contests: Contest[] = []
      for (const workload of sizes) {
        progress(`growth on ${fs}: making ${count(workload.files)} files`)
        const name = `growth-${fs}-${workload.files}`
        const states = await prepareKeptLower({ scratch, place, workload, name })
        const { peers, missing } = outputPeers(peerRequest(context, fs), {
          clone,
          copiesView: false,
          copiesUpper: false,
        })
        for (const peer of missing) context.missing(peer)
        contests.push({ states, peers, x: workload.files })
      }
      const series = await runContests(context, contests, options.runs)
      const rival = `${clone.name} + floor`
      const between = `${count(most)} ÷ ${count(least)} files below`
      const compareSizes = (peer: string, goal?: Goal): Comparison =>
        compare(`${peer}: ${between}`, find(series, peer, most), find(series, peer, least), [peer, peer], goal)
      yield {
        id: 'growth',
        title: `merge --output over more and more files, ${count(options.growthChanges)} changes each`,
        setting: describeWorkload(fs, sizes.at(-1) as Workload, options, least),
        fs,
        variable: 'files below',
        series,
        comparisons: [
          compareSizes('lsync', goals.growth),
          compareSizes(rival),
          ...options.growth.map((x) =>
            compare(`lsync ÷ (${rival}) at ${count(x)}`, find(series, 'lsync', x), find(series, rival, x), [
              'lsync',
              rival,
            ]),
          ),
        ],
        notes: [
          `all changes lie within the first ${count(least)} files, so that the upper is the same at each size`,
          ...(sizes[0]?.content === 'empty' ? ['the files below are empty; what the changes write is not'] : []),
        ],
      }
    } finally {
      place.close()
    }
  }
}

async function* measureCurve(context: MergeContext): AsyncGenerator<Row> {
  const { options, scratch, progress } = context
  const most = Math.max(...options.curve)
  for (const fs of availableFs(context, options.fs.slice(0, 1), 'curve')) {
    const series: Series[] = []
    // One size after the other: a ratio is only taken within one size, and together they would not fit in memory.
    for (const files of options.curve) {
      const workload = workloadOf(options, { files, changes: Math.ceil(files / 5), mostFiles: most })
      progress(`curve on ${fs}: making ${count(files)} files and ${count(workload.changes)} changes`)
      const name = `curve-${fs}-${files}`
      const states = await prepareStates({ scratch, fs, ...targetOf(options), workload, copies: 0, name })
      try {
        const peers = inPlacePeers(peerRequest(context, fs)).peers.filter(({ name }) =>
          ['lsync', 'floor'].includes(name),
        )
        if (!peers.some(({ name }) => name === 'lsync')) context.missing({ name: 'lsync', reason: 'see above' })
        series.push(...(await runContests(context, [{ states, peers, x: files }], Math.min(options.runs, 3))))
      } finally {
        states.dispose()
      }
    }
    const last = workloadOf(options, { files: most, changes: Math.ceil(most / 5), mostFiles: most })
    yield {
      id: 'curve',
      title: 'merge --in-place of a fifth of the files',
      setting: describeWorkload(fs, last, options),
      fs,
      variable: 'files below',
      series,
      comparisons: [
        compareGrowth(series, 'lsync', goals.linear),
        compareGrowth(series, 'floor'),
        ...options.curve.map((x) =>
          compare(`lsync ÷ floor at ${count(x)}`, find(series, 'lsync', x), find(series, 'floor', x), [
            'lsync',
            'floor',
          ]),
        ),
      ],
      notes: [
        'where the floor grows faster than its work, that is the file system',
        ...(last.content === 'empty' ? ['the files below are empty; what the changes write is not'] : []),
      ],
    }
  }
}

async function* measureMemory(context: MergeContext): AsyncGenerator<Row> {
  const { options, scratch, progress } = context
  const entries = options.memoryEntries
  if (!existsSync(options.lsync)) {
    context.missing({ name: 'lsync', reason: `${options.lsync} does not exist` })
    return
  }
  const request = (fs: Fs): PeerRequest => peerRequest(context, fs)
  for (const fs of availableFs(context, options.fs.slice(0, 1), 'memory')) {
    const place = await openPlace(scratch, {
      fs,
      ...targetOf(options),
      name: `memory-${fs}`,
      sizeBytes: 3 * estimateTreeBytes(entries, 'empty') + options.changes * 60_000 + 2 ** 30,
      inodes: Math.ceil(entries * 3.3) + options.changes * 6 + 10_000,
    })
    try {
      const series: Series[] = []
      const run = async (states: States, peer: Peer | undefined, name: string): Promise<void> => {
        if (peer === undefined) return
        const one: Series = { peer: name, x: 0, samples: [] }
        await runPeer(context, { states, peer, series: one, round: 0 })
        series.push(one)
      }
      const pick = (peers: readonly Peer[]): Peer | undefined => peers.find(({ name }) => name === 'lsync')
      const workload: Workload = {
        ...workloadOf(options, { files: entries, changes: options.changes }),
        content: 'empty',
      }
      progress(`memory: making ${count(entries)} files`)
      const below = await prepareKeptLower({ scratch, place, workload, name: 'below' })
      const output = outputPeers(request(fs), { clone: cloneCommand(fs), copiesView: false, copiesUpper: false })
      const inPlace = inPlacePeers(request(fs))
      await run(below, pick(output.peers), 'lsync --output, all below')
      // Last on this lower, for it is merged into.
      await run(below, pick(inPlace.peers), 'lsync --in-place, all below')
      progress(`memory: making ${count(entries)} entries in an upper`)
      const above = await prepareKeptLower({
        scratch,
        place,
        workload: { ...workload, files: 0 },
        name: 'above',
        once: true,
        write: (lower) => writeDirectories(lower, entries, scratch),
        change: async (view) => {
          await makeEntries(view, entries, scratch)
          return { create: entries }
        },
      })
      await run(above, pick(inPlace.peers), 'lsync --in-place, all new')
      yield {
        id: 'memory',
        title: `peak memory at ${count(entries)} entries`,
        setting: `${describeWorkload(fs, workload, options)}; and ${count(entries)} new files in an upper`,
        fs,
        series,
        comparisons: ['lsync --output, all below', 'lsync --in-place, all below', 'lsync --in-place, all new'].map(
          (name): Comparison => {
            const measured = spreadOf(find(series, name), 'maxRssMiB')
            const base: Comparison = { label: name, unit: 'MB', goal: goals.memory }
            return measured === undefined ? { ...base, remark: 'lsync is missing or failed' } : { ...base, measured }
          },
        ),
        notes: ['peak: highest resident memory of any one process of the command (wait4)'],
      }
    } finally {
      place.close()
    }
  }
}

async function* measureStartUp(context: MergeContext): AsyncGenerator<Row> {
  const { options, scratch } = context
  const place = await openPlace(scratch, { fs: 'tmpfs', name: 'start-up', sizeBytes: 0, inodes: 0 })
  try {
    const workload: Workload = { ...workloadOf(options, { files: 50, changes: 0 }), content: 'full' }
    const states = await prepareKeptLower({ scratch, place, workload, name: 'start-up' })
    const merge = inPlacePeers(peerRequest(context, 'tmpfs')).peers.find(({ name }) => name === 'lsync')
    const plain = (name: string, ...command: string[]): Peer => ({
      name,
      command: () => command,
      result: (state: State) => state.lower,
      readsView: false,
    })
    const peers = [plain('node, doing nothing', process.execPath, '-e', '')]
    if (merge !== undefined)
      peers.push(plain('lsync --version', options.lsync, '--version'), { ...merge, name: 'lsync merge, empty upper' })
    else context.missing({ name: 'lsync', reason: `${options.lsync} does not exist` })
    // The first start reads the program from disk.
    for (const peer of peers)
      await runPeer(context, { states, peer, series: { peer: '', x: 0, samples: [] }, round: 0 })
    const unchecked = { ...context, options: { ...options, check: false } }
    const series = await runContests(unchecked, [{ states, peers, x: 0 }], 2 * options.runs)
    const figure = (peer: string, goal: Goal): Comparison => {
      const measured = spreadOf(find(series, peer), 'wallMs')
      const base: Comparison = { label: peer, unit: 'ms', goal }
      return measured === undefined ? { ...base, remark: 'lsync is missing or failed' } : { ...base, measured }
    }
    yield {
      id: 'start-up',
      title: 'start-up',
      setting: `from fork to exit, started as ${options.lsync}`,
      fs: 'tmpfs',
      series,
      comparisons: [figure('lsync --version', goals.version), figure('lsync merge, empty upper', goals.emptyMerge)],
      notes: [],
    }
  } finally {
    place.close()
  }
}

const targetOf = (options: MergeOptions): { target?: string } =>
  options.target === undefined ? {} : { target: options.target }
