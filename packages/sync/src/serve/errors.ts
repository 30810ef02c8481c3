import { LsyncError, printable } from '@lsync/posix'

/** `lsync serve` was started with less than what the client asks for. */
export class AccessRefusedError extends LsyncError {
  constructor(path: string, access: 'read-only' | 'append-only', what: string) {
    super('ACCESS_REFUSED', `${printable(path) || 'the root'}: the server is ${access}, ${what} is refused`, {
      path,
      hint: `start \`lsync serve\` without --${access} there, if that is meant`,
    })
  }
}

/** The path of a target leads nowhere beneath what the server serves. */
export class ServedPathError extends LsyncError {
  constructor(path: string, why: string) {
    super('SERVED_PATH', `${printable(path) || '/'} is not served: ${why}`, {
      path,
      hint: 'name a directory beneath the one that `lsync serve --root` was given, by its real path, without symlinks',
    })
  }
}
