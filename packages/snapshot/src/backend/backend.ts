import { type HostPath, LsyncError } from '@lsync/posix'

/** The kinds of files in a repository. Source: restic's design document, "Repository Layout". */
export type FileKind = 'config' | 'key' | 'lock' | 'snapshot' | 'index' | 'pack'

export const FILE_KINDS: readonly FileKind[] = ['config', 'key', 'lock', 'snapshot', 'index', 'pack']

/** One file of a repository. `name` is the SHA-256 of its content in hexadecimal, and `''` for the config. */
export interface FileRef {
  readonly kind: FileKind
  readonly name: string
}

/** A file as a listing shows it. */
export interface ListedFile {
  readonly name: string
  readonly sizeBytes: number
}

/** A part of a file. What lies beyond the end is left out. */
export interface ByteRange {
  readonly offset: number
  readonly length: number
}

export interface BackendCall {
  readonly signal?: AbortSignal | undefined
  /** A pack is read for the trees in it: it is worth keeping on this machine. */
  readonly isForTrees?: boolean
}

/**
 * Where the files of a repository lie. Files are written once, under names that follow from their content, and never
 * changed, so every call may be repeated. All calls may run at the same time as others, of this process or another.
 *
 * An implementation retries what is worth it, and throws `BackendError` (or a `PosixError`) when it gives up.
 * `test/conformance/backend.ts` is the law in detail.
 */
export interface Backend {
  /** For messages; without passwords. */
  readonly location: string
  /** How many calls are worth having in flight. */
  readonly concurrency: number
  /** How long after a put it may take until every client's listing shows the file. */
  readonly settleMs: number
  /** The directory that its files lie in (`pathOf`), where this machine can read them with plain calls. */
  readonly directory?: HostPath
  /** Makes what files can be put into, where that is needed; nothing happens when it is there. */
  create(call?: BackendCall): Promise<void>
  /** Every file of a kind, each once, in any order. Names that no repository has (temporary files) are left out. */
  list(kind: FileKind, call?: BackendCall): AsyncIterable<ListedFile>
  /** `undefined` when there is no such file. */
  stat(file: FileRef, call?: BackendCall): Promise<{ readonly sizeBytes: number } | undefined>
  /**
   * The content or a part of it.
   * @throws {FileMissingError} {FileTooLargeError} for more than `MAX_FILE_BYTES`
   */
  get(file: FileRef, range?: ByteRange, call?: BackendCall): Promise<Buffer>
  /**
   * Writes a whole file. When it resolves, the file is durable, and at no time did anybody see a part of it. A file of
   * that name is replaced; with `exclusive` it is left alone, and the answer is `false`, as far as the storage can tell.
   */
  put(file: FileRef, content: Uint8Array, call?: BackendCall & { readonly exclusive?: boolean }): Promise<boolean>
  /** `false` when there was no such file. */
  delete(file: FileRef, call?: BackendCall): Promise<boolean>
  /**
   * Removes what interrupted writes left behind and no listing shows. Only while nobody else writes. Returns how many
   * files. Absent where nothing can be left.
   */
  tidy?(call?: BackendCall): Promise<number>
  /** Ends connections. No call may be under way, or follow. */
  close(): Promise<void>
}

/** Where a file lies beneath the root of a repository, components joined by `/`. */
export function pathOf({ kind, name }: FileRef): string {
  if (kind === 'config') return 'config'
  if (kind === 'pack') return `data/${name.slice(0, 2)}/${name}`
  return `${DIRECTORIES[kind]}/${name}`
}

export const DIRECTORIES: Readonly<Record<Exclude<FileKind, 'config'>, string>> = {
  key: 'keys',
  lock: 'locks',
  snapshot: 'snapshots',
  index: 'index',
  pack: 'data',
}

/**
 * No file of a repository is longer. What claims to be is not read: its bytes would all have to be held at once. restic
 * makes packs of at most 128 MiB and a chunk, indexes of 50,000 objects, and the others are smaller.
 */
export const MAX_FILE_BYTES: Readonly<Record<FileKind, number>> = {
  config: 1 << 20,
  key: 1 << 20,
  lock: 1 << 20,
  snapshot: 64 << 20,
  index: 512 << 20,
  pack: 512 << 20,
}

/**
 * How many bytes a `get` brings, of a file of this size if that is known.
 * @throws {FileTooLargeError}
 */
export function lengthToRead(file: FileRef, location: string, range?: ByteRange, sizeBytes = Infinity): number {
  const limitBytes = MAX_FILE_BYTES[file.kind]
  const length = Math.min(Math.max(0, sizeBytes - (range?.offset ?? 0)), range?.length ?? Infinity)
  if (length > limitBytes && length < Infinity) throw new FileTooLargeError(file, location, length, limitBytes)
  return Math.min(length, limitBytes)
}

/** Whether a listed name can be that of a repository's file. */
export function isFileName(name: string): boolean {
  return /^[0-9a-f]{64}$/.test(name)
}

/** For messages: `pack 1a2b…`. */
export function describeFile({ kind, name }: FileRef): string {
  return kind === 'config' ? 'the config' : `${kind} ${name.slice(0, 8)}`
}

/** A file that something refers to is not in the repository. */
export class FileMissingError extends LsyncError {
  constructor(file: FileRef, location: string, cause?: unknown) {
    super('REPOSITORY_FILE_MISSING', `${describeFile(file)} is not in ${location}`, {
      path: pathOf(file),
      hint: 'see `lsync snapshot check`',
      cause,
    })
  }
}

/** A file claims to be longer than any that a repository has; reading it whole could take all memory. */
export class FileTooLargeError extends LsyncError {
  constructor(file: FileRef, location: string, sizeBytes: number, limitBytes: number) {
    super(
      'REPOSITORY_FILE_TOO_LARGE',
      `${describeFile(file)} in ${location} has ${sizeBytes} bytes, and none has more than ${limitBytes}`,
      { path: pathOf(file), hint: 'see `lsync snapshot check`; somebody may have tampered with the repository' },
    )
  }
}

/** The storage refused or could not be reached, after all retries. */
export class BackendError extends LsyncError {
  constructor(what: string, location: string, detail: { readonly hint?: string; readonly cause?: unknown } = {}) {
    const reason = detail.cause instanceof Error && detail.cause.message !== '' ? `: ${detail.cause.message}` : ''
    super('BACKEND_FAILED', `${what} failed at ${location}${reason}`, {
      hint: 'check the connection and try again',
      ...detail,
    })
  }
}
