import type { HostPath } from '@lsync/posix'
import { createSnapshot, listSnapshots, type ObjectId, type Repository } from '@lsync/snapshot'
import { type RootContext, withLayersInUse } from './context.ts'
import { withLayerTrees } from './layer-trees.ts'
import type { VersionRecord } from './records.ts'

export interface BackupReport {
  readonly version: number
  readonly snapshotId: ObjectId
  /** `false`: this version was there already. */
  readonly isNew: boolean
  readonly addedBytes: number
  /** Names that could not be read; they are not in the snapshot. */
  readonly problems: number
}

/**
 * Saves what a version shows as a snapshot, unless it is there: of host NAME and path `/`, with the tags `root-ID`, `version-NUMBER` and those
 * of the version, so that `restic restore --host NAME latest` brings the newest one. Nothing is mounted but sealed layers.
 */
export async function backupVersion(
  context: RootContext,
  repository: Repository,
  { number, layers: list, tags = [], createdAtMs }: VersionRecord,
  signal?: AbortSignal,
): Promise<BackupReport> {
  const { home, name } = context
  const own = [`root-${home.record.id.slice(0, 12)}`, `version-${number}`]
  const [there] = await listSnapshots(repository, { tags: [own] }, signal)
  if (there !== undefined) {
    return { version: number, snapshotId: there.id, isNew: false, addedBytes: 0, problems: 0 }
  }
  return withLayersInUse(context, number, list, (layers) =>
    withLayerTrees(context, layers, async ([upper, ...lowers]) => {
      const stack = { upper: upper as HostPath, lowers, namespace: home.record.namespace }
      const { snapshotId, counts, problems } = await createSnapshot(repository, {
        targets: [{ path: '/' as HostPath, stack }],
        tags: [...own, ...tags],
        hostname: name,
        timeNs: BigInt(createdAtMs) * 1_000_000n,
        signal,
      })
      return { version: number, snapshotId, isNew: true, addedBytes: counts.addedBytes, problems: problems.length }
    }),
  )
}
