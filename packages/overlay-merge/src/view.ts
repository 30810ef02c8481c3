import {
  type ByteString,
  close,
  DT_DIR,
  getInodeFlags,
  type HostPath,
  listsAcls,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  openat,
  openBeneath,
  readSymlink,
  realPath,
  type Stat,
  statAt,
  statFd,
} from '@lsync/posix'
import { PROTECTION, resultMeta } from './effects.ts'
import { openRegular, readXattrs } from './encodings/inode.ts'
import type { Xattr } from './model/entry.ts'
import { components, type EntryPath, type Name, ROOT, split } from './model/path.ts'
import { protectedFlags } from './plan.ts'
import { type Directory, type Found, layerAt, lookup, OpenSources, type Source, type Stack } from './resolve.ts'
import { inspect, openLayerDirectory, type RawEntry, sortedDirents, tryInspect } from './scan.ts'
import type { StackRequest } from './stack.ts'

/** A request whose paths are absolute and free of symlinks: journals lie beside what they really name. */
export function realStack<T extends StackRequest & { readonly workdir?: HostPath }>(request: T): T {
  const { upper, lowers, data, workdir } = request
  return {
    ...request,
    upper: realPath(upper),
    lowers: lowers.map(realPath),
    ...(data === undefined ? {} : { data: data.map(realPath) }),
    ...(workdir === undefined ? {} : { workdir: realPath(workdir) }),
  }
}

/** What a view shows under a name that is there. */
export type Present = Extract<Found, { kind: 'directory' | 'object' }>

/** The root of what the layers from `top` on show together: 0 is the whole view, 1 what lies beneath the upper. */
export function rootFrom(stack: Stack, top: number): Directory {
  const sources: Source[] = []
  for (let layer = top; layer < stack.layers.length; layer++) sources.push({ layer, path: ROOT })
  return { path: ROOT, sources, open: stack.below ? ROOT : undefined }
}

/** A merged directory without what the layers above `top` have in it. */
export function beneath(directory: Directory, top: number): Directory {
  return { ...directory, sources: directory.sources.filter(({ layer }) => layer >= top) }
}

/**
 * One directory of the merged view, read without a mount. Each of its source directories is listed once, which also
 * tells without a system call which names it lacks. Close it with `close`.
 */
export class ViewDirectory {
  readonly directory: Directory
  readonly #stack: Stack
  readonly #opened: OpenSources
  readonly #types = new Map<number, Map<Name, number>>()
  readonly #known = new Map<string, RawEntry | undefined>()

  constructor(stack: Stack, directory: Directory) {
    this.#stack = stack
    this.directory = directory
    this.#opened = new OpenSources(stack)
  }

