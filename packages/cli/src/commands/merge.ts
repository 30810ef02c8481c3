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
import { stackPart } from '../stack-text.ts'

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
  readonly verify?: true
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
    .option(
      '--verify',
      'compare the result with what the kernel shows (in place: showed before; reads all of it twice)',
    )
    .option('--allow-empty', 'allow a result without any entry')
  addWorkersOption(command)
  addYesOption(addDryRunOption(command)).action(async (options: MergeOptions) => {
    const request = requestOf(options)
    if (request.mode === 'in-place') await session.confirm(`this uses up ${printable(options.upper)}`, options)
    const { output, signal } = session
    const isVerified = options.verify === true && options.dryRun !== true
    // What merges need is loaded; what compares is as much again.
    const verification = isVerified ? await import('../merge-verification.ts') : undefined
    const before = request.mode === 'in-place' ? await verification?.recordBefore(request, session) : undefined
    try {
      const report = await merge({
        ...request,
        signal,
        onProgress: output.progress,
        ...(output.isJson ? { onPlanLine: (line) => output.line(line.trimEnd()) } : {}),
      })
      render(options, report, session)
      await verification?.verifyMerged(request, report, before, session)
    } finally {
      before?.close()
    }
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
    () => ({ type: 'merge', ...report, target: textOf(report.target) }),
    () => {
      const by = clone === undefined ? '' : ` by ${clone}`
      const what = [
        `${countOf(counts.placed)} placed`,
        `${countOf(counts.removed)} removed`,
        ...(counts.whiteouts > 0 ? [`${countOf(counts.whiteouts)} whiteouts`] : []),
      ].join(', ')
      const did = dryRun ? 'would merge' : 'merged'
      const into = mode === 'in-place' ? 'into' : 'to new'
      return `${did} ${into} ${printable(report.target)}${by} in ${durationOf(elapsedMs)}: ${what}`
    },
  )
  for (const { what, why } of report.losses)
    output.warning('LOSS', `the target keeps ${what} only nearly: ${why}`, { what })
  const next = nextCommand(options, report)
  if (next !== undefined) output.note(`next: ${next}`)
}

function nextCommand(options: MergeOptions, { dryRun, mode, target }: MergeReport): string | undefined {
  const { upper, lower, namespace, verify } = options
  if (dryRun) return 'the same command without --dry-run'
  if (mode === 'in-place' || verify === true) return undefined
  const marks = namespace === 'trusted' ? '' : ` --namespace ${namespace}`
  if (mode === 'delta') return `lsync merge --upper ${shellWord(target)} --lower BELOW --in-place${marks}`
  const stack = [upper, ...lower].map(stackPart).join(':')
  return `lsync verify --stack ${shellWord(stack)} --against ${shellWord(target)}${marks}`
}
