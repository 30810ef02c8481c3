import { existsSync, lstatSync, rmSync, utimesSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { runCommand, startCommand } from './command.ts'
import { copyImage, type Image, type ImageFs, makeImage, makeRoot, mountImage, removeImage } from './image.ts'
import { startMoosefs } from './moosefs.ts'
import { mount, type Scratch } from './scratch.ts'
import {
  type ChangeCounts,
  countGroups,
  estimateTreeBytes,
  filesPerGroup,
  makeChanges,
  type Workload,
  writeGroup,
  writeLower,
} from './workload.ts'

/** Where the trees of a run lie: a file system of the harness's own, or the user's (`--target`). */
export type Fs = ImageFs | 'tmpfs' | 'moosefs' | 'target'

/** One lower with the upper that a real overlay mount left over it, ready for one run. Absolute paths. */
export type State = {
  /** A directory of the file system that holds the lower and the result. */
  root: string
  lower: string
  upper: string
  work: string
  /** Does not exist yet; on the file system of the lower. */
  output: string
  /** An empty directory to mount the merged view at. */
  view: string
}

/** Gives out one starting state after the other, all of them the same. */
export type States = {
  fs: Fs
  changes: ChangeCounts
  /** The lower stays mounted from run to run, so that its inodes are in memory as far as they fit. */
  keepsLower: boolean
  /** Runs `use` on a state of its own, and throws the state away. */
  withState<T>(use: (state: State) => Promise<T>): Promise<T>
  dispose(): void
}

/** What `prepareStates` needs to know. */
export type StatesRequest = {
  scratch: Scratch
  fs: Fs
  /** The user's directory, with `fs: 'target'`. */
  target?: string
  workload: Workload
  /** How many whole trees a run adds at most: 0 in place, 1 for a copy. */
  copies: number
  name: string
}

/**
 * Mounts the view of a state, with the options that its upper was made with, as after a restart of the container.
 * Returns a function that unmounts it.
 */
export function mountView(
  scratch: Scratch,
  state: Pick<State, 'lower' | 'upper' | 'work' | 'view'>,
  overlayOptions: readonly string[],
): () => void {
  const directories = [`lowerdir=${state.lower}`, `upperdir=${state.upper}`, `workdir=${state.work}`]
  return mount(scratch, ['-t', 'overlay', 'overlay', '-o', [...directories, ...overlayOptions].join(',')], state.view)
}

/** Builds lower and upper for real in `root` (the upper in `upperRoot`) and returns what was changed. */
async function build(
  scratch: Scratch,
  workload: Workload,
  paths: Pick<State, 'lower' | 'upper' | 'work' | 'view'>,
  change: (view: string) => Promise<ChangeCounts>,
): Promise<ChangeCounts> {
  const unmount = mountView(scratch, paths, workload.overlayOptions)
  try {
    return await change(paths.view)
  } finally {
    unmount()
  }
}

/**
 * Makes the starting states of a workload on a file system. On ext4, xfs and btrfs each state is a copy of one image, down
 * to the block; elsewhere it is a `cp -a` of one pair of trees.
 */
export async function prepareStates(request: StatesRequest): Promise<States> {
  const { fs } = request
  if (fs === 'ext4' || fs === 'xfs' || fs === 'btrfs') return prepareImages({ ...request, fs })
  return prepareTrees(request)
}

async function prepareImages(request: StatesRequest & { fs: ImageFs }): Promise<States> {
  const { scratch, fs, workload, copies, name } = request
  const entries = workload.files + workload.changes * 3
  const template = makeImage(scratch, {
    fs,
    name,
    sizeBytes:
      (copies + 1) * estimateTreeBytes(workload.files, workload.content) + workload.changes * 20_000 + (1 << 29),
    inodes: Math.ceil((copies + 1) * entries * 1.1 + 5000),
  })
  const view = scratch.folder(`${name}-view`)
  const pathsIn = (root: string): State => ({
    root,
    lower: join(root, 'lower'),
    upper: join(root, 'upper'),
    work: join(root, 'work'),
    output: join(root, 'output'),
    view,
  })
  const { root, unmount } = mountImage(scratch, template, `${name}-template`)
  let changes: ChangeCounts
  try {
    const paths = pathsIn(root)
    // Plain folders, on btrfs too: a rename out of a subvolume is refused (EXDEV), and this is about renames.
    for (const path of [paths.lower, paths.upper, paths.work]) makeRoot(path, 'plain')
    await writeLower(paths.lower, workload, scratch)
    changes = await build(scratch, workload, paths, (at) => makeChanges(at, workload, scratch))
  } finally {
    unmount()
  }
  let serial = 0
  return {
    fs,
    changes,
    keepsLower: false,
    async withState(use) {
      await scratch.checkInterrupted()
      const image: Image = await copyImage(scratch, template, `${name}-${serial++}`)
      try {
        const mounted = mountImage(scratch, image, `${name}-mount`)
        try {
          return await use(pathsIn(mounted.root))
        } finally {
          mounted.unmount()
        }
      } finally {
        removeImage(image)
      }
    },
    dispose: () => removeImage(template),
  }
}

async function prepareTrees(request: StatesRequest): Promise<States> {
  const { scratch, fs, workload, name } = request
  const place = await openPlace(scratch, { ...request, sizeBytes: 0, inodes: 0 })
  const view = scratch.folder(`${name}-view`)
  const template = pathsAt(place, `${name}-template`, view)
  for (const path of Object.values(foldersOf(template))) makeRoot(path, 'plain')
  await writeTree(scratch, fs, template.lower, workload)
  const changes = await build(scratch, workload, template, (at) => makeChanges(at, workload, scratch))
  let serial = 0
  return {
    fs,
    changes,
    keepsLower: false,
    async withState(use) {
      await scratch.checkInterrupted()
      const state = pathsAt(place, `${name}-${serial++}`, view)
      const [from, to] = [foldersOf(template), foldersOf(state)]
      try {
        for (const folder of ['lower', 'upper'] as const) await startCommand(['cp', '-a', from[folder], to[folder]])
        makeRoot(state.work, 'plain')
        return await use(state)
      } finally {
        for (const path of [...Object.values(to), state.output]) await removeTree(path, fs)
      }
    },
    dispose: place.close,
  }
}

/** A mounted file system and where an upper can lie: not every lower's file system takes one. */
export type Place = { fs: Fs; root: string; upperRoot: string; close: () => void }

/** Opens the place where the trees of `fs` are made. */
export async function openPlace(
  scratch: Scratch,
  request: { fs: Fs; target?: string; name: string; sizeBytes: number; inodes: number },
): Promise<Place> {
  const { fs, name } = request
  if (fs === 'target') {
    const root = join(request.target ?? '.', `bench-lsync-${process.pid}-${name}`)
    const close = scratch.onCleanup(() => rmSync(root, { recursive: true, force: true }))
    makeRoot(root, 'plain')
    return {
      fs,
      root,
      upperRoot: canHoldUpper(scratch, root) ? root : openTmpfs(scratch, `${name}-uppers`).root,
      close,
    }
  }
  if (fs === 'moosefs') {
    const { root, stop } = await startMoosefs(scratch)
    const uppers = openTmpfs(scratch, `${name}-uppers`)
    const close = () => {
      uppers.close()
      stop()
    }
    return { fs, root, upperRoot: uppers.root, close }
  }
  if (fs === 'tmpfs') {
    const { root, close } = openTmpfs(scratch, name)
    return { fs, root, upperRoot: root, close }
  }
  const image = makeImage(scratch, { fs, name, sizeBytes: request.sizeBytes, inodes: request.inodes })
  const { root, unmount } = mountImage(scratch, image, `${name}-mount`)
  const close = () => {
    unmount()
    removeImage(image)
  }
  return { fs, root, upperRoot: root, close }
}

function openTmpfs(scratch: Scratch, name: string): { root: string; close: () => void } {
  const root = scratch.folder(name)
  return { root, close: mount(scratch, ['-t', 'tmpfs', '-o', 'size=12g,nr_inodes=0', 'tmpfs'], root) }
}

function canHoldUpper(scratch: Scratch, root: string): boolean {
  const paths = { ...pathsAt({ root, upperRoot: root }, 'probe', scratch.folder('probe-view')) }
  const folders = Object.values(foldersOf(paths))
  for (const path of folders) makeRoot(path, 'plain')
  try {
    mountView(scratch, paths, process.env.LSYNC_BENCH_ISOLATED === 'user' ? ['userxattr'] : [])()
    return true
  } catch {
    return false
  } finally {
    for (const path of folders) rmSync(path, { recursive: true, force: true })
  }
}

function pathsAt(place: Pick<Place, 'root' | 'upperRoot'>, name: string, view: string): State {
  return {
    root: place.root,
    lower: join(place.root, `${name}-lower`),
    upper: join(place.upperRoot, `${name}-upper`),
    work: join(place.upperRoot, `${name}-work`),
    output: join(place.root, `${name}-output`),
    view,
  }
}

const foldersOf = ({ lower, upper, work }: State) => ({ lower, upper, work })

/** Writes the lower of a workload into the existing directory `lower`. */
export async function writeTree(scratch: Scratch, fs: Fs, lower: string, workload: Workload): Promise<void> {
  if (fs !== 'moosefs') return writeLower(lower, workload, scratch)
  // A small file costs milliseconds on MooseFS, and the clone of a whole group next to nothing.
  writeGroup(lower, workload, 0)
  const groups = countGroups(workload.files)
  for (let group = 1; group < groups; group++) {
    await scratch.checkInterrupted()
    const isWhole = (group + 1) * filesPerGroup <= workload.files
    if (isWhole) runCommand(['mfsmakesnapshot', join(lower, 'group-0'), join(lower, `group-${group}`)])
    else writeGroup(lower, workload, group)
  }
}

/**
 * Makes one lower that is kept, and copies of its upper for each run: for results that leave the lower as it is (`--output`),
 * where the lower is so large that it is not copied each time. On btrfs the lower is a subvolume.
 */
export async function prepareKeptLower(
  request: Pick<StatesRequest, 'scratch' | 'workload' | 'name'> & {
    place: Place
    /** Makes the changes, `makeChanges` unless given. */
    change?: (view: string) => Promise<ChangeCounts>
    /** Writes the lower, the files of the workload unless given. */
    write?: (lower: string) => Promise<void>
    /** There will be one run only, which may use up the upper itself: no copy of a very large one. */
    once?: boolean
  },
): Promise<States> {
  const { scratch, place, workload, name } = request
  const { fs } = place
  const view = scratch.folder(`${name}-view`)
  const kept = pathsAt(place, name, view)
  makeRoot(kept.lower, fs)
  for (const path of [kept.upper, kept.work]) makeRoot(path, 'plain')
  await (request.write ?? ((lower: string) => writeTree(scratch, fs, lower, workload)))(kept.lower)
  const change = request.change ?? ((at: string) => makeChanges(at, workload, scratch))
  const changes = await build(scratch, workload, kept, change)
  let serial = 0
  return {
    fs,
    changes,
    keepsLower: true,
    async withState(use) {
      await scratch.checkInterrupted()
      const run = pathsAt(place, `${name}-run-${serial++}`, view)
      const state = request.once === true ? kept : { ...run, lower: kept.lower }
      try {
        if (request.once !== true) {
          await startCommand(['cp', '-a', kept.upper, state.upper])
          makeRoot(state.work, 'plain')
        }
        return await use(state)
      } finally {
        for (const path of [state.upper, state.work, state.output]) await removeTree(path, fs)
      }
    },
    dispose: () => undefined,
  }
}

/** Removes a tree as fast as its file system can. */
async function removeTree(path: string, fs: Fs): Promise<void> {
  if (!existsSync(path)) return
  if (fs === 'btrfs' && lstatSync(path).ino === 256) await startCommand(['btrfs', 'subvolume', 'delete', path])
  else await startCommand(['rm', '-rf', path])
}

/** Whether the file system of `directory` keeps only whole seconds of a time, as MooseFS does. */
export function keepsWholeSeconds(directory: string): boolean {
  const path = join(directory, `.bench-time-${process.pid}`)
  writeFileSync(path, '')
  try {
    utimesSync(path, 1_700_000_000.5, 1_700_000_000.5)
    return lstatSync(path).mtimeMs % 1000 === 0
  } finally {
    rmSync(path)
  }
}
