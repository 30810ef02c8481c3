import {
  type ByteString,
  close,
  DT_DIR,
  DT_REG,
  getXattr,
  type HostPath,
  handleAt,
  LsyncError,
  listXattrs,
  O_DIRECTORY,
  O_NOFOLLOW,
  openBeneath,
  printable,
  removeXattr,
  statAt,
  statFd,
  syncFileSystem,
  textOf,
  withFd,
} from '@lsync/posix'
import { isMark, MARKS, type MarkNames, opaqueMeaning } from './model/marks.ts'
import { type EntryPath, isWithin, join, type Name, ROOT, split } from './model/path.ts'
import type { Progress } from './planning.ts'
import { type Directory, type Found, layerAt, lookup, OpenSources, type Source } from './resolve.ts'
import { openLayerDirectory, type RawEntry } from './scan.ts'
import { closeStack, type OpenStack, openStack, type StackRequest } from './stack.ts'
import { assertChangeable, type DropLine, dropAll, recoverVacuum, VacuumJournal } from './vacuum.ts'
import { realStack, rootFrom, ViewDirectory } from './view.ts'

/** How bad: `error` the kernel fails for the name; `warning` something is lost or shows wrongly; `info` it only lies there. */
export type Severity = 'error' | 'warning' | 'info'

interface ProblemKind {
  readonly severity: Severity
  /** Whether `repair` mends it in the upper. Lowers are never changed: other stacks may use them. */
  readonly repairable: boolean
  readonly description: string
}

const kind = (severity: Severity, repairable: boolean, description: string): ProblemKind => ({
  severity,
  repairable,
  description,
})

/** Every problem that `check` knows. Codes are API. */
export const LAYER_PROBLEMS = {
  WHITEOUT_ORPHAN: kind('info', true, 'a whiteout over a name that nothing beneath has'),
  WHITEOUT_PHANTOM: kind(
    'warning',
    true,
    'a whiteout in a directory that no other layer has: the kernel lists it, and then does not find it',
  ),
  WHITEOUT_AT_BOTTOM: kind('warning', false, 'a whiteout in the bottom layer, where nothing is left to be hidden'),
  WHITEOUT_XATTR_IN_UPPER: kind(
    'warning',
    true,
    'a whiteout made of an attribute in an upper: its directory cannot be removed through the mount',
  ),
  WHITEOUT_UNHINTED: kind(
    'warning',
    false,
    'a whiteout made of an attribute in a directory without opaque=x: the kernel lists it, and then does not find it',
  ),
  OPAQUE_VALUE: kind('warning', true, 'an opaque mark with a value that means nothing: the directory merges'),
  OPAQUE_ON_ROOT: kind('warning', true, 'an opaque mark on the root of a layer, where it has no effect'),
  MARK_DEAD: kind('info', true, 'a mark on an inode of a type for which it means nothing'),
  MARK_LEAKED: kind('info', false, 'marks in the bottom layer that only an upper or middle layer has a use for'),
  MARK_AT_BOTTOM: kind(
    'warning',
    false,
    'an opaque or redirect mark in the bottom layer: it comes alive once something lies beneath',
  ),
  MARK_UNKNOWN: kind('info', false, 'marks that this version of lsync does not know'),
  PROTATTR_LOST: kind('info', false, 'immutable or append-only flags of a former upper, which no lower layer shows'),
  REDIRECT_ESCAPES: kind('error', false, 'a redirect with `.` or `..`: lookup fails (EACCES)'),
  REDIRECT_INVALID: kind('error', false, 'a redirect that is no path: lookup fails (EINVAL)'),
  REDIRECT_DANGLING: kind('error', false, 'a redirect to what is not there or no directory: nothing merges'),
  REDIRECT_DUPLICATE: kind(
    'error',
    false,
    'two directories that merge with the same one beneath: with an upper, one of them fails (ESTALE)',
  ),
  REDIRECT_NOT_FOLLOWED: kind(
    'error',
    false,
    'a redirect that a userxattr mount does not follow: lookup fails (EPERM)',
  ),
  REDIRECT_DEAD: kind('info', true, 'a redirect that means nothing: on a whole file, an opaque directory, or the root'),
  REDIRECT_LONG: kind('info', false, 'a redirect longer than the 256 bytes that the kernel itself would write'),
  METACOPY_NO_DATA: kind('error', false, 'a metacopy whose data is nowhere beneath: reading fails (EIO)'),
  METACOPY_AT_BOTTOM: kind('error', false, 'a metacopy in the bottom layer: its data cannot be anywhere (EIO)'),
  METACOPY_VALUE: kind('error', false, 'a metacopy mark too short to be one: lookup fails (EIO)'),
  METACOPY_NOT_FOLLOWED: kind('error', false, 'a metacopy in a layer of a userxattr mount: lookup fails (EPERM)'),
  METACOPY_SIZE: kind('warning', false, 'a metacopy of another size than its data: the lower was changed'),
  ORIGIN_DUPLICATE: kind(
    'error',
    true,
    'two inodes of an upper that say they come from the same lower one (cp -a inside it): one fails (ESTALE)',
  ),
  IMPURE_STALE: kind('info', true, 'an impure mark on a directory without anything copied up in it'),
  INDEX_NEEDED: kind('info', false, 'hard links that were kept together by index=on: mount with the same workdir'),
  WRONG_NAMESPACE: kind(
    'warning',
    false,
    'marks of the other namespace, which this kind of mount shows as plain attributes',
  ),
  AUFS_MARKER: kind('info', false, '`.wh.` names, which AUFS, OCI and fuse-overlayfs understand and the kernel shows'),
  UNREADABLE: kind('error', false, 'a directory that could not be read'),
} as const satisfies Record<string, ProblemKind>

