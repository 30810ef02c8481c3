import { appendFileSync, existsSync, mkdirSync, readdirSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import type { LayerStorage } from '@lsync/container-root'
import { describe, expect, test } from 'vitest'
import { dir, file, symlink } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { canMountImages } from '../support/ready.ts'
import { isPresent } from '../support/system.ts'
import { changesSince, makeSite, type Site, shown, withRoot } from './roots.ts'
import { type Point, struck } from './struck.ts'

const ready = needs(
  'root, mkfs.erofs, strace and file-system tools',
  canMountImages() && ['mkfs.erofs', 'strace'].every(isPresent),
)
// Compressed files have no holes; their zeros take no space in the image.
const noHoles = { holes: false }

/** Runs lsync on a node, and kills it as it begins that call. Gives such calls as there were; `undefined` if it was killed. */
function strike(site: Site, node: string, args: readonly string[], at?: Point): readonly Point[] | undefined {
  const { isKilled, status, stderr, calls } = struck(site.node(node).path, args, at)
  if (isKilled) return undefined
  if (status !== 0) throw new Error(`lsync ${args.join(' ')} ended with ${status}: ${stderr}`)
  return calls
}

/** Changes of many kinds, in each round others. */
function change(merged: string, round: number): void {
  appendFileSync(`${merged}/log`, `${round}\n`)
  mkdirSync(`${merged}/round-${round}`)
  writeFileSync(`${merged}/round-${round}/file`, `${round}`.repeat(3000))
  if (round === 0) rmSync(`${merged}/old`)
  else renameSync(`${merged}/round-${round - 1}`, `${merged}/d/${round - 1}`)
  if (round > 1) rmSync(`${merged}/d/${round - 2}`, { recursive: true })
}

/** So many of these, evenly spread, the first and the last among them; or all where LSYNC_TEST_EVERY says so. */
function pointsOf(all: readonly Point[], count: number): Point[] {
  expect(all.length).toBeGreaterThanOrEqual(count)
  if (process.env['LSYNC_TEST_EVERY'] !== undefined) return [...all]
  return Array.from({ length: count }, (_, i) => all[Math.round((i * (all.length - 1)) / (count - 1))] as Point)
}

/** Whatever a killed process left of what it was making is gone. */
function assertTidy(site: Site): void {
  if (existsSync(`${site.home}/incoming/0`)) expect(readdirSync(`${site.home}/incoming/0`)).toEqual([])
  for (const node of ['one', 'two']) {
    const left = readdirSync(`${site.node(node).path}/roots/lab`)
    expect(left.filter((name) => /^(?:scratch|staging|gone)/.test(name))).toEqual([])
  }
}

describe.skipIf(!ready)('SIGKILL', () => {
  const disk = useFileSystem('ext4')
  const makeLab = (layerForm: LayerStorage) => {
    const at = disk.current.fresh()
    const base = dir({ log: file('base\n'), old: file('old'), d: dir({ a: file('a'), l: symlink('a') }) })
    return makeSite(at, at, base, layerForm)
  }

  const compact = ['root', 'compact', 'lab', '--max-layers', '1']
  const gc = ['root', 'gc', 'lab', '--keep', '1', '--yes']
  const seal = ['root', 'seal', 'lab']

  // While a container runs on node one, node two is killed at work on the layers.
  test.each<[title: string, args: readonly string[], LayerStorage, points: number]>([
    ['compact', compact, 'tree', 3],
    ['compact into the bottom', [...compact, '--into-bottom'], 'sealed', 4],
    ['gc', gc, 'tree', 5],
    ['seal', seal, 'tree', 3],
    ['unseal', [...seal, '--undo'], 'sealed', 3],
  ])('of %s takes nothing from a container, nor from the next who does it', async (title, args, layerForm, count) => {
    const site = await makeLab(layerForm)
    await withRoot(site, 'one', async (root) => {
      let round = 0
      const more = async () => {
        change(root.mergedPath, round++)
        // With what it folds there are layers that nobody needs any more.
        if (title === 'gc') await root.compact({ maxLayers: 1 })
        await root.solidify()
        change(root.mergedPath, round++)
        return shown(root)
      }
      await root.mount()
      await more()
      await more()
      await withRoot(site, 'two', async () => undefined)
      const points = pointsOf(strike(site, 'two', args) ?? [], count)
      let before = shown(root)
      let kills = 0
      for (const point of points) {
        before = await more()
        if (strike(site, 'two', args, point) === undefined) kills++
        expect(changesSince(before, root, noHoles)).toEqual([])
        await withRoot(site, 'two', (two) => two.gc({ keep: 1, graceMs: -60_000 }))
        assertTidy(site)
      }
      // What is left to do is not the same each time.
      expect(kills).toBeGreaterThanOrEqual(count - 1)
      strike(site, 'two', args)
      await root.solidify()
      await root.unmount()
      await withRoot(site, 'two', async (two) => {
        await two.mount()
        expect(changesSince(before, two, noHoles)).toEqual([])
      })
      await root.mount()
      expect(changesSince(before, root, noHoles)).toEqual([])
    })
  })

  test.each<[title: string, args: readonly string[], LayerStorage, points: number]>([
    ['solidify', ['solidify', 'lab'], 'tree', 5],
    ['solidify to a sealed layer', ['solidify', 'lab'], 'sealed', 4],
    ['live solidify', ['solidify', 'lab', '--live'], 'tree', 4],
    ['live solidify to a sealed layer', ['solidify', 'lab', '--live'], 'sealed', 4],
  ])('of a %s loses nothing, and publishes all or nothing', async (_, args, layerForm, count) => {
    const site = await makeLab(layerForm)
    await withRoot(site, 'one', async (root) => {
      let round = 0
      const more = () => {
        change(root.mergedPath, round++)
        return shown(root)
      }
      await root.mount()
      more()
      const points = pointsOf(strike(site, 'one', args) ?? [], count)
      const published = new Set<number>()
      let last = shown(root)
      let kills = 0
      for (const point of points) {
        const before = more()
        const head = root.home.head().number
        if (strike(site, 'one', args, point) === undefined) kills++
        await root.recover()
        published.add(root.home.head().number - head)
        await root.mount()
        expect(changesSince(before, root, noHoles)).toEqual([])
        last = before
      }
      await root.solidify()
      expect(changesSince(last, root, noHoles)).toEqual([])
      expect((await root.status()).unfinished).toBeUndefined()
      await root.unmount()
      await withRoot(site, 'two', async (two) => {
        await two.mount()
        expect(changesSince(last, two, noHoles)).toEqual([])
      })
      assertTidy(site)
      expect(kills).toBeGreaterThanOrEqual(count - 1)
      // Both sides of the publication were reached.
      expect([...published].sort()).toEqual([0, 1])
    })
  })
})
