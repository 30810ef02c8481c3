import type { RepositoryTarget } from '@lsync/container-root'
import type { Namespace } from '@lsync/overlay-merge'
import { type HostPath, textOf } from '@lsync/posix'
import { SshConnections } from '@lsync/ssh'
import {
  askSync,
  ControlSocket,
  type ControlVerb,
  defaultStateDir,
  LocalTarget,
  openSync,
  parseTarget,
  previewSync,
  remoteTarget,
  type Sync,
  type SyncStatus,
  type Target,
  type TargetStatus,
} from '@lsync/sync'
import { type Command, Option } from 'commander'
import { examples } from '../examples.ts'
import { EXIT, UsageError } from '../failure.ts'
import {
  addDryRunOption,
  addNamespaceOption,
  countArgument,
  given,
  pathArgument,
  sizeArgument,
  textsArgument,
  timeArgument,
} from '../options.ts'
import { countOf, durationOf, sizeOf } from '../progress-line.ts'
import type { Session } from '../session.ts'
import { addKeepOptions, type KeepOptions, rulesOf } from './snapshot/keep.ts'
import {
  addAccessOptions,
  backendFor,
  cacheDirectoryOf,
  connectRepository,
  passwordOf,
  type RepositoryOptions,
} from './snapshot/repository.ts'

interface SyncOptions extends Omit<RepositoryOptions, 'repository'>, KeepOptions {
  readonly once?: true
  readonly tick?: number
  readonly maxLag?: number
  readonly include?: string[]
  readonly exclude?: string[]
  readonly bwlimit?: number
  readonly iops?: number
  readonly dryRun?: true
  readonly state?: HostPath
  readonly source: 'auto' | 'fanotify' | 'chokidar' | 'poll'
  readonly namespace: Namespace
  readonly adopt?: true
  readonly sweep?: true
  readonly rsh?: string
  readonly remoteLsync?: string
  readonly identity?: string[]
  readonly sftpForm: 'tree' | 'portable'
}

const TICK_MS = 1000
const REPOSITORY_TICK_MS = 60_000
const REPOSITORY_CHECKPOINT_MS = 10 * 60_000
const THIN_MS = 10 * 60_000
const VERBS: readonly ControlVerb[] = ['flush', 'pause', 'resume', 'status']

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync sync /srv/c1/upper /store/c1',
      'lsync sync /srv/c1/upper ssh://backup@store:22/c1 repo:/backup/repo --exclude .cache/',
    ),
  )
  addKeepOptions(
    addAccessOptions(
      addNamespaceOption(
        addDryRunOption(
          command
            .argument('<upper>', 'the upper to follow; or flush, pause, resume, status, for one that is followed')
            .argument('<targets...>', '/path, ssh://user@host:port/path, sftp://… or repo:REPOSITORY; or that upper')
            .option('--once', 'carry over what there is, then end')
            .option('--tick <time>', 'how long after a change it is durable: 1s, 200ms', timeArgument, 1000)
            .option('--max-lag <time>', 'how long it may take at most, before it is said; default 5s', timeArgument)
            .option('--include <pattern>', 'an exception from what is excluded; may be repeated', textsArgument)
            .option('--exclude <pattern>', 'leave out: NAME, dir/, path/*, **; may be repeated', textsArgument)
            .option('--bwlimit <rate>', 'at most so many bytes a second: 50M', sizeArgument)
            .option('--iops <count>', 'at most so many files a second, over a network so many batches', countArgument)
            .option('--state <dir>', 'keep index and journal there', pathArgument)
            .addOption(
              new Option('--source <kind>', 'how changes are seen')
                .choices(['auto', 'fanotify', 'chokidar', 'poll'])
                .default('auto'),
            )
            .option('--adopt', 'take a target that is not empty; what the upper lacks goes')
            .option('--sweep', 'with flush: compare the whole upper as well')
            .option('--rsh <command>', 'reach other machines through this instead: "ssh -J jump"')
            .option('--remote-lsync <path>', 'lsync on the other machine')
            .option('--identity <file>', 'a private key to log in with; may be repeated', textsArgument)
            .addOption(
              new Option(
                '--sftp-form <form>',
                'what is kept where there is only SFTP: a tree, or a layer without losses',
              )
                .choices(['tree', 'portable'])
                .default('tree'),
            ),
        ),
      ),
    ),
  ).action(async (upper: string, targets: string[], options: SyncOptions) => {
    const verb = VERBS.find((name) => name === upper)
    if (verb !== undefined) await control(verb, targets, options, session)
    else await follow(pathArgument(upper), targets, options, session)
  })
}

