import type { ConvertProgress, EntryPolicy, LayerForm, Namespace } from '@lsync/overlay-merge'
import { type HostPath, printable, textOf } from '@lsync/posix'
import {
  exportImage,
  exportSnapshot,
  findSnapshot,
  importImage,
  parseSnapshotName,
  type Repository,
  type RunConfig,
  type SnapshotForm,
} from '@lsync/snapshot'
import { type Command, InvalidArgumentError, Option } from 'commander'
import { examples } from '../examples.ts'
import { EXIT, UsageError } from '../failure.ts'
import { addNamespaceOption, countArgument, given, pathArgument, pathsArgument, textsArgument } from '../options.ts'
import { countOf, sizeOf } from '../progress-line.ts'
import type { Session } from '../session.ts'
import { stackPart } from '../stack-text.ts'
import { addRepositoryOptions, type RepositoryOptions, withRepository } from './snapshot/repository.ts'

interface ImportOptions extends EntryPolicy {
  readonly ref?: string
  readonly platform?: string
  readonly namespace: Namespace
  readonly lossy?: true
}

interface ExportOptions extends RepositoryOptions {
  readonly snapshot?: string
  readonly since?: string
  readonly ref: string
  readonly namespace: Namespace
  readonly form?: LayerForm
  readonly base?: string
  readonly baseLayout?: HostPath
  readonly platform?: string
  readonly entrypoint?: readonly string[]
  readonly cmd?: readonly string[]
  readonly env?: readonly string[]
  readonly workdir?: string
  readonly user?: string
  readonly label?: readonly string[]
  readonly architecture?: string
  readonly created?: string
  readonly author?: string
  readonly comment?: string
  readonly compression: 'none' | 'gzip' | 'zstd'
  readonly level?: number
  readonly lossy?: true
}

const FORMS = ['kernel-trusted', 'kernel-user', 'xattr-whiteouts', 'aufs', 'fuse-overlayfs', 'plain', 'portable']

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync image import ./debian /srv/debian',
      'lsync image export ./debian --base bookworm --ref with-tools /srv/up',
    ),
  )
  defineImport(command.command('import').description('make kernel layers of an image'), session)
  defineExport(command.command('export').description('make an image of layers'), session)
}

function defineImport(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'skopeo copy docker://debian:12 oci:./debian:12 && lsync image import ./debian /srv/debian',
        'lsync image import --ref 12 --platform linux/arm64 ./debian /srv/debian',
      ),
    )
    .argument('<layout>', 'an OCI image layout', pathArgument)
    .argument('<to>', 'the directory to make; not there yet', pathArgument)
    .option('--ref <name>', 'the image, if the layout has several')
    .option('--platform <os/arch>', 'the platform, if the image has several (default: this machine)')
    .option('--lossy', 'leave out what the file system cannot hold, and say so, instead of failing')
    .addOption(choices('--devices <policy>', 'block and character devices', ['keep', 'skip', 'refuse']))
    .addOption(choices('--setuid <policy>', 'setuid, setgid and capabilities', ['keep', 'clear', 'refuse']))
  addNamespaceOption(command).action(async (layout: HostPath, to: HostPath, options: ImportOptions) => {
    const report = await importImage({
      ...options,
      layout,
      to,
      signal: session.signal,
      onProgress: ({ phase, entries, layer }) =>
        session.output.progress({ phase: `layer ${layer}: ${phase}`, done: entries }),
    })
    const layers = report.layers.map(({ path, digest, diffId, entries, bytes, losses }) => {
      for (const loss of losses) warnOfLoss(loss, session)
      return { path: textOf(path), digest, diffId, entries, bytes, losses: losses.length }
    })
    session.output.data(
      () => ({ type: 'image', target: textOf(to), digest: report.digest, config: report.config, layers }),
      () => {
        const stack = report.layers.map(({ path }) => stackPart(printable(path))).reverse()
        return `made ${printable(to)} of ${report.digest}: ${countOf(layers.length)} layers\nlowerdir=${stack.join(':')}`
      },
    )
  })
}

function defineExport(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync image export ./tools --cmd /bin/sh /srv/root',
        'lsync image export ./debian --base 12 --ref with-tools /srv/up && skopeo copy oci:./debian:with-tools docker://…',
      ),
    )
    .argument('<layout>', 'an OCI image layout; made if it is not there', pathArgument)
    .argument('[layers...]', 'the layers, top first: they become one layer of the image', pathsArgument)
    .option('--ref <name>', 'the name of the image in the layout', 'latest')
    .option('--base <name>', 'the image of the layout that the layers lie on; its layers, config and history are kept')
    .option('--base-layout <dir>', 'the layout that has it, if another', pathArgument)
    .option('--platform <os/arch>', 'the platform of the base, if it has several (default: this machine)')
    .addOption(
      new Option('--form <form>', 'what a single layer (or the snapshot) is, if no kernel layer').choices(FORMS),
    )
    .option('--entrypoint <word>', 'a word of the command that is always run; may come more than once', textsArgument)
    .option('--cmd <word>', 'a word of the command, or of its arguments; may come more than once', textsArgument)
    .option('--env <NAME=value>', 'a variable; may come more than once', pairsOf)
    .option('--workdir <dir>', 'where the command starts')
    .option('--user <user>', 'who runs it')
    .option('--label <NAME=value>', 'a label; may come more than once', pairsOf)
    .option('--architecture <name>', 'amd64, arm64, … (default: that of the base or of this machine)')
    .option('--created <time>', 'RFC 3339; without it the same layers make the same image', timeArgument)
    .option('--author <text>', 'who made it')
    .option('--comment <text>', 'for the history')
    .addOption(new Option('--compression <kind>', 'of the layer').choices(['none', 'gzip', 'zstd']).default('gzip'))
    .option('--level <level>', 'of the compression', countArgument)
    .option('--lossy', 'leave out what an image cannot hold, and say so, instead of failing')
  addRepositoryOptions(addNamespaceOption(command))
    .option('--snapshot <id>', 'instead of layers: a snapshot of a repository, or ID:PATH')
    .option('--since <id>', 'only what changed since this one, which the base is an image of')
    .action((layout: HostPath, layers: HostPath[] | undefined, options: ExportOptions) =>
      runExport(layout, layers ?? [], options, session),
    )
}

