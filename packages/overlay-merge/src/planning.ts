import { tmpdir } from 'node:os'
import type { ByteString } from '@lsync/posix'
import { hostPath, O_RDWR, O_TMPFILE, openat, openRoot, withFd } from '@lsync/posix'
import type { PlanWriter, SealedPlan } from './journal.ts'
import type { StageRecord } from './model/plan.ts'
import { emptyPart, type Graft, type Need, type PlanCounts, type PlanTask, type Problem } from './plan.ts'
import type { Pool } from './pool.ts'
import { LayerInvalidError } from './problems.ts'
import { OpenSources, rootDirectory, type Stack } from './resolve.ts'
import { planStages } from './stage.ts'
import type { Job, PlanResult } from './work.ts'

/** What planning tells besides the plan. */
export interface Planned {
  readonly plan: SealedPlan
  readonly counts: PlanCounts
  readonly needs: ReadonlySet<Need>
}

/** How far an operation is. `total` is there once it is known. */
export interface Progress {
  readonly phase: 'scan' | 'clone' | 'stage' | 'apply' | 'durable' | 'clean-up' | 'verify'
  readonly done: number
  readonly total?: number
}

const BUDGET_MS = 25

/**
 * Plans the whole tree: every directory in which an upper layer has something, shared out over the pool, written as it
 * comes. Reads only (besides the plan).
 * @throws {LayerInvalidError} if part of the view is an error in the kernel too
 */
export async function planStack(
  stack: Stack,
  rename: boolean,
  pool: Pool,
  writer: PlanWriter,
  report?: (progress: Progress) => void,
): Promise<Planned> {
  const total = emptyPart()
  const { counts, needs } = total
  const grafts: Graft[] = []
  const problems: Problem[] = []
  let pending: PlanTask[] = [{ directory: rootDirectory(stack), inherited: undefined }]
  await pool.drain(
    (idle): Job | undefined => {
      if (pending.length === 0) return undefined
      const share = Math.min(64, Math.max(1, Math.ceil(pending.length / (idle * 2))))
      const tasks = pending.slice(-share)
      pending = pending.slice(0, -share)
      return { kind: 'plan', tasks, budgetMs: BUDGET_MS }
    },
    (result) => {
      const part = result as PlanResult
      for (const line of part.lines) writer.addLine(line)
      pending.push(...part.next)
      grafts.push(...part.grafts)
      problems.push(...part.problems)
      for (const need of part.needs) needs.add(need)
      for (const key of Object.keys(counts) as (keyof PlanCounts)[]) counts[key] += part.counts[key]
      report?.({ phase: 'scan', done: counts.placed + counts.removed + counts.whiteouts })
    },
  )
  if (problems.length > 0)
    throw new LayerInvalidError(problems.sort((left, right) => (left.path < right.path ? -1 : 1)))
  for (const stage of stagesOf(stack, grafts, rename)) writer.addStage(stage)
  return { plan: writer.seal(), counts, needs }
}

function stagesOf(stack: Stack, grafts: readonly Graft[], rename: boolean): StageRecord[] {
  if (grafts.length === 0) return []
  const opened = new OpenSources(stack)
  try {
    return planStages(stack, grafts, rename, opened)
  } finally {
    opened.close()
  }
}

/** A file without a name for a plan that is only looked at. */
export function openTemporaryPlan(): number {
  return withFd(openRoot(hostPath(tmpdir())), (fd) => openat(fd, '.' as ByteString, O_RDWR | O_TMPFILE, 0o600))
}
