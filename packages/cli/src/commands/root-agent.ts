import { setTimeout as delay } from 'node:timers/promises'
import {
  ContainerRoot,
  HomeMissingError,
  keepRoot,
  type Policies,
  type PoliciesOptions,
  PolicyKeeper,
  readPolicies,
  writePolicies,
} from '@lsync/container-root'
import { type HostPath, textOf } from '@lsync/posix'
import type { Command } from 'commander'
import { UsageError } from '../failure.ts'
import { countArgument, given, pathArgument, sizeArgument, timeArgument } from '../options.ts'
import { addStateOption, etcdUser, type StateOption, stateOf, withToldRoot } from '../roots.ts'
import type { Session } from '../session.ts'
import {
  addRepositoryOptions,
  connectRepository,
  passwordOf,
  type RepositoryOptions,
  withRepository,
} from './snapshot/repository.ts'

interface PolicyOptions extends StateOption {
  readonly solidifyEvery?: number
  readonly cgroup?: HostPath
  readonly maxLayers?: number
  readonly maxDepth?: number
  readonly maxShadowed?: number
  readonly keep?: number
  readonly prefetch?: true
  readonly backup?: string
  readonly backupEvery?: number
  readonly passwordFile?: HostPath
  readonly clear?: true
}

const DAY_MS = 86_400_000

export function definePolicy(command: Command, session: Session): void {
  addStateOption(command.argument('<name>', 'the root, as this node calls it'))
    .option('--solidify-every <time>', 'make a live version of what changed, so often: 1h, 1d', timeArgument)
    .option('--cgroup <dir>', 'with --solidify-every: freeze this cgroup for the end of it', pathArgument)
    .option('--max-layers <count>', 'fold layers once a mount has more', countArgument)
    .option('--max-depth <count>', 'fold all, the base included, once more lie above it', countArgument)
    .option('--max-shadowed <size>', 'fold all once so much of them is in no view: 2G', sizeArgument)
    .option('--keep <count>', 'remove versions beyond the newest ones, and what nobody needs, each day', countArgument)
    .option('--prefetch', 'keep the layers of the newest version in the cache')
    .option('--backup <repository>', 'save the newest version there')
    .option('--backup-every <time>', 'so often; default 1d', timeArgument)
    .option('--password-file <file>', 'with --backup: the first line of this file is the password', pathArgument)
    .option('--clear', 'forget all others')
    .action((name: string, options: PolicyOptions) =>
      withToldRoot(name, options, session, async (root) => {
        const before = readPolicies(root)
        const policies = policiesOf(options.clear === true ? {} : before, options)
        if (JSON.stringify(policies) !== JSON.stringify(before)) writePolicies(root, policies)
        session.output.data(
          () => ({ type: 'policies', name, policies }),
          () =>
            Object.entries(policies)
              .map(([policy, value]) => `${policy}: ${JSON.stringify(value)}`)
              .join('\n') || undefined,
        )
      }),
    )
}

function policiesOf(before: Policies, options: PolicyOptions): Policies {
  const { solidifyEvery, cgroup, maxLayers, maxDepth, maxShadowed, keep, prefetch, backup, backupEvery } = options
  const { passwordFile } = options
  if (backup !== undefined && passwordFile === undefined) {
    throw new UsageError('nobody is there to say the password of a backup', 'name a --password-file')
  }
  const compact = { ...before.compact, ...given({ maxLayers, maxDepth, maxShadowedBytes: maxShadowed }) }
  return {
    ...before,
    ...(solidifyEvery === undefined
      ? {}
      : { solidify: { everyMs: solidifyEvery, ...(cgroup === undefined ? {} : { cgroup: textOf(cgroup) }) } }),
    ...(Object.keys(compact).length === 0 ? {} : { compact }),
    ...(keep === undefined ? {} : { gc: { keep } }),
    ...given({ prefetch }),
    ...(backup === undefined || passwordFile === undefined
      ? {}
      : { backup: { repository: backup, passwordFile: textOf(passwordFile), everyMs: backupEvery ?? DAY_MS } }),
  }
}

interface AgentOptions extends StateOption {
  readonly once?: true
  readonly look?: number
}

export function defineAgent(command: Command, session: Session): void {
  addStateOption(command.argument('[name]', 'the root; default: all on this node, also those that come'))
    .option('--once', 'do what is due by the policies, then end')
    .option('--look <time>', 'look so often whether something is due; default 1m', timeArgument)
    .action(async (name: string | undefined, options: AgentOptions) => {
      const { signal } = session
      const running = new Map<string, Promise<void>>()
      do {
        for (const one of name === undefined ? stateOf(options).rootNames() : [name]) {
          if (!running.has(one)) {
            const kept = keepOne(one, options, session).finally(() => running.delete(one))
            running.set(one, kept)
          }
        }
        if (options.once === true) break
        await delay(options.look ?? LOOK_MS, undefined, { signal }).catch(() => undefined)
      } while (!signal.aborted)
      await Promise.all(running.values())
      if (signal.aborted) session.obey()
    })
}

const LOOK_MS = 60_000

async function keepOne(name: string, options: AgentOptions, session: Session): Promise<void> {
  const { output, signal } = session
  let root: ContainerRoot
  try {
    root = await ContainerRoot.openKnown(name, { state: stateOf(options), etcdUser: etcdUser() })
  } catch (error) {
    session.warnOf(error, name)
    return
  }
  root.events.on('problem', ({ verb, error }) => session.warnOf(error, `${name}: ${verb}`))
  const keeping: PoliciesOptions = {
    signal,
    connect: async ({ repository: address, passwordFile }, during) => {
      const asked: RepositoryOptions = { repository: address, passwordFile: pathArgument(passwordFile) }
      return connectRepository(address, asked, session, () => ({ password: passwordOf(asked), signal: during }))
    },
    onDone: ({ policy, report }) => {
      output.data(
        () => ({ type: 'done', name, policy, report }),
        () => `${name}: ${policy}`,
      )
      output.flush()
    },
    ...given({ lookMs: options.look }),
  }
  try {
    if (options.once === true) await new PolicyKeeper(root, keeping).look()
    else await keepRoot(root, keeping)
  } catch (error) {
    // The next look opens it again, once its store is back.
    if (!(error instanceof HomeMissingError)) throw error
    session.warnOf(error, name)
  } finally {
    // What was open of a store that is gone cannot be closed in good order.
    await root.close().catch((error: unknown) => session.warnOf(error, name))
  }
}

export function defineBackup(command: Command, session: Session): void {
  addRepositoryOptions(addStateOption(command.argument('<name>', 'the root, as this node calls it')))
    .option('--version-of <version>', 'number or tag; default the newest')
    .action((name: string, options: StateOption & RepositoryOptions & { versionOf?: string }) =>
      withToldRoot(name, options, session, (root) =>
        withRepository(options, session, async (repository) => {
          const asked = { signal: session.signal, ...given({ version: options.versionOf }) }
          const report = await root.backup(repository, asked)
          const { version, snapshotId, isNew, problems } = report
          session.output.data(
            () => ({ type: 'backup', ...report }),
            () => `version ${version} is snapshot ${snapshotId.slice(0, 8)}${isNew ? '' : ', as before'}`,
          )
          if (problems > 0) session.foundProblems()
        }),
      ),
    )
}
