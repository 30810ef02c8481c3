import { RequestInvalidError } from '@lsync/overlay-merge'
import type { ByteString } from '@lsync/posix'
import { layerDifference } from '../difference.ts'
import { NodeReader, type SnapshotForm } from '../layer-items.ts'
import { lockForReading } from '../lock.ts'
import type { Snapshot } from '../model/snapshot.ts'
import type { Repository } from '../repository.ts'
import { type Located, locatePath } from '../select.ts'
import { exportImage, type ImageExportReport, type ImageExportRequest } from './export.ts'

/** A version of a tree. */
export interface VersionRef {
  readonly snapshot: Snapshot
  /** What of it; by default the directory that was saved. */
  readonly path?: ByteString | undefined
}

export interface SnapshotExportRequest extends Omit<ImageExportRequest, 'layers' | 'reader' | 'form' | 'namespace'> {
  readonly repository: Repository
  readonly version: VersionRef
  /** Only what changed since this version becomes the layer. An image of it has to be the base. */
  readonly since?: VersionRef | undefined
  /** What the versions are. Default: kernel layers with marks in `trusted.overlay`. */
  readonly form?: SnapshotForm
}

/**
 * Adds an image to a layout whose new layer is a snapshot, or what a snapshot changed since another one. Nothing is
 * restored: the layer is written as the repository is read, with every byte checked. See `exportImage`.
 * @throws {RequestInvalidError} if a version is no directory, or if a whiteout of `since` went away: that no layer can say
 */
export async function exportSnapshot(request: SnapshotExportRequest): Promise<ImageExportReport> {
  const { repository, version, since, form = 'trusted', ...others } = request
  const lock = await lockForReading(repository, request)
  const { signal } = lock
  try {
    await repository.loadIndex(signal)
    const { node, tree } = await locateDirectory(repository, version, signal)
    const before = since === undefined ? undefined : await locateDirectory(repository, since, signal)
    const content = before === undefined ? tree : await layerDifference(repository, before.tree, tree, form, signal)
    const reader = new NodeReader(repository, { node, content }, form, signal)
    const fromForm = form === 'plain' ? 'plain' : (`kernel-${form}` as const)
    return await exportImage({ ...others, layers: [], reader, form: fromForm, signal })
  } finally {
    await lock.release()
  }
}

async function locateDirectory(repository: Repository, { snapshot, path }: VersionRef, signal: AbortSignal) {
  const { node, tree }: Located = await locatePath(repository, snapshot, path, signal)
  if (tree === undefined) {
    throw new RequestInvalidError('a version that becomes a layer is a directory', 'name a directory, or none')
  }
  return { node, tree }
}
