import { setTimeout as delay } from 'node:timers/promises'
import {
  type ContainerRoot,
  Home,
  initHome,
  type LayerStatus,
  type LayerStorage,
  leasesOf,
  parseMetricsAddress,
  type RootSpace,
  type RootStatus,
  type SealLossyError,
  serveMetrics,
  statusOfHome,
  type VersionRecord,
} from '@lsync/container-root'
import { type HostPath, printable, textOf } from '@lsync/posix'
import { type Command, Option } from 'commander'
import { examples } from '../examples.ts'
import { UsageError } from '../failure.ts'
import {
  addDryRunOption,
  addYesOption,
  countArgument,
  given,
  pathArgument,
  pathsArgument,
  sizeArgument,
  timeArgument,
} from '../options.ts'
import { durationOf, sizeOf } from '../progress-line.ts'
import { addStateOption, etcdUser, type StateOption, stateOf, withToldRoot } from '../roots.ts'
import type { Session } from '../session.ts'
import { defineAgent, defineBackup, definePolicy } from './root-agent.ts'

type Definer = (command: Command, session: Session) => void

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples('lsync root init lab --home /store/lab --base /srv/rootfs', 'lsync root mount lab --home /store/lab'),
  )
  const add = (name: string, summary: string, definer: Definer) =>
    definer(command.command(name).description(summary), session)
  add('init', 'make a home of a directory, a tar or an OCI layout', defineInit)
  add('mount', 'mount a root on this node, for writing', defineMount)
  add('prefetch', 'copy the layers of a root to this node', definePrefetch)
  add('unmount', 'unmount a root', defineUnmount)
  add('sync', 'follow a root and carry its changes to the store, until interrupted', defineSync)
  add('status', 'say where the roots of this node stand', defineStatus)
  add('versions', 'list the versions of a root', defineVersions)
  add('diff', 'show what differs between two versions', defineDiff)
  add('rollback', 'make an earlier version the newest one', defineRollback)
  add('fork', 'make a second root of a version', defineFork)
  add('compact', 'fold layers of the newest version into one', defineCompact)
  add('backup', 'save a version in a snapshot repository', defineBackup)
  add('policy', 'say what is done without being asked', definePolicy)
  add('agent', 'follow the roots of this node, and do what their policies say', defineAgent)
  add('seal', 'make the layers of a version sealed ones, each an image', defineSeal)
  add('gc', 'remove old versions, and layers that nobody needs', defineGc)
}

function named(command: Command): Command {
  return addStateOption(command.argument('<name>', 'the root, as this node calls it'))
}

interface InitOptions extends StateOption {
  readonly home: HostPath
  readonly base: HostPath[]
  readonly layerForm?: LayerStorage
  readonly lease?: string[]
  readonly leaseDuration?: number
}

const SHORTEST_LEASE_MS = 1000

