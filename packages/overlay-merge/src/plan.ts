import {
  type Ability,
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
  FS_APPEND_FL,
  FS_IMMUTABLE_FL,
  getXattr,
  listsAcls,
  listXattrs,
  readDirents,
  S_IFCHR,
  S_IFDIR,
  S_IFREG,
  type Stat,
  statAt,
  statFd,
  textOf,
  tryTypeAt,
} from '@lsync/posix'
import { emission } from './compose.ts'
import { fileProtection, protectionOf, resultMeta } from './effects.ts'
import { hiddenAcls } from './encodings/inode.ts'
import type { Alias } from './index-aliases.ts'
import { isMark, type MarkNames } from './model/marks.ts'
import { type EntryPath, join, type Name, split } from './model/path.ts'
import {
  type CleanRecord,
  type DirectoryRecord,
  type Expectation,
  type MergeMode,
  type PlaceStep,
  plannedMeta,
  type Step,
  type Was,
} from './model/plan.ts'
import {
  type DataSource,
  type Directory,
  type Found,
  layerAt,
  lookup,
  OpenSources,
  type Source,
  type Stack,
} from './resolve.ts'
import {
  inspect,
  type Layer,
  type NameRange,
  nameRanges,
  openLayerDirectory,
  type RawEntry,
  sortedDirents,
  typeOf,
} from './scan.ts'

/** What planning must know besides the stack. The last layer of the stack is the base, which the target starts as. */
export interface PlanContext {
  readonly stack: Stack
  readonly mode: MergeMode
  /** Layer 0 is renamed into the target rather than copied. */
  readonly rename: boolean
  readonly plain: boolean
  /** Names that show an inode of the upper's index; `undefined` when no workdir was named. */
  readonly aliases?: readonly Alias[]
  /** The open index directory, as a layer for copies: the index after the data-only layers. */
  readonly indexFd?: number
  /** Add expectations, so that the plan can be applied where these layers are not read again. */
  readonly portable: boolean
}

/** A directory of the result that has something of the upper layers in it, to be planned. */
export interface PlanTask {
  readonly directory: Directory
  /** What it would merge with below if it carried no marks. */
  readonly inherited: EntryPath | undefined
}

/** What planning some directories gave. */
export interface PlanPart {
  readonly next: PlanTask[]
  readonly grafts: Graft[]
  readonly problems: Problem[]
  /** What the result needs its file system to hold, with the first path that does. */
  readonly needs: Map<Need, EntryPath>
  readonly counts: PlanCounts
}

/** Something that the result needs its file system to hold, by the name that `probe` has for it. */
export type Need = Extract<
  Ability,
  | 'whiteouts'
  | 'devices'
  | 'fifos'
  | 'sockets'
  | 'symlinks'
  | 'hardLinks'
  | 'userXattrs'
  | 'trustedXattrs'
  | 'acls'
  | 'keepsOwner'
  | 'keepsSetuid'
  | 'inodeFlags'
>

/** One thing that could not be planned. Paths are of the merged view. */
export interface Problem {
  readonly path: EntryPath
  readonly code: string
  readonly why: string
}

/** A place that takes its content from elsewhere in the base. */
export interface Graft {
  readonly from: EntryPath
  readonly to: EntryPath
  readonly kind: 'directory' | 'file'
  /** Files: the upper's metacopy. */
  readonly upper?: EntryPath
  /** `upper` is a name of the index directory. */
  readonly inIndex?: boolean
  /** The upper's metacopy inode has further names. */
  readonly linked: boolean
  /** The base has it where the result wants it. */
  readonly inPlace: boolean
}

export interface PlanCounts {
  directories: number
  placed: number
  trees: number
  removed: number
  replaced: number
  created: number
  whiteouts: number
  bytes: number
}

export function emptyPart(): PlanPart {
  return {
    next: [],
    grafts: [],
    problems: [],
    needs: new Map(),
    counts: { directories: 0, placed: 0, trees: 0, removed: 0, replaced: 0, created: 0, whiteouts: 0, bytes: 0 },
  }
}

