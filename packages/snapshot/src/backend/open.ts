import { bytesOf, hostPath, printable } from '@lsync/posix'
import type { SshOptions } from '@lsync/ssh'
import type { Backend } from './backend.ts'
import { RepositoryAddressError } from './errors.ts'
import { LocalBackend } from './local.ts'
import { RestBackend } from './rest.ts'
import type { RemoteOptions } from './retries.ts'
import { S3Backend, type S3Options } from './s3.ts'
import { SftpBackend } from './sftp.ts'

/** What an address does not say. */
export interface BackendOptions extends RemoteOptions {
  /** Keys and known_hosts for SFTP. */
  readonly ssh?: SshOptions
  /** A program that is started instead of ssh2, with its arguments: `ssh -J jump`. */
  readonly rsh?: string
  readonly s3?: Pick<S3Options, 'region' | 'style'>
  /** For REST servers whose address has none. */
  readonly rest?: { readonly username?: string; readonly password?: string }
  /** PEM of the certificates to trust instead of the authorities that Node knows. */
  readonly ca?: string
}

/**
 * The backend at an address as restic writes it: `/path` (or `local:/path`), `sftp:user@host:path`,
 * `sftp://user@host:port//path`, `rest:https://host/path`, `s3:https://host/bucket/prefix`. Nothing is connected yet.
 * @throws {RepositoryAddressError}
 */
export function openBackend(address: string, options: BackendOptions = {}): Backend {
  const [, scheme, rest = ''] = /^([a-z][a-z0-9]*):(.*)$/s.exec(address) ?? []
  const { s3, rest: login, ssh, rsh, ca, ...remote } = options
  switch (scheme) {
    case undefined:
      return openLocal(address, address)
    case 'local':
      return openLocal(rest, address)
    case 'sftp':
      return new SftpBackend(rest, { ...remote, ssh, rsh })
    case 'rest':
      return new RestBackend(rest, { ...remote, ...login, ca })
    case 's3':
      return new S3Backend(rest, { ...remote, ...s3, ca })
    default:
      throw new RepositoryAddressError(address, `${printable(bytesOf(scheme))}: is unknown`)
  }
}

/** The path in the address of a repository in a directory, which may be relative; `undefined` for all others. */
export function localPathIn(address: string): string | undefined {
  if (address.startsWith('local:')) return address.slice('local:'.length)
  return /^[a-z][a-z0-9]*:/.test(address) ? undefined : address
}

function openLocal(path: string, address: string): LocalBackend {
  if (!path.startsWith('/')) throw new RepositoryAddressError(address, 'a path here is absolute')
  return new LocalBackend(hostPath(path))
}
