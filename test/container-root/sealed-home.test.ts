import { appendFileSync, existsSync, readdirSync, readFileSync } from 'node:fs'
import type { ContainerRoot, LayerStorage } from '@lsync/container-root'
import type { HostPath } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { richTree } from '../layers/rich-tree.ts'
import type { DirectorySpec } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { hasPoorStore, usePoorStore } from '../support/poor-store.ts'
import { canMountImages } from '../support/ready.ts'
import { isPresent } from '../support/system.ts'
import { change, keepsView, life, remounted } from './life.ts'
import { changesSince, makeSite, type Site, shown, withRoot } from './roots.ts'

const ready = needs('root, mkfs.erofs and file-system tools', canMountImages() && isPresent('mkfs.erofs'))
// Compressed files have no holes; their zeros take no space in the image.
const noHoles = { holes: false }

/** EROFS of erofs-utils 1.5 takes no name of 255 bytes. */
function base(): DirectorySpec {
  const { children, ...root } = richTree()
  return { ...root, children: Object.fromEntries(Object.entries(children).filter(([name]) => name.length < 255)) }
}

/** What lies in the layers of a home, each name once. */
function kept({ home }: Site): string[] {
  const layers = readdirSync(`${home}/layers`)
  return [...new Set(layers.flatMap((id) => readdirSync(`${home}/layers/${id}`)))].sort()
}

const formsOf = async (root: ContainerRoot) => (await root.status()).layers?.map(({ form }) => form)

describe.skipIf(!ready)('a root whose layers are sealed', () => {
  const disk = useFileSystem('ext4')

  test('shows what was written to it, on any node, through everything that happens to its layers', async () => {
    const at = disk.current.fresh()
    const site = await makeSite(at, at, base(), 'sealed')
    await life(site, noHoles)
    expect(kept(site)).toEqual(['layer.erofs', 'layer.json'])
    expect(
      readdirSync(`${site.home}/incoming`).flatMap((epoch) => readdirSync(`${site.home}/incoming/${epoch}`)),
    ).toEqual([])
    const left = readdirSync(`${site.node('one').path}/roots/lab`)
    expect(left.filter((name) => /^(?:scratch|staging|gone)|^\.lsync/.test(name))).toEqual([])
  }, 120_000)

  test('is followed, and a live version needs only what changed last', async () => {
    const at = disk.current.fresh()
    const site = await makeSite(at, at, base(), 'sealed')
    await withRoot(site, 'one', async (root) => {
      await root.mount()
      await root.startSync()
      change(root.mergedPath, 1)
      await keepsView(root, () => root.solidify({ live: true }), noHoles)
      change(root.mergedPath, 2)
      const before = await keepsView(root, () => root.solidify(), noHoles)
      expect(root.versions().map(({ layers }) => layers.length)).toEqual([1, 2, 2])
      await root.unmount()
      await withRoot(site, 'two', async (other) => {
        await other.mount()
        expect(changesSince(before, other, noHoles)).toEqual([])
      })
    })
  }, 60_000)
})

describe.skipIf(!ready || !needs('rclone and FUSE', hasPoorStore))('a home on a store without nodes and xattrs', () => {
  const store = usePoorStore()
  const disk = useFileSystem('ext4')

  test('seals its layers without being told, and its root shows what was written to it', async () => {
    const site = await makeSite(store.current.fresh(), disk.current.fresh(), base())
    await life(site, noHoles)
    expect(kept(site)).toEqual(['layer.erofs', 'layer.json'])
    await withRoot(site, 'one', async (root) => {
      expect(root.home.record.layerForm).toBe('sealed')
      await expect(root.convert({ to: 'tree' })).rejects.toMatchObject({ code: 'STORE_HOLDS_NO_TREES' })
    })
  }, 120_000)
})

