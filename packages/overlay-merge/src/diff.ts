import { close, DT_DIR, DT_REG, DT_UNKNOWN } from '@lsync/posix'
import { compareInodes, compareMetadata, type Discrepancy, kindOf } from './compare.ts'
import { type EntryPath, join, type Name, ROOT, split } from './model/path.ts'
import type { Progress } from './planning.ts'
import { type Directory, type Found, layerAt, type Stack } from './resolve.ts'
import { inspect, openLayerDirectory, type RawEntry, sortedDirents } from './scan.ts'
import { closeStack, openStack, type StackRequest } from './stack.ts'
import { type Present, rootFrom, type ShownInode, shownDirectory, ViewDirectory, walkTo } from './view.ts'

export interface DiffRequest extends StackRequest {
  /** Compare bytes where size and time do not tell, or tell too much. Default false. */
  readonly content?: boolean
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: Progress) => void
}

/**
 * What became of a name. `modified`: the object itself (bytes, target, device number); `metadata`: only what is about
 * it; `type`: another kind of object; `unreadable`: the kernel answers an error for it.
 */
export type Change = 'added' | 'removed' | 'modified' | 'metadata' | 'type' | 'renamed' | 'unreadable'

/** One name whose view differs from what the lowers alone show. */
export interface Difference {
  readonly path: EntryPath
  readonly change: Change
  /** Renamed: what the lowers call it. */
  readonly from?: EntryPath
  /**
   * What differs: `mode`, `owner`, `times`, `size`, `content`, `target`, `device`, `xattr NAME`; for a type
   * `file -> directory`; for what came or went its kind.
   */
  readonly what: readonly string[]
  /** Files: the size now, and the size below. */
  readonly sizeBytes?: number
  readonly belowBytes?: number
}

/**
 * What an upper changed against the layers below it, in path order: each directory before its content, names by bytes;
 * where a renamed directory took the place of another, that one goes first, with all that was in it.
 * Without `content` a file counts as modified when its size or mtime differs (as rsync judges), with it when a byte
 * does. Reads only; cost follows the upper, and what it removed.
 */
export async function* diff(request: DiffRequest): AsyncIterable<Difference> {
  const stack = openStack(request, false)
  try {
    const walk = new DiffWalk(stack, request.content === true)
    let turn = performance.now()
    let done = 0
    for (const difference of walk.run()) {
      if (performance.now() - turn > TURN_MS) {
        await new Promise(setImmediate)
        request.signal?.throwIfAborted()
        request.onProgress?.({ phase: 'scan', done })
        turn = performance.now()
      }
      if (difference === undefined) continue
      done++
      yield difference
    }
  } finally {
    closeStack(stack)
  }
}

const TURN_MS = 20

/** A directory in which the upper has something, and what it is compared with. */
interface Changed {
  readonly view: Directory
  /** The lowers' directory that it was, under whatever name. */
  readonly base: Directory | undefined
  /** Whether the two merge, so that names which the upper lacks are as they were. */
  readonly merges: boolean
}

type Item =
  | { readonly kind: 'difference'; readonly difference: Difference }
  | { readonly kind: 'changed'; readonly changed: Changed }
  | { readonly kind: 'gone'; readonly path: EntryPath; readonly base: Directory }

class DiffWalk {
  readonly #stack: Stack
  readonly #content: boolean
  readonly #lower: Directory
  /** Paths of the lowers' view that the upper shows under another name. */
  readonly #moved: ReadonlySet<EntryPath>

  constructor(stack: Stack, content: boolean) {
    this.#stack = stack
    this.#content = content
    this.#lower = rootFrom(stack, 1)
    this.#moved = stack.followRedirects ? movedPaths(stack) : new Set()
  }

