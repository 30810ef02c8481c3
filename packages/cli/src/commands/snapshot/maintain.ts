import { type HostPath, printable, textOf } from '@lsync/posix'
import {
  type CheckProblem,
  type CheckRequest,
  checkRepository,
  copySnapshots,
  findSnapshot,
  forgetSnapshots,
  type GroupKey,
  listSnapshots,
  pruneRepository,
  type ReadSubset,
  Repository,
  removeLocks,
  repairIndex,
  repairPacks,
  repairSnapshots,
  type Snapshot,
  tagSnapshots,
} from '@lsync/snapshot'
import { type Command, InvalidArgumentError, Option } from 'commander'
import { examples } from '../../examples.ts'
import { UsageError } from '../../failure.ts'
import { addDryRunOption, addWorkersOption, addYesOption, given, pathArgument } from '../../options.ts'
import { countOf, durationOf, sizeOf } from '../../progress-line.ts'
import type { Session } from '../../session.ts'
import { fieldsOf, lineOf } from './inspect.ts'
import { addKeepOptions, type KeepOptions, rulesOf } from './keep.ts'
import {
  addFilterOptions,
  addRepositoryOptions,
  backendFor,
  type FilterOptions,
  filterOf,
  passwordOf,
  type RepositoryOptions,
  tagsArgument,
  withRepository,
} from './repository.ts'

export function defineInit(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync snapshot init -r /backup/repo --password-file /etc/lsync.password',
      'lsync snapshot init -r s3:https://s3.example.org/bucket/prefix --password-command "pass repo"',
    ),
  )
  addRepositoryOptions(command)
    .addOption(new Option('--format <version>', 'format version of the repository').choices(['1', '2']).default('2'))
    .action(async (options: RepositoryOptions & { format: '1' | '2' }) => {
      const backend = backendFor(options.repository, options, session)
      try {
        const version = options.format === '1' ? 1 : 2
        const repository = await Repository.init(backend, {
          password: passwordOf(options),
          version,
          signal: session.signal,
        })
        const { id } = repository.config
        repository.close()
        session.output.data(
          () => ({ type: 'initialized', id, version, location: backend.location }),
          () => `made repository ${id.slice(0, 8)} in ${backend.location}`,
        )
        session.output.note('without its password nobody can read it, and nothing can bring the password back')
      } finally {
        await backend.close()
      }
    })
}

/** What lies in the repository is looked at itself, whatever this machine knows of it. */
const JUDGED = { isJudged: true }

interface TagOptions extends RepositoryOptions, FilterOptions {
  readonly set?: string[]
  readonly add?: string[]
  readonly remove?: string[]
}

export function defineTag(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync snapshot tag -r /backup/repo --add keep latest',
        'lsync snapshot tag -r /backup/repo --remove keep --tag keep',
      ),
    )
    .argument('[snapshot...]', 'ids, or latest; by default all that the options leave')
  addFilterOptions(addRepositoryOptions(command))
    .addOption(
      new Option('--set <tags>', 'these tags instead of those there are')
        .argParser(tagsArgument)
        .conflicts(['add', 'remove']),
    )
    .option('--add <tags>', 'add tags (a,b)', tagsArgument)
    .option('--remove <tags>', 'take tags away', tagsArgument)
    .action(async (names: string[], options: TagOptions) => {
      const { set, add, remove } = options
      if (set === undefined && add === undefined && remove === undefined) {
        throw new UsageError('no tags are named', 'give --add, --remove or --set')
      }
      await withRepository(options, session, async (repository) => {
        const ids = (await chosen(repository, names, options, session)).map(({ id }) => id)
        const clean = set?.filter((tag) => tag !== '')
        const changed = await tagSnapshots(repository, {
          ids,
          ...given({ set: clean, add, remove }),
          signal: session.signal,
        })
        for (const { from, to, tags } of changed) {
          session.output.data(
            () => ({ type: 'tagged', from, to, tags }),
            () => `${from.slice(0, 8)} is ${to.slice(0, 8)} now, with ${tags.join(', ') || 'no tags'}`,
          )
        }
        if (changed.length === 0) session.output.note('nothing to change')
      })
    })
}

async function chosen(
  repository: Repository,
  names: readonly string[],
  options: FilterOptions,
  session: Session,
): Promise<Snapshot[]> {
  if (names.length === 0) return listSnapshots(repository, filterOf(options), session.signal)
  return Promise.all(names.map((name) => findSnapshot(repository, name, filterOf(options), session.signal)))
}

interface ForgetOptions extends RepositoryOptions, FilterOptions {
  readonly groupBy: GroupKey[]
  readonly prune?: true
  readonly dryRun?: true
  readonly yes?: true
}

