import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { type HostPath, LsyncError, textOf } from '@lsync/posix'
import {
  type Backend,
  backendOf,
  findSnapshot,
  parseRepositoryAddress,
  parseSnapshotName,
  Repository,
  type Snapshot,
  type SnapshotFilter,
} from '@lsync/snapshot'
import { type Command, InvalidArgumentError } from 'commander'
import { UsageError } from '../../failure.ts'
import { pathArgument, pathsArgument } from '../../options.ts'
import type { Session } from '../../session.ts'

/** What says which repository, and what its password is. */
export interface RepositoryOptions {
  readonly repository?: string
  readonly passwordFile?: HostPath
  readonly passwordCommand?: string
}

/** What says which snapshots. */
export interface FilterOptions {
  readonly host?: string[]
  readonly tag?: string[][]
  readonly path?: HostPath[]
}

/** Nothing says what the password is, or what says it failed. */
export class PasswordUnknownError extends LsyncError {
  constructor(why: string) {
    super('PASSWORD_UNKNOWN', `the password of the repository is not known: ${why}`, {
      hint: 'give --password-file, --password-command or LSYNC_PASSWORD',
    })
  }
}

export function addRepositoryOptions(command: Command): Command {
  return command
    .option(
      '-r, --repository <repository>',
      'where it is: a path, rest:https://…, s3:https://host/bucket/prefix (default: $LSYNC_REPOSITORY)',
    )
    .option('--password-file <file>', 'the first line of this file is the password', pathArgument)
    .option('--password-command <command>', 'a command (for sh) that prints the password')
}

export function addFilterOptions(command: Command): Command {
  return command
    .option('--host <name>', 'only snapshots of this host; may be repeated', textsArgument)
    .option('--tag <tags>', 'only snapshots with all these tags (a,b); may be repeated', tagListsArgument)
    .option('--path <dir>', 'only snapshots of this path; may be repeated', pathsArgument)
}

/** For an option that may come more than once. */
export function textsArgument(text: string, before: string[] | undefined): string[] {
  return [...(before ?? []), text]
}

/** Tags with commas in between. */
export function tagsArgument(text: string, before: string[] | undefined): string[] {
  return [...(before ?? []), ...text.split(',').map((tag) => tag.trim())]
}

export function tagListsArgument(text: string, before: string[][] | undefined): string[][] {
  return [...(before ?? []), tagsArgument(text, undefined)]
}

/** A number, or `all`. */
export function keepArgument(text: string): number {
  if (text === 'all' || text === 'unlimited') return -1
  if (!/^\d{1,6}$/.test(text)) throw new InvalidArgumentError('Expected a whole number, or all.')
  return Number(text)
}

export function filterOf({ host, tag, path }: FilterOptions): SnapshotFilter {
  return {
    ...(host === undefined ? {} : { hosts: host }),
    ...(tag === undefined ? {} : { tags: tag }),
    ...(path === undefined ? {} : { paths: path }),
  }
}

/** The backend that the options or the environment name. */
export function backendFor(text: string | undefined): Backend {
  const address = text ?? process.env['LSYNC_REPOSITORY']
  if (address === undefined || address === '') {
    throw new UsageError('no repository is named', 'name one with -r or LSYNC_REPOSITORY')
  }
  const parsed = parseRepositoryAddress(address)
  return backendOf(parsed.kind === 'local' ? { ...parsed, path: pathArgument(textOf(parsed.path)) } : parsed)
}

/** The password that the options or the environment give. @throws {PasswordUnknownError} */
export function passwordOf({ passwordFile, passwordCommand }: RepositoryOptions, variable = 'LSYNC_PASSWORD'): string {
  const password =
    passwordFile !== undefined
      ? readFileSync(Buffer.from(passwordFile, 'latin1'), 'utf8')
      : passwordCommand !== undefined
        ? outputOf(passwordCommand)
        : process.env[variable]
  const line = password?.split('\n', 1)[0]?.replace(/\r$/, '')
  if (line === undefined || line === '')
    throw new PasswordUnknownError(password === undefined ? 'nothing says it' : 'it is empty')
  return line
}

function outputOf(command: string): string {
  const { status, stdout, error } = spawnSync('sh', ['-c', command], {
    encoding: 'utf8',
    stdio: ['ignore', 'pipe', 'inherit'],
  })
  if (error !== undefined || status !== 0) throw new PasswordUnknownError('the command that prints it failed')
  return stdout
}

/** Opens the repository of the options for as long as `use` runs. */
export async function withRepository<T>(
  options: RepositoryOptions,
  session: Session,
  use: (repository: Repository) => Promise<T>,
): Promise<T> {
  const backend = backendFor(options.repository)
  try {
    const repository = await Repository.open(backend, { password: passwordOf(options), signal: session.signal })
    try {
      return await use(repository)
    } finally {
      repository.close()
    }
  } finally {
    await backend.close()
  }
}

/** What a user calls a snapshot, and what in it. The index is loaded. */
export async function snapshotOf(
  repository: Repository,
  text: string,
  options: FilterOptions,
  session: Session,
): Promise<{ readonly snapshot: Snapshot; readonly path: HostPath | undefined }> {
  const { snapshot, path } = parseSnapshotName(text)
  const found = await findSnapshot(repository, snapshot, filterOf(options), session.signal)
  await repository.loadIndex(session.signal)
  return { snapshot: found, path: path as HostPath | undefined }
}
