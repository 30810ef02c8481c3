import { type Difference, diff } from '@lsync/overlay-merge'
import { printable, textOf } from '@lsync/posix'
import type { Command } from 'commander'
import { examples } from '../examples.ts'
import { addLayerOptions, given, type LayerOptions } from '../options.ts'
import type { Session } from '../session.ts'

interface DiffOptions extends LayerOptions {
  readonly content?: true
}

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync diff --upper /srv/up --lower /srv/low',
      'lsync diff --upper /srv/up --lower /srv/l1 --lower /srv/l2 --content --json',
    ),
  )
  addLayerOptions(command)
    .option('--content', 'compare bytes, where size and time do not tell')
    .addHelpText('after', '\nLetters: A added, D removed, M modified, m metadata only, T type, R renamed, ! unreadable')
    .action(async ({ upper, lower, namespace, data, content }: DiffOptions) => {
      const differences = diff({
        upper,
        lowers: lower,
        namespace,
        ...given({ data, content }),
        signal: session.signal,
        onProgress: session.output.progress,
      })
      for await (const difference of differences) render(difference, session)
    })
}

const LETTERS: Readonly<Record<Difference['change'], string>> = {
  added: 'A',
  removed: 'D',
  modified: 'M',
  metadata: 'm',
  type: 'T',
  renamed: 'R',
  unreadable: '!',
}

function render({ path, from, change, what, ...sizes }: Difference, session: Session): void {
  if (change === 'unreadable') session.foundProblems()
  session.output.data(
    () => ({
      type: 'difference',
      change,
      path: textOf(path),
      ...(from === undefined ? {} : { from: textOf(from) }),
      what: what.map(textOf),
      ...sizes,
    }),
    () => {
      const name = from === undefined ? shown(path) : `${shown(from)} -> ${shown(path)}`
      return `${LETTERS[change]} ${name}${what.length === 0 ? '' : `  (${what.map(printable).join(', ')})`}`
    },
  )
}

function shown(path: string): string {
  return path === '' ? '.' : printable(path)
}
