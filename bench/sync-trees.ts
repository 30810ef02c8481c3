import { mkdirSync } from 'node:fs'
import { join } from 'node:path'
import { startCommand } from './command.ts'
import { count } from './compare.ts'
import type { Context } from './question.ts'
import { type Fs, openPlace, type Place } from './state.ts'
import { estimateTreeBytes, type Workload, writeLower } from './workload.ts'

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
  /** Sizes of the rows changes and restart, and how many changes are made. */
  followed: readonly number[]
  changes: number
  /** New files a second in the row latency, and for how long. */
  rate: number
  seconds: number
  /** Directories of the row rest, and how long it looks at each daemon. */
  directories: number
  restSeconds: number
  settleSeconds: number
  /** Sizes of the row curve. */
  curve: readonly number[]
  check: boolean
  skip: readonly string[]
}

/** What the rows of `bench sync` are run with. */
export type SyncContext = Context<SyncOptions>

/** Above this, the content of a tree and its copy would take more memory than a machine may have to spare. */
export const mostFullFiles = 200_000

export function workloadOf(options: SyncOptions, files: number, mostFiles = files): Workload {
  const content = mostFiles > mostFullFiles ? 'empty' : 'full'
  return { files, changes: 0, seed: options.seed, content, overlayOptions: [] }
}

export function describe(options: SyncOptions, workload: Workload, to: string): string {
  const where =
    options.fs === 'target' ? `${options.target}` : options.fs === 'tmpfs' ? 'tmpfs' : `${options.fs} in memory`
  return `${count(workload.files)} ${workload.content === 'full' ? 'small' : 'empty'} files on ${where}, ${to}`
}

/** A tree to carry, and where it came from. */
export type Source = { path: string; close: () => void }

/** Makes a tree on a file system of its own, with room for so many files more. */
export async function makeSource(context: SyncContext, workload: Workload, name: string, more = 0): Promise<Source> {
  const room = { ...workload, files: workload.files + more }
  const place = await openFor(context, context.options.fs, `${name}-source`, room)
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
export type OpenTarget = () => Promise<{ path: string; close: () => Promise<void> }>

/** A file system of its own for each run, so that none begins where another one has left holes. */
export function freshTargets(context: SyncContext, workload: Workload, name: string): OpenTarget {
  let serial = 0
  return async () => {
    const place = await openFor(context, context.options.fs, `${name}-target-${serial++}`, workload)
    const path = join(place.root, 'copy')
    mkdirSync(path)
    return { path, close: async () => place.close() }
  }
}

let states = 0

/** A new empty folder for what a program remembers of a sync. */
export function newState({ scratch }: SyncContext): string {
  return scratch.folder(`sync-state/${states++}`)
}
