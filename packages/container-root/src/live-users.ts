import { readdirSync, readFileSync, readlinkSync } from 'node:fs'
import { AT_FDCWD, type ByteString, errnoOf, O_PATH, openat, readMountInfo, statFd, withFd } from '@lsync/posix'

/** A process that holds a mounted file system: it cannot be unmounted, or lives on, as long as it does. */
export interface LiveUser {
  readonly pid: number
  /** The name of its command (`/proc/PID/comm`). */
  readonly command: string
  /** By what it holds it: its root or working directory, an open file, or a mount of its own mount namespace. */
  readonly by: 'root' | 'working directory' | 'open file' | 'mount namespace'
}

/**
 * The processes that use a file system, by the device of its mount (`Mount.device`), in whatever mount namespace they are. A
 * file that is only mapped, after its descriptor was closed, is not seen; unmounting is refused then all the same.
 */
export function liveUsers(device: number): LiveUser[] {
  const users: LiveUser[] = []
  // Most processes share one mount namespace, whose mounts can be many.
  const byNamespace = new Map<string, ReadonlySet<number>>()
  const mountIds = (pid: number) => {
    const namespace = readlinkSync(`/proc/${pid}/ns/mnt`)
    const known = byNamespace.get(namespace)
    if (known !== undefined) return known
    const ids = mountIdsOf(pid, device)
    byNamespace.set(namespace, ids)
    return ids
  }
  const own = mountIds(process.pid)
  for (const name of readdirSync('/proc')) {
    const pid = Number(name)
    if (!Number.isInteger(pid) || pid === process.pid) continue
    try {
      const by = useOf(pid, mountIds(pid), own)
      if (by !== undefined) users.push({ pid, command: readFileSync(`/proc/${pid}/comm`, 'utf8').trim(), by })
    } catch (cause) {
      // Gone meanwhile, a kernel thread, or of another user.
      if (errnoOf(cause) === undefined) throw cause
    }
  }
  return users
}

function useOf(pid: number, ids: ReadonlySet<number>, own: ReadonlySet<number>): LiveUser['by'] | undefined {
  if (ids.size === 0) return undefined
  if (ids.has(mountIdAt(`/proc/${pid}/root`))) return 'root'
  if (ids.has(mountIdAt(`/proc/${pid}/cwd`))) return 'working directory'
  // Files of an overlay have the device numbers of their layers, so the mount tells.
  for (const fd of readdirSync(`/proc/${pid}/fdinfo`)) {
    const [, id] = /^mnt_id:\s*(\d+)$/m.exec(fdInfo(pid, fd)) ?? []
    if (id !== undefined && ids.has(Number(id))) return 'open file'
  }
  return [...ids].some((id) => !own.has(id)) ? 'mount namespace' : undefined
}

function mountIdsOf(pid: number, device: number): Set<number> {
  return new Set(
    readMountInfo(pid)
      .filter((mount) => mount.device === device)
      .map(({ mountId }) => mountId),
  )
}

function mountIdAt(path: string): number {
  return withFd(openat(AT_FDCWD, path as ByteString, O_PATH), (fd) => statFd(fd).mountId)
}

function fdInfo(pid: number, fd: string): string {
  try {
    return readFileSync(`/proc/${pid}/fdinfo/${fd}`, 'latin1')
  } catch (cause) {
    if (errnoOf(cause) === 'ENOENT') return ''
    throw cause
  }
}
