import { LsyncError, printable } from '@lsync/posix'
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