// A line of up to 100 KB: larger strings go past the young generation, and stay until all memory is collected.
const STEPS_A_RECORD = 1024
// Up to so many names asking for each costs less than one listing of fifty (measured on ext4).
const FEW_NAMES = 8
// A directory of ext4 grows by 4096-byte blocks of some fifty names.
const BYTES_A_NAME = 1024

/**
 * Plans one directory of the result: what happens to each name that an upper layer has in it, and which directories
 * below it are to be planned next. Reads only, names in byte order, so the same layers give the same plan.
 */
export function planDirectory(context: PlanContext, task: PlanTask, part: PlanPart, emit: Emit): void {
  const opened = new OpenSources(context.stack)
  try {
    new DirectoryPlanner(context, task, part, opened, emit).run()
  } finally {
    opened.close()
  }
}

/** Gets each record as soon as it is made: those of a directory of a million names are not held. */
export type Emit = (record: DirectoryRecord | CleanRecord) => void

class DirectoryPlanner {
  readonly #context: PlanContext
  readonly #task: PlanTask
  readonly #part: PlanPart
  readonly #opened: OpenSources
  readonly #emit: Emit
  readonly #baseIndex: number
  /** The base's directory that takes part here, if one does. */
  readonly #base: Source | undefined
  readonly #types: Map<number, Map<Name, number>> = new Map()
  /** By layer, whose directories are all on one file system. */
  readonly #listsAcls = new Map<number, boolean>()
  #baseNames: Map<Name, number> | undefined

  constructor(context: PlanContext, task: PlanTask, part: PlanPart, opened: OpenSources, emit: Emit) {
    this.#emit = emit
    this.#context = context
    this.#task = task
    this.#part = part
    this.#opened = opened
    this.#baseIndex = context.stack.layers.length - 1
    this.#base = task.directory.sources.find(({ layer }) => layer === this.#baseIndex)
  }

  run(): void {
    const { directory } = this.#task
    const steps: Step[] = []
    const aliases = this.#aliases()
    const aliased = new Set(aliases.map(({ name }) => name))
    const inspectNamed = (source: Source, wanted: Name) => this.#inspect(source, wanted)
    const uppers = directory.sources.filter(({ layer }) => layer !== this.#baseIndex)
    for (const range of nameRanges(uppers.map((source) => this.#opened.fd(source)))) {
      const names = this.#upperNames(uppers, range)
      this.#baseNames = this.#listBase(names.length, range)
      for (const name of names) {
        if (aliased.has(name)) continue // a lower of the uppers has it, and shows the index inode instead
        this.#step(name, lookup(this.#context.stack, directory, name, inspectNamed), steps)
        if (steps.length === STEPS_A_RECORD) this.#emit(this.#partRecord(steps.splice(0)))
      }
    }
    for (const alias of aliases) this.#aliasStep(alias, steps)
    this.#part.counts.directories++
    this.#emit(this.#record(steps))
  }

  // A listing is only a list of candidates; the base's own names, untouched by the uppers, stay as they are.
  #upperNames(uppers: readonly Source[], { lists, includes }: NameRange): Name[] {
    const names: Name[] = []
    for (const [index, { layer }] of uppers.entries()) {
      const types = new Map<Name, number>()
      for (const { name, type } of lists[index] ?? []) {
        types.set(name, type)
        names.push(name)
      }
      this.#types.set(layer, types)
    }
    const beneath = this.#towardsAliases().filter(includes)
    return uppers.length < 2 && beneath.length === 0 ? names : [...new Set([...names, ...beneath])].sort()
  }

  #aliases(): readonly Alias[] {
    return this.#context.aliases?.filter(({ directory }) => directory === this.#task.directory.path) ?? []
  }

  // Directories that no upper has, but in or below which an alias changes a name.
  #towardsAliases(): Name[] {
    const { aliases } = this.#context
    if (aliases === undefined || aliases.length === 0) return []
    const { path } = this.#task.directory
    const prefix = path === '' ? '' : `${path}/`
    return aliases
      .filter(({ directory }) => directory !== path && directory.startsWith(prefix))
      .map(({ directory }) => directory.slice(prefix.length).split('/')[0] as Name)
  }

