import { createHash } from 'node:crypto'
import {
  type ByteString,
  bytesOf,
  close,
  fsync,
  type HostPath,
  LsyncError,
  makeDirectory,
  O_APPEND,
  O_CREAT,
  O_DIRECTORY,
  O_EXCL,
  O_NOFOLLOW,
  O_RDONLY,
  O_RDWR,
  openat,
  openRoot,
  printable,
  randomHex,
  readAt,
  readDirents,
  readTextAt,
  removeDirectory,
  removeXattr,
  statFd,
  tryLock,
  tryStatAt,
  unlink,
  withFd,
  writeAt,
} from '@lsync/posix'
import xxhash from 'xxhash-wasm'
import { removeTree } from './effects.ts'
import { ACL_DEFAULT } from './encodings/inode.ts'
import type { CleanRecord, DirectoryRecord, PlanEnd, PlanHeader, PlanRecord, StageRecord } from './model/plan.ts'
import { addTo } from './multimap.ts'

/** Another process works on the same target. */
export class TargetBusyError extends LsyncError {
  constructor(path: string) {
    super('TARGET_BUSY', `another lsync works on ${printable(path)}`, {
      path,
      hint: 'wait for it to end, then try again',
    })
  }
}

/** A journal that cannot be believed. Nothing was changed. */
export class JournalDamagedError extends LsyncError {
  constructor(path: string, why: string) {
    super('JOURNAL_DAMAGED', `the journal ${printable(path)} is damaged: ${why}`, {
      path,
      hint: 'keep upper, lower and journal as they are, and check the disk; nothing was changed',
    })
  }
}

/** A line of the sealed plan, by its place in the file. */
export interface LineIndex {
  readonly path: string
  readonly offset: number
  readonly length: number
  readonly type: PlanRecord['type']
  /** Directories are made or brought from elsewhere in it, which has to precede what goes into them. */
  readonly hasStructure: boolean
  /** The upper's directory that merges here. */
  readonly upper: string | undefined
  /** One of several records of its directory, and not the last. */
  readonly isPart: boolean
  /** It makes something immutable or append-only. */
  readonly hasFlags: boolean
  /** Something that the target has goes, or something else comes in its place. */
  readonly replaces: boolean
}

/** A plan, sealed and indexed. */
export interface SealedPlan {
  readonly header: PlanHeader
  readonly lines: readonly LineIndex[]
  readonly stages: readonly StageRecord[]
  /** Names of one inode: group to result paths, in path order. */
  readonly groups: ReadonlyMap<string, readonly string[]>
}

const PLAN = 'plan' as ByteString
const STAGE = 'stage' as ByteString
const TRASH = 'trash' as ByteString
/** The tree that a new version is built in until it is published. */
export const TREE = 'tree' as ByteString
const JOURNAL_PREFIX = '.lsync.'
const NAME_MAX = 255
const READ_BYTES = 1 << 20
const WRITE_BYTES = 1 << 16
/** Holds the name of the directory inside the target for stage and trash, where no rename leads out of the target. */
const INSIDE = 'inside' as ByteString

/** Milestones of an apply, each durable before the next thing happens. */
export type Milestone = 'staged' | 'structured' | 'applied'

/** The directory that a path lies in, and its own name. */
export function placeOf(path: HostPath): { parent: HostPath; name: ByteString } {
  const trimmed = path.replace(/\/+$/, '') || '/'
  const slash = trimmed.lastIndexOf('/')
  const parent = slash < 0 ? '.' : trimmed.slice(0, slash) || '/'
  return { parent: parent as HostPath, name: (trimmed.slice(slash + 1) || 'root') as ByteString }
}

/** The directory that holds the journal of a target: beside it, under a name made from its own. */
export function journalPathOf(target: HostPath): { parent: HostPath; name: ByteString } {
  const { parent, name: base } = placeOf(target)
  const name = `${JOURNAL_PREFIX}${base}`
  if (name.length <= NAME_MAX) return { parent, name: name as ByteString }
  const digest = createHash('sha256').update(base, 'latin1').digest('hex').slice(0, 16)
  return { parent, name: `${name.slice(0, NAME_MAX - 17)}.${digest}` as ByteString }
}

