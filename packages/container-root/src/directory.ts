import {
  type ByteString,
  close,
  errnoOf,
  fsync,
  makeDirectory,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_RDONLY,
  openat,
  randomHex,
  readDirents,
  statFd,
  tryLock,
  tryStatAt,
} from '@lsync/posix'

export const DIRECTORY_FLAGS = O_RDONLY | O_DIRECTORY | O_NOFOLLOW

/** Whether a directory belongs to the user that lsync runs as, and nobody else could write it. */
export function isOursAlone(fd: number): boolean {
  const stat = statFd(fd)
  return stat.uid === process.geteuid?.() && (stat.mode & 0o022) === 0
}

/** The names in a directory, sorted. */
export function namesIn(fd: number): ByteString[] {
  const names: ByteString[] = []
  readDirents(fd, (name) => names.push(name))
  return names.sort()
}

/** Opens a directory beneath another; `undefined` where nothing is there. */
export function tryOpenDirectory(fd: number, name: ByteString): number | undefined {
  try {
    return openat(fd, name, DIRECTORY_FLAGS)
  } catch (cause) {
    if (errnoOf(cause) === 'ENOENT') return undefined
    throw cause
  }
}

/** Makes a directory where it is missing, durably. Another process may do so at the same time. */
export function ensureDirectory(fd: number, name: ByteString): void {
  if (tryStatAt(fd, name) !== undefined) return
  try {
    makeDirectory(fd, name, 0o700)
  } catch (cause) {
    if (errnoOf(cause) !== 'EEXIST') throw cause
  }
  fsync(fd, name)
}

/** Makes a directory under a name that begins with `prefix`, and locks it: an fd, and the lock lasts as long as it is open. */
export function makeLocked(fd: number, prefix: string): { readonly fd: number; readonly name: ByteString } {
  for (;;) {
    const name = `${prefix}${randomHex(8)}` as ByteString
    makeDirectory(fd, name, 0o700)
    const made = tryOpenDirectory(fd, name)
    if (made === undefined) continue
    // Whoever sweeps what nobody has locked may have come before.
    if (tryLock(made, 'exclusive') && tryStatAt(fd, name) !== undefined) return { fd: made, name }
    close(made)
  }
}
