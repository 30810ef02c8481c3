import { appendFileSync, chmodSync, mkdirSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { ContainerRoot, type LayerStorage } from '@lsync/container-root'
import { expect, test } from 'vitest'
import { dir, file, symlink } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { withPowerCut } from '../support/power-cut.ts'
import { canMountImages } from '../support/ready.ts'
import { unmount } from '../support/system.ts'
import type { Tree } from '../support/tree.ts'
import { changesSince, makeSite, type Site, shown, withRoot } from './roots.ts'

const canRun = needs('a mount', canMountImages())
const disk = useFileSystem('tmpfs')
const base = () =>
  dir({ etc: dir({ hostname: file('base\n') }), old: file('x'), d: dir({ a: file('a'), l: symlink('a') }) })

/** Changes of every kind in a mounted root. */
function change(merged: string): void {
  appendFileSync(`${merged}/etc/hostname`, 'more\n')
  rmSync(`${merged}/old`)
  renameSync(`${merged}/d`, `${merged}/moved`)
  chmodSync(`${merged}/moved/a`, 0o600)
  mkdirSync(`${merged}/new`)
  writeFileSync(`${merged}/new/file`, 'new')
}

/** A root with changes, mounted on node `one`, and what it shows. */
async function prepare(layerForm: LayerStorage): Promise<{ site: Site; before: Tree }> {
  const at = disk.current.fresh()
  const site = await makeSite(at, at, base(), layerForm)
  const root = await ContainerRoot.open(site.home, 'lab', { state: site.node('one') })
  await root.mount()
  change(root.mergedPath)
  const before = shown(root)
  await root.close()
  return { site, before }
}

type Verb = (root: ContainerRoot) => Promise<unknown>

async function cutAt(site: Site, at: number, verb: Verb): Promise<number | undefined> {
  const root = await ContainerRoot.open(site.home, 'lab', { state: site.node('one') })
  try {
    return await withPowerCut(at, (arm) => {
      // What the sync does by itself is cut off in its own tests; every step of a solidify is after its first pass.
      root.events.on('step', ({ step }) => {
        if (step === 'copied') arm()
      })
      return verb(root)
    })
  } finally {
    await root.close()
  }
}

/** The machine starts again: with `isMountGone`, after a power cut, else after a kill. Everything must be there. */
async function assertNothingLost(site: Site, before: Tree, isMountGone: boolean): Promise<number> {
  const state = site.node('one')
  if (isMountGone) unmount(`${state.path}/roots/lab/merged`)
  return withRoot(site, 'one', async (root) => {
    await root.recover()
    const versions = root.versions().length
    await root.mount()
    expect(changesSince(before, root)).toEqual([])
    await root.solidify()
    expect(changesSince(before, root)).toEqual([])
    expect((await root.status()).unfinished).toBeUndefined()
    await root.unmount()
    // What the store has is the same: another node has nothing else.
    await withRoot(site, 'two', async (other) => {
      await other.mount()
      expect(changesSince(before, other)).toEqual([])
    })
    return versions
  })
}

/** Points of an operation of `calls` changing calls: evenly spread, or all where LSYNC_TEST_EVERY says so. */
function pointsOf(calls: number, count: number): number[] {
  if (process.env['LSYNC_TEST_EVERY'] !== undefined) return Array.from({ length: calls }, (_, i) => i)
  return [...new Set(Array.from({ length: count }, (_, i) => Math.round((i * (calls - 1)) / (count - 1))))]
}

const VERBS: readonly (readonly [name: string, verb: Verb, points: number, layerForm: LayerStorage])[] = [
  ['solidify', (root) => root.solidify(), 12, 'tree'],
  ['live solidify', (root) => root.solidify({ live: true }), 8, 'tree'],
  ['solidify to a sealed layer', (root) => root.solidify(), 12, 'sealed'],
  ['live solidify to a sealed layer', (root) => root.solidify({ live: true }), 8, 'sealed'],
]

test.skipIf(!canRun).each(VERBS)(
  'a %s that is cut off anywhere loses nothing',
  async (_, verb, count, layerForm) => {
    const first = await prepare(layerForm)
    const calls = (await cutAt(first.site, Number.POSITIVE_INFINITY, verb)) as number
    await assertNothingLost(first.site, first.before, false)
    const versions = new Set<number>()
    for (const [i, at] of pointsOf(calls, count).entries()) {
      const { site, before } = await prepare(layerForm)
      const isCut = (await cutAt(site, at, verb)) === undefined
      const published = await assertNothingLost(site, before, i % 2 === 1).catch((error: Error) => {
        error.message = `cut at call ${at} of ${calls}: ${error.message}`
        throw error
      })
      versions.add(published)
      expect(isCut || published === 2).toBe(true)
    }
    // Both sides of the publication were reached.
    expect([...versions].sort()).toEqual([1, 2])
  },
  300_000,
)
