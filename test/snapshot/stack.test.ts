import { linkSync, rmSync } from 'node:fs'
import { hostPath, type LsyncError } from '@lsync/posix'
import { createSnapshot, findSnapshot, type Repository, restoreSnapshot } from '@lsync/snapshot'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { buildTree, dir, file, linkTo, metacopy, opaque, redirected, removeTree, whiteout } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { viewOf } from '../support/merging.ts'
import { anyHistory, growStack } from '../support/operations.ts'
import { type OverlayOptions, plainOptions, withOverlay } from '../support/overlay.ts'
import { anyRawStack, buildLayers, withoutMetacopies } from '../support/raw-layers.ts'
import { canMountImages } from '../support/ready.ts'
import { newRepository } from '../support/repository.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { diffTrees, readTree } from '../support/tree.ts'

const kinds = [
  {
    name: 'trusted marks, redirects and metacopies',
    options: { ...plainOptions, redirectDir: 'on', metacopy: true },
    raw: { namespace: 'trusted', redirects: true, metacopies: true },
  },
  {
    name: 'user marks',
    options: { ...plainOptions, namespace: 'user' },
    raw: { namespace: 'user', redirects: false, metacopies: false },
  },
] as const satisfies readonly { name: string; options: OverlayOptions; raw: object }[]

/** Saves what layers show, without a mount, and restores it. Returns where to. */
async function restored(repository: Repository, layers: readonly string[], { namespace }: OverlayOptions, to: string) {
  const [upper = '', ...lowers] = layers
  const stack = { upper: hostPath(upper), lowers: lowers.map((lower) => hostPath(lower)), namespace }
  const targets = [{ path: hostPath('/shown/as'), stack }]
  const { snapshotId, problems } = await createSnapshot(repository, { targets, parent: 'none' })
  expect(problems).toEqual([])
  const target = hostPath(to)
  rmSync(target, { recursive: true, force: true })
  const snapshot = await findSnapshot(repository, snapshotId)
  expect((await restoreSnapshot(repository, { snapshot, target })).problems).toEqual([])
  return target
}

describe.skipIf(!canMountImages())('a snapshot of a stack', () => {
  const disk = useFileSystem('ext4')

  describe.each(kinds)('with $name', ({ options, raw }) => {
    test.each([2, 3])(
      'of %i layers in any state is what the kernel shows',
      async (count) => {
        const { repository } = await newRepository()
        await fc.assert(
          fc.asyncProperty(anyRawStack(count, raw), async (specs) => {
            const directory = disk.current.fresh()
            try {
              let layers = buildLayers(directory, specs, options.namespace)
              const view = () => viewOf({ directory, layers, options, rawBottom: true })
              // A metacopy without its data, which nothing but a broken layer has.
              if ([...view().values()].some(({ error }) => error !== undefined)) {
                layers = buildLayers(`${directory}/repaired`, specs.map(withoutMetacopies), options.namespace)
              }
              const target = await restored(repository, layers, options, `${directory}/restored`)
              // Two directories that lead to one place show the same inodes twice, which is no hard link that anyone made.
              const links = options.namespace === 'user'
              expect(diffTrees(view(), readTree(target), { links, holes: false })).toEqual([])
            } finally {
              removeTree(directory)
            }
          }),
          runs(8),
        )
      },
      timeLimit(),
    )

    test(
      'that containers have worked on is what the kernel shows',
      async () => {
        const { repository } = await newRepository()
        await fc.assert(
          fc.asyncProperty(anyHistory(2), async (history) => {
            const directory = disk.current.fresh()
            try {
              const stack = growStack(directory, history, options)
              const view = withOverlay(stack, options, readTree, { readOnly: true })
              const layers = [stack.upper ?? '', ...stack.lowers]
              const target = await restored(repository, layers, options, `${directory}/restored`)
              // A snapshot keeps neither holes nor flags.
              expect(diffTrees(view, readTree(target), { holes: false, flags: false })).toEqual([])
            } finally {
              removeTree(directory)
            }
          }),
          runs(5),
        )
      },
      timeLimit(),
    )
  })

  test('reads what changed, follows redirects and metacopies to their data, and keeps two layers with one inode apart', async () => {
    const { repository } = await newRepository()
    const directory = disk.current.fresh()
    buildTree(
      `${directory}/low`,
      dir({
        old: dir({ f: file('deep') }),
        m: file('whole'),
        gone: file(''),
        shut: dir({ under: file('') }),
        h: file('1'),
      }),
    )
    buildTree(
      `${directory}/up`,
      dir({
        new: redirected('old', { g: file('own') }),
        old: whiteout(),
        m: metacopy(5, { mode: 0o600 }),
        gone: whiteout(),
        shut: opaque({ over: file('') }),
        one: file('x'),
        two: linkTo('one'),
      }),
    )
    linkSync(`${directory}/low/h`, `${directory}/up/k`)
    const stack = { upper: hostPath(`${directory}/up`), lowers: [hostPath(`${directory}/low`)] }
    const path = hostPath('/web')
    const first = await createSnapshot(repository, { targets: [{ path, stack }] })
    expect(first.problems).toEqual([])
    const second = await createSnapshot(repository, { targets: [{ path, stack }] })
    expect(second.tree).toBe(first.tree)
    expect(second.counts).toMatchObject({ filesNew: 0, filesChanged: 0, readBytes: 0, filesUnmodified: 8 })
    const snapshot = await findSnapshot(repository, second.snapshotId)
    await restoreSnapshot(repository, { snapshot, target: hostPath(`${directory}/back`) })
    const back = readTree(`${directory}/back`)
    expect([...back].map(([name, { content }]) => [name, content])).toEqual([
      ['', undefined],
      ['h', '1'],
      ['k', '1'],
      ['m', 'whole'],
      ['new', undefined],
      ['new/f', 'deep'],
      ['new/g', 'own'],
      ['one', 'x'],
      ['shut', undefined],
      ['shut/over', ''],
      ['two', 'x'],
    ])
    expect(back.get('m')?.mode).toBe(0o600)
    expect(back.get('one')?.links).toEqual(['one', 'two'])
    expect([back.get('h')?.links, back.get('k')?.links]).toEqual([undefined, undefined])
  })

  test('of which a layer is missing is not made', async () => {
    const { repository } = await newRepository()
    const stack = { upper: hostPath(disk.current.fresh()), lowers: [hostPath('/nowhere/at/all')] }
    const failure = await createSnapshot(repository, { targets: [{ path: hostPath('/a'), stack }] }).catch(
      (error) => error,
    )
    expect((failure as LsyncError).code).toBe('ENOENT')
    expect(await repository.listIds('snapshot')).toEqual([])
    expect(await repository.listIds('lock')).toEqual([])
  })
})
