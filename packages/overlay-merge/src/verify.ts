import { tmpdir } from 'node:os'
import {
  AT_FDCWD,
  close,
  createFileSystem,
  createOverlay,
  DT_DIR,
  DT_REG,
  DT_UNKNOWN,
  errnoOf,
  type HostPath,
  hostPath,
  type MountOptions,
  makeDirectory,
  mountOverlay,
  type OverlayStack,
  openBeneath,
  openRoot,
  randomHex,
  removeDirectory,
  statAt,
  unmount,
  withFd,
} from '@lsync/posix'
import { isRemote } from './clone-method.ts'
import { type ComparableTree, type Comparison, compareTrees, OpenTree, ResolvedTree } from './compare.ts'
import type { Namespace } from './model/marks.ts'
import { type EntryPath, join, ROOT } from './model/path.ts'
import { protectedFlags } from './plan.ts'
import type { Progress } from './planning.ts'
import { closeLayer, openLayer, openLayerDirectory, sortedDirents, typeOf } from './scan.ts'
import { closeStack, openStack } from './stack.ts'

/** A stack, and the tree that should be what it shows. */
export interface VerifyRequest {
  /** Top first; the first may be an upper. One layer alone is fine. */
  readonly layers: readonly HostPath[]
  /** Data-only lowers. */
  readonly data?: readonly HostPath[]
  readonly namespace?: Namespace
  /** The tree that is compared with the view. */
  readonly against: HostPath
  /** `against` is itself a layer (or layers, top first, with `againstLowers`): what a mount of it shows is compared. */
  readonly asLayer?: boolean
  /** What lies beneath `against` when it is a layer. */
  readonly againstLowers?: readonly HostPath[]
  /** The workdir of the first layer: it is then mounted (read-only) as an upper, as index=on needs. */
  readonly workdir?: HostPath
  /** Further mount options, such as `{ index: 'on', xino: 'off' }`. */
  readonly options?: MountOptions
  /** Times within one grain are equal, for results on file systems with coarse times. Default 1n. */
  readonly timeGranularityNs?: bigint
  /** How many differences are given. Default 1,000. */
  readonly limit?: number
  /** `resolver`: do not mount, read the layers as the merge does. Default: mount, and resolve only without privilege. */
  readonly by?: 'mount' | 'resolver'
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: Progress) => void
}

/** What comparing a view with a tree gave. `expected` is the view, `actual` the tree. */
export interface VerifyReport extends Comparison {
  /** Who said what the stack shows: the kernel by a mount, or lsync's own resolver, which shares code with the merge. */
  readonly by: 'mount' | 'resolver'
  /** Why the kernel was not asked. */
  readonly why?: string
  readonly elapsedMs: number
}

/**
 * Mounts a stack read-only, in no one's sight, and compares everything that it shows with a tree: type, mode, owner,
 * size, content, mtime to the ns, attributes, ACLs, capabilities, device numbers, link groups, symlink targets, chattr
 * flags `i` and `a`, and whether a file that has holes still has some (not where a result lies on FUSE or a network file
 * system, which cannot tell). Nothing is followed and nothing is written, the layers included. Access times and inode
 * numbers are not compared.
 * @throws {PosixError} when the kernel does not mount the stack for another reason than privilege
 */
export async function verify(request: VerifyRequest): Promise<VerifyReport> {
  const start = performance.now()
  const opened: (() => void)[] = []
  try {
    const { expected, actual, by, why } = openTrees(request, opened)
    const comparison = await compareTrees(expected, actual, {
      signal: request.signal,
      ...(request.limit === undefined ? {} : { limit: request.limit }),
      ...(request.timeGranularityNs === undefined ? {} : { timeGranularityNs: request.timeGranularityNs }),
      flags: true,
      holes: !withFd(openRoot(request.against), isRemote),
      onProgress: (done) => request.onProgress?.({ phase: 'verify', done }),
    })
    return { ...comparison, by, ...(why === undefined ? {} : { why }), elapsedMs: performance.now() - start }
  } finally {
    for (const release of opened.reverse()) release()
  }
}

interface Trees {
  readonly expected: ComparableTree<unknown>
  readonly actual: ComparableTree<unknown>
  readonly by: 'mount' | 'resolver'
  readonly why?: string
}

function openTrees(request: VerifyRequest, opened: (() => void)[]): Trees {
  const against = [request.against, ...(request.againstLowers ?? [])]
  const isLayer = request.asLayer === true || against.length > 1
  if (request.by !== 'resolver') {
    try {
      const expected = new OpenTree(mountedRoot(request.layers, request, opened), emulatedFlags(request))
      const { workdir: _, ...plain } = request
      const actual = isLayer ? new OpenTree(mountedRoot(against, plain, opened)) : rawTree(request.against, opened)
      return { expected, actual, by: 'mount' }
    } catch (error) {
      if (errnoOf(error) !== 'EPERM' || request.by === 'mount') throw error
      const trees = resolvedTrees(request, against, isLayer, opened)
      return { ...trees, why: 'mounting needs CAP_SYS_ADMIN' }
    }
  }
  return { ...resolvedTrees(request, against, isLayer, opened), why: 'asked for' }
}

function resolvedTrees(request: VerifyRequest, against: readonly HostPath[], isLayer: boolean, opened: (() => void)[]) {
  const expected = resolvedTree(request.layers, request, opened)
  const actual = isLayer ? resolvedTree(against, request, opened) : rawTree(request.against, opened)
  return { expected, actual, by: 'resolver' as const }
}

