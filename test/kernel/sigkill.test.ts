import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import type { MergeCase } from '../support/engine.ts'
import { useFileSystem } from '../support/image.ts'
import { judge, manyTimes, recoverAndJudge, scenarios, setUp, tearDown } from '../support/interrupted.ts'
import { canMountImages } from '../support/ready.ts'
import { runs, timeLimit } from '../support/runs.ts'

const child = fileURLToPath(new URL('../support/merge-child.ts', import.meta.url))

/** Runs the merge in a process of its own, with its worker threads, and kills it after a while. Ms from start to end. */
async function mergeAndKill(request: MergeCase, killAfterMs: number): Promise<{ ms: number; exit: string }> {
  const process_ = spawn(process.execPath, [child, JSON.stringify({ ...request, workers: 2 })], {
    stdio: ['ignore', 'pipe', 'pipe'],
  })
  let errors = ''
  process_.stderr.on('data', (data) => {
    errors += data
  })
  const ended = once(process_, 'exit')
  await Promise.race([once(process_.stdout, 'data'), ended])
  const start = performance.now()
  const timer = new AbortController()
  const killing = delay(killAfterMs, undefined, { signal: timer.signal }).then(
    () => process_.kill('SIGKILL'),
    () => undefined,
  )
  const [code, signal] = (await ended) as [number | null, string | null]
  timer.abort()
  await killing
  const ms = performance.now() - start
  if (signal === null && code !== 0) throw new Error(`the merge failed by itself: ${errors}`)
  return { ms, exit: signal ?? 'done' }
}

describe.skipIf(!canMountImages()).each(scenarios)('killed from outside: $name', (scenario) => {
  const disk = useFileSystem('ext4')
  const layers = manyTimes(20)
  const begin = () => setUp(disk.current.fresh(), scenario, layers)

  test(
    'SIGKILL at any moment leaves the old view or the new one',
    async () => {
      const first = begin()
      const { ms } = await mergeAndKill(first.request, 60_000)
      expect(judge(first)).toEqual({ isNew: true, problems: [] })
      tearDown(first)
      const { seed, numRuns } = runs(4)
      await fc.assert(
        fc.asyncProperty(fc.double({ min: 0, max: 1, noNaN: true }), async (share) => {
          const attempt = begin()
          const { exit } = await mergeAndKill(attempt.request, share * ms)
          const problems = await recoverAndJudge(attempt)
          tearDown(attempt)
          if (problems.length > 0)
            expect.fail(`${exit} after ${share} of ${ms} ms: ${problems.slice(0, 20).join('\n')}`)
        }),
        { numRuns: numRuns ?? 1, endOnFailure: true, ...(seed === undefined ? {} : { seed }) },
      )
    },
    timeLimit(),
  )
})
