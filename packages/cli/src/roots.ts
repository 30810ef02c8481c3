import { ContainerRoot, NodeState } from '@lsync/container-root'
import type { HostPath } from '@lsync/posix'
import type { Command } from 'commander'
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

/** Runs `use` with a root that this node knows, and closes it. */
export async function withKnownRoot<T>(
  name: string,
  options: StateOption & { readonly home?: HostPath },
  session: Session,
  use: (root: ContainerRoot) => Promise<T>,
): Promise<T> {
  const state = stateOf(options)
  const root =
    options.home === undefined
      ? await ContainerRoot.openKnown(name, { state })
      : await ContainerRoot.open(options.home, name, { state })
  root.events.on('problem', ({ error }) => {
    session.output.warning((error as Error & { code?: string }).code ?? 'BUG', error.message)
  })
  try {
    return await use(root)
  } finally {
    await root.close()
  }
}
