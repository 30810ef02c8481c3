import { compareStacks, type TreeDifference } from '@lsync/overlay-merge'
import type { HostPath } from '@lsync/posix'
import { type RootContext, withLayersInUse } from './context.ts'
import { withLayerTrees } from './layer-trees.ts'
import type { VersionRecord } from './records.ts'

/** A name that two versions do not show alike. `what` says in what: `mode`, `owner`, `times`, `size`, `content`, `xattr NAME` … */
export interface VersionDifference {
  readonly path: TreeDifference['path']
  readonly change: 'added' | 'removed' | 'type' | 'modified' | 'metadata'
  readonly what: readonly string[]
}

const OF_THE_OBJECT = new Set(['size', 'content', 'target', 'device', 'error'])

/**
 * Every name that differs between two versions of a root, whichever layers they have in common, in path order; of a directory
 * that came or went only itself. Reads both views; the bytes of files of equal size and time only with `content`.
 */
export async function diffVersions(
  context: RootContext,
  from: VersionRecord,
  to: VersionRecord,
  options: { readonly content?: boolean; readonly signal?: AbortSignal } = {},
): Promise<VersionDifference[]> {
  const { namespace } = context.home.record
  const stackOf = ([upper, ...lowers]: readonly HostPath[]) => ({ upper: upper as HostPath, lowers, namespace })
  const treesOf = <T>({ number, layers }: VersionRecord, use: (trees: readonly HostPath[]) => Promise<T>) =>
    withLayersInUse(context, number, layers, (chosen) => withLayerTrees(context, chosen, use))
  const { differences } = await treesOf(from, (before) =>
    treesOf(to, (after) =>
      compareStacks(stackOf(before), stackOf(after), {
        content: options.content === true,
        limit: Number.POSITIVE_INFINITY,
        signal: options.signal,
      }),
    ),
  )
  const byPath = new Map<TreeDifference['path'], TreeDifference[]>()
  for (const difference of differences) {
    const same = byPath.get(difference.path)
    if (same === undefined) byPath.set(difference.path, [difference])
    else same.push(difference)
  }
  return [...byPath].map(([path, found]) => ({
    path,
    change: changeOf(found),
    what: found.map(({ what }) => what).filter((what) => what !== 'existence' && what !== 'type'),
  }))
}

function changeOf(found: readonly TreeDifference[]): VersionDifference['change'] {
  const existence = found.find(({ what }) => what === 'existence')
  if (existence !== undefined) return existence.expected === ABSENT ? 'added' : 'removed'
  if (found.some(({ what }) => what === 'type')) return 'type'
  return found.some(({ what }) => OF_THE_OBJECT.has(what)) ? 'modified' : 'metadata'
}

/** How a comparison calls what is not there. */
const ABSENT = 'absent'
