import { type MergeRequest, merge, recover } from '@lsync/overlay-merge'
import type { HostPath } from '@lsync/posix'

/** What the tests ask of a merge. Paths are host paths; `lowers` are top first. */
export interface MergeCase {
  readonly upper: string
  readonly lowers: readonly string[]
  readonly mode: 'in-place' | 'output' | 'delta'
  readonly output?: string
  readonly namespace: 'trusted' | 'user'
  /** The workdir of the mount; given where it had index=on. */
  readonly workdir?: string
  readonly clone?: 'auto' | 'hardlink' | 'copy' | 'reflink' | 'btrfs' | 'moosefs'
  /** `output`: escaped attributes of a nested overlay get their plain names, as in the view. */
  readonly plain?: boolean
  /** Whether a result without any entry is meant. */
  readonly allowEmpty?: boolean
  readonly workers?: number
}

/** The product, as the tests in test/kernel see it. All that depends on its signatures is in this file. */
export interface Engine {
  merge(request: MergeCase): Promise<unknown>
  /** Finishes or rolls back what an interrupted `merge` of this request left. */
  recover(request: MergeCase): Promise<unknown>
}

export const engine: Engine = {
  merge: (request) => merge(productRequest(request)),
  recover: (request) => recover(journalledAt(request) as HostPath, { workers: request.workers ?? 0 }),
}

function productRequest(request: MergeCase): MergeRequest {
  // Both are the same paths; only the product tells them from other strings.
  return request as unknown as MergeRequest
}

/** What a user would name to `lsync recover` after this merge. */
function journalledAt(request: MergeCase): string {
  return request.mode === 'in-place' ? (request.lowers[0] as string) : (request.output as string)
}