/** `etcd://a:2379,b:2379` as the addresses of its members. */
function etcdArgument(text: string): string[] {
  const [, secure, hosts = ''] = /^etcd(s?):\/\/([^/?#@]+)$/.exec(text) ?? []
  const endpoints = hosts.split(',').map((host) => `http${secure ?? ''}://${host}`)
  if (!endpoints.every((endpoint) => URL.canParse(endpoint))) {
    throw new UsageError(`${text} is no etcd`, 'write etcd://host:2379, with all members after commas')
  }
  return endpoints
}

const defineInit: Definer = (command, session) => {
  named(command)
    .requiredOption('--home <dir>', 'the home to make on the store', pathArgument)
    .addOption(
      new Option('--base <path>', 'a directory, a tar or an OCI layout; again for what lies below it')
        .argParser(pathsArgument)
        .makeOptionMandatory(),
    )
    .addOption(layerFormOption())
    .addOption(
      new Option('--lease <etcd>', 'let etcd keep who may write: etcd://host:2379,host:2379, or etcds://').argParser(
        etcdArgument,
      ),
    )
    .option('--lease-duration <time>', 'how long a silent node keeps the right to write; default 30s', timeArgument)
    .action(async (name: string, options: InitOptions) => {
      const { home: path, base: bases, layerForm: wanted, lease: etcd, leaseDuration: durationMs } = options
      if (durationMs !== undefined && durationMs < SHORTEST_LEASE_MS) {
        throw new UsageError('a lease of less than a second is lost again and again', 'name a longer --lease-duration')
      }
      const { node, path: scratch } = stateOf(options)
      const lease = given({ etcd, durationMs })
      const home = await initHome({
        home: path,
        bases,
        node,
        scratch,
        onLoss: ({ code, message }: SealLossyError) => session.output.warning(code, message),
        signal: session.signal,
        ...given({ layerForm: wanted }),
        ...(Object.keys(lease).length === 0 ? {} : { lease }),
      })
      home.close()
      await withToldRoot(name, options, session, async (root) => {
        const { id: rootId, layerForm } = root.home.record
        session.output.data(
          () => ({ type: 'init', name, home: textOf(path), rootId, layerForm, version: 1 }),
          () => `made ${printable(path)}, version 1${layerForm === 'sealed' ? ', its layers sealed' : ''}`,
        )
        session.output.note(`next: lsync root mount ${name}`)
      })
    })
}

function layerFormOption(): Option {
  return new Option(
    '--layer-form <form>',
    'how layers are kept; default: sealed where the store holds no trees',
  ).choices(['tree', 'sealed'])
}

const defineMount: Definer = (command, session) => {
  named(command)
    .option('--home <dir>', 'the home of the root, the first time on this node', pathArgument)
    .option('--discard', 'give up changes that are in no version, and begin with the newest one')
    .option('--takeover', 'take the lease over from a node that is silent; waits until it is known to be')
    .option('--force', 'take the lease over at once: the other node is surely dead')
    .option('--prefetch', 'copy its layers to this node before')
    .option('--cache-limit <size>', CACHE_LIMIT, sizeArgument)
    .action(
      async (
        name: string,
        options: CacheOptions & {
          home?: HostPath
          discard?: true
          takeover?: true
          force?: true
          prefetch?: true
        },
      ) => {
        const { discard, takeover, force, prefetch } = options
        await setCache(options, prefetch === true)
        const from = force === true ? 'force' : takeover === true ? 'expired' : undefined
        await withToldRoot(name, options, session, async (root) => {
          const { version } = await root.mount({
            signal: session.signal,
            ...given({ discard, takeover: from, prefetch }),
          })
          session.output.data(
            () => ({ type: 'mount', name, path: textOf(root.mergedPath), version }),
            () => `version ${version} on ${printable(root.mergedPath)}`,
          )
        })
      },
    )
}

interface CacheOptions extends StateOption {
  readonly cacheLimit?: number
}

const CACHE_LIMIT = 'how much this node keeps of the layers of all its roots, from now on; default 20G'
const CACHE_LIMIT_BYTES = 20e9

/** Sets the limit of the cache, if one is given, and makes a cache where one `isNeeded`. */
async function setCache(options: CacheOptions, isNeeded: boolean): Promise<void> {
  const state = stateOf(options)
  const { cacheLimit } = options
  if (cacheLimit !== undefined) await state.openCache(cacheLimit)
  else if (isNeeded && (await state.openCache()) === undefined) await state.openCache(CACHE_LIMIT_BYTES)
}

const definePrefetch: Definer = (command, session) => {
  named(command)
    .option('--home <dir>', 'the home of the root, the first time on this node', pathArgument)
    .option('--version-of <version>', 'number or tag; default the newest')
    .option('--cache-limit <size>', CACHE_LIMIT, sizeArgument)
    .action(async (name: string, options: CacheOptions & { home?: HostPath; versionOf?: string }) => {
      await setCache(options, true)
      await withToldRoot(name, options, session, async (root) => {
        const report = await root.prefetch({ signal: session.signal, ...given({ version: options.versionOf }) })
        session.output.data(
          () => ({ type: 'prefetch', ...report }),
          () => `${report.local} of ${report.of} layers of version ${report.version} are on this node`,
        )
      })
    })
}

const defineUnmount: Definer = (command, session) => {
  named(command).action((name: string, options: StateOption) =>
    withToldRoot(name, options, session, async (root) => {
      const { hasChanges } = await root.unmount()
      session.output.data(
        () => ({ type: 'unmount', name, hasChanges }),
        () => (hasChanges ? 'unmounted; it has changes that are in no version' : 'unmounted'),
      )
      if (hasChanges) session.output.note(`next: lsync solidify ${name}`)
    }),
  )
}

const defineSync: Definer = (command, session) => {
  named(command).action((name: string, options: StateOption) =>
    withToldRoot(name, options, session, async (root) => {
      const { output, signal } = session
      root.events.on('following', (sync) => {
        sync.events.on('checkpoint', (checkpoint) =>
          output.data(
            () => ({ type: 'checkpoint', ...checkpoint }),
            () => undefined,
          ),
        )
        sync.events.on('problem', ({ error }) => session.warnOf(error))
        output.data(
          () => ({ type: 'following', name }),
          () => undefined,
        )
        output.flush()
        output.note(`following ${printable(root.mergedPath)}`)
      })
      await root.follow({ signal })
      session.obey()
    }),
  )
}

interface StatusCommandOptions extends StateOption {
  readonly home?: HostPath
  readonly space?: true
  readonly watch?: number | true
  readonly metrics?: string
}

const WATCH_MS = 2000

const defineStatus: Definer = (command, session) => {
  addStateOption(command.argument('[name]', 'the root; default: all on this node'))
    .option('--home <dir>', 'what a home says, whatever nodes have it', pathArgument)
    .option('--space', 'measure what it takes, too: lists every layer')
    .option('--watch [time]', 'say it again and again, each time after so long; default 2s', timeArgument)
    .option('--metrics <address>', 'serve it to Prometheus on unix:/PATH or 127.0.0.1:PORT, until interrupted')
    .action(async (name: string | undefined, options: StatusCommandOptions) => {
      const { home, watch, metrics } = options
      if (home !== undefined) return showHome(home, session)
      if (metrics !== undefined) return serveStatus(metrics, name, options, session)
      for (;;) {
        for (const status of await statusesOf(name, options, session)) showStatus(status, session)
        if (watch === undefined || session.signal.aborted) return
        session.output.flush()
        await delay(watch === true ? WATCH_MS : watch, undefined, { signal: session.signal }).catch(() => undefined)
        if (session.signal.aborted) return session.obey()
      }
    })
}

async function statusesOf(
  name: string | undefined,
  options: StatusCommandOptions,
  session: Session,
): Promise<RootStatus[]> {
  const statuses: RootStatus[] = []
  for (const one of name === undefined ? stateOf(options).rootNames() : [name]) {
    await withToldRoot(one, options, session, async (root) => {
      statuses.push(await root.status({ signal: session.signal, ...given({ space: options.space }) }))
    })
  }
  return statuses
}

function showStatus(status: RootStatus, session: Session): void {
  session.output.data(
    () => ({ type: 'status', ...status }),
    () => statusText(status),
  )
  if (status.errors.length > 0) session.foundProblems()
}

async function serveStatus(
  text: string,
  name: string | undefined,
  options: StatusCommandOptions,
  session: Session,
): Promise<void> {
  const address = parseMetricsAddress(text)
  const server = await serveMetrics(address, () => statusesOf(name, options, session))
  const where = 'path' in address ? `unix:${address.path}` : `http://${address.host}:${server.port}/metrics`
  session.output.data(
    () => ({ type: 'metrics', where }),
    () => `metrics on ${where}`,
  )
  session.output.flush()
  try {
    await untilAborted(session.signal)
  } finally {
    await server.close()
  }
  session.obey()
}

function untilAborted(signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    if (signal.aborted) resolve()
    else signal.addEventListener('abort', () => resolve(), { once: true })
  })
}

