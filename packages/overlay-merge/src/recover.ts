import {
  close,
  type HostPath,
  hostPath,
  LsyncError,
  openRoot,
  printable,
  readDirents,
  statFd,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import { openIndex } from './index-aliases.ts'
import { Journal, placeOf, type SealedPlan } from './journal.ts'
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
  const target = realTarget(dir)
  const targets = [target, ...journalledIn(target)]
  const reports: RecoverReport[] = []
  for (const candidate of targets) {
    const journal = Journal.open(candidate, { create: false })
    if (journal === undefined) continue
    try {
      reports.push({ ...(await recoverJournal(journal, options)), target: candidate })
    } finally {
      journal.close()
    }
  }
  return reports
}

function journalledIn(dir: HostPath): HostPath[] {
  const targets: HostPath[] = []
  if (!isDirectory(dir)) return targets // a new tree that never came to be
  withFd(openRoot(dir), (fd) => {
    readDirents(fd, (name) => {
      if (name.startsWith('.lsync.')) targets.push(hostPath(`${dir}/${name.slice('.lsync.'.length)}`))
    })
  })
  return targets
}

function isDirectory(path: HostPath): boolean {
  const { parent, name } = placeOf(path)
  return withFd(openRoot(parent), (fd) => tryStatAt(fd, name)?.isDirectory === true)
}

/** Recovers one open journal, and removes it. */
export async function recoverJournal(journal: Journal, options: RecoverOptions): Promise<RecoverReport> {
  const plan = await journal.read()
  if (plan === undefined || plan.header.publish !== undefined) {
    journal.remove()
    return { outcome: 'rolled-back' }
  }
  await finishInterrupted(journal, plan, options)
  return { outcome: 'finished' }
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
