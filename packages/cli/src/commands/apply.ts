import { createReadStream, type ReadStream } from 'node:fs'
import { addAbortSignal } from 'node:stream'
import {
  type ApplyPlanReport,
  applyPortablePlan,
  PlanInvalidError,
  PreconditionFailedError,
} from '@lsync/overlay-merge'
import { AT_FDCWD, type HostPath, O_RDONLY, openat, printable, textOf } from '@lsync/posix'
import type { Command } from 'commander'
import { examples } from '../examples.ts'
import { addDryRunOption, addWorkersOption, addYesOption, given, pathArgument, pathsArgument } from '../options.ts'
import { countOf, durationOf } from '../progress-line.ts'
import type { Session } from '../session.ts'

interface ApplyOptions {
  readonly upper: HostPath
  readonly lower: HostPath
  readonly data?: HostPath[]
  readonly workers?: number
  readonly allowEmpty?: true
  readonly dryRun?: true
  readonly yes?: true
}

export function define(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync apply merge.plan --upper /srv/up --lower /srv/low --dry-run',
        'ssh node lsync plan --upper up --lower low --json | lsync apply - --upper /srv/up --lower /srv/low --yes',
      ),
    )
    .argument('<plan>', 'what `lsync plan --json` wrote; - is standard input')
    .requiredOption('--upper <dir>', 'the upper layer; it is used up', pathArgument)
    .requiredOption('--lower <dir>', 'the first lower layer, which changes', pathArgument)
    .option('--data <dir>', 'a data-only lower, as many as the plan was made with', pathsArgument)
    .option('--allow-empty', 'allow a result without any entry')
  addWorkersOption(command)
  addYesOption(addDryRunOption(command)).action(async (plan: string, options: ApplyOptions) => {
    await session.confirm(`this uses up ${printable(options.upper)}`, options)
    const { upper, lower, data, workers, allowEmpty, dryRun } = options
    try {
      const stream = addAbortSignal(session.signal, plan === '-' ? process.stdin : openPlan(plan))
      const report = await applyPortablePlan(linesOf(stream), {
        upper,
        target: lower,
        ...given({ data, workers, allowEmpty, dryRun }),
        signal: session.signal,
        onProgress: session.output.progress,
      })
      render(report, session)
    } catch (error) {
      if (error instanceof PreconditionFailedError) renderFailed(error, session)
      throw error
    }
  })
}

function openPlan(path: string): ReadStream {
  return createReadStream('', { fd: openat(AT_FDCWD, pathArgument(path), O_RDONLY) })
}

// Far above any line that `lsync plan` writes: a record has at most 4,096 steps.
const LINE_MAX_BYTES = 256 * 1024 * 1024

/** Splits at newlines alone: in a name there may be what other programs take for the end of a line. */
async function* linesOf(stream: AsyncIterable<Buffer>): AsyncIterable<string> {
  let parts: Buffer[] = []
  let [number, bytes] = [1, 0]
  for await (const chunk of stream) {
    let start = 0
    for (let end = chunk.indexOf(10); end >= 0; end = chunk.indexOf(10, start)) {
      yield Buffer.concat([...parts, chunk.subarray(start, end)]).toString('utf8')
      parts = []
      bytes = 0
      start = end + 1
      number++
    }
    parts.push(chunk.subarray(start))
    bytes += chunk.length - start
    if (bytes > LINE_MAX_BYTES) throw new PlanInvalidError(number, 'it does not end')
  }
  if (bytes > 0) yield Buffer.concat(parts).toString('utf8')
}

function render(report: ApplyPlanReport, { output }: Session): void {
  const { target, steps, directories, recovered, dryRun, elapsedMs } = report
  if (recovered) output.note(`finished an interrupted merge of ${printable(target)} first`)
  output.data(
    () => ({ type: 'apply', ...report, target: textOf(target) }),
    () => {
      const did = dryRun ? 'can be applied to' : 'applied to'
      const sum = `${countOf(steps)} steps in ${countOf(directories)} directories`
      return `${did} ${printable(target)} in ${durationOf(elapsedMs)}: ${sum}`
    },
  )
  if (dryRun) output.note('next: the same command without --dry-run')
}

function renderFailed({ failed, total }: PreconditionFailedError, { output }: Session): void {
  for (const { path, expected, actual, in: tree } of failed) {
    output.data(
      () => ({ type: 'precondition', path: textOf(path), in: tree, expected, actual }),
      () => `${printable(path) || '.'} (${tree}): should be ${expected}, is ${actual}`,
    )
  }
  if (total > failed.length) output.note(`${countOf(failed.length)} of ${countOf(total)} shown`)
}
