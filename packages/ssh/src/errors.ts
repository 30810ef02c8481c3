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

/** The other side of a connection sent what the protocol does not allow. The connection is of no use any more. */
export class ProtocolError extends LsyncError {
  constructor(reason: string, detail: ErrorDetail = {}) {
    super('PROTOCOL_VIOLATED', `the other side broke the protocol: ${reason}`, {
      hint: 'run the same version of lsync on both sides, and see that nothing but lsync writes to its standard output',
      ...detail,
    })
  }
}
