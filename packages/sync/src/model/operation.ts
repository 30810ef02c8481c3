import type { ByteString } from '@lsync/posix'

/** A path relative to the root of the target (and of the upper): components joined by `/`; `''` is the root. Bytes. */
export type TreePath = ByteString

/** Everything an inode carries besides its data, raw as it is on disk: marks of overlayfs are attributes like others. */
export interface RawMeta {
  /** Permission bits, 07777. */
  readonly mode: number
  readonly uid: number
  readonly gid: number
  readonly mtimeNs: bigint
  /** Sorted by name. */
  readonly xattrs: readonly (readonly [name: ByteString, value: Uint8Array])[]
  /** chattr +i, +a (FS_IMMUTABLE_FL | FS_APPEND_FL); 0 for none. */
  readonly inodeFlags: number
}

/** Where a file holds data; between extents are holes. Offsets and lengths in bytes, ascending, not touching. */
export type Extent = readonly [offset: number, length: number]

/**
 * One change of a target. Each may be carried out twice: what a repeated one finds done is success. Paths are those of
 * the moment at which the operation runs, in the order in which operations were given. `''` is the root, which can only
 * be the path of `directory`, `keep` and `meta`.
 *
 * A move that gets in another's way goes through the stage, a directory of the target's own outside its tree: `out`
 * takes an object there under a number that is unique for the target's life, `in` brings it to its new name. All `out`
 * and `remove` of a batch are durable before its first `in` (see `Batch`), so neither can meet the other's result.
 */
export type Operation =
  /** Removes a name with all beneath it; its absence is fine. */
  | { readonly do: 'remove'; readonly path: TreePath }
  | { readonly do: 'out'; readonly path: TreePath; readonly stage: number }
  /** Replaces whatever has the name. */
  | { readonly do: 'in'; readonly stage: number; readonly path: TreePath }
  /** A move that nothing else in the batch gets in the way of; the new name is free or holds a non-directory. */
  | { readonly do: 'rename'; readonly from: TreePath; readonly to: TreePath }
  /** Makes a directory (0700, until its `meta` comes after its children); one that is there stays, all else goes. */
  | { readonly do: 'directory'; readonly path: TreePath }
  /** Removes from a directory whatever is not among `names`, of which some may be missing; its absence is fine. */
  | {
      readonly do: 'keep'
      readonly path: TreePath
      readonly names: readonly ByteString[]
      /** Only names beyond this one are looked at, by their bytes; and none beyond `last`. Absent: from the first on. */
      readonly after?: ByteString
      readonly last?: ByteString
    }
  /** A new file with the content that follows, extent by extent; replaces whatever has the name, atomically. */
  | {
      readonly do: 'file'
      readonly path: TreePath
      readonly meta: RawMeta
      readonly sizeBytes: number
      readonly extents: readonly Extent[]
    }
  /**
   * As `file`, but what the extents do not cover is taken from the file that has the name now, cut or extended to
   * `sizeBytes`; `holes` are punched. Replaces it atomically, or writes into it where it has other names (`shared`),
   * which must all see the change.
   */
  | {
      readonly do: 'patch'
      readonly path: TreePath
      readonly meta: RawMeta
      readonly sizeBytes: number
      readonly extents: readonly Extent[]
      readonly holes: readonly Extent[]
      readonly shared: boolean
    }
  /** Another name for the non-directory at `to`; replaces whatever has the name. */
  | { readonly do: 'link'; readonly path: TreePath; readonly to: TreePath }
  | { readonly do: 'symlink'; readonly path: TreePath; readonly meta: RawMeta; readonly target: ByteString }
  /** Fifo, socket, device; a whiteout is the character device 0:0. `type` is the S_IF* of its mode. */
  | {
      readonly do: 'special'
      readonly path: TreePath
      readonly meta: RawMeta
      readonly type: number
      readonly rdev: number
    }
  /** Gives what is there its metadata; for a directory after everything in it. */
  | { readonly do: 'meta'; readonly path: TreePath; readonly kind: EntryKind; readonly meta: RawMeta }

export type EntryKind = 'file' | 'directory' | 'symlink' | 'special'

/** What became of an operation that could not be carried out. The others of its batch were. */
export interface Failure {
  /** Position among the operations that came to their end in the batch: a file counts where its content ended. */
  readonly index: number
  /** The errno's name, or a code of docs/errors.md. */
  readonly code: string
  readonly path: TreePath
  readonly message: string
}
