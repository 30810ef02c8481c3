import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import {
  type ByteString,
  close,
  DT_DIR,
  errnoOf,
  FS_APPEND_FL,
  FS_IMMUTABLE_FL,
  fsync,
  type HostPath,
  makeNode,
  O_CREAT,
  O_DIRECTORY,
  O_EXCL,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDWR,
  openat,
  openBeneath,
  openRoot,
  overlayUsers,
  PosixError,
  printable,
  readAt,
  realPath,
  removeDirectory,
  rename,
  S_IFCHR,
  setTimes,
  statAt,
  statFd,
  syncFileSystem,
  textOf,
  tryLock,
  tryStatAt,
  tryUnlink,
  unlink,
  withFd,
  writeAt,
} from '@lsync/posix'
import { compareInodes, compareMetadata } from './compare.ts'
import { JournalDamagedError, journalPathOf, TargetBusyError } from './journal.ts'
import { type EntryPath, join, type Name, ROOT, split } from './model/path.ts'
import { planName, planPath } from './model/plan.ts'
import type { Progress } from './planning.ts'
import { type Directory, layerAt, type Source, type Stack } from './resolve.ts'
import { assertMergeable, LayerBusyError } from './safety.ts'
import { openLayerDirectory, sortedDirents, typeOf } from './scan.ts'
import { closeStack, type OpenStack, openStack, type StackRequest } from './stack.ts'
import { type Present, realStack, rootFrom, ViewDirectory, walkTo } from './view.ts'

export interface VacuumRequest extends StackRequest {
  /** The workdir of the upper, where it was mounted with index=on. */
  readonly workdir?: HostPath
  /** Tell what would be dropped; nothing is changed. */
  readonly dryRun?: boolean
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: Progress) => void
}

/** A name that the upper can do without. */
export interface Dropped {
  readonly path: EntryPath
  readonly why: 'same-as-below' | 'hides-nothing'
}

/** What a vacuum did. */
export interface VacuumReport {
  /** Deepest directories first, names by bytes. */
  readonly dropped: readonly Dropped[]
  /** Disk space of what was dropped. */
  readonly bytes: number
  /** Directory times that an interrupted vacuum had left wrong, and that were put right first. */
  readonly recovered: number
  readonly dryRun: boolean
  readonly elapsedMs: number
}

/**
 * Drops from an upper what it does not need: copy-ups that equal the lowers' view in everything (type, metadata,
 * attributes, mtime, content, link group, chattr flags), whiteouts over nothing, and directories that are then empty
 * and equal. The merged view is the same before, after, and (but for the times of one directory) at every moment
 * between; those times are noted durably beforehand, and the next vacuum, or `recoverVacuum`, puts them right after a
 * crash. Access times and inode numbers are not part of the view here.
 * @throws {LsyncError} LAYER_BUSY, MERGE_UNFINISHED, TARGET_BUSY and what a merge refuses
 */
export async function vacuum(asked: VacuumRequest): Promise<VacuumReport> {
  const start = performance.now()
  const request = realStack(asked)
  const dryRun = request.dryRun === true
  const stack = openStack(request, false)
  try {
    assertChangeable(request, stack)
    const journal = dryRun ? undefined : VacuumJournal.create(request.upper)
    try {
      const { dropped, bytes } = await new VacuumScan(stack).run(journal, request)
      if (journal !== undefined && dropped.length > 0) await dropAll(stack, journal, request, dropped.length)
      const recovered = journal?.recovered ?? 0
      return { dropped, bytes, recovered, dryRun, elapsedMs: performance.now() - start }
    } finally {
      journal?.end()
    }
  } finally {
    closeStack(stack)
  }
}

/**
 * Refuses to change an upper that something else uses or has half merged.
 * @throws {LsyncError} LAYER_BUSY, MERGE_UNFINISHED and what a merge refuses
 */
export function assertChangeable(request: StackRequest & { workdir?: HostPath }, stack: OpenStack): void {
  const { upper, lowers, data = [], workdir } = request
  const { parent, name } = vacuumJournalPath(upper)
  // A delta is the mode that leaves the lowers alone; what it makes is here the journal beside the upper.
  assertMergeable({
    mode: 'delta',
    upper,
    lowers,
    data,
    workdir,
    target: `${parent}/${name}` as HostPath,
    stack,
  })
  // Unlike a merge, this takes names away, which a mount that has the upper as a lower would trip over too.
  const [use] = overlayUsers((stack.layers[0] as OpenStack['layers'][number]).fd).uses
  if (use !== undefined) throw new LayerBusyError(upper, `${use.role} of ${printable(use.target)}`)
}

