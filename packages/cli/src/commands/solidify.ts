import { type Hooks, type Quiescence, quiescenceByFreezer, quiescenceByHooks } from '@lsync/container-root'
import { type HostPath, textOf } from '@lsync/posix'
import type { Command } from 'commander'
import { examples } from '../examples.ts'
import { UsageError } from '../failure.ts'
import { given, pathArgument, textsArgument } from '../options.ts'
import { durationOf } from '../progress-line.ts'
import { addStateOption, type StateOption, withToldRoot } from '../roots.ts'
import type { Session } from '../session.ts'

interface SolidifyOptions extends StateOption {
  readonly live?: true
  readonly message?: string
  readonly tag?: string[]
  readonly stop?: string
  readonly start?: string
  readonly cgroup?: HostPath
  readonly sealDelta?: true
}

export function define(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync solidify lab --message "with cuda"',
        'lsync solidify lab --live --cgroup /sys/fs/cgroup/machine/lab --tag nightly',
      ),
    )
    .argument('<name>', 'the root, as this node calls it')
    .option('--live', 'the container goes on; it rests only for the end of the last pass')
    .option('--message <text>', 'what to say of the version')
    .option('--tag <name>', 'a name for the version, which gc keeps then; may be repeated', textsArgument)
    .option('--stop <command>', 'stops the container: run by sh, with LSYNC_ROOT and LSYNC_MERGED')
    .option('--start <command>', 'starts it again')
    .option('--cgroup <dir>', 'with --live: freeze this cgroup for the end of the last pass', pathArgument)
    .option(
      '--seal-delta',
      'what changed last becomes a sealed layer, written in one piece, on top of what is there already',
    )
  addStateOption(command).action(async (name: string, options: SolidifyOptions) => {
    const { live, message, tag: tags, stop, start, cgroup, sealDelta } = options
    if (sealDelta === true && live === true) {
      throw new UsageError('a live version is cloned from what is on the store', 'leave out --live or --seal-delta')
    }
    if (cgroup !== undefined && live !== true) {
      throw new UsageError('frozen processes hold the mount', 'use --stop and --start, or --live')
    }
    const { output, signal } = session
    await withToldRoot(name, options, session, async (root) => {
      const context = { root: name, merged: textOf(root.mergedPath), node: root.node.name, reason: 'solidify' }
      const hooks: Hooks = {
        ...(stop === undefined ? {} : { stop: { command: stop } }),
        ...(start === undefined ? {} : { start: { command: start } }),
      }
      const quiescence = quiescenceOf(hooks, cgroup, context)
      const sealsDelta = sealDelta === true ? () => true : undefined
      const report = await root.solidify({ signal, ...given({ live, message, tags, quiescence, sealsDelta }) })
      output.data(
        () => ({ type: 'solidify', ...report }),
        () =>
          `version ${report.version.number} in ${durationOf(report.elapsedMs)}, at rest ${durationOf(report.restMs)}`,
      )
      if (!report.isMounted) output.note(`next: lsync root mount ${name}`)
    })
  })
}

function quiescenceOf(
  hooks: Hooks,
  cgroup: HostPath | undefined,
  context: Parameters<typeof quiescenceByHooks>[1],
): Quiescence | undefined {
  if (cgroup !== undefined) return quiescenceByFreezer(textOf(cgroup))
  return Object.keys(hooks).length === 0 ? undefined : quiescenceByHooks(hooks, context)
}
