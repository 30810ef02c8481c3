import {
  compareWithRecord,
  type MergeReport,
  type MergeRequest,
  merge,
  type RecordedView,
  recordView,
  recover,
  verify,
} from '@lsync/overlay-merge'
import { type HostPath, printable } from '@lsync/posix'
import { given } from './options.ts'
import type { Session } from './session.ts'
import { renderVerification } from './verification.ts'

/** What the stack shows, before it is used up. */
export async function recordBefore(request: MergeRequest, { output, signal }: Session): Promise<RecordedView> {
  const { upper, lowers, data, namespace, workdir, workers } = request
  const target = lowers[0] as HostPath
  const effects = { signal, onProgress: output.progress }
  // What a crash left is neither the old view nor the new one.
  const { outcome } = await recover(target, { ...given({ workers }), ...effects })
  if (outcome !== 'nothing') output.note(`an interrupted merge of ${printable(target)} was ${outcome} first`)
  // Refused now rather than after everything was read.
  await merge({ ...request, dryRun: true, ...effects })
  return recordView({ layers: [upper, ...lowers], ...given({ data, namespace, workdir }), ...effects })
}

/** Compares what was made with what the kernel shows, or with what it showed `before`, and says what it found. */
export async function verifyMerged(
  request: MergeRequest,
  { target }: MergeReport,
  before: RecordedView | undefined,
  session: Session,
): Promise<void> {
  const { upper, lowers, data, namespace, plain } = request
  const { output, signal } = session
  const shared = { ...given({ data, namespace }), against: target, signal, onProgress: output.progress }
  const report =
    before !== undefined
      ? await compareWithRecord(before, { ...shared, againstLowers: lowers.slice(1) })
      : // A layer's escaped marks are for the mount to unescape; a plain tree is what it is.
        await verify({ ...shared, layers: [upper, ...lowers], asLayer: plain !== true })
  renderVerification(report, target, session)
}
