import { createWriteStream } from 'node:fs'
import { isArchiveForm, type LayerForm, type Namespace } from '@lsync/overlay-merge'
import { type HostPath, printable, textOf } from '@lsync/posix'
import {
  type Repository,
  type RestoreAction,
  type RestoreReport,
  restoreSnapshot,
  restoreSnapshotAs,
} from '@lsync/snapshot'
import { type Command, Option } from 'commander'
import { examples } from '../../examples.ts'
import { UsageError } from '../../failure.ts'
import {
  addDryRunOption,
  addNamespaceOption,
  addWorkersOption,
  addYesOption,
  countArgument,
  given,
  pathArgument,
  textsArgument,
} from '../../options.ts'
import { countOf, durationOf, sizeOf } from '../../progress-line.ts'
import type { Session } from '../../session.ts'
import {
  addFilterOptions,
  addRepositoryOptions,
  type FilterOptions,
  type RepositoryOptions,
  snapshotOf,
  withRepository,
} from './repository.ts'

interface RestoreOptions extends RepositoryOptions, FilterOptions {
  readonly include?: string[]
  readonly exclude?: string[]
  readonly delete?: true
  readonly trustTimes?: true
  /** False with --no-lock. */
  readonly lock: boolean
  readonly dryRun?: true
  readonly yes?: true
  readonly workers?: number
  readonly as?: LayerForm
  readonly form: 'layer' | 'plain'
  readonly namespace: Namespace
  readonly compression: 'none' | 'gzip' | 'zstd'
  readonly level?: number
  readonly sparse?: true
  readonly lossy?: true
}

const ARCHIVES = ['tar', 'plain-tar', 'oci'] satisfies LayerForm[]
const TREES = ['kernel-trusted', 'kernel-user', 'xattr-whiteouts', 'aufs', 'plain', 'portable'] satisfies LayerForm[]

export function defineRestore(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync snapshot restore -r /backup/repo latest /srv/back',
        'lsync snapshot restore -r /backup/repo 1a2b3c4d:/srv/up/etc /srv/up/etc --delete --dry-run',
        'lsync snapshot restore -r /backup/repo latest --as oci --compression gzip >layer.tar.gz',
      ),
    )
    .argument('<snapshot>', 'its id, or latest; with :PATH only what is there (:/ is all, under its own paths)')
    .argument('[dir]', 'what becomes it; what is there is compared and, where it differs, replaced')
  addFilterOptions(addRepositoryOptions(command))
    .option('--include <pattern>', 'only what matches, and what lies above it; may be repeated', textsArgument)
    .option('--exclude <pattern>', 'not what matches; may be repeated', textsArgument)
    .option('--delete', 'remove what the snapshot does not have')
    .option('--no-lock', 'take no lock: for a repository that cannot be written to')
    .option('--trust-times', 'take files of the same size and time for the same, without comparing them')
    .addOption(
      new Option(
        '--as <form>',
        'make a layer of another form, where nothing is yet, or an archive (to <dir> or standard output)',
      ).choices([...ARCHIVES, ...TREES]),
    )
    .addOption(
      new Option('--form <form>', 'with --as: what the snapshot is, a layer or a tree without marks')
        .choices(['layer', 'plain'])
        .default('layer'),
    )
    .addOption(new Option('--compression <kind>', 'of an archive').choices(['none', 'gzip', 'zstd']).default('none'))
    .option('--level <level>', 'of the compression', countArgument)
    .option('--sparse', 'keep holes in an archive, which not every reader of images understands')
    .option('--lossy', 'with --as: leave out what the form cannot hold, and say so, instead of failing')
  addNamespaceOption(addWorkersOption(addYesOption(addDryRunOption(command)))).action(
    async (name: string, dir: string | undefined, options: RestoreOptions) => {
      if (options.as !== undefined) return restoreAs(name, dir, options.as, options, session)
      if (dir === undefined) throw new UsageError('where to restore is not said', 'name a directory, or use --as')
      const target = pathArgument(dir)
      const { include, exclude, trustTimes, dryRun, workers } = options
      if (options.delete === true) {
        await session.confirm(`this removes from ${printable(target)} what the snapshot does not have`, options)
      }
      const restore = async (repository: Repository) => {
        const { snapshot, path } = await snapshotOf(repository, name, options, session)
        const report = await restoreSnapshot(repository, {
          snapshot,
          target,
          ...given({ path, includes: include, excludes: exclude, delete: options.delete, trustTimes, dryRun, workers }),
          noLock: !options.lock,
          signal: session.signal,
          onProgress: session.output.progress,
          ...(dryRun === true ? { onAction: (action, entry) => renderAction(action, entry, session) } : {}),
        })
        render(report, target, dryRun === true, session)
      }
      await withRepository(options, session, restore, { threads: { for: 'restore', width: workers } })
    },
  )
}

