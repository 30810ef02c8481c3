import { existsSync, mkdirSync, readdirSync } from 'node:fs'
import { mountSealed, sealLayer, tryStore, unsealLayer } from '@lsync/container-root'
import type { HostPath } from '@lsync/posix'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { richTree } from '../layers/rich-tree.ts'
import {
  buildTree,
  dir,
  file,
  linkTo,
  metacopy,
  opaque,
  redirected,
  socket,
  sparse,
  whiteout,
  xattrWhiteout,
} from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { hasMooseFs, mooseFsLimits, useMooseFs } from '../support/moosefs.ts'
import { needs } from '../support/needs.ts'
import { mountOverlay, plainOptions } from '../support/overlay.ts'
import { hasPoorStore, usePoorStore } from '../support/poor-store.ts'
import { anyRawStack, buildLayers } from '../support/raw-layers.ts'
import { canMountImages } from '../support/ready.ts'
import { runs } from '../support/runs.ts'
import { isPresent, run, unmount } from '../support/system.ts'
import { diffTrees, readTree, type Tree } from '../support/tree.ts'

const path = (text: string) => text as HostPath
const ready = needs('root, mkfs.erofs and file-system tools', canMountImages() && isPresent('mkfs.erofs'))

// Compressed files have no holes; their zeros take no space in the image.
const noHoles = { holes: false }

/** Whiteouts come back as devices, with their own times: the view of them is tested with the overlays. */
function withoutWhiteouts(tree: Tree, others = new Set<string>()): Tree {
  return new Map([...tree].filter(([name]) => !name.includes('gone') && !others.has(name)))
}

/** What an image shows, read by the oracle. */
function shown(image: string, at: string): Tree {
  mkdirSync(at)
  mountSealed(path(image), path(at))
  try {
    return readTree(at)
  } finally {
    unmount(at)
  }
}

/** Everything that an upper can hold. EROFS of erofs-utils 1.5 takes no name of 255 bytes. */
function richLayer() {
  const { children, ...root } = richTree()
  const kept = Object.entries(children).filter(([name]) => name.length < 255)
  return {
    ...root,
    children: {
      ...Object.fromEntries(kept),
      gone: whiteout(),
      'gone too': xattrWhiteout(),
      mine: opaque({ inside: file('1'), again: linkTo('mine/inside'), gone: whiteout() }),
      moved: redirected('/from here'),
      data: metacopy(1000, { redirect: '/there' }),
      sock: socket({ mode: 0o600 }),
      empty: file(''),
      page: file('p'.repeat(4096)),
      compressible: file('abcdefgh'.repeat(100_000)),
      huge: sparse(50_000_000, [[49_999_000, 'end']]),
      many: dir(
        Object.fromEntries(Array.from({ length: 500 }, (_, i) => [`file ${i}`, file(`content ${i}`.repeat(i))])),
      ),
    },
  }
}

describe.skipIf(!ready)('sealed layers on ext4', () => {
  const disk = useFileSystem('ext4')

  test('an image shows all that the layer holds, and unsealing gives the layer back', async () => {
    const at = disk.current.fresh()
    buildTree(`${at}/layer`, richLayer())
    const before = readTree(`${at}/layer`)
    const report = await sealLayer({ layer: path(`${at}/layer`), image: path(`${at}/image`) })
    expect(report.losses).toEqual([])
    expect(report.entries).toBe(before.size)
    expect(report.sizeBytes).toBeLessThan(report.contentBytes / 20)
    expect(diffTrees(before, shown(`${at}/image`, `${at}/mounted`), noHoles)).toEqual([])
    await unsealLayer({ image: path(`${at}/image`), tree: path(`${at}/back`) })
    expect(diffTrees(withoutWhiteouts(before), withoutWhiteouts(readTree(`${at}/back`)), noHoles)).toEqual([])
    expect(readdirSync(at).sort()).toEqual(['back', 'image', 'layer', 'mounted'])
    run('rm', '-rf', at)
  })

  test('whatever an upper may hold comes through, and the overlay over images is the one over the trees', () =>
    fc.assert(
      fc.asyncProperty(anyRawStack(3, { namespace: 'trusted', redirects: true, metacopies: true }), async (specs) => {
        const at = disk.current.fresh()
        try {
          const layers = buildLayers(at, specs, 'trusted')
          const sealed: string[] = []
          for (const [index, layer] of layers.entries()) {
            const image = `${at}/image${index}`
            await sealLayer({ layer: path(layer), image: path(image) })
            const root = `${at}/sealed${index}`
            mkdirSync(root)
            mountSealed(path(image), path(root))
            sealed.push(root)
          }
          try {
            for (const [index, layer] of layers.entries()) {
              expect(diffTrees(readTree(layer), readTree(sealed[index] as string))).toEqual([])
            }
            expect(diffTrees(viewOf(at, layers), viewOf(at, sealed))).toEqual([])
          } finally {
            for (const root of sealed) unmount(root)
          }
        } finally {
          run('rm', '-rf', at)
        }
      }),
      runs(6),
    ))

  test('what cannot be held is refused, named, and leaves nothing behind', async () => {
    const at = disk.current.fresh()
    buildTree(`${at}/long`, dir({ ['n'.repeat(255)]: file('x') }))
    buildTree(`${at}/flags`, dir({ still: file('x', { flags: 'i' }), d: dir({ log: file('y', { flags: 'a' }) }) }))
    const seal = (name: string, options = {}) =>
      sealLayer({ layer: path(`${at}/${name}`), image: path(`${at}/${name}.image`), scratch: at, ...options })
    await expect(seal('long')).rejects.toMatchObject({ code: 'SEAL_FAILED' })
    await expect(seal('flags')).rejects.toMatchObject({
      code: 'SEAL_LOSSY',
      losses: [
        { path: 'd/log', what: 'flags' },
        { path: 'still', what: 'flags' },
      ],
    })
    expect(readdirSync(at).sort()).toEqual(['flags', 'long'])
    const { losses } = await seal('flags', { lossy: true })
    expect(losses.map(({ path }) => path)).toEqual(['d/log', 'still'])
    await expect(seal('flags', { lossy: true })).rejects.toMatchObject({ code: 'OUTPUT_EXISTS' })
    run('chattr', '-R', '-i', '-a', `${at}/flags`)
    run('rm', '-rf', at)
  })

  test('a signal stops it', async () => {
    const at = disk.current.fresh()
    buildTree(`${at}/layer`, dir({ f: file('x') }))
    const request = { layer: path(`${at}/layer`), image: path(`${at}/image`), scratch: at }
    await expect(sealLayer({ ...request, signal: AbortSignal.abort() })).rejects.toMatchObject({ name: 'AbortError' })
    expect(readdirSync(at)).toEqual(['layer'])
  })

  function viewOf(at: string, layers: readonly string[]): Tree {
    const merged = `${at}/merged`
    if (!existsSync(merged)) mkdirSync(merged)
    mountOverlay({ lowers: layers }, { ...plainOptions, redirectDir: 'on', metacopy: true }, merged, true)
    try {
      return readTree(merged)
    } finally {
      unmount(merged)
    }
  }
})

