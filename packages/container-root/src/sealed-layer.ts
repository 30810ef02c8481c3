import { spawn } from 'node:child_process'
import { createHash } from 'node:crypto'
import { createReadStream, createWriteStream, existsSync } from 'node:fs'
import { mkdir, mkdtemp, open, rm, stat } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { dirname } from 'node:path'
import { pipeline } from 'node:stream/promises'
import { compareTrees, convertLayer, OpenTree, OutputExistsError, type TreeDifference } from '@lsync/overlay-merge'
import {
  AT_FDCWD,
  attachLoop,
  attachMount,
  type ByteString,
  bytesOf,
  close,
  createFileSystem,
  errnoOf,
  type HostPath,
  LsyncError,
  link,
  O_DIRECTORY,
  O_RDONLY,
  openat,
  openRoot,
  printable,
  RENAME_NOREPLACE,
  randomHex,
  textOf,
  tryRename,
  tryStatAt,
  unlink,
  withFd,
} from '@lsync/posix'
import type { Changed } from './last-delta.ts'

export interface SealRequest {
  /** A kernel layer that nobody changes meanwhile. */
  readonly layer: HostPath
  /** The image to be made. It appears whole and durable, or not at all. */
  readonly image: HostPath
  /** A local directory where the image is built before it is written in one piece. Default: the system's. */
  readonly scratch?: string | undefined
  /** Go on when chattr flags are lost, which no image can hold; the report names them. */
  readonly lossy?: boolean | undefined
  /**
   * Somebody waits: compare the image as it was built, while it is being written, and not what was written (a store that garbles what
   * it is given would garble any other file as well), and compress it less. Default false.
   */
  readonly isUrgent?: boolean | undefined
  /** What is in the layer, where that is known: a small one is compared without threads. */
  readonly counts?: Changed | undefined
  readonly signal?: AbortSignal | undefined
}

export interface SealReport {
  readonly sizeBytes: number
  /** Of the image, in hex. */
  readonly sha256: string
  /** Names in the layer, the root included. */
  readonly entries: number
  /** The content of its files. */
  readonly contentBytes: number
  /** What the image lacks, in path order: chattr flags. That a file had holes is not kept either; their zeros take no space. */
  readonly losses: readonly TreeDifference[]
}

/** `mkfs.erofs` is not installed, or is none that can do this. */
export class SealToolMissingError extends LsyncError {
  constructor(cause?: unknown) {
    super('SEAL_TOOL_MISSING', 'mkfs.erofs cannot be started', {
      hint: 'install erofs-utils (Debian: apt-get install erofs-utils)',
      cause,
    })
  }
}

/** A layer could not be made into an image that shows the same. The tree is as it was. */
export class SealFailedError extends LsyncError {
  readonly differences: readonly TreeDifference[]

  constructor(layer: HostPath, why: string, differences: readonly TreeDifference[] = []) {
    super('SEAL_FAILED', `${printable(layer)} cannot be sealed: ${why}`, {
      path: layer,
      hint: 'keep this layer as a tree',
    })
    this.differences = differences
  }
}

/** The image would lack what no image can hold. */
export class SealLossyError extends LsyncError {
  readonly losses: readonly TreeDifference[]

  constructor(layer: HostPath, losses: readonly TreeDifference[]) {
    const [first] = losses
    const about = first === undefined ? '' : `${printable(first.path)} (${first.what} ${first.expected})`
    const more = losses.length > 1 ? ` and ${losses.length - 1} more` : ''
    super('SEAL_LOSSY', `an image of ${printable(layer)} would lose ${about}${more}`, {
      path: layer,
      hint: 'clear these flags with chattr, or allow losses',
    })
    this.losses = losses
  }
}

/** An image is not what its record says. */
export class LayerDamagedError extends LsyncError {
  constructor(path: string) {
    super('LAYER_DAMAGED', `${printable(path)} is not what was written: its SHA-256 differs`, {
      path,
      hint: 'restore it from a backup of the store, or roll back to another version',
    })
  }
}

// EROFS has no inode flags. Everything else that differs is a failure: erofs-utils 1.5 writes some images that cannot be read back.
const LOSABLE: ReadonlySet<string> = new Set(['flags'])
const SAID_BYTES = 4096
const PIECE_BYTES = 1024 * 1024
const DIFFERENCES = 100_000
// Compared by one thread, it takes about a third of a second; more threads would be starting while it waits for them to end.
const SMALL = { names: 5000, bytes: 64 << 20 }
/** Levels of LZ4: for 1,000 small text files the quick one takes 45 ms of CPU time instead of 75, and 5 % more bytes. */
const COMPRESSION = { quick: '-zlz4', thorough: '-zlz4hc,1' }