async function restoreAs(
  name: string,
  dir: string | undefined,
  as: LayerForm,
  options: RestoreOptions,
  session: Session,
): Promise<void> {
  const { include, exclude, trustTimes, dryRun, namespace, compression, level, sparse, lossy } = options
  if ([include, exclude, options.delete, trustTimes, dryRun].some((other) => other !== undefined)) {
    throw new UsageError('--as makes something new, all of it', 'leave out patterns, --delete and --dry-run')
  }
  const isStream = dir === undefined || dir === '-'
  if (isStream && !isArchiveForm(as)) throw new UsageError(`the form ${as} is a directory`, 'name one')
  await withRepository(options, session, async (repository) => {
    const { snapshot, path } = await snapshotOf(repository, name, options, session)
    const { entries, bytes, losses } = await restoreSnapshotAs(repository, {
      snapshot,
      as,
      to: isStream ? createWriteStream('', { fd: 1, autoClose: false }) : pathArgument(dir),
      form: options.form === 'plain' ? 'plain' : namespace,
      namespace,
      compression,
      noLock: !options.lock,
      ...given({ path, level, sparse, lossy }),
      signal: session.signal,
      onProgress: session.output.progress,
    })
    for (const { path: lost, what } of losses) {
      session.output.warning('LOSS', `${printable(lost) || '.'}: left out: ${what}`, { path: textOf(lost), what })
    }
    if (losses.length > 0) session.foundProblems()
    // Standard output is the archive, so that the report has no place there.
    if (isStream) return
    const to = pathArgument(dir)
    session.output.data(
      () => ({
        type: 'restored',
        snapshot: snapshot.id,
        as,
        target: textOf(to),
        entries,
        bytes,
        losses: losses.length,
      }),
      () =>
        `restored ${snapshot.id.slice(0, 8)} to ${printable(to)} as ${as}: ${countOf(entries)} entries, ${sizeOf(bytes)}`,
    )
  })
}

function renderAction(action: RestoreAction, path: HostPath | string, session: Session): void {
  session.output.data(
    () => ({ type: 'action', action, path: textOf(path) }),
    () => `${action} ${printable(path)}`,
  )
}

function render(report: RestoreReport, target: HostPath, isDryRun: boolean, session: Session): void {
  const { snapshotId, counts, files, directories, writtenBytes, problems, elapsedMs } = report
  for (const { path, code, message } of problems) session.output.warning(code, message, { path: textOf(path) })
  session.output.data(
    () => ({
      type: 'restored',
      snapshot: snapshotId,
      from: textOf(report.path),
      target: textOf(target),
      dryRun: isDryRun,
      ...counts,
      files,
      directories,
      writtenBytes,
      problems: problems.length,
      elapsedMs,
    }),
    () => {
      const { create, replace, metadata, remove } = counts
      const changes = `${countOf(create)} created, ${countOf(replace)} replaced, ${countOf(metadata)} mended, ${countOf(remove)} removed`
      if (isDryRun) return `would restore ${snapshotId.slice(0, 8)} to ${printable(target)}: ${changes}`
      return `restored ${snapshotId.slice(0, 8)} to ${printable(target)} in ${durationOf(elapsedMs)}: ${changes}, ${sizeOf(writtenBytes)} written`
    },
  )
  if (problems.length > 0) session.foundProblems()
}