export function defineForget(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync snapshot forget -r /backup/repo --keep-daily 7 --keep-weekly 5 --dry-run',
        'lsync snapshot forget -r /backup/repo --keep-last 10 --prune --yes',
      ),
    )
    .argument('[snapshot...]', 'instead of rules: these go')
  addKeepOptions(addFilterOptions(addRepositoryOptions(command)))
    .option('--group-by <keys>', 'apply the rules to each of these: host, paths, tags, or nothing', groupArgument, [
      'host',
      'paths',
    ])
    .option('--prune', 'then remove what no snapshot needs any more')
  addYesOption(addDryRunOption(command)).action(async (names: string[], options: ForgetOptions & KeepOptions) => {
    await session.confirm('this removes snapshots', options)
    const { groupBy, dryRun } = options
    await withRepository(options, session, async (repository) => {
      const { signal } = session
      const ids =
        names.length === 0 ? undefined : (await chosen(repository, names, options, session)).map(({ id }) => id)
      const before = new Map((await listSnapshots(repository, {}, signal)).map((snapshot) => [snapshot.id, snapshot]))
      const keep = rulesOf(options)
      const report = await forgetSnapshots(repository, {
        ...filterOf(options),
        keep,
        groupBy,
        ...given({ ids, dryRun }),
        signal,
      })
      for (const { verdicts } of report.groups) {
        for (const { snapshot, reasons } of verdicts) {
          if (reasons.length > 0) {
            session.output.data(
              () => ({ type: 'kept', ...fieldsOf(snapshot), reasons }),
              () => `keep    ${lineOf(snapshot)}  (${reasons.join(', ')})`,
            )
          }
        }
      }
      for (const id of report.removed) {
        const snapshot = before.get(id)
        if (snapshot === undefined) continue
        session.output.data(
          () => ({ type: 'removed', ...fieldsOf(snapshot) }),
          () => `remove  ${lineOf(snapshot)}`,
        )
      }
      if (options.prune === true && dryRun !== true) await prune(repository, {}, session)
      else if (report.removed.length > 0 && dryRun !== true) session.output.note('next: lsync snapshot prune')
    })
  })
}

function groupArgument(text: string): GroupKey[] {
  const keys = text.split(',').filter((key) => key !== '')
  for (const key of keys) {
    if (key !== 'host' && key !== 'paths' && key !== 'tags') {
      throw new InvalidArgumentError('Expected host, paths, tags with commas in between.')
    }
  }
  return keys as GroupKey[]
}

interface PruneOptions {
  readonly maxUnused?: number
  readonly maxRewrite?: number
  readonly budget?: number
  readonly dryRun?: true
}

export function definePrune(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples('lsync snapshot prune -r /backup/repo --dry-run', 'lsync snapshot prune -r /backup/repo --budget 600'),
  )
  addRepositoryOptions(command)
    .option('--max-unused <percent>', 'how much may stay unused (default: 5)', shareArgument)
    .option('--max-rewrite <size>', 'rewrite at most so much (500M, 20G); the rest is for the next time', sizeArgument)
    .option('--budget <seconds>', 'begin no more rewriting after so long', sizeArgument)
  addDryRunOption(command).action(async (options: RepositoryOptions & PruneOptions) => {
    await withRepository(options, session, (repository) => prune(repository, options, session))
  })
}

function shareArgument(text: string): number {
  const found = /^(\d{1,3}(?:\.\d+)?)%?$/.exec(text)
  if (found === null) throw new InvalidArgumentError('Expected a percentage.')
  return Number(found[1]) / 100
}

function sizeArgument(text: string): number {
  const found = /^(\d{1,12})([kMGT]?)$/.exec(text)
  if (found === null) throw new InvalidArgumentError('Expected a number, with k, M, G or T after it for a size.')
  return Number(found[1]) * 1000 ** ' kMGT'.indexOf(found[2] || ' ')
}

async function prune(repository: Repository, options: PruneOptions, session: Session): Promise<void> {
  const { maxUnused, maxRewrite, budget, dryRun } = options
  const budgetMs = budget === undefined ? undefined : budget * 1000
  const report = await pruneRepository(repository, {
    ...given({ maxUnused, maxRewriteBytes: maxRewrite, budgetMs, dryRun }),
    signal: session.signal,
    onProgress: session.output.progress,
  })
  const { packs, freedBytes, unusedBytes, totalBytes, elapsedMs } = report
  session.output.data(
    () => ({ type: 'pruned', ...report, dryRun: dryRun === true }),
    () => {
      const verb = dryRun === true ? 'would free' : 'freed'
      const work = `${countOf(packs.removed)} packs removed, ${countOf(packs.rewritten)} rewritten`
      return `${verb} ${sizeOf(freedBytes)} of ${sizeOf(totalBytes)} in ${durationOf(elapsedMs)}: ${work}, ${sizeOf(unusedBytes)} unused left`
    },
  )
}

