import { tmpdir } from 'node:os'
import type { ByteString } from '@lsync/posix'
import { hostPath, O_RDWR, O_TMPFILE, openat, openRoot, withFd } from '@lsync/posix'
import type { PlanWriter, SealedPlan } from './journal.ts'
import type { EntryPath } from './model/path.ts'
import type { DirectoryRecord, StageRecord } from './model/plan.ts'
import { emptyPart, type Graft, type Need, type PlanCounts, type PlanTask, type Problem } from './plan.ts'
import { type Pool, takeShare } from './pool.ts'
import { IndexNeededError, LayerInvalidError } from './problems.ts'
import { OpenSources, rootDirectory, type Stack } from './resolve.ts'
import { RootWatch } from './safety.ts'
import { planStages } from './stage.ts'
import type { Job, PlanResult } from './work.ts'

/** What planning tells besides the plan. */
export interface Planned {
  readonly plan: SealedPlan
  readonly counts: PlanCounts
  readonly needs: ReadonlyMap<Need, EntryPath>
}

/** How far an operation is. `total` is there once it is known. */
export interface Progress {
  readonly phase: 'scan' | 'clone' | 'stage' | 'apply' | 'durable' | 'clean-up' | 'verify'
  readonly done: number
  readonly total?: number
}

// Longer than a turn of cloning: a second thread that plans earlier has its code to warm up for it, which costs more than
// it brings (10,000 changes: 0.84 s of processor time with 25 ms, 0.88 s with 4 ms, the least of eight rounds).
const BUDGET_MS = 25

/** What planning is given. */
export interface Planning {
  readonly stack: Stack
  readonly rename: boolean
  readonly pool: Pool
  readonly writer: PlanWriter
  /** Throws to refuse the plan, before it is sealed. */
  readonly accept?: (root: RootWatch, needs: ReadonlyMap<Need, EntryPath>) => void
  readonly report?: (progress: Progress) => void
}

/**
 * Plans the whole tree: every directory in which an upper layer has something, shared out over the pool, written as it
 * comes. Reads only (besides the plan).
 * @throws {LayerInvalidError} if part of the view is an error in the kernel too
 */
export async function planStack(planning: Planning): Promise<Planned> {
  const { stack, pool, writer, report } = planning
  const { counts, needs } = emptyPart()
  const grafts: Graft[] = []
  const problems: Problem[] = []
  const root = new RootWatch()
  const pending: PlanTask[] = [{ directory: rootDirectory(stack), inherited: undefined }]
  await pool.drain(
    (idle): Job | undefined => {
      if (pending.length === 0) return undefined
      return { kind: 'plan', tasks: takeShare(pending, idle), budgetMs: BUDGET_MS }
    },
    (result) => {
      const part = result as PlanResult
      for (const line of part.lines) {
        writer.addLine(line)
        if (root.isOpen && line.index.path === '' && line.index.type === 'directory') {
          root.add((JSON.parse(line.text) as DirectoryRecord).steps)
        }
      }
      pending.push(...part.next)
      grafts.push(...part.grafts)
      problems.push(...part.problems)
      for (const [need, path] of part.needs) if (!needs.has(need)) needs.set(need, path)
      for (const key of Object.keys(counts) as (keyof PlanCounts)[]) counts[key] += part.counts[key]
      report?.({ phase: 'scan', done: counts.placed + counts.removed + counts.whiteouts })
    },
  )
  if (problems.length > 0) throw problemError(problems)
  for (const stage of stagesOf(stack, grafts, planning.rename)) writer.addStage(stage)
  planning.accept?.(root, needs)
  return { plan: writer.seal(), counts, needs }
}

function problemError(problems: Problem[]): Error {
  const indexed = problems.find(({ code }) => code === 'INDEX_NEEDED')
  if (indexed !== undefined) return new IndexNeededError(indexed.path)
  return new LayerInvalidError(problems.sort((left, right) => (left.path < right.path ? -1 : 1)))
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
