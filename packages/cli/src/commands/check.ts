import { type CheckReport, check, type LayerProblem } from '@lsync/overlay-merge'
import { type HostPath, printable, textOf } from '@lsync/posix'
import type { Command } from 'commander'
import { examples } from '../examples.ts'
import { addLayerOptions, addYesOption, given, type LayerOptions, pathArgument } from '../options.ts'
import { countOf, durationOf } from '../progress-line.ts'
import type { Session } from '../session.ts'

interface CheckOptions extends LayerOptions {
  readonly repair?: true
  readonly workdir?: HostPath
  readonly yes?: true
}

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync check --upper /srv/up --lower /srv/low',
      'lsync check --upper /srv/up --lower /srv/l1 --lower /srv/l2 --repair --yes',
    ),
  )
  addLayerOptions(command)
    .option('--repair', 'mend in the upper what is certain; without it nothing is changed')
    .option('--workdir <dir>', 'the workdir of the upper, where it was mounted with index=on', pathArgument)
  addYesOption(command).action(async (options: CheckOptions) => {
    const { upper, lower, namespace, data, repair, workdir } = options
    if (repair === true) {
      await session.confirm(`this mends ${printable(upper)} where it is broken`, options, 'look first without --repair')
    }
    const report = await check({
      upper,
      lowers: lower,
      namespace,
      ...given({ data, repair, workdir }),
      signal: session.signal,
      onProgress: session.output.progress,
    })
    for (const problem of report.problems) renderProblem(problem, session)
    renderSum(report, options, session)
  })
}

function renderProblem(problem: LayerProblem, session: Session): void {
  const { path, layerPath, layer, code, severity, why, repaired } = problem
  session.output.data(
    () => ({ type: 'problem', code, severity, layer, layerPath: textOf(layerPath), path: textOf(path), why, repaired }),
    () => {
      const word = repaired ? 'repaired' : severity
      const style = repaired ? 'green' : severity === 'error' ? 'red' : severity === 'warning' ? 'yellow' : 'dim'
      const place = path === '' ? printable(layerPath) : `${printable(layerPath)}/${printable(path)}`
      return `${session.output.styled(style, word)}: ${place}: ${why} (${code})`
    },
  )
}

function renderSum(
  { problems, remaining, entries, elapsedMs }: CheckReport,
  options: CheckOptions,
  session: Session,
): void {
  const repaired = problems.filter((problem) => problem.repaired).length
  session.output.data(
    () => ({ type: 'check', problems: problems.length, repaired, remaining, entries, elapsedMs }),
    () => {
      const said = `${countOf(entries)} entries in ${durationOf(elapsedMs)}`
      const mended = repaired > 0 ? `, ${countOf(repaired)} repaired` : ''
      return remaining === 0
        ? `the layers are in order: ${said}${mended}`
        : `${countOf(remaining)} problems left: ${said}${mended}`
    },
  )
  if (remaining > 0) session.foundProblems()
  if (remaining > 0 && options.repair !== true) session.output.note('next: the same command with --repair')
}
