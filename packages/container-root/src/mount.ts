import { isMark, MARKS, type Namespace, readXattrs, writeMeta } from '@lsync/overlay-merge'
import {
  type ByteString,
  errnoOf,
  type Mount,
  type MountOptions,
  mountOverlay,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_PATH,
  openat,
  openRoot,
  overlayUsers,
  readMountInfo,
  statFd,
  syncFileSystem,
  unmount,
  upperUse,
  withFd,
} from '@lsync/posix'
import type { OpenedLayer } from './layer-cache.ts'
import { liveUsers } from './live-users.ts'
import { type NodeRoot, RootBusyError } from './node-state.ts'

/**
 * How roots are mounted. An index would keep a part of the upper in the work directory, where it would not become part of a
 * layer, so there is none. `volatile` never: what was synced must be there after a power cut.
 */
const BEST: Readonly<Record<Namespace, MountOptions>> = {
  trusted: { redirect_dir: 'on', metacopy: 'on', xino: 'auto', index: 'off' },
  user: { userxattr: true, xino: 'auto', index: 'off' },
}
/** What kernels before 4.19 or 4.17 do not know, or a mount refuses, in the order in which it can be done without. */
const DISPENSABLE = ['metacopy', 'xino', 'redirect_dir'] as const

/** The overlay of a root as it is mounted. */
export interface MountedOverlay {
  readonly device: number
  /** The options that it was mounted with, as the kernel shows them. */
  readonly options: readonly string[]
}

/** The mount on a root's `merged`; `undefined` where there is none. */
export function findMount({ mergedPath }: NodeRoot): MountedOverlay | undefined {
  const mount = readMountInfo().findLast(({ target, type }) => target === mergedPath && type === 'overlay')
  if (mount === undefined) return undefined
  const isLayer = (name: string) => /^(?:lowerdir|datadir)\+?$|^(?:upper|work)dir$/.test(name)
  const options = mount.superOptions.flatMap(({ name, value }) =>
    isLayer(name) ? [] : [value === undefined ? name : `${name}=${value}`],
  )
  return { device: mount.device, options: [...mount.options, ...options] }
}

/** Mounts the upper of a root on layers, top first (fds, which the caller closes). */
export function mountRoot(root: NodeRoot, lowers: readonly number[], namespace: Namespace): void {
  // A plain stack of two layers is needed where the kernel wants one lower at least, and one is always there.
  root.makeWork()
  const upper = openat(root.fd, 'upper' as ByteString, O_PATH | O_DIRECTORY | O_NOFOLLOW)
  withFd(upper, () =>
    withFd(openat(root.fd, 'work' as ByteString, O_PATH | O_DIRECTORY | O_NOFOLLOW), (work) => {
      let options: MountOptions = BEST[namespace]
      for (const dispensable of [...DISPENSABLE, undefined]) {
        try {
          mountOverlay({ lowers, upper, work, options }, root.mergedPath)
          return
        } catch (cause) {
          if (errnoOf(cause) !== 'EINVAL' || dispensable === undefined) throw cause
          options = Object.fromEntries(Object.entries(options).filter(([name]) => name !== dispensable))
        }
      }
    }),
  )
}

/**
 * Unmounts a root, and makes sure that no process anywhere uses it any more. What was written is on the disk then. Mount namespaces
 * that only have a copy of the mount (each one that is made gets one) keep nobody waiting: who has one and uses it is found.
 * @throws {RootBusyError} naming the processes that use it
 */
export function unmountRoot(root: NodeRoot): void {
  const mounted = findMount(root)
  if (mounted !== undefined) {
    // Before it is gone: a container in a mount namespace of its own would go on without it.
    assertNoUsers(root, mounted.device)
    withFd(openRoot(root.mergedPath), (fd) => syncFileSystem(fd, root.mergedPath))
    try {
      unmount(root.mergedPath)
    } catch (cause) {
      if (errnoOf(cause) !== 'EBUSY') throw cause
      assertNoUsers(root, mounted.device)
      throw new RootBusyError(root.mergedPath, 'something in the kernel uses it')
    }
  }
  assertUnused(root)
}

/** No process uses an overlay that has this root's upper, in whatever mount namespace. */
function assertUnused(root: NodeRoot): void {
  if (!root.has('upper')) return
  for (let isSeen = false; !isSeen && upperUse(root.upperPath) === 'in use'; ) {
    isSeen = true
    for (const { role, pid, target } of overlayUsers(root.upperPath).uses) {
      if (role !== 'upper') continue
      const mounts = mountsOf(pid)
      // It stood for its whole mount namespace, which others may be in.
      if (mounts === undefined) isSeen = false
      const mount = mounts?.findLast((one) => one.target === target)
      if (mount !== undefined) assertNoUsers(root, mount.device)
    }
  }
}

/** The mounts of a process; `undefined` once it has ended. */
function mountsOf(pid: number): readonly Mount[] | undefined {
  try {
    return readMountInfo(pid)
  } catch (cause) {
    const code = errnoOf(cause)
    if (code === 'ENOENT' || code === 'ESRCH' || code === 'EINVAL') return undefined
    throw cause
  }
}

function assertNoUsers(root: NodeRoot, device: number): void {
  const users = liveUsers(device).filter(({ by }) => by !== 'mount namespace')
  if (users.length === 0) return
  const named = users.slice(0, 5).map(({ pid, command, by }) => `${command} (${pid}) by its ${by}`)
  const more = users.length > named.length ? ` and ${users.length - named.length} more` : ''
  throw new RootBusyError(root.mergedPath, `${named.join(', ')}${more}`)
}

/** Gives an empty upper the metadata of the root directory that it will hide: owner, mode, attributes, times. */
export function copyRootMeta(from: number, to: number, namespace: Namespace): void {
  const stat = statFd(from)
  const xattrs = readXattrs(from, '', (name) => !isMark(name, MARKS[namespace]))
  const { permissions: mode, uid, gid, atimeNs, mtimeNs } = stat
  writeMeta(to, '', 'directory', { mode, uid, gid, atimeNs, mtimeNs, xattrs }, {})
}

/** Opens the layers of a mount, and closes them afterwards. */
export function withLayers<T>(open: readonly (() => OpenedLayer)[], use: (fds: readonly number[]) => T): T {
  const opened: OpenedLayer[] = []
  try {
    for (const one of open) opened.push(one())
    return use(opened.map(({ fd }) => fd))
  } finally {
    for (const one of opened) one.close()
  }
}
