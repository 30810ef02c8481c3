import { type ByteString, bytesOf, type HostPath, LsyncError, printable } from '@lsync/posix'
import type { RemoteAddress } from '@lsync/ssh'

export type TargetAddress = { readonly scheme: 'local'; readonly path: HostPath } | RemoteAddress

/** What was given as a target is none. */
export class TargetAddressError extends LsyncError {
  constructor(text: string, why: string) {
    super('TARGET_INVALID', `${printable(bytesOf(text))} is no target: ${why}`, {
      hint: 'write /path, ssh://user@host:port/path, sftp://user@host:port/path or repo:REPOSITORY',
    })
  }
}

const URL_PARTS =
  /^(?<scheme>[a-z][a-z0-9+.-]*):\/\/(?:(?<user>[^@/]*)@)?(?<host>\[[^\]/]*\]|[^:/@[\]]*)(?::(?<port>[^/]*))?(?<path>\/.*)?$/s
// What could be taken for an option of ssh, or for a part of another word, is none.
const HOST = /^[A-Za-z0-9_](?:[A-Za-z0-9._-]*)$/
const IPV6 = /^[0-9A-Fa-f:.]+(?:%[A-Za-z0-9._-]+)?$/
const USER = /^[A-Za-z0-9_](?:[A-Za-z0-9._+-]*\$?)$/

/**
 * Reads `/path`, `ssh://user@host:port/path` or `sftp://…`. In a URL `%XX` stands for one byte; all else is UTF-8.
 * @throws {TargetAddressError}
 */
export function parseTarget(text: string): TargetAddress {
  if (text.startsWith('/')) return { scheme: 'local', path: trimmed(bytesOf(text)) as HostPath }
  const parts = URL_PARTS.exec(text)?.groups
  if (parts === undefined) throw new TargetAddressError(text, 'neither an absolute path nor a URL')
  const { scheme, user, host = '', port, path = '/' } = parts
  if (scheme !== 'ssh' && scheme !== 'sftp') throw new TargetAddressError(text, `${scheme}:// is unknown`)
  if (user?.includes(':') === true) throw new TargetAddressError(text, 'a password does not belong into a command line')
  const decodedUser = user === undefined ? undefined : decoded(user, text)
  if (decodedUser !== undefined && !USER.test(decodedUser)) throw new TargetAddressError(text, 'no such user name')
  const bare = host.startsWith('[') ? decoded(host.slice(1, -1), text) : host
  if (!(host.startsWith('[') ? IPV6 : HOST).test(bare)) throw new TargetAddressError(text, 'no such host name')
  if (port !== undefined && !/^[1-9]\d{0,4}$/.test(port)) throw new TargetAddressError(text, 'no such port')
  if (Number(port ?? 1) > 65535) throw new TargetAddressError(text, 'no such port')
  const bytes = decoded(path, text)
  if (bytes.includes('\0')) throw new TargetAddressError(text, 'a path has no NUL byte')
  if (bytes.split('/').some((name) => name === '..' || name === '.')) {
    throw new TargetAddressError(text, '`.` and `..` do not belong into the path of a target')
  }
  return {
    scheme,
    user: decodedUser,
    host: bare,
    port: port === undefined ? undefined : Number(port),
    path: trimmed(bytes),
  }
}

/** The address for people, as it may be given again. */
export function formatTarget(address: TargetAddress): string {
  if (address.scheme === 'local') return printable(address.path)
  const { scheme, user, host, port, path } = address
  const place = host.includes(':') ? `[${host}]` : host
  const bytes = [...Buffer.from(path, 'latin1')].map((byte) => {
    const character = String.fromCharCode(byte)
    return /[A-Za-z0-9/._~!$&'()*+,;=:@-]/.test(character)
      ? character
      : `%${byte.toString(16).toUpperCase().padStart(2, '0')}`
  })
  return `${scheme}://${user === undefined ? '' : `${user}@`}${place}${port === undefined ? '' : `:${port}`}${bytes.join('')}`
}

function trimmed(path: ByteString): ByteString {
  return (path.replace(/\/{2,}/g, '/').replace(/(?<=.)\/$/, '') || '/') as ByteString
}

function decoded(text: string, whole: string): ByteString {
  if (/%(?![0-9A-Fa-f]{2})/.test(text)) throw new TargetAddressError(whole, 'a % is not followed by two hex digits')
  return bytesOf(text).replace(/%([0-9A-Fa-f]{2})/g, (_, hex: string) =>
    String.fromCharCode(Number.parseInt(hex, 16)),
  ) as ByteString
}
