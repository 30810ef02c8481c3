import { appendFileSync, mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { ContainerRoot } from '@lsync/container-root'
import { expect, test } from 'vitest'
import { dir, file } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { withPowerCut } from '../support/power-cut.ts'
import { canMountImages } from '../support/ready.ts'
import { isPresent, unmount } from '../support/system.ts'
import type { Tree } from '../support/tree.ts'
import { changesSince, makeSite, type Site, shown, withRoot } from './roots.ts'

const canRun = needs('a mount and mkfs.erofs', canMountImages() && isPresent('mkfs.erofs'))
const disk = useFileSystem('ext4')
const POINTS = 7

/** A root with changes, some of which are only made when it is stopped. */
interface Trial {
  readonly site: Site
  /** What it showed last. */
  before: Tree
}

async function prepare(isCopied: boolean): Promise<Trial> {
  const at = disk.current.fresh()
  const base = dir({ etc: dir({ hostname: file('base\n') }), old: file('x'), d: dir({ a: file('a') }) })
  const site = await makeSite(at, at, base)
  const root = await ContainerRoot.open(site.home, 'lab', { state: site.node('one') })
  await root.mount()
  if (isCopied) {
    appendFileSync(`${root.mergedPath}/etc/hostname`, 'more\n')
    mkdirSync(`${root.mergedPath}/new`)
    writeFileSync(`${root.mergedPath}/new/file`, 'new')
  }
  const before = shown(root)
  await root.close()
  return { site, before }
}

/** Everything is cut off at the call `at` after what came before the stop; `undefined` if it was. */
async function solidify(trial: Trial, at: number): Promise<number | undefined> {
  const root = await ContainerRoot.open(trial.site.home, 'lab', { state: trial.site.node('one') })
  const begin = async () => {
    rmSync(`${root.mergedPath}/old`)
    rmSync(`${root.mergedPath}/new`, { recursive: true, force: true })
    writeFileSync(`${root.mergedPath}/d/late`, 'late')
    trial.before = shown(root)
  }
  try {
    return await withPowerCut(at, (arm) => {
      root.events.on('step', ({ step }) => (step === 'copied' ? arm() : undefined))
      return root.solidify({ sealsDelta: () => true, quiescence: { begin, end: async () => undefined } })
    })
  } finally {
    await root.close()
  }
}

/** The machine starts again. Gives the number of versions. */
async function assertNothingLost({ site, before }: Trial, isMountGone: boolean): Promise<number> {
  if (isMountGone) unmount(`${site.node('one').path}/roots/lab/merged`)
  return withRoot(site, 'one', async (root) => {
    await root.recover()
    const versions = root.versions().length
    await root.mount()
    expect(changesSince(before, root)).toEqual([])
    await root.solidify()
    expect(changesSince(before, root)).toEqual([])
    await root.unmount()
    await withRoot(site, 'two', async (other) => {
      await other.mount()
      expect(changesSince(before, other)).toEqual([])
    })
    return versions
  })
}

test.skipIf(!canRun).each([true, false])(
  'a sealed delta that is cut off anywhere loses nothing (on top of a copy: %s)',
  async (isCopied) => {
    const first = await prepare(isCopied)
    const calls = (await solidify(first, Number.POSITIVE_INFINITY)) as number
    expect(await assertNothingLost(first, false)).toBe(2)
    const versions = new Set<number>()
    for (let i = 0; i < POINTS; i++) {
      const at = Math.round((i * (calls - 1)) / (POINTS - 1))
      const trial = await prepare(isCopied)
      await solidify(trial, at)
      const published = await assertNothingLost(trial, i % 2 === 1).catch((error: Error) => {
        error.message = `cut at call ${at} of ${calls}: ${error.message}`
        throw error
      })
      versions.add(published)
    }
    // Both sides of the publication were reached.
    expect([...versions].sort()).toEqual([1, 2])
  },
  300_000,
)
