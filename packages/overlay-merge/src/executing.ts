import { type ByteString, randomHex, readDirents, syncFileSystem } from '@lsync/posix'
import { applyStage, type Phase } from './apply.ts'
import { removeTree } from './effects.ts'
import type { Journal, LineIndex, SealedPlan } from './journal.ts'
import { readRecord } from './journal.ts'
import { type EntryPath, split } from './model/path.ts'
import { type DirectoryRecord, planPath } from './model/plan.ts'
import { addTo } from './multimap.ts'
import type { Progress } from './planning.ts'
import { drainList, type Pool } from './pool.ts'
import { type OpenStack, stackInit } from './stack.ts'
import { type ApplyInit, applyContextOf, type GroupRef, type Job } from './work.ts'

/** What carrying out a plan needs. */
export interface Execution {
  readonly stack: OpenStack
  readonly plan: SealedPlan
  readonly journal: Journal
  readonly targetFd: number
  readonly pool: Pool
  readonly reflink: boolean
  /** The target was cloned without the names that the plan removes or replaces. */
  readonly leftOut: boolean
  readonly resumed: boolean
  readonly indexFd?: number
  readonly report?: (progress: Progress) => void
}

const BATCH = 48

/**
 * Carries out a sealed plan up to the point where the target holds the new view durably: what is still to be removed
 * (the upper's leftovers, the journal) no longer matters to it. Every step may run twice.
 */
export async function executePlan(execution: Execution): Promise<void> {
  const { plan, journal, pool, stack, targetFd } = execution
  const { header, lines, stages } = plan
  const init = applyInit(execution)
  pool.prepare({ stack: stackInit(stack), apply: init })
  if (journal.has('applied')) {
    await emptyTrash(execution)
    return
  }
  const inPlace = header.publish === undefined
  if (!journal.has('staged')) {
    const context = applyContextOf(stackInit(stack), init, `stage-${randomHex(6)}`)
    for (const stage of stages) applyStage(context, stage)
    if (inPlace && stages.length > 0) {
      syncFileSystem(targetFd, header.target)
      journal.reach('staged')
    }
  }
  const directories = lines.filter(({ type }) => type === 'directory')
  const clean = lines.filter(({ type }) => type === 'clean')
  if (clean.length > 0) await applyAll(execution, clean, 'clean')
  const structured = directories.filter(({ hasStructure }) => hasStructure)
  if (structured.length > 0 && !journal.has('structured')) {
    // Parents before children: level by level, each level shared out.
    for (const level of levels(structured)) await applyAll(execution, level, 'structure')
    if (inPlace) {
      syncFileSystem(targetFd, header.target)
      journal.reach('structured')
    }
  }
  // Link groups and further records change directories once more; without them each is finished as soon as it is filled.
  const whole = directories.filter(({ isPart }) => !isPart)
  if (plan.groups.size === 0 && whole.length === directories.length)
    await applyAll(execution, directories, 'entries-and-finish')
  else {
    await applyAll(execution, directories, 'entries')
    await applyGroups(execution)
    await applyAll(execution, whole, 'finish')
  }
  execution.report?.({ phase: 'durable', done: 0 })
  // Nothing reads what lies in the trash, a second run neither: it goes while the disk is waited for.
  await emptyTrash(execution, { kind: 'sync', fd: targetFd, path: header.target })
  if (inPlace) journal.reach('applied')
}

function applyInit(execution: Execution): ApplyInit {
  const { plan, journal, targetFd, reflink, leftOut, resumed, indexFd } = execution
  return {
    header: plan.header,
    targetFd,
    stageFd: journal.stageFd,
    trashFd: journal.trashFd,
    planFd: journal.planFd,
    stages: plan.stages,
    reflink,
    leftOut,
    resumed,
    ...(indexFd === undefined ? {} : { indexFd }),
  }
}

// Lines by the depth of their path, the highest directories first.
function levels(lines: readonly LineIndex[]): LineIndex[][] {
  return byDepth(Map.groupBy(lines, ({ path }) => depthOf(path)))
}

function depthOf(path: string): number {
  return path === '' ? 0 : path.split('/').length
}

function byDepth<T>(levels: ReadonlyMap<number, T[]>): T[][] {
  return [...levels].sort(([left], [right]) => left - right).map(([, level]) => level)
}

