import { mkdirSync } from 'node:fs'
import type { HostPath } from '@lsync/posix'
import { openSync, type Sync, type SyncRequest } from '@lsync/sync'
import { afterAll, beforeAll } from 'vitest'
import { applyOperations, type Operation } from './operations.ts'
import { mountOverlay, type OverlayOptions } from './overlay.ts'
import { unmount } from './system.ts'
import { type DiffOptions, diffTrees, type Node, readTree, type Tree } from './tree.ts'

const TIED = /^(?:trusted|user)\.overlay\.(?:origin|impure|nlink|upper|uuid)$/

/** A tree as a copy of it on another node is to be: without what is tied to its inodes. */
function portable(tree: Tree, namespace: 'trusted' | 'user'): Tree {
  const nodes = new Map<string, Node>()
  for (const [path, node] of tree) {
    const xattrs = new Map([...node.xattrs].filter(([name]) => !(TIED.test(name) && name.startsWith(namespace))))
    // The kernel's whiteouts are names of one inode, which means nothing.
    const { links, ...rest } = node
    const isWhiteout = node.type === 'character' && node.rdev === 0
    nodes.set(path, { ...rest, xattrs, ...(links === undefined || isWhiteout ? {} : { links }) })
  }
  return nodes
}

/** In what the target differs from the upper, as lines; none when it is its copy. */
export function differences(
  upper: string,
  target: string,
  namespace: 'trusted' | 'user' = 'trusted',
  options: DiffOptions = {},
): string[] {
  return diffTrees(portable(readTree(upper), namespace), portable(readTree(target), namespace), options)
}

/** Runs `use` with a sync, which is stopped afterwards whatever happens. Ticks are short, so that tests are. */
export async function withSync<T>(request: SyncRequest, use: (sync: Sync) => Promise<T>): Promise<T> {
  const sync = await openSync({ tickMs: 20, sweepMs: 0, heedsPressure: false, ...request })
  try {
    return await use(sync)
  } finally {
    await sync.stop()
  }
}

/** Keeps the worker threads of this process alive between syncs until the tests of a file are over: starting them takes longer. */
export function keepWorkers(fileSystem: { readonly current: { fresh(): string } }): void {
  let keeper: Sync | undefined
  beforeAll(async () => {
    const at = fileSystem.current.fresh()
    mkdirSync(`${at}/u`)
    keeper = await openSync({
      source: `${at}/u` as HostPath,
      targets: [`${at}/t` as HostPath],
      stateDir: `${at}/state`,
      once: true,
    })
  })
  afterAll(() => keeper?.stop())
}

/** A mounted overlay whose upper is being synced: where people work, and what becomes of it. */
export interface Followed {
  readonly merged: string
  readonly upper: HostPath
  readonly target: HostPath
  readonly state: string
}

/** Runs `use` with an overlay mounted in `directory` above what `bottom` makes. */
export async function withFollowed<T>(
  directory: string,
  bottom: readonly Operation[],
  options: OverlayOptions,
  use: (followed: Followed) => Promise<T>,
): Promise<T> {
  const [lower, upper, merged] = ['l', 'u', 'm'].map((name) => `${directory}/${name}`) as [string, string, string]
  for (const path of [lower, upper, merged]) mkdirSync(path)
  applyOperations(lower, bottom, options.namespace)
  mountOverlay({ lowers: [lower], upper }, options, merged)
  try {
    return await use({
      merged,
      upper: upper as HostPath,
      target: `${directory}/t` as HostPath,
      state: `${directory}/state`,
    })
  } finally {
    unmount(merged)
  }
}

/**
 * What was written through a name that is gone with its directory when somebody looks shows at another name of the inode:
 * whose directory it was cannot be told any more, so that is for the sweep.
 */
export function hidesWrites(burst: readonly Operation[]): boolean {
  const takesDirectories = ['remove', 'remake']
  return burst.some(({ do: what }) => what === 'link') && burst.some(({ do: what }) => takesDirectories.includes(what))
}
