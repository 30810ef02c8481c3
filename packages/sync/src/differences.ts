import { readXattrs } from '@lsync/overlay-merge'
import { type ByteString, listsAcls, rawStatFd, tryRawStatAt, withFd } from '@lsync/posix'
import { metaHashOf } from './content.ts'
import { tryOpenDirectory } from './describe.ts'
import type { NamePlace } from './model/index-change.ts'
import type { TreePath } from './model/operation.ts'
import type { Row } from './model/row.ts'
import { isUnchangedRow } from './planner.ts'
import { rowOf } from './send.ts'

/** What lies under a name, as far as it matters to whoever lays one layer over another. */
export type NameKind = 'nothing' | 'whiteout' | 'directory' | 'other'

/** A name that the upper has otherwise than the target. What lies in a directory that the target lacks is not named. */
export interface Difference {
  readonly path: TreePath
  /** What the target has. */
  readonly had: NameKind
  /** What the upper has. */
  readonly has: NameKind
  /** It is the inode that was carried over. */
  readonly isSameInode: boolean
  /** That, with the attributes that it had then, marks of overlayfs among them. */
  readonly hasSameAttributes: boolean
}

/** All of a comparison, while nothing changes the upper and nothing is carried over. */
export interface Differences {
  /** In path order. */
  readonly names: readonly Difference[]
  /** The target has nothing but its root. */
  readonly isTargetEmpty: boolean
}

/** What differences are described from. */
export interface DifferenceRequest {
  readonly upperFd: number
  /** Names that are not as the index says; in directories that are where it says. */
  readonly places: readonly NamePlace[]
  readonly index: {
    row(directory: number, name: ByteString): Row | undefined
    pathOf(id: number): TreePath | undefined
  }
  /** Which attributes a target gets. */
  readonly keeps: (attribute: ByteString) => boolean
}

const EMPTY = '' as ByteString

/** Looks at names that may differ; in path order. @throws {PosixError} for what cannot be looked at */
export function describeDifferences({ upperFd, places, index, keeps }: DifferenceRequest): readonly Difference[] {
  const acls = listsAcls(upperFd)
  const byDirectory = new Map<number, ByteString[]>()
  for (const { directory, name } of places) {
    const names = byDirectory.get(directory)
    if (names === undefined) byDirectory.set(directory, [name])
    else names.push(name)
  }
  const found: Difference[] = []
  const look = (directory: number, name: ByteString, path: TreePath, fd: number) => {
    const row = index.row(directory, name)
    const words = name === EMPTY ? rawStatFd(fd) : tryRawStatAt(fd, name)
    const seen = words === undefined ? undefined : rowOf(name, words)
    const [had, has] = [kindOf(row), kindOf(seen)]
    // One inode stands for many whiteouts, and its change time says nothing of this one.
    if (had === has && (had === 'nothing' || had === 'whiteout')) return
    const isSameInode = row !== undefined && seen?.identity === row.identity && seen.type === row.type
    if (isSameInode && isUnchangedRow(row, seen as Row)) return
    const hasSameAttributes =
      isSameInode &&
      metaHashOf(readXattrs(fd, name, keeps, acls).map((one) => [one.name, one.value] as const)) === row.metaHash
    found.push({ path, had, has, isSameInode, hasSameAttributes })
  }
  for (const [directory, names] of byDirectory) {
    if (directory === 0) {
      look(0, EMPTY, EMPTY, upperFd)
      continue
    }
    const path = index.pathOf(directory)
    if (path === undefined) continue
    // One that is gone is a difference of the one above it.
    const fd = tryOpenDirectory(upperFd, path)
    if (fd === undefined) continue
    withFd(fd, () => {
      for (const name of names) look(directory, name, (path === '' ? name : `${path}/${name}`) as TreePath, fd)
    })
  }
  return found.sort((one, other) => (one.path < other.path ? -1 : one.path > other.path ? 1 : 0))
}

function kindOf(row: Row | undefined): NameKind {
  if (row === undefined) return 'nothing'
  return row.isDirectory ? 'directory' : row.isWhiteout ? 'whiteout' : 'other'
}