async function showHome(path: HostPath, session: Session): Promise<void> {
  const home = Home.open(path)
  try {
    const status = await statusOfHome(home, leasesOf(home, etcdUser()), session.signal)
    const { rootId, head, versions, layers, layerForm, lease, nodes } = status
    const holder = lease === undefined || lease.isReleased ? 'nobody' : lease.node
    session.output.data(
      () => ({ type: 'home', ...status }),
      () =>
        [
          `${printable(path)}: root ${rootId.slice(0, 12)}, version ${head} of ${versions}, ${layers} layers, new ones ${layerForm}`,
          `  lease    ${holder}${lease === undefined ? '' : `, epoch ${lease.epoch}`}`,
          ...nodes.map(({ node, version }) => `  node     ${node} on version ${version}`),
        ].join('\n'),
    )
  } finally {
    home.close()
  }
}

function statusText(status: RootStatus): string {
  const { name, home, isMounted, hasChanges, version, head, liveVersion, layers, lease, unfinished } = status
  const { sync, space, lastErrors, errors } = status
  const holder = lease === undefined ? 'nobody' : lease.isReleased ? 'nobody' : lease.isOurs ? 'this node' : lease.node
  return [
    `${name}: ${isMounted ? 'mounted' : 'not mounted'}, version ${version}${hasChanges ? ' with changes' : ''}`,
    `  home     ${home}`,
    `  newest   ${head ?? 'unknown'}${liveVersion === undefined ? '' : ` (of this upper: ${liveVersion})`}`,
    `  lease    ${holder}${lease === undefined ? '' : `, epoch ${lease.epoch}`}`,
    ...(layers ?? []).map((layer, i) => `  ${i === 0 ? 'layers  ' : '        '} ${layerText(layer)}`),
    ...(sync?.targets ?? []).map(
      ({ phase, lagMs, failures }) =>
        `  sync     ${phase}, lag ${durationOf(lagMs)}${failures.length > 0 ? `, ${failures.length} failed` : ''}`,
    ),
    ...(space === undefined ? [] : [`  space    ${spaceText(space)}`]),
    ...(unfinished === undefined
      ? []
      : [`  an interrupted ${unfinished} is finished or taken back by the next command`]),
    ...lastErrors
      .slice(0, 3)
      .map(
        ({ atMs, verb, code, message }) => `  failed   ${new Date(atMs).toISOString()} ${verb}: ${message} (${code})`,
      ),
    ...errors.map(({ what, message }) => `  unknown  ${what}: ${message}`),
  ].join('\n')
}

