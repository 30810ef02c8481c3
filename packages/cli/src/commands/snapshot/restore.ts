import { type HostPath, printable, textOf } from '@lsync/posix'
import { type RestoreAction, type RestoreReport, restoreSnapshot } from '@lsync/snapshot'
import type { Command } from 'commander'
import { examples } from '../../examples.ts'
import { addDryRunOption, addWorkersOption, addYesOption, given, pathArgument } from '../../options.ts'
import { countOf, durationOf, sizeOf } from '../../progress-line.ts'
import type { Session } from '../../session.ts'
import {
  addFilterOptions,
  addRepositoryOptions,
  type FilterOptions,
  type RepositoryOptions,
  snapshotOf,
  textsArgument,
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
}

export function defineRestore(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync snapshot restore -r /backup/repo latest /srv/back',
        'lsync snapshot restore -r /backup/repo 1a2b3c4d:/srv/up/etc /srv/up/etc --delete --dry-run',
      ),
    )
    .argument('<snapshot>', 'its id, or latest; with :PATH only what is there (:/ is all, under its own paths)')
    .argument('<dir>', 'what becomes it; what is there is compared and, where it differs, replaced', pathArgument)
  addFilterOptions(addRepositoryOptions(command))
    .option('--include <pattern>', 'only what matches, and what lies above it; may be repeated', textsArgument)
    .option('--exclude <pattern>', 'not what matches; may be repeated', textsArgument)
    .option('--delete', 'remove what the snapshot does not have')
    .option('--no-lock', 'take no lock: for a repository that cannot be written to')
    .option('--trust-times', 'take files of the same size and time for the same, without comparing them')
  addWorkersOption(addYesOption(addDryRunOption(command))).action(
    async (name: string, target: HostPath, options: RestoreOptions) => {
      const { include, exclude, trustTimes, dryRun, workers } = options
      if (options.delete === true) {
        await session.confirm(`this removes from ${printable(target)} what the snapshot does not have`, options)
      }
      await withRepository(options, session, async (repository) => {
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
      })
    },
  )
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