export type LayerProblemCode = keyof typeof LAYER_PROBLEMS

export interface LayerProblem {
  /** In the layer. Where one problem stands for many, the first. */
  readonly path: EntryPath
  /** 0 is the upper. */
  readonly layer: number
  readonly layerPath: HostPath
  readonly code: LayerProblemCode
  readonly severity: Severity
  readonly why: string
  readonly repaired: boolean
}

export interface CheckRequest extends StackRequest {
  /** Mend in the upper what is certain. The view stays the same, but for names that it failed to show. */
  readonly repair?: boolean
  /** The workdir of the upper, where it was mounted with index=on. */
  readonly workdir?: HostPath
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: Progress) => void
}

export interface CheckReport {
  /** By layer, then in the order of the walk: a directory's names by bytes, then what is below it. */
  readonly problems: readonly LayerProblem[]
  /** Errors and warnings that are still there. */
  readonly remaining: number
  /** Names looked at. */
  readonly entries: number
  readonly elapsedMs: number
}

/**
 * Looks through all layers of a stack for what a kernel would fail on, ignore, or show otherwise than it was meant.
 * With `repair` the upper is mended where that is certain: dead marks, stale impure marks, whiteouts over nothing,
 * whiteouts made of attributes, doubled origins. Reads only, without it. Content is not read.
 * @throws {LsyncError} with `repair`: LAYER_BUSY, MERGE_UNFINISHED, TARGET_BUSY
 */
export async function check(asked: CheckRequest): Promise<CheckReport> {
  const start = performance.now()
  const request = realStack(asked)
  const stack = openStack(request, false)
  try {
    if (request.repair === true) {
      assertChangeable(request, stack)
      // Before anything is read: an interrupted repair may have left the times of a directory wrong.
      recoverVacuum(request.upper)
    }
    const findings: Finding[] = []
    let entries = 0
    for (let layer = 0; layer < stack.layers.length; layer++) {
      const found = await new LayerCheck(stack, layer, request).run()
      entries += found.entries
      findings.push(...found.findings)
    }
    if (request.repair === true) await repair(stack, request, findings)
    const problems = findings.map(({ problem, mended }) => ({ ...problem, repaired: mended }))
    const remaining = problems.filter(({ severity, repaired }) => severity !== 'info' && !repaired).length
    return { problems, remaining, entries, elapsedMs: performance.now() - start }
  } finally {
    closeStack(stack)
  }
}

