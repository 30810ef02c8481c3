import { readFileSync } from 'node:fs'
import type { Namespace } from '@lsync/overlay-merge'
import { type HostPath, printable, textOf } from '@lsync/posix'
import {
  type CreateReport,
  createSnapshot,
  createSnapshotOfTar,
  findSnapshot,
  type ObjectId,
  type Repository,
  type SnapshotTarget,
  type TarCreateRequest,
} from '@lsync/snapshot'
import { type Command, InvalidArgumentError, Option } from 'commander'
import { examples } from '../../examples.ts'
import { UsageError } from '../../failure.ts'
import {
  addNamespaceOption,
  addWorkersOption,
  given,
  pathArgument,
  pathsArgument,
  textsArgument,
} from '../../options.ts'
import { countOf, durationOf, sizeOf } from '../../progress-line.ts'
import type { Session } from '../../session.ts'
import { type StackText, splitStack } from '../../stack-text.ts'
import { addRepositoryOptions, type RepositoryOptions, tagsArgument, withRepository } from './repository.ts'

interface CreateOptions extends RepositoryOptions {
  readonly tag?: string[]
  readonly host?: string
  readonly time?: bigint
  readonly exclude?: string[]
  readonly excludeFile?: HostPath[]
  readonly parent?: string
  readonly force?: true
  readonly workers?: number
  /** True without a directory. */
  readonly stdinTar?: string | true
  readonly form?: keyof typeof TAR_FORMS
  readonly stack?: StackText
  readonly namespace: Namespace
}

const TAR_FORMS = { 'plain-tar': 'plain', tar: 'trusted', oci: 'oci' } as const

export function defineCreate(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync snapshot create -r /backup/repo /srv/up',
        "lsync snapshot create -r rest:https://backup:8000/ --tag nightly --exclude '*.o' /home",
        'lsync snapshot create -r /backup/repo --stack /srv/up:/srv/l1:/srv/l2 /srv/merged',
        'docker export web | lsync snapshot create -r /backup/repo --stdin-tar /containers/web',
      ),
    )
    .argument('[dir...]', 'what to save; with --stack, what the snapshot calls it')
  addRepositoryOptions(command)
    .option('--tag <tags>', 'tags of the snapshot (a,b); may be repeated', tagsArgument)
    .option('--host <name>', "whose snapshot it is (default: this machine's name)")
    .option('--time <time>', 'when it was taken, such as 2024-05-01T12:00:00Z (default: now)', timeArgument)
    .option(
      '--exclude <pattern>',
      'leave out what matches (*.o, /srv/cache, a/**/b, !keep); may be repeated',
      textsArgument,
    )
    .option('--exclude-file <file>', 'a file of such patterns, one a line; may be repeated', pathsArgument)
    .option('--parent <snapshot>', 'files unchanged since this one are not read; none: read all (default: the latest)')
    .option('--force', 'read every file, whatever its times say')
    .option(
      '--stack <layers>',
      'save what these layers (UPPER:LOWER…, as `lsync verify` takes them) show together, without a mount',
      splitStack,
    )
    .option('--stdin-tar [dir]', 'save the tar archive on standard input, as if it lay in this directory (default: /)')
    .addOption(
      new Option('--form <form>', 'what that archive is: a tree, the tar of a kernel layer, or a layer of an image')
        .choices(Object.keys(TAR_FORMS))
        .default('plain-tar'),
    )
  addWorkersOption(addNamespaceOption(command)).action(async (dirs: string[], options: CreateOptions) => {
    const { tag, host, time, force, workers } = options
    if (options.stdinTar !== undefined) return createOfTar(dirs, options, session)
    if (dirs.length === 0) throw new UsageError('what to save is not said', 'name a directory, or use --stdin-tar')
    const paths = dirs.map((dir) => pathArgument(dir))
    const targets = targetsOf(paths, options)
    const save = async (repository: Repository) => {
      const parent = await parentOf(repository, options.parent, session)
      const report = await createSnapshot(repository, {
        targets,
        excludes: [...(options.exclude ?? []), ...(options.excludeFile ?? []).flatMap(patternsOf)],
        ...given({ tags: tag, hostname: host, timeNs: time, force, workers, parent }),
        signal: session.signal,
        onProgress: session.output.progress,
      })
      render(report, paths, session)
    }
    await withRepository(options, session, save, { threads: { for: 'create', width: workers } })
  })
}

