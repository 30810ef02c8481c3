import type { ByteString, FileHandle, HostPath } from '@lsync/posix'

/** A directory as a source knows it: by handle (fanotify), or by its path relative to the root (all others). */
export type DirectoryRef = { readonly handle: FileHandle } | { readonly path: ByteString }

/**
 * What a source says. Only a hint: the truth is what lstat finds and how it differs from the index. Too many are fine, a
 * missing one is not.
 */
export type Hint =
  /** Something of one name may have changed, its existence included. `.` is the directory itself. */
  | {
      readonly kind: 'name'
      readonly directory: DirectoryRef
      readonly name: ByteString
      /** What had the name then, if it is no directory and the source knows: by now the name may be gone, or another's. */
      readonly object?: FileHandle
    }
  /** An object moved; either end may be absent where it lies outside what is watched. */
  | {
      readonly kind: 'move'
      readonly from?: { readonly directory: DirectoryRef; readonly name: ByteString }
      readonly to?: { readonly directory: DirectoryRef; readonly name: ByteString }
    }
  /** All names in a directory and beneath it may have changed: a directory that has appeared, a rescan. */
  | { readonly kind: 'tree'; readonly directory: DirectoryRef }
  /** The queue overflowed or the watch was interrupted: anything may have changed. */
  | { readonly kind: 'lost'; readonly reason: string }

/** What a kind of source cannot see, in one sentence for people. */
export interface BlindSpot {
  readonly code: string
  readonly message: string
}

/** Something that tells of changes beneath one root. */
export interface Source {
  readonly kind: 'fanotify' | 'chokidar' | 'poll'
  readonly blindSpots: readonly BlindSpot[]
  /**
   * Begins to watch; resolves when every later change is seen. Hints come synchronously one by one; `handle` must be
   * quick. May be called once.
   */
  start(handle: (hint: Hint) => void): Promise<void>
  /** Everything that happened before the call has been handed to `handle` when it resolves. */
  drain(): Promise<void>
  stop(): Promise<void>
}

export interface SourceRequest {
  readonly root: HostPath
  /** Open directory of the root; belongs to the caller. */
  readonly rootFd: number
  readonly choice: 'auto' | Source['kind']
  /** How often `poll` looks at every directory. */
  readonly pollIntervalMs: number
  /**
   * Leaves fanotify's queue at the kernel's limit (fs.fanotify.max_queued_events): kernel memory is bounded, and a burst
   * can end in `lost`. Without it the queue is as long as it must be.
   */
  readonly boundedQueue?: boolean
}