/** How one problem of the upper is mended. */
type Remedy =
  | { readonly do: 'drop-whiteout' }
  | { readonly do: 'make-device' }
  | { readonly do: 'remove-mark'; readonly mark: ByteString }

interface Finding {
  readonly problem: Omit<LayerProblem, 'repaired'>
  readonly remedy: Remedy | undefined
  mended: boolean
}

/** Problems of which there may be as many as files, told once for each layer. */
interface Summary {
  readonly first: EntryPath
  count: number
  readonly what: Set<string>
}

const TURN_MS = 20
const KERNEL_REDIRECT_MAX = 256
const KNOWN_MARKS = ['opaque', 'whiteout', 'redirect', 'metacopy', 'origin', 'impure', 'nlink', 'protattr']
const OTHER_KNOWN_MARKS = ['upper', 'uuid']

class LayerCheck {
  readonly #stack: OpenStack
  readonly #layer: number
  readonly #request: CheckRequest
  readonly #marks: MarkNames
  readonly #others: MarkNames
  readonly #isBottom: boolean
  readonly #findings: Finding[] = []
  readonly #summaries = new Map<LayerProblemCode, Summary>()
  /** Places beneath that a redirect of this layer leads to, as `layer:path`, with the directories that merge there. */
  readonly #redirected = new Map<string, EntryPath[]>()
  /** Upper: where each copied-up inode says it comes from. */
  readonly #origins = new Map<string, { path: EntryPath; ino: string }[]>()
  /** Over the lowers that these were made for, whiteouts in them would hide something. */
  readonly #dangling: EntryPath[] = []
  #entries = 0

  constructor(stack: OpenStack, layer: number, request: CheckRequest) {
    this.#stack = stack
    this.#layer = layer
    this.#request = request
    this.#marks = MARKS[stack.namespace]
    this.#others = MARKS[stack.namespace === 'trusted' ? 'user' : 'trusted']
    this.#isBottom = layer === stack.layers.length - 1
  }

