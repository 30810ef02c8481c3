import {
  appendFileSync,
  chmodSync,
  linkSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  renameSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import type { ContainerRoot } from '@lsync/container-root'
import { AT_FDCWD, type ByteString, bytesOf, setXattr } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { richTree } from '../layers/rich-tree.ts'
import { type DirectorySpec, dir, file } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { hasMooseFs, mooseFsLimits, useMooseFs } from '../support/moosefs.ts'
import { needs } from '../support/needs.ts'
import { canMountImages } from '../support/ready.ts'
import { isPresent } from '../support/system.ts'
import type { DiffOptions } from '../support/tree.ts'
import { changesSince, makeSite, type Site, shown, withRoot } from './roots.ts'

const ready = needs('root, mkfs.erofs and file-system tools', canMountImages() && isPresent('mkfs.erofs'))
// Compressed files have no holes; their zeros take no space in the image.
const noHoles = { holes: false }

function base(): DirectorySpec {
  const { children, ...root } = richTree()
  const kept = Object.fromEntries(Object.entries(children).filter(([name]) => name.length < 255))
  const below = dir({ keep: file('keep'), drop: file('drop'), sub: dir({ deep: file('deep'), gone: file('gone') }) })
  return { ...root, children: { ...kept, lib: below, etc2: dir({ conf: file('conf') }), plain: file('plain') } }
}

/** What is on the store before the container is stopped: changes of many kinds, some of which go again afterwards. */
function changeFirst(merged: string): void {
  mkdirSync(`${merged}/first/inner`, { recursive: true })
  for (const name of ['a', 'b', 'c']) writeFileSync(`${merged}/first/${name}`, name)
  writeFileSync(`${merged}/first/inner/d`, 'd')
  linkSync(`${merged}/first/a`, `${merged}/first/a link`)
  appendFileSync(`${merged}/lib/keep`, ' more')
  rmSync(`${merged}/lib/drop`)
  chmodSync(`${merged}/plain`, 0o600)
  // Closed in the copy already.
  rmSync(`${merged}/etc2`, { recursive: true })
  mkdirSync(`${merged}/etc2`)
  writeFileSync(`${merged}/etc2/new`, 'new')
}

type Change = (merged: string) => void

// What the delta can say by itself.
const changes: Record<string, Change> = {
  'files, new and changed': (at) => {
    writeFileSync(`${at}/first/e`, 'e')
    appendFileSync(`${at}/first/b`, 'changed')
    appendFileSync(`${at}/lib/sub/deep`, 'changed')
    appendFileSync(`${at}/plain`, 'copied up')
    writeFileSync(`${at}/first/empty`, '')
  },
  'metadata alone': (at) => {
    chmodSync(`${at}/first/b`, 0o600)
    chmodSync(`${at}/lib/sub/deep`, 0o640)
    chmodSync(`${at}/lib`, 0o700)
    chmodSync(`${at}/etc2`, 0o711)
    chmodSync(`${at}/plain`, 0o604)
    chmodSync(at, 0o751)
    setXattr(AT_FDCWD, bytesOf(`${at}/first`), 'user.note' as ByteString, Buffer.from('first'))
    setXattr(AT_FDCWD, bytesOf(`${at}/etc2`), 'user.note' as ByteString, Buffer.from('closed'))
  },
  'what goes, of the base and of what was new': (at) => {
    rmSync(`${at}/first/a`)
    rmSync(`${at}/first/inner`, { recursive: true })
    rmSync(`${at}/lib/keep`)
    rmSync(`${at}/lib/sub`, { recursive: true })
    rmSync(`${at}/etc2/new`)
  },
  'what goes and comes back as something else': (at) => {
    rmSync(`${at}/lib/sub`, { recursive: true })
    mkdirSync(`${at}/lib/sub`)
    writeFileSync(`${at}/lib/sub/only`, 'only')
    writeFileSync(`${at}/lib/drop`, 'back')
    rmSync(`${at}/first/inner`, { recursive: true })
    symlinkSync('a', `${at}/first/inner`)
    rmSync(`${at}/lib/keep`)
    mkdirSync(`${at}/lib/keep`)
    rmSync(`${at}/first/c`)
    mkdirSync(`${at}/first/c`)
    writeFileSync(`${at}/first/c/in`, 'in')
  },
  'links and renames': (at) => {
    linkSync(`${at}/first/b`, `${at}/lib/b link`)
    appendFileSync(`${at}/first/a`, 'seen by both')
    renameSync(`${at}/first/c`, `${at}/first/c2`)
    renameSync(`${at}/first/inner`, `${at}/etc2/inner`)
    mkdirSync(`${at}/second/x/y`, { recursive: true })
    renameSync(`${at}/first/c2`, `${at}/second/x/y/c3`)
  },
  'a new directory beside what was there': (at) => {
    mkdirSync(`${at}/lib/fresh/er`, { recursive: true })
    writeFileSync(`${at}/lib/fresh/er/file`, 'x'.repeat(100_000))
    mkdirSync(`${at}/first/empty`)
  },
}

// What has to travel as all else does.
const others: Record<string, Change> = {
  'a directory of the base under another name': (at) => renameSync(`${at}/lib`, `${at}/lib moved`),
  'a file of the base under another name, with another mode': (at) => {
    renameSync(`${at}/lib/sub/deep`, `${at}/lib/sub/deeper`)
    chmodSync(`${at}/lib/sub/deeper`, 0o600)
    writeFileSync(`${at}/first/e`, 'e')
  },
}

/** Solidifies a root that is written to while it is stopped. Gives what it showed then. */
async function solidifyWith(root: ContainerRoot, change: Change) {
  let before: ReturnType<typeof shown> | undefined
  const report = await root.solidify({
    sealsDelta: () => true,
    quiescence: {
      begin: async () => {
        change(root.mergedPath)
        before = shown(root)
      },
      end: async () => undefined,
    },
  })
  return { report, before: before as ReturnType<typeof shown> }
}

async function assertShown(
  site: Site,
  root: ContainerRoot,
  before: ReturnType<typeof shown>,
  limits: DiffOptions = noHoles,
): Promise<void> {
  expect(changesSince(before, root, noHoles)).toEqual([])
  await root.unmount()
  await withRoot(site, 'two', async (other) => {
    await other.mount()
    expect(changesSince(before, other, limits)).toEqual([])
    await other.unmount()
    // Folded in, and as trees.
    await other.compact({ maxLayers: 1 })
    await other.mount()
    expect((await other.status()).layers).toHaveLength(2)
    expect(changesSince(before, other, limits)).toEqual([])
  })
}

describe.skipIf(!ready)('what changes while a container is stopped, sealed on top of what was carried over', () => {
  const disk = useFileSystem('ext4')

  test.each(Object.entries(changes))(
    'shows %s, on both nodes, and folded in',
    async (_, change) => {
      const at = disk.current.fresh()
      const site = await makeSite(at, at, base())
      await withRoot(site, 'one', async (root) => {
        await root.mount()
        changeFirst(root.mergedPath)
        const { report, before } = await solidifyWith(root, change)
        expect(report.delta).toMatchObject({ layerId: report.version.layers[0] })
        expect(report.version.layers).toHaveLength(3)
        expect(report.version.layers[1]).toBe(report.layerId)
        const forms = report.version.layers.map((id) => root.home.layer(id)?.form)
        expect(forms).toEqual(['erofs', 'tree', 'tree'])
        await assertShown(site, root, before)
      })
    },
    60_000,
  )

  test.each(Object.entries(others))(
    'leaves %s to the sync, and shows it as well',
    async (_, change) => {
      const at = disk.current.fresh()
      const site = await makeSite(at, at, base())
      await withRoot(site, 'one', async (root) => {
        await root.mount()
        changeFirst(root.mergedPath)
        const { report, before } = await solidifyWith(root, change)
        expect(report.delta).toBeUndefined()
        expect(report.version.layers).toHaveLength(2)
        await assertShown(site, root, before)
      })
    },
    60_000,
  )

  test('is the only new layer where nothing was carried over before, and may hold redirects', async () => {
    const at = disk.current.fresh()
    const site = await makeSite(at, at, base())
    await withRoot(site, 'one', async (root) => {
      await root.mount()
      const { report, before } = await solidifyWith(root, (merged) => {
        changeFirst(merged)
        renameSync(`${merged}/lib`, `${merged}/lib moved`)
      })
      expect(report.version.layers).toHaveLength(2)
      expect(report.delta?.layerId).toBe(report.layerId)
      expect(root.home.layer(report.layerId)?.form).toBe('erofs')
      expect(incoming(site)).toEqual([])
      await assertShown(site, root, before)
    })
  }, 60_000)

  test('is not made of nothing, and not of what is not wanted so', async () => {
    const at = disk.current.fresh()
    const site = await makeSite(at, at, base())
    await withRoot(site, 'one', async (root) => {
      await root.mount()
      changeFirst(root.mergedPath)
      expect((await root.solidify({ sealsDelta: () => true })).delta).toBeUndefined()
      const asked: { names: number; bytes: number }[] = []
      const report = await root.solidify({
        sealsDelta: (counts) => asked.push(counts) === 0,
        quiescence: {
          begin: async () => writeFileSync(`${root.mergedPath}/first/e`, 'eleven bytes'.slice(0, 11)),
          end: async () => undefined,
        },
      })
      // The directory that it is in changed as well.
      expect(asked).toEqual([{ names: 2, bytes: 11 }])
      expect(report.delta).toBeUndefined()
      expect(lstatSync(`${root.mergedPath}/first/e`).size).toBe(11)
    })
  }, 60_000)

  test('follows on others, and the copy goes on where the container goes on', async () => {
    const at = disk.current.fresh()
    const site = await makeSite(at, at, base())
    await withRoot(site, 'one', async (root) => {
      await root.mount()
      await root.startSync()
      let last: ReturnType<typeof shown> | undefined
      for (const [name, change] of Object.entries(changes)) {
        changeFirstAgain(root.mergedPath, name)
        const { before } = await solidifyWith(root, change)
        expect(changesSince(before, root, noHoles)).toEqual([])
        last = before
      }
      await assertShown(site, root, last as ReturnType<typeof shown>)
    })
  }, 120_000)
})

/** The same as `changeFirst` in a tree that had others before. */
function changeFirstAgain(merged: string, name: string): void {
  for (const path of ['first', 'second', 'etc2', 'lib', 'plain'])
    rmSync(`${merged}/${path}`, { recursive: true, force: true })
  mkdirSync(`${merged}/lib/sub`, { recursive: true })
  mkdirSync(`${merged}/etc2`)
  for (const path of ['lib/keep', 'lib/drop', 'lib/sub/deep', 'lib/sub/gone', 'plain'])
    writeFileSync(`${merged}/${path}`, name)
  changeFirst(merged)
}

function incoming({ home }: Site): string[] {
  return readdirSync(`${home}/incoming`).flatMap((epoch) => readdirSync(`${home}/incoming/${epoch}`))
}

describe.skipIf(!ready || !needs('MooseFS', hasMooseFs))('on a MooseFS', () => {
  const store = useMooseFs()
  const disk = useFileSystem('ext4')

  test('a sealed delta of everything shows the same on another node', async () => {
    const site = await makeSite(store.current.fresh(), disk.current.fresh(), base())
    await withRoot(site, 'one', async (root) => {
      await root.mount()
      changeFirst(root.mergedPath)
      const { report, before } = await solidifyWith(root, (merged) => {
        for (const name of ['files, new and changed', 'what goes, of the base and of what was new']) {
          changes[name]?.(merged)
        }
      })
      expect(report.delta?.imageBytes).toBeGreaterThan(0)
      await assertShown(site, root, before, { ...mooseFsLimits, ...noHoles })
    })
  }, 120_000)
})