/** One directory of the upper, the names that go from it, and the times it keeps. */
export interface DropLine {
  readonly path: string
  readonly times: readonly [atimeNs: string, mtimeNs: string]
  /** Everything that is not a directory. */
  readonly names: readonly string[]
  /** Empty by then. */
  readonly directories: readonly string[]
  /** Names that become whiteouts as the kernel writes them. */
  readonly whiteouts?: readonly string[]
}

interface ScanResult {
  readonly dropped: readonly Dropped[]
  readonly bytes: number
}

/** A directory on the way down: what it loses is known when all below it is. */
interface Frame {
  readonly directory: Directory
  readonly path: EntryPath
  /** What goes from it: directories, and everything else. */
  readonly removed: Name[]
  readonly names: Name[]
  /** Directories of the upper in it, and whether each could go if nothing were left in it. */
  readonly children: { name: Name; directory: Directory; replaceable: boolean }[]
  next: number
  /** Names that stay. */
  kept: number
}

const TURN_MS = 20
/** chattr flags that people set; the others are the file system's own business. */
const VISIBLE_FLAGS = 0x1 | 0x2 | 0x4 | 0x8 | FS_IMMUTABLE_FL | FS_APPEND_FL | 0x40 | 0x80 | 0x10000 | 0x800000

class VacuumScan {
  readonly #stack: Stack
  /** Inodes of the upper with several names that can go with all of them. */
  #groups: ReadonlySet<string> = new Set()
  readonly #dropped: Dropped[] = []
  readonly #counted = new Set<string>()
  #bytes = 0

  constructor(stack: Stack) {
    this.#stack = stack
  }

