import { type RecoverReport, recover } from '@lsync/overlay-merge'
import { hostPath, printable, textOf } from '@lsync/posix'
import type { Command } from 'commander'
import { examples } from '../examples.ts'
import { addWorkersOption, given, pathArgument } from '../options.ts'
import type { Session } from '../session.ts'

export function define(command: Command, session: Session): void {
  command
    .addHelpText('before', examples('lsync recover /srv/low', 'lsync recover /srv --json'))
    .argument('<dir>', 'the target of what was interrupted, or the directory that holds it')
  addWorkersOption(command).action(async (dir: string, options: { readonly workers?: number }) => {
    const reports = await recover(pathArgument(dir), {
      ...given({ workers: options.workers }),
      signal: session.signal,
      onProgress: session.output.progress,
    })
    for (const report of reports) render(report, session)
    if (reports.length === 0) {
      session.output.data(
        () => ({ type: 'recover', outcome: 'nothing' }),
        () => `nothing was interrupted in ${printable(hostPath(dir))}`,
      )
    }
  })
}

const SAYS: Readonly<Record<RecoverReport['outcome'], string>> = {
  finished: 'finished: the new view is there',
  'rolled-back': 'rolled back: the old view is as it was',
  nothing: 'nothing to do',
}

function render({ outcome, target = '' }: RecoverReport, session: Session): void {
  session.output.data(
    () => ({ type: 'recover', outcome, target: textOf(target) }),
    () => `${printable(target)}: ${SAYS[outcome]}`,
  )
}
