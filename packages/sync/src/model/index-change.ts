import type { ByteString } from '@lsync/posix'
import type { Row } from './row.ts'

/** A name of a directory of the index. */
export interface NamePlace {
  readonly directory: number
  readonly name: ByteString
}

/** A file handle (posix `FileHandle`), as plain data. */
export interface DirectoryHandle {
  readonly type: number
  readonly bytes: Buffer
}

/** What the index knows of a directory besides its row. */
export interface DirectoryRecord {
  readonly id: number
  /** 0 for the root. */
  readonly parent: number
  readonly name: ByteString
  /** 2^bits pages hold its rows. */
  readonly bits: number
  /** It is at the target, and what is in it is not known: it is to be carried there anew. */
  readonly isPending: boolean
  readonly handle: DirectoryHandle | undefined
}

/** One change of the index; a list of them is committed as one transaction, in its order. */
export type IndexChange =
  | { readonly set: 'row'; readonly directory: number; readonly row: Row }
  | { readonly set: 'no row'; readonly directory: number; readonly name: ByteString }
  | { readonly set: 'directory'; readonly record: DirectoryRecord }
  /** Pending. */
  | {
      readonly set: 'new directory'
      readonly id: number
      readonly parent: number
      readonly name: ByteString
      readonly handle: DirectoryHandle | undefined
    }
  /** A directory that has moved, with all in it. */
  | { readonly set: 'place'; readonly id: number; readonly parent: number; readonly name: ByteString }
  | { readonly set: 'pending'; readonly id: number; readonly isPending: boolean }
  /** With all beneath it that has not moved elsewhere. */
  | { readonly set: 'no directory'; readonly id: number }
  /** Rows of a directory, whose inodes have one name each; others that it has stay or go. */
  | {
      readonly set: 'pages'
      readonly directory: number
      readonly pages: readonly Uint8Array[]
      readonly keepsOthers: boolean
    }
  | { readonly set: 'blocks'; readonly id: number; readonly hashes: Uint8Array }
  | { readonly set: 'no blocks'; readonly id: number }
