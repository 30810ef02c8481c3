import { writeFileSync } from 'node:fs'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { removeTree } from './build.ts'
import type { MergeCase } from './engine.ts'
import { type FileSystemKind, useFileSystem } from './image.ts'
import { describeLayers, describeTree, mergeEveryWay, viewOf } from './merging.ts'
import { anyHistory, growStack, type Operation } from './operations.ts'
import { isMountable, optionMatrix } from './overlay.ts'
import { canMountImages } from './ready.ts'
import { runs, timeLimit } from './runs.ts'

const CLONES: Readonly<Record<FileSystemKind, readonly NonNullable<MergeCase['clone']>[]>> = {
  ext4: ['copy', 'hardlink'],
  'ext4-nodtype': ['auto'],
  xfs: ['reflink', 'hardlink'],
  btrfs: ['reflink', 'copy'],
  tmpfs: ['copy', 'auto'],
}

/**
 * The matrix of one file system: every mount option that the kernel takes, one to four lowers, each grown by a random
 * history through real mounts, merged in every mode and compared with the mounted view.
 */
export function describeMatrix(kind: FileSystemKind): void {
  describe.skipIf(!canMountImages())(`on ${kind} the merge shows what the kernel showed`, () => {
    const disk = useFileSystem(kind)
    const cells = optionMatrix().filter((cell) => cell.excluded === undefined)
    describe.each(cells)('$name', ({ options }) => {
      test.each([1, 2, 3, 4])(
        'with %i lowers',
        async (lowers) => {
          await fc.assert(
            fc.asyncProperty(anyHistory(lowers), async (history) => {
              const directory = disk.current.fresh()
              try {
                const stack = growStack(directory, history, options)
                if (!isMountable(stack, options)) return
                const layers = [stack.upper, ...stack.lowers]
                const subject = { directory, layers, work: stack.work, options, clones: CLONES[kind] }
                const story = `${describeHistory(stack.done)}\n${describeLayers(layers)}\nview\n${describeTree(viewOf(subject))}`
                await expectNone(mergeEveryWay(subject), story)
              } finally {
                removeTree(directory)
              }
            }),
            runs(2),
          )
        },
        timeLimit(),
      )
    })
  })
}

function describeHistory(done: readonly (readonly Operation[])[]): string {
  return done
    .map(
      (operations, index) =>
        `session ${index}\n${operations.map((one) => `  ${JSON.stringify(one, bigints)}`).join('\n')}`,
    )
    .join('\n')
}

function bigints(_key: string, value: unknown): unknown {
  return typeof value === 'bigint' ? `${value}n` : value
}

/** Fails with the differences, and with the story of the case: what was done, the raw layers, the view. */
export async function expectNone(problems: Promise<string[]>, story: string): Promise<void> {
  const lines = await problems
  const file = process.env['LSYNC_TEST_STORY']
  if (lines.length > 0 && file !== undefined) writeFileSync(file, `${lines.join('\n')}\n${story}\n`)
  if (lines.length > 0) expect.fail(`${lines.join('\n')}\n\n${story}`)
}