async function runExport(layout: HostPath, layers: HostPath[], options: ExportOptions, session: Session) {
  const { snapshot, since } = options
  if ((snapshot === undefined) === (layers.length === 0)) {
    throw new UsageError('what becomes an image is not said', 'name layers, or a snapshot with --snapshot')
  }
  if (snapshot === undefined && since !== undefined) {
    throw new UsageError('--since tells from which snapshot on', 'name the other one with --snapshot')
  }
  const request = exportRequestOf(layout, options, session)
  const report =
    snapshot === undefined
      ? await exportImage({ ...request, layers, namespace: options.namespace, ...given({ form: options.form }) })
      : await withRepository(options, session, async (repository) => {
          const version = await versionOf(repository, snapshot, session)
          const before = since === undefined ? {} : { since: await versionOf(repository, since, session) }
          return exportSnapshot({ ...request, repository, version, ...before, form: snapshotFormOf(options) })
        })
  for (const loss of report.losses) warnOfLoss(loss, session)
  session.output.data(
    () => ({ type: 'image', target: textOf(layout), ...report, losses: report.losses.length }),
    () => {
      const { layer } = report
      return `made ${report.ref} in ${printable(layout)}: ${report.digest}, ${countOf(report.layers)} layers\nthe new one: ${countOf(layer.entries)} entries, ${sizeOf(layer.bytes)} as ${layer.digest}`
    },
  )
}

function snapshotFormOf({ form, namespace }: ExportOptions): SnapshotForm {
  if (form === undefined) return namespace
  if (form === 'plain') return 'plain'
  if (form === 'kernel-user' || form === 'kernel-trusted') return form === 'kernel-user' ? 'user' : 'trusted'
  throw new UsageError(`a snapshot cannot be read in the form ${form}`, 'name plain, kernel-trusted or kernel-user')
}

/** All but what becomes the layer. */
function exportRequestOf(layout: HostPath, options: ExportOptions, session: Session) {
  const { ref, base, baseLayout, platform, entrypoint, cmd, env, workdir, user, label } = options
  const { architecture, created, author, comment, compression, level, lossy } = options
  return {
    layout,
    ref,
    compression,
    run: runConfigOf({ entrypoint, cmd, env, workdir, user, label }),
    ...given({ architecture, created, author, comment, level, lossy }),
    ...(base === undefined && baseLayout === undefined
      ? {}
      : { base: given({ ref: base, layout: baseLayout, platform }) }),
    signal: session.signal,
    onProgress: ({ phase, entries }: ConvertProgress) => session.output.progress({ phase, done: entries }),
  }
}

async function versionOf(repository: Repository, text: string, session: Session) {
  const { snapshot, path } = parseSnapshotName(text)
  return { snapshot: await findSnapshot(repository, snapshot, {}, session.signal), path }
}

function runConfigOf(
  options: {
    readonly [name in 'entrypoint' | 'cmd' | 'env' | 'workdir' | 'user' | 'label']: ExportOptions[name] | undefined
  },
): RunConfig {
  const { entrypoint, cmd, env, workdir, user, label } = options
  const labels = label?.map((pair): [string, string] => {
    const at = pair.indexOf('=')
    return [pair.slice(0, at), pair.slice(at + 1)]
  })
  return given({
    Entrypoint: entrypoint,
    Cmd: cmd,
    Env: env,
    WorkingDir: workdir,
    User: user,
    Labels: labels === undefined ? undefined : Object.fromEntries(labels),
  })
}

function choices(flags: string, description: string, values: readonly string[]): Option {
  return new Option(flags, description).choices(values).default('keep')
}

function pairsOf(text: string, before: string[] | undefined): string[] {
  if (!/^[^=]+=/.test(text)) throw new InvalidArgumentError('Expected NAME=value.')
  return [...(before ?? []), text]
}

function timeArgument(text: string): string {
  const isTime =
    /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$/.test(text) && !Number.isNaN(Date.parse(text))
  if (!isTime) throw new InvalidArgumentError('Expected a time such as 2024-01-31T12:00:00Z.')
  return text
}

function warnOfLoss({ path, what }: { readonly path: string; readonly what: string }, session: Session): void {
  session.output.warning('LOSS', `${printable(path) || '.'}: left out: ${what}`, { path: textOf(path), what })
  session.exitCode = EXIT.problems
}
