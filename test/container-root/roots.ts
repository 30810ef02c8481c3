import { mkdirSync } from 'node:fs'
import { ContainerRoot, initHome, type LayerStorage, NodeState } from '@lsync/container-root'
import type { HostPath } from '@lsync/posix'
import { buildTree, type DirectorySpec } from '../support/build.ts'
import { type DiffOptions, diffTrees, readTree, type Tree } from '../support/tree.ts'

/** A store and nodes with states of their own, for one test. */
export interface Site {
  readonly home: HostPath
  readonly base: HostPath
  node(name: string): NodeState
}

/** Makes a home in `store` of one base, and nodes whose state is in `local` (a file system that can hold uppers). */
export async function makeSite(
  store: string,
  local: string,
  base: DirectorySpec,
  layerForm?: LayerStorage,
  leaseMs?: number,
): Promise<Site> {
  const basePath = `${local}/base` as HostPath
  buildTree(basePath, base)
  const home = `${store}/home` as HostPath
  const states = new Map<string, NodeState>()
  const node = (name: string) => {
    const known = states.get(name)
    if (known !== undefined) return known
    mkdirSync(`${local}/${name}`, { mode: 0o700 })
    const state = NodeState.open(`${local}/${name}` as HostPath)
    states.set(name, state)
    return state
  }
  const made = await initHome({
    home,
    bases: [basePath],
    node: node('one').node,
    ...(layerForm && { layerForm }),
    ...(leaseMs !== undefined && { lease: { durationMs: leaseMs } }),
  })
  made.close()
  return { home, base: basePath, node }
}

/** Runs `use` with a root opened on a node; it is closed, and unmounted, afterwards whatever happens. */
export async function withRoot<T>(
  { home, node }: Site,
  nodeName: string,
  use: (root: ContainerRoot) => Promise<T>,
  name = 'lab',
): Promise<T> {
  const root = await ContainerRoot.open(home, name, { state: node(nodeName) })
  try {
    return await use(root)
  } finally {
    await root.unmount().catch(() => undefined)
    await root.close()
  }
}

/** What the kernel shows of a mounted root, to be compared later. */
export function shown(root: ContainerRoot): Tree {
  return readTree(root.mergedPath)
}

/** Every difference between what was shown and what is; none when a root shows the same. */
export function changesSince(before: Tree, root: ContainerRoot, options: DiffOptions = {}): string[] {
  return diffTrees(before, shown(root), options)
}
