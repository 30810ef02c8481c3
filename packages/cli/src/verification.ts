import type { VerifyReport } from '@lsync/overlay-merge'
import { type HostPath, printable, textOf } from '@lsync/posix'
import { countOf, durationOf } from './progress-line.ts'
import type { Session } from './session.ts'

/** Each difference, then the sum. Differences end the run with 3. */
export function renderVerification(report: VerifyReport, against: HostPath, session: Session): void {
  const { output } = session
  const { equal, differences, total, entries, bytes, by, why, elapsedMs } = report
  for (const { path, what, expected, actual } of differences) {
    output.data(
      () => ({ type: 'difference', path: textOf(path), what, expected, actual }),
      () => `${printable(path) || '.'}: ${what}: the stack shows ${expected}, the tree ${actual}`,
    )
  }
  output.data(
    () => ({ type: 'verify', equal, total, entries, bytes, by, ...(why === undefined ? {} : { why }), elapsedMs }),
    () => {
      const said = `${countOf(entries)} entries compared in ${durationOf(elapsedMs)}`
      if (equal) return `${printable(against)} is what the stack shows: ${said}`
      const more = total > differences.length ? ` (${countOf(differences.length)} shown)` : ''
      return `${printable(against)} is not what the stack shows: ${countOf(total)} differences${more}, ${said}`
    },
  )
  if (by === 'resolver') output.warning('NOT_BY_KERNEL', `the kernel was not asked what the stack shows: ${why}`)
  if (!equal) session.foundProblems()
}
