import { type ErrorDetail, LsyncError } from '@lsync/posix'

/** An open connection ended, or nothing comes over it any more. What was not answered may or may not have been done. */
export class ConnectionLostError extends LsyncError {
  constructor(reason: string, detail: ErrorDetail = {}) {
    super('CONNECTION_LOST', `the connection was lost: ${reason}`, {
      hint: 'it is made again by itself while sync runs; otherwise start again',
      ...detail,
    })
  }
}
