import {
  type ByteString,
  errnoOf,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_PATH,
  openBeneath,
  readSymlink,
  S_IFLNK,
  type Stat,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import type { Operation, RawMeta, TreePath } from '../model/operation.ts'
import { placeOf } from '../target-path.ts'
import { AccessRefusedError } from './errors.ts'
import type { Guard } from './lane.ts'

/**
 * Lets operations pass that add names and nothing else. One that finds what it would make, as after a connection that
 * was lost, is done. Whether a name is free is decided by the applier (`onlyNew`), when it gives the name.
 */
export function appendOnly(rootFd: number): Guard {
  return (operation) => {
    switch (operation.do) {
      case 'directory':
        return 'go'
      case 'meta':
        if (operation.kind === 'directory') return 'go'
        return look(rootFd, operation.path, (stat) => {
          if (stat === undefined || !hasMeta(stat, operation.meta)) refuse(operation, 'changing what is there')
          return 'done'
        })
      case 'file':
        return look(rootFd, operation.path, (stat) => {
          if (stat === undefined) return 'go'
          const isSame = stat.isFile && stat.sizeBytes === operation.sizeBytes && hasMeta(stat, operation.meta)
          return isSame ? 'done' : refuse(operation, 'changing what is there')
        })
      case 'symlink':
        return look(rootFd, operation.path, (stat, dirfd, name) => {
          if (stat === undefined) return 'go'
          const isSame = stat.type === S_IFLNK && readSymlink(dirfd, name) === operation.target
          return isSame ? 'done' : refuse(operation, 'changing what is there')
        })
      case 'special':
        return look(rootFd, operation.path, (stat) => {
          if (stat === undefined) return 'go'
          const isSame = stat.type === operation.type && stat.rdev === operation.rdev
          return isSame ? 'done' : refuse(operation, 'changing what is there')
        })
      case 'link':
        // The applier sees whether the name is a link to the same inode already.
        return 'go'
      case 'remove':
        return look(rootFd, operation.path, (stat) => (stat === undefined ? 'done' : refuse(operation, 'removing')))
      case 'keep':
        return refuse(operation, 'removing')
      case 'patch':
        return refuse(operation, 'changing what is there')
      case 'out':
      case 'in':
      case 'rename':
        return refuse(operation, 'renaming')
    }
  }
}

function refuse(operation: Operation, what: string): never {
  throw new AccessRefusedError(operation.do === 'rename' ? operation.from : operation.path, 'append-only', what)
}

function hasMeta(stat: Stat, { mode, uid, gid, mtimeNs }: RawMeta): boolean {
  return stat.permissions === mode && stat.uid === uid && stat.gid === gid && stat.mtimeNs === mtimeNs
}

function look<T>(
  rootFd: number,
  path: TreePath,
  judge: (stat: Stat | undefined, dirfd: number, name: ByteString) => T,
): T {
  const { parent, name } = placeOf(path)
  let fd: number
  try {
    fd = openBeneath(rootFd, parent, O_PATH | O_DIRECTORY | O_NOFOLLOW)
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw error
    return judge(undefined, rootFd, name)
  }
  return withFd(fd, () => judge(tryStatAt(fd, name), fd, name))
}
