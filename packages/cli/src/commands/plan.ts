import { makePortablePlan, type PlanEnd, type PlanHeader, type PlanRecord, type Step } from '@lsync/overlay-merge'
import { bytesOf, printable } from '@lsync/posix'
import { type Command, Option } from 'commander'
import { examples } from '../examples.ts'
import { addLayerOptions, addWorkersOption, given, type LayerOptions } from '../options.ts'
import { countOf } from '../progress-line.ts'
import type { Session } from '../session.ts'

interface PlanOptions extends LayerOptions {
  readonly rename?: true
  readonly copy?: true
  readonly workers?: number
  readonly allowEmpty?: true
}

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync plan --upper /srv/up --lower /srv/low',
      'lsync plan --upper up --lower low --json | ssh node lsync apply - --upper /srv/up --lower /srv/low --yes',
    ),
  )
  addLayerOptions(command)
    .addOption(new Option('--rename', 'upper and lower will be one file system there (default: as here)'))
    .addOption(new Option('--copy', 'they will be two').conflicts('rename'))
    .option('--allow-empty', 'allow a result without any entry')
  addWorkersOption(command)
    .addHelpText('after', '\nOnly with --json it is a plan; without, it is for people to read.')
    .action(async (options: PlanOptions) => {
      const { upper, lower, namespace, data, workers, allowEmpty, rename, copy } = options
      const { output, signal } = session
      const lines = makePortablePlan({
        upper,
        lowers: lower,
        namespace,
        ...given({ data, workers, allowEmpty, rename: copy === true ? false : rename }),
        signal,
        onProgress: output.progress,
      })
      if (output.isJson) for await (const line of lines) output.line(line)
      else await render(lines, session)
    })
}

async function render(lines: AsyncIterable<string>, { output }: Session): Promise<void> {
  let [steps, directories] = [0, 0]
  let isRename = false
  for await (const line of lines) {
    const record = JSON.parse(line) as PlanHeader | PlanRecord | PlanEnd
    if (record.type === 'header') isRename = record.rename
    if (record.type !== 'directory') continue
    for (const step of record.steps) output.line(stepLine(record.path, step))
    steps += record.steps.length
    if (record.part !== true) directories++
  }
  const how = isRename ? 'by renaming' : 'by copying'
  output.line(`${countOf(steps)} steps in ${countOf(directories)} directories, ${how}`)
  output.note('next: the same command with --json makes the plan for `lsync apply`')
}

function stepLine(directory: string, step: Step): string {
  const path = shown(directory === '' ? step.name : `${directory}/${step.name}`)
  if (step.do === 'graft' || step.do === 'alias') return `${step.do} ${path} from ${shown(step.from)}`
  if (step.do !== 'place') return `${step.do} ${path}`
  const what = step.tree === true ? ' with all that is in it' : ''
  return `${step.was === 'nothing' ? 'add' : 'replace'} ${path}${what}`
}

function shown(path: string): string {
  return printable(bytesOf(path))
}
