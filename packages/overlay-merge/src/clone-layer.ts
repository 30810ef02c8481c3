import {
  close,
  type HostPath,
  makeDirectory,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_RDONLY,
  openat,
  openRoot,
  syncFileSystem,
  tryStatAt,
} from '@lsync/posix'
import {
  type CloneContext,
  type CloneMethod,
  cloneDirectory,
  emptyClonePart,
  leaveOutNothing,
  protect,
} from './clone.ts'
import { cloneMethods, isSnapshot, snapshotTree } from './clone-method.ts'
import { addFlags } from './encodings/inode.ts'
import { placeOf } from './journal.ts'
import { linkGroups } from './merge.ts'
import { MARKS, type Namespace } from './model/marks.ts'
import { type EntryPath, ROOT } from './model/path.ts'
import { planPath } from './model/plan.ts'
import { addTo } from './multimap.ts'
import { OutputExistsError } from './problems.ts'

export interface CloneLayerRequest {
  readonly from: HostPath
  /** The directory to make; not there yet. */
  readonly to: HostPath
  /** Whose marks it has. Default `trusted`. */
  readonly namespace?: Namespace
  /** Whether the clone may have inodes in common with the source, which must never be written to then. */
  readonly sharesInodes: boolean
  readonly signal?: AbortSignal
}

const TURN_MS = 20

/**
 * A second copy of a layer, with its whiteouts and marks, by the cheapest way that works: a snapshot of the file system,
 * reflinks, hard links (where inodes may be shared), copies. Durable when it resolves. Not journalled: what is there when it
 * fails is for the caller to remove.
 * @throws {OutputExistsError} if the target is there
 */
export async function cloneLayer(request: CloneLayerRequest): Promise<CloneMethod> {
  const { parent, name } = placeOf(request.to)
  const fromFd = openRoot(request.from, O_NOFOLLOW)
  return withFdAsync(fromFd, () =>
    withFdAsync(openRoot(parent), async (parentFd) => {
      if (tryStatAt(parentFd, name) !== undefined) throw new OutputExistsError(request.to)
      const methods = cloneMethods({ fromFd, toFd: parentFd, perEntry: false })
      const method = methods.find((one) => request.sharesInodes || one !== 'hardlink') ?? 'copy'
      if (isSnapshot(method)) snapshotTree(method, fromFd, parentFd, name)
      else {
        makeDirectory(parentFd, name, 0o700)
        const toFd = openat(parentFd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
        await withFdAsync(toFd, () => cloneEntries(request, { fromFd, toFd, method }))
      }
      syncFileSystem(parentFd, parent)
      return method
    }),
  )
}

async function cloneEntries(
  { to, namespace = 'trusted', signal }: CloneLayerRequest,
  site: Pick<CloneContext, 'fromFd' | 'toFd' | 'method'>,
): Promise<void> {
  const context: CloneContext = { ...site, target: to, lacking: [], below: true, plain: false, marks: MARKS[namespace] }
  const pending: EntryPath[] = [ROOT]
  const groups = new Map<string, EntryPath[]>()
  const flagged: [EntryPath, number][] = []
  let turn = performance.now()
  for (let path = pending.pop(); path !== undefined; path = pending.pop()) {
    const part = emptyClonePart()
    cloneDirectory(context, path, part, leaveOutNothing)
    pending.push(...part.next)
    flagged.push(...part.flagged)
    for (const [key, name] of part.groups) addTo(groups, key, planPath(name))
    if (performance.now() - turn < TURN_MS) continue
    await new Promise(setImmediate)
    signal?.throwIfAborted()
    turn = performance.now()
  }
  linkGroups(context, [...groups.values()])
  for (const [path, flags] of flagged) {
    if (path === ROOT) addFlags(context.toFd, '', flags)
    else protect(context, path, flags)
  }
}

async function withFdAsync<T>(fd: number, use: (fd: number) => Promise<T>): Promise<T> {
  try {
    return await use(fd)
  } finally {
    close(fd)
  }
}
