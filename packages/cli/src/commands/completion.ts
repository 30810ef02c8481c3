import { Argument, type Command } from 'commander'
import { bashCompletion } from '../completion/bash.ts'
import { shapeOf } from '../completion/command-shape.ts'
import { fishCompletion } from '../completion/fish.ts'
import { zshCompletion } from '../completion/zsh.ts'
import { examples } from '../examples.ts'
import type { Session } from '../session.ts'

const SCRIPTS = { bash: bashCompletion, zsh: zshCompletion, fish: fishCompletion }

export function define(command: Command, session: Session): void {
  command
    .addHelpText('before', examples('eval "$(lsync completion bash)"', 'lsync completion fish | source'))
    .addArgument(new Argument('<shell>', 'for which shell').choices(Object.keys(SCRIPTS)))
    .action((shell: keyof typeof SCRIPTS) => {
      session.output.line(SCRIPTS[shell](shapeOf(command.parent as Command)).trimEnd())
    })
}
