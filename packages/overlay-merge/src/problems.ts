import { type HostPath, LsyncError, printable } from '@lsync/posix'
import type { Problem } from './plan.ts'

/** A layer was changed between the plan and its step. What is done so far is journalled. */
export class ChangedMeanwhileError extends LsyncError {
  constructor(path: string) {
    super('CHANGED_MEANWHILE', `${printable(path)} changed while lsync worked on it`, {
      path,
      hint: 'stop whatever changes the layers, then run `lsync recover`',
    })
  }
}

/** The layers hold something whose view is an error in the kernel too, so no result can equal it. */
export class LayerInvalidError extends LsyncError {
  readonly problems: readonly Problem[]

  constructor(problems: readonly Problem[]) {
    const first = problems[0] as Problem
    const more = problems.length > 1 ? ` (and ${problems.length - 1} more)` : ''
    super('LAYER_INVALID', `${printable(first.path)}: ${first.why} (${first.code})${more}`, {
      path: first.path,
      hint: 'see `lsync check`, and repair with `lsync check --repair`',
    })
    this.problems = problems
  }
}

/** An upper that was used with index=on, of which only a part is in the upper itself. */
export class IndexNeededError extends LsyncError {
  constructor(path: string) {
    super('INDEX_NEEDED', `${printable(path)} was mounted with index=on`, {
      path,
      hint: 'name its workdir with --workdir: hard links of lower files are kept there',
    })
  }
}

/** A merge into one of these layers was interrupted, so that it is not what it seems. */
export class MergeUnfinishedError extends LsyncError {
  constructor(path: HostPath) {
    super('MERGE_UNFINISHED', `a merge into ${printable(path)} was interrupted, or is under way`, {
      path,
      hint: 'run `lsync recover` on it first',
    })
  }
}

/** Marks that this process cannot see would be read as absent: the kernel leaves `trusted.*` out without a word. */
export class PrivilegeMissingError extends LsyncError {
  constructor(path: string) {
    super(
      'PRIVILEGE_MISSING',
      'trusted.overlay.* marks are invisible without CAP_SYS_ADMIN in the initial user namespace',
      { path, hint: 'run as root, or say --namespace user for layers of a userxattr mount' },
    )
  }
}

/** A mount inside a layer hides what overlayfs shows there. */
export class SubmountError extends LsyncError {
  constructor(path: string) {
    super('SUBMOUNT_IN_LAYER', `something is mounted on ${printable(path)}, inside a layer`, {
      path,
      hint: `unmount it: the kernel's view shows the directory beneath`,
    })
  }
}

/** The tree to make is there already. */
export class OutputExistsError extends LsyncError {
  constructor(path: HostPath) {
    super('OUTPUT_EXISTS', `${printable(path)} exists`, { path, hint: 'name a path that does not exist yet' })
  }
}

/** Something that a target has no place for, and the first path (in the result) that needs it. */
export interface Lacking {
  readonly what: string
  readonly path: string
}

/** The target's file system (or the caller's privilege) cannot hold what the result needs. */
export class TargetCannotHoldError extends LsyncError {
  readonly losses: readonly Lacking[]

  /** `target` is what was to be made, or `undefined` where only the entry is known. */
  constructor(
    target: HostPath | undefined,
    losses: readonly Lacking[],
    detail: { hint?: string; cause?: unknown } = {},
  ) {
    const list = losses.map(({ what, path }) => `${what} (${printable(path) || 'the root'})`).join(', ')
    super('TARGET_CANNOT_HOLD', `${target === undefined ? 'the target' : printable(target)} cannot hold: ${list}`, {
      path: target ?? losses[0]?.path ?? '',
      hint: 'choose a target on another file system, or export the layer in portable form (`lsync layer export`)',
      ...detail,
    })
    this.losses = losses
  }
}
