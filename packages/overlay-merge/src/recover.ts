import {
  AT_FDCWD,
  type ByteString,
  close,
  type HostPath,
  hostPath,
  LsyncError,
  openRoot,
  printable,
  realPath,
  statFd,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import { restoreProtection } from './effects.ts'
import { openIndex } from './index-aliases.ts'
import { Journal, JournalDamagedError, journalPathOf, type SealedPlan, TREE } from './journal.ts'
import { defaultWorkers, finishInPlace, protectRoot, realTarget } from './merge.ts'
import type { Progress } from './planning.ts'
import { Pool } from './pool.ts'
import { closeStack, openStack, stackInit } from './stack.ts'
import { recoverVacuum } from './vacuum.ts'

export interface RecoverOptions {
  readonly workers?: number
  /** Tell what would be done, and do nothing. */
  readonly dryRun?: boolean
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: Progress) => void
}

/** What recovering found and did. */
export interface RecoverReport {
  /** finished: the new view is there. rolled-back: the old view is as it was. nothing: there was nothing to do. */
  readonly outcome: 'finished' | 'rolled-back' | 'nothing'
  /** As text; absent when the plan was not far enough to say. */
  readonly target?: string
}

/** Layers that a journal names are not the ones it was made for. */
export class LayersMovedError extends LsyncError {
  constructor(path: string) {
    super('LAYERS_MOVED', `${printable(path)} is not the directory that the journal was made for`, {
      path,
      hint: 'put upper and lower back where they were (mount them), then run `lsync recover` again',
    })
  }
}

/**
 * Finishes or rolls back what was interrupted on a target (a tree, or the path of a new one). Once the plan was sealed a
 * merge in place is finished; everything else is rolled back, since nobody saw it. Only the journal beside the target
 * counts: what lies inside it is written by whoever has the container.
 */
export async function recover(dir: HostPath, options: RecoverOptions = {}): Promise<RecoverReport> {
  const isTree = isDirectory(dir)
  const journal = Journal.open(isTree ? realPath(dir) : realTarget(dir), { create: false })
  if (journal === undefined) {
    // An upper has no merge's journal, but may have the one of a vacuum.
    const restored = isTree && options.dryRun !== true ? recoverVacuum(dir) : 0
    return { outcome: restored > 0 ? 'finished' : 'nothing' }
  }
  try {
    return await recoverJournal(journal, options)
  } finally {
    journal.close()
  }
}

function isDirectory(path: HostPath): boolean {
  return tryStatAt(AT_FDCWD, `${path}/.` as ByteString)?.isDirectory === true
}

/** Recovers what an earlier run left on a target, before the next begins. Whether there was anything. */
export async function recoverBefore(target: HostPath, options: RecoverOptions = {}): Promise<boolean> {
  const journal = Journal.open(target, { create: false })
  if (journal === undefined) return false
  try {
    return (await recoverJournal(journal, options)).outcome !== 'nothing'
  } finally {
    journal.close()
  }
}

/** Recovers one open journal, and removes it. */
export async function recoverJournal(journal: Journal, options: RecoverOptions): Promise<RecoverReport> {
  const plan = await journal.read()
  const act = options.dryRun !== true
  if (plan === undefined) {
    if (act) journal.remove()
    return { outcome: 'rolled-back' }
  }
  const { target } = plan.header
  const { parent, name } = journalPathOf(hostPath(target))
  if (`${parent}/${name}` !== journal.path) throw new JournalDamagedError(journal.path, 'it is that of another target')
  if (plan.header.publish !== undefined) {
    // Published by a rename of the tree: then only the journal was left behind.
    const wasPublished = tryStatAt(journal.fd, TREE) === undefined && isDirectory(hostPath(target))
    if (act && wasPublished && journal.wasPrepared) {
      withFd(openRoot(hostPath(target)), (fd) => protectRoot(journal, plan, fd))
    }
    if (act) journal.remove()
    return { outcome: wasPublished ? 'finished' : 'rolled-back', target }
  }
  if (act) await finishInterrupted(journal, plan, options)
  return { outcome: 'finished', target }
}

async function finishInterrupted(journal: Journal, plan: SealedPlan, options: RecoverOptions): Promise<void> {
  const { header } = plan
  const stack = openStack(
    {
      upper: hostPath(header.upper),
      lowers: header.lowers.map(hostPath),
      data: header.data.map(hostPath),
      namespace: header.namespace,
    },
    header.below,
  )
  const pool = new Pool(
    { stack: stackInit(stack) },
    { workers: options.workers ?? defaultWorkers(stack), signal: options.signal },
  )
  let indexFd: number | undefined
  try {
    const base = stack.layers.at(-1) as (typeof stack.layers)[number]
    if (String(statFd(base.fd).ino) !== header.targetIno) throw new LayersMovedError(base.path)
    if (String(statFd((stack.layers[0] as (typeof stack.layers)[number]).fd).ino) !== header.upperIno) {
      throw new LayersMovedError(header.upper)
    }
    journal.prepare(base.fd)
    restoreProtection(journal.trashFd, base.fd)
    indexFd = header.workdir === undefined ? undefined : openIndex(hostPath(header.workdir))
    await finishInPlace({
      stack,
      plan,
      journal,
      targetFd: base.fd,
      pool,
      reflink: false,
      leftOut: false,
      resumed: true,
      ...(indexFd === undefined ? {} : { indexFd }),
      ...(options.onProgress === undefined ? {} : { report: options.onProgress }),
    })
  } finally {
    await pool.close()
    if (indexFd !== undefined) close(indexFd)
    closeStack(stack)
  }
}
