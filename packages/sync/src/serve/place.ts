import {
  AT_FDCWD,
  type ByteString,
  close,
  errnoOf,
  type HostPath,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_PATH,
  O_RDONLY,
  openat,
  openRoot,
  withFd,
} from '@lsync/posix'
import type { Checkpoint } from '../model/checkpoint.ts'
import { assertBeneath } from '../protocol/operation-codec.ts'
import { TargetPlace } from '../target-state.ts'
import { ServedPathError } from './errors.ts'

// The state of a target lies beside it under such a name, and is nobody's target.
const STATE = /^\.lsync[.-]/

/**
 * Opens the target that a client names beneath the directory that is served, and makes it if only it is missing. No
 * symlink is followed at any component, since what lies there may be written by those whom the client serves; mount
 * points are entered, since only the host's administrator can place them.
 */
export function openServed(root: HostPath, path: ByteString, create: boolean): TargetPlace {
  if (path === '') return TargetPlace.open(root, { create: false })
  return withParent(root, path, (fd, name) =>
    // What is made in it is made durable through it, which O_PATH does not allow.
    withFd(openat(fd, '.' as ByteString, O_RDONLY | O_DIRECTORY), (parentFd) =>
      TargetPlace.openAt(parentFd, name, pathOf(root, path), () => find(root, path), { create }),
    ),
  )
}

function find(root: HostPath, path: ByteString): number {
  return withParent(root, path, (fd, name) => openat(fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW))
}

/** What that target holds durably; changes nothing. */
export function peekServed(root: HostPath, path: ByteString): Checkpoint | undefined {
  if (path !== '') return withParent(root, path, (fd, name) => TargetPlace.peek(fd, name, pathOf(root, path)))
  const slash = root.lastIndexOf('/')
  const name = (root.slice(slash + 1) || '.') as ByteString
  const parent = (root.slice(0, slash) || '/') as HostPath
  return withFd(openRoot(parent, O_PATH), (fd) => TargetPlace.peek(fd, name, root))
}

function pathOf(root: HostPath, path: ByteString): HostPath {
  return `${root === '/' ? '' : root}/${path}` as HostPath
}

function withParent<T>(root: HostPath, path: ByteString, use: (parentFd: number, name: ByteString) => T): T {
  assertBeneath(path)
  const names = path.split('/') as ByteString[]
  if (names.some((name) => STATE.test(name))) throw new ServedPathError(path, 'such names belong to lsync itself')
  const last = names.pop() as ByteString
  let fd = openat(AT_FDCWD, root, O_PATH | O_DIRECTORY)
  try {
    for (const name of names) {
      const next = openat(fd, name, O_PATH | O_DIRECTORY | O_NOFOLLOW)
      close(fd)
      fd = next
    }
    return use(fd, last)
  } catch (error) {
    const why = REASONS[errnoOf(error) ?? '']
    throw why === undefined ? error : new ServedPathError(path, why)
  } finally {
    close(fd)
  }
}

const REASONS: Readonly<Record<string, string>> = {
  ENOENT: 'a directory on the way to it does not exist',
  ENOTDIR: 'a part of it is no directory, or a symlink',
  ELOOP: 'a part of it is a symlink',
  EACCES: 'this user may not go there',
}