function targetsOf(paths: readonly HostPath[], { stack, namespace }: CreateOptions): SnapshotTarget[] {
  if (stack === undefined) return paths.map((path) => ({ path }))
  const [path, other] = paths
  if (path === undefined || other !== undefined) {
    throw new UsageError('a stack is one tree', 'name the one directory that the snapshot is to call it')
  }
  const [upper, ...lowers] = stack.layers.map(pathArgument) as [HostPath, ...HostPath[]]
  return [{ path, stack: { upper, lowers, data: stack.data.map(pathArgument), namespace } }]
}

async function createOfTar(dirs: string[], options: CreateOptions, session: Session): Promise<void> {
  const { tag, host, time, stdinTar, form = 'plain-tar' } = options
  const others = [options.exclude, options.excludeFile, options.parent, options.force, options.stack, dirs[0]]
  if (others.some((other) => other !== undefined)) {
    throw new UsageError('--stdin-tar saves the whole archive and nothing else', 'leave out patterns and directories')
  }
  const path = pathArgument(typeof stdinTar === 'string' ? stdinTar : '/')
  await withRepository(options, session, async (repository) => {
    const report = await createSnapshotOfTar(repository, {
      archive: process.stdin,
      path,
      form: TAR_FORMS[form] satisfies TarCreateRequest['form'],
      ...given({ tags: tag, hostname: host, timeNs: time }),
      signal: session.signal,
      onProgress: session.output.progress,
    })
    render(report, [path], session)
  })
}

async function parentOf(
  repository: Repository,
  text: string | undefined,
  session: Session,
): Promise<ObjectId | 'none' | undefined> {
  if (text === undefined || text === 'none') return text
  return (await findSnapshot(repository, text, {}, session.signal)).id
}

function timeArgument(text: string): bigint {
  const ms = Date.parse(text)
  if (Number.isNaN(ms)) throw new InvalidArgumentError('Expected a time such as 2024-05-01T12:00:00Z.')
  return BigInt(ms) * 1_000_000n
}

function patternsOf(file: HostPath): string[] {
  const lines = readFileSync(Buffer.from(file, 'latin1'), 'utf8').split('\n')
  return lines.map((line) => line.trim()).filter((line) => line !== '' && !line.startsWith('#'))
}

function render(report: CreateReport, paths: readonly HostPath[], session: Session): void {
  const { snapshotId, tree, parent, counts, problems, skipped, elapsedMs } = report
  for (const { path, code, message } of problems) session.output.warning(code, message, { path: textOf(path) })
  for (const path of skipped) {
    session.output.note(`${printable(path)} is another file system: what is mounted there is not in the snapshot`)
  }
  session.output.data(
    () => ({
      type: 'created',
      id: snapshotId,
      tree,
      parent: parent ?? null,
      paths: paths.map((path) => textOf(path)),
      ...counts,
      problems: problems.length,
      skipped: skipped.map((path) => textOf(path)),
      elapsedMs,
    }),
    () => {
      const { filesNew, filesChanged, filesUnmodified, addedBytes } = counts
      const files = countOf(filesNew + filesChanged + filesUnmodified)
      const changes = `${countOf(filesNew)} new, ${countOf(filesChanged)} changed`
      return `snapshot ${snapshotId.slice(0, 8)}: ${files} files (${changes}), ${sizeOf(addedBytes)} added in ${durationOf(elapsedMs)}`
    },
  )
  if (problems.length > 0) session.foundProblems()
}
