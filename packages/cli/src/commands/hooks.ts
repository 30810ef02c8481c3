import { HookName, type Hooks, presetHooks, RUNTIMES, type Runtime, readHooks, writeHooks } from '@lsync/container-root'
import { type Command, Option } from 'commander'
import { examples } from '../examples.ts'
import { UsageError } from '../failure.ts'
import { countArgument, given } from '../options.ts'
import { addRootOptions, type RootOptions, withRoot } from '../roots.ts'
import type { Session } from '../session.ts'

type Given = Partial<Record<HookName, string>>
interface HooksOptions extends Given, RootOptions {
  readonly preset?: Runtime
  readonly container?: string
  readonly bundle?: string
  readonly runcRoot?: string
  readonly stopSeconds?: number
  readonly timeout?: number
  readonly clear?: true
}

const NAMES = HookName.options

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync hooks lab --preset runc --container lab --bundle /srv/lab/bundle',
      "lsync hooks web --stop 'systemctl stop web' --start 'systemctl start web' --health 'curl -fs localhost'",
    ),
  )
  command
    .argument('<name>', 'the root, as it is called on this node')
    .addOption(new Option('--preset <runtime>', 'hooks for a container of this runtime').choices(RUNTIMES))
    .option('--container <name>', 'with --preset: its name or id')
    .option('--bundle <dir>', 'with --preset runc: its bundle')
    .option('--runc-root <dir>', 'with --preset runc: where runc keeps its state')
    .option('--stop-seconds <count>', 'with --preset: how long it may take to end by itself', countArgument)
  for (const name of NAMES) command.option(`--${name} <command>`, `the ${name} hook, for sh -c; empty for none`)
  addRootOptions(
    command
      .option('--timeout <seconds>', 'how long each of these may take', countArgument)
      .option('--clear', 'forget all others'),
  ).action(async (name: string, options: HooksOptions) => {
    await withRoot(name, options, async (root) => {
      const before = readHooks(root)
      const hooks = hooksOf(options.clear === true ? {} : before, options)
      if (JSON.stringify(hooks) !== JSON.stringify(before)) writeHooks(root, hooks)
      session.output.data(
        () => ({ type: 'hooks', root: name, hooks }),
        () =>
          NAMES.flatMap((hook) => (hooks[hook] === undefined ? [] : `${hook}: ${hooks[hook].command}`)).join('\n') ||
          undefined,
      )
    })
  })
}

function hooksOf(before: Hooks, options: HooksOptions): Hooks {
  const { preset, container, bundle, runcRoot, stopSeconds, timeout } = options
  if ((preset === undefined) !== (container === undefined)) {
    throw new UsageError('--preset and --container go together', 'name both')
  }
  const made =
    container === undefined ? {} : presetHooks(preset as Runtime, { container, bundle, runcRoot, stopSeconds })
  const own = NAMES.flatMap((name) => {
    const command = options[name]
    if (command === undefined) return []
    return [
      [name, command === '' ? undefined : { command, ...given({ timeoutMs: timeout && timeout * 1000 }) }] as const,
    ]
  })
  const all = { ...before, ...made, ...Object.fromEntries(own) }
  return Object.fromEntries(Object.entries(all).filter(([, hook]) => hook !== undefined)) as Hooks
}
