import {
  type ByteString,
  close,
  DT_BLK,
  DT_CHR,
  DT_DIR,
  DT_FIFO,
  DT_LNK,
  DT_REG,
  DT_SOCK,
  DT_UNKNOWN,
  errnoOf,
  getXattr,
  type HostPath,
  listXattrs,
  O_DIRECTORY,
  O_NOFOLLOW,
  openBeneath,
  openRoot,
  PosixError,
  readDirents,
  S_IFBLK,
  S_IFCHR,
  S_IFDIR,
  S_IFIFO,
  S_IFLNK,
  S_IFREG,
  S_IFSOCK,
  type Stat,
  statAt,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import type { Redirect } from './model/entry.ts'
import { MARKS, type MarkNames, type Namespace, opaqueMeaning, parseRedirect } from './model/marks.ts'
import { type EntryPath, join, type Name, ROOT } from './model/path.ts'

/** A layer directory held open: every path in it is opened beneath `fd`. */
export interface Layer {
  readonly path: HostPath
  readonly fd: number
  readonly marks: MarkNames
}

/** Opens a layer by its host path. Close it with `closeLayer`. */
export function openLayer(path: HostPath, namespace: Namespace): Layer {
  return { path, fd: openRoot(path), marks: MARKS[namespace] }
}

export function closeLayer(layer: Layer): void {
  close(layer.fd)
}

/** One name of one layer as it is stored, with what its marks say. */
export interface RawEntry {
  readonly name: Name
  /** A DT_* constant, never DT_UNKNOWN. */
  readonly type: number
  readonly whiteout?: 'device' | 'xattr'
  /** Directories: whether the merge ends here. */
  readonly opaque: boolean
  readonly redirect?: Redirect
  /** The redirect's value is one the kernel refuses: lookup fails with this errno. */
  readonly badRedirect?: 'EINVAL' | 'EACCES'
  /** Files: only metadata is here. The value is empty, or a header with an fs-verity digest. */
  readonly metacopy?: Uint8Array
  /** The names of all attributes, marks included. */
  readonly attributes: readonly ByteString[]
  /** There where it was needed to tell what the entry is, or asked for. */
  readonly stat?: Stat
}

const TYPE_OF_MODE: Readonly<Record<number, number>> = {
  [S_IFSOCK]: DT_SOCK,
  [S_IFLNK]: DT_LNK,
  [S_IFREG]: DT_REG,
  [S_IFBLK]: DT_BLK,
  [S_IFDIR]: DT_DIR,
  [S_IFCHR]: DT_CHR,
  [S_IFIFO]: DT_FIFO,
}

/** The DT_* constant of a stat. */
export function typeOf(stat: Stat): number {
  return TYPE_OF_MODE[stat.type] ?? DT_UNKNOWN
}

/**
 * What `name` in an open layer directory is. `type` comes from readdir where the caller has it. Costs one listxattr,
 * and a stat only where the type does not tell.
 * Source: kernel overlayfs.rst; overlay-format "whiteouts", "opaque directories", "redirects", "metacopy".
 */
export function inspect(dirfd: number, name: Name, type: number, marks: MarkNames, wantStat = false): RawEntry {
  let stat: Stat | undefined
  if (type === DT_UNKNOWN || type === DT_CHR || wantStat) {
    stat = statAt(dirfd, name)
    type = typeOf(stat)
    if (stat.isWhiteoutDevice) return { name, type, whiteout: 'device', opaque: false, attributes: NONE, stat }
  }
  const attributes = listXattrs(dirfd, name)
  const base = stat === undefined ? { name, type, attributes } : { name, type, attributes, stat }
  if (!attributes.some((attribute) => attribute.startsWith(marks.prefix))) return { ...base, opaque: false }
  if (type === DT_DIR) {
    const opaque = attributes.includes(marks.opaque) && opaqueMeaning(getXattr(dirfd, name, marks.opaque)) === 'closed'
    return { ...base, opaque, ...redirectOf(dirfd, name, attributes, marks) }
  }
  if (type !== DT_REG) return { ...base, opaque: false }
  if (attributes.includes(marks.whiteout)) {
    stat ??= statAt(dirfd, name)
    if (stat.sizeBytes === 0) return { ...base, whiteout: 'xattr', opaque: false, stat }
  }
  if (!attributes.includes(marks.metacopy)) return { ...base, opaque: false }
  const metacopy = getXattr(dirfd, name, marks.metacopy) ?? Buffer.alloc(0)
  return { ...base, opaque: false, metacopy, ...redirectOf(dirfd, name, attributes, marks) }
}

const NONE: readonly ByteString[] = []

function redirectOf(
  dirfd: number,
  name: Name,
  attributes: readonly ByteString[],
  marks: MarkNames,
): Pick<RawEntry, 'redirect' | 'badRedirect'> {
  if (!attributes.includes(marks.redirect)) return {}
  const value = getXattr(dirfd, name, marks.redirect)
  if (value === undefined) return {}
  const parsed = parseRedirect(value)
  return parsed.ok ? { redirect: parsed.redirect } : { badRedirect: parsed.errno }
}

/** As `inspect`, for a name that may be absent. Names too long for the layer's file system are absent. */
export function tryInspect(dirfd: number, name: Name, marks: MarkNames): RawEntry | undefined {
  let stat: Stat | undefined
  try {
    stat = tryStatAt(dirfd, name)
  } catch (error) {
    if (errnoOf(error) === 'ENAMETOOLONG') return undefined
    throw error
  }
  if (stat === undefined) return undefined
  if (stat.isWhiteoutDevice) {
    return { name, type: DT_CHR, whiteout: 'device', opaque: false, attributes: NONE, stat }
  }
  return { ...inspect(dirfd, name, typeOf(stat), marks), stat }
}

/** The names of an open directory with their types, sorted by bytes. */
export function sortedDirents(dirfd: number): { name: Name; type: number }[] {
  const entries: { name: Name; type: number }[] = []
  readDirents(dirfd, (name, type) => entries.push({ name: name as string as Name, type }))
  return entries.sort(byName)
}

/** The names of some directories that lie between two of them, each sorted by bytes. */
export interface NameRange {
  readonly lists: readonly (readonly { name: Name; type: number }[])[]
  readonly includes: (name: string) => boolean
}

// So many names are held at a time, of all directories that are read together.
const RANGE_NAMES = 1 << 16
const SAMPLES_A_RANGE = 64

/**
 * The names of open directories with their types, in byte order and a range of about `most` names at a time, so that a
 * directory of a million names takes no more memory than one of some ten thousand. Such a directory is read once for
 * each range.
 */
export function* nameRanges(fds: readonly number[], most = RANGE_NAMES): Generator<NameRange> {
  const whole = listWithin(fds, undefined, most)
  if (whole !== undefined) {
    yield { lists: whole, includes: () => true }
    return
  }
  const bounds = sampleNames(fds, Math.max(1, Math.floor(most / SAMPLES_A_RANGE)))
  let first = ''
  for (let at = SAMPLES_A_RANGE; ; at += SAMPLES_A_RANGE) {
    const [from, next] = [first, bounds[at]]
    const includes = (name: string) => name >= from && (next === undefined || name < next)
    yield { lists: listWithin(fds, includes) as NameRange['lists'], includes }
    if (next === undefined) return
    first = next
  }
}

function sampleNames(fds: readonly number[], every: number): Name[] {
  const sample: Name[] = []
  let count = 0
  for (const fd of fds) {
    readDirents(fd, (name) => {
      if (count++ % every === 0) sample.push(name as string as Name)
    })
  }
  return sample.sort()
}

/** The names that `includes` wants (all, without it), unless they are more than `most`. */
function listWithin(
  fds: readonly number[],
  includes: ((name: string) => boolean) | undefined,
  most = Number.POSITIVE_INFINITY,
): NameRange['lists'] | undefined {
  let count = 0
  const lists = fds.map((fd) => {
    const entries: { name: Name; type: number }[] = []
    readDirents(fd, (name, type) => {
      if (includes?.(name) === false) return true
      entries.push({ name: name as string as Name, type })
      return ++count <= most
    })
    return entries
  })
  if (count > most) return undefined
  for (const entries of lists) entries.sort(byName)
  return lists
}

function byName(left: { name: string }, right: { name: string }): number {
  return left.name < right.name ? -1 : 1
}

/** Opens a directory of a layer for reading. */
export function openLayerDirectory(layer: Layer, path: EntryPath): number {
  try {
    return openBeneath(layer.fd, path, O_DIRECTORY | O_NOFOLLOW)
  } catch (error) {
    if (!(error instanceof PosixError)) throw error
    throw new PosixError(error.code, { syscall: error.syscall ?? 'openat2', path: `${layer.path}/${path}` })
  }
}

const MANY_NAMES = 1000
const LOOK_DIRECTORIES = 48

/**
 * Whether a layer has so many entries that a merge of it is worth a second thread. Looks at a few directories at most,
 * in less than a millisecond; what it cannot read it leaves to those who say so better.
 */
export function hasManyEntries(layer: Layer): boolean {
  let names = 0
  const pending: EntryPath[] = [ROOT]
  try {
    for (let looked = 0; looked < LOOK_DIRECTORIES; looked++) {
      const path = pending.pop()
      if (path === undefined) return false
      withFd(openLayerDirectory(layer, path), (fd) =>
        readDirents(fd, (name, type) => {
          names++
          if (type === DT_DIR) pending.push(join(path, name))
          return names < MANY_NAMES
        }),
      )
      if (names >= MANY_NAMES) return true
    }
    return pending.length > 0
  } catch (error) {
    if (error instanceof PosixError) return false
    throw error
  }
}