interface CheckOptions extends RepositoryOptions {
  readonly readData?: true
  readonly readDataSubset?: ReadSubset
  /** False with --no-lock. */
  readonly lock: boolean
  readonly workers?: number
}

export function defineCheck(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples('lsync snapshot check -r /backup/repo', 'lsync snapshot check -r /backup/repo --read-data-subset 1/7'),
  )
  addRepositoryOptions(command)
    .option('--no-lock', 'take no lock: for a repository that cannot be written to')
    .option('--read-data', 'read every pack to the last byte')
    .option(
      '--read-data-subset <part>',
      'read a part of them: 2/7 is the second of seven, 10% are chosen at random',
      subsetArgument,
    )
  addWorkersOption(command).action(async (options: CheckOptions) => {
    await withRepository(
      options,
      session,
      async (repository) => {
        const readData: CheckRequest['readData'] = options.readDataSubset ?? options.readData
        const report = await checkRepository(repository, {
          ...given({ readData, workers: options.workers }),
          noLock: !options.lock,
          signal: session.signal,
          onProgress: session.output.progress,
        })
        for (const problem of report.problems) renderProblem(problem, session)
        const { snapshots, trees, packs, packsRead, bytesRead, elapsedMs } = report
        const errors = report.problems.filter(({ severity }) => severity === 'error').length
        session.output.data(
          () => ({ type: 'checked', errors, snapshots, trees, packs, packsRead, bytesRead, elapsedMs }),
          () => {
            const seen = `${countOf(snapshots)} snapshots, ${countOf(packs)} packs, ${sizeOf(bytesRead)} read in ${durationOf(elapsedMs)}`
            return errors === 0 ? `the repository is whole: ${seen}` : `${countOf(errors)} errors: ${seen}`
          },
        )
        if (errors > 0) session.foundProblems()
      },
      JUDGED,
    )
  })
}

function subsetArgument(text: string): ReadSubset {
  const [, part, of] = /^(\d{1,6})\/(\d{1,6})$/.exec(text) ?? []
  if (part !== undefined && of !== undefined && Number(part) >= 1 && Number(part) <= Number(of)) {
    return { part: Number(part), of: Number(of) }
  }
  const [, percent] = /^(\d{1,3}(?:\.\d+)?)%$/.exec(text) ?? []
  if (percent !== undefined && Number(percent) <= 100) return { share: Number(percent) / 100 }
  throw new InvalidArgumentError('Expected a part such as 2/7, or a share such as 10%.')
}

function renderProblem({ severity, code, id, path, message }: CheckProblem, session: Session): void {
  session.output.data(
    () => ({ type: 'problem', severity, code, id, path: path === undefined ? null : textOf(path), message }),
    () => `${session.output.styled(severity === 'error' ? 'red' : 'dim', severity)}: ${message} (${code})`,
  )
}

export function defineRepair(command: Command, session: Session): void {
  const snapshots = command.command('snapshots').description('make snapshots without what is lost, as restic does')
  defineRepairSnapshots(snapshots, session)
  command.addHelpText(
    'before',
    examples('lsync snapshot repair index -r /backup/repo', 'lsync snapshot repair packs -r /backup/repo 1a2b…'),
  )
  const index = command.command('index').description('make the index again from the packs')
  index.addHelpText(
    'before',
    examples('lsync snapshot repair index -r /backup/repo', 'lsync snapshot repair index -r REPO --json'),
  )
  addRepositoryOptions(index).action(async (options: RepositoryOptions) => {
    await withRepository(
      options,
      session,
      async (repository) => {
        const report = await repairIndex(repository, { signal: session.signal, onProgress: session.output.progress })
        for (const { id, message } of report.unreadable) session.output.warning('PACK_DAMAGED', message, { id })
        session.output.data(
          () => ({ type: 'indexed', ...report }),
          () => `the index names ${countOf(report.packs)} packs; the headers of ${countOf(report.packsRead)} were read`,
        )
        if (report.unreadable.length > 0) session.foundProblems()
      },
      JUDGED,
    )
  })
  const packs = command.command('packs').description('save what is whole in damaged packs, and remove them')
  packs
    .addHelpText(
      'before',
      examples('lsync snapshot repair packs -r /backup/repo 1a2b…', 'lsync snapshot check -r REPO --read-data'),
    )
    .argument('<pack...>', 'full ids, as check names them')
  addYesOption(addRepositoryOptions(packs)).action(
    async (ids: string[], options: RepositoryOptions & { yes?: true }) => {
      for (const id of ids)
        if (!/^[0-9a-f]{64}$/.test(id)) throw new UsageError(`${id} is no full id`, 'see lsync snapshot check --json')
      await session.confirm(
        'this removes the packs after saving what is whole in them',
        options,
        'look first with check --read-data',
      )
      await withRepository(
        options,
        session,
        async (repository) => {
          const report = await repairPacks(repository, ids, {
            signal: session.signal,
            onProgress: session.output.progress,
          })
          session.output.data(
            () => ({ type: 'repaired', ...report }),
            () =>
              `saved ${countOf(report.saved)} objects of ${countOf(report.removed.length)} packs, ${countOf(report.lost.length)} are lost`,
          )
          if (report.lost.length > 0) session.foundProblems()
        },
        JUDGED,
      )
    },
  )
}