  #dataOf(alias: Alias): DataSource | undefined {
    const { stack } = this.#context
    const found = lookup(stack, this.#task.directory, alias.name, (source, name) => this.#opened.inspect(source, name))
    return found.kind === 'object' ? found.data : undefined
  }

  #aliasStep(alias: Alias, steps: Step[]): void {
    const { indexFd, rename, stack } = this.#context
    if (indexFd === undefined) return
    const index = alias.index as string as Name
    const { marks } = stack.layers[0] as Layer
    const top = inspect(indexFd, index, DT_UNKNOWN, marks, true)
    const stat = top.stat as Stat
    const common = { name: textOf(alias.name), was: this.#baseState(alias.name).was }
    const dropped = marksToDrop(top.attributes, marks).map(textOf)
    this.#count(common.was, stat.sizeBytes)
    const flags = protectedFlags(indexFd, index, top.attributes, marks)
    this.#needFlags(flags, join(alias.directory, alias.name))
    const more: Pick<PlaceStep, 'flags' | 'metacopy' | 'data' | 'set'> = flags === 0 ? {} : { flags }
    const to = join(alias.directory, alias.name)
    const data = top.metacopy === undefined ? undefined : this.#dataOf(alias)
    if (data?.layer === 'below') {
      // Its data stays below, where every name of the inode must find it.
      more.metacopy = true
      more.set = [[marks.redirect, Buffer.from(`/${data.path}`, 'latin1').toString('base64')]]
    } else if (data !== undefined && rename) {
      // The data must be in the index inode before the target changes.
      const graft = { from: data.path, to, upper: alias.index as string as EntryPath, inIndex: true }
      this.#part.grafts.push({ ...graft, kind: 'file', linked: true, inPlace: false })
    } else if (data !== undefined) more.data = [data.layer, textOf(data.path)]
    if (rename) {
      const kept = more.metacopy === true ? dropped.filter((attribute) => attribute !== marks.metacopy) : dropped
      steps.push({ do: 'alias', ...common, ...more, from: alias.index, drop: kept })
    } else {
      const group = `0:${stat.dev}:${stat.ino}`
      this.#need('hardLinks', to)
      const from: [number, string] = [stack.layers.length + stack.data.length, alias.index]
      steps.push({ do: 'place', ...common, ...more, from, group, sizeBytes: stat.sizeBytes })
    }
  }

