import { describe, expect, test } from 'vitest'
import { engine } from '../support/engine.ts'
import { countCalls, failAt, killAt, recordCalls } from '../support/faults.ts'
import { descriptorsBelow, useFileSystem } from '../support/image.ts'
import { closeAll, judge, recoverAndJudge, scenarios, setUp, tearDown } from '../support/interrupted.ts'
import { describeError } from '../support/merging.ts'
import { canMountImages } from '../support/ready.ts'
import { timeLimit } from '../support/runs.ts'

const factor = Number(process.env['LSYNC_TEST_RUNS'] ?? 1)
const codes = ['ENOSPC', 'EIO', 'EACCES', 'EMFILE'] as const

/** Every n-th of `count`, so that a short run still covers the whole length; all of them from a factor of `full` on. */
function places(count: number, full: number, offset = 0): number[] {
  const step = Math.max(1, Math.round(full / factor))
  return Array.from({ length: count }, (_, n) => n).filter((n) => n % step === offset % step)
}

describe.skipIf(!canMountImages()).each(scenarios)('interrupted: $name', (scenario) => {
  const disk = useFileSystem('tmpfs')
  const begin = () => setUp(disk.current.fresh(), scenario)

  test('uninterrupted it gives the new view and leaves nothing behind', async () => {
    const attempt = begin()
    await engine.merge(attempt.request)
    expect(judge(attempt)).toEqual({ isNew: true, problems: [] })
    tearDown(attempt)
  })

  test(
    'killed before any step, it recovers to the old view or the new one',
    async () => {
      const first = begin()
      const count = await countCalls('kill', () => engine.merge(first.request))
      tearDown(first)
      expect(count).toBeGreaterThan(20)
      const problems: string[] = []
      for (const n of places(count, scenario.mode === 'in-place' ? 1 : 4)) {
        const attempt = begin()
        const wasKilled = await killAt(n, () => engine.merge(attempt.request))
        if (!wasKilled) problems.push(`step ${n}: was not reached`)
        problems.push(...(await recoverAndJudge(attempt)).map((line) => `step ${n} of ${count}: ${line}`))
        tearDown(attempt)
      }
      expect(summaryOf(problems)).toEqual([])
    },
    timeLimit(),
  )

  test(
    'killed again while it recovers, it recovers',
    async () => {
      const first = begin()
      const count = await countCalls('kill', () => engine.merge(first.request))
      tearDown(first)
      const problems: string[] = []
      for (const n of places(count, 8, 3)) {
        const attempt = begin()
        await killAt(n, () => engine.merge(attempt.request))
        closeAll(attempt)
        try {
          // Twice, each at another place of the recovery.
          await killAt((n * 7) % 23, () => engine.recover(attempt.request))
          closeAll(attempt)
          await killAt((n * 5) % 41, () => engine.recover(attempt.request))
        } catch (cause) {
          problems.push(`step ${n} of ${count}: recovering failed by itself: ${describeError(cause)}`)
        }
        problems.push(...(await recoverAndJudge(attempt)).map((line) => `step ${n} of ${count}: ${line}`))
        tearDown(attempt)
      }
      expect(summaryOf(problems)).toEqual([])
    },
    timeLimit(),
  )

  test(
    'any call that fails gives its code, and the old view or the new one',
    async () => {
      const first = begin()
      const count = await countCalls('fail', () => engine.merge(first.request))
      tearDown(first)
      const problems: string[] = []
      for (const n of places(count * codes.length, 17)) {
        const code = codes[n % codes.length] as (typeof codes)[number]
        const attempt = begin()
        const outcome = await failAt(Math.floor(n / codes.length), code, () => engine.merge(attempt.request))
        const what = `${code} at call ${Math.floor(n / codes.length)} of ${count}, ${outcome.syscall} ${JSON.stringify(outcome.path)}`
        const got = (outcome.error as { code?: string } | undefined)?.code
        if (outcome.error !== undefined && got !== code) problems.push(`${what}: rejected with ${got ?? outcome.error}`)
        const open = descriptorsBelow(attempt.directory).map(({ path }) => path)
        if (open.length > 0) problems.push(`${what}: fds stay open: ${open.join(' ')}`)
        const lines = outcome.error === undefined ? finished(attempt) : await recoverAndJudge(attempt)
        problems.push(...lines.map((line) => `${what}: ${line}`))
        tearDown(attempt)
      }
      expect(summaryOf(problems)).toEqual([])
    },
    timeLimit(),
  )

  test(
    'a refused attribute, owner, mode or time is never taken for done',
    async () => {
      const first = begin()
      const calls = await recordCalls(() => engine.merge(first.request))
      tearDown(first)
      const problems: string[] = []
      for (const [n, syscall] of calls.entries()) {
        if (!SETS_METADATA.has(syscall)) continue
        for (const code of ['EACCES', 'EPERM']) {
          const attempt = begin()
          const { error, path } = await failAt(n, code, () => engine.merge(attempt.request))
          const what = `${code} at call ${n} of ${calls.length}, ${syscall} ${JSON.stringify(path)}`
          if (error === undefined) problems.push(...finished(attempt).map((line) => `${what}: ${line}`))
          tearDown(attempt)
        }
      }
      expect(summaryOf(problems)).toEqual([])
    },
    timeLimit(),
  )
})

const SETS_METADATA = new Set([
  'setxattr',
  'removexattr',
  'fchmod',
  'fchmodat2',
  'fchownat',
  'utimensat',
  'FS_IOC_SETFLAGS',
])

/** One line for each kind of problem: the first of it, and at how many places it happened. */
function summaryOf(problems: readonly string[]): string[] {
  const kinds = new Map<string, { first: string; count: number }>()
  for (const problem of problems) {
    const kind = problem.slice(problem.indexOf(': ')).replace(/[0-9a-f]{16}|\d+/g, '#')
    const known = kinds.get(kind)
    if (known === undefined) kinds.set(kind, { first: problem, count: 1 })
    else known.count++
  }
  return [...kinds.values()].map(({ first, count }) => `${count}× ${first}`)
}

/** A failure that was survived, as of an optional call, must not show in the result. */
function finished(attempt: Parameters<typeof judge>[0]): string[] {
  const { isNew, problems } = judge(attempt)
  return isNew ? problems : [...problems, 'it said that it was done, and it was not']
}
