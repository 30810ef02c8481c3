import { existsSync } from 'node:fs'
import { fileURLToPath } from 'node:url'

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

interface OverlayMerge {
  merge(request: unknown): Promise<unknown>
  recover(directory: string, options: unknown): Promise<unknown>
}

const entry = new URL('../../packages/overlay-merge/src/index.ts', import.meta.url)

/** Whether the package is there; the tests that need it are skipped until it is. */
export const hasEngine = existsSync(fileURLToPath(entry))

export const engine: Engine = hasEngine ? await load() : absent()

async function load(): Promise<Engine> {
  const product = (await import(entry.href)) as OverlayMerge
  return {
    merge: (request) => product.merge(request),
    recover: (request) => product.recover(journalledAt(request), { workers: request.workers ?? 0 }),
  }
}

function absent(): Engine {
  const fail = () => Promise.reject(new Error('the engine is not there yet'))
  return { merge: fail, recover: fail }
}

/** What a user would name to `lsync recover` after this merge. */
function journalledAt(request: MergeCase): string {
  return request.mode === 'in-place' ? (request.lowers[0] as string) : (request.output as string)
}