  /** The names that some source lists, sorted. Only candidates: `find` says whether a name is there. */
  candidates(): Name[] {
    const { sources } = this.directory
    if (sources.length === 1) return [...this.#typesOf(sources[0] as Source).keys()]
    const names = new Set<Name>()
    for (const source of sources) for (const name of this.#typesOf(source).keys()) names.add(name)
    return [...names].sort()
  }

  /** The names that the topmost source lists, sorted: whiteouts too. */
  topCandidates(): Name[] {
    const top = this.directory.sources[0]
    return top === undefined ? [] : [...this.#typesOf(top).keys()]
  }

  /** What the kernel's lookup finds for a name. */
  find(name: Name): Found {
    this.#known.clear()
    return lookup(this.#stack, this.directory, name, (source, wanted) => this.#inspect(source, wanted))
  }

  /** What the lookup would find if the topmost source did not have the name. */
  findBeneath(name: Name): Found {
    const [, ...sources] = this.directory.sources
    return lookup(this.#stack, { ...this.directory, sources }, name, (source, wanted) => this.#inspect(source, wanted))
  }

  /** What the topmost source itself has under a name. */
  raw(name: Name): RawEntry | undefined {
    const top = this.directory.sources[0]
    return top === undefined ? undefined : this.#inspect(top, name)
  }

  /** The fd of the topmost source; it stays open until `close`. */
  get topFd(): number {
    return this.#opened.fd(this.directory.sources[0] as Source)
  }

  /** Whether anything shows in it. */
  isEmpty(): boolean {
    return this.candidates().every((name) => this.find(name).kind === 'absent')
  }

  /** Where the inode lies that gives a name its metadata: beneath an fd that is open until `close`. */
  locate(found: Present): { readonly source: Source; readonly dirfd: number; readonly name: Name } {
    const source = found.kind === 'directory' ? (found.directory.sources[0] as Source) : found.source
    // A name's first hit is always a child of one of the sources: only deeper layers are searched elsewhere.
    const parent = this.directory.sources.find(({ layer }) => layer === source.layer) as Source
    return { source, dirfd: this.#opened.fd(parent), name: found.top.name }
  }

  /** What a name of this directory shows, to be read on demand. Valid until `close`. */
  shown(found: Present): ShownInode {
    const { source, dirfd } = this.locate(found)
    return new LayerInode(this.#stack, dirfd, found, source)
  }

  close(): void {
    this.#opened.close()
  }

  #inspect(source: Source, name: Name): RawEntry | undefined {
    const isOwn = this.directory.sources.some(({ layer, path }) => layer === source.layer && path === source.path)
    const { marks } = layerAt(this.#stack, source.layer)
    if (!isOwn) {
      const fd = openLayerDirectory(layerAt(this.#stack, source.layer), source.path)
      try {
        return tryInspect(fd, name, marks)
      } finally {
        close(fd)
      }
    }
    const type = this.#typesOf(source).get(name)
    if (type === undefined) return undefined
    const key = `${source.layer}:${name}`
    if (this.#known.has(key)) return this.#known.get(key)
    const entry = inspect(this.#opened.fd(source), name, type, marks)
    this.#known.set(key, entry)
    return entry
  }

  #typesOf(source: Source): Map<Name, number> {
    let types = this.#types.get(source.layer)
    if (types === undefined) {
      types = new Map(sortedDirents(this.#opened.fd(source)).map(({ name, type }) => [name, type]))
      this.#types.set(source.layer, types)
    }
    return types
  }
}

/** Where a path leads from a directory of a view. */
export function walkTo(stack: Stack, from: Directory, path: EntryPath): Found {
  let found: Found = { kind: 'directory', top: ROOT_ENTRY, directory: from }
  for (const name of components(path)) {
    if (found.kind === 'broken') return found
    if (found.kind !== 'directory') return { kind: 'absent', covered: false }
    const opened = new OpenSources(stack)
    try {
      found = lookup(stack, found.directory, name, (source, wanted) => opened.inspect(source, wanted))
    } finally {
      opened.close()
    }
  }
  return found
}

const ROOT_ENTRY: RawEntry = { name: '' as Name, type: DT_DIR, opaque: false, attributes: [] }

/** An inode as a view shows it: what `compareInodes` compares. */
export interface ShownInode {
  readonly stat: Stat
  /** All attributes as the view shows them: no marks, escaped names one level up; sorted. */
  readonly xattrs: readonly Xattr[]
  /** Symlinks. */
  readonly target: ByteString
  /** Names with the same key are one inode. */
  readonly group: string
  /** chattr(1) flags, those of the file system's own included; 0 for what has none. */
  readonly flags: number
  /** Of those the immutable and append-only ones, as the view shows them: also those that an upper emulates. */
  readonly protection: number
  /** Opens the bytes of a file for reading. Close it. */
  openData(): number
}

/** An inode of a plain or mounted tree. */
export class TreeInode implements ShownInode {
  readonly stat: Stat
  readonly #dirfd: number
  readonly #name: ByteString | ''
  readonly #emulated: number

  constructor(dirfd: number, name: ByteString | '', stat: Stat, emulated = 0) {
    this.#dirfd = dirfd
    this.#name = name
    this.#emulated = emulated
    this.stat = stat
  }

  get xattrs(): readonly Xattr[] {
    return readXattrs(this.#dirfd, this.#name)
  }

  get target(): ByteString {
    return readSymlink(this.#dirfd, this.#name as ByteString)
  }

  get group(): string {
    return `${this.stat.dev}:${this.stat.ino}`
  }

  get flags(): number {
    return flagsOf(this.#dirfd, this.#name, this.stat)
  }

  get protection(): number {
    return this.#emulated | (this.stat.isProtected ? this.flags & PROTECTION : 0)
  }

  openData(): number {
    return openRegular(this.#dirfd, this.#name as ByteString).fd
  }
}

function flagsOf(dirfd: number, name: ByteString | '', stat: Stat): number {
  if (!stat.isFile && !stat.isDirectory) return 0
  const fd = openat(dirfd, (name === '' ? '.' : name) as ByteString, O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
  try {
    return getInodeFlags(fd)
  } finally {
    close(fd)
  }
}

/** An inode of the resolved view: metadata from its own layer, bytes from wherever a metacopy has them. */
class LayerInode implements ShownInode {
  readonly #stack: Stack
  readonly #dirfd: number
  readonly #found: Present
  readonly #source: Source
  #stat: Stat | undefined

  constructor(stack: Stack, dirfd: number, found: Present, source: Source) {
    this.#stack = stack
    this.#dirfd = dirfd
    this.#found = found
    this.#source = source
  }

  get #name(): Name {
    return this.#found.top.name
  }

  get stat(): Stat {
    this.#stat ??= this.#found.top.stat ?? statAt(this.#dirfd, this.#name)
    return this.#stat
  }

  get xattrs(): readonly Xattr[] {
    if (this.#found.top.attributes.length === 0 && listsAcls(this.#dirfd)) return []
    const { marks } = layerAt(this.#stack, this.#source.layer)
    return resultMeta(this.#dirfd, this.#name, this.stat, marks, true).xattrs
  }

  get target(): ByteString {
    return readSymlink(this.#dirfd, this.#name)
  }

  get group(): string {
    return `${this.#source.layer}:${this.stat.dev}:${this.stat.ino}`
  }

  get flags(): number {
    return flagsOf(this.#dirfd, this.#name, this.stat)
  }

  get protection(): number {
    const { marks } = layerAt(this.#stack, this.#source.layer)
    const { attributes } = this.#found.top
    const emulated = this.#source.layer === 0 ? protectedFlags(this.#dirfd, this.#name, attributes, marks) : 0
    return emulated | (this.stat.isProtected ? this.flags & PROTECTION : 0)
  }

  openData(): number {
    const data = this.#found.kind === 'object' ? this.#found.data : this.#source
    if (data.layer === 'below') throw new Error('the data lies below the stack')
    if (data === this.#source || (data.layer === this.#source.layer && data.path === this.#source.path)) {
      return openRegular(this.#dirfd, this.#name).fd
    }
    return openSourceFile(this.#stack, { layer: data.layer, path: data.path })
  }
}

/** Opens a regular file of a layer for reading, wherever it lies. */
export function openSourceFile(stack: Stack, source: Source): number {
  const { parent, name } = split(source.path)
  const fd = openBeneath(layerAt(stack, source.layer).fd, parent, O_DIRECTORY | O_NOFOLLOW)
  try {
    return openRegular(fd, name).fd
  } finally {
    close(fd)
  }
}

/** The root (or any directory) of a resolved view as an inode: what its topmost source says. */
export function shownDirectory(stack: Stack, directory: Directory): ShownInode {
  const top = directory.sources[0] as Source
  const layer = layerAt(stack, top.layer)
  const fd = openLayerDirectory(layer, top.path)
  try {
    const stat = statFd(fd)
    const { xattrs } = resultMeta(fd, '', stat, layer.marks, true)
    const flags = getInodeFlags(fd)
    const protection = flags & PROTECTION
    return { stat, xattrs, target: '' as ByteString, group: '', flags, protection, openData: () => -1 }
  } finally {
    close(fd)
  }
}
