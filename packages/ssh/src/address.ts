import type { ByteString } from '@lsync/posix'

/** A place on another machine. */
export interface RemoteAddress {
  readonly scheme: 'ssh' | 'sftp'
  readonly user: string | undefined
  /** Name or number; an IPv6 address without brackets. */
  readonly host: string
  readonly port: number | undefined
  /** Absolute, without a slash at its end; `/` for the root. */
  readonly path: ByteString
}
