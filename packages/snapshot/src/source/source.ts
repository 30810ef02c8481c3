import type { StackInit } from '@lsync/overlay-merge'
import type { ByteString, Ino } from '@lsync/posix'
import type { Xattr } from '../model/tree.ts'
import { DirectorySource } from './directory.ts'
import { StackSource } from './stack.ts'

/** What a source says of one inode; a `Stat` of posix is one. */
export interface EntryState {
  /** As `st_mode`. */
  readonly mode: number
  readonly nlink: number
  readonly uid: number
  readonly gid: number
  readonly ino: Ino
  readonly sizeBytes: number
  /** Major number in the upper 32 bits' place, as `Stat.dev`. */
  readonly dev: number
  readonly rdev: number
  readonly mtimeNs: bigint
  readonly ctimeNs: bigint
  /** Something is mounted here: what lies beneath belongs to another file system. */
  readonly isMountRoot?: boolean
}

/** A name as a listing has it. */
export interface SourceName {
  readonly name: ByteString
  readonly isFile: boolean
}

/** An open directory of a source. Synchronous; errors are `PosixError`. */
export interface SourceDirectory {
  /** What is known of the directory itself. */
  readonly state: EntryState
  readonly ownXattrs: readonly Xattr[]
  /** Its names, in any order. `isFile`: it is certain to be a regular file, as far as a listing can tell. */
  entries(): SourceName[]
  /** `undefined` when the name is gone. Symlinks are not followed. */
  stateOf(name: ByteString): EntryState | undefined
  /** In the file system's order. Symlinks are not followed. */
  xattrs(name: ByteString): readonly Xattr[]
  readLink(name: ByteString): ByteString
  /** Opens a file for reading. Never waits for a fifo or device that came in its place. */
  openFile(name: ByteString): SourceFile
  close(): void
}

/** An open file of a source. */
export interface SourceFile {
  /** Its content. */
  readonly fd: number
  /** What is known of it now: asked before and after reading, it tells whether the file held still. */
  state(): EntryState
  /** In the file system's order. */
  xattrs(): readonly Xattr[]
  close(): void
}

/**
 * What a snapshot is made from, as one thread sees it. Each thread makes its own from a `SourceInit`, which can be sent to a
 * worker.
 */
export interface Source {
  /** `path`: components beneath the root joined by `/`, `''` for the root. No symlink is followed. */
  openDirectory(path: ByteString | ''): SourceDirectory
}

/** What a source is, in a form that travels. File descriptors belong to the process, so their numbers do. */
export type SourceInit =
  | { readonly kind: 'directory'; readonly fd: number }
  /** What a mount of these layers would show. */
  | { readonly kind: 'stack'; readonly stack: StackInit }

/** The source that an init describes. */
export function openSource(init: SourceInit): Source {
  switch (init.kind) {
    case 'directory':
      return new DirectorySource(init.fd)
    case 'stack':
      return new StackSource(init.stack)
  }
}