describe.skipIf(!ready)('sealed layers on tmpfs', () => {
  const memory = useFileSystem('tmpfs')

  test('an image is mounted through a loop device where EROFS cannot read the file itself', async () => {
    const at = memory.current.fresh()
    buildTree(`${at}/layer`, dir({ f: file('content', { mode: 0o4711, uid: 100_000 }), w: whiteout() }))
    await sealLayer({ layer: path(`${at}/layer`), image: path(`${at}/image`) })
    expect(diffTrees(readTree(`${at}/layer`), shown(`${at}/image`, `${at}/mounted`))).toEqual([])
  })

  test('an image that cannot be read back is not kept', async () => {
    const at = memory.current.fresh()
    // More than erofs-utils 1.5 has room for: it makes an image, and the kernel says EUCLEAN.
    const xattrs = Object.fromEntries(Array.from({ length: 300 }, (_, i) => [`user.key${i}`, 'z'.repeat(900)]))
    buildTree(`${at}/layer`, dir({ f: file('content', { xattrs }) }))
    await expect(
      sealLayer({ layer: path(`${at}/layer`), image: path(`${at}/image`), scratch: at }),
    ).rejects.toMatchObject({ code: 'SEAL_FAILED', message: expect.stringContaining('differs at f') })
    expect(readdirSync(at)).toEqual(['layer'])
  })
})

describe.skipIf(!ready || !needs('rclone and fusermount', hasPoorStore))('a store that has only files', () => {
  const store = usePoorStore()
  const memory = useFileSystem('tmpfs')

  test('holds sealed layers, by itself, and they show all', async () => {
    const at = store.current.fresh()
    const { storage, lacking } = tryStore(path(at))
    expect(storage).toBe('sealed')
    expect(lacking).toEqual(expect.arrayContaining(['trustedXattrs', 'whiteouts', 'hardLinks', 'keepsOwner']))
    expect(readdirSync(at)).toEqual([])
    const local = memory.current.fresh()
    buildTree(`${local}/layer`, richLayer())
    await sealLayer({ layer: path(`${local}/layer`), image: path(`${at}/image`) })
    expect(readdirSync(at)).toEqual(['image'])
    expect(diffTrees(readTree(`${local}/layer`), shown(`${at}/image`, `${local}/mounted`), noHoles)).toEqual([])
  })
})

describe.skipIf(!ready || !needs('MooseFS', hasMooseFs))('a MooseFS', () => {
  const moose = useMooseFs()
  const memory = useFileSystem('tmpfs')

  test('holds trees and sealed layers, and images are mounted from it without a loop device', async () => {
    const at = moose.current.fresh()
    const { storage, smallFileMs } = tryStore(path(at))
    expect(storage).toBe('tree')
    expect(smallFileMs).toBeGreaterThan(0)
    const layer = `${memory.current.fresh()}/layer`
    buildTree(layer, richLayer())
    await sealLayer({ layer: path(layer), image: path(`${at}/image`) })
    const before = readTree(layer)
    expect(diffTrees(before, shown(`${at}/image`, `${at}/mounted`), noHoles)).toEqual([])
    await unsealLayer({ image: path(`${at}/image`), tree: path(`${at}/back`) })
    const times = new Set(['late', 'old'])
    const back = withoutWhiteouts(readTree(`${at}/back`), times)
    expect(diffTrees(withoutWhiteouts(before, times), back, mooseFsLimits)).toEqual([])
  })
})