  async run(journal: VacuumJournal | undefined, request: VacuumRequest): Promise<ScanResult> {
    const { signal, onProgress } = request
    this.#groups = this.#replaceableGroups()
    const frames: Frame[] = [this.#enter(rootFrom(this.#stack, 0))]
    let turn = performance.now()
    let done = 0
    for (let frame = frames.at(-1); frame !== undefined; frame = frames.at(-1)) {
      if (performance.now() - turn > TURN_MS) {
        await new Promise(setImmediate)
        signal?.throwIfAborted()
        onProgress?.({ phase: 'scan', done })
        turn = performance.now()
      }
      const child = frame.children[frame.next]
      if (child !== undefined) {
        frames.push(this.#enter(child.directory))
        continue
      }
      frames.pop()
      done++
      this.#leave(frame, frames.at(-1), journal)
    }
    return { dropped: this.#dropped, bytes: this.#bytes }
  }

  #enter(directory: Directory): Frame {
    const view = new ViewDirectory(this.#stack, directory)
    const frame: Frame = {
      directory,
      path: (directory.sources[0] as Source).path,
      names: [],
      removed: [],
      children: [],
      next: 0,
      kept: 0,
    }
    try {
      for (const name of view.topCandidates()) this.#look(view, name, frame)
      return frame
    } finally {
      view.close()
    }
  }

  #look(view: ViewDirectory, name: Name, frame: Frame): void {
    const raw = view.raw(name)
    const found = view.find(name)
    if (found.kind === 'directory') {
      if (isDangling(found)) {
        frame.kept++
        return
      }
      frame.children.push({ name, directory: found.directory, replaceable: this.#isReplaceable(view, name, found) })
      return
    }
    if (found.kind === 'object' && this.#isSame(view, name, found)) {
      frame.names.push(name)
      this.#drop(join(frame.path, name), 'same-as-below', view.shown(found).stat)
      return
    }
    if (raw?.whiteout !== undefined && found.kind === 'absent' && view.findBeneath(name).kind === 'absent') {
      frame.names.push(name)
      this.#drop(join(frame.path, name), 'hides-nothing')
      return
    }
    frame.kept++
  }

  #drop(path: EntryPath, why: Dropped['why'], stat?: { dev: number; ino: number | bigint; blocks: number }): void {
    this.#dropped.push({ path, why })
    if (stat === undefined) return
    const key = `0:${stat.dev}:${stat.ino}`
    if (this.#groups.has(key) && this.#counted.has(key)) return
    if (this.#groups.has(key)) this.#counted.add(key)
    this.#bytes += stat.blocks * 512
  }

  #isSame(view: ViewDirectory, name: Name, found: Extract<Present, { kind: 'object' }>): boolean {
    const beneath = view.findBeneath(name)
    if (beneath.kind !== 'object' || beneath.top.type !== found.top.type) return false
    const { nlink } = view.shown(found).stat
    if (nlink > 1) return this.#groups.has(view.shown(found).group)
    return view.shown(beneath).stat.nlink === 1 && this.#equals(view, found, beneath)
  }

  #equals(
    view: ViewDirectory,
    found: Extract<Present, { kind: 'object' }>,
    beneath: Extract<Present, { kind: 'object' }>,
  ): boolean {
    const { marks } = layerAt(this.#stack, 0)
    // The view shows flags of the upper that its inode does not have; and an index may know this inode.
    if (found.top.attributes.includes(marks.protattr) || found.top.attributes.includes(marks.nlink)) return false
    const [upper, lower] = [view.shown(found), view.shown(beneath)]
    const isSameData = found.data.layer === beneath.data.layer && found.data.path === beneath.data.path
    if (compareInodes(lower, upper, { content: false }).length > 0) return false
    if (((lower.flags ^ upper.flags) & VISIBLE_FLAGS) !== 0) return false
    return isSameData || compareInodes(lower, upper).length === 0
  }

  /** Whether a directory of the upper, once it is empty, shows just what would show without it. */
  #isReplaceable(view: ViewDirectory, name: Name, found: Extract<Present, { kind: 'directory' }>): boolean {
    const beneath = view.findBeneath(name)
    if (beneath.kind !== 'directory') return false
    if (found.top.attributes.includes(layerAt(this.#stack, 0).marks.protattr)) return false
    const [upper, lower] = [view.shown(found), view.shown(beneath)]
    if (compareMetadata(lower, upper).length > 0) return false
    if (((lower.flags ^ upper.flags) & VISIBLE_FLAGS) !== 0) return false
    const [, ...merged] = found.directory.sources
    const { sources } = beneath.directory
    const isSameMerge =
      merged.length === sources.length &&
      merged.every(({ layer, path }, index) => sources[index]?.layer === layer && sources[index]?.path === path)
    if (isSameMerge && sources.length > 1) return true
    const rest = new ViewDirectory(this.#stack, beneath.directory)
    try {
      // The kernel lists the whiteouts of a directory that exists in one layer only (R2), so it must have none.
      if (isSameMerge) return rest.topCandidates().every((child) => rest.raw(child)?.whiteout === undefined)
      return rest.candidates().length === 0
    } finally {
      rest.close()
    }
  }

  #leave(frame: Frame, parent: Frame | undefined, journal: VacuumJournal | undefined): void {
    if (journal !== undefined && frame.names.length + frame.removed.length > 0) {
      const stat = withFd(openLayerDirectory(layerAt(this.#stack, 0), frame.path), statFd)
      journal.add({
        path: textOf(frame.path),
        times: [String(stat.atimeNs), String(stat.mtimeNs)],
        names: frame.names.map(textOf),
        directories: frame.removed.map(textOf),
      })
    }
    if (parent === undefined) return
    const child = parent.children[parent.next++] as Frame['children'][number]
    if (frame.kept > 0 || !child.replaceable) {
      parent.kept++
      return
    }
    parent.removed.push(child.name)
    this.#drop(frame.path, 'same-as-below')
  }

  /** Inodes with several names of which each equals its lower one, and these are one inode with no other name. */
  #replaceableGroups(): Set<string> {
    const groups = linkGroups(this.#stack)
    const replaceable = new Set<string>()
    for (const [key, { nlink, paths }] of groups) {
      if (paths.length === nlink && this.#isSameGroup(paths, nlink)) replaceable.add(key)
    }
    return replaceable
  }

  #isSameGroup(paths: readonly EntryPath[], nlink: number): boolean {
    const inodes = new Set<string>()
    return paths.every((path) => {
      const { parent, name } = split(path)
      const directory = walkTo(this.#stack, rootFrom(this.#stack, 0), parent)
      if (directory.kind !== 'directory') return false
      const view = new ViewDirectory(this.#stack, directory.directory)
      try {
        const [found, beneath] = [view.find(name), view.findBeneath(name)]
        if (found.kind !== 'object' || beneath.kind !== 'object') return false
        const lower = view.shown(beneath)
        inodes.add(lower.group)
        return inodes.size === 1 && lower.stat.nlink === nlink && this.#equals(view, found, beneath)
      } finally {
        view.close()
      }
    })
  }
}

// Over the right lowers its redirect would lead somewhere, and its whiteouts would hide something there.
function isDangling({ top, directory }: Extract<Present, { kind: 'directory' }>): boolean {
  return top.redirect !== undefined && !top.opaque && directory.sources.length === 1
}

/** The inodes of the upper that have several names, by the key that `ShownInode.group` has. */
function linkGroups(stack: Stack): Map<string, { nlink: number; paths: EntryPath[] }> {
  const upper = layerAt(stack, 0)
  const groups = new Map<string, { nlink: number; paths: EntryPath[] }>()
  const pending: EntryPath[] = [ROOT]
  for (let path = pending.pop(); path !== undefined; path = pending.pop()) {
    const directory = path
    withFd(openLayerDirectory(upper, directory), (fd) => {
      for (const { name, type } of sortedDirents(fd)) {
        const stat = type === DT_DIR ? undefined : statAt(fd, name)
        if (stat === undefined || typeOf(stat) === DT_DIR) pending.push(join(directory, name))
        else if (stat.nlink > 1 && !stat.isWhiteoutDevice) {
          const key = `0:${stat.dev}:${stat.ino}`
          const group = groups.get(key)
          if (group === undefined) groups.set(key, { nlink: stat.nlink, paths: [join(directory, name)] })
          else group.paths.push(join(directory, name))
        }
      }
    })
  }
  return groups
}

/** Seals a journal and does what its lines say, in their order; the directories keep their times. */
export async function dropAll(
  stack: OpenStack,
  journal: VacuumJournal,
  request: Pick<VacuumRequest, 'signal' | 'onProgress'>,
  total: number,
): Promise<void> {
  const upper = stack.layers[0] as OpenStack['layers'][number]
  journal.seal()
  try {
    await dropLines(upper.fd, journal, request, total)
  } finally {
    // Also after a failure: the journal goes only when the times are as durable as what changed them.
    if (!journal.isDirty) {
      syncFileSystem(upper.fd, upper.path)
      journal.isNeeded = false
    }
  }
}

async function dropLines(
  upperFd: number,
  journal: VacuumJournal,
  request: Pick<VacuumRequest, 'signal' | 'onProgress'>,
  total: number,
): Promise<void> {
  let turn = performance.now()
  let done = 0
  for (const line of journal.lines()) {
    if (performance.now() - turn > TURN_MS) {
      await new Promise(setImmediate)
      request.signal?.throwIfAborted()
      request.onProgress?.({ phase: 'apply', done, total })
      turn = performance.now()
    }
    withFd(openBeneath(upperFd, planPath(line.path), O_DIRECTORY | O_NOFOLLOW), (fd) => dropNames(fd, line, journal))
    done += line.names.length + line.directories.length
  }
}

function dropNames(fd: number, line: DropLine, journal: VacuumJournal): void {
  journal.isDirty = true
  try {
    for (const name of line.names) {
      journal.beat()
      const code = tryUnlink(fd, planName(name))
      if (code !== undefined && code !== 'ENOENT') throw new PosixError(code, { syscall: 'unlinkat', path: name })
    }
    for (const name of line.directories) {
      journal.beat()
      removeDirectory(fd, planName(name))
    }
    for (const name of line.whiteouts ?? []) {
      journal.beat()
      replaceByWhiteout(fd, planName(name))
    }
  } finally {
    setTimes(fd, '', BigInt(line.times[0]), BigInt(line.times[1]))
    journal.isDirty = false
  }
}

// A whiteout over a name that nothing has, should it be left behind: `vacuum` takes it away.
const TEMPORARY = '#lsync-whiteout' as ByteString

function replaceByWhiteout(fd: number, name: ByteString): void {
  unlink(fd, TEMPORARY)
  makeNode(fd, TEMPORARY, S_IFCHR, 0)
  rename(fd, TEMPORARY, fd, name)
}

/** What stands at the head of the journal. */
interface JournalHeader {
  readonly type: 'vacuum'
  readonly format: 1
  readonly upper: string
  readonly upperIno: string
  /** The kernel's boot: after another one, what happened before it is known to be old. */
  readonly boot: string
  readonly startNs: string
}

const FLUSH_BYTES = 1 << 20
/** How long after its last sign of life a vacuum can still have changed a directory. */
const GRACE_NS = 2_000_000_000n

function vacuumJournalPath(upper: HostPath): { parent: HostPath; name: ByteString } {
  const { parent, name } = journalPathOf(upper)
  const own = name.replace(/^\.lsync\./, '.lsync-vacuum.')
  if (own.length <= 255) return { parent, name: own as ByteString }
  const digest = createHash('sha256').update(name, 'latin1').digest('hex').slice(0, 16)
  return { parent, name: `${own.slice(0, 238)}.${digest}` as ByteString }
}

/**
 * A file beside the upper that holds which names go from which directory and the times that each directory has to keep.
 * Its own mtime is the last sign of life of the vacuum that wrote it. Locked as long as it is open.
 */
export class VacuumJournal {
  /** Directory times that an earlier vacuum had left wrong. */
  readonly recovered: number
  /** A directory has lost names and not yet got its times back. */
  isDirty = false
  /** What it tells is needed after a crash. */
  isNeeded = false
  readonly #parentFd: number
  readonly #name: ByteString
  readonly #path: string
  readonly #fd: number
  #offset = 0
  #sealed = 0
  #buffered: Buffer[] = []
  #bufferedBytes = 0
  #lastBeat = 0

  private constructor(
    place: { parent: HostPath; parentFd: number; name: ByteString; fd: number },
    recovered: number,
    header?: JournalHeader,
  ) {
    this.#parentFd = place.parentFd
    this.#name = place.name
    this.#path = `${place.parent}/${place.name}`
    this.#fd = place.fd
    this.recovered = recovered
    if (header !== undefined) this.#append(`${JSON.stringify(header)}\n`)
  }

  /** Recovers what an earlier vacuum left, and begins a new journal. */
  static create(upper: HostPath): VacuumJournal {
    const recovered = recoverVacuum(upper)
    const { parent, name } = vacuumJournalPath(upper)
    const parentFd = openRoot(parent)
    let fd: number | undefined
    try {
      fd = openat(parentFd, name, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0o600)
      if (!tryLock(fd, 'exclusive', name)) throw new TargetBusyError(upper)
      fsync(parentFd, parent)
      return new VacuumJournal({ parent, parentFd, name, fd }, recovered, {
        type: 'vacuum',
        format: 1,
        upper: textOf(upper),
        upperIno: String(withFd(openRoot(upper), statFd).ino),
        boot: bootId(),
        startNs: String(statFd(fd).mtimeNs),
      })
    } catch (error) {
      if (fd !== undefined) close(fd)
      close(parentFd)
      throw errnoOf(error) === 'EEXIST' ? new TargetBusyError(upper) : error
    }
  }

  add(line: DropLine): void {
    this.#append(`${JSON.stringify(line)}\n`)
  }

  /** Makes it durable: from here on directories may change. */
  seal(): void {
    this.#append(`${JSON.stringify({ type: 'end' })}\n`)
    this.#flush()
    this.#sealed = this.#offset
    this.isNeeded = true
    fsync(this.#fd, this.#path)
  }

  *lines(): Generator<DropLine> {
    for (const line of readLines(this.#fd, this.#sealed)) if ('names' in line) yield line as DropLine
  }

  /** Notes that the vacuum is alive: the file's mtime is what counts. */
  beat(): void {
    const now = performance.now()
    if (now - this.#lastBeat < 500) return
    this.#lastBeat = now
    writeAt(this.#fd, this.#offset, Buffer.from('{"type":"beat"}\n'), this.#path)
    this.#offset += 16
  }

  /** Removes the journal, unless it is needed to put a directory's times right. */
  end(): void {
    try {
      if (this.isNeeded) return
      unlink(this.#parentFd, this.#name)
      fsync(this.#parentFd, this.#path)
    } finally {
      close(this.#fd)
      close(this.#parentFd)
    }
  }

  #append(text: string): void {
    const bytes = Buffer.from(text)
    this.#buffered.push(bytes)
    this.#bufferedBytes += bytes.length
    this.#offset += bytes.length
    if (this.#bufferedBytes >= FLUSH_BYTES) this.#flush()
  }

  #flush(): void {
    if (this.#bufferedBytes === 0) return
    writeAt(this.#fd, this.#offset - this.#bufferedBytes, Buffer.concat(this.#buffered), this.#path)
    this.#buffered = []
    this.#bufferedBytes = 0
  }
}

/**
 * Puts the directory times right that an interrupted vacuum of this upper left, if one did; returns how many. Whatever
 * else it had done was harmless. Times that somebody set since then stay as they are.
 * @throws {TargetBusyError} while a vacuum of this upper is running
 */
export function recoverVacuum(upper: HostPath): number {
  const { parent, name } = vacuumJournalPath(realPath(upper))
  return withFd(openRoot(parent), (parentFd) => {
    const stat = tryStatAt(parentFd, name)
    if (stat === undefined) return 0
    const path = `${parent}/${name}`
    // Somebody who can write beside the upper must not be able to make root set times where they like.
    if (!stat.isFile || stat.uid !== process.geteuid?.() || (stat.mode & 0o022) !== 0) {
      throw new JournalDamagedError(path, 'it does not belong to this user alone')
    }
    const count = withFd(openat(parentFd, name, O_RDWR | O_NOFOLLOW | O_NONBLOCK), (fd) => {
      if (!tryLock(fd, 'exclusive', name)) throw new TargetBusyError(upper)
      return restoreTimes(fd, upper, path)
    })
    unlink(parentFd, name)
    fsync(parentFd, parent)
    return count
  })
}

function restoreTimes(journalFd: number, upper: HostPath, path: string): number {
  const lines = [...readLines(journalFd, statFd(journalFd).sizeBytes)]
  const header = lines[0] as JournalHeader | undefined
  const isSealed = lines.some((line) => 'type' in line && line.type === 'end')
  if (header === undefined || !isSealed) return 0 // nothing was changed before it was whole
  if (header.type !== 'vacuum' || header.format !== 1)
    throw new JournalDamagedError(path, 'its format is not known here')
  return withFd(openRoot(upper), (upperFd) => {
    if (String(statFd(upperFd).ino) !== header.upperIno) throw new JournalDamagedError(path, 'it is of another upper')
    const first = BigInt(header.startNs)
    const last = header.boot === bootId() ? statFd(journalFd).mtimeNs + GRACE_NS : bootTimeNs()
    let count = 0
    for (const line of lines) {
      if (!('names' in line)) continue
      const [atimeNs, mtimeNs] = line.times
      if (restoreOne(upperFd, planPath(line.path), BigInt(atimeNs), BigInt(mtimeNs), { first, last })) count++
    }
    if (count > 0) syncFileSystem(upperFd, upper)
    return count
  })
}

function restoreOne(
  upperFd: number,
  path: EntryPath,
  atimeNs: bigint,
  mtimeNs: bigint,
  window: { first: bigint; last: bigint },
): boolean {
  let fd: number
  try {
    fd = openBeneath(upperFd, path, O_DIRECTORY | O_NOFOLLOW)
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return false // dropped itself
    throw error
  }
  return withFd(fd, () => {
    const now = statFd(fd).mtimeNs
    if (now === mtimeNs || now < window.first || now > window.last) return false
    setTimes(fd, '', atimeNs, mtimeNs)
    return true
  })
}

type JournalLine = JournalHeader | DropLine | { readonly type: 'end' | 'beat' }

function* readLines(fd: number, end: number): Generator<JournalLine> {
  let carry = Buffer.alloc(0)
  for (let at = 0; at < end; ) {
    const chunk = readAt(fd, at, Math.min(FLUSH_BYTES, end - at))
    if (chunk.length === 0) return
    at += chunk.length
    const whole = Buffer.concat([carry, chunk])
    let start = 0
    for (let stop = whole.indexOf(10); stop >= 0; stop = whole.indexOf(10, start)) {
      try {
        yield JSON.parse(whole.toString('utf8', start, stop)) as JournalLine
      } catch (error) {
        if (error instanceof SyntaxError) return // the write of this line was cut short
        throw error
      }
      start = stop + 1
    }
    carry = Buffer.from(whole.subarray(start))
  }
}

function bootId(): string {
  return readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim()
}

function bootTimeNs(): bigint {
  const seconds = /^btime (\d+)$/m.exec(readFileSync('/proc/stat', 'latin1'))?.[1] ?? '0'
  return BigInt(seconds) * 1_000_000_000n
}
