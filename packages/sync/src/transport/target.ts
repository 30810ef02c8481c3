import type { DescribedFile } from '../describe.ts'
import type { Checkpoint } from '../model/checkpoint.ts'
import type { Failure, TreePath } from '../model/operation.ts'

/** What a target says of itself when it is opened. */
export interface TargetState {
  /** What it holds durably, if it was synced before. */
  readonly checkpoint: Checkpoint | undefined
  /** Nothing is in it (besides the target's own state). What is not empty and not known is only taken on request. */
  readonly isEmpty: boolean
  /** The first stage number that was never used. */
  readonly nextStage: number
  /** What it cannot hold, decided by trying: each is named in the loss report. */
  readonly losses: readonly TargetLoss[]
}

export interface TargetLoss {
  readonly what:
    | 'owner'
    | 'xattr'
    | 'trusted-xattr'
    | 'acl'
    | 'special'
    | 'hard-link'
    | 'time'
    | 'flags'
    | 'symlink-meta'
    | 'atomic'
    | 'durable'
    | 'holes'
  readonly message: string
}

/**
 * A place that operations are carried out at. One writer at a time: opening locks it.
 *
 * `direct`: the engine's workers carry out operations themselves with the open descriptors. `encoded`: workers encode
 * operations with their content (protocol/operation-codec.ts) and the engine hands the bytes to `deliver`.
 */
export interface Target {
  readonly description: string
  readonly delivery:
    | { readonly mode: 'direct'; readonly rootFd: number; readonly stageFd: number }
    | { readonly mode: 'encoded' }
  /** `isKnown`: it was synced before. Where it does not say so, it is not what it was, and nothing is made there. */
  open(signal: AbortSignal, isKnown?: boolean): Promise<TargetState>
  /**
   * Whether its path still leads to what was opened; else it is to be closed and opened again. Absent where a connection
   * that is lost says so.
   */
  isThere?(): boolean
  /**
   * Carries out encoded operations in their order within one lane; lanes are independent of each other. Resolves when
   * they were carried out (not yet durable) with those that failed. Back-pressure: a call may wait before it takes more.
   */
  deliver(lane: number, batch: Uint8Array): Promise<readonly Failure[]>
  /** So much was written by the workers since the last call. Absent where operations are delivered. Never waits. */
  wrote?(bytes: number, files: number): void
  /**
   * The files that have one name in a directory, as they are; what was carried out before shows. `undefined`: this target
   * cannot tell. Absent where the workers look there themselves. `isAdopted`: the user has said that what is there is to be taken
   * for what the upper holds where it looks alike; else a target that does not show content tells nothing.
   */
  describe?(path: TreePath, isAdopted: boolean): Promise<readonly DescribedFile[] | undefined>
  /**
   * Everything that was carried out before is durable when it resolves; with a checkpoint, that is stored durably after
   * it.
   */
  barrier(checkpoint?: Checkpoint): Promise<void>
  close(): Promise<void>
}
