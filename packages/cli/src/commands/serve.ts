import type { HostPath } from '@lsync/posix'
import { serve } from '@lsync/sync'
import { type Command, Option } from 'commander'
import { examples } from '../examples.ts'
import { UsageError } from '../failure.ts'
import { addWorkersOption, given, pathArgument } from '../options.ts'
import type { Session } from '../session.ts'

interface ServeOptions {
  readonly stdio?: true
  readonly root: HostPath
  readonly readOnly?: true
  readonly appendOnly?: true
  readonly workers?: number
}

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync serve --stdio --root /srv/backup',
      'command="lsync serve --stdio --root /srv/backup/host1 --append-only",restrict ssh-ed25519 AAAA…',
    ),
  )
  command
    .option('--stdio', 'speak with one client over standard input and output')
    .requiredOption('--root <dir>', 'clients name targets beneath it, and reach nothing else', pathArgument)
    .addOption(new Option('--read-only', 'answer what a target holds, change nothing').conflicts('appendOnly'))
    .option('--append-only', 'add names, and never change, rename or remove what is there')
  addWorkersOption(command).action(async ({ stdio, root, readOnly, appendOnly, workers }: ServeOptions) => {
    if (stdio !== true) throw new UsageError('clients come over standard input and output alone', 'add --stdio')
    await serve({
      input: process.stdin,
      output: process.stdout,
      root,
      access: readOnly === true ? 'read-only' : appendOnly === true ? 'append-only' : 'full',
      signal: session.signal,
      ...given({ workers }),
    })
  })
}