// What the journal is for, as far as its name tells.
function targetOf({ parent, name }: { parent: HostPath; name: ByteString }): string {
  return `${parent === '/' ? '' : parent}/${name.slice(JOURNAL_PREFIX.length)}`
}

/** Whether a target has a journal: something was interrupted, or is under way. */
export function hasJournal(target: HostPath): boolean {
  const { parent, name } = journalPathOf(target)
  return withFd(openRoot(parent), (fd) => tryStatAt(fd, name) !== undefined)
}

/**
 * The journal of one target: the plan, what was reached of it, and places on the target's file system for what is
 * moved aside. Locked as long as it is open.
 */
export class Journal {
  readonly path: HostPath
  readonly fd: number
  readonly #parentFd: number
  readonly #name: ByteString
  #stageFd: number | undefined
  #trashFd: number | undefined
  #planFd: number | undefined
  #insideFd: number | undefined

  private constructor(parent: HostPath, parentFd: number, name: ByteString, fd: number) {
    this.path = `${parent}/${name}` as HostPath
    this.#parentFd = parentFd
    this.#name = name
    this.fd = fd
  }

  /**
   * Opens (with `create`, makes) the journal of a target and locks it.
   * @throws {TargetBusyError} if another process has it
   */
  static open(target: HostPath, options: { create: boolean }): Journal | undefined {
    return Journal.openAt(journalPathOf(target), options)
  }

  /** As `open`, for a journal whose own place is known. */
  static openAt(place: { parent: HostPath; name: ByteString }, options: { create: boolean }): Journal | undefined {
    const { parent, name } = place
    const parentFd = openRoot(parent)
    try {
      if (tryStatAt(parentFd, name) === undefined) {
        if (!options.create) {
          close(parentFd)
          return undefined
        }
        makeDirectory(parentFd, name, 0o700)
        fsync(parentFd, parent)
      }
      const fd = openat(parentFd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
      try {
        const stat = statFd(fd)
        // Somebody who can write beside the target must not be able to plant a plan for root to carry out.
        if (stat.uid !== process.geteuid?.() || (stat.mode & 0o022) !== 0) {
          throw new JournalDamagedError(`${parent}/${name}`, 'it does not belong to this user alone')
        }
        if (!tryLock(fd, 'exclusive', name)) throw new TargetBusyError(targetOf(place))
        if (options.create) dropDefaultAcl(fd)
        return new Journal(parent, parentFd, name, fd)
      } catch (error) {
        close(fd)
        throw error
      }
    } catch (error) {
      close(parentFd)
      throw error
    }
  }

  /** Makes the places for what is moved aside: beside the target, or in it where a rename to there is impossible. */
  prepare(targetFd: number): void {
    const target = statFd(targetFd)
    const own = statFd(this.fd)
    const isApart = target.dev !== own.dev || target.mountId !== own.mountId
    const base = isApart ? this.#openInside(targetFd) : this.fd
    this.#stageFd = openOrMake(base, STAGE)
    this.#trashFd = openOrMake(base, TRASH)
  }

  // The target's content is anyone's: a name that nobody can know beforehand is one that nobody can have prepared.
  #openInside(targetFd: number): number {
    let name = this.#insideName()
    if (name === undefined) {
      name = `.lsync-${randomHex(16)}` as ByteString
      withFd(openat(this.fd, INSIDE, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW, 0o600), (fd) => {
        writeAt(fd, 0, Buffer.from(name as ByteString, 'latin1'))
        fsync(fd, this.path)
      })
      fsync(this.fd, this.path)
    }
    if (tryStatAt(targetFd, name) === undefined) makeDirectory(targetFd, name, 0o700)
    this.#insideFd = openat(targetFd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
    dropDefaultAcl(this.#insideFd)
    return this.#insideFd
  }

  #insideName(): ByteString | undefined {
    if (tryStatAt(this.fd, INSIDE) === undefined) return undefined
    const text = withFd(openat(this.fd, INSIDE, O_RDONLY | O_NOFOLLOW), (fd) =>
      readAt(fd, 0, NAME_MAX).toString('latin1'),
    )
    if (/^\.lsync-[0-9a-f]{32}$/.test(text)) return text as ByteString
    unlink(this.fd, INSIDE) // cut short before anything was made under the name
    return undefined
  }