function rawTree(path: HostPath, opened: (() => void)[]): OpenTree {
  const fd = openRoot(path)
  opened.push(() => close(fd))
  return new OpenTree(fd)
}

function resolvedTree(
  layers: readonly HostPath[],
  request: Pick<VerifyRequest, 'data' | 'namespace'>,
  opened: (() => void)[],
): ResolvedTree {
  const [upper, ...lowers] = layers
  const stack = openStack({ ...request, upper: upper as HostPath, lowers }, false)
  opened.push(() => closeStack(stack))
  return new ResolvedTree(stack)
}

function mountedRoot(
  layers: readonly HostPath[],
  request: Pick<VerifyRequest, 'data' | 'namespace' | 'options' | 'workdir'>,
  opened: (() => void)[],
): number {
  const fd = mountForReading({ ...request, layers }, opened)
  opened.push(() => close(fd))
  return fd
}

/**
 * The flags (chattr) that the first layer emulates, by path. The kernel shows them only where it is mounted as an upper,
 * which takes its workdir; so without one, the layer itself is asked.
 */
export function emulatedFlags({ layers, workdir, namespace }: ReadOnlyStack): ReadonlyMap<EntryPath, number> {
  const flags = new Map<EntryPath, number>()
  if (workdir !== undefined) return flags
  const layer = openLayer(layers[0] as HostPath, namespace ?? 'trusted')
  try {
    const pending: EntryPath[] = [ROOT]
    for (let path = pending.pop(); path !== undefined; path = pending.pop()) {
      const current = path
      withFd(openLayerDirectory(layer, current), (fd) => {
        for (const { name, type } of sortedDirents(fd)) {
          const kind = type === DT_UNKNOWN ? typeOf(statAt(fd, name)) : type
          if (kind === DT_DIR) pending.push(join(current, name))
          else if (kind !== DT_REG) continue
          const found = protectedFlags(fd, name, [layer.marks.protattr], layer.marks)
          if (found !== 0) flags.set(join(current, name), found)
        }
      })
    }
  } finally {
    closeLayer(layer)
  }
  return flags
}

/** What `mountForReading` mounts. */
export interface ReadOnlyStack {
  readonly layers: readonly HostPath[]
  readonly data?: readonly HostPath[]
  readonly namespace?: Namespace
  readonly options?: MountOptions
  readonly workdir?: HostPath
}

/**
 * Mounts layers read-only where nobody sees them, following redirects and metacopies where the namespace has them, and
 * gives the root's fd. The mount is gone once the fd is closed; `opened` gets what else is to be released after it.
 */
export function mountForReading(request: ReadOnlyStack, opened: (() => void)[]): number {
  const { layers, workdir, data = [] } = request
  const upper = workdir === undefined ? undefined : layers[0]
  const lowers: (HostPath | number)[] = layers.slice(upper === undefined ? 0 : 1)
  // Without an upper the kernel asks for two layers.
  if (upper === undefined && lowers.length === 1 && data.length === 0) lowers.push(emptyLayer(opened))
  const follow: MountOptions =
    request.namespace === 'user' ? { userxattr: true } : { redirect_dir: 'on', metacopy: 'on' }
  const stack: OverlayStack = {
    lowers,
    dataLowers: data,
    upper,
    work: workdir,
    options: { ...follow, ...(upper === undefined ? {} : { index: 'off' }), ...request.options },
    readOnly: true,
  }
  let root: number
  try {
    root = createOverlay(stack)
  } catch (error) {
    if (errnoOf(error) !== 'ENOSYS') throw error
    root = mountAndHide(stack)
  }
  try {
    // What fsmount gives can only be walked from (O_PATH); reading its entries needs a real fd.
    return openBeneath(root, '', 0)
  } finally {
    close(root)
  }
}

function emptyLayer(opened: (() => void)[]): number | HostPath {
  try {
    const fd = createFileSystem('tmpfs', undefined, { mode: '755' })
    opened.push(() => close(fd))
    if (takesDetachedLayers(fd)) return fd
  } catch (error) {
    if (errnoOf(error) !== 'ENOSYS') throw error
  }
  const path = temporaryName()
  makeDirectory(AT_FDCWD, path, 0o755)
  opened.push(() => removeDirectory(AT_FDCWD, path))
  return path
}

let detached: boolean | undefined

// Layers from a mount that is mounted nowhere: from Linux 6.15 on.
function takesDetachedLayers(empty: number): boolean {
  if (detached === undefined) {
    try {
      const other = createFileSystem('tmpfs', undefined, { mode: '755' })
      try {
        close(createOverlay({ lowers: [empty, other], readOnly: true }))
      } finally {
        close(other)
      }
      detached = true
    } catch (error) {
      if (!['EINVAL', 'ESTALE', 'ENOSYS'].includes(errnoOf(error) ?? '')) throw error
      detached = false
    }
  }
  return detached
}

// Without the newer mount API: mounted for a moment, then kept alive by its fd alone.
function mountAndHide(stack: OverlayStack): number {
  const at = temporaryName()
  makeDirectory(AT_FDCWD, at, 0o700)
  try {
    mountOverlay(stack, at)
    try {
      return openRoot(at)
    } finally {
      unmount(at, { lazy: true })
    }
  } finally {
    removeDirectory(AT_FDCWD, at)
  }
}

function temporaryName(): HostPath {
  return hostPath(`${tmpdir()}/.lsync-verify-${randomHex(8)}`)
}
