import { mkdirSync } from 'node:fs'
import { convertLayer } from '@lsync/overlay-merge'
import { hostPath, type LsyncError } from '@lsync/posix'
import { createSnapshot, type Repository } from '@lsync/snapshot'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { layerDifference } from '../../packages/snapshot/src/difference.ts'
import { NodeReader } from '../../packages/snapshot/src/layer-items.ts'
import { locatePath } from '../../packages/snapshot/src/select.ts'
import { buildTree, type DirectorySpec, dir, file, linkTo, opaque, removeTree, whiteout } from '../support/build.ts'
import { copyTree } from '../support/copy.ts'
import { useFileSystem } from '../support/image.ts'
import { anyHistory, anyOperations, applyOperations, growStack, type Operation } from '../support/operations.ts'
import { plainOptions, withOverlay } from '../support/overlay.ts'
import { canMountImages } from '../support/ready.ts'
import { newRepository } from '../support/repository.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { diffTrees, readTree } from '../support/tree.ts'

/** Without chattr: flags that an upper emulates are shown by an upper alone, and no layer of an image has any. */
function withoutFlags(operations: readonly Operation[]): Operation[] {
  return operations.filter((operation) => operation.do !== 'chattr')
}

async function saved(repository: Repository, path: string) {
  const { snapshotId, problems } = await createSnapshot(repository, { targets: [{ path: hostPath(path) }] })
  expect(problems).toEqual([])
  await repository.loadIndex()
  const { node, tree } = await locatePath(repository, await repository.readSnapshot(snapshotId), hostPath(path))
  return { node, tree: tree as string }
}

type Version = Awaited<ReturnType<typeof saved>>

/** Makes the kernel layer of what changed. */
async function makeDelta(repository: Repository, before: Version, after: Version, to: string): Promise<void> {
  const content = await layerDifference(repository, before.tree, after.tree, 'trusted')
  const reader = new NodeReader(repository, { node: after.node, content }, 'trusted')
  const form = { fromForm: 'kernel-trusted', toForm: 'kernel-trusted' } as const
  await convertLayer({ from: reader, to: hostPath(to), ...form })
}

describe.skipIf(!canMountImages())('the layer of what changed between two versions of an upper', () => {
  const disk = useFileSystem('ext4')

  test(
    'shows, on the older one, what the newer one shows, whatever a container did in between',
    async () => {
      const { repository } = await newRepository()
      await fc.assert(
        fc.asyncProperty(anyHistory(2), anyOperations(1, 25), async (history, operations) => {
          const directory = disk.current.fresh()
          try {
            const sessions = history.sessions.map(withoutFlags)
            const stack = growStack(directory, { bottom: withoutFlags(history.bottom), sessions }, plainOptions)
            const before = await saved(repository, stack.upper)
            mkdirSync(`${directory}/before`)
            copyTree(stack.upper, `${directory}/before`)
            withOverlay(stack, plainOptions, (merged) => applyOperations(merged, withoutFlags(operations)))
            const after = await saved(repository, stack.upper)
            await makeDelta(repository, before, after, `${directory}/delta`)
            const view = withOverlay(stack, plainOptions, readTree, { readOnly: true })
            const layers = [`${directory}/delta`, `${directory}/before`, ...stack.lowers]
            const shown = withOverlay({ lowers: layers }, plainOptions, readTree)
            expect(diffTrees(view, shown, { holes: false })).toEqual([])
          } finally {
            removeTree(directory)
          }
        }),
        runs(10),
      )
    },
    timeLimit(),
  )

  const base = dir({
    d: dir({ low: file('low'), both: file('low') }),
    gone: file('low'),
    shut: dir({ low: file('low') }),
    w: dir({ low: file('low') }),
  })
  const cases: Record<string, readonly [before: DirectorySpec, after: DirectorySpec, code?: string]> = {
    'a directory that became opaque comes whole': [
      dir({ d: dir({ own: file('1'), both: file('2') }) }),
      dir({ d: opaque({ own: file('1'), both: file('2'), new: file('3') }) }),
    ],
    'one that is opaque in both comes with its changes alone, and without the mark': [
      dir({ d: opaque({ own: file('1'), old: file('2'), kept: dir({ f: file('x') }) }) }),
      dir({ d: opaque({ own: file('changed'), kept: dir({ f: file('x') }) }) }),
    ],
    'a whiteout in an opaque directory means nothing, and may go away': [
      dir({ d: opaque({ low: whiteout(), own: file('1') }) }),
      dir({ d: opaque({ own: file('1') }) }),
    ],
    'a deleted directory that was made again is shut': [
      dir({ w: whiteout(), gone: whiteout() }),
      dir({ w: opaque({ own: file('') }), gone: opaque({ f: file('') }) }),
    ],
    'a file became a directory, and a directory a whiteout': [
      dir({ new: file('1'), d: dir({ own: file('1') }) }),
      dir({ new: dir({ f: file('1') }), d: whiteout() }),
    ],
    'a new name of an old file brings its other names along': [
      dir({ a: file('linked'), deep: dir({ er: dir({ b: linkTo('a') }) }), same: file('') }),
      dir({ a: file('linked'), deep: dir({ er: dir({ b: linkTo('a') }) }), same: file(''), c: linkTo('a') }),
    ],
    'a whiteout went away': [dir({ gone: whiteout() }), dir(), 'REQUEST_INVALID'],
    'an opaque directory gave way to one that is not, where nothing lies beneath': [
      dir({ own: opaque({ a: file('1'), b: file('2'), gone: whiteout() }) }),
      dir({ own: dir({ b: file('2'), c: file('3') }) }),
    ],
    'a whiteout became a directory that lets everything through': [
      dir({ w: whiteout() }),
      dir({ w: dir({ own: file('') }) }),
      'REQUEST_INVALID',
    ],
  }

  test.each(Object.entries(cases))('%s', async (_name, [before, after, code]) => {
    const { repository } = await newRepository()
    const directory = disk.current.fresh()
    buildTree(`${directory}/base`, base)
    buildTree(`${directory}/before`, before)
    buildTree(`${directory}/after`, after)
    const versions = [
      await saved(repository, `${directory}/before`),
      await saved(repository, `${directory}/after`),
    ] as const
    const made = makeDelta(repository, ...versions, `${directory}/delta`)
    if (code !== undefined) {
      expect(await made.catch((error: LsyncError) => error.code)).toBe(code)
      return
    }
    await made
    const show = (...names: string[]) =>
      withOverlay({ lowers: names.map((name) => `${directory}/${name}`) }, plainOptions, readTree)
    expect(diffTrees(show('after', 'base'), show('delta', 'before', 'base'))).toEqual([])
  })
})
