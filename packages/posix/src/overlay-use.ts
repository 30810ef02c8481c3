import { readdirSync, readlinkSync } from 'node:fs'
import type { ByteString, HostPath } from './bytes.ts'
import { errnoOf, PosixError } from './errors.ts'
import { makeDirectory } from './links.ts'
import { createOverlay, mountOverlay, type Place, unmount } from './mount.ts'
import { type LayerRole, type Mount, overlayLayers, pathOfFd, readMountInfo } from './mountinfo.ts'
import { AT_FDCWD, close, duplicate, O_DIRECTORY, O_PATH, openat, openInRoot, withFd } from './open.ts'
import { withScratch } from './scratch.ts'
import { type Stat, statFd, tryStatAt } from './stat.ts'

/** One live overlay that uses a directory. */
export interface OverlayUse {
  readonly role: LayerRole
  /** How the directory that was asked about lies to the layer. */
  readonly relation: 'is the layer' | 'is inside the layer' | 'contains the layer'
  /** The layer as the mount names it. */
  readonly layer: HostPath
  /** Where the overlay is mounted, as the process `pid` sees it. */
  readonly target: HostPath
  readonly pid: number
}

/** What was found, and what could not be looked at. */
export interface OverlayUsers {
  readonly uses: readonly OverlayUse[]
  /**
   * Layers whose path could not be opened in any root that was tried (relative, renamed, or of another root), or is `/`,
   * as that of a mount that is mounted nowhere.
   */
  readonly unresolved: readonly { readonly layer: HostPath; readonly target: HostPath; readonly pid: number }[]
  /** Processes whose mounts this process may not read. */
  readonly hiddenProcesses: number
}

/** One mount namespace, seen from one root directory in it. */
interface View {
  readonly pid: number
  readonly rootFd: number
  readonly mounts: readonly Mount[]
}

/**
 * Which live overlays, in any mount namespace that has a process, use a directory, an ancestor or a descendant of it.
 * Directories are compared by device and inode, never by name, and through bind mounts.
 *
 * Not seen: overlays that were lazily unmounted, that are mounted nowhere, or in namespaces without a process (for an
 * upper or work directory `isUpperInUse` sees those too). Source: overlay-format §9.
 */
export function overlayUsers(dir: Place): OverlayUsers {
  return overlayUsersOf([dir])[0] as OverlayUsers
}

/** As `overlayUsers`, for several directories, with one look at all processes. In the order of `dirs`. */
export function overlayUsersOf(dirs: readonly Place[]): OverlayUsers[] {
  const { views, hiddenProcesses } = openViews()
  try {
    return dirs.map((dir) => ({ ...findUses(dir, views), hiddenProcesses }))
  } finally {
    for (const { rootFd } of views) close(rootFd)
  }
}

function findUses(dir: Place, views: readonly View[]): Pick<OverlayUsers, 'uses' | 'unresolved'> {
  const uses: OverlayUse[] = []
  const unresolved: OverlayUsers['unresolved'][number][] = []
  const atlas = new Atlas(views)
  const asked = typeof dir === 'number' ? duplicate(dir) : openat(AT_FDCWD, dir, O_PATH | O_DIRECTORY)
  const askedChain = withFd(asked, (fd) => atlas.chainOf(fd))
  for (const { mount, seenBy } of overlaysIn(views)) {
    const [first] = seenBy
    // A container runtime names layers by the host's root, which the processes that see the mount may not have.
    const roots = new Set([...seenBy, ...views.filter(({ pid }) => pid === process.pid)])
    for (const { role, paths, mayBeNowhere } of overlayLayers(mount)) {
      const layer = paths[0] as HostPath
      const about = { layer, target: mount.target, pid: first.pid }
      // A sealed layer is mounted nowhere. Taken for the host's root, it would contain every directory of that; and where it
      // is the host's root, that is written to all the time anyway.
      const opened = mayBeNowhere === true ? [] : [...roots]
      const chains = opened.flatMap(({ rootFd }) => paths.flatMap((path) => atlas.chainOfPath(rootFd, path)))
      if (chains.length === 0) unresolved.push(about)
      const relation = chains.map((chain) => relationOf(askedChain, chain)).find((found) => found !== undefined)
      if (relation !== undefined) uses.push({ role, relation, ...about })
    }
  }
  return { uses, unresolved }
}

