import {
  appendFileSync,
  chmodSync,
  closeSync,
  mkdirSync,
  openSync,
  renameSync,
  rmSync,
  symlinkSync,
  unlinkSync,
  utimesSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import { dirname, join } from 'node:path'
import { Random } from './random.ts'
import type { Scratch } from './scratch.ts'

/** A tree of small files and the changes made to it through an overlay mount. */
export type Workload = {
  /** Files of the lower. */
  files: number
  /** Changes made through the mount: each is one thing a user does, such as one `rm -r` of a directory. */
  changes: number
  /** Only the first so many files are changed, where given: trees of different sizes then get the same upper. */
  changedWithin?: number
  seed: number
  /**
   * `full`: log-normal sizes with a median of 1.8 KB and at most 200 KB. `empty`: the files of the lower hold no bytes, for
   * trees so large that their content would not fit in memory; what the changes write is always full.
   */
  content: 'full' | 'empty'
  /** Options of the overlay mount besides its directories, such as `redirect_dir=on`. */
  overlayOptions: readonly string[]
}

/** How many changes of which kind were made. */
export type ChangeCounts = Record<string, number>

const filesPerDirectory = 50
const directoriesPerGroup = 200
/** Files in one top-level directory of a tree. */
export const filesPerGroup = filesPerDirectory * directoriesPerGroup

const medianBytes = 1800
const maxBytes = 200_000
// 50,000 files then hold about 280 MB, as the trees did that performance.md was written from.
const sigma = 1.5

/** Bytes that a tree of this many files takes on a file system with 4 KiB blocks, roughly and rather too many. */
export function estimateTreeBytes(files: number, content: Workload['content']): number {
  return files * (content === 'full' ? 9000 : 0) + (files / filesPerDirectory + 1) * 4096 + files * 600
}

class Content {
  readonly #pool = Buffer.alloc(2 * maxBytes)

  constructor(seed: number) {
    const random = new Random(seed)
    for (let at = 0; at < this.#pool.length; at += 4) this.#pool.writeUInt32LE(Math.floor(random.next() * 2 ** 32), at)
  }

  next(random: Random): Uint8Array {
    const size = Math.min(maxBytes, Math.round(medianBytes * Math.exp(sigma * random.normal())))
    const start = random.below(maxBytes)
    return this.#pool.subarray(start, start + size)
  }
}

const nameDirectory = (index: number): string =>
  join(`group-${Math.floor(index / directoriesPerGroup)}`, `folder-${index % directoriesPerGroup}`)
const nameFile = (index: number): string => `file-${index}.txt`

/** Writes one group of the lower's files, beneath `root`: the files from `group * filesPerGroup` on. */
export function writeGroup(root: string, workload: Workload, group: number): void {
  const random = new Random(workload.seed * 7919 + group)
  const content = new Content(workload.seed)
  const first = group * filesPerGroup
  const last = Math.min(workload.files, first + filesPerGroup)
  for (let index = first; index < last; index += filesPerDirectory) {
    const directory = join(root, nameDirectory(index / filesPerDirectory))
    mkdirSync(directory, { recursive: true })
    // Names start anew in each directory, so that a group can be cloned as the next one.
    for (let file = 0; file < Math.min(filesPerDirectory, last - index); file++) {
      const descriptor = openSync(join(directory, nameFile(file)), 'wx', file % 10 === 0 ? 0o755 : 0o644)
      if (workload.content === 'full') writeSync(descriptor, content.next(random))
      closeSync(descriptor)
    }
  }
}

/** The files that `writeLower` writes, by their paths beneath the root. */
export function listFiles({ files }: Pick<Workload, 'files'>): string[] {
  return Array.from({ length: files }, (_, index) =>
    join(nameDirectory(Math.floor(index / filesPerDirectory)), nameFile(index % filesPerDirectory)),
  )
}

/** Groups that a tree of this many files has. */
export function countGroups(files: number): number {
  return Math.ceil(files / filesPerGroup)
}

/** Writes the whole lower beneath the existing directory `root`. The same workload gives the same tree. */
export async function writeLower(root: string, workload: Workload, scratch: Scratch): Promise<void> {
  for (let group = 0; group < countGroups(workload.files); group++) {
    await scratch.checkInterrupted()
    writeGroup(root, workload, group)
  }
}

/**
 * Writes so many files beneath `root`, over a tree of `writeLower` or beside it: half of them in the place of the first ones of the
 * tree, the others in a directory of their own, `made-ROUND`. Returns the path of the last one.
 */
export function writeChanged(
  root: string,
  workload: Workload,
  { count, round }: { count: number; round: number },
): string {
  const random = new Random(workload.seed * 65_537 + round)
  const content = new Content(workload.seed)
  const replaced = listFiles({ files: Math.min(workload.files, Math.floor(count / 2)) })
  const made = Array.from({ length: count - replaced.length }, (_, index) => join(`made-${round}`, nameFile(index)))
  for (const path of [...replaced, ...made]) {
    mkdirSync(dirname(join(root, path)), { recursive: true })
    writeFileSync(join(root, path), content.next(random))
  }
  return made.at(-1) ?? ''
}

/** A directory of the view and what is left in it of the lower's files. */
type Folder = { path: string; files: string[] }

/** Weights of the kinds of change, as a container with a package manager and a build in it makes them. */
const weights: readonly (readonly [kind: string, weight: number])[] = [
  ['create', 0.36],
  ['overwrite', 0.22],
  ['unlink', 0.15],
  ['chmod', 0.08],
  ['append', 0.05],
  ['rename file', 0.05],
  ['touch', 0.03],
  ['make directory', 0.03],
  ['symlink', 0.02],
  ['replace directory', 0.005],
  ['remove directory', 0.005],
]

/**
 * Makes the changes of a workload in `view`, an overlay mount over the tree that `writeLower` wrote, and returns how many
 * of each kind. The same workload gives the same changes. Renames directories only where the mount
 * has `redirect_dir=on`, since the kernel refuses that otherwise.
 */
export async function makeChanges(view: string, workload: Workload, scratch: Scratch): Promise<ChangeCounts> {
  const random = new Random(workload.seed * 104_729 + 1)
  const content = new Content(workload.seed)
  let folders: Folder[] = []
  const reach = Math.min(workload.files, workload.changedWithin ?? workload.files)
  for (let index = 0; index * filesPerDirectory < reach; index++) {
    const count = Math.min(filesPerDirectory, reach - index * filesPerDirectory)
    const files = Array.from({ length: count }, (_, file) => nameFile(file))
    folders.push({ path: join(view, nameDirectory(index)), files })
  }
  const renamesDirectories = workload.overlayOptions.includes('redirect_dir=on')
  const kinds = renamesDirectories ? [...weights, ['rename directory', 0.005] as const] : weights
  const total = kinds.reduce((sum, [, weight]) => sum + weight, 0)
  const pickKind = (): string => {
    let at = random.next() * total
    for (const [kind, weight] of kinds) {
      at -= weight
      if (at < 0) return kind
    }
    return 'create'
  }
  const pickFolder = (): Folder | undefined => folders[random.below(folders.length)]
  /** Takes a file of the lower that nothing has changed yet. */
  const takeFile = (): string | undefined => {
    for (let attempt = 0; attempt < 20; attempt++) {
      const folder = pickFolder()
      if (folder === undefined || folder.files.length === 0) continue
      const at = random.below(folder.files.length)
      const [name = ''] = folder.files.splice(at, 1)
      return join(folder.path, name)
    }
    return undefined
  }
  /** Takes a directory of the lower out of the game, with all that is in the view of it. */
  const takeFolder = (): Folder | undefined => {
    if (folders.length < 4) return undefined
    const [taken] = folders.splice(random.below(folders.length), 1)
    if (taken !== undefined) folders = folders.filter(({ path }) => !path.startsWith(`${taken.path}/`))
    return taken
  }
  const emptyFolder = (folder: Folder): void => {
    rmSync(folder.path, { recursive: true })
    folder.files = []
  }
  const counts: ChangeCounts = {}
  let serial = 0
  const createIn = (directory: string): void =>
    writeFileSync(join(directory, `new-${serial++}.txt`), content.next(random), { flag: 'wx' })
  const anyDirectory = (): string => pickFolder()?.path ?? view

  for (let change = 0; change < workload.changes; change++) {
    if (change % 500 === 0) await scratch.checkInterrupted()
    const kind = pickKind()
    const needsFile = ['overwrite', 'unlink', 'chmod', 'append', 'rename file', 'touch'].includes(kind)
    const file = needsFile ? takeFile() : undefined
    const folder = ['replace directory', 'remove directory', 'rename directory'].includes(kind)
      ? takeFolder()
      : undefined
    let done = kind
    if (kind === 'overwrite' && file !== undefined) writeFileSync(file, content.next(random))
    else if (kind === 'unlink' && file !== undefined) unlinkSync(file)
    else if (kind === 'chmod' && file !== undefined) chmodSync(file, 0o600)
    else if (kind === 'append' && file !== undefined) appendFileSync(file, content.next(random))
    else if (kind === 'touch' && file !== undefined) utimesSync(file, 1_700_000_000, 1_700_000_000 + serial++)
    else if (kind === 'rename file' && file !== undefined)
      renameSync(file, join(anyDirectory(), `moved-${serial++}.txt`))
    else if (kind === 'symlink') symlinkSync(`../file-${serial}`, join(anyDirectory(), `link-${serial++}`))
    else if (kind === 'make directory') {
      const path = join(anyDirectory(), `made-${serial++}`)
      mkdirSync(path)
      folders.push({ path, files: [] })
      createIn(path)
    } else if (kind === 'replace directory' && folder !== undefined) {
      emptyFolder(folder)
      mkdirSync(folder.path)
      for (let file = 0; file < 3; file++) createIn(folder.path)
    } else if (kind === 'remove directory' && folder !== undefined) emptyFolder(folder)
    else if (kind === 'rename directory' && folder !== undefined)
      renameSync(folder.path, join(view, `group-moved-${serial++}`))
    else {
      done = 'create'
      createIn(anyDirectory())
    }
    counts[done] = (counts[done] ?? 0) + 1
  }
  return counts
}

const countDirectories = (entries: number): number => Math.ceil(entries / filesPerDirectory)

/** Writes a lower of the directories alone that hold so many files. */
export async function writeDirectories(root: string, entries: number, scratch: Scratch): Promise<void> {
  for (let index = 0; index < countDirectories(entries); index++) {
    if (index % 1000 === 0) await scratch.checkInterrupted()
    mkdirSync(join(root, nameDirectory(index)), { recursive: true })
  }
}

/**
 * Fills the directories that `writeDirectories` wrote with `entries` new empty files, through the mount: each is a step
 * of its own to a merge, since none of the directories is new.
 */
export async function makeEntries(view: string, entries: number, scratch: Scratch): Promise<void> {
  for (let index = 0; index < countDirectories(entries); index++) {
    if (index % 20 === 0) await scratch.checkInterrupted()
    const directory = join(view, nameDirectory(index))
    for (let file = 0; file < Math.min(filesPerDirectory, entries - index * filesPerDirectory); file++)
      closeSync(openSync(join(directory, nameFile(file)), 'wx', 0o644))
  }
}
