import { type ByteString, syncFileSystem } from '@lsync/posix'
import {
  type ApplyContext,
  applyGroup,
  applyRecord,
  type GroupMember,
  type Phase,
  removeUpperDirectories,
} from './apply.ts'
import {
  type CloneContext,
  type ClonePart,
  cloneDirectory,
  emptyClonePart,
  type LeftOut,
  leaveOutNothing,
} from './clone.ts'
import { removeTree, type Trash } from './effects.ts'
import { type EncodedLine, lineOf, readRecord } from './journal.ts'
import type { Namespace } from './model/marks.ts'
import { MARKS } from './model/marks.ts'
import type { EntryPath } from './model/path.ts'
import {
  type CleanRecord,
  type DirectoryRecord,
  type PlanHeader,
  planName,
  planPath,
  type StageRecord,
} from './model/plan.ts'
import { emptyPart, type PlanContext, type PlanPart, type PlanTask, planDirectory } from './plan.ts'
import type { Stack } from './resolve.ts'
import { stackFrom } from './stack.ts'

/** A stack as it travels to a worker: file descriptors belong to the process, so their numbers do. */
export interface StackInit {
  readonly layers: readonly { path: string; fd: number }[]
  readonly data: readonly { path: string; fd: number }[]
  readonly namespace: Namespace
  readonly below: boolean
}

/** Everything that a job may need; parts are added as an operation gets to know them. */
export interface WorkInit {
  readonly stack: StackInit
  readonly plan?: Omit<PlanContext, 'stack'>
  readonly clone?: CloneInit
  readonly apply?: ApplyInit
}

/** What cloning needs: by path, where in the plan stands what will take the place of something there. */
export interface CloneInit extends Omit<CloneContext, 'marks'> {
  readonly planFd: number
  readonly changes: ReadonlyMap<EntryPath, readonly LinePlace[]>
}

/** Where a line of the plan is. */
export interface LinePlace {
  readonly offset: number
  readonly length: number
}

/** What carrying out a sealed plan needs, in a form that travels. */
export interface ApplyInit {
  readonly header: PlanHeader
  readonly targetFd: number
  readonly stageFd: number
  readonly trashFd: number
  readonly planFd: number
  readonly stages: readonly StageRecord[]
  readonly reflink: boolean
  readonly leftOut: boolean
  readonly resumed: boolean
  readonly indexFd?: number
}

/** What a plan job gives back: lines instead of records, since those only travel on to the journal. */
export interface PlanResult extends PlanPart {
  readonly lines: readonly EncodedLine[]
}

// A directory of a million names makes a hundred million characters of plan.
const PARTLY_CHARS = 1 << 20

/** One unit of work, small enough to be shared out and big enough to be worth a message. */
export type Job =
  | { readonly kind: 'plan'; readonly tasks: readonly PlanTask[]; readonly budgetMs: number }
  | { readonly kind: 'clone'; readonly paths: readonly EntryPath[]; readonly budgetMs: number }
  | { readonly kind: 'apply'; readonly phase: Phase; readonly lines: readonly LinePlace[] }
  | { readonly kind: 'rmdir'; readonly parent: EntryPath; readonly names: readonly ByteString[] }
  | { readonly kind: 'group'; readonly members: readonly GroupRef[][] }
  | { readonly kind: 'discard'; readonly names: readonly ByteString[] }
  | { readonly kind: 'sync'; readonly fd: number; readonly path: string }

/** One name of a link group, by the lines of its directory. */
export interface GroupRef {
  readonly lines: readonly LinePlace[]
  readonly name: string
}

export type JobResult = PlanResult | ClonePart | number

/** Carries out jobs with synchronous system calls, in a worker thread or in the calling one. */
export class Workshop {
  readonly #stack: Stack
  readonly #init: WorkInit
  #apply: ApplyContext | undefined

  constructor(init: WorkInit, tag: string) {
    this.#init = init
    this.#stack = stackFrom(init.stack)
    if (init.apply !== undefined) {
      this.#apply = applyContextOf(init.stack, init.apply, tag)
    }
  }