function relationOf(asked: readonly string[], layer: readonly string[]): OverlayUse['relation'] | undefined {
  if (asked[0] === layer[0]) return 'is the layer'
  if (asked.includes(layer[0] as string)) return 'is inside the layer'
  return layer.includes(asked[0] as string) ? 'contains the layer' : undefined
}

/** Every overlay once, with the views that see it; the device number of a superblock tells them apart. */
function overlaysIn(views: readonly View[]): { mount: Mount; seenBy: [View, ...View[]] }[] {
  const byDevice = new Map<number, { mount: Mount; seenBy: [View, ...View[]] }>()
  for (const view of views) {
    for (const mount of view.mounts) {
      if (mount.type !== 'overlay') continue
      const known = byDevice.get(mount.device)
      if (known === undefined) byDevice.set(mount.device, { mount, seenBy: [view] })
      else if (!known.seenBy.includes(view)) known.seenBy.push(view)
    }
  }
  return [...byDevice.values()]
}

/** This process's view first, then one for every other namespace and root that some process has. */
function openViews(): { views: View[]; hiddenProcesses: number } {
  const views: View[] = []
  const seen = new Set<string>()
  let hiddenProcesses = 0
  const others = readdirSync('/proc').filter((name) => /^\d+$/.test(name) && Number(name) !== process.pid)
  for (const pid of [process.pid, ...others.map(Number)]) {
    let rootFd: number | undefined
    try {
      const proc = `/proc/${pid}`
      const key = `${readlinkSync(`${proc}/ns/mnt`)} ${readlinkSync(`${proc}/root`, 'latin1')}`
      if (seen.has(key)) continue
      rootFd = openat(AT_FDCWD, `${proc}/root` as ByteString, O_PATH | O_DIRECTORY)
      views.push({ pid, rootFd, mounts: readMountInfo(pid) })
      seen.add(key)
    } catch (cause) {
      if (rootFd !== undefined) close(rootFd)
      const code = errnoOf(cause)
      if (code === 'EACCES' || code === 'EPERM') hiddenProcesses++
      // Gone meanwhile, a zombie, or a kernel thread.
      else if (code !== 'ENOENT' && code !== 'ESRCH' && code !== 'EINVAL') throw cause
    }
  }
  return { views, hiddenProcesses }
}

/** Knows every mount of every view, so that a directory's ancestors can be followed beyond the root of a bind mount. */
class Atlas {
  readonly #byId = new Map<number, Mount>()
  readonly #byDevice = new Map<number, { mount: Mount; view: View }[]>()

  constructor(views: readonly View[]) {
    for (const view of views) {
      for (const mount of view.mounts) {
        if (this.#byId.has(mount.mountId)) continue
        this.#byId.set(mount.mountId, mount)
        const same = this.#byDevice.get(mount.device)
        if (same === undefined) this.#byDevice.set(mount.device, [{ mount, view }])
        else same.push({ mount, view })
      }
    }
  }

  /** As `chainOf`, for a path as another process wrote it: no chain when it cannot be opened there. */
  chainOfPath(rootFd: number, path: HostPath): string[][] {
    // A relative path was meant from a working directory that nobody knows any more.
    if (!path.startsWith('/')) return []
    try {
      return [withFd(openInRoot(rootFd, path, O_PATH | O_DIRECTORY), (fd) => this.chainOf(fd))]
    } catch (cause) {
      if (errnoOf(cause) === undefined) throw cause
      return []
    }
  }

  /** A directory and its ancestors within its file system, nearest first, each as "device:inode". */
  chainOf(fd: number): string[] {
    const chain: string[] = []
    let at = duplicate(fd)
    try {
      let stat = statFd(at)
      for (;;) {
        chain.push(keyOf(stat))
        let above = openat(at, '..' as ByteString, O_PATH | O_DIRECTORY)
        let next = statFd(above)
        // Overlayfs does not look through mounts: what lies above a mount point is no ancestor in the layer.
        if (next.mountId !== stat.mountId || keyOf(next) === keyOf(stat)) {
          close(above)
          const aliased = this.#sameDirectoryElsewhere(stat)
          if (aliased === undefined) return chain
          close(at)
          at = aliased
          above = openat(at, '..' as ByteString, O_PATH | O_DIRECTORY)
          next = statFd(above)
        }
        close(at)
        at = above
        stat = next
      }
    } finally {
      close(at)
    }
  }

  /** The root of a bind mount, opened through a mount that shows more of the file system above it. */
  #sameDirectoryElsewhere(root: Stat): number | undefined {
    const mount = this.#byId.get(root.mountId)
    if (mount === undefined || mount.root === '/') return undefined
    for (const { mount: other, view } of this.#byDevice.get(mount.device) ?? []) {
      const prefix = other.root === '/' ? '/' : `${other.root}/`
      if (!mount.root.startsWith(prefix) || mount.root === other.root) continue
      // A mount root here would be one more bind mount, with the same question about what lies above it.
      const path = `${other.target}/${mount.root.slice(prefix.length)}` as HostPath
      try {
        const fd = openInRoot(view.rootFd, path, O_PATH | O_DIRECTORY)
        const stat = statFd(fd)
        if (keyOf(stat) === keyOf(root) && !stat.isMountRoot) return fd
        close(fd)
      } catch (cause) {
        if (errnoOf(cause) === undefined) throw cause
      }
    }
    return undefined
  }
}

