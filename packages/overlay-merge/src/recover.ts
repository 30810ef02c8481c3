import {
  AT_FDCWD,
  type ByteString,
  close,
  type HostPath,
  hostPath,
  LsyncError,
  openRoot,
  printable,
  readDirents,
  realPath,
  statFd,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import { openIndex } from './index-aliases.ts'
import { isJournalName, Journal, journalPathOf, type SealedPlan, TREE } from './journal.ts'
import { defaultWorkers, finishInPlace, realTarget } from './merge.ts'
import type { Progress } from './planning.ts'
import { Pool } from './pool.ts'
import { closeStack, openStack, stackInit } from './stack.ts'

export interface RecoverOptions {
  readonly workers?: number
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
 * Finishes or rolls back what was interrupted on a target. `dir` is the target, or the directory that holds it.
 * Once the plan was sealed a merge in place is finished; everything else is rolled back, since nobody saw it.
 */
export async function recover(dir: HostPath, options: RecoverOptions = {}): Promise<RecoverReport[]> {
  const reports: RecoverReport[] = []
  for (const place of journalsOf(dir)) {
    const journal = Journal.openAt(place, { create: false })
    if (journal === undefined) continue
    try {
      reports.push(await recoverJournal(journal, options))
    } finally {
      journal.close()
    }
  }
  return reports
}

function journalsOf(dir: HostPath): { parent: HostPath; name: ByteString }[] {
  if (!isDirectory(dir)) return [journalPathOf(realTarget(dir))] // a new tree that never came to be
  const real = realPath(dir)
  const places = [journalPathOf(real)]
  withFd(openRoot(real), (fd) => {
    readDirents(fd, (name) => {
      if (isJournalName(name)) places.push({ parent: real, name })
    })
  })
  return places
}

function isDirectory(path: HostPath): boolean {
  return tryStatAt(AT_FDCWD, `${path}/.` as ByteString)?.isDirectory === true
}

/** Recovers one open journal, and removes it. */
export async function recoverJournal(journal: Journal, options: RecoverOptions): Promise<RecoverReport> {
  const plan = await journal.read()
  if (plan === undefined) {
    journal.remove()
    return { outcome: 'rolled-back' }
  }
  const { target } = plan.header
  if (plan.header.publish !== undefined) {
    // Published by a rename of the tree: then only the journal was left behind.
    const wasPublished = tryStatAt(journal.fd, TREE) === undefined && isDirectory(hostPath(target))
    journal.remove()
    return { outcome: wasPublished ? 'finished' : 'rolled-back', target }
  }
  await finishInterrupted(journal, plan, options)
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
    indexFd = header.workdir === undefined ? undefined : openIndex(hostPath(header.workdir))
    await finishInPlace({
      stack,
      plan,
      journal,
      targetFd: base.fd,
      pool,
      reflink: false,
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
