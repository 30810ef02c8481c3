import { vacuum } from '@lsync/overlay-merge'
import { type HostPath, printable, textOf } from '@lsync/posix'
import type { Command } from 'commander'
import { examples } from '../examples.ts'
import { addDryRunOption, addLayerOptions, addYesOption, given, type LayerOptions, pathArgument } from '../options.ts'
import { countOf, durationOf, sizeOf } from '../progress-line.ts'
import type { Session } from '../session.ts'

interface VacuumOptions extends LayerOptions {
  readonly workdir?: HostPath
  readonly dryRun?: true
  readonly yes?: true
}

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync vacuum --upper /srv/up --lower /srv/low --dry-run',
      'lsync vacuum --upper /srv/up --lower /srv/l1 --lower /srv/l2 --yes',
    ),
  )
  addLayerOptions(command).option(
    '--workdir <dir>',
    'the workdir of the upper, where it was mounted with index=on',
    pathArgument,
  )
  addYesOption(addDryRunOption(command)).action(async (options: VacuumOptions) => {
    const { upper, lower, namespace, data, workdir, dryRun } = options
    await session.confirm(`this removes from ${printable(upper)} what changed nothing`, options)
    const report = await vacuum({
      upper,
      lowers: lower,
      namespace,
      ...given({ data, workdir, dryRun }),
      signal: session.signal,
      onProgress: session.output.progress,
    })
    const { output } = session
    for (const { path, why } of report.dropped) {
      output.data(
        () => ({ type: 'dropped', path: textOf(path), why }),
        () => (report.dryRun ? `${printable(path)}  (${WHY[why]})` : undefined),
      )
    }
    const { bytes, recovered, elapsedMs } = report
    output.data(
      () => ({
        type: 'vacuum',
        upper: textOf(upper),
        dropped: report.dropped.length,
        bytes,
        recovered,
        dryRun: report.dryRun,
        elapsedMs,
      }),
      () => {
        const did = report.dryRun ? 'would drop' : 'dropped'
        return `${did} ${countOf(report.dropped.length)} names, ${sizeOf(bytes)}, in ${durationOf(elapsedMs)}`
      },
    )
  })
}

const WHY = { 'same-as-below': 'the same lies below', 'hides-nothing': 'hides nothing' } as const
