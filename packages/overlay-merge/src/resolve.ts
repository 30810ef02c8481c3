import { close, DT_DIR, DT_REG } from '@lsync/posix'
import { components, type EntryPath, join, type Name, ROOT, split } from './model/path.ts'
import { type Layer, openLayerDirectory, type RawEntry, tryInspect } from './scan.ts'

/**
 * Layers to be read as one view, top first. `below` says that something unknown lies beneath the last one (the result
 * stays a layer); then lookups tell with which path of it they would go on. `data` are data-only layers.
 */
export interface Stack {
  readonly layers: readonly Layer[]
  readonly data: readonly Layer[]
  readonly below: boolean
  /** Whether the mount would follow redirects: not with userxattr. */
  readonly followRedirects: boolean
}

/** A directory in one layer. */
export interface Source {
  readonly layer: number
  readonly path: EntryPath
}

/** A directory of the merged view: the directories that merge in it, top first, and where the layers below join. */
export interface Directory {
  readonly path: EntryPath
  readonly sources: readonly Source[]
  /** Its path in what lies below the stack; `undefined` when nothing from there shows (the directory is closed). */
  readonly open: EntryPath | undefined
}

/** Where the bytes of a file are: in a layer (`data` counts on after `layers`), or below the stack under a path. */
export type DataSource = Source | { readonly layer: 'below'; readonly path: EntryPath }

/** What a name of the merged view is. */
export type Found =
  /** Nothing shows. `covered`: a whiteout (or a non-directory in the way) says so, and must go on saying it. */
  | { readonly kind: 'absent'; readonly covered: boolean }
  | { readonly kind: 'directory'; readonly top: RawEntry; readonly directory: Directory }
  /** Anything else. `data` is where a metacopy's bytes are; it is `source` itself for a full file. */
  | { readonly kind: 'object'; readonly top: RawEntry; readonly source: Source; readonly data: DataSource }
  /** The kernel answers this errno for the name. */
  | { readonly kind: 'broken'; readonly errno: 'EIO' | 'EPERM' | 'EINVAL' | 'EACCES'; readonly why: string }

/** The root of the view. */
export function rootDirectory(stack: Stack): Directory {
  return {
    path: ROOT,
    sources: stack.layers.map((_, layer) => ({ layer, path: ROOT })),
    open: stack.below ? ROOT : undefined,
  }
}

/** Opened source directories, so that many names of one directory cost one open a layer. */
export class OpenSources {
  readonly #fds = new Map<string, number>()
  readonly #stack: Stack

  constructor(stack: Stack) {
    this.#stack = stack
  }