  async run(): Promise<{ findings: Finding[]; entries: number }> {
    await this.#walk((view) => this.#directory(view), true)
    if (this.#redirected.size > 0) {
      await this.#walk((view) => this.#collectMerging(view), false)
      this.#reportDuplicates()
    }
    this.#reportOrigins()
    for (const [code, { first, count, what }] of this.#summaries) {
      const names = what.size === 0 ? '' : `: ${[...what].sort().map(printable).join(', ')}`
      const why = `${count === 1 ? 'here' : `here and in ${count - 1} more places`}${names}`
      this.#add(code, first, why)
    }
    return { findings: this.#findings, entries: this.#entries }
  }

  async #walk(visit: (view: ViewDirectory) => { name: Name; directory: Directory }[], report: boolean): Promise<void> {
    const { signal, onProgress } = this.#request
    const pending: Directory[] = [rootFrom(this.#stack, this.#layer)]
    let turn = performance.now()
    for (let directory = pending.pop(); directory !== undefined; directory = pending.pop()) {
      if (performance.now() - turn > TURN_MS) {
        await new Promise(setImmediate)
        signal?.throwIfAborted()
        onProgress?.({ phase: 'scan', done: this.#entries })
        turn = performance.now()
      }
      const view = new ViewDirectory(this.#stack, directory)
      try {
        for (const child of visit(view).reverse()) pending.push(child.directory)
      } catch (error) {
        if (!(error instanceof LsyncError)) throw error
        if (report) this.#add('UNREADABLE', (directory.sources[0] as Source).path, error.message)
      } finally {
        view.close()
      }
    }
  }

  #directory(view: ViewDirectory): { name: Name; directory: Directory }[] {
    const path = (view.directory.sources[0] as Source).path
    const attributes = listXattrs(view.topFd, '')
    if (path === ROOT) this.#root(view.topFd, attributes)
    const opaque = attributes.includes(this.#marks.opaque)
      ? opaqueMeaning(getXattr(view.topFd, '', this.#marks.opaque))
      : 'nothing'
    const children: { name: Name; directory: Directory }[] = []
    let hasOrigin = false
    for (const name of view.topCandidates()) {
      this.#entries++
      const child = join(path, name)
      const raw = view.raw(name)
      if (raw === undefined) continue
      if (name.startsWith('.wh.')) this.#summarize('AUFS_MARKER', child)
      if (raw.attributes.includes(this.#marks.origin)) hasOrigin = true
      if (raw.whiteout !== undefined) {
        this.#whiteout(view, name, raw, child, opaque === 'hint')
        continue
      }
      const found = view.find(name)
      this.#common(view, name, raw, child)
      if (raw.type === DT_DIR) {
        this.#subdirectory(view, name, raw, found, child)
        if (found.kind === 'directory') children.push({ name, directory: found.directory })
      } else if (raw.type === DT_REG) this.#file(view, raw, found, child)
      else this.#deadMarks(raw, child, ['opaque', 'whiteout', 'redirect', 'metacopy'])
    }
    if (this.#layer === 0 && attributes.includes(this.#marks.impure) && !hasOrigin) {
      this.#add('IMPURE_STALE', path, 'nothing in it was copied up', { do: 'remove-mark', mark: this.#marks.impure })
    }
    return children
  }

  #root(fd: number, attributes: readonly ByteString[]): void {
    const { opaque, redirect, whiteout, metacopy } = this.#marks
    if (attributes.includes(opaque) && opaqueMeaning(getXattr(fd, '', opaque)) !== 'hint') {
      this.#add('OPAQUE_ON_ROOT', ROOT, 'the layers beneath stay visible', { do: 'remove-mark', mark: opaque })
    }
    if (attributes.includes(redirect)) {
      this.#add('REDIRECT_DEAD', ROOT, 'it is on the root', { do: 'remove-mark', mark: redirect })
    }
    for (const mark of [whiteout, metacopy]) {
      if (attributes.includes(mark)) this.#add('MARK_DEAD', ROOT, `${mark} on a directory`, { do: 'remove-mark', mark })
    }
    this.#wrongNamespace(attributes, ROOT)
    if (this.#isBottom) this.#leaks(attributes, ROOT)
  }

  /** What concerns every inode that is not a whiteout. */
  #common(view: ViewDirectory, name: Name, raw: RawEntry, path: EntryPath): void {
    const { attributes } = raw
    if (attributes.length === 0) return
    this.#wrongNamespace(attributes, path)
    for (const attribute of attributes) {
      if (!isMark(attribute, this.#marks)) continue
      const word = attribute.slice(this.#marks.prefix.length)
      if (!KNOWN_MARKS.includes(word) && !OTHER_KNOWN_MARKS.includes(word)) {
        this.#summarize('MARK_UNKNOWN', path, attribute)
      }
    }
    if (this.#isBottom) this.#leaks(attributes, path)
    if (this.#layer > 0) {
      if (attributes.includes(this.#marks.protattr)) this.#summarize('PROTATTR_LOST', path)
      return
    }
    if (attributes.includes(this.#marks.nlink)) {
      if (this.#request.workdir === undefined) this.#summarize('INDEX_NEEDED', path)
    } else if (raw.type !== DT_DIR && attributes.includes(this.#marks.origin)) this.#origin(view.topFd, name, path)
  }

  #wrongNamespace(attributes: readonly ByteString[], path: EntryPath): void {
    for (const attribute of attributes) {
      if (isMark(attribute, this.#others)) this.#summarize('WRONG_NAMESPACE', path, attribute)
    }
  }

  #leaks(attributes: readonly ByteString[], path: EntryPath): void {
    const { marks } = { marks: this.#marks }
    for (const attribute of attributes) {
      if (!isMark(attribute, marks)) continue
      if (attribute !== marks.opaque && attribute !== marks.redirect && attribute !== marks.metacopy) {
        this.#summarize('MARK_LEAKED', path, attribute)
      }
    }
  }

  #origin(fd: number, name: Name, path: EntryPath): void {
    const value = getXattr(fd, name, this.#marks.origin)
    // Empty: unknown, as in a user namespace.
    if (value === undefined || value.length === 0) return
    const key = value.toString('latin1')
    const { dev, ino } = statAt(fd, name)
    const holders = this.#origins.get(key)
    const holder = { path, ino: `${dev}:${ino}` }
    if (holders === undefined) this.#origins.set(key, [holder])
    else holders.push(holder)
  }

  #whiteout(view: ViewDirectory, name: Name, raw: RawEntry, path: EntryPath, hinted: boolean): void {
    if (this.#isBottom) {
      this.#add('WHITEOUT_AT_BOTTOM', path, 'nothing lies beneath')
      return
    }
    if (view.findBeneath(name).kind === 'absent') {
      const isCertain = !this.#dangling.some((ancestor) => isWithin(path, ancestor))
      const remedy: Remedy | undefined = isCertain ? { do: 'drop-whiteout' } : undefined
      if (view.directory.sources.length === 1 && this.#layer === 0) {
        this.#add('WHITEOUT_PHANTOM', path, 'its directory shows nothing from beneath', remedy)
      } else this.#add('WHITEOUT_ORPHAN', path, 'no layer beneath shows the name', remedy)
      return
    }
    if (raw.whiteout === 'device') return
    if (this.#layer === 0) {
      this.#add('WHITEOUT_XATTR_IN_UPPER', path, 'uppers need device whiteouts', { do: 'make-device' })
    } else if (!hinted) this.#add('WHITEOUT_UNHINTED', path, 'set opaque=x on its directory')
  }

  #subdirectory(view: ViewDirectory, name: Name, raw: RawEntry, found: Found, path: EntryPath): void {
    const { opaque, redirect } = this.#marks
    this.#deadMarks(raw, path, ['whiteout', 'metacopy'])
    if (raw.attributes.includes(opaque)) {
      const value = getXattr(view.topFd, name, opaque)
      if (opaqueMeaning(value) === 'nothing') {
        const why = `the value is ${JSON.stringify(value?.toString('latin1') ?? '')}`
        this.#add('OPAQUE_VALUE', path, why, { do: 'remove-mark', mark: opaque })
      } else if (this.#isBottom && raw.opaque) this.#add('MARK_AT_BOTTOM', path, 'opaque')
    }
    if (!raw.attributes.includes(redirect)) return
    if (this.#isBottom) {
      this.#add('MARK_AT_BOTTOM', path, `redirect to ${printable(raw.redirect ?? '')}`)
      return
    }
    if (raw.opaque) {
      this.#add('REDIRECT_DEAD', path, 'the directory is opaque', { do: 'remove-mark', mark: redirect })
      return
    }
    if (!this.#isValidRedirect(raw, path)) return
    if (found.kind === 'broken') {
      this.#add(found.errno === 'EPERM' ? 'REDIRECT_NOT_FOLLOWED' : 'REDIRECT_INVALID', path, found.why)
      return
    }
    if (found.kind !== 'directory') return
    const beneath = found.directory.sources[1]
    if (beneath === undefined) {
      this.#dangling.push(path)
      this.#add('REDIRECT_DANGLING', path, `nothing to merge with at ${printable(raw.redirect ?? '')}`)
    } else if (!this.#redirected.has(keyOf(beneath))) this.#redirected.set(keyOf(beneath), [])
  }

  #isValidRedirect(raw: RawEntry, path: EntryPath): boolean {
    if (raw.badRedirect !== undefined) {
      this.#add(
        raw.badRedirect === 'EACCES' ? 'REDIRECT_ESCAPES' : 'REDIRECT_INVALID',
        path,
        `lookup fails with ${raw.badRedirect}`,
      )
      return false
    }
    const length = raw.redirect?.length ?? 0
    if (length > KERNEL_REDIRECT_MAX) this.#add('REDIRECT_LONG', path, `${length} bytes`)
    return true
  }

  #file(view: ViewDirectory, raw: RawEntry, found: Found, path: EntryPath): void {
    const { redirect } = this.#marks
    this.#deadMarks(raw, path, ['opaque', 'whiteout'])
    if (raw.metacopy === undefined) {
      if (raw.attributes.includes(redirect)) {
        this.#add('REDIRECT_DEAD', path, 'the file has its data', { do: 'remove-mark', mark: redirect })
      }
      return
    }
    if (raw.metacopy.length > 0 && raw.metacopy.length < 4) {
      this.#add('METACOPY_VALUE', path, `${raw.metacopy.length} bytes`)
      return
    }
    if (raw.attributes.includes(redirect) && !this.#isValidRedirect(raw, path)) return
    if (found.kind === 'broken') {
      if (this.#isBottom) this.#add('METACOPY_AT_BOTTOM', path, found.why)
      else this.#add(found.errno === 'EPERM' ? 'METACOPY_NOT_FOLLOWED' : 'METACOPY_NO_DATA', path, found.why)
      return
    }
    if (found.kind !== 'object') return
    const isInData = typeof found.data.layer === 'number' && found.data.layer >= this.#stack.layers.length
    // userxattr mounts have no metacopy, but for files whose data is in a data-only layer.
    if (this.#stack.namespace === 'user' && !isInData) {
      this.#add('METACOPY_NOT_FOLLOWED', path, 'userxattr excludes metacopy=on')
      return
    }
    if (found.data.layer === 'below') return
    const { parent, name: dataName } = split(found.data.path)
    const layer = layerAt(this.#stack, found.data.layer)
    const { sizeBytes } = withFd(openLayerDirectory(layer, parent), (fd) => statAt(fd, dataName))
    const own = view.shown(found).stat.sizeBytes
    if (own !== sizeBytes) this.#add('METACOPY_SIZE', path, `${own} bytes, and its data ${sizeBytes}`)
  }

  #deadMarks(
    raw: RawEntry,
    path: EntryPath,
    words: readonly ('opaque' | 'whiteout' | 'redirect' | 'metacopy')[],
  ): void {
    for (const word of words) {
      const mark = this.#marks[word]
      if (!raw.attributes.includes(mark)) continue
      this.#add('MARK_DEAD', path, `${word} on ${raw.type === DT_DIR ? 'a directory' : 'such an inode'}`, {
        do: 'remove-mark',
        mark,
      })
    }
  }

  #collectMerging(view: ViewDirectory): { name: Name; directory: Directory }[] {
    const children: { name: Name; directory: Directory }[] = []
    for (const name of view.topCandidates()) {
      const found = view.find(name)
      if (found.kind !== 'directory') continue
      const beneath = found.directory.sources[1]
      const path = (found.directory.sources[0] as Source).path
      if (beneath !== undefined) this.#redirected.get(keyOf(beneath))?.push(path)
      children.push({ name, directory: found.directory })
    }
    return children
  }

  #reportDuplicates(): void {
    for (const [key, paths] of this.#redirected) {
      const [first, ...others] = paths.sort()
      if (first === undefined) continue
      const target = printable(key.slice(key.indexOf(':') + 1))
      for (const path of others) {
        this.#add('REDIRECT_DUPLICATE', path, `${printable(first)} merges with ${target} too`)
      }
    }
  }

  #reportOrigins(): void {
    for (const holders of this.#origins.values()) {
      if (new Set(holders.map(({ ino }) => ino)).size < 2) continue
      const rightful = holders.find(({ path }) => this.#isFromBeneath(path))
      for (const { path, ino } of holders) {
        if (rightful !== undefined && ino === rightful.ino) continue
        const other = holders.find((holder) => holder.ino !== ino) as { path: EntryPath }
        const why = `${printable((rightful ?? other).path)} has the same origin`
        this.#add('ORIGIN_DUPLICATE', path, why, { do: 'remove-mark', mark: this.#marks.origin })
      }
    }
  }

  /** Whether the origin of an upper's name is what lies beneath that very name: then it was copied up in its place. */
  #isFromBeneath(path: EntryPath): boolean {
    const { parent, name } = split(path)
    const fd = openLayerDirectory(layerAt(this.#stack, 0), parent)
    let origin: Buffer | undefined
    try {
      origin = getXattr(fd, name, this.#marks.origin)
    } finally {
      close(fd)
    }
    const opened = new OpenSources(this.#stack)
    try {
      let directory = rootFrom(this.#stack, 0)
      for (const part of parent === '' ? [] : parent.split('/')) {
        const found = lookup(this.#stack, directory, part as Name, (source, wanted) => opened.inspect(source, wanted))
        if (found.kind !== 'directory') return false
        directory = found.directory
      }
      const [, ...sources] = directory.sources
      const found = lookup(this.#stack, { ...directory, sources }, name, (source, wanted) =>
        opened.inspect(source, wanted),
      )
      if (found.kind !== 'object' || origin === undefined) return false
      const at = split(found.source.path)
      const handle = handleAt(opened.fd({ layer: found.source.layer, path: at.parent }), at.name)
      return handle !== undefined && isHandleOf(origin, handle)
    } finally {
      opened.close()
    }
  }

  #summarize(code: LayerProblemCode, path: EntryPath, what?: string): void {
    let summary = this.#summaries.get(code)
    if (summary === undefined) {
      summary = { first: path, count: 0, what: new Set() }
      this.#summaries.set(code, summary)
    }
    summary.count++
    if (what !== undefined && summary.what.size < 8) summary.what.add(what)
  }

  #add(code: LayerProblemCode, path: EntryPath, why: string, remedy?: Remedy): void {
    const { severity } = LAYER_PROBLEMS[code]
    const layerPath = layerAt(this.#stack, this.#layer).path
    this.#findings.push({
      problem: { path, layer: this.#layer, layerPath, code, severity, why },
      remedy: this.#layer === 0 ? remedy : undefined,
      mended: false,
    })
  }
}

function keyOf({ layer, path }: Source): string {
  return `${layer}:${path}`
}

// struct ovl_fb: version, magic, length, flags, type, 16 bytes of UUID, then the handle itself (overlay-format §5).
function isHandleOf(origin: Buffer, handle: { type: number; bytes: Buffer }): boolean {
  return origin.length > 21 && origin[4] === handle.type && origin.subarray(21).equals(handle.bytes)
}

async function repair(stack: OpenStack, request: CheckRequest, findings: readonly Finding[]): Promise<void> {
  const upper = stack.layers[0] as OpenStack['layers'][number]
  const lines = new Map<EntryPath, { names: string[]; whiteouts: string[] }>()
  const journalled: Finding[] = []
  for (const finding of findings) {
    const { remedy } = finding
    if (remedy === undefined) continue
    const { path } = finding.problem
    if (remedy.do === 'remove-mark') {
      removeMark(upper.fd, path, remedy.mark)
      finding.mended = true
      continue
    }
    const { parent, name } = split(path)
    const line = lines.get(parent) ?? { names: [], whiteouts: [] }
    lines.set(parent, line)
    ;(remedy.do === 'drop-whiteout' ? line.names : line.whiteouts).push(textOf(name))
    journalled.push(finding)
  }
  if (journalled.length === 0) {
    syncFileSystem(upper.fd, upper.path)
    return
  }
  const journal = VacuumJournal.create(request.upper)
  try {
    for (const [path, { names, whiteouts }] of lines) journal.add(dropLine(upper.fd, path, names, whiteouts))
    await dropAll(stack, journal, request, journalled.length)
    for (const finding of journalled) finding.mended = true
  } finally {
    journal.end()
  }
}

function dropLine(upperFd: number, path: EntryPath, names: string[], whiteouts: string[]): DropLine {
  const { atimeNs, mtimeNs } = withFd(openBeneath(upperFd, path, O_DIRECTORY | O_NOFOLLOW), statFd)
  return { path: textOf(path), times: [String(atimeNs), String(mtimeNs)], names, directories: [], whiteouts }
}

function removeMark(upperFd: number, path: EntryPath, mark: ByteString): void {
  if (path === ROOT) {
    removeXattr(upperFd, '', mark)
    return
  }
  const { parent, name } = split(path)
  withFd(openBeneath(upperFd, parent, O_DIRECTORY | O_NOFOLLOW), (fd) => removeXattr(fd, name, mark))
}
