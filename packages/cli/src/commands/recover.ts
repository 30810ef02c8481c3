import { type RecoverReport, recover } from '@lsync/overlay-merge'
import { hostPath, printable, textOf } from '@lsync/posix'
import type { Command } from 'commander'
import { examples } from '../examples.ts'
import { addWorkersOption, given, pathArgument } from '../options.ts'
import type { Session } from '../session.ts'

export function define(command: Command, session: Session): void {
  command
    .addHelpText('before', examples('lsync recover /srv/low', 'lsync recover /srv/new --dry-run --json'))
    .argument('<dir>', 'the target of what was interrupted: a tree, or the path of a new one')
    .option('--dry-run', 'tell what would be done, and do nothing')
  addWorkersOption(command).action(
    async (dir: string, options: { readonly workers?: number; readonly dryRun?: boolean }) => {
      const { outcome } = await recover(pathArgument(dir), {
        ...given({ workers: options.workers, dryRun: options.dryRun }),
        signal: session.signal,
        onProgress: session.output.progress,
      })
      const says = options.dryRun === true ? WOULD : SAYS
      session.output.data(
        () => ({ type: 'recover', outcome, target: textOf(hostPath(dir)), dryRun: options.dryRun === true }),
        () =>
          outcome === 'nothing'
            ? `nothing was interrupted on ${printable(hostPath(dir))}`
            : `${printable(hostPath(dir))}: ${says[outcome]}`,
      )
    },
  )
}

const SAYS: Readonly<Record<Exclude<RecoverReport['outcome'], 'nothing'>, string>> = {
  finished: 'finished: the new view is there',
  'rolled-back': 'rolled back: the old view is as it was',
}

const WOULD: typeof SAYS = {
  finished: 'would be finished, to the new view',
  'rolled-back': 'would be rolled back, to the old view',
}
