import { spawnSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { type HostPath, LsyncError, textOf } from '@lsync/posix'
import {
  type Backend,
  type BackendOptions,
  defaultCacheDirectory,
  findSnapshot,
  localPathIn,
  type OpenOptions,
  openBackend,
  parseSnapshotName,
  Repository,
  type Snapshot,
  type SnapshotFilter,
} from '@lsync/snapshot'
import { type Command, InvalidArgumentError } from 'commander'
import { UsageError } from '../../failure.ts'
import { given, pathArgument, pathsArgument, textsArgument } from '../../options.ts'
import type { Session } from '../../session.ts'

/** What says which repository, and what its password is. */
export interface RepositoryOptions {
  readonly repository?: string
  readonly passwordFile?: HostPath
  readonly passwordCommand?: string
  readonly option?: string[]
  readonly cacheDir?: HostPath
  /** False with --no-cache. */
  readonly cache?: boolean
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
  return addAccessOptions(
    command.option(
      '-r, --repository <repository>',
      'where it is: a path, sftp:…, rest:https://…, s3:https://host/bucket/prefix (default: $LSYNC_REPOSITORY)',
    ),
  )
}

/** What it takes to open a repository that is named otherwise. */
export function addAccessOptions(command: Command): Command {
  return command
    .option('--password-file <file>', 'the first line of this file is the password', pathArgument)
    .option('--password-command <command>', 'a command (for sh) that prints the password')
    .option(
      '-o, --option <name=value>',
      `of the storage: ${STORAGE_OPTIONS.join(', ')}; may be repeated`,
      textsArgument,
    )
    .option(
      '--cache-dir <dir>',
      'what is read of remote repositories is kept there (default: ~/.cache/lsync)',
      pathArgument,
    )
    .option('--no-cache', 'keep nothing of remote repositories on this machine')
}

export function addFilterOptions(command: Command): Command {
  return command
    .option('--host <name>', 'only snapshots of this host; may be repeated', textsArgument)
    .option('--tag <tags>', 'only snapshots with all these tags (a,b); may be repeated', tagListsArgument)
    .option('--path <dir>', 'only snapshots of this path; may be repeated', pathsArgument)
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

/** The backend that the options or the environment name. Its attempts that fail are told while it goes on. */
export function backendFor(text: string | undefined, options: RepositoryOptions, session: Session): Backend {
  const address = text ?? process.env['LSYNC_REPOSITORY']
  if (address === undefined || address === '') {
    throw new UsageError('no repository is named', 'name one with -r or LSYNC_REPOSITORY')
  }
  const local = localPathIn(address)
  return openBackend(local === undefined ? address : `local:${textOf(pathArgument(local))}`, {
    ...storageOptionsOf(options.option ?? []),
    onRetry: ({ what, location, error, delayMs }) => {
      const reason = error instanceof Error ? error.message : String(error)
      const seconds = Math.round(delayMs / 100) / 10
      session.output.warning('BACKEND_RETRY', `${what} failed at ${location}: ${reason}; again in ${seconds} s`)
    },
  })
}

const STORAGE_OPTIONS = [
  ...['connections', 'tls.ca', 'rest.username', 's3.region', 's3.style', 'ssh.identity', 'ssh.known-hosts', 'ssh.rsh'],
] as const
type StorageOption = (typeof STORAGE_OPTIONS)[number]

/** `name=value` of each, with what belongs into no command line from the environment. */
function storageOptionsOf(texts: readonly string[]): BackendOptions {
  const values = new Map<StorageOption, string>()
  for (const text of texts) {
    const at = text.indexOf('=')
    const name = STORAGE_OPTIONS.find((known) => known === text.slice(0, at))
    if (name === undefined) throw new UsageError(`${text} is no option`, `known are ${STORAGE_OPTIONS.join(', ')}`)
    values.set(name, text.slice(at + 1))
  }
  const connections = values.get('connections')
  if (connections !== undefined && !/^[1-9]\d{0,2}$/.test(connections)) {
    throw new UsageError(`${connections} is no number of connections`, 'give one from 1 to 999')
  }
  const style = values.get('s3.style')
  if (style !== undefined && style !== 'auto' && style !== 'path' && style !== 'virtual') {
    throw new UsageError(`${style} is no style of S3`, 'known are auto, path and virtual')
  }
  const ca = values.get('tls.ca')
  const identity = values.get('ssh.identity')
  const knownHosts = values.get('ssh.known-hosts')
  return given({
    concurrency: connections === undefined ? undefined : Number(connections),
    ca: ca === undefined ? undefined : readFileSync(ca, 'utf8'),
    rsh: values.get('ssh.rsh'),
    ssh: given({
      identities: identity === undefined ? undefined : [identity],
      knownHosts: knownHosts === undefined ? undefined : [knownHosts],
    }),
    s3: given({ region: values.get('s3.region'), style }),
    rest: given({
      username: values.get('rest.username') ?? process.env['LSYNC_REST_USERNAME'],
      password: process.env['LSYNC_REST_PASSWORD'],
    }),
  })
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

/** Where what is read of remote repositories is kept; `undefined`: nowhere. */
export function cacheDirectoryOf({ cache, cacheDir }: RepositoryOptions): string | undefined {
  if (cache === false) return undefined
  return cacheDir === undefined ? defaultCacheDirectory() : textOf(cacheDir)
}

/**
 * Opens the repository of the options for as long as `use` runs. `isJudged`: what lies there is what counts, and not what
 * was read of it before. `threads`: as `Repository.open` has them.
 */
export async function withRepository<T>(
  options: RepositoryOptions,
  session: Session,
  use: (repository: Repository) => Promise<T>,
  { isJudged = false, threads }: { readonly isJudged?: boolean; readonly threads?: OpenOptions['threads'] } = {},
): Promise<T> {
  const { repository, close } = await connectRepository(options.repository, options, session, () => ({
    password: passwordOf(options),
    cacheDirectory: isJudged ? undefined : cacheDirectoryOf(options),
    threads,
    signal: session.signal,
  }))
  try {
    return await use(repository)
  } finally {
    await close()
  }
}

/** Opens a repository until it is closed. `how` is asked once the address is known to name one. */
export async function connectRepository(
  address: string | undefined,
  options: RepositoryOptions,
  session: Session,
  how: () => OpenOptions,
): Promise<{ readonly repository: Repository; close(): Promise<void> }> {
  const backend = backendFor(address, options, session)
  try {
    const repository = await Repository.open(backend, how())
    return {
      repository,
      close: async () => {
        repository.close()
        await backend.close()
      },
    }
  } catch (error) {
    await backend.close()
    throw error
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
