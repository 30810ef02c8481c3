import type { ByteString } from '@lsync/posix'
import type { EntryPath } from './path.ts'

/** One extended attribute: its full name with the namespace prefix, and its raw value. */
export interface Xattr {
  readonly name: ByteString
  readonly value: Uint8Array
}

/** What every inode carries. `mode` holds the permission bits (07777) only; times are ns since 1970. */
export interface Meta {
  readonly mode: number
  readonly uid: number
  readonly gid: number
  readonly atimeNs: bigint
  readonly mtimeNs: bigint
  /** Every attribute that is not an overlay mark, sorted by name: user, trusted, security, POSIX ACLs. */
  readonly xattrs: readonly Xattr[]
}

/** How a whiteout is stored: a character device 0:0, or an empty file with `NS.whiteout`. They mean the same. */
export type WhiteoutForm = 'device' | 'xattr'

/** Names of one inode share a number that is unique within their layer; `undefined` where there is only one name. */
export type LinkGroup = string

/** One name in one layer as that layer stores it, before any merging. */
export type Entry =
  | {
      readonly kind: 'file'
      readonly path: EntryPath
      readonly meta: Meta
      readonly sizeBytes: number
      readonly linkGroup?: LinkGroup
      /** Only metadata is here; the data is below, under `redirect` or else the same name. */
      readonly metacopy?: { readonly redirect?: Redirect; readonly digest?: Uint8Array }
    }
  | {
      readonly kind: 'directory'
      readonly path: EntryPath
      readonly meta: Meta
      readonly opaque: boolean
      readonly redirect?: Redirect
    }
  | {
      readonly kind: 'symlink'
      readonly path: EntryPath
      readonly meta: Meta
      readonly target: ByteString
      readonly linkGroup?: LinkGroup
    }
  | {
      readonly kind: 'special' // fifo, socket, character or block device
      readonly path: EntryPath
      readonly meta: Meta
      readonly type: 'fifo' | 'socket' | 'character' | 'block'
      readonly rdev: number
      readonly linkGroup?: LinkGroup
    }
  | { readonly kind: 'whiteout'; readonly path: EntryPath; readonly form: WhiteoutForm }

/** The raw value of `NS.redirect` up to its first NUL: one component, or `/` and components. */
export type Redirect = ByteString & { readonly redirect: true }