async function control(verb: ControlVerb, rest: readonly string[], options: SyncOptions, session: Session) {
  const [upper, more] = rest
  if (upper === undefined || more !== undefined) {
    throw new UsageError(`${verb} needs one upper`, `lsync sync ${verb} UPPER; a directory of that name is ./${verb}`)
  }
  const { signal } = session
  const stateDir = options.state === undefined ? undefined : textOf(options.state)
  const asked = given({ signal, stateDir, sweep: options.sweep })
  if (verb === 'flush') {
    const report = await askSync(pathArgument(upper), verb, asked)
    session.output.data(
      () => ({ type: 'flush', ...report }),
      () => (report.isSettled ? 'Everything is safe.' : 'Everything is safe that was not being written.'),
    )
    if (report.failures.length > 0) session.foundProblems()
    return
  }
  const status = await askSync(pathArgument(upper), verb, asked)
  session.output.data(
    () => ({ type: 'status', ...status }),
    () => statusText(status),
  )
}

async function follow(source: HostPath, targets: readonly string[], options: SyncOptions, session: Session) {
  const connections = new SshConnections(given({ identities: options.identity }))
  const repositories: RepositoryTarget[] = []
  for (const text of targets.filter(isRepository)) {
    repositories.push(await repositoryTarget(text, source, options, session))
  }
  const others = targets.filter((text) => !isRepository(text))
  const opened = [...others.map((text) => targetOf(text, options, connections)), ...repositories]
  const { output } = session
  const { include, exclude, bwlimit, iops, namespace, once, adopt, maxLag } = options
  const tick = options.tick ?? (others.length === 0 ? REPOSITORY_TICK_MS : TICK_MS)
  const stateDir = options.state === undefined ? defaultStateDir(source) : textOf(options.state)
  const request = {
    source,
    targets: opened,
    stateDir,
    namespace,
    tickMs: tick,
    sourceChoice: options.source,
    // Each checkpoint is a snapshot there: of a first pass they hold a part only.
    ...(repositories.length > 0 ? { checkpointMs: REPOSITORY_CHECKPOINT_MS } : {}),
    ...given({ include, exclude, once, adopt, maxLagMs: maxLag, bytesPerSecond: bwlimit, operationsPerSecond: iops }),
  }
  if (options.dryRun === true) {
    for (const target of opened) {
      for (const { path, change } of await previewSync(request, target)) {
        output.data(
          () => ({ type: 'change', target: target.description, path: textOf(path), change }),
          () => `${change.padEnd(8)} ${textOf(path) || '(everything)'}`,
        )
      }
    }
    return
  }
  const sync = await openSync(request)
  const socket = await ControlSocket.listen(sync, stateDir).catch(async (error: unknown) => {
    await sync.stop()
    throw error
  })
  report(sync, session)
  const thinning = setInterval(() => void thin(sync, repositories, session), THIN_MS)
  try {
    if (once === true) {
      const stopped = new Promise<never>((_, reject) => {
        session.signal.addEventListener('abort', () => reject(session.signal.reason), { once: true })
      })
      await Promise.race([sync.flush(), stopped])
    } else await untilStopped(session.signal)
  } finally {
    clearInterval(thinning)
    await socket.close()
    // A last barrier, unless that is what was interrupted.
    const failed = (error: unknown) => {
      session.warnOf(error)
      session.exitCode = EXIT.failed
    }
    // What the last barrier makes is thinned, too; the end of a first pass is not waited for.
    const isPassing = sync.status.targets.some(({ phase }) => phase === 'first pass')
    if (repositories.length > 0 && once !== true && !isPassing) await sync.flush().catch(failed)
    await thin(sync, repositories, session)
    await sync.stop({ flush: once !== true }).catch(failed)
  }
  if (once !== true) session.obey()
  for (const target of sync.status.targets) finish(target, session)
}

function untilStopped(signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) resolve()
    else signal.addEventListener('abort', () => resolve(), { once: true })
  })
}

function targetOf(text: string, options: SyncOptions, connections: SshConnections): Target {
  const address = parseTarget(text.startsWith('/') || text.includes('://') ? text : textOf(pathArgument(text)))
  if (address.scheme === 'local') return new LocalTarget(address.path)
  const { rsh, remoteLsync, sftpForm, namespace } = options
  return remoteTarget(address, { connections, sftpForm, namespace, ...given({ rsh, remoteLsync }) })
}

/** Repositories are named as for `lsync snapshot -r`, with `repo:` before it. */
function isRepository(text: string): boolean {
  return text.startsWith('repo:')
}

