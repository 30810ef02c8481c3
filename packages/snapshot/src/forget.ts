import { LsyncError } from '@lsync/posix'
import { eachOf } from './concurrent.ts'
import { RepositoryLock } from './lock.ts'
import { applyRules, type GroupKey, groupSnapshots, hasRules, type KeepRules, type Verdict } from './model/retention.ts'
import type { ObjectId } from './model/tree.ts'
import type { Repository } from './repository.ts'
import { listSnapshots, type SnapshotFilter } from './select.ts'

export interface ForgetRequest extends SnapshotFilter {
  /** What to keep of each group. */
  readonly keep?: KeepRules
  /** What makes a group; by default host and paths. */
  readonly groupBy?: readonly GroupKey[]
  /** Instead of rules: these snapshots, by their full ids. */
  readonly ids?: readonly ObjectId[]
  readonly dryRun?: boolean
  readonly signal?: AbortSignal | undefined
}

/** What the rules say of one group, newest first. */
export interface ForgetGroup {
  readonly host: string | undefined
  readonly paths: readonly string[] | undefined
  readonly tags: readonly string[] | undefined
  readonly verdicts: readonly Verdict[]
}

export interface ForgetReport {
  readonly groups: readonly ForgetGroup[]
  readonly removed: readonly ObjectId[]
}

/** The rules would leave nothing of a group, or there are none. */
export class ForgetRefusedError extends LsyncError {
  constructor(why: string, hint: string) {
    super('FORGET_REFUSED', why, { hint })
  }
}

/**
 * Removes the snapshots that rules do not keep, or that are named. Their content stays until `prune`.
 * @throws {ForgetRefusedError} without any rule, and when the last snapshot of a group would go
 */
export async function forgetSnapshots(repository: Repository, request: ForgetRequest): Promise<ForgetReport> {
  const { keep = {}, ids, signal } = request
  if (ids === undefined && !hasRules(keep)) {
    throw new ForgetRefusedError('no rule says what to keep', 'give a rule such as --keep-last 10, or name snapshots')
  }
  const lock = await RepositoryLock.acquire(repository, { exclusive: request.dryRun !== true, signal })
  try {
    const groups = ids === undefined ? await decide(repository, request, keep) : []
    const removed =
      ids ??
      groups
        .flatMap(({ verdicts }) => verdicts.filter(({ reasons }) => reasons.length === 0))
        .map(({ snapshot }) => snapshot.id)
    if (request.dryRun !== true) {
      await lock.settled()
      await eachOf(removed, repository.backend.concurrency, async (id) => {
        signal?.throwIfAborted()
        await repository.backend.delete({ kind: 'snapshot', name: id })
      })
    }
    return { groups, removed }
  } finally {
    await lock.release()
  }
}

async function decide(repository: Repository, request: ForgetRequest, keep: KeepRules): Promise<ForgetGroup[]> {
  const snapshots = await listSnapshots(repository, request, request.signal)
  const nowNs = BigInt(Date.now()) * 1_000_000n
  return groupSnapshots(snapshots, request.groupBy ?? ['host', 'paths']).map(({ snapshots, ...group }) => {
    const verdicts = applyRules(snapshots, keep, nowNs)
    if (verdicts.every(({ reasons }) => reasons.length === 0)) {
      throw new ForgetRefusedError(
        'the rules would remove every snapshot of a group',
        'keep at least one, or name them',
      )
    }
    return { ...group, verdicts }
  })
}
