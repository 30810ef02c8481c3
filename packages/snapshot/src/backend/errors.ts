import { LsyncError, printable } from '@lsync/posix'

/** The storage knows us not, or lets us not do this. Another try would get the same answer. */
export class BackendDeniedError extends LsyncError {
  constructor(what: string, location: string, detail: { readonly hint?: string; readonly cause?: unknown } = {}) {
    const reason = detail.cause instanceof Error && detail.cause.message !== '' ? `: ${detail.cause.message}` : ''
    super('BACKEND_DENIED', `${what} is not allowed at ${location}${reason}`, {
      hint: 'check user, password or key, and whether the storage takes nothing but new files (append-only)',
      ...detail,
    })
  }
}

/** What answers is no storage of the kind that the address says, or a hostile one. */
export class BackendAnswerError extends LsyncError {
  constructor(what: string, location: string, reason: string, cause?: unknown) {
    super('BACKEND_ANSWER_INVALID', `${what} got an answer from ${location} that makes no sense: ${reason}`, {
      hint: 'check the address of the repository',
      cause,
    })
  }
}

/** What was given as the place of a repository is none. */
export class RepositoryAddressError extends LsyncError {
  constructor(text: string, why: string) {
    super('REPOSITORY_ADDRESS_INVALID', `${printable(withoutPassword(text))} is no repository: ${why}`, {
      hint: 'write /path, sftp://user@host:port//path, rest:https://host/path or s3:https://host/bucket/prefix',
    })
  }
}

/** An address for messages. */
export function withoutPassword(address: string): string {
  return address.replace(/(:\/\/[^/@]*?):[^/]*@/, '$1:***@')
}
