import { removeTree } from '@lsync/overlay-merge'
import { type ByteString, errnoOf, randomHex, readDirents, rename } from '@lsync/posix'

const GONE = 'gone-'

/**
 * Removes a tree: first its name, so that nobody takes half of it for all, then its content, in `toFd` (default: where it is). What a
 * crash leaves has a name that says so; `sweepGone` removes it. Fine if it is not there.
 */
export function throwAway(fromFd: number, name: ByteString, toFd = fromFd): void {
  const gone = `${GONE}${randomHex(8)}` as ByteString
  try {
    rename(fromFd, name, toFd, gone)
  } catch (cause) {
    if (errnoOf(cause) === 'ENOENT') return
    throw cause
  }
  removeTree(toFd, gone)
}

/** Removes what earlier removals left in a directory, under names of its own each, since two may sweep at once. */
export function sweepGone(fd: number): void {
  const left: ByteString[] = []
  readDirents(fd, (name) => (name.startsWith(GONE) ? left.push(name) : 0))
  for (const name of left) throwAway(fd, name)
}