  #inspect(source: Source, name: Name): RawEntry | undefined {
    const isOwn = this.#task.directory.sources.some(({ layer, path }) => layer === source.layer && path === source.path)
    const types = isOwn ? this.#types.get(source.layer) : undefined
    if (types === undefined) return this.#opened.inspect(source, name)
    const type = types.get(name)
    if (type === undefined) return undefined
    const { marks } = layerAt(this.#context.stack, source.layer)
    return inspect(this.#opened.fd(source), name, type, marks, this.#wantsStat(type))
  }

  // Renaming needs no stat. Copying needs the link count and the size.
  #wantsStat(type: number): boolean {
    return type !== DT_DIR && (!this.#context.rename || this.#context.portable)
  }

  /** What the target has under a name: a stat only where something depends on more than the type. */
  #baseState(name: Name): { was: Was; stat?: Stat; isWhiteout: boolean } {
    if (this.#base === undefined) return { was: 'nothing', isWhiteout: false }
    const fd = this.#opened.fd(this.#base)
    const type = this.#baseNames === undefined ? tryTypeAt(fd, name) : this.#baseNames.get(name)
    if (type === undefined) return { was: 'nothing', isWhiteout: false }
    const was = type === S_IFDIR ? 'directory' : 'file'
    if (!this.#context.portable && type !== S_IFCHR) return { was, isWhiteout: false }
    const stat = statAt(fd, name)
    return { was, stat, isWhiteout: stat.isWhiteoutDevice }
  }

  // One listing is cheaper than asking for each name, unless few of many names change.
  #listBase(names: number, { includes }: NameRange): Map<Name, number> | undefined {
    if (this.#base === undefined || names < FEW_NAMES) return undefined
    const fd = this.#opened.fd(this.#base)
    if (statFd(fd).sizeBytes > names * BYTES_A_NAME) return undefined
    const types = new Map<Name, number>()
    readDirents(fd, (name, type) => {
      if (!includes(name)) return
      const known = type === DT_DIR ? S_IFDIR : type === DT_CHR || type === DT_UNKNOWN ? tryTypeAt(fd, name) : S_IFREG
      if (known !== undefined) types.set(name as string as Name, known)
    })
    return types
  }

  #step(name: Name, found: Found, steps: Step[]): void {
    const { directory } = this.#task
    const path = join(directory.path, name)
    const { counts } = this.#part
    const { was, stat, isWhiteout } = this.#baseState(name)
    const common = {
      name: textOf(name),
      was,
      ...(this.#context.portable && stat !== undefined ? { expectTarget: expectationOf(stat) } : {}),
    }
    switch (found.kind) {
      case 'broken':
        this.#part.problems.push({ path, code: found.errno, why: found.why })
        return
      case 'absent':
        if (directory.open !== undefined && found.covered) {
          if (isWhiteout && !this.#consumes()) return
          counts.whiteouts++
          this.#need('whiteouts', path)
          steps.push({ do: 'whiteout', ...common })
        } else if (was !== 'nothing' || this.#consumes()) {
          if (was !== 'nothing') counts.removed++
          steps.push({ do: 'remove', ...common })
        }
        return
      case 'directory':
        this.#directoryStep(name, path, found, common, steps)
        return
      case 'object':
        if (found.source.layer === this.#baseIndex) return
        this.#objectStep(path, found, common, steps)
    }
  }

  #consumes(): boolean {
    return this.#context.mode === 'in-place'
  }

  #directoryStep(
    name: Name,
    path: EntryPath,
    found: Extract<Found, { kind: 'directory' }>,
    common: { name: string; was: Was },
    steps: Step[],
  ): void {
    const { directory } = found
    const base = directory.sources.find(({ layer }) => layer === this.#baseIndex)
    // The target has it where it belongs: at its place, or in a parent that was moved with it.
    const ridesAlong = base !== undefined && this.#base !== undefined && base.path === join(this.#base.path, name)
    const { open } = this.#task.directory
    const inherited = open === undefined ? undefined : join(open, name)
    if (base === undefined) {
      if (this.#context.rename && directory.sources.length === 1 && this.#planTree(path, found, common, steps)) return
      steps.push({ do: 'mkdir', ...common })
      this.#part.counts.created++
    } else if (!ridesAlong) {
      this.#part.grafts.push({ from: base.path, to: path, kind: 'directory', linked: false, inPlace: false })
      steps.push({ do: 'graft', ...common, from: textOf(base.path) })
    }
    this.#part.next.push({ directory, inherited })
  }

  /** A directory that only the upper has can be moved whole, unless something in it merges with something elsewhere. */
  #planTree(
    path: EntryPath,
    found: Extract<Found, { kind: 'directory' }>,
    common: { name: string; was: Was },
    steps: Step[],
  ): boolean {
    const { open, sources } = found.directory
    if (open !== undefined) return false
    const source = sources[0] as Source
    const layer = layerAt(this.#context.stack, source.layer)
    const clean: CleanRecord[] = []
    let objects = 0
    let flags = 0
    const pending: EntryPath[] = [source.path]
    for (let current = pending.pop(); current !== undefined; current = pending.pop()) {
      const fd = openLayerDirectory(layer, current)
      try {
        const cleaned = cleanRecords(fd, current, layer.marks, pending)
        if (cleaned === undefined) return false
        objects += cleaned.objects
        this.#needFlags(cleaned.anyFlags, path)
        for (const record of cleaned.records) clean.push(record)
        // An immutable directory cannot be renamed: its own flags wait until it has arrived.
        if (current === source.path) flags = cleaned.flags
        else if (cleaned.flags !== 0) cleaned.records[0]?.flags?.push(['', cleaned.flags])
      } finally {
        close(fd)
      }
    }
    for (const record of clean) this.#emit(record)
    // In a result that stays a layer, the moved directory must not merge with what lies below.
    const isClosedBelow = this.#task.directory.open === undefined
    steps.push({
      do: 'place',
      ...common,
      tree: true,
      ...this.#from(source, path),
      ...(flags === 0 ? {} : { flags }),
      ...(isClosedBelow ? {} : { set: [[layer.marks.opaque, Buffer.from('y').toString('base64')]] }),
    } satisfies PlaceStep)
    this.#count(common.was, 0)
    this.#part.counts.trees++
    this.#part.counts.placed += objects
    return true
  }

  #objectStep(
    path: EntryPath,
    found: Extract<Found, { kind: 'object' }>,
    common: { name: string; was: Was },
    steps: Step[],
  ): void {
    const { source, data, top } = found
    const { marks } = layerAt(this.#context.stack, source.layer)
    const parent = this.#parentFd(source)
    const name = top.name
    const marked = marksToDrop(top.attributes, marks)
    if (marked.includes(marks.nlink) && this.#context.aliases === undefined && source.layer === 0) {
      this.#part.problems.push({ path, code: 'INDEX_NEEDED', why: 'a hard link that index=on keeps track of' })
    }
    // The kernel emulates flags by the upper's marks alone.
    let flags = source.layer === 0 ? protectedFlags(parent, name, marked, marks) : 0
    const stat = top.stat ?? (top.metacopy !== undefined ? statAt(parent, name) : undefined)
    // An upper that an earlier merge made has real ones.
    if (stat !== undefined) flags |= fileProtection(parent, name, stat)
    const step: PlaceStep = { do: 'place', ...common, ...this.#from(source, path) }
    if (flags !== 0) step.flags = flags
    this.#needFlags(flags, path)
    if (stat !== undefined && !this.#context.rename) this.#needsOf(path, source.layer, top, stat, parent)
    if (this.#context.portable && stat !== undefined) step.expect = expectationOf(stat)
    if (!this.#context.rename && stat !== undefined && stat.nlink > 1) {
      step.group = `${source.layer}:${stat.dev}:${stat.ino}`
      this.#need('hardLinks', path)
    }
    if (stat !== undefined) step.sizeBytes = stat.sizeBytes
    this.#count(common.was, stat?.sizeBytes ?? 0)
    const isOwnData = top.metacopy === undefined
    if (isOwnData) {
      if (marked.length > 0) step.drop = marked.map(textOf)
    } else if (data.layer === 'below') {
      // One inode has one redirect, which must be right for each of its names: only an absolute one can be.
      const isShared = (stat as Stat).nlink > 1
      const { redirect } = isShared
        ? { redirect: `/${data.path}` }
        : emission(data.path, this.#task.directory.open, name)
      const drop = marked.filter((attribute) => attribute !== marks.metacopy)
      if (drop.length > 0) step.drop = drop.map(textOf)
      if (redirect !== undefined) step.set = [[marks.redirect, Buffer.from(redirect, 'latin1').toString('base64')]]
      step.metacopy = true
      this.#need('trustedXattrs', path)
    } else if (data.layer === this.#baseIndex && this.#consumes()) {
      const meta = plannedMeta(resultMeta(parent, name, stat as Stat, marks, this.#context.plain))
      const linked = (stat as Stat).nlink > 1
      const inPlace = this.#base !== undefined && data.path === join(this.#base.path, name)
      this.#part.grafts.push({ from: data.path, to: path, kind: 'file', upper: source.path, linked, inPlace })
      steps.push({
        do: 'graft',
        ...common,
        from: textOf(data.path),
        meta,
        drop: marked.map(textOf),
        ...(flags === 0 ? {} : { flags }),
        ...(step.group === undefined ? {} : { group: step.group }),
      })
      return
    } else {
      step.data = [data.layer, textOf(data.path)]
      step.drop = marked.map(textOf)
    }
    steps.push(step)
  }

  #parentFd(source: Source): number {
    return this.#opened.fd({ layer: source.layer, path: split(source.path).parent })
  }

  // By default a step takes layer 0's entry of the same name in the record's upper directory.
  #from(source: Source, path: EntryPath): { from?: [number, string] } {
    const upper = this.#task.directory.sources[0]
    const { name } = split(path)
    if (source.layer === 0 && upper?.layer === 0 && join(upper.path, name) === source.path) return {}
    return { from: [source.layer, textOf(source.path)] }
  }

  #count(was: Was, sizeBytes: number): void {
    const { counts } = this.#part
    counts.placed++
    counts.bytes += sizeBytes
    if (was === 'nothing') counts.created++
    else counts.replaced++
  }

  #need(need: Need, path: EntryPath): void {
    if (!this.#part.needs.has(need)) this.#part.needs.set(need, path)
  }

  #needFlags(flags: number, path: EntryPath): void {
    if (flags !== 0) this.#need('inodeFlags', path)
  }

  #needsOf(path: EntryPath, layer: number, top: RawEntry, stat: Stat, dirfd: number): void {
    const lists = this.#listsAcls.get(layer) ?? listsAcls(dirfd)
    this.#listsAcls.set(layer, lists)
    const hidden = hiddenAcls(dirfd, top.name, top.attributes, lists).map(({ name }) => name)
    for (const need of needsOf(stat, [...top.attributes, ...hidden])) this.#need(need, path)
  }

  // A directory of a million names is many records, so that none has to be held whole when it is carried out.
  #partRecord(steps: Step[]): DirectoryRecord {
    return { ...this.#record(steps), part: true }
  }

  #record(steps: Step[]): DirectoryRecord {
    const { directory, inherited } = this.#task
    const top = directory.sources[0] as Source
    const { marks } = layerAt(this.#context.stack, top.layer)
    const fd = this.#opened.fd(top)
    const stat = statFd(fd)
    const meta = resultMeta(fd, '', stat, marks, this.#context.plain)
    const record: DirectoryRecord = {
      type: 'directory',
      path: textOf(directory.path),
      meta: plannedMeta(meta),
      steps,
    }
    if (top.layer === 0) record.upper = textOf(top.path)
    if (directory.path !== '') {
      const { name } = split(directory.path)
      const parentOrigin = inherited === undefined ? undefined : split(inherited).parent
      const { opaque, redirect } = emission(directory.open, parentOrigin, name)
      if (opaque) record.opaque = true
      if (redirect !== undefined) record.redirect = textOf(redirect)
    }
    // The kernel does not look for emulated flags of the root when it mounts.
    const isEmulated = top.layer === 0 && directory.path !== ''
    const emulated = isEmulated ? protectedFlags(fd, '', [marks.protattr], marks) : 0
    const flags = emulated | (stat.isProtected ? protectionOf(fd) : 0)
    if (flags !== 0) record.flags = flags
    this.#needFlags(flags, directory.path)
    if (!this.#context.rename) {
      for (const need of needsOf(
        stat,
        meta.xattrs.map(({ name }) => name),
      )) {
        this.#need(need, directory.path)
      }
    }
    return record
  }
}

const ownUid = process.geteuid?.()
const ownGid = process.getegid?.()

/** What an inode with these attributes needs of the file system that it is copied to, its inode flags aside. */
export function needsOf(stat: Stat, attributes: readonly ByteString[]): Need[] {
  const needs: Need[] = []
  const special = SPECIAL_NEEDS[typeOf(stat)]
  if (special !== undefined) needs.push(special)
  if ((stat.permissions & 0o6000) !== 0) needs.push('keepsSetuid')
  if (stat.uid !== ownUid || stat.gid !== ownGid) needs.push('keepsOwner')
  for (const attribute of attributes) {
    if (attribute.startsWith('user.')) needs.push('userXattrs')
    else if (attribute.startsWith('system.posix_acl_')) needs.push('acls')
    else if (attribute.startsWith('trusted.') && !attribute.startsWith('trusted.overlay.')) needs.push('trustedXattrs')
  }
  return needs
}

const SPECIAL_NEEDS: Readonly<Record<number, Need>> = {
  [DT_CHR]: 'devices',
  [DT_BLK]: 'devices',
  [DT_FIFO]: 'fifos',
  [DT_SOCK]: 'sockets',
  [DT_LNK]: 'symlinks',
}

/** The marks among some attributes: what does not belong into a result. */
function marksToDrop(attributes: readonly ByteString[], marks: MarkNames): ByteString[] {
  return attributes.filter((attribute) => isMark(attribute, marks))
}

/** The inode flags that `NS.protattr` stands for: `i` and `a`. */
export function protectedFlags(
  dirfd: number,
  name: Name | '',
  marked: readonly ByteString[],
  marks: MarkNames,
): number {
  if (!marked.includes(marks.protattr)) return 0
  const value = getXattr(dirfd, name, marks.protattr)?.toString('latin1') ?? ''
  return (value.includes('i') ? FS_IMMUTABLE_FL : 0) | (value.includes('a') ? FS_APPEND_FL : 0)
}

function expectationOf(stat: Stat): Expectation {
  const type = typeOf(stat)
  return type === DT_REG ? { type, sizeBytes: stat.sizeBytes, mtimeNs: String(stat.mtimeNs) } : { type }
}

/**
 * What must be cleaned in one directory of a tree that is moved whole: `undefined` when something in it merges with
 * something elsewhere, so that the tree cannot be moved whole. Subdirectories are added to `pending`.
 */
function cleanRecords(
  fd: number,
  path: EntryPath,
  marks: MarkNames,
  pending: EntryPath[],
): { records: CleanRecord[]; objects: number; flags: number; anyFlags: number } | undefined {
  const own = marksToDrop(listXattrs(fd, ''), marks)
  const ownFlags = protectedFlags(fd, '', own, marks)
  const records: CleanRecord[] = []
  let anyFlags = ownFlags
  let objects = 0
  let drop: [string, string[]][] = own.length > 0 ? [['', own.map(textOf)]] : []
  // What becomes immutable at last must be cleaned by one record.
  for (const { lists } of ownFlags === 0 ? nameRanges([fd]) : [{ lists: [sortedDirents(fd)] }]) {
    const whiteouts: string[] = []
    const flags: [string, number][] = []
    for (const { name, type } of lists[0] ?? []) {
      const entry = inspect(fd, name, type, marks)
      if (entry.whiteout !== undefined) {
        whiteouts.push(textOf(name))
        continue
      }
      if (entry.badRedirect !== undefined || entry.metacopy !== undefined) return undefined
      if (entry.type === DT_DIR) {
        // An absolute redirect re-opens the search even below a closed directory.
        if (entry.redirect?.startsWith('/') === true && !entry.opaque) return undefined
        pending.push(join(path, name))
        continue
      }
      objects++
      const marked = marksToDrop(entry.attributes, marks)
      if (marked.length > 0) drop.push([textOf(name), marked.map(textOf)])
      const bits = protectedFlags(fd, name, marked, marks)
      if (bits !== 0) flags.push([textOf(name), bits])
      anyFlags |= bits
    }
    if (whiteouts.length === 0 && drop.length === 0) continue
    const record: CleanRecord = { type: 'clean', upper: textOf(path) }
    if (drop.length > 0) record.drop = drop
    if (flags.length > 0 || ownFlags !== 0) record.flags = flags
    if (whiteouts.length > 0) {
      const stat = statFd(fd)
      record.whiteouts = whiteouts
      record.times = [String(stat.atimeNs), String(stat.mtimeNs)]
    }
    records.push(record)
    drop = []
  }
  return { records, objects, flags: ownFlags, anyFlags }
}
