import { LsyncError, printable } from '@lsync/posix'

/** One operation is larger than any that travels: its path, its attributes, or its extents. */
export class OperationTooBigError extends LsyncError {
  constructor(path: string, what: string, limit: number) {
    super('OPERATION_TOO_BIG', `${printable(path) || 'the root'}: ${what} exceeds ${limit}`, {
      path,
      hint: 'exclude it, or make it smaller',
    })
  }
}

/** Both sides are lsync, but no version of the protocol is known to both. */
export class ProtocolVersionError extends LsyncError {
  constructor(lowest: number, highest: number) {
    super('PROTOCOL_VERSION', `the other lsync speaks the versions ${lowest} to ${highest} of the protocol`, {
      hint: 'install the newer lsync on both sides',
    })
  }
}