/**
 * Makes one EROFS image of a layer: built locally, written to `image` in one piece, mounted from there and compared with the layer
 * in all that a layer holds, content included. Whiteouts, marks, ACLs, capabilities, hard links, devices and times come through.
 * @throws {SealToolMissingError}, {SealFailedError} when the image does not show the layer (names of 255 bytes and paths
 *   beyond PATH_MAX with erofs-utils 1.5), {SealLossyError}, {OutputExistsError}
 */
export async function sealLayer(request: SealRequest): Promise<SealReport> {
  const { layer, image, counts, isUrgent = false, signal } = request
  if (tryStatAt(AT_FDCWD, image) !== undefined) throw new OutputExistsError(image)
  const scratch = await mkdtemp(`${request.scratch ?? tmpdir()}/.lsync-seal-`)
  const written = `${textOf(image)}.${randomHex(8)}.tmp`
  try {
    const built = `${scratch}/layer.erofs`
    await buildImage(layer, built, isUrgent ? COMPRESSION.quick : COMPRESSION.thorough, signal)
    await mkdir(dirname(written), { recursive: true })
    const copy = copyDurably(built, written, signal)
    // What it fails with is told once the comparison is done.
    copy.catch(() => undefined)
    if (!isUrgent) await copy
    const isSmall = counts !== undefined && counts.names <= SMALL.names && counts.bytes <= SMALL.bytes
    const compared = await compareWith(layer, bytesOf(isUrgent ? built : written) as HostPath, {
      ...(isSmall && { workers: 0 }),
      signal,
    }).finally(() => copy.catch(() => undefined))
    const sha256 = await copy
    const losses = compared.differences.filter(({ what }) => LOSABLE.has(what))
    const failures = compared.differences.filter(({ what }) => !LOSABLE.has(what))
    if (failures.length > 0) throw new SealFailedError(layer, describe(failures), failures)
    if (losses.length > 0 && request.lossy !== true) throw new SealLossyError(layer, losses)
    publish(bytesOf(written), image)
    await syncDirectoryOf(written)
    const { size } = await stat(textOf(image))
    return { sizeBytes: size, sha256, entries: compared.entries, contentBytes: compared.bytes, losses }
  } finally {
    await rm(scratch, { recursive: true, force: true })
    await rm(written, { force: true })
  }
}

/**
 * Makes the tree of a sealed layer again, in kernel form, durably; `tree` must not exist. Compared with the image.
 * @throws {LsyncError} as `convertLayer`
 */
export async function unsealLayer(request: {
  readonly image: HostPath
  readonly tree: HostPath
  readonly signal?: AbortSignal | undefined
}): Promise<{ readonly entries: number; readonly bytes: number }> {
  const { image, tree, signal } = request
  const mounted = openSealed(image)
  try {
    const { entries, bytes } = await convertLayer({
      from: `/proc/self/fd/${mounted}` as HostPath,
      fromForm: 'kernel-trusted',
      to: tree,
      toForm: 'kernel-trusted',
      ...(signal && { signal }),
    })
    return { entries, bytes }
  } finally {
    close(mounted)
  }
}

/**
 * Mounts a sealed layer nowhere: an fd of its root, which may be walked, attached (`mountSealed`) or, from Linux 6.15 on, be a lower
 * of an overlay; gone once it is closed. Without a loop device where the kernel can (6.12, files of most file systems).
 * @throws {PosixError} EUCLEAN or EINVAL for what is no EROFS image
 */
export function openSealed(image: HostPath): number {
  try {
    return createFileSystem('erofs', image, { ro: true })
  } catch (cause) {
    // ENOTBLK: an older kernel, or a file system whose files cannot be read in the way that EROFS does (tmpfs on 6.18).
    if (errnoOf(cause) !== 'ENOTBLK') throw cause
  }
  return withFd(openat(AT_FDCWD, image, O_RDONLY), (fd) => {
    const loop = attachLoop(fd)
    return withFd(loop.fd, () => createFileSystem('erofs', loop.path, { ro: true }))
  })
}

/** Mounts a sealed layer, read-only, on a directory: a lower like any other. `unmount` of posix takes it away. */
export function mountSealed(image: HostPath, target: HostPath): void {
  withFd(openSealed(image), (mounted) => attachMount(mounted, target))
}

