import { EventEmitter } from 'node:events'
import {
  type ContainerRoot,
  type LastDelta,
  LocalPeer,
  RemotePeer,
  type SwitchEvents,
  type SwitchPeer,
  type SwitchReport,
  SwitchSide,
  serveSwitch,
  switchRoot,
} from '@lsync/container-root'
import { textOf } from '@lsync/posix'
import { type RemoteAddress, remoteCommand, SshConnections, spawnRemote } from '@lsync/ssh'
import { parseTarget } from '@lsync/sync'
import { type Command, Option } from 'commander'
import { examples } from '../examples.ts'
import { UsageError } from '../failure.ts'
import { addDryRunOption, given, textsArgument, timeArgument } from '../options.ts'
import { countOf, durationOf, sizeOf } from '../progress-line.ts'
import { addRootOptions, type RootOptions, withRoot } from '../roots.ts'
import type { Session } from '../session.ts'

interface SwitchOptions extends RootOptions {
  readonly to?: string
  readonly from?: string
  readonly maxDowntime: number
  readonly lastDelta: LastDelta
  readonly dryRun?: true
  readonly resume?: true
  readonly stdio?: true
  readonly remoteState?: string
  readonly rsh?: string
  readonly remoteLsync: string
  readonly identity?: string[]
}

/** This node, as the target of a switch that is driven from there. */
const HERE = 'here'

export function define(command: Command, session: Session): void {
  command.addHelpText(
    'before',
    examples(
      'lsync switch lab --to ssh://node2',
      'lsync switch lab --to ssh://node2 --from ssh://node1 --max-downtime 500ms',
    ),
  )
  addDryRunOption(
    addRootOptions(
      command
        .argument('<name>', 'the root, as it is called on both nodes')
        .option('--to <node>', 'ssh://user@host:port, with the path of the home there if it is another one; or here')
        .option('--from <node>', 'where it runs, as --to; default: here')
        .option(
          '--max-downtime <time>',
          'how long it may stand still, as predicted before it is stopped',
          timeArgument,
          2000,
        )
        .addOption(
          new Option('--last-delta <form>', 'how what changes last travels: file by file, or sealed, in one piece')
            .choices(['auto', 'tree', 'sealed'])
            .default('auto'),
        )
        .option('--resume', 'settle a switch that was interrupted, from what is on the store')
        .option('--stdio', 'be one end of a switch that another machine drives'),
    )
      .option('--remote-state <dir>', 'the state of the other nodes')
      .option('--rsh <command>', 'reach other machines through this instead: "ssh -J jump"')
      .option('--remote-lsync <path>', 'lsync on the other machines', 'lsync')
      .option('--identity <file>', 'a private key to log in with; may be repeated', textsArgument),
  ).action(async (name: string, options: SwitchOptions) => {
    if (options.stdio === true) return await withRoot(name, options, (root) => answer(root, session))
    if (options.resume === true) return await withRoot(name, options, (root) => settle(root, session))
    if (options.to === undefined) throw new UsageError('it is not said where to', 'name a node with --to')
    if (options.from !== undefined && options.to !== HERE) return await drive(name, options, undefined, session)
    return await withRoot(name, options, (root) => drive(name, options, root, session))
  })
}

async function answer(root: ContainerRoot, session: Session): Promise<void> {
  // A connection that ends is no reason to leave a container stopped, so its signals are not those of the session.
  await serveSwitch(new SwitchSide(root), { input: process.stdin, output: process.stdout })
  session.output.flush()
}

async function settle(root: ContainerRoot, session: Session): Promise<void> {
  const { runsOn, phase } = await new SwitchSide(root).settle({ signal: session.signal })
  session.output.data(
    () => ({ type: 'settled', root: root.name, runsOn, phase }),
    () => `${root.name} runs on the ${runsOn} of the switch.`,
  )
}

async function drive(
  name: string,
  options: SwitchOptions,
  local: ContainerRoot | undefined,
  session: Session,
): Promise<void> {
  const { maxDowntime: maxDowntimeMs, lastDelta, dryRun } = options
  const connections = new SshConnections(given({ identities: options.identity }))
  const peers: SwitchPeer[] = []
  const reach = async (text: string): Promise<SwitchPeer> => {
    const peer = await remotePeer(name, text, options, local, connections, session.signal)
    peers.push(peer)
    return peer
  }
  try {
    const end = (text: string | undefined): Promise<SwitchPeer> | SwitchPeer =>
      local !== undefined && (text === undefined || text === HERE)
        ? new LocalPeer(new SwitchSide(local))
        : reach(text as string)
    const source = await end(options.from)
    const target = await end(options.to)
    const events = new EventEmitter<SwitchEvents>()
    tell(events, session)
    const { signal } = session
    const how = { maxDowntimeMs, lastDelta, ...given({ dryRun }) }
    const report = await switchRoot({ name, source, target, events, signal, ...how })
    session.output.data(
      () => ({ type: 'switched', root: name, ...report }),
      () => summary(name, report),
    )
  } finally {
    await Promise.all(peers.map((peer) => peer.close()))
  }
}

async function remotePeer(
  name: string,
  text: string,
  { rsh, remoteLsync, remoteState, home: homeOption }: SwitchOptions,
  local: ContainerRoot | undefined,
  connections: SshConnections,
  signal: AbortSignal,
): Promise<RemotePeer> {
  const address = addressOf(text)
  const home = address.path === '/' ? (local?.home.path ?? homeOption) : address.path
  const words = [remoteLsync, 'switch', name, '--stdio']
  if (home !== undefined) words.push('--home', textOf(home))
  if (remoteState !== undefined) words.push('--state', remoteState)
  const command = remoteCommand(words)
  const connection =
    rsh === undefined
      ? await connections.execute(address, command, signal)
      : spawnRemote(rsh, address, { command }, signal)
  return new RemotePeer(connection)
}

function addressOf(text: string): RemoteAddress {
  const address = parseTarget(/^ssh:\/\/[^/]+$/.test(text) ? `${text}/` : text)
  if (address.scheme !== 'ssh') throw new UsageError(`${text} is no node`, 'write ssh://user@host')
  return address
}

function tell(events: EventEmitter<SwitchEvents>, { output }: Session): void {
  events.on('phase', (phase) => {
    output.data(
      () => ({ type: 'phase', ...phase }),
      () => undefined,
    )
    const carried = phase.files === undefined ? '' : `, ${countOf(phase.files)} files, ${sizeOf(phase.bytes ?? 0)}`
    const sealed =
      phase.sealedBytes === undefined ? '' : `, the last of them as an image of ${sizeOf(phase.sealedBytes)}`
    output.note(`${phase.phase} (${phase.node}): ${durationOf(Math.round(phase.durationMs))}${carried}${sealed}`)
    output.flush()
  })
  events.on('problem', (error) => {
    const { code } = error as { code?: unknown }
    output.warning(typeof code === 'string' ? code : 'SWITCH_PROBLEM', error.message)
  })
}

function summary(name: string, { from, to, version, downtimeMs, isDryRun }: SwitchReport): string {
  if (isDryRun) return `${name} can go from ${from} to ${to}.`
  return `${name} runs on ${to} with version ${version}, after ${durationOf(Math.round(downtimeMs ?? 0))} of standing still.`
}
