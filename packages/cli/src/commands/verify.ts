import { type Namespace, verify } from '@lsync/overlay-merge'
import type { HostPath } from '@lsync/posix'
import type { Command } from 'commander'
import { examples } from '../examples.ts'
import { addNamespaceOption, pathArgument } from '../options.ts'
import type { Session } from '../session.ts'
import { type StackText, splitStack } from '../stack-text.ts'
import { renderVerification } from '../verification.ts'

interface VerifyOptions {
  readonly stack: StackText
  readonly against: HostPath
  readonly namespace: Namespace
  readonly workdir?: HostPath
  readonly asLayer?: true
}

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync verify --stack /srv/up:/srv/l1:/srv/l2 --against /srv/new',
      "lsync verify --stack '/srv/a\\:b:/srv/low' --against /srv/new --json",
    ),
  )
  addNamespaceOption(
    command
      .requiredOption(
        '--stack <layers>',
        'the layers, top first, with colons between; data-only ones last, as ::DIR; `\\:` is a colon in a name',
        splitStack,
      )
      .requiredOption('--against <dir>', 'the tree that should be what the stack shows', pathArgument),
  )
    .option('--as-layer', 'the tree is itself a layer: compare what a mount of it shows')
    .option('--workdir <dir>', 'the workdir of the upper, where it was mounted with index=on', pathArgument)
    .action(async ({ stack, ...others }: VerifyOptions) => {
      const report = await verify({
        ...others,
        layers: stack.layers.map(pathArgument),
        data: stack.data.map(pathArgument),
        signal: session.signal,
        onProgress: session.output.progress,
      })
      renderVerification(report, others.against, session)
    })
}
