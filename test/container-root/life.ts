import {
  appendFileSync,
  chmodSync,
  linkSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import type { ContainerRoot } from '@lsync/container-root'
import { expect } from 'vitest'
import type { DiffOptions, Tree } from '../support/tree.ts'
import { changesSince, type Site, shown, withRoot } from './roots.ts'

/** Changes of many kinds, each time others. */
export function change(merged: string, round: number): void {
  appendFileSync(`${merged}/dots/...`, `round ${round}\n`)
  mkdirSync(`${merged}/round-${round}`)
  writeFileSync(`${merged}/round-${round}/file`, 'x'.repeat(round * 1000))
  linkSync(`${merged}/round-${round}/file`, `${merged}/round-${round}/link`)
  if (round === 1) {
    rmSync(`${merged}/old`)
    renameSync(`${merged}/bytes`, `${merged}/moved`)
    chmodSync(`${merged}/binary`, 0o700)
    rmSync(`${merged}/dev`, { recursive: true })
    mkdirSync(`${merged}/dev`)
  }
  if (round === 2) renameSync(`${merged}/moved`, `${merged}/dev/moved again`)
  if (round === 3) rmSync(`${merged}/round-1`, { recursive: true })
}

/** What a mounted root shows right before something happens to it, and that it shows the same after. */
export async function keepsView(
  root: ContainerRoot,
  happens: () => Promise<unknown>,
  limits: DiffOptions,
): Promise<Tree> {
  const before = shown(root)
  await happens()
  expect(changesSince(before, root, limits)).toEqual([])
  return before
}

export async function remounted(root: ContainerRoot, between: () => Promise<unknown>): Promise<void> {
  await root.unmount()
  await between()
  await root.mount()
}

/** The life of a root on two nodes: what it shows is what was written, whatever is done with its layers. */
export async function life(site: Site, limits: DiffOptions): Promise<void> {
  await withRoot(site, 'one', async (root) => {
    const { mergedPath: merged } = root
    await root.mount()
    change(merged, 1)
    const first = await keepsView(root, () => root.solidify({ message: 'first', tags: ['first'] }), {})
    expect(root.versions().at(-1)).toMatchObject({
      number: 2,
      parent: 1,
      madeBy: 'solidify',
      epoch: 1,
      tags: ['first'],
    })
    expect(await root.status()).toMatchObject({ isMounted: true, hasChanges: false, version: 2, head: 2, errors: [] })
    change(merged, 2)
    await keepsView(root, () => root.solidify({ live: true }), {})
    expect(root.versions().at(-1)?.layers).toHaveLength(3)
    change(merged, 3)
    await keepsView(root, () => root.solidify({ live: true }), {})
    await keepsView(root, () => root.solidify(), {})
    // Live versions of one upper take each other's place.
    expect(root.versions().at(-1)).toMatchObject({ number: 5, layers: expect.objectContaining({ length: 3 }) })
    const third = await keepsView(root, () => remounted(root, () => root.compact({ maxLayers: 2 })), limits)
    expect((await root.status()).layers?.map(({ covers }) => covers).reduce((sum, count) => sum + count, 0)).toBe(3)
    await keepsView(root, () => remounted(root, () => root.gc({ keep: 1 })), limits)
    expect(root.versions().map(({ number }) => number)).toEqual([2, 5])
    await root.unmount()
    await withRoot(site, 'two', async (other) => {
      await other.mount()
      expect(changesSince(third, other, limits)).toEqual([])
      // A root that is folded to its bottom, and one that goes back.
      await keepsView(other, () => remounted(other, () => other.compact({ maxLayers: 1, intoBottom: true })), limits)
      expect((await other.status()).layers).toMatchObject([{ isBottom: true, covers: 3 }])
      await remounted(other, () => other.rollback({ to: 'first' }))
      expect(changesSince(first, other, limits)).toEqual([])
      appendFileSync(`${other.mergedPath}/dots/...`, 'two\n')
      await other.solidify()
      await other.unmount()
    })
    // Back on the first node, which has old replicas.
    await root.mount()
    expect(readFileSync(`${merged}/dots/...`, 'utf8')).toMatch(/round 1\ntwo\n$/)
    expect(await root.diff('first', 7)).toEqual([{ path: 'dots/...', change: 'modified', what: ['times', 'size'] }])
  })
}