function spaceText({ upperBytes, replicaBytes, layerBytes, sharedBytes, shadowedBytes }: RootSpace): string {
  return [
    `upper ${sizeOf(upperBytes)}`,
    `replicas ${sizeOf(replicaBytes)}`,
    `layers ${sizeOf(layerBytes)} (shared ${sizeOf(sharedBytes)}, shadowed ${sizeOf(shadowedBytes)})`,
  ].join(', ')
}

function layerText({ id, form, isBottom, madeBy, covers, local }: LayerStatus): string {
  const about = [
    isBottom ? 'bottom' : undefined,
    form === 'erofs' ? 'sealed' : undefined,
    local === undefined ? undefined : local === 'replica' ? 'local' : 'cached',
  ]
  const of = covers > 1 ? `${madeBy} of ${covers}` : madeBy
  return `${id.slice(0, 12)}  ${[of, ...about.filter((word) => word !== undefined)].join(', ')}`
}

const defineVersions: Definer = (command, session) => {
  named(command).action((name: string, options: StateOption) =>
    withToldRoot(name, options, session, async (root) => {
      for (const version of root.versions()) {
        session.output.data(
          () => ({ type: 'version', ...version }),
          () => versionText(version),
        )
      }
    }),
  )
}

function versionText({ number, createdAtMs, madeBy, sameAs, nodeName, tags = [], message }: VersionRecord): string {
  const when = new Date(createdAtMs).toISOString().slice(0, 19).replace('T', ' ')
  const how = sameAs === undefined ? madeBy : `${madeBy} to ${sameAs}`
  const said = [...tags.map((tag) => `[${tag}]`), message ?? ''].join(' ').trim()
  return `${String(number).padStart(4)}  ${when}  ${how.padEnd(14)}  ${nodeName}${said === '' ? '' : `  ${said}`}`
}

const LETTERS = { added: 'A', removed: 'D', type: 'T', modified: 'M', metadata: 'm' } as const

const defineDiff: Definer = (command, session) => {
  named(command)
    .argument('<from>', 'a version: number or tag')
    .argument('[to]', 'another one; default the newest')
    .option('--content', 'compare the bytes of files of equal size, too')
    .action((name: string, from: string, to: string | undefined, options: StateOption & { content?: true }) =>
      withToldRoot(name, options, session, async (root) => {
        const found = await root.diff(from, to ?? root.home.head().number, {
          signal: session.signal,
          ...given({ content: options.content }),
        })
        for (const { path, change, what } of found) {
          session.output.data(
            () => ({ type: 'difference', path: textOf(path), change, what }),
            () => `${LETTERS[change]} ${printable(path) || '.'}${what.length > 0 ? `  (${what.join(', ')})` : ''}`,
          )
        }
      }),
    )
}