async function repositoryTarget(
  text: string,
  source: HostPath,
  options: SyncOptions,
  session: Session,
): Promise<RepositoryTarget> {
  // Whoever follows an upper to a directory does not wait for this package.
  const { RepositoryTarget } = await import('@lsync/container-root')
  const address = text.slice('repo:'.length)
  const password = passwordOf(options)
  const keep = rulesOf(options)
  // Nothing is connected before it is used: this one only knows what it is called.
  const named = backendFor(address, options, session)
  await named.close()
  return new RepositoryTarget({
    description: `repo:${named.location}`,
    source,
    ...(Object.keys(keep).length === 0 ? {} : { keep }),
    connect: (signal) =>
      connectRepository(address, options, session, () => ({
        password,
        cacheDirectory: cacheDirectoryOf(options),
        signal,
      })),
  })
}

/** Removes snapshots that the rules do not keep; not while a first pass is under way. */
async function thin(sync: Sync, repositories: readonly RepositoryTarget[], session: Session): Promise<void> {
  for (const target of repositories) {
    const status = sync.status.targets.find((one) => one.target === target.description)
    if (status === undefined || status.phase === 'first pass' || status.queuedDirectories > 0) continue
    await target.thin().catch((error: unknown) => session.warnOf(error, target.description))
  }
}

/** Says what goes on: lines on a terminal and for programs, and nothing else unless something is wrong. */
function report(sync: Sync, session: Session): void {
  const { output } = session
  const { watch, blindSpots, targets } = sync.status
  for (const { target, losses } of targets) {
    for (const { what, message } of losses) output.warning('TARGET_LOSS', `${target}: ${message}`, { target, what })
  }
  if (watch !== 'none') {
    output.data(
      () => ({ type: 'watch', kind: watch, blindSpots }),
      () => undefined,
    )
    output.note(`watched by ${watch}`)
    for (const { message } of blindSpots) output.note(`  ${message}`)
    // Who reads it waits for this.
    output.flush()
  }
  sync.events.on('checkpoint', (checkpoint) => {
    output.data(
      () => ({ type: 'checkpoint', ...checkpoint }),
      () => undefined,
    )
    output.flush()
  })
  sync.events.on('failure', ({ target, path, code, message }) =>
    output.warning(code, `${target}: ${message}; it is tried again`, { target, path: textOf(path) }),
  )
  sync.events.on('problem', ({ target, error }) => session.warnOf(error, target))
  sync.events.on('lag', ({ target, lagMs, isLate }) => {
    if (isLate) output.warning('SYNC_LATE', `${target}: a change waits for ${durationOf(lagMs)}`, { target, lagMs })
    else {
      output.data(
        () => ({ type: 'lag', target, lagMs, isLate }),
        () => undefined,
      )
      output.flush()
      output.note(`${target}: no change waits for too long any more`)
    }
  })
  const startMs = performance.now()
  sync.events.on('progress', (status) => output.progressText(() => progressText(status, startMs)))
}

function progressText(status: TargetStatus, startMs: number): string {
  const { phase, files, bytes, queuedDirectories, queuedNames, lagMs, failures } = status
  const seconds = (performance.now() - startMs) / 1000
  const parts = [phase, `${countOf(files)} files`, sizeOf(bytes), `${sizeOf(Math.round(bytes / seconds))}/s`]
  if (queuedDirectories > 0) parts.push(`${countOf(queuedDirectories)} directories to go`)
  if (queuedNames > 0) parts.push(`${countOf(queuedNames)} names waiting`)
  if (lagMs > 0) parts.push(`lag ${durationOf(lagMs)}`)
  if (failures.length > 0) parts.push(`${countOf(failures.length)} failed`)
  return parts.join('  ')
}

function finish(target: TargetStatus, session: Session): void {
  const { target: name, files, bytes, queuedDirectories, failures } = target
  session.output.data(
    () => ({
      type: 'done',
      target: name,
      files,
      bytes,
      queuedDirectories,
      failures: failures.map((one) => ({ ...one, path: textOf(one.path) })),
    }),
    () =>
      `${name}: ${countOf(files)} files, ${sizeOf(bytes)}${failures.length > 0 ? `, ${failures.length} failed` : ''}`,
  )
  if (queuedDirectories > 0) {
    session.output.note(`${countOf(queuedDirectories)} directories are left; the next start goes on with them`)
  }
  if (failures.length > 0) session.foundProblems()
}

function statusText(status: SyncStatus): string {
  const lines = [`${status.source}: ${status.isPaused ? 'paused' : `watched by ${status.watch}`}`]
  for (const { target, phase, checkpoint, files, bytes, lagMs, failures } of status.targets) {
    const safe = checkpoint === undefined ? 'no checkpoint yet' : `checkpoint ${checkpoint.sequence}`
    lines.push(`  ${target}: ${phase}, ${safe}, ${countOf(files)} files, ${sizeOf(bytes)}, lag ${durationOf(lagMs)}`)
    for (const { path, code, attempts } of failures) lines.push(`    ${path}: ${code}, tried ${attempts} times`)
  }
  return lines.join('\n')
}