async function applyAll(execution: Execution, lines: readonly LineIndex[], phase: Phase): Promise<void> {
  let done = 0
  const { pool, report } = execution
  await drainList(
    pool,
    lines,
    BATCH,
    (batch): Job => ({ kind: 'apply', phase, lines: batch.map(({ offset, length }) => ({ offset, length })) }),
    (count) => {
      done += count as number
      if (phase !== 'finish') report?.({ phase: 'apply', done, total: lines.length })
    },
  )
}

async function applyGroups(execution: Execution): Promise<void> {
  const { plan, pool } = execution
  if (plan.groups.size === 0) return
  const directories = plan.lines.filter(({ type }) => type === 'directory')
  const linesOfPath = Map.groupBy(directories, ({ path }) => path)
  const refs = (paths: readonly string[]): GroupRef[] =>
    paths.map((path) => {
      const slash = path.lastIndexOf('/')
      const lines = linesOfPath.get(slash < 0 ? '' : path.slice(0, slash)) ?? []
      return { lines: lines.map(({ offset, length }) => ({ offset, length })), name: path.slice(slash + 1) }
    })
  await drainList(pool, [...plan.groups.values()], BATCH, (batch): Job => ({ kind: 'group', members: batch.map(refs) }))
}

/** Removes what is left of the upper after its content has arrived: files that were copied, then directories. */
export async function consumeUpper(execution: Execution): Promise<void> {
  const { plan, pool, stack } = execution
  const upper = stack.layers[0]
  if (upper === undefined) return
  const lines = plan.lines.filter((line) => line.upper !== undefined)
  if (!plan.header.rename) await applyAll(execution, lines, 'consume')
  for (const jobs of removalLevels(lines)) {
    await pool.drain(
      () => jobs.pop(),
      () => undefined,
    )
  }
  if (execution.indexFd !== undefined) emptyIndex(execution.indexFd)
  syncFileSystem(upper.fd, upper.path)
}

// Its entries name inodes that the upper and the target no longer have.
function emptyIndex(indexFd: number): void {
  const names: ByteString[] = []
  readDirents(indexFd, (name) => names.push(name))
  for (const name of names) removeTree(indexFd, name)
}

// The deepest directories first; those of one parent together, which costs one open.
function removalLevels(lines: readonly LineIndex[]): Job[][] {
  const parents = new Map<EntryPath, ByteString[]>()
  for (const { upper, isPart } of lines) {
    if (upper === undefined || upper === '' || isPart) continue
    const { parent, name } = split(planPath(upper))
    addTo(parents, parent, name)
  }
  const levels = byDepth(Map.groupBy(parents, ([parent]) => depthOf(parent))).reverse()
  return levels.map((level) => level.map(([parent, names]): Job => ({ kind: 'rmdir', parent, names })))
}

/**
 * Makes the inode flags real that the view shows (chattr +i, +a): after everything else, since such an inode takes no
 * further link, no rename and no removal of another of its names.
 */
export async function setFlags(execution: Execution): Promise<void> {
  const lines = execution.plan.lines.filter(({ hasFlags }) => hasFlags)
  if (lines.length === 0) return
  await applyAll(execution, lines, 'flags')
  syncFileSystem(execution.targetFd, execution.plan.header.target)
}

/** Deletes what was moved out of the way, shared out; one thread does `beside` meanwhile. */
async function emptyTrash(execution: Execution, beside?: Job): Promise<void> {
  const { journal, pool } = execution
  const names: ByteString[] = []
  readDirents(journal.trashFd, (name) => names.push(name))
  const jobs = beside === undefined ? [] : [beside]
  let done = 0
  await drainList(
    pool,
    names,
    8,
    (batch): Job => ({ kind: 'discard', names: batch }),
    (count) => {
      done += count as number
      if (names.length > 0) execution.report?.({ phase: 'clean-up', done, total: names.length })
    },
    jobs,
  )
}

/** The directory's record of a result path, if the plan has one. */
export function recordAt(journal: Journal, plan: SealedPlan, path: string): DirectoryRecord | undefined {
  const line = plan.lines.find(
    (candidate) => candidate.type === 'directory' && candidate.path === path && !candidate.isPart,
  )
  return line === undefined ? undefined : (readRecord(journal.planFd, line) as DirectoryRecord)
}
