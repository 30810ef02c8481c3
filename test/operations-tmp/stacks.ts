import type { HostPath } from '@lsync/posix'
import fc from 'fast-check'
import { removeTree } from '../support/build.ts'
import type { FileSystem } from '../support/image.ts'
import { viewOf } from '../support/merging.ts'
import {
  anyHistory,
  anyOperations,
  applyOperations,
  type GrownStack,
  growStack,
  type History,
} from '../support/operations.ts'
import { isMountable, type OverlayOptions, withOverlay } from '../support/overlay.ts'
import type { Tree } from '../support/tree.ts'

/** A grown stack as the operations take it. */
export interface Grown extends GrownStack {
  readonly directory: string
  readonly options: OverlayOptions
  readonly request: {
    readonly upper: HostPath
    readonly lowers: readonly HostPath[]
    readonly namespace: 'trusted' | 'user'
    readonly workdir?: HostPath
  }
  /** What the kernel shows. Read-only, so that it writes no marks of its own. */
  view(): Tree
}

/** Lives through a history on a file system, and hands the stack to `use`; all is gone afterwards. */
export async function withGrown(
  disk: FileSystem,
  history: History,
  options: OverlayOptions,
  use: (grown: Grown) => Promise<void>,
): Promise<void> {
  const directory = disk.fresh()
  try {
    const stack = growStack(directory, history, options)
    if (!isMountable(stack, options)) return
    const { upper, lowers, work } = stack
    await use({
      ...stack,
      directory,
      options,
      request: {
        upper: upper as HostPath,
        lowers: lowers as HostPath[],
        namespace: options.namespace,
        ...(options.index ? { workdir: work as HostPath } : {}),
      },
      view: () => viewOf({ directory, layers: [upper, ...lowers], work, options }),
    })
  } finally {
    removeTree(directory)
  }
}

/** Copies every name that the view has up into the upper, and changes nothing: an attribute comes and goes. */
export function copyUpEverything(grown: Grown, namespace: 'trusted' | 'user'): void {
  const attribute = namespace === 'trusted' ? 'trusted.lsync' : 'user.lsync'
  withOverlay(grown, grown.options, (merged) => {
    const paths = [...grown.done.flat().map(({ path }) => path)].filter((path) => typeof path === 'string')
    const operations = [...new Set(paths)].flatMap((path) => [
      { do: 'setxattr' as const, path, name: attribute, value: 'x' },
      { do: 'removexattr' as const, path, name: attribute },
    ])
    applyOperations(merged, operations)
  })
}

/** A story for a failure: what was done, bottom first. */
export function storyOf(grown: Grown): string {
  return JSON.stringify(grown.done, (_, value) => (typeof value === 'bigint' ? `${value}n` : value), 1)
}

export { anyHistory, anyOperations, fc }
