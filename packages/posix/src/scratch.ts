import { tmpdir } from 'node:os'
import { type ByteString, type HostPath, hostPath } from './bytes.ts'
import { readDirents } from './dirents.ts'
import { errnoOf } from './errors.ts'
import { makeDirectory, removeDirectory, unlink } from './links.ts'
import { attachMount, createFileSystem, unmount } from './mount.ts'
import { AT_FDCWD, O_DIRECTORY, O_NOFOLLOW, O_PATH, O_RDONLY, openat, withFd } from './open.ts'
import { randomHex } from './random.ts'
import { statAt } from './stat.ts'

/**
 * Runs `use` with the root of an empty tmpfs for the layers of a scratch overlay. It is mounted nowhere where the kernel
 * takes layers from such a place (6.15); else `use` runs again with the path `at` which it is mounted for the moment.
 */
export function withScratch<T>(use: (fd: number, at?: HostPath) => T): T {
  try {
    return withFd(scratchFileSystem(), (fd) => use(fd))
  } catch (cause) {
    // EINVAL from older kernels; ESTALE and ENOSYS from us where layers are passed as text or by mount(2).
    if (!['EINVAL', 'ESTALE', 'ENOSYS'].includes(errnoOf(cause) ?? '')) throw cause
  }
  const at = hostPath(`${tmpdir()}/.lsync-scratch-${randomHex(8)}`)
  makeDirectory(AT_FDCWD, at, 0o700)
  try {
    withFd(scratchFileSystem(), (mountFd) => attachMount(mountFd, at))
    try {
      return withFd(openat(AT_FDCWD, at, O_PATH | O_DIRECTORY), (fd) => use(fd, at))
    } finally {
      unmount(at, { lazy: true })
    }
  } finally {
    removeDirectory(AT_FDCWD, at)
  }
}

function scratchFileSystem(): number {
  return createFileSystem('tmpfs', undefined, { mode: '700' })
}

/**
 * Runs `use` with a new private directory beneath `dirfd` (its fd and its name), which is removed afterwards with all
 * that is in it, also after a failure.
 */
export function withScratchDirectory<T>(dirfd: number, use: (fd: number, name: ByteString) => T): T {
  const name = `.lsync-scratch-${randomHex(8)}` as ByteString
  makeDirectory(dirfd, name, 0o700)
  try {
    return withFd(openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (fd) => use(fd, name))
  } finally {
    removeTree(dirfd, name)
  }
}

// Scratch trees are shallow, so recursion and an fd a level will do.
function removeTree(dirfd: number, name: ByteString): void {
  if (!statAt(dirfd, name).isDirectory) {
    unlink(dirfd, name)
    return
  }
  withFd(openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (fd) => {
    const names: ByteString[] = []
    readDirents(fd, (entry) => names.push(entry))
    for (const entry of names) removeTree(fd, entry)
  })
  removeDirectory(dirfd, name)
}
