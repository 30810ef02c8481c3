import { vacuum } from '@lsync/overlay-merge'
import { type HostPath, PosixError, setSyscallHook } from '@lsync/posix'
import { afterEach, describe, expect, test } from 'vitest'
import { buildTree, dir, file, linkTo, opaque, redirected, removeTree, symlink, whiteout, xattrWhiteout } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { describeLayers } from '../support/merging.ts'
import { optionMatrix, withOverlay } from '../support/overlay.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { diffTrees, outline, readTree } from '../support/tree.ts'
import { anyHistory, copyUpEverything, fc, storyOf, withGrown } from './stacks.ts'

const disk = useFileSystem('ext4')
afterEach(() => setSyscallHook(undefined))

describe('vacuum leaves the view as it is', () => {
  const cells = optionMatrix().filter((cell) => cell.excluded === undefined)
  describe.each(cells)('$name', ({ options }) => {
    test.each([1, 3])(
      'after a history over %i lowers, and drops nothing the second time',
      async (lowers) => {
        await fc.assert(
          fc.asyncProperty(anyHistory(lowers), fc.boolean(), (history, copyUp) =>
            withGrown(disk.current, history, options, async (grown) => {
              if (copyUp) copyUpEverything(grown, options.namespace)
              const before = grown.view()
              const layers = describeLayers([grown.upper, ...grown.lowers])
              const planned = await vacuum({ ...grown.request, dryRun: true })
              const { dropped } = await vacuum(grown.request)
              expect(planned.dropped).toEqual(dropped)
              const lines = diffTrees(before, grown.view())
              if (lines.length > 0) expect.fail(`${lines.join('\n')}\n${storyOf(grown)}\n${layers}`)
              expect((await vacuum(grown.request)).dropped).toEqual([])
            }),
          ),
          runs(4),
        )
      },
      timeLimit(),
    )
  })
})