function defineRepairSnapshots(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync snapshot repair snapshots -r /backup/repo --dry-run',
        'lsync snapshot repair snapshots -r /backup/repo --forget --yes 1a2b3c4d',
      ),
    )
    .argument('[snapshot...]', 'ids, or latest; by default all that the options leave')
  addFilterOptions(addRepositoryOptions(command)).option('--forget', 'remove the snapshots that lacked something')
  addYesOption(addDryRunOption(command)).action(
    async (
      names: string[],
      options: RepositoryOptions & FilterOptions & { forget?: true; yes?: true; dryRun?: true },
    ) => {
      if (options.forget === true) await session.confirm('this removes snapshots that lack something', options)
      const { forget, dryRun } = options
      await withRepository(
        options,
        session,
        async (repository) => {
          const snapshots = await chosen(repository, names, options, session)
          const repaired = await repairSnapshots(repository, {
            snapshots,
            ...given({ forget, dryRun }),
            signal: session.signal,
            onProgress: session.output.progress,
          })
          for (const { from, to, losses } of repaired) {
            for (const { path, lost } of losses) {
              session.output.data(
                () => ({ type: 'lost', snapshot: from, path: textOf(path), lost }),
                () => `${from.slice(0, 8)}: ${LOST[lost]} ${printable(path)}`,
              )
            }
            session.output.data(
              () => ({ type: 'repaired', from, to: to ?? null, losses: losses.length, dryRun: dryRun === true }),
              () => {
                if (dryRun === true) return `would repair ${from.slice(0, 8)}`
                return to === undefined
                  ? `nothing is left of ${from.slice(0, 8)}`
                  : `${from.slice(0, 8)} is ${to.slice(0, 8)} now, without what is lost`
              },
            )
          }
          if (repaired.length === 0) session.output.note('no snapshot lacks anything that the index knows to be lost')
          else session.foundProblems()
        },
        JUDGED,
      )
    },
  )
}

const LOST = {
  content: 'pieces are lost of',
  directory: 'all is lost in',
  size: 'the size was wrong of',
} as const

interface CopyOptions extends RepositoryOptions, FilterOptions {
  readonly to: string
  readonly toPasswordFile?: HostPath
  readonly toPasswordCommand?: string
}

export function defineCopy(command: Command, session: Session): void {
  command
    .addHelpText(
      'before',
      examples(
        'lsync snapshot copy -r /backup/repo --to /mnt/second --to-password-file /etc/second latest',
        'lsync snapshot copy -r /backup/repo --to rest:https://backup/ --host web1',
      ),
    )
    .argument('[snapshot...]', 'ids, or latest; by default all that the options leave')
  addFilterOptions(addRepositoryOptions(command))
    .requiredOption('--to <repository>', 'where to copy them')
    .option(
      '--to-password-file <file>',
      'its password (default: $LSYNC_TO_PASSWORD, or that of the other)',
      pathArgument,
    )
    .option('--to-password-command <command>', 'a command that prints it')
    .action(async (names: string[], options: CopyOptions) => {
      await withRepository(options, session, async (from) => {
        const backend = backendFor(options.to, options, session)
        try {
          const to = await Repository.open(backend, { password: targetPassword(options), signal: session.signal })
          const snapshots = await chosen(from, names, options, session)
          const report = await copySnapshots(from, to, {
            snapshots,
            signal: session.signal,
            onProgress: session.output.progress,
          })
          to.close()
          for (const { from: id, to: copy } of report.copied) {
            session.output.data(
              () => ({ type: 'copied', from: id, to: copy }),
              () => `${id.slice(0, 8)} is ${copy.slice(0, 8)} there`,
            )
          }
          const { copied, present, objects, addedBytes } = report
          session.output.data(
            () => ({ type: 'copy', copied: copied.length, present: present.length, objects, addedBytes }),
            () =>
              `copied ${countOf(copied.length)} snapshots (${countOf(present.length)} were there), ${sizeOf(addedBytes)} added`,
          )
        } finally {
          await backend.close()
        }
      })
    })
}