  get stageFd(): number {
    return required(this.#stageFd)
  }

  get trashFd(): number {
    return required(this.#trashFd)
  }

  get planFd(): number {
    return required(this.#planFd)
  }

  has(milestone: Milestone): boolean {
    return tryStatAt(this.fd, milestone as ByteString) !== undefined
  }

  /** Records durably that a milestone was reached. What it stands for must be durable before. */
  reach(milestone: Milestone): void {
    close(openat(this.fd, milestone as ByteString, O_RDWR | O_CREAT | O_NOFOLLOW, 0o600))
    fsync(this.fd, this.path)
  }

  /** Starts writing a plan. Without `seal` at the end it counts for nothing. */
  async write(header: PlanHeader): Promise<PlanWriter> {
    unlink(this.fd, PLAN)
    this.#planFd = openat(this.fd, PLAN, O_RDWR | O_CREAT | O_EXCL | O_NOFOLLOW | O_APPEND, 0o600)
    return PlanWriter.start(this.#planFd, header, this.path)
  }

  /** Reads and verifies the plan. `undefined` when it was never sealed, so that nothing can have been changed by it. */
  async read(): Promise<SealedPlan | undefined> {
    if (tryStatAt(this.fd, PLAN) === undefined) return undefined
    this.#planFd ??= openat(this.fd, PLAN, O_RDWR | O_NOFOLLOW)
    return readPlan(this.#planFd, this.path)
  }

  /**
   * Removes the journal and what was moved aside. The last act of an operation, and harmless to repeat. The plan goes
   * first, so that what is left of a removal that was cut short is never carried out.
   */
  remove(): void {
    for (const fd of [this.#stageFd, this.#trashFd, this.#planFd]) if (fd !== undefined) close(fd)
    this.#stageFd = this.#trashFd = this.#planFd = undefined
    if (tryStatAt(this.#parentFd, this.#name) === undefined) return // all but the last sync was done before
    unlink(this.fd, PLAN)
    fsync(this.fd, this.path)
    const names: ByteString[] = []
    readDirents(this.fd, (name) => names.push(name))
    // From within, since what is lifted on the way must not come to lie beside other journals.
    for (const name of names) removeTree(this.fd, name)
    removeDirectory(this.#parentFd, this.#name)
    fsync(this.#parentFd, this.path)
  }

  /** Empties the places inside a target; to be followed by setting the target root's times. */
  removeInside(targetFd: number): void {
    const name = this.#insideName()
    if (name === undefined) return
    for (const fd of [this.#insideFd, this.#stageFd, this.#trashFd]) if (fd !== undefined) close(fd)
    this.#insideFd = this.#stageFd = this.#trashFd = undefined
    if (tryStatAt(targetFd, name) !== undefined) removeTree(targetFd, name)
  }

  /** Whether the places for what is moved aside were made, so that the tree that they are for was there. */
  get wasPrepared(): boolean {
    return tryStatAt(this.fd, STAGE) !== undefined || this.isInside
  }

  /** Whether stage and trash lie inside the target. */
  get isInside(): boolean {
    return this.#insideName() !== undefined
  }

  close(): void {
    for (const fd of [this.#stageFd, this.#trashFd, this.#planFd, this.#insideFd]) if (fd !== undefined) close(fd)
    close(this.fd)
    close(this.#parentFd)
  }
}

// What is made in the journal goes into the target, which must not inherit what the directory around it hands down.
function dropDefaultAcl(fd: number): void {
  removeXattr(fd, '', ACL_DEFAULT)
}

function openOrMake(dirfd: number, name: ByteString): number {
  if (tryStatAt(dirfd, name) === undefined) makeDirectory(dirfd, name, 0o700)
  return openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
}

function required(fd: number | undefined): number {
  if (fd === undefined) throw new Error('the journal is not prepared')
  return fd
}

interface Hasher {
  update(input: string | Uint8Array): Hasher
  digest(): bigint
}

/** Appends records to a plan file, keeping of them only where they are. */
export class PlanWriter {
  readonly #fd: number
  readonly #header: PlanHeader
  readonly #hash: Hasher
  readonly #path: string
  readonly #buffer = Buffer.allocUnsafeSlow(WRITE_BYTES)
  #offset = 0
  #buffered = 0
  #records = 0
  readonly #lines: LineIndex[] = []
  readonly #stages: StageRecord[] = []
  readonly #groups = new Map<string, string[]>()

  /** Writes into an empty open file; `path` is what errors call it. */
  static async start(fd: number, header: PlanHeader, path: string): Promise<PlanWriter> {
    const { create64 } = await xxhash()
    return new PlanWriter(fd, header, create64(), path)
  }

  private constructor(fd: number, header: PlanHeader, hash: Hasher, path: string) {
    this.#fd = fd
    this.#header = header
    this.#hash = hash
    this.#path = path
    this.#append(`${JSON.stringify(header)}\n`)
  }

  /** Adds a record as the JSON line that `lineOf` made. */
  addLine(line: EncodedLine): void {
    const offset = this.#offset
    const length = this.#append(line.text) - 1
    this.#lines.push({ ...line.index, offset, length })
    for (const [group, path] of line.groups) addTo(this.#groups, group, path)
    this.#records++
  }

  addStage(record: StageRecord): void {
    this.#stages.push(record)
    this.#records++
    this.#append(`${JSON.stringify(record)}\n`)
  }

  /** Makes the plan count: from here on an interrupted apply is finished, not undone. */
  seal(): SealedPlan {
    this.#flush()
    const end: PlanEnd = { type: 'end', records: this.#records, digest: hex(this.#hash.digest()) }
    writeAt(this.#fd, this.#offset, Buffer.from(`${JSON.stringify(end)}\n`), this.#path)
    fsync(this.#fd, this.#path)
    return { header: this.#header, lines: sorted(this.#lines), stages: this.#stages, groups: sortGroups(this.#groups) }
  }

  // Into one buffer for all lines: one for each would be garbage faster than it is collected. Gives the length in bytes.
  #append(text: string): number {
    const most = text.length * 3
    if (this.#buffered + most > WRITE_BYTES) this.#flush()
    if (most > WRITE_BYTES) {
      const bytes = Buffer.from(text)
      this.#write(bytes)
      this.#offset += bytes.length
      return bytes.length
    }
    const length = this.#buffer.write(text, this.#buffered)
    this.#buffered += length
    this.#offset += length
    return length
  }

  #flush(): void {
    const bytes = this.#buffer.subarray(0, this.#buffered)
    this.#offset -= bytes.length
    this.#write(bytes)
    this.#offset += bytes.length
    this.#buffered = 0
  }

  #write(bytes: Buffer): void {
    if (bytes.length === 0) return
    this.#hash.update(bytes)
    writeAt(this.#fd, this.#offset, bytes, this.#path)
  }
}

/** A record as its line, with what the index must know of it; made where the record is made, also in a worker. */
export interface EncodedLine {
  readonly text: string
  readonly index: Omit<LineIndex, 'offset' | 'length'>
  readonly groups: readonly (readonly [group: string, path: string])[]
}

export function lineOf(record: DirectoryRecord | CleanRecord): EncodedLine {
  return { text: `${JSON.stringify(record)}\n`, index: indexOf(record), groups: groupsOf(record) }
}

function indexOf(record: DirectoryRecord | CleanRecord): EncodedLine['index'] {
  if (record.type === 'clean') {
    const none = { hasStructure: false, upper: undefined, isPart: false, hasFlags: false, replaces: false }
    return { path: record.upper, type: 'clean', ...none }
  }
  const hasStructure = record.steps.some(
    (step) => step.do === 'mkdir' || (step.do === 'graft' && step.meta === undefined),
  )
  const hasFlags = record.flags !== undefined || record.steps.some((step) => 'flags' in step)
  return {
    path: record.path,
    type: 'directory',
    hasStructure,
    upper: record.upper,
    isPart: record.part === true,
    hasFlags,
    replaces: record.steps.some(({ was }) => was !== 'nothing'),
  }
}

function groupsOf(record: DirectoryRecord | CleanRecord): [string, string][] {
  if (record.type === 'clean') return []
  const groups: [string, string][] = []
  for (const step of record.steps) {
    if ((step.do === 'place' || step.do === 'graft') && step.group !== undefined) {
      groups.push([step.group, record.path === '' ? step.name : `${record.path}/${step.name}`])
    }
  }
  return groups
}

/** Reads a plan file: verified, indexed, not held. */
async function readPlan(fd: number, path: string): Promise<SealedPlan | undefined> {
  const { create64 } = await xxhash()
  const hash = create64()
  const lines: LineIndex[] = []
  const stages: StageRecord[] = []
  const groups = new Map<string, string[]>()
  let header: PlanHeader | undefined
  let records = 0
  for (const { bytes, offset } of linesOf(fd)) {
    let parsed: PlanHeader | PlanRecord | PlanEnd
    try {
      parsed = JSON.parse(bytes.toString('utf8', 0, bytes.length - 1)) as typeof parsed
    } catch {
      return undefined // the write of this line was cut short, before the plan was sealed
    }
    if (parsed.type === 'end') {
      if (header === undefined || parsed.records !== records || parsed.digest !== hex(hash.digest())) {
        throw new JournalDamagedError(path, 'its digest does not fit')
      }
      return { header, lines: sorted(lines), stages, groups: sortGroups(groups) }
    }
    hash.update(bytes)
    if (parsed.type === 'header') {
      if (parsed.format !== 1) throw new JournalDamagedError(path, `format ${parsed.format} is not known here`)
      header = parsed
      continue
    }
    records++
    if (parsed.type === 'stage') stages.push(parsed)
    else {
      lines.push({ ...indexOf(parsed), offset, length: bytes.length - 1 })
      for (const [group, to] of groupsOf(parsed)) addTo(groups, group, to)
    }
  }
  return undefined
}

function* linesOf(fd: number): Generator<{ bytes: Buffer; offset: number }> {
  let carry = Buffer.alloc(0)
  let offset = 0
  let at = 0
  for (;;) {
    const chunk = readAt(fd, at, READ_BYTES)
    if (chunk.length === 0) return
    at += chunk.length
    const whole = carry.length === 0 ? chunk : Buffer.concat([carry, chunk])
    let start = 0
    for (let end = whole.indexOf(10, start); end >= 0; end = whole.indexOf(10, start)) {
      yield { bytes: whole.subarray(start, end + 1), offset }
      offset += end + 1 - start
      start = end + 1
    }
    carry = Buffer.from(whole.subarray(start))
  }
}

/** One record of a sealed plan. */
export function readRecord(planFd: number, line: { offset: number; length: number }): DirectoryRecord | CleanRecord {
  return JSON.parse(readTextAt(planFd, line.offset, line.length)) as DirectoryRecord | CleanRecord
}

/** Every line of a plan but the end, in the order for people: header, stages, records by path. */
export function planLines(plan: SealedPlan, planFd: number, emit: (line: string) => void): void {
  emit(JSON.stringify(plan.header))
  for (const stage of plan.stages) emit(JSON.stringify(stage))
  for (const { offset, length } of plan.lines) emit(readTextAt(planFd, offset, length))
}

function hex(value: bigint): string {
  return value.toString(16).padStart(16, '0')
}

// By path bytes, not by UTF-16: the plan is the same wherever it is made.
function sorted(lines: LineIndex[]): LineIndex[] {
  const keys = new Map(lines.map((line) => [line, bytesOf(line.path)]))
  return lines.sort((left, right) => ((keys.get(left) as string) < (keys.get(right) as string) ? -1 : 1))
}

function sortGroups(groups: Map<string, string[]>): Map<string, string[]> {
  for (const paths of groups.values()) paths.sort((left, right) => (bytesOf(left) < bytesOf(right) ? -1 : 1))
  return groups
}
