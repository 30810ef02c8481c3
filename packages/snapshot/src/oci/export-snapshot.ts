import { RequestInvalidError, removeTree } from '@lsync/overlay-merge'
import {
  type ByteString,
  close,
  type HostPath,
  LsyncError,
  makeDirectory,
  makeNode,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_RDONLY,
  openBeneath,
  openRoot,
  printable,
  randomHex,
  readDirents,
  type Stat,
  setTimes,
  statFd,
  tryStatAt,
  unlink,
  withFd,
} from '@lsync/posix'
import { diffSnapshots, type SnapshotChange } from '../diff.ts'
import type { Snapshot } from '../model/snapshot.ts'
import type { Repository } from '../repository.ts'
import { restoreSnapshot } from '../restore.ts'
import { locatePath } from '../select.ts'
import { exportImage, type ImageExportReport, type ImageExportRequest } from './export.ts'
import { ImageLayout } from './layout.ts'

const S_IFCHR = 0o020000

/** A version of a tree. */
export interface VersionRef {
  readonly snapshot: Snapshot
  /** What of it; by default the directory that was saved. */
  readonly path?: ByteString | undefined
}

export interface SnapshotExportRequest extends Omit<ImageExportRequest, 'layers' | 'form' | 'namespace'> {
  readonly repository: Repository
  readonly version: VersionRef
  /** Only what changed since this version becomes the layer. An image of it has to be the base. */
  readonly since?: VersionRef | undefined
}

/**
 * Adds an image to a layout whose new layer is a snapshot, or what a snapshot changed since another one. It is restored
 * into the layout's directory for a moment, with every byte checked. See `exportImage`.
 * @throws {RequestInvalidError} if a version is no directory, or is a layer whose whiteout went away since the other one:
 * that no layer can say
 */
export async function exportSnapshot(request: SnapshotExportRequest): Promise<ImageExportReport> {
  const { repository, version, since, signal, ...others } = request
  ImageLayout.create(request.layout).close()
  const name = `.lsync-export-${randomHex(8)}` as ByteString
  const layoutFd = openRoot(request.layout)
  try {
    makeDirectory(layoutFd, name, 0o700)
    const path = `${request.layout}/${name}/layer` as HostPath
    const restored = await restoreSnapshot(repository, { ...version, target: path, signal })
    const [problem] = restored.problems
    if (problem !== undefined) throw new LsyncError(problem.code, problem.message, { path: problem.path })
    if (since !== undefined) keepChanges(path, await changesOf(repository, since, version, signal))
    return await exportImage({ ...others, layers: [path], ...(signal === undefined ? {} : { signal }) })
  } finally {
    removeTree(layoutFd, name)
    close(layoutFd)
  }
}

/** What a difference is made of; paths are beneath the root, without a slash before them. */
interface Changes {
  readonly changed: ReadonlySet<string>
  readonly removed: readonly string[]
}

async function changesOf(
  repository: Repository,
  before: VersionRef,
  after: VersionRef,
  signal: AbortSignal | undefined,
): Promise<Changes> {
  const from = await locatePath(repository, before.snapshot, before.path, signal)
  const to = await locatePath(repository, after.snapshot, after.path, signal)
  if (from.tree === undefined || to.tree === undefined) {
    throw new RequestInvalidError('a version that becomes a layer is a directory', 'name a directory, or none')
  }
  const changed = new Set<string>()
  const removed: string[] = []
  for await (const change of diffSnapshots(repository, from, to, signal)) {
    const path = change.path.slice(1)
    if (change.change !== 'removed') changed.add(path)
    else if (isWhiteout(change.before)) {
      throw new RequestInvalidError(
        `${printable(path)} was a whiteout and is none any more, which no layer can say`,
        'export the whole version with --snapshot alone, on the image that its first version lay on',
      )
    } else removed.push(path)
  }
  return { changed, removed }
}

function isWhiteout(node: SnapshotChange['before']): boolean {
  return node?.type === 'chardev' && node.device === 0
}

