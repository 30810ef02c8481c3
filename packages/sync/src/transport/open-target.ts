import type { Namespace } from '@lsync/overlay-merge'
import type { ByteString } from '@lsync/posix'
import { type RemoteAddress, type SshConnections, serveCommand, spawnRemote } from '@lsync/ssh'
import { formatTarget } from './address.ts'
import { RemoteTarget } from './remote.ts'
import { SftpTarget } from './sftp.ts'
import type { Target } from './target.ts'

/** How machines are reached. */
export interface RemoteOptions {
  /** Shared by all targets of a process. */
  readonly connections: SshConnections
  /** A program that is started instead of ssh2, with its arguments: `ssh -J jump`. */
  readonly rsh?: string
  /** lsync on the other machine; found by its shell if this is just a name. */
  readonly remoteLsync?: string
  readonly compress?: boolean | 'auto'
  /** What is kept on an SFTP server: a tree without what SFTP has no words for, or a portable layer that has all. */
  readonly sftpForm?: 'tree' | 'portable'
  /** Whose marks a portable layer means. Default `trusted`. */
  readonly namespace?: Namespace
  /** A silence of this long means that the connection is lost. */
  readonly timeoutMs?: number
  /** Longest time that one request may take there, a barrier included. */
  readonly answerTimeoutMs?: number
}

const DEFAULT_TIMEOUT_MS = 60_000
const DEFAULT_ANSWER_TIMEOUT_MS = 900_000

/** The target at an address on another machine. Nothing is connected before it is opened. */
export function remoteTarget(address: RemoteAddress, options: RemoteOptions): Target {
  const { connections, rsh, remoteLsync = 'lsync', compress = 'auto' } = options
  if (address.scheme === 'sftp') {
    return new SftpTarget({
      description: formatTarget(address),
      path: address.path,
      connect: (signal) =>
        rsh === undefined
          ? connections.subsystem(address, 'sftp', signal)
          : Promise.resolve(spawnRemote(rsh, address, { subsystem: 'sftp' }, signal)),
      timeoutMs: options.timeoutMs ?? DEFAULT_TIMEOUT_MS,
      form: options.sftpForm ?? 'tree',
      namespace: options.namespace ?? 'trusted',
    })
  }
  const command = serveCommand(remoteLsync)
  return new RemoteTarget({
    description: formatTarget(address),
    path: address.path.slice(1) as ByteString,
    connect: (signal) =>
      rsh === undefined
        ? connections.execute(address, command, signal)
        : Promise.resolve(spawnRemote(rsh, address, { command }, signal)),
    compress,
    timeoutMs: options.timeoutMs ?? DEFAULT_TIMEOUT_MS,
    answerTimeoutMs: options.answerTimeoutMs ?? DEFAULT_ANSWER_TIMEOUT_MS,
  })
}
