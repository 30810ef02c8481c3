import { deref } from '@lsync/overlay-merge'
import { type HostPath, printable, textOf } from '@lsync/posix'
import type { Command } from 'commander'
import { examples } from '../examples.ts'
import { addDryRunOption, addLayerOptions, given, type LayerOptions, pathArgument } from '../options.ts'
import { countOf, durationOf, sizeOf } from '../progress-line.ts'
import type { Session } from '../session.ts'

interface DerefOptions extends LayerOptions {
  readonly output: HostPath
  readonly workdir?: HostPath
  readonly dryRun?: true
}

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync deref --upper /srv/up --lower /srv/low --output /srv/up2',
      'lsync deref --upper /srv/up --lower /srv/l1 --lower /srv/l2 --output /srv/up2 --json',
    ),
  )
  addLayerOptions(command)
    .requiredOption('--output <dir>', 'the upper to make; not there yet', pathArgument)
    .option('--workdir <dir>', 'the workdir of the upper, where it was mounted with index=on', pathArgument)
  addDryRunOption(command).action(async ({ lower, data, workdir, dryRun, ...others }: DerefOptions) => {
    const { upper, output: target, namespace } = others
    const { output, signal } = session
    const report = await deref({
      upper,
      lowers: lower,
      output: target,
      namespace,
      ...given({ data, workdir, dryRun }),
      signal,
      onProgress: output.progress,
    })
    const { inexact, ...figures } = report
    output.data(
      () => ({ type: 'deref', ...figures, output: textOf(report.output), inexact: inexact.length }),
      () =>
        `${report.dryRun ? 'would make' : 'made'} ${printable(report.output)} in ${durationOf(report.elapsedMs)}: ` +
        `${countOf(report.unfoldedDirectories)} redirects and ${countOf(report.unfoldedFiles)} metacopies unfolded, ` +
        `${sizeOf(report.bytes)} of content`,
    )
    for (const { path, why } of inexact) {
      output.warning('INEXACT', `${printable(path) || '.'}: ${why}`, { path: textOf(path) })
    }
    if (inexact.length > 0) session.foundProblems()
  })
}