function keyOf(stat: Stat): string {
  return `${stat.dev}:${stat.ino}`
}

/** What the scratch overlay said: see `upperUse`. */
export type UpperUse = 'in use' | 'free' | { readonly unknown: string }

/**
 * Whether a live overlay uses a directory, or an ancestor of it, as upper or work directory: in any mount namespace,
 * lazily unmounted or renamed since included. The kernel itself is asked: a scratch overlay with index=on is made over
 * the directory, mounted nowhere and gone at once; nothing is written into the directory.
 *
 * Blind to use as a lower, and to an upper *inside* the directory. Unknown where the file system has no file handles
 * (index falls back to off), or without the privilege to mount. Source: overlay-format §9.
 */
export function upperUse(dir: Place): UpperUse {
  return useOf([dir])
}

/**
 * Whether `upperUse` is known to be `free` for each of some directories, by one question about all of them: the kernel
 * takes some ms to end a mount. After `false`, ask about each.
 */
export function areUppersFree(dirs: readonly Place[]): boolean {
  return useOf(dirs) === 'free'
}

// 'in use' and `unknown` are true of at least one of them, 'free' of all.
function useOf(dirs: readonly Place[]): UpperUse {
  const fds: number[] = []
  for (const dir of dirs) {
    try {
      fds.push(typeof dir === 'number' ? duplicate(dir) : openat(AT_FDCWD, dir, O_PATH | O_DIRECTORY))
    } catch (cause) {
      for (const fd of fds) close(fd)
      throw cause
    }
  }
  try {
    return withScratch((scratchFd, at) => probeUse(fds, scratchFd, at))
  } catch (cause) {
    const code = errnoOf(cause)
    if (code === 'EBUSY') return 'in use'
    if (code === undefined) throw cause
    return { unknown: (cause as Error).message }
  } finally {
    for (const fd of fds) close(fd)
  }
}

/** As `upperUse`, but what cannot be told is a failure (ENOTSUP), so that "no" is always an answer. */
export function isUpperInUse(dir: Place): boolean {
  const use = upperUse(dir)
  if (typeof use === 'string') return use === 'in use'
  throw new PosixError('ENOTSUP', {
    syscall: 'overlay probe',
    path: typeof dir === 'number' ? pathOfFd(dir) : dir,
    reason: use.unknown,
    hint: 'make sure that no overlay uses the directory',
  })
}

function probeUse(dirs: readonly number[], scratchFd: number, at: HostPath | undefined): UpperUse {
  const open: number[] = []
  const scratch = (name: string) => {
    makeDirectory(scratchFd, name as ByteString, 0o700)
    const fd = openat(scratchFd, name as ByteString, O_PATH | O_DIRECTORY)
    open.push(fd)
    return fd
  }
  try {
    const [empty, upper, work] = [scratch('empty'), scratch('upper'), scratch('work')] as const
    const options = { index: 'on', redirect_dir: 'nofollow', metacopy: 'off' }
    const stack = { lowers: [...dirs, empty], upper, work, options }
    if (at === undefined) open.push(createOverlay(stack))
    else {
      makeDirectory(scratchFd, 'merged' as ByteString, 0o700)
      mountOverlay(stack, `${at}/merged` as HostPath)
      unmount(`${at}/merged` as HostPath)
    }
    // The kernel turns the index off by itself where it cannot have one, and then only warns of a layer in use.
    if (tryStatAt(work, 'index' as ByteString) === undefined) return { unknown: 'the file system has no file handles' }
    return 'free'
  } finally {
    for (const fd of open) close(fd)
  }
}
