import {
  type ByteString,
  close,
  errnoOf,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_RDONLY,
  openBeneath,
  readDirents,
  type Stat,
  statFd,
  tryStatAt,
} from '@lsync/posix'
import type { Hint } from './source.ts'

/** What was found of one directory at the last look: its names in order, and a number for each that changes with it. */
interface DirectoryNode {
  readonly ino: Stat['ino']
  names: readonly ByteString[]
  prints: Float64Array
  readonly below: Map<ByteString, DirectoryNode>
}

/** A root that is looked at again and again. Remembers about 60 bytes for each name. */
export class PollTree {
  readonly #rootFd: number
  readonly #now: () => number
  #top: DirectoryNode | undefined
  #topPrint = Number.NaN

  /** `now` in milliseconds since 1970. The descriptor belongs to the caller. */
  constructor(rootFd: number, now: () => number) {
    this.#rootFd = rootFd
    this.#now = now
  }

  /**
   * Looks at every directory once; each turn of the iteration is one directory, with what is new in it since the last
   * pass. The first pass says nothing, since it has nothing to compare with.
   */
  *pass(): Generator<readonly Hint[], void, void> {
    const self = statFd(this.#rootFd)
    const print = this.#printOf(self)
    if (this.#top !== undefined && print !== this.#topPrint) yield [{ kind: 'name', directory: TOP, name: SELF }]
    this.#topPrint = print
    const isFirst = this.#top === undefined
    this.#top ??= emptyNode(self.ino)
    const waiting: { path: ByteString; node: DirectoryNode; silent: boolean }[] = [
      { path: '' as ByteString, node: this.#top, silent: isFirst },
    ]
    for (let next = waiting.pop(); next !== undefined; next = waiting.pop()) {
      const { path, node, silent } = next
      const hints: Hint[] = []
      for (const { name, isNew } of this.#look(path, node, silent ? undefined : hints)) {
        const child = node.below.get(name) as DirectoryNode
        waiting.push({ path: join(path, name), node: child, silent: silent || isNew })
      }
      yield hints
    }
  }

  /** Compares one directory with what is remembered, remembers what is there now, and gives its directories. */
  #look(path: ByteString, node: DirectoryNode, hints: Hint[] | undefined): { name: ByteString; isNew: boolean }[] {
    const directories: { name: ByteString; isNew: boolean }[] = []
    const found = this.#read(path)
    // Unreadable for now, or gone: then its parent's next look says so.
    if (found === undefined) return directories
    const before = new Map(node.names.map((name, at) => [name, node.prints[at] as number]))
    const names = [...found.keys()]
    const prints = new Float64Array(names.length)
    for (const [at, [name, stat]] of [...found].entries()) {
      const print = this.#printOf(stat)
      prints[at] = print
      const old = before.get(name)
      before.delete(name)
      const below = node.below.get(name)
      const isReplaced = below !== undefined && (!stat.isDirectory || below.ino !== stat.ino)
      if (isReplaced) node.below.delete(name)
      if (stat.isDirectory) {
        const isNew = !node.below.has(name)
        if (isNew) {
          node.below.set(name, emptyNode(stat.ino))
          hints?.push({ kind: 'tree', directory: { path: join(path, name) } })
        }
        directories.push({ name, isNew })
      }
      if (old !== print) hints?.push({ kind: 'name', directory: { path }, name })
    }
    for (const name of before.keys()) {
      node.below.delete(name)
      hints?.push({ kind: 'name', directory: { path }, name })
    }
    node.names = names
    node.prints = prints
    return directories
  }

  #read(path: ByteString): Map<ByteString, Stat> | undefined {
    let fd: number | undefined
    try {
      fd = openBeneath(this.#rootFd, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
      const directory = fd
      const found = new Map<ByteString, Stat>()
      readDirents(directory, (name) => {
        const stat = tryStatAt(directory, name)
        if (stat !== undefined) found.set(name, stat)
      })
      return found
    } catch (error) {
      // EXDEV: another file system is mounted there, which is not part of the root.
      if (['ENOENT', 'ENOTDIR', 'ELOOP', 'EACCES', 'EXDEV', 'ESTALE'].includes(errnoOf(error) ?? '')) return undefined
      throw error
    } finally {
      if (fd !== undefined) close(fd)
    }
  }

  /**
   * A number that is another one after any change. NaN, which differs from itself, while the last change is so young that
   * a later one could have the same time: network file systems keep whole seconds, by clocks of their own.
   */
  #printOf(stat: Stat): number {
    if (Number(stat.ctimeNs / 1_000_000n) > this.#now() - RACY_MS) return Number.NaN
    let [high, low] = [0x811c_9dc5, 0x1b87_3593]
    for (const value of [
      stat.mode,
      stat.uid,
      stat.gid,
      stat.nlink,
      stat.rdev,
      stat.sizeBytes,
      Number(stat.ino),
      Number(stat.ctimeNs & 0xffff_ffffn),
      Number(stat.ctimeNs >> 32n),
      Number(stat.mtimeNs & 0xffff_ffffn),
      Number(stat.mtimeNs >> 32n),
    ]) {
      high = Math.imul(high ^ (value % 0x1_0000_0000), 0x0100_0193)
      low = Math.imul(low ^ (value / 0x1_0000_0000) ^ high, 0x85eb_ca6b)
    }
    return (high >>> 0) * 0x20_0000 + ((low >>> 0) & 0x1f_ffff)
  }
}

const RACY_MS = 3000
const SELF = '.' as ByteString
const TOP = { path: '' as ByteString }

function emptyNode(ino: Stat['ino']): DirectoryNode {
  return { ino, names: [], prints: new Float64Array(0), below: new Map() }
}

function join(path: ByteString, name: ByteString): ByteString {
  return (path === '' ? name : `${path}/${name}`) as ByteString
}
