import { rmSync } from 'node:fs'
import { type HostPath, openRoot, syncFileSystem, withFd } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { engine } from '../support/engine.ts'
import { countCalls, killAt } from '../support/faults.ts'
import { mountImage, withFileSystem } from '../support/image.ts'
import { closeAll, recoverAndJudge, scenarios, setUp } from '../support/interrupted.ts'
import { canMountImages } from '../support/ready.ts'
import { timeLimit } from '../support/runs.ts'
import { run, unmount } from '../support/system.ts'

const factor = Number(process.env['LSYNC_TEST_RUNS'] ?? 1)

// The image in RAM holds what the file system has written to its disk, and nothing that is still in the page cache. A
// copy of it, taken at a step of the merge and mounted in its place, is the disk after the power went at that step.
describe.skipIf(!canMountImages()).each(scenarios)('power loss: $name', (scenario) => {
  test.each(['ext4', 'xfs', 'btrfs'] as const)(
    'on %s, at any step, leaves the old view or the new one',
    async (kind) => {
      const count = await withFileSystem(kind, async (fs) => {
        const attempt = setUp(fs.fresh(), scenario)
        const calls = await countCalls('kill', () => engine.merge(attempt.request))
        closeAll(attempt)
        return calls
      })
      const problems: string[] = []
      const samples = Math.round(4 * factor)
      for (let sample = 0; sample < samples; sample++) {
        // The last step is the most interesting one: all was done, but is it durable?
        const n = count - 1 - Math.floor((sample * count) / samples)
        await withFileSystem(kind, async (fs) => {
          const attempt = setUp(fs.fresh(), scenario)
          withFd(openRoot(fs.root as HostPath), (fd) => syncFileSystem(fd))
          const image = fs.image as string
          const lost = `${image}.lost`
          await killAt(
            n,
            () => engine.merge(attempt.request),
            () => run('cp', '--sparse=always', image, lost),
          )
          closeAll(attempt)
          unmount(fs.root)
          mountImage(lost, fs.root, kind)
          try {
            problems.push(...(await recoverAndJudge(attempt)).map((line) => `step ${n} of ${count}: ${line}`))
          } finally {
            rmSync(lost, { force: true })
          }
        })
      }
      expect(problems.slice(0, 30)).toEqual([])
    },
    timeLimit(),
  )
})
