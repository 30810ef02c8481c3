import type { Writable } from 'node:stream'
import {
  type ConvertReport,
  convertLayer,
  type LayerForm,
  type Namespace,
  RequestInvalidError,
} from '@lsync/overlay-merge'
import type { ByteString, HostPath } from '@lsync/posix'
import { NodeReader, type SnapshotForm } from './layer-items.ts'
import { lockForReading } from './lock.ts'
import type { Snapshot } from './model/snapshot.ts'
import type { Repository } from './repository.ts'
import { locatePath } from './select.ts'

export interface RestoreAsRequest {
  readonly snapshot: Snapshot
  /** Which directory of it, absolute; by default the one that was saved. */
  readonly path?: ByteString | undefined
  /** What to make. Archives may go to a stream. */
  readonly as: LayerForm
  /** A name that is free, an empty directory, or a stream. */
  readonly to: HostPath | Writable
  /** What the snapshot is. Default: a kernel layer with marks in `trusted.overlay`. */
  readonly form?: SnapshotForm
  /** Whose marks the forms `tar` and `xattr-whiteouts` use. Default `trusted`. */
  readonly namespace?: Namespace
  readonly compression?: 'none' | 'gzip' | 'zstd'
  readonly level?: number
  /** Archives: write files with holes as sparse files. */
  readonly sparse?: boolean
  /** Leave out what the form or the target cannot hold, and report it, instead of failing. */
  readonly lossy?: boolean
  /** Take no lock, for a repository that cannot be written to. */
  readonly noLock?: boolean
  readonly signal?: AbortSignal | undefined
  readonly onProgress?: (progress: { phase: string; done: number }) => void
}

/**
 * Restores a directory of a snapshot in another form than it was saved in: as a layer of another encoding, or as an
 * archive, also to a stream. Every byte is checked before it is written. A path appears whole or not at all; of a stream
 * that breaks off, the end mark is missing.
 * @throws {LsyncError} as `convertLayer`, and what the repository and its backend throw
 */
export async function restoreSnapshotAs(repository: Repository, request: RestoreAsRequest): Promise<ConvertReport> {
  const { snapshot, path, as, form = 'trusted', onProgress, noLock: _, ...others } = request
  const lock = await lockForReading(repository, request)
  const { signal } = lock
  try {
    await repository.loadIndex(signal)
    const { node, tree } = await locatePath(repository, snapshot, path, signal)
    if (tree === undefined) throw new RequestInvalidError('only a directory is a layer', 'restore a file as it is')
    return await convertLayer({
      ...others,
      from: new NodeReader(repository, { node, content: tree }, form, signal),
      fromForm: form === 'plain' ? 'plain' : `kernel-${form}`,
      toForm: as,
      signal,
      ...(onProgress === undefined ? {} : { onProgress: ({ phase, entries }) => onProgress({ phase, done: entries }) }),
    })
  } finally {
    await lock.release()
  }
}