/** Compares a layer in kernel form with the image of it. */
async function compareWith(
  layer: HostPath,
  image: HostPath,
  options: { readonly workers?: number; readonly signal: AbortSignal | undefined },
) {
  const mounted = openSealed(image)
  try {
    // The root of a detached mount is O_PATH, which cannot be read.
    const actual = openat(mounted, '.' as ByteString, O_RDONLY | O_DIRECTORY)
    const expected = openRoot(layer)
    try {
      return await compareTrees(new OpenTree(expected), new OpenTree(actual), {
        flags: true,
        limit: DIFFERENCES,
        ...options,
      })
    } finally {
      close(expected)
      close(actual)
    }
  } finally {
    close(mounted)
  }
}

async function buildImage(
  layer: HostPath,
  image: string,
  compression: string,
  signal: AbortSignal | undefined,
): Promise<void> {
  signal?.throwIfAborted()
  const directory = openRoot(layer)
  // It runs in the layer, reached by its fd: a path that is not UTF-8 cannot be an argument.
  const child = spawn('mkfs.erofs', [compression, '--preserve-mtime', '--quiet', image, '.'], {
    cwd: `/proc/self/fd/${directory}`,
    stdio: ['ignore', 'ignore', 'pipe'],
    signal,
  })
  close(directory)
  let said = ''
  child.stderr.on('data', (chunk: Buffer) => {
    said = `${said}${chunk.toString('latin1')}`.slice(-SAID_BYTES)
  })
  const code = await new Promise<number | null>((resolve, reject) => {
    child.once('error', (cause) => reject(errnoOf(cause) === 'ENOENT' ? new SealToolMissingError(cause) : cause))
    child.once('close', resolve)
  })
  signal?.throwIfAborted()
  if (code !== 0) throw new SealFailedError(layer, reasonIn(said) ?? `mkfs.erofs ended with ${code}`)
}

/** Whether there is an `mkfs.erofs` to seal with. */
export function canSeal(): boolean {
  const directories = (process.env['PATH'] ?? '').split(':')
  return directories.some((directory) => directory !== '' && existsSync(`${directory}/mkfs.erofs`))
}

/** The program's own words, the last first: `<E> erofs: …`. */
function reasonIn(said: string): string | undefined {
  const lines = said.split('\n').map((line) => line.replace(/^<E> erofs:\s*/, '').trim())
  const reasons = lines.filter((line) => line !== '').map((line) => printable(line))
  return reasons.length === 0 ? undefined : `mkfs.erofs says: ${reasons.join('; ')}`
}

/** Copies a file to where nothing is; it is durable when this resolves, and not whole when it rejects. Gives its SHA-256 in hex. */
export async function copyDurably(from: string, to: string, signal: AbortSignal | undefined): Promise<string> {
  const hash = createHash('sha256')
  await pipeline(
    createReadStream(from, { highWaterMark: PIECE_BYTES }),
    async function* (pieces: AsyncIterable<Buffer>) {
      for await (const piece of pieces) {
        hash.update(piece)
        yield piece
      }
    },
    createWriteStream(to, { flags: 'wx', mode: 0o600, highWaterMark: PIECE_BYTES, flush: true }),
    { ...(signal && { signal }) },
  )
  return hash.digest('hex')
}

/** Gives the image its name unless something has that. */
function publish(from: ByteString, to: HostPath): void {
  const code = tryRename(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE)
  if (code === undefined) return
  if (code === 'EEXIST') throw new OutputExistsError(to)
  try {
    link(AT_FDCWD, from, AT_FDCWD, to)
    unlink(AT_FDCWD, from)
  } catch (cause) {
    if (errnoOf(cause) === 'EEXIST') throw new OutputExistsError(to)
    // Neither is there: layers have names that nobody else makes, and this one was looked for.
    const renamed = tryRename(AT_FDCWD, from, AT_FDCWD, to)
    if (renamed !== undefined) throw cause
  }
}

async function syncDirectoryOf(path: string): Promise<void> {
  const directory = await open(dirname(path))
  try {
    await directory.sync()
  } catch (cause) {
    // Some FUSE file systems sync no directories.
    if (errnoOf(cause) !== 'EINVAL' && errnoOf(cause) !== 'ENOSYS' && errnoOf(cause) !== 'EIO') throw cause
  } finally {
    await directory.close()
  }
}

function describe(failures: readonly TreeDifference[]): string {
  const [first] = failures
  if (first === undefined) return ''
  const more = failures.length > 1 ? ` (and ${failures.length - 1} more)` : ''
  return `the image differs at ${printable(first.path) || 'the root'}: ${first.what} should be ${first.expected}, is ${first.actual}${more}`
}
