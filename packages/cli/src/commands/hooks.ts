import {
  ContainerRoot,
  HookName,
  type Hooks,
  NodeState,
  presetHooks,
  RUNTIMES,
  type Runtime,
  readHooks,
  writeHooks,
} from '@lsync/container-root'
import type { HostPath } from '@lsync/posix'
import { type Command, Option } from 'commander'
import { examples } from '../examples.ts'
import { UsageError } from '../failure.ts'
import { countArgument, given, pathArgument } from '../options.ts'
import type { Session } from '../session.ts'

type Given = Partial<Record<HookName, string>>
interface HooksOptions extends Given {
  readonly preset?: Runtime
  readonly container?: string
  readonly bundle?: string
  readonly runcRoot?: string
  readonly stopSeconds?: number
  readonly timeout?: number
  readonly clear?: true
  readonly home?: HostPath
  readonly state?: HostPath
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
  command
    .option('--timeout <seconds>', 'how long each of these may take', countArgument)
    .option('--clear', 'forget all others')
    .option('--home <dir>', 'the home of the root, where this node does not know it yet', pathArgument)
    .option('--state <dir>', 'the state of this node', pathArgument)
    .action(async (name: string, options: HooksOptions) => {
      const root = await openRootOf(name, options)
      try {
        const before = readHooks(root)
        const hooks = hooksOf(options.clear === true ? {} : before, options)
        if (JSON.stringify(hooks) !== JSON.stringify(before)) writeHooks(root, hooks)
        session.output.data(
          () => ({ type: 'hooks', root: name, hooks }),
          () =>
            NAMES.flatMap((hook) => (hooks[hook] === undefined ? [] : `${hook}: ${hooks[hook].command}`)).join('\n'),
        )
      } finally {
        await root.close()
      }
    })
}

/** A root of this node; with `home` also one that the node has not seen yet. */
export function openRootOf(
  name: string,
  { home, state }: { readonly home?: HostPath; readonly state?: HostPath },
): Promise<ContainerRoot> {
  const options = given({ state: state === undefined ? undefined : NodeState.open(state) })
  return home === undefined ? ContainerRoot.openKnown(name, options) : ContainerRoot.open(home, name, options)
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
