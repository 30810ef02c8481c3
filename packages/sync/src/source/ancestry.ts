import {
  close,
  type FileHandle,
  handleKey,
  mountedHandleAt,
  O_DIRECTORY,
  O_PATH,
  openat,
  openByHandle,
  PosixError,
} from '@lsync/posix'

/** Which of the watched roots a directory lies beneath; often the same array for many directories. */
export type Owners<Root> = readonly Root[]

export interface AncestryLimits {
  /** Directories that are remembered; at the limit all are forgotten. About 150 bytes each. */
  readonly directories: number
  /** How far a directory's ancestors are looked at. One that lies deeper is said to be beneath every root. */
  readonly depth: number
}

const LIMITS: AncestryLimits = { directories: 32_768, depth: 256 }

/**
 * Says beneath which roots the directories of one mount lie, by their handles. A directory that is not known yet is opened
 * by its handle, and its parents are followed until one is known: a root's own handle, or the top of the mount. No path is
 * compared, so renames of the roots' own ancestors change nothing.
 *
 * Answers are those of the moment at which they are first asked for. Whoever reads the events of a move after it happened,
 * and tells `moved` of each, gets answers that are right about everything but moves whose events are still to come.
 */
export class Ancestry<Root> {
  readonly #mountFd: number
  readonly #mountId: number
  readonly #limits: AncestryLimits
  readonly #roots = new Map<string, Root[]>()
  readonly #known = new Map<string, Owners<Root>>()
  #everybody: Owners<Root> = []

  /** `mountFd` is any open directory of the mount, not O_PATH; it belongs to the caller. */
  constructor(mountFd: number, mountId: number, limits: AncestryLimits = LIMITS) {
    this.#mountFd = mountFd
    this.#mountId = mountId
    this.#limits = limits
  }

  add(key: string, root: Root): void {
    this.#roots.set(key, [...(this.#roots.get(key) ?? []), root])
    this.#changed()
  }

  remove(key: string, root: Root): void {
    const left = (this.#roots.get(key) ?? []).filter((each) => each !== root)
    if (left.length === 0) this.#roots.delete(key)
    else this.#roots.set(key, left)
    this.#changed()
  }

  #changed(): void {
    this.#known.clear()
    this.#everybody = [...this.#roots.values()].flat()
  }

  /** All roots. */
  get everybody(): Owners<Root> {
    return this.#everybody
  }

  /** The roots whose own directory this is. */
  rootsAt(key: string): Owners<Root> {
    return this.#roots.get(key) ?? NOBODY
  }

  /** A directory has got another parent; `undefined` when it is not known which one. */
  moved(directory: FileHandle | undefined): void {
    // Whatever is known is known with all of its ancestors, so beneath an unknown directory nothing is known.
    if (directory === undefined || this.#known.has(handleKey(directory))) this.#known.clear()
  }

  forget(): void {
    this.#known.clear()
  }

  ownersOf(directory: FileHandle): Owners<Root> {
    const key = handleKey(directory)
    return this.#known.get(key) ?? this.#find(directory, key)
  }

  #find(directory: FileHandle, key: string): Owners<Root> {
    // Out of descriptors or memory: the answer is unknown, and too many hints are harmless.
    let fd: number | undefined
    try {
      fd = openByHandle(this.#mountFd, directory, O_PATH | O_DIRECTORY)
      if (fd === undefined) return this.#remember([key], NOBODY)
      const below: string[] = []
      for (let at = key; ; ) {
        below.push(at)
        const parent = mountedHandleAt(fd, PARENT)
        const parentKey = parent === undefined || parent.mountId !== this.#mountId ? at : handleKey(parent.handle)
        // The top of a file system is its own parent.
        if (parentKey === at) return this.#remember(below, NOBODY)
        const known = this.#known.get(parentKey)
        if (known !== undefined) return this.#remember(below, known)
        // Only the lower half is remembered so: what lies higher is the parent of others, which are not that deep.
        if (below.length >= this.#limits.depth) return this.#remember(below.slice(0, below.length / 2), this.#everybody)
        const up = openat(fd, PARENT, O_PATH | O_DIRECTORY)
        close(fd)
        fd = up
        at = parentKey
      }
    } catch (error) {
      if (!(error instanceof PosixError)) throw error
      // Beneath a bind mount, what lies outside has no way up that this mount could go. Not remembered: its ancestors are
      // not known, so `moved` could not tell when that ends.
      if (error.code === 'ENOENT' || error.code === 'ESTALE') return NOBODY
      return this.#everybody
    } finally {
      if (fd !== undefined) close(fd)
    }
  }

  /** `keys` from the bottom up; `above` are the owners of what lies over the last of them. */
  #remember(keys: readonly string[], above: Owners<Root>): Owners<Root> {
    if (this.#known.size + keys.length > this.#limits.directories) this.#known.clear()
    let owners = above
    for (const key of keys.toReversed()) {
      const own = this.#roots.get(key)
      if (own !== undefined && owners !== this.#everybody) owners = [...own, ...owners]
      this.#known.set(key, owners)
    }
    return owners
  }
}

const PARENT = '..' as Parameters<typeof openat>[1]
const NOBODY: readonly never[] = []
