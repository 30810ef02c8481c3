import { type CloneMethod, type MergeReport, type MergeRequest, merge } from '@lsync/overlay-merge'
import { type HostPath, printable, textOf } from '@lsync/posix'
import { type Command, Option } from 'commander'
import { examples } from '../examples.ts'
import { UsageError } from '../failure.ts'
import {
  addDryRunOption,
  addLayerOptions,
  addWorkersOption,
  addYesOption,
  given,
  type LayerOptions,
  pathArgument,
} from '../options.ts'
import { countOf, durationOf } from '../progress-line.ts'
import type { Session } from '../session.ts'
import { shellWord } from '../shell-word.ts'

interface MergeOptions extends LayerOptions {
  readonly inPlace?: true
  readonly output?: HostPath
  readonly delta?: HostPath
  readonly workdir?: HostPath
  readonly clone: CloneMethod | 'auto'
  readonly plain?: true
  readonly workers?: number
  readonly allowEmpty?: true
  readonly dryRun?: true
  readonly yes?: true
}

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync merge --upper /srv/up --lower /srv/low --in-place',
      'lsync merge --upper /srv/up --lower /srv/l1 --lower /srv/l2 --output /srv/new --dry-run',
    ),
  )
  addLayerOptions(command)
    .option('--in-place', 'into the first lower; uses up the upper')
    .option('--output <dir>', 'into a new tree; upper and lowers stay as they are', pathArgument)
    .option('--delta <dir>', 'all of them into one new layer, for what lies below', pathArgument)
    .option('--workdir <dir>', 'the workdir of the upper, where it was mounted with index=on', pathArgument)
    .addOption(
      new Option('--clone <method>', 'how a new tree gets what does not change')
        .choices(['auto', 'moosefs', 'btrfs', 'reflink', 'hardlink', 'copy'])
        .default('auto'),
    )
    .option('--plain', 'with --output: a tree to run, not to mount as a layer (escaped marks get their plain names)')
    .option('--allow-empty', 'allow a result without any entry')
  addWorkersOption(command)
  addYesOption(addDryRunOption(command)).action(async (options: MergeOptions) => {
    const request = requestOf(options)
    if (request.mode === 'in-place') await session.confirm(`this uses up ${printable(options.upper)}`, options)
    const report = await merge({ ...request, signal: session.signal, onProgress: session.output.progress })
    render(options, report, session)
  })
}

function requestOf(options: MergeOptions): MergeRequest {
  const { inPlace, output, delta, lower, clone, ...others } = options
  const chosen = [inPlace, output, delta].filter((choice) => choice !== undefined)
  if (chosen.length !== 1) {
    throw new UsageError(
      chosen.length === 0 ? 'where to merge to is not said' : 'there can be only one place to merge to',
      'name one of --in-place, --output NEW and --delta OUT',
    )
  }
  const { upper, data, namespace, workdir, plain, workers, allowEmpty, dryRun } = others
  return {
    upper,
    lowers: lower,
    namespace,
    clone,
    mode: inPlace === true ? 'in-place' : output !== undefined ? 'output' : 'delta',
    ...given({ output: output ?? delta, data, workdir, plain, workers, allowEmpty, dryRun }),
  }
}

function render(options: MergeOptions, report: MergeReport, session: Session): void {
  const { output } = session
  const { counts, mode, dryRun, elapsedMs, clone } = report
  if (report.recovered) output.note(`finished an interrupted merge of ${printable(report.target)} first`)
  output.data(
    () => ({ ...report, type: 'merge', target: textOf(report.target) }),
    () => {
      const by = clone === undefined ? '' : ` by ${clone}`
      const what = [
        `${countOf(counts.created)} new`,
        `${countOf(counts.replaced)} replaced`,
        `${countOf(counts.removed)} removed`,
        ...(counts.whiteouts > 0 ? [`${countOf(counts.whiteouts)} whiteouts`] : []),
      ].join(', ')
      const did = dryRun ? 'would merge' : 'merged'
      const into = mode === 'in-place' ? 'into' : 'to new'
      return `${did} ${into} ${printable(report.target)}${by} in ${durationOf(elapsedMs)}: ${what}`
    },
  )
  const next = nextCommand(options, report)
  if (next !== undefined) output.note(`next: ${next}`)
}

function nextCommand({ upper, lower }: MergeOptions, { dryRun, mode, target }: MergeReport): string | undefined {
  if (dryRun) return 'the same command without --dry-run'
  if (mode === 'in-place') return undefined
  if (mode === 'delta') return `lsync merge --upper ${shellWord(target)} --lower BELOW --in-place`
  const stack = [upper, ...lower].map((path) => path.replace(/[\\:]/g, '\\$&')).join(':')
  return `lsync verify --stack ${shellWord(stack)} --against ${shellWord(target)}`
}
