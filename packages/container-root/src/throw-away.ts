import { removeTree } from '@lsync/overlay-merge'
import { type ByteString, errnoOf, randomHex, rename } from '@lsync/posix'
import { namesIn } from './directory.ts'

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
  for (const name of namesIn(fd)) if (name.startsWith(GONE)) throwAway(fd, name)
}
