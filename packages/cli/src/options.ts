import { readlinkSync } from 'node:fs'
import type { Namespace } from '@lsync/overlay-merge'
import { type HostPath, hostPath } from '@lsync/posix'
import { type Command, InvalidArgumentError, Option } from 'commander'

/** What the options that name layers give. */
export interface LayerOptions {
  readonly upper: HostPath
  readonly lower: HostPath[]
  readonly data?: HostPath[]
  readonly namespace: Namespace
}

/** A path of the command line, made absolute: journals outlive the working directory. Nothing else is normalized. */
export function pathArgument(text: string): HostPath {
  if (text === '') throw new InvalidArgumentError('A path cannot be empty.')
  const path = hostPath(text)
  if (path.startsWith('/')) return path
  const relative = path.replace(/^(\.\/+)+/, '').replace(/^\.$/, '')
  const cwd = readlinkSync('/proc/self/cwd', 'latin1')
  return `${cwd === '/' ? '' : cwd}/${relative}`.replace(/(?<=.)\/+$/, '') as HostPath
}

/** As `pathArgument`, for an option that may come more than once. */
export function pathsArgument(text: string, before: HostPath[] | undefined): HostPath[] {
  return [...(before ?? []), pathArgument(text)]
}

export function countArgument(text: string): number {
  if (!/^\d{1,6}$/.test(text)) throw new InvalidArgumentError('Expected a whole number.')
  return Number(text)
}

/** A size in bytes: `800k`, `50M`, `20G`. */
export function sizeArgument(text: string): number {
  const [, count, unit = ''] = /^(\d{1,9})([kKMGT]?)$/.exec(text) ?? []
  if (count === undefined || Number(count) === 0) throw new InvalidArgumentError('Expected bytes such as 800k or 50M.')
  return Number(count) * 1000 ** (unit === '' ? 0 : 'kMGT'.indexOf(unit.replace('K', 'k')) + 1)
}

/** For an option that may come more than once. */
export function textsArgument(text: string, before: string[] | undefined): string[] {
  return [...(before ?? []), text]
}

const UNIT_MS: Readonly<Record<string, number>> = { ms: 1, s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 }

/** A time such as `200ms`, `1s` or `12h`, in ms. */
export function timeArgument(text: string): number {
  const [, count, unit] = /^(\d{1,7})(ms|s|m|h|d)?$/.exec(text) ?? []
  if (count === undefined) throw new InvalidArgumentError('Expected a time such as 1s or 200ms.')
  return Number(count) * (UNIT_MS[unit ?? 's'] as number)
}

/** `--upper`, `--lower`, `--data`, `--namespace`. */
export function addLayerOptions(command: Command): Command {
  return addNamespaceOption(
    command
      .requiredOption('--upper <dir>', 'the upper layer', pathArgument)
      .addOption(
        new Option('--lower <dir>', 'a lower layer; again for each one further down')
          .argParser(pathsArgument)
          .makeOptionMandatory(),
      )
      .option('--data <dir>', 'a data-only lower (lowerdir=…::DIR); may be repeated', pathsArgument),
  )
}

export function addNamespaceOption(command: Command): Command {
  return command.addOption(
    new Option('--namespace <name>', 'whose marks count, as on the mount (user: userxattr)')
      .choices(['trusted', 'user'])
      .default('trusted'),
  )
}

export function addWorkersOption(command: Command): Command {
  return command.option(
    '--workers <count>',
    'worker threads (default: 2 on local disks, 16 over a network)',
    countArgument,
  )
}

export function addYesOption(command: Command): Command {
  return command.option('--yes', 'do not ask')
}

export function addDryRunOption(command: Command): Command {
  return command.option('--dry-run', 'change nothing, show what would be done')
}

/** The same object without the keys that are `undefined`: an option that was not given is absent. */
export function given<T extends object>(options: T): { [K in keyof T]: Exclude<T[K], undefined> } {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)) as {
    [K in keyof T]: Exclude<T[K], undefined>
  }
}
