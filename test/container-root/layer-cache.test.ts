import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { type ContainerRoot, LayerCache, type LayerStorage, sealLayer } from '@lsync/container-root'
import { type HostPath, mountOverlay, unmount } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { buildTree, dir, file, whiteout } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { canMountImages } from '../support/ready.ts'
import { isPresent } from '../support/system.ts'
import { diffTrees, readTree } from '../support/tree.ts'
import { changesSince, makeSite, shown, withRoot } from './roots.ts'

const path = (text: string) => text as HostPath
const id = (digit: string) => digit.repeat(32)

describe.skipIf(!needs('root, mkfs.erofs and file-system tools', canMountImages() && isPresent('mkfs.erofs')))(
  'a cache of layers',
  () => {
    const disk = useFileSystem('ext4')

    async function setUp(limitBytes: number) {
      const at = disk.current.fresh()
      buildTree(`${at}/tree`, dir({ f: file('x'.repeat(300_000)), gone: whiteout() }))
      await sealLayer({ layer: path(`${at}/tree`), image: path(`${at}/image`) })
      const directory = path(`${at}/cache`)
      const cache = await LayerCache.open({ directory, limitBytes })
      const tree = { form: 'tree', path: path(`${at}/tree`) } as const
      const image = { form: 'erofs', path: path(`${at}/image`) } as const
      return { at, cache, directory, tree, image }
    }

    /** Makes each use later than the one before. */
    const use = async (cache: LayerCache, which: string) => {
      await delay(5)
      cache.openLayer(which)?.close()
    }

    test.each(['tree', 'image'] as const)('a %s comes back as it was, and stays while it is mounted', async (form) => {
      const { at, cache, ...sources } = await setUp(10_000_000)
      expect(cache.openLayer(id('a'))).toBeUndefined()
      await cache.fill(id('a'), sources[form])
      const layer = cache.openLayer(id('a'))
      if (layer === undefined) throw new Error('it is not there')
      mkdirSync(`${at}/merged`)
      mkdirSync(`${at}/empty`)
      mountOverlay({ lowers: [layer.fd, path(`${at}/empty`)] }, path(`${at}/merged`))
      layer.close()
      try {
        const small = await LayerCache.open({ directory: sources.directory, limitBytes: 0 })
        expect(small.evict()).toBe(false)
        expect(cache.has(id('a'))).toBe(true)
        const shown = readTree(`${at}/merged`)
        expect([...shown.keys()]).toEqual(['', 'f'])
        expect(
          diffTrees(
            new Map([['f', readTree(`${at}/tree`).get('f')]]) as never,
            new Map([['f', shown.get('f')]]) as never,
          ),
        ).toEqual([])
      } finally {
        unmount(path(`${at}/merged`))
      }
      const small = await LayerCache.open({ directory: sources.directory, limitBytes: 0 })
      for (let look = 0; !small.evict() && look < 100; look++) await delay(50)
      expect(cache.has(id('a'))).toBe(false)
      expect(readdirSync(sources.directory)).toEqual([])
    })

    test('one that is about to be mounted is not evicted', async () => {
      const { cache, directory, tree } = await setUp(10_000_000)
      await cache.fill(id('a'), tree)
      const layer = cache.openLayer(id('a'))
      const small = await LayerCache.open({ directory, limitBytes: 0 })
      expect(small.evict()).toBe(false)
      layer?.close()
      expect(small.evict()).toBe(true)
    })

    test('what was used longest ago makes room', async () => {
      // Two trees of 300 kB fit, three do not.
      const { cache, tree } = await setUp(700_000)
      await cache.fill(id('a'), tree)
      await delay(5)
      await cache.fill(id('b'), tree)
      await use(cache, id('b'))
      await use(cache, id('a'))
      // The kernel's clock for files ticks every few milliseconds.
      await delay(20)
      await cache.fill(id('c'), tree)
      expect(cache.entries().map((entry) => entry.id)).toEqual([id('c'), id('a')])
      const held = [id('c'), id('a')].map((one) => cache.openLayer(one))
      await expect(cache.fill(id('d'), tree)).rejects.toMatchObject({ code: 'CACHE_FULL' })
      for (const layer of held) layer?.close()
      expect(
        await cache.prefetch([
          { id: id('a'), source: tree },
          { id: id('d'), source: tree },
        ]),
      ).toBe(2)
    })

    test('a layer that is larger than the cache has no place, and evicts nothing in vain', async () => {
      const { cache, directory, tree, image } = await setUp(50_000)
      await cache.fill(id('b'), image)
      await expect(cache.fill(id('a'), tree)).rejects.toMatchObject({ code: 'CACHE_FULL' })
      expect(readdirSync(directory)).toEqual([id('b')])
      const wanted = [id('a'), id('b')].map((one) => ({ id: one, source: one === id('a') ? tree : image }))
      expect(await cache.prefetch(wanted)).toBe(1)
    })

    test('filling the same layer at once copies it once; a stopped one leaves nothing', async () => {
      const { cache, directory, tree, image } = await setUp(10_000_000)
      await Promise.all([1, 2, 3].map(() => cache.fill(id('a'), tree)))
      await expect(cache.fill(id('b'), image, AbortSignal.abort())).rejects.toMatchObject({ name: 'AbortError' })
      expect(readdirSync(directory)).toEqual([id('a')])
    })

    test('what a killed process left half made is cleared away, what another still makes is not', async () => {
      const { directory } = await setUp(10_000_000)
      mkdirSync(`${directory}/.fill-0123456789abcdef`)
      mkdirSync(`${directory}/.gone-0123456789abcdef`)
      await LayerCache.open({ directory, limitBytes: 1 })
      expect(readdirSync(directory)).toEqual([])
      expect(existsSync(directory)).toBe(true)
    })
  },
)