/** Turns a whole tree into the layer of its changes. Directories keep their times. */
function keepChanges(root: HostPath, { changed, removed }: Changes): void {
  const rootFd = openRoot(root)
  try {
    // A further name of a file whose content changed goes along, so that they stay one file.
    const groups = new Set<string>()
    const kept = new Set<string>([''])
    for (const path of changed) {
      for (let at = path; at !== '' && !kept.has(at); at = parentOf(at)) kept.add(at)
      const stat = inDirectory(rootFd, parentOf(path), (fd) => tryStatAt(fd, nameOf(path)))
      if (stat !== undefined && isLinked(stat)) groups.add(inodeOf(stat))
    }
    const whiteouts = new Map<string, string[]>()
    for (const path of removed) {
      const parent = parentOf(path)
      // In a directory that is gone itself, its own whiteout says all.
      if (!isDirectory(rootFd, parent) || inDirectory(rootFd, parent, (fd) => tryStatAt(fd, nameOf(path)))) continue
      whiteouts.set(parent, [...(whiteouts.get(parent) ?? []), nameOf(path)])
      for (let at = parent; at !== '' && !kept.has(at); at = parentOf(at)) kept.add(at)
    }
    if (groups.size > 0) keepGroups(rootFd, '', groups, kept)
    prune(rootFd, '', kept, whiteouts)
  } finally {
    close(rootFd)
  }
}

function keepGroups(rootFd: number, path: string, groups: ReadonlySet<string>, kept: Set<string>): void {
  const below: string[] = []
  inDirectory(rootFd, path, (fd) => {
    for (const name of namesIn(fd)) {
      const stat = tryStatAt(fd, name)
      const full = joined(path, name)
      if (stat?.isDirectory === true) below.push(full)
      else if (stat !== undefined && isLinked(stat) && groups.has(inodeOf(stat))) {
        for (let at = full; at !== '' && !kept.has(at); at = parentOf(at)) kept.add(at)
      }
    }
  })
  for (const child of below) keepGroups(rootFd, child, groups, kept)
}

function prune(
  rootFd: number,
  path: string,
  kept: ReadonlySet<string>,
  whiteouts: ReadonlyMap<string, readonly string[]>,
): void {
  const below: string[] = []
  inDirectory(rootFd, path, (fd) => {
    const before = statFd(fd)
    for (const name of namesIn(fd)) {
      const full = joined(path, name)
      const isTree = tryStatAt(fd, name)?.isDirectory === true
      if (kept.has(full)) {
        if (isTree) below.push(full)
      } else if (isTree) removeTree(fd, name)
      else unlink(fd, name)
    }
    for (const name of whiteouts.get(path) ?? []) makeNode(fd, name as ByteString, S_IFCHR, 0)
    setTimes(fd, '', before.atimeNs, before.mtimeNs)
  })
  for (const child of below) prune(rootFd, child, kept, whiteouts)
}

function inDirectory<T>(rootFd: number, path: string, use: (fd: number) => T): T {
  return withFd(openBeneath(rootFd, path as ByteString, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), use)
}

function isDirectory(rootFd: number, path: string): boolean {
  if (path === '') return true
  if (!isDirectory(rootFd, parentOf(path))) return false
  return inDirectory(rootFd, parentOf(path), (fd) => tryStatAt(fd, nameOf(path))?.isDirectory === true)
}

function namesIn(fd: number): ByteString[] {
  const names: ByteString[] = []
  readDirents(fd, (name) => names.push(name))
  return names
}

function isLinked(stat: Stat): boolean {
  return !stat.isDirectory && stat.nlink > 1
}

function inodeOf(stat: Stat): string {
  return String(stat.ino)
}

function parentOf(path: string): string {
  const slash = path.lastIndexOf('/')
  return slash < 0 ? '' : path.slice(0, slash)
}

function nameOf(path: string): ByteString {
  return path.slice(path.lastIndexOf('/') + 1) as ByteString
}

function joined(path: string, name: string): string {
  return path === '' ? name : `${path}/${name}`
}
