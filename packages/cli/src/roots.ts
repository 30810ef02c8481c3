import { readFileSync } from 'node:fs'
import { ContainerRoot, NodeState } from '@lsync/container-root'
import type { HostPath } from '@lsync/posix'
import type { Command } from 'commander'
import { UsageError } from './failure.ts'
import { pathArgument } from './options.ts'
import type { Session } from './session.ts'

/** Where this node keeps what it knows of its roots. */
export interface StateOption {
  readonly state?: HostPath
}

export function addStateOption(command: Command): Command {
  return command.option('--state <dir>', 'the state of this node; default LSYNC_STATE, or /var/lib/lsync', pathArgument)
}

export function stateOf({ state }: StateOption): NodeState {
  return NodeState.open(state)
}

/** Which root of this node; with `home` also one that the node has not seen yet. */
export interface RootOptions extends StateOption {
  readonly home?: HostPath
}

export function addRootOptions(command: Command): Command {
  return addStateOption(
    command.option('--home <dir>', 'the home of the root, where this node does not know it yet', pathArgument),
  )
}

/** How this node shows an etcd who it is: `LSYNC_ETCD_USER`, and the first line of the file that `LSYNC_ETCD_PASSWORD_FILE` names. */
export function etcdUser(): { readonly name: string; readonly password: string } | undefined {
  const { LSYNC_ETCD_USER: name, LSYNC_ETCD_PASSWORD_FILE: file } = process.env
  if (name === undefined && file === undefined) return undefined
  if (name === undefined || file === undefined) {
    throw new UsageError('LSYNC_ETCD_USER and LSYNC_ETCD_PASSWORD_FILE go together', 'set both')
  }
  return { name, password: readFileSync(file, 'utf8').split('\n')[0] ?? '' }
}

/** Runs `use` with a root, and closes it. */
export async function withRoot<T>(
  name: string,
  options: RootOptions,
  use: (root: ContainerRoot) => Promise<T>,
): Promise<T> {
  const { home } = options
  const opening = { state: stateOf(options), etcdUser: etcdUser() }
  const root = await (home === undefined
    ? ContainerRoot.openKnown(name, opening)
    : ContainerRoot.open(home, name, opening))
  try {
    return await use(root)
  } finally {
    await root.close()
  }
}

/** As `withRoot`, and says what goes wrong without ending the operation. */
export function withToldRoot<T>(
  name: string,
  options: RootOptions,
  session: Session,
  use: (root: ContainerRoot) => Promise<T>,
): Promise<T> {
  return withRoot(name, options, (root) => {
    root.events.on('problem', ({ error }) => session.warnOf(error))
    return use(root)
  })
}
