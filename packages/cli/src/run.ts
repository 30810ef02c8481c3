import { Command, CommanderError } from 'commander'
import manifest from '../package.json' with { type: 'json' }
import { commandLine } from './command-line.ts'
import { commands } from './commands.ts'
import { examples } from './examples.ts'
import { EXIT, type ExitCode, failureOf } from './failure.ts'
import { Session } from './session.ts'

/** Runs the command that the command line names, and returns the exit code. Never throws. */
export async function runCli(): Promise<ExitCode> {
  const args = await commandLine()
  const session = new Session(args.includes('--json'))
  session.listen()
  let command = 'lsync'
  try {
    const program = await programFor(args, session)
    command = nameOf(program, args)
    await program.parseAsync(args, { from: 'user' })
    session.output.flush()
    return session.finalCode
  } catch (error) {
    if (isHelp(error)) return EXIT.done
    const failure = failureOf(session.signal.aborted ? session.signal.reason : error, command)
    if (failure.line !== undefined) session.output.error(failure.line, failure.fields)
    return failure.exitCode
  } finally {
    session.output.close()
  }
}

/** The whole command line, or as much of it as these arguments need. */
export async function programFor(args: readonly string[], session: Session): Promise<Command> {
  const program = new Command('lsync')
    .description('The storage engine for overlay roots: merges layers exactly as the kernel shows them.')
    .version(`lsync ${manifest.version}`, '-V, --version', 'print the version')
    .helpOption('-h, --help', 'show help')
    .helpCommand('help [command]', 'show help for a command')
    .showHelpAfterError(false)
    .exitOverride()
    // Errors are rendered in one place, as a line or an object.
    .configureOutput({ writeErr: () => undefined })
    .addHelpText(
      'before',
      examples('lsync merge --upper U --lower L --in-place', 'lsync merge --upper U --lower L --output NEW --dry-run'),
    )
    .addHelpText('after', '\nExit codes: 0 done, 1 failed, 2 usage, 3 problems found, 4 busy, 130 interrupted')
  const asked = args[0] === 'help' ? args[1] : args[0]
  for (const [name, entry] of Object.entries(commands)) {
    const command = program.command(name).description(entry.summary)
    if (name === asked) session.afterInterrupt = entry.afterInterrupt
    if (name === asked || asked === 'completion') {
      ;(await entry.load()).define(command, session)
      addJsonOption(command)
    }
  }
  if (args.length === 0) program.action(() => program.help())
  return program
}

function addJsonOption(command: Command): void {
  if (command.commands.length === 0) command.option('--json', 'print one JSON object per line, errors included')
  else for (const child of command.commands) addJsonOption(child)
}

/** `lsync layer import`: what the help that an error points to is the help of. */
function nameOf(program: Command, args: readonly string[]): string {
  const [word, ...others] = args
  const child = program.commands.find((command) => command.name() === word)
  return child === undefined ? program.name() : `${program.name()} ${nameOf(child, others)}`
}

function isHelp(error: unknown): boolean {
  return error instanceof CommanderError && error.exitCode === 0
}