const defineRollback: Definer = (command, session) => {
  addYesOption(named(command))
    .requiredOption('--to <version>', 'number or tag')
    .option('--message <text>', 'what to say of it')
    .option('--discard', 'give up changes that are in no version')
    .action(
      async (name: string, options: StateOption & { to: string; message?: string; discard?: true; yes?: true }) => {
        const { to, message, discard } = options
        if (discard === true) await session.confirm(`this gives up the changes of ${name}`, options, 'solidify first')
        await withToldRoot(name, options, session, async (root) => {
          const version = await root.rollback({ to, signal: session.signal, ...given({ message, discard }) })
          session.output.data(
            () => ({ type: 'rollback', version }),
            () => `version ${version.number} is version ${version.sameAs}`,
          )
          session.output.note(`next: lsync root mount ${name}`)
        })
      },
    )
}

const defineFork: Definer = (command, session) => {
  named(command)
    .requiredOption('--to-home <dir>', 'the home to make', pathArgument)
    .option('--version-of <version>', 'number or tag; default the newest')
    .addOption(layerFormOption())
    .action((name: string, options: StateOption & { toHome: HostPath; versionOf?: string; layerForm?: LayerStorage }) =>
      withToldRoot(name, options, session, async (root) => {
        const { toHome: home, versionOf: version, layerForm } = options
        const fork = await root.fork({ home, signal: session.signal, ...given({ version, layerForm }) })
        const { record } = fork
        fork.close()
        session.output.data(
          () => ({ type: 'fork', home: textOf(home), rootId: record.id, from: record.forkedFrom }),
          () => `made ${printable(home)} of version ${record.forkedFrom?.version}`,
        )
      }),
    )
}

const defineCompact: Definer = (command, session) => {
  addDryRunOption(named(command))
    .option('--max-layers <count>', 'fold only if there are more; default 8', countArgument)
    .option('--into-bottom', 'fold the base as well')
    .option('--version-of <version>', 'number or tag; default the newest')
    .action(
      (
        name: string,
        options: StateOption & { maxLayers?: number; intoBottom?: true; versionOf?: string; dryRun?: true },
      ) =>
        withToldRoot(name, options, session, async (root) => {
          const { maxLayers, intoBottom, versionOf: version, dryRun } = options
          const report = await root.compact({
            signal: session.signal,
            ...given({ maxLayers, intoBottom, version, dryRun }),
          })
          session.output.data(
            () => ({ type: 'compact', ...report }),
            () => compactText(report, dryRun === true),
          )
        }),
    )
}

function compactText(
  { folded, before, after, elapsedMs }: Awaited<ReturnType<ContainerRoot['compact']>>,
  dryRun: boolean,
): string {
  if (folded.length < 2) return `${before.length} layers; nothing to fold`
  if (dryRun) return `would fold ${folded.length} of ${before.length} layers`
  return `folded ${folded.length} layers in ${durationOf(elapsedMs)}; ${after.length} are left`
}

const defineSeal: Definer = (command, session) => {
  named(command)
    .option('--undo', 'make trees of sealed layers')
    .option('--version-of <version>', 'number or tag; default the newest')
    .action((name: string, options: StateOption & { undo?: true; versionOf?: string }) =>
      withToldRoot(name, options, session, async (root) => {
        const { undo, versionOf: version } = options
        const to = undo === true ? 'tree' : 'sealed'
        const report = await root.convert({ to, signal: session.signal, ...given({ version }) })
        session.output.data(
          () => ({ type: 'seal', to, ...report }),
          () =>
            `${to === 'tree' ? 'unsealed' : 'sealed'} ${report.made.length} layers in ${durationOf(report.elapsedMs)}`,
        )
        if (report.made.length > 0) session.output.note(`the next mount takes them; then: lsync root gc ${name}`)
      }),
    )
}

const defineGc: Definer = (command, session) => {
  addYesOption(addDryRunOption(named(command)))
    .option('--keep <count>', 'how many of the newest versions stay; default 10', countArgument)
    .action(async (name: string, options: StateOption & { keep?: number; dryRun?: true; yes?: true }) => {
      const { keep, dryRun } = options
      if (keep === 0) throw new UsageError('the newest version always stays', 'keep at least 1')
      await session.confirm(`this removes old versions of ${name}`, options)
      await withToldRoot(name, options, session, async (root) => {
        const report = await root.gc({ signal: session.signal, ...given({ keep, dryRun }) })
        const { versions, layers } = report
        session.output.data(
          () => ({ type: 'gc', ...report }),
          () =>
            `${dryRun === true ? 'would remove' : 'removed'} ${versions.length} versions and ${layers.length} layers`,
        )
      })
    })
}
