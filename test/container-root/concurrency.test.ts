import { execFile } from 'node:child_process'
import { appendFileSync, existsSync, mkdirSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { promisify } from 'node:util'
import { ContainerRoot, type LayerStorage } from '@lsync/container-root'
import { describe, expect, test } from 'vitest'
import { lsyncPath } from '../cli/lsync.ts'
import { dir, file } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { canMountImages } from '../support/ready.ts'
import { isPresent } from '../support/system.ts'
import { changesSince, makeSite, type Site, shown, withRoot } from './roots.ts'

const ready = needs('root, mkfs.erofs and file-system tools', canMountImages() && isPresent('mkfs.erofs'))
const ROUNDS = 4
// Compressed files have no holes; their zeros take no space in the image.
const noHoles = { holes: false }

/** What a command does to a home again and again, in processes of its own, from one node, until it is over; how often it was done. */
async function again(site: Site, node: string, isOver: () => boolean, ...args: readonly string[]): Promise<number> {
  const state = site.node(node)
  await (await ContainerRoot.open(site.home, 'lab', { state })).close()
  for (let count = 0; ; count++) {
    if (isOver() && count > 0) return count
    await promisify(execFile)(lsyncPath, ['root', ...args, '--state', state.path])
  }
}

/** Writes on one node, with a version of each change, live and not in turns; what it shows at the end. */
async function write(root: ContainerRoot) {
  const { mergedPath: merged } = root
  for (let round = 0; round < ROUNDS; round++) {
    mkdirSync(`${merged}/round-${round}`)
    writeFileSync(`${merged}/round-${round}/file`, `${round}`.repeat(2000))
    appendFileSync(`${merged}/log`, `${round}\n`)
    if (round > 1) rmSync(`${merged}/round-${round - 2}`, { recursive: true })
    await root.solidify({ live: round % 2 === 0 })
  }
  return shown(root)
}

describe.skipIf(!ready)('several nodes at work on one home at once', () => {
  const disk = useFileSystem('ext4')

  test.each<LayerStorage>(['tree', 'sealed'])(
    'lose nothing, and find every version whole (%s)',
    async (layerForm) => {
      const at = disk.current.fresh()
      const site = await makeSite(
        at,
        at,
        dir({ log: file('base\n'), etc: dir({ hostname: file('lab\n') }) }),
        layerForm,
      )
      await withRoot(site, 'one', async (root) => {
        await root.mount()
        await root.startSync()
        let isDone = false
        const isOver = () => isDone
        const others = Promise.all([
          again(site, 'two', isOver, 'compact', 'lab', '--max-layers', '2'),
          again(site, 'three', isOver, 'compact', 'lab', '--max-layers', '1', '--into-bottom'),
          again(site, 'four', isOver, 'gc', 'lab', '--keep', '3', '--yes'),
          again(site, 'five', isOver, 'seal', 'lab', ...(layerForm === 'tree' ? [] : ['--undo'])),
          // It ends with 3 where it could not find everything out.
          again(site, 'six', isOver, 'status', 'lab'),
        ])
        const before = await write(root).finally(() => {
          isDone = true
        })
        for (const count of await others) expect(count).toBeGreaterThan(0)
        expect(root.versions().at(-1)?.number).toBe(ROUNDS + 1)
        expect(root.versions().length).toBeGreaterThanOrEqual(3)
        expect(changesSince(before, root, noHoles)).toEqual([])
        // Each version that was kept is whole, and can be compared with the others.
        const [first, ...later] = root.versions()
        for (const { number } of later) await root.diff(first?.number ?? 0, number, { content: true })
        await root.solidify()
        await root.unmount()
        await withRoot(site, 'two', async (other) => {
          await other.mount()
          expect(changesSince(before, other, noHoles)).toEqual([])
          expect(readFileSync(`${other.mergedPath}/log`, 'utf8')).toBe(
            ['base', ...Array.from({ length: ROUNDS }, (_, round) => round), ''].join('\n'),
          )
          await other.gc({ keep: 1, graceMs: -60_000 })
          expect(changesSince(before, other, noHoles)).toEqual([])
        })
        // Nobody left anything half made.
        for (const epoch of readdirSync(`${site.home}/incoming`)) {
          expect(readdirSync(`${site.home}/incoming/${epoch}`).filter((name) => name.startsWith('.'))).toEqual([])
        }
        for (const node of ['two', 'three', 'five']) {
          const state = `${site.node(node).path}/roots/lab`
          expect(existsSync(state)).toBe(true)
          expect(readdirSync(state).filter((name) => name.startsWith('scratch-'))).toEqual([])
        }
      })
    },
    120_000,
  )
})