  /** `partly` gets what a plan job has so far, when that is much; the result is the rest. */
  run(job: Job, partly: (result: JobResult) => void): JobResult {
    switch (job.kind) {
      case 'plan':
        return this.#plan(job.tasks, job.budgetMs, partly)
      case 'clone':
        return this.#clone(job.paths, job.budgetMs)
      case 'apply': {
        const planFd = (this.#init.apply as ApplyInit).planFd
        for (const line of job.lines) applyRecord(this.#applyContext, readRecord(planFd, line), job.phase)
        return job.lines.length
      }
      case 'rmdir':
        removeUpperDirectories(this.#applyContext, job.parent, job.names)
        return job.names.length
      case 'group':
        for (const members of job.members)
          applyGroup(
            this.#applyContext,
            members.map((ref) => this.#member(ref)),
          )
        return job.members.length
      case 'discard':
        for (const name of job.names) removeTree(this.#applyContext.trash.fd, name, this.#applyContext.trash)
        return job.names.length
      case 'sync':
        syncFileSystem(job.fd, job.path)
        return 0
    }
  }

  get #applyContext(): ApplyContext {
    if (this.#apply === undefined) throw new Error('this workshop has no plan to apply')
    return this.#apply
  }

  #plan(tasks: readonly PlanTask[], budgetMs: number, partly: (result: PlanResult) => void): PlanResult {
    const context = { ...(this.#init.plan as NonNullable<WorkInit['plan']>), stack: this.#stack }
    const part = emptyPart()
    const pending = [...tasks]
    let lines: EncodedLine[] = []
    let size = 0
    const emit = (record: DirectoryRecord | CleanRecord) => {
      const line = lineOf(record)
      lines.push(line)
      size += line.text.length
      if (size < PARTLY_CHARS) return
      partly({ ...emptyPart(), lines })
      lines = []
      size = 0
    }
    const start = performance.now()
    // Depth first within the budget; what is left goes back to be shared out.
    for (let task = pending.pop(); task !== undefined; task = pending.pop()) {
      planDirectory(context, task, part, emit)
      pending.push(...part.next.reverse())
      part.next.length = 0
      if (performance.now() - start > budgetMs) break
    }
    return { ...part, next: pending, lines }
  }

  #clone(paths: readonly EntryPath[], budgetMs: number): ClonePart {
    const part = emptyClonePart()
    const { planFd, changes, ...clone } = this.#init.clone as CloneInit
    const context: CloneContext = { ...clone, marks: MARKS[this.#init.stack.namespace] }
    const pending = [...paths]
    const start = performance.now()
    for (let path = pending.pop(); path !== undefined; path = pending.pop()) {
      cloneDirectory(context, path, part, replacedNames(planFd, changes.get(path)))
      pending.push(...part.next)
      part.next.length = 0
      if (performance.now() - start > budgetMs) break
    }
    part.next.push(...pending)
    return part
  }

  #member(ref: GroupRef): GroupMember {
    const planFd = (this.#init.apply as ApplyInit).planFd
    for (const line of ref.lines) {
      const record = readRecord(planFd, line) as DirectoryRecord
      const step = record.steps.find(({ name }) => name === ref.name)
      if (step?.do === 'place' || step?.do === 'graft') return { record, step }
    }
    throw new Error('a group without its step')
  }
}

// So many records of a directory are read together, and forgotten with its range of names where there are more.
const RECORDS_AT_ONCE = 64

function replacedNames(planFd: number, lines: readonly LinePlace[] | undefined): LeftOut {
  if (lines === undefined) return leaveOutNothing
  if (lines.length <= RECORDS_AT_ONCE) {
    const names = new Set(lines.flatMap((line) => replacedBy(planFd, line)))
    return () => names
  }
  const spans = lines.map((line) => {
    const names = replacedBy(planFd, line).sort()
    return { line, first: names[0] ?? '', last: names.at(-1) ?? '' }
  })
  return (listed) => {
    const [from, to] = [listed[0]?.name ?? '', listed.at(-1)?.name ?? '']
    const near = spans.filter(({ first, last }) => first <= to && last >= from)
    return new Set(near.flatMap(({ line }) => replacedBy(planFd, line)))
  }
}

function replacedBy(planFd: number, line: LinePlace): string[] {
  const { steps } = readRecord(planFd, line) as DirectoryRecord
  return steps.filter(({ was }) => was !== 'nothing').map(({ name }) => planName(name))
}

/** What `applyRecord` and its like need; `tag` keeps the names that threads and runs make in the trash apart. */
export function applyContextOf(stack: StackInit, apply: ApplyInit, tag: string): ApplyContext {
  const { stages, trashFd, ...rest } = apply
  const fds = [...stack.layers, ...stack.data].map(({ fd }) => fd)
  return {
    ...rest,
    // As plans count layers: the stack's, the data-only ones, and last the index directory.
    layerFds: apply.indexFd === undefined ? fds : [...fds, apply.indexFd],
    trash: namedTrash(trashFd, tag),
    stages: new Map(stages.map((stage) => [planPath(stage.to), stage])),
  }
}

function namedTrash(fd: number, tag: string): Trash {
  let count = 0
  return { fd, next: () => `${tag}.${count++}` as ByteString }
}
