import { LsyncError } from '@lsync/posix'

/** No connection came about: the network, or the machine at its end. Trying again later may help. */
export class ConnectError extends LsyncError {
  constructor(where: string, reason: string, cause?: unknown) {
    super('CONNECT_FAILED', `no connection to ${where}: ${reason}`, {
      hint: 'see that the machine is up, and that its sshd is reachable at that port',
      cause,
    })
  }
}

/** Nobody has said yet which key the other machine has. Nothing was sent to it. */
export class HostKeyUnknownError extends LsyncError {
  constructor(where: string, fingerprint: string, isByAuthority: boolean) {
    const why = isByAuthority ? ', and certificates of hosts are not understood' : ''
    super('HOST_KEY_UNKNOWN', `the host key of ${where} is not in known_hosts${why}; it shows ${fingerprint}`, {
      hint: isByAuthority
        ? 'use --rsh ssh, or add the key itself to known_hosts'
        : 'compare that fingerprint on the machine itself, then connect once with ssh to add it to known_hosts',
    })
  }
}

/** The other machine shows another key than before: it was set up anew, or somebody stands between. Nothing was sent. */
export class HostKeyChangedError extends LsyncError {
  constructor(where: string, fingerprint: string) {
    super('HOST_KEY_CHANGED', `the host key of ${where} is not the one in known_hosts; it shows ${fingerprint}`, {
      hint: 'find out why before anything else; if the machine was set up anew, remove its line (ssh-keygen -R)',
    })
  }
}

/** The key that the other machine shows is marked as stolen. Nothing was sent to it. */
export class HostKeyRevokedError extends LsyncError {
  constructor(where: string, fingerprint: string) {
    super('HOST_KEY_REVOKED', `the host key of ${where} is revoked in known_hosts: ${fingerprint}`, {
      hint: 'do not connect; whoever has that key can pretend to be the machine',
    })
  }
}

/** The other machine lets us in with none of the keys that there are. */
export class AuthenticationError extends LsyncError {
  constructor(where: string, tried: readonly string[]) {
    const keys = tried.length === 0 ? 'there is no key to try' : `tried: ${tried.join(', ')}`
    super('AUTHENTICATION_FAILED', `${where} does not let us in (${keys})`, {
      hint: 'start an ssh-agent and add a key (ssh-add), name a key with --identity, or use --rsh ssh',
    })
  }
}

/** A file with a private key cannot be used. */
export class IdentityError extends LsyncError {
  constructor(path: string, reason: string) {
    super('IDENTITY_UNUSABLE', `the key ${path} cannot be used: ${reason}`, {
      hint: 'add it to an ssh-agent (ssh-add) if it has a passphrase, or name another one with --identity',
    })
  }
}

/** There is no lsync on the other machine, or not where it was looked for. */
export class RemoteLsyncMissingError extends LsyncError {
  constructor(where: string, said: string) {
    super('REMOTE_LSYNC_MISSING', `there is no lsync on ${where}${said === '' ? '' : `: ${said}`}`, {
      hint: 'install it there, name it with --remote-lsync, or use sftp:// as far as that goes',
    })
  }
}

/** What was started to reach the other side ended before anything could be said. */
export class RemoteCommandError extends LsyncError {
  constructor(where: string, reason: string) {
    super('REMOTE_COMMAND_FAILED', `the command for ${where} failed: ${reason}`, {
      hint: 'run it by hand to see more',
    })
  }
}