describe.skipIf(!ready)('a root whose layers are of both forms', () => {
  const disk = useFileSystem('ext4')

  /** A root on node one with changes in three versions, and what it shows at each. */
  async function versions(root: ContainerRoot) {
    const views = []
    await root.mount()
    for (const [round, live] of [
      [1, false],
      [2, true],
      [3, false],
    ] as const) {
      change(root.mergedPath, round)
      views.push(shown(root))
      await root.solidify({ live })
    }
    return views
  }

  test.each<LayerStorage>(['tree', 'sealed'])(
    'shows the same when they are sealed and unsealed (%s)',
    async (layerForm) => {
      const at = disk.current.fresh()
      const site = await makeSite(at, at, base(), layerForm)
      await withRoot(site, 'one', async (root) => {
        const [first, , last] = await versions(root)
        const [other, back] = layerForm === 'tree' ? (['sealed', 'tree'] as const) : (['tree', 'sealed'] as const)
        await root.unmount()
        // On another node, which has no replicas of its own.
        await withRoot(site, 'two', async (two) => {
          await two.mount()
          const forms = await formsOf(two)
          await keepsView(two, () => remounted(two, () => two.convert({ to: other })), noHoles)
          expect(await formsOf(two)).not.toEqual(forms)
          // What they were made of goes, and nothing is missed.
          await remounted(two, async () => {
            const { layers } = await two.gc({ keep: 1 })
            expect(layers.length).toBeGreaterThan(0)
          })
          expect(changesSince(last as never, two, noHoles)).toEqual([])
          await keepsView(two, () => remounted(two, () => two.convert({ to: back })), noHoles)
          expect(await formsOf(two)).toEqual(forms)
          expect(changesSince(last as never, two, noHoles)).toEqual([])
          await remounted(two, () => two.rollback({ to: 4 }))
          expect(changesSince(last as never, two, noHoles)).toEqual([])
          await two.unmount()
        })
        await root.mount()
        expect(changesSince(last as never, root, noHoles)).toEqual([])
        expect(first).toBeDefined()
      })
    },
    60_000,
  )

  test.each<LayerStorage>(['tree', 'sealed'])(
    'shows the same while it stays mounted, whatever is done to its layers, and after (%s)',
    async (layerForm) => {
      const at = disk.current.fresh()
      await withRoot(await makeSite(at, at, base(), layerForm), 'one', async (root) => {
        await versions(root)
        // An upper that is in no version yet, under a version of which it is a part.
        change(root.mergedPath, 4)
        await keepsView(root, () => root.solidify({ live: true }), noHoles)
        change(root.mergedPath, 5)
        const [other, back] = layerForm === 'tree' ? (['sealed', 'tree'] as const) : (['tree', 'sealed'] as const)
        const gc = () => root.gc({ keep: 1, graceMs: -60_000 })
        const first = shown(root)
        for (const happens of [
          () => root.convert({ to: other }),
          gc,
          () => root.compact({ maxLayers: 2 }),
          gc,
          () => root.convert({ to: back }),
          () => root.compact({ maxLayers: 1, intoBottom: true }),
          gc,
        ]) {
          await keepsView(root, happens, noHoles)
        }
        const again = await keepsView(root, () => remounted(root, async () => undefined), noHoles)
        await root.solidify()
        await keepsView(root, () => remounted(root, gc), noHoles)
        await keepsView(root, () => remounted(root, () => root.rollback({ to: root.home.head().number })), noHoles)
        expect(changesSince(first, root, noHoles)).toEqual([])
        expect(changesSince(again, root, noHoles)).toEqual([])
      })
    },
    60_000,
  )

  test('is compacted, compared, rolled back and forked whatever form each layer has', async () => {
    const at = disk.current.fresh()
    const site = await makeSite(at, at, base(), 'tree')
    await withRoot(site, 'one', async (root) => {
      await versions(root)
      const [first, , last] = [2, 3, 4].map((number) => root.home.version(number))
      // The base and the first layer only.
      await root.convert({ to: 'sealed', version: 2 })
      await remounted(root, async () => undefined)
      expect(new Set(await formsOf(root))).toEqual(new Set(['tree', 'erofs']))
      const changed = await root.diff(2, 4)
      expect(changed.length).toBeGreaterThan(3)
      await keepsView(root, () => remounted(root, () => root.compact({ maxLayers: 1, intoBottom: true })), noHoles)
      expect(await formsOf(root)).toEqual(['tree'])
      expect(await root.diff(2, 4)).toEqual(changed)
      await root.unmount()
      for (const layerForm of ['tree', 'sealed'] as const) {
        const home = `${at}/fork-${layerForm}` as HostPath
        ;(await root.fork({ home, version: last?.number ?? 0, layerForm })).close()
        const fork = { ...site, home }
        await withRoot(
          fork,
          'one',
          async (forked) => {
            await forked.mount()
            appendFileSync(`${forked.mergedPath}/dots/...`, layerForm)
            await forked.solidify()
            expect(readFileSync(`${forked.mergedPath}/dots/...`, 'utf8')).toMatch(/round 3\n(?:tree|sealed)$/)
          },
          `fork-${layerForm}`,
        )
      }
      // A fork of sealed layers has the same images.
      const home = `${at}/fork-of-first` as HostPath
      ;(await root.fork({ home, version: first?.number ?? 0 })).close()
      expect(kept({ ...site, home })).toEqual(expect.arrayContaining(['layer.erofs', 'layer.json']))
    })
  }, 60_000)

  test('an image that is not what was written is not copied into a fork', async () => {
    const at = disk.current.fresh()
    const site = await makeSite(at, at, base(), 'sealed')
    await withRoot(site, 'one', async (root) => {
      const [id] = readdirSync(`${site.home}/layers`)
      appendFileSync(`${site.home}/layers/${id}/layer.erofs`, 'x')
      const home = `${at}/fork` as HostPath
      await expect(root.fork({ home })).rejects.toMatchObject({ code: 'LAYER_DAMAGED' })
      expect(existsSync(`${home}/root.json`)).toBe(false)
    })
  })
})