describe.skipIf(!needs('root, mkfs.erofs and file-system tools', canMountImages() && isPresent('mkfs.erofs')))(
  'the cache of a node',
  () => {
    const store = useFileSystem('tmpfs')
    const disk = useFileSystem('ext4')
    const base = () => dir({ etc: dir({ hostname: file('base\n') }), big: file('x'.repeat(500_000)) })

    /** Whether the kernel has a layer of the mount from there. */
    const isFrom = (root: ContainerRoot, directory: string) =>
      readFileSync('/proc/self/mountinfo', 'utf8')
        .split('\n')
        .some((line) => line.includes(` ${root.mergedPath} `) && line.includes(`=${directory}/`))

    test.each<LayerStorage>(['tree', 'sealed'])('a root is mounted from it, and shows the same (%s)', async (form) => {
      const site = await makeSite(store.current.fresh(), disk.current.fresh(), base(), form)
      const state = site.node('one')
      await withRoot(site, 'one', async (root) => {
        await root.mount()
        writeFileSync(`${root.mergedPath}/etc/new`, 'x')
        await root.solidify()
        await root.unmount()
      })
      await withRoot(site, 'two', async (root) => {
        await root.mount()
        const before = shown(root)
        if (form === 'tree') expect(isFrom(root, site.home)).toBe(true)
        await root.unmount()
        await site.node('two').openCache(10_000_000)
        await withRoot(site, 'two', async (again) => {
          expect(await again.prefetch()).toEqual({ version: 2, local: 2, of: 2 })
          await again.mount()
          expect(isFrom(again, site.home)).toBe(false)
          if (form === 'tree') expect(isFrom(again, `${site.node('two').path}/cache`)).toBe(true)
          expect((await again.status()).layers?.map(({ local }) => local)).toEqual(['cache', 'cache'])
          expect(changesSince(before, again)).toEqual([])
          // What is mounted stays, whatever the limit.
          await site.node('two').openCache(0)
          expect((await again.status()).layers?.map(({ local }) => local)).toEqual(['cache', 'cache'])
          expect(changesSince(before, again)).toEqual([])
        })
        // The kernel lets go of an image a moment later.
        const isEmpty = async () => (await site.node('two').openCache(0))?.entries().length === 0
        for (let look = 0; look < 100 && !(await isEmpty()); look++) await delay(50)
        await root.mount()
        expect((await root.status()).layers?.map(({ local }) => local)).toEqual([undefined, undefined])
        expect(changesSince(before, root)).toEqual([])
      })
      // The node that made the layer has the upper that it was.
      await state.openCache(10_000_000)
      await withRoot(site, 'one', async (root) => {
        await root.mount({ prefetch: true })
        expect((await root.status()).layers?.map(({ local }) => local)).toEqual(['replica', 'cache'])
      })
    })

    test('a layer that has no place is read from the store', async () => {
      const site = await makeSite(store.current.fresh(), disk.current.fresh(), base())
      await site.node('one').openCache(100_000)
      await withRoot(site, 'one', async (root) => {
        await root.mount({ prefetch: true })
        expect((await root.status()).layers?.map(({ local }) => local)).toEqual([undefined])
        expect(readFileSync(`${root.mergedPath}/etc/hostname`, 'utf8')).toBe('base\n')
      })
    })
  },
)