  /** The fd of a source directory, kept until `close`. */
  fd(source: Source): number {
    const key = `${source.layer}:${source.path}`
    let fd = this.#fds.get(key)
    if (fd === undefined) {
      fd = openLayerDirectory(layerAt(this.#stack, source.layer), source.path)
      this.#fds.set(key, fd)
    }
    return fd
  }

  /** What `name` in a source directory is. */
  inspect(source: Source, name: Name): RawEntry | undefined {
    return tryInspect(this.fd(source), name, layerAt(this.#stack, source.layer).marks)
  }

  close(): void {
    for (const fd of this.#fds.values()) close(fd)
    this.#fds.clear()
  }
}

/** A layer by its index; data-only layers count on after the others. */
export function layerAt(stack: Stack, index: number): Layer {
  const layer = stack.layers[index] ?? stack.data[index - stack.layers.length]
  if (layer === undefined) throw new RangeError(`no layer ${index}`)
  return layer
}

/** Reads one name of one directory of one layer; the fast path hands in what readdir already told. */
export type Inspect = (source: Source, name: Name) => RawEntry | undefined

interface Lookup {
  target: string
  absolute: boolean
  stop: boolean
  isDirectory: boolean
  metacopy: boolean
  readonly inspect: Inspect
  broken?: Extract<Found, { kind: 'broken' }>
  covered: boolean
}

/**
 * What the kernel's lookup finds for `name` in a merged directory: the same walk through the layers with the same
 * stops, redirects and metacopies. Lookup is the authority; a readdir list is only a list of candidates.
 * Source: fs/overlayfs/namei.c of Linux 6.18 as observed; overlay-format "redirects", "metacopy", "merge algebra".
 */
export function lookup(stack: Stack, parent: Directory, name: Name, inspect: Inspect): Found {
  const source = parent.sources[0]
  if (source === undefined) return { kind: 'absent', covered: false }
  // Most names are a whole file or a whiteout in the topmost layer, where the walk would end, too.
  const first = inspect(source, name)
  if (first?.whiteout !== undefined) return COVERED
  if (first !== undefined && first.type !== DT_DIR && first.metacopy === undefined) {
    const own = { layer: source.layer, path: join(source.path, name) }
    return { kind: 'object', top: first, source: own, data: own }
  }
  return walk(stack, parent, name, (at, wanted) => (at === source && wanted === name ? first : inspect(at, wanted)))
}

const COVERED: Found = { kind: 'absent', covered: true }

function walk(stack: Stack, parent: Directory, name: Name, inspect: Inspect): Found {
  const state: Lookup = {
    target: name,
    absolute: false,
    stop: false,
    isDirectory: false,
    metacopy: false,
    inspect,
    covered: false,
  }
  const last = stack.layers.length - 1
  const sources: Source[] = []
  let top: RawEntry | undefined
  let data: DataSource | undefined
  let at = -1
  while (!state.stop) {
    const base = nextSource(parent, state.absolute, at, last)
    if (base === undefined) break
    at = base.layer
    const hit = lookupInLayer(stack, state, base)
    if (state.broken !== undefined) return state.broken
    if (hit === undefined) continue
    top ??= hit.entry
    const path = hit.path
    if (hit.entry.type === DT_DIR) sources.push({ layer: at, path })
    else {
      sources.push({ layer: at, path })
      data = { layer: at, path }
    }
    if (state.target !== name && !stack.followRedirects && !(state.metacopy && stack.data.length > 0)) {
      if (hit.entry.redirect !== undefined && hasMore(parent, state.absolute, at, last, stack)) {
        return { kind: 'broken', errno: 'EPERM', why: 'a redirect, which a userxattr mount does not follow' }
      }
    }
  }
  const open = state.stop ? undefined : openPath(stack, parent, state)
  if (top === undefined) return { kind: 'absent', covered: state.covered }
  if (top.type === DT_DIR)
    return { kind: 'directory', top, directory: { path: join(parent.path, name), sources, open } }
  const source = sources[0] as Source
  if (!state.metacopy) return { kind: 'object', top, source, data: data as DataSource }
  if (top.type !== DT_REG) return { kind: 'object', top, source, data: source }
  return findData(stack, state, top, source, open)
}

function nextSource(parent: Directory, absolute: boolean, at: number, last: number): Source | undefined {
  if (absolute) return at < last ? { layer: at + 1, path: ROOT } : undefined
  return parent.sources.find((source) => source.layer > at)
}

function hasMore(parent: Directory, absolute: boolean, at: number, last: number, stack: Stack): boolean {
  return nextSource(parent, absolute, at, last) !== undefined || stack.below
}

function openPath(stack: Stack, parent: Directory, state: Lookup): EntryPath | undefined {
  if (!stack.below) return undefined
  if (state.absolute) return state.target.slice(1) as EntryPath
  return parent.open === undefined ? undefined : join(parent.open, state.target as Name)
}

// The last file found is itself a metacopy: its bytes are in a data-only layer, below the stack, or nowhere.
function findData(stack: Stack, state: Lookup, top: RawEntry, source: Source, open: EntryPath | undefined): Found {
  if (state.absolute) {
    const path = state.target.slice(1) as EntryPath
    for (let i = 0; i < stack.data.length; i++) {
      const layer = stack.layers.length + i
      if (isFileAt(stack, layer, path)) return { kind: 'object', top, source, data: { layer, path } }
    }
  }
  if (open !== undefined) return { kind: 'object', top, source, data: { layer: 'below', path: open } }
  return { kind: 'broken', errno: 'EIO', why: 'a metacopy whose data is nowhere below' }
}

function isFileAt(stack: Stack, layer: number, path: EntryPath): boolean {
  const { parent, name } = split(path)
  const opened = new OpenSources(stack)
  try {
    return opened.inspect({ layer, path: parent }, name)?.type === DT_REG
  } catch {
    return false // an intermediate directory is missing or is a symlink
  } finally {
    opened.close()
  }
}

interface Hit {
  readonly entry: RawEntry
  readonly path: EntryPath
}

function lookupInLayer(stack: Stack, state: Lookup, base: Source): Hit | undefined {
  if (!state.absolute) return lookupSingle(stack, state, base, state.target as Name, '', '')
  // The prefix can change on the way (a redirect on a component), so count what remains, not what was walked.
  let directory = base.path
  let rest = state.target.slice(1)
  for (;;) {
    const slash = rest.indexOf('/')
    const name = (slash < 0 ? rest : rest.slice(0, slash)) as Name
    const post = slash < 0 ? '' : rest.slice(slash)
    const prefix = state.target.slice(0, state.target.length - rest.length)
    const hit = lookupSingle(stack, state, { layer: base.layer, path: directory }, name, prefix, post)
    if (hit === undefined || post === '') return hit
    if (hit.entry.type !== DT_DIR) return undefined
    directory = hit.path
    rest = post.slice(1)
  }
}

function lookupSingle(
  stack: Stack,
  state: Lookup,
  base: Source,
  name: Name,
  prefix: string,
  post: string,
): Hit | undefined {
  const isLastElement = post === ''
  const isLastLayer = base.layer === stack.layers.length - 1 && !stack.below
  const entry = state.inspect(base, name)
  if (entry === undefined) return undefined
  if (entry.whiteout !== undefined) {
    state.stop = true
    state.covered = true
    return undefined
  }
  if (isLastElement && state.metacopy && entry.type !== DT_REG) {
    state.stop = true
    return undefined
  }
  const hit = { entry, path: join(base.path, name) }
  if (entry.type !== DT_DIR) {
    if (state.isDirectory || !isLastElement) {
      state.stop = true
      return undefined
    }
    state.metacopy = entry.metacopy !== undefined
    state.stop = !state.metacopy
    if (!state.metacopy) return hit
    if (isLastLayer) {
      // Where nothing lies below, the redirect is not read; data-only layers are found by it all the same.
      if (stack.data.length > 0 && entry.redirect !== undefined) redirectTo(state, entry.redirect, prefix, post)
      return hit
    }
  } else {
    if (isLastElement) state.isDirectory = true
    if (isLastLayer) return hit
    if (entry.opaque) {
      state.stop = true
      return hit
    }
  }
  if (entry.badRedirect !== undefined) {
    state.broken = { kind: 'broken', errno: entry.badRedirect, why: 'a redirect whose value the kernel refuses' }
    return undefined
  }
  if (entry.redirect !== undefined) redirectTo(state, entry.redirect, prefix, post)
  return hit
}

// A relative redirect replaces the component it stands on, an absolute one the whole prefix, and re-opens a search
// that an opaque directory on the way had closed.
function redirectTo(state: Lookup, redirect: string, prefix: string, post: string): void {
  if (redirect.startsWith('/')) {
    state.absolute = true
    state.stop = false
    state.target = redirect + post
  } else {
    state.target = prefix + redirect + post
  }
}

/** Walks a path of the merged view from its root. */
export function resolve(stack: Stack, path: EntryPath, opened: OpenSources): Found {
  let directory = rootDirectory(stack)
  const names = components(path)
  if (names.length === 0) {
    return { kind: 'directory', top: rootEntry(), directory }
  }
  for (let i = 0; ; i++) {
    const found = lookup(stack, directory, names[i] as Name, (source, name) => opened.inspect(source, name))
    if (i === names.length - 1) return found
    if (found.kind === 'broken') return found
    if (found.kind !== 'directory') return { kind: 'absent', covered: false }
    directory = found.directory
  }
}

function rootEntry(): RawEntry {
  return { name: '' as Name, type: DT_DIR, opaque: false, attributes: [] }
}