function targetPassword(options: CopyOptions): string {
  const { toPasswordFile, toPasswordCommand } = options
  const own = given({ passwordFile: toPasswordFile, passwordCommand: toPasswordCommand })
  const isOwn = Object.keys(own).length > 0 || process.env['LSYNC_TO_PASSWORD'] !== undefined
  return isOwn ? passwordOf(own, 'LSYNC_TO_PASSWORD') : passwordOf(options)
}

export function defineUnlock(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples('lsync snapshot unlock -r /backup/repo', 'lsync snapshot unlock -r /backup/repo --all'),
  )
  addRepositoryOptions(command)
    .option('--all', 'also locks that somebody may still hold: only if you know that nobody does')
    .action(async (options: RepositoryOptions & { all?: true }) => {
      await withRepository(options, session, async (repository) => {
        const removed = await removeLocks(repository, { all: options.all === true })
        session.output.data(
          () => ({ type: 'unlocked', removed }),
          () => `removed ${countOf(removed)} locks`,
        )
      })
    })
}

interface NewKeyOptions extends RepositoryOptions {
  readonly newPasswordFile?: HostPath
  readonly newPasswordCommand?: string
}

export function defineKey(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples('lsync snapshot key list -r /backup/repo', 'lsync snapshot key add -r /backup/repo --new-password-file F'),
  )
  const list = command
    .command('list')
    .description('show the keys: each opens the repository with a password of its own')
  list.addHelpText(
    'before',
    examples('lsync snapshot key list -r /backup/repo', 'lsync snapshot key list -r REPO --json'),
  )
  addRepositoryOptions(list).action(async (options: RepositoryOptions) => {
    await withRepository(options, session, async (repository) => {
      for (const key of await repository.listKeys(session.signal)) {
        session.output.data(
          () => ({ type: 'key', ...key }),
          () =>
            `${key.isCurrent ? '*' : ' '} ${key.id.slice(0, 8)}  ${key.created.slice(0, 19)}  ${key.username}@${key.hostname}`,
        )
      }
    })
  })
  const add = command.command('add').description('add a password')
  add.addHelpText(
    'before',
    examples(
      'lsync snapshot key add -r /backup/repo --new-password-file F',
      'LSYNC_NEW_PASSWORD=… lsync snapshot key add -r REPO',
    ),
  )
  addRepositoryOptions(add)
    .option('--new-password-file <file>', 'the password to add (default: $LSYNC_NEW_PASSWORD)', pathArgument)
    .option('--new-password-command <command>', 'a command that prints it')
    .action(async (options: NewKeyOptions) => {
      const { newPasswordFile, newPasswordCommand } = options
      const password = passwordOf(
        given({ passwordFile: newPasswordFile, passwordCommand: newPasswordCommand }),
        'LSYNC_NEW_PASSWORD',
      )
      await withRepository(options, session, async (repository) => {
        const id = await repository.addKey(password, session.signal)
        session.output.data(
          () => ({ type: 'keyAdded', id }),
          () => `added key ${id.slice(0, 8)}`,
        )
      })
    })
  const remove = command.command('remove').description('remove a password')
  remove
    .addHelpText(
      'before',
      examples('lsync snapshot key remove -r /backup/repo 1a2b3c4d', 'lsync snapshot key list -r REPO'),
    )
    .argument('<key>', 'its id, or the start of it')
  addYesOption(addRepositoryOptions(remove)).action(
    async (start: string, options: RepositoryOptions & { yes?: true }) => {
      await session.confirm('this takes a password away', options, 'look first with key list')
      await withRepository(options, session, async (repository) => {
        const found = (await repository.listIds('key', session.signal)).filter((id) => id.startsWith(start))
        const [id] = found
        if (id === undefined || found.length > 1) {
          throw new UsageError(`${start} begins the ids of ${found.length} keys`, 'see lsync snapshot key list')
        }
        await repository.removeKey(id, session.signal)
        session.output.data(
          () => ({ type: 'keyRemoved', id }),
          () => `removed key ${id.slice(0, 8)}`,
        )
      })
    },
  )
}
