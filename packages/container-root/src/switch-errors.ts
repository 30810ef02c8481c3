import { LsyncError, printable } from '@lsync/posix'
import type { Prediction } from './last-delta.ts'

/** A root cannot be switched to that node, or not now. Nothing was changed, and the container was not stopped. */
export class SwitchRefusedError extends LsyncError {
  constructor(name: string, why: string, hint: string) {
    super('SWITCH_REFUSED', `${printable(name)} is not switched: ${why}`, { hint })
  }
}

/** The container changes more than can be carried over in the time that it may stand still. It was not stopped. */
export class SwitchTooSlowError extends LsyncError {
  /** How long it would have stood still. */
  readonly predictedMs: number

  constructor(name: string, { names, bytes, deltaMs, fixedMs }: Prediction, maxDowntimeMs: number) {
    const predictedMs = deltaMs + fixedMs
    const changes = `its last changes (${names} names, ${bytes} bytes) about ${seconds(deltaMs)}`
    super(
      'SWITCH_TOO_SLOW',
      `${printable(name)} is not switched: it would stand still for about ${seconds(predictedMs)}, more than ${seconds(maxDowntimeMs)}: ${changes}, all else ${seconds(fixedMs)}`,
      {
        hint:
          fixedMs > maxDowntimeMs
            ? 'allow more with --max-downtime'
            : 'allow more with --max-downtime, or try again when the container writes less',
      },
    )
    this.predictedMs = predictedMs
  }
}

function seconds(ms: number): string {
  return `${(ms / 1000).toFixed(ms < 10 ? 3 : 2)} s`
}

/** A switch failed after the container was stopped. The message says where it runs now. */
export class SwitchFailedError extends LsyncError {
  /** Where the container runs: on the `source` again, on the `target`, or `unknown` where nobody could say. */
  readonly runsOn: 'source' | 'target' | 'unknown'

  constructor(name: string, phase: string, runsOn: SwitchFailedError['runsOn'], cause: unknown) {
    const said = cause instanceof Error ? cause.message : String(cause)
    const where =
      runsOn === 'unknown'
        ? 'where it runs is not known'
        : `it runs on the ${runsOn} ${runsOn === 'source' ? 'again' : 'node'}`
    super('SWITCH_FAILED', `${printable(name)} could not be switched (${phase}): ${said}; ${where}`, {
      hint:
        runsOn === 'unknown'
          ? 'run `lsync switch NAME --resume` on either node'
          : 'put right what is named, then switch again',
      cause,
    })
    this.runsOn = runsOn
  }
}

/** There is no switch that this node could finish or take back. */
export class SwitchUnknownError extends LsyncError {
  constructor(name: string) {
    super('SWITCH_UNKNOWN', `no switch of ${printable(name)} is under way that this node has a part in`, {
      hint: 'see `lsync root status`',
    })
  }
}