  /** The differences; `undefined` now and then, so that a caller gets its turn. */
  *run(): Generator<Difference | undefined> {
    const root = rootFrom(this.#stack, 0)
    const [now, before] = [shownDirectory(this.#stack, root), shownDirectory(this.#stack, this.#lower)]
    const what = compareMetadata(before, now).map((discrepancy) => discrepancy.what)
    if (what.length > 0) yield { path: ROOT, change: 'metadata', what }
    const stack: Item[] = [{ kind: 'changed', changed: { view: root, base: this.#lower, merges: true } }]
    for (let item = stack.pop(); item !== undefined; item = stack.pop()) {
      if (item.kind === 'difference') {
        yield item.difference
        continue
      }
      const items = item.kind === 'changed' ? this.#changed(item.changed) : this.#gone(item.path, item.base)
      for (let i = items.length - 1; i >= 0; i--) stack.push(items[i] as Item)
      yield undefined
    }
  }

  #changed(changed: Changed): Item[] {
    const view = new ViewDirectory(this.#stack, changed.view)
    const base = changed.base === undefined ? undefined : new ViewDirectory(this.#stack, changed.base)
    try {
      const own = new Set(view.topCandidates())
      const hidden = changed.merges || base === undefined ? [] : base.candidates()
      const items: Item[] = []
      for (const name of [...new Set([...own, ...hidden])].sort()) {
        const before = base?.find(name) ?? ABSENT
        const found = own.has(name) ? view.find(name) : ABSENT
        this.#compare({ changed, view, base, name, path: join(changed.view.path, name) }, found, before, items)
      }
      return items
    } finally {
      view.close()
      base?.close()
    }
  }

  #compare(at: At, found: Found, before: Found, items: Item[]): void {
    const moved = at.changed.base !== undefined && this.#moved.has(join(at.changed.base.path, at.name))
    const was = isPresent(before) && !moved ? before : undefined
    switch (found.kind) {
      case 'absent':
        if (was !== undefined) this.#removed(at, was, items)
        return
      case 'broken':
        items.push(difference({ path: at.path, change: 'unreadable', what: [`${found.errno}: ${found.why}`] }))
        return
      case 'directory':
        this.#directory(at, found, was, before, items)
        return
      case 'object':
        this.#object(at, found, was, before, items)
    }
  }

  #removed(at: At, was: Present, items: Item[]): void {
    const inode = (at.base as ViewDirectory).shown(was)
    items.push(difference({ path: at.path, change: 'removed', ...kind(inode, 'belowBytes') }))
    if (was.kind === 'directory') items.push({ kind: 'gone', path: at.path, base: was.directory })
  }

  #directory(
    at: At,
    found: Extract<Found, { kind: 'directory' }>,
    was: Present | undefined,
    before: Found,
    items: Item[],
  ): void {
    const { path } = at
    const inode = at.view.shown(found)
    const origin = this.#originOf(at, found.top)
    const source = origin?.redirected === true ? walkTo(this.#stack, this.#lower, origin.path) : undefined
    if (source?.kind === 'directory' && origin !== undefined) {
      if (was !== undefined) this.#removed(at, was, items)
      const what = words(compareMetadata(shownDirectory(this.#stack, source.directory), inode))
      items.push(difference({ path, change: 'renamed', from: origin.path, what }))
      items.push({ kind: 'changed', changed: { view: found.directory, base: source.directory, merges: true } })
      return
    }
    const merges = origin?.redirected === false && before.kind === 'directory'
    const base = merges ? before : was
    if (base?.kind === 'directory') {
      const what = words(compareMetadata((at.base as ViewDirectory).shown(base), inode))
      if (what.length > 0) items.push(difference({ path, change: 'metadata', what }))
      items.push({ kind: 'changed', changed: { view: found.directory, base: base.directory, merges } })
      return
    }
    if (base === undefined) items.push(difference({ path, change: 'added', ...kind(inode, 'sizeBytes') }))
    else items.push(difference(typeChange(path, (at.base as ViewDirectory).shown(base), inode)))
    items.push({ kind: 'changed', changed: { view: found.directory, base: undefined, merges: false } })
  }

  #object(
    at: At,
    found: Extract<Found, { kind: 'object' }>,
    was: Present | undefined,
    before: Found,
    items: Item[],
  ): void {
    const { path } = at
    const inode = at.view.shown(found)
    const renamed = this.#movedFrom(at, found, inode)
    if (renamed !== undefined) {
      if (was !== undefined) this.#removed(at, was, items)
      items.push(difference(renamed))
      return
    }
    // A file whose old content moved away under another name is compared with nothing, unless it is that content.
    const base = was ?? (isPresent(before) && isSameData(found, before) ? before : undefined)
    if (base === undefined) {
      items.push(difference({ path, change: 'added', ...kind(inode, 'sizeBytes') }))
      return
    }
    const below = (at.base as ViewDirectory).shown(base)
    if (below.stat.type !== inode.stat.type) {
      items.push(difference(typeChange(path, below, inode)))
      if (base.kind === 'directory') items.push({ kind: 'gone', path, base: base.directory })
      return
    }
    const isKnownSame = isSameData(found, base)
    const what = words(compareInodes(below, inode, { content: this.#content && !isKnownSame }))
    if (what.length === 0) return
    const isModified = what.some((word) => OF_THE_OBJECT.has(word))
    // Without reading, a new time is all that tells of new bytes.
    const isSuspect = !this.#content && !isKnownSame && inode.stat.isFile && what.includes('times')
    const change = isModified || isSuspect ? 'modified' : 'metadata'
    items.push(difference({ path, change, what, ...sizes(inode, below) }))
  }

  /** With what of the lowers' view a directory of the upper merges; `undefined`: with nothing. */
  #originOf(at: At, top: RawEntry): { path: EntryPath; redirected: boolean } | undefined {
    if (top.opaque) return undefined
    const { base, merges } = at.changed
    const parent = merges ? base?.path : undefined
    const plain = parent === undefined ? undefined : join(parent, at.name)
    const origin = top.redirect === undefined ? plain : redirectedTo(top.redirect, parent)
    return origin === undefined ? undefined : { path: origin, redirected: origin !== plain }
  }

  /** A metacopy that was renamed, against its old name; a further name of a file that is still there is none. */
  #movedFrom(at: At, found: Extract<Found, { kind: 'object' }>, inode: ShownInode): Difference | undefined {
    if (found.top.metacopy === undefined || found.top.redirect === undefined) return undefined
    const { base, merges } = at.changed
    const from = redirectedTo(found.top.redirect, merges ? base?.path : undefined)
    if (from === undefined || from === at.path || !this.#moved.has(from)) return undefined
    const still = walkTo(this.#stack, rootFrom(this.#stack, 0), from)
    if (still.kind === 'object' && isSameData(still, found)) return undefined
    const { parent, name } = split(from)
    const directory = walkTo(this.#stack, this.#lower, parent)
    if (directory.kind !== 'directory') return undefined
    const view = new ViewDirectory(this.#stack, directory.directory)
    try {
      const before = view.find(name)
      if (before.kind !== 'object') return undefined
      const below = view.shown(before)
      const what = words(compareMetadata(below, inode))
      return { path: at.path, change: 'renamed', from, what, ...sizes(inode, below) }
    } finally {
      view.close()
    }
  }

  #gone(path: EntryPath, base: Directory): Item[] {
    const view = new ViewDirectory(this.#stack, base)
    try {
      const items: Item[] = []
      for (const name of view.candidates()) {
        if (this.#moved.has(join(base.path, name))) continue
        const found = view.find(name)
        if (!isPresent(found)) continue
        const child = join(path, name)
        items.push(difference({ path: child, change: 'removed', ...kind(view.shown(found), 'belowBytes') }))
        if (found.kind === 'directory') items.push({ kind: 'gone', path: child, base: found.directory })
      }
      return items
    } finally {
      view.close()
    }
  }
}

/** One name at work. */
interface At {
  readonly changed: Changed
  readonly view: ViewDirectory
  readonly base: ViewDirectory | undefined
  readonly name: Name
  readonly path: EntryPath
}

const ABSENT: Found = { kind: 'absent', covered: false }
const OF_THE_OBJECT = new Set(['size', 'content', 'target', 'device'])

function isPresent(found: Found): found is Present {
  return found.kind === 'directory' || found.kind === 'object'
}

function isSameData(left: Found, right: Found): boolean {
  if (left.kind !== 'object' || right.kind !== 'object') return false
  return left.data.layer === right.data.layer && left.data.path === right.data.path
}

function difference(found: Difference): Item {
  return { kind: 'difference', difference: found }
}

function words(found: readonly Discrepancy[]): string[] {
  return found.map(({ what }) => what)
}

function kind(inode: ShownInode, field: 'sizeBytes' | 'belowBytes'): Pick<Difference, 'what'> & Partial<Difference> {
  return { what: [kindOf(inode.stat)], ...(inode.stat.isFile ? { [field]: inode.stat.sizeBytes } : {}) }
}

function sizes(now: ShownInode, below: ShownInode): Partial<Difference> {
  return {
    ...(now.stat.isFile ? { sizeBytes: now.stat.sizeBytes } : {}),
    ...(below.stat.isFile ? { belowBytes: below.stat.sizeBytes } : {}),
  }
}

function typeChange(path: EntryPath, below: ShownInode, now: ShownInode): Difference {
  const what = [`${kindOf(below.stat)} -> ${kindOf(now.stat)}`]
  return { path, change: 'type', what, ...sizes(now, below) }
}

/** The path that a redirect in a directory that merges with `parent` names. */
function redirectedTo(redirect: string, parent: EntryPath | undefined): EntryPath | undefined {
  if (redirect.startsWith('/')) return redirect.slice(1) as EntryPath
  return parent === undefined ? undefined : join(parent, redirect as string as Name)
}

/** Every path of the lowers' view that a redirect of the upper names, and that is not its own name. */
function movedPaths(stack: Stack): Set<EntryPath> {
  const upper = layerAt(stack, 0)
  const moved = new Set<EntryPath>()
  const pending: { path: EntryPath; origin: EntryPath | undefined }[] = [{ path: ROOT, origin: ROOT }]
  for (let at = pending.pop(); at !== undefined; at = pending.pop()) {
    const { path, origin } = at
    const fd = openLayerDirectory(upper, path)
    try {
      for (const { name, type } of sortedDirents(fd)) {
        if (type !== DT_DIR && type !== DT_REG && type !== DT_UNKNOWN) continue
        const entry = inspect(fd, name, type, upper.marks)
        const plain = origin === undefined ? undefined : join(origin, name)
        const to = entry.opaque
          ? undefined
          : entry.redirect === undefined
            ? plain
            : redirectedTo(entry.redirect, origin)
        if (to !== undefined && to !== plain && (entry.type === DT_DIR || entry.metacopy !== undefined)) moved.add(to)
        if (entry.type === DT_DIR) pending.push({ path: join(path, name), origin: to })
      }
    } finally {
      close(fd)
    }
  }
  return moved
}
