import {
  bytesOf,
  close,
  DT_DIR,
  DT_REG,
  errnoOf,
  FS_APPEND_FL,
  FS_IMMUTABLE_FL,
  type HostPath,
  LsyncError,
  printable,
  readAt,
  type Stat,
  statFd,
  textOf,
  tryStatAt,
} from '@lsync/posix'
import xxhash from 'xxhash-wasm'
import { Journal, lineOf, PlanWriter, readRecord, type SealedPlan } from './journal.ts'
import { defaultWorkers, finishInPlace, isOneFileSystem } from './merge.ts'
import { isMark, MARKS, type MarkNames, type Namespace, parseRedirect } from './model/marks.ts'
import { type EntryPath, join, type Name, ROOT, split } from './model/path.ts'
import {
  type CleanRecord,
  type DirectoryRecord,
  type Expectation,
  type GraftStep,
  type PlaceStep,
  type PlanEnd,
  type PlanHeader,
  type PlannedMeta,
  planName,
  planPath,
  type StageRecord,
  type Step,
  type Was,
} from './model/plan.ts'
import { openTemporaryPlan, type Progress, planStack } from './planning.ts'
import { Pool } from './pool.ts'
import { recoverBefore } from './recover.ts'
import { assertMergeable, RootWatch } from './safety.ts'
import { openLayerDirectory, type RawEntry, sortedDirents, tryInspect, typeOf } from './scan.ts'
import { closeStack, type OpenStack, openStack, type StackRequest, stackInit } from './stack.ts'
import { realStack } from './view.ts'

export interface PortablePlanRequest extends StackRequest {
  /** Whether upper and lower are one file system where the plan will be applied. Default: as they are here. */
  readonly rename?: boolean
  readonly workers?: number
  readonly allowEmpty?: boolean
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: Progress) => void
}

/**
 * The plan of an in-place merge as JSON lines without newlines: header, stages, records by path bytes, end with a digest.
 * Each step says what it expects to find, so that the plan can be applied by `applyPortablePlan` on another machine
 * that has the same trees under other paths. Reads only. The same layers give the same lines.
 * @throws {LsyncError} what a merge refuses
 */
export async function* makePortablePlan(request: PortablePlanRequest): AsyncIterable<string> {
  const { upper, lowers, data = [] } = realStack(request)
  const stack = openStack({ ...request, upper, lowers, data }, lowers.length > 1, 1)
  let fd: number | undefined
  try {
    const [layer, base] = stack.layers as readonly [Layer, Layer]
    assertMergeable({ mode: 'in-place', upper, lowers, data, workdir: undefined, target: base.path, stack })
    const rename = request.rename ?? isOneFileSystem(layer.fd, base.fd)
    const header = headerOf(stack, { namespace: stack.namespace, rename, below: stack.below })
    const plan = { mode: 'in-place' as const, rename, plain: false, portable: true }
    const workers = request.workers ?? defaultWorkers(stack)
    const pool = new Pool({ stack: stackInit(stack), plan }, { workers, signal: request.signal })
    fd = openTemporaryPlan()
    try {
      const writer = await PlanWriter.start(fd, header, 'plan')
      const planned = await planStack({
        stack,
        rename,
        pool,
        writer,
        accept: (root) => {
          if (request.allowEmpty !== true) root.assertNotEmptied(base.fd, base.path)
        },
        ...(request.onProgress === undefined ? {} : { report: request.onProgress }),
      })
      yield* portableLines(planned.plan, fd)
    } finally {
      await pool.close()
    }
  } finally {
    if (fd !== undefined) close(fd)
    closeStack(stack)
  }
}

type Layer = OpenStack['layers'][number]

function headerOf(
  stack: OpenStack,
  { namespace, rename, below }: { namespace: Namespace; rename: boolean; below: boolean },
): PlanHeader {
  const [upper, base] = stack.layers as readonly [Layer, Layer]
  return {
    type: 'header',
    format: 1,
    mode: 'in-place',
    namespace,
    upper: textOf(upper.path),
    lowers: [textOf(base.path)],
    data: stack.data.map(({ path }) => textOf(path)),
    upperIno: String(statFd(upper.fd).ino),
    targetIno: String(statFd(base.fd).ino),
    target: textOf(base.path),
    consume: true,
    rename,
    below,
    plain: false,
    portable: true,
  }
}

async function* portableLines(plan: SealedPlan, fd: number): AsyncIterable<string> {
  const { create64 } = await xxhash()
  const hash = create64()
  let records = -1
  const counted = (line: string) => {
    hash.update(`${line}\n`)
    records++
    return line
  }
  yield counted(JSON.stringify(plan.header))
  for (const stage of plan.stages) yield counted(JSON.stringify(stage))
  for (const { offset, length } of plan.lines) yield counted(readAt(fd, offset, length).toString('utf8'))
  yield JSON.stringify({ type: 'end', records, digest: hex(hash.digest()) } satisfies PlanEnd)
}

function hex(value: bigint): string {
  return value.toString(16).padStart(16, '0')
}

/** A plan that is not one, or not a whole one. Nothing was touched. */
export class PlanInvalidError extends LsyncError {
  constructor(line: number, why: string) {
    super('PLAN_INVALID', `line ${line} of the plan: ${why}`, {
      hint: 'make it with `lsync plan --json`, and bring it over whole',
    })
  }
}

/** One thing that is not as the plan was made for. */
export interface FailedPrecondition {
  /** In the upper, or in the target. */
  readonly path: EntryPath
  readonly in: 'upper' | 'target'
  readonly expected: string
  readonly actual: string
}

/** The trees are not the ones that the plan was made from. Nothing was touched. */
export class PreconditionFailedError extends LsyncError {
  /** At most 1,000 of them. */
  readonly failed: readonly FailedPrecondition[]
  readonly total: number

  constructor(failed: readonly FailedPrecondition[], total: number, wasRecovered: boolean) {
    const [first] = failed as [FailedPrecondition]
    const where = `${printable(first.path) || 'the root'} (${first.in})`
    const more = total > 1 ? ` (and ${total - 1} more)` : ''
    super('PRECONDITION_FAILED', `${where} should be ${first.expected} and is ${first.actual}${more}`, {
      path: first.path,
      hint: wasRecovered
        ? 'an interrupted merge into this target was finished first; if it was this plan, nothing is left to do'
        : 'make the plan again from the trees as they are now',
    })
    this.failed = failed
    this.total = total
  }
}

export interface ApplyPlanRequest {
  readonly upper: HostPath
  /** The lower that the upper is folded into. */
  readonly target: HostPath
  /** Data-only lowers, as many as the plan has. */
  readonly data?: readonly HostPath[]
  /** Check the plan and every precondition; nothing is changed. */
  readonly dryRun?: boolean
  readonly workers?: number
  readonly allowEmpty?: boolean
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: Progress) => void
}

export interface ApplyPlanReport {
  readonly target: HostPath
  /** Directories that change, and what happens in them. */
  readonly directories: number
  readonly steps: number
  /** An interrupted merge was finished or rolled back first. */
  readonly recovered: boolean
  readonly dryRun: boolean
  readonly elapsedMs: number
}

/**
 * Applies a portable plan to trees of this machine: validated as if an enemy had written it, then every precondition
 * (type, size and mtime of each name of upper and target that it is about, and no name more) checked, and only then
 * carried out through the same journal as a local merge. Killed at any point, `recover` finishes it or rolls it back.
 * @throws {PlanInvalidError | PreconditionFailedError | LsyncError} and nothing was touched, unless it says otherwise
 */
export async function applyPortablePlan(
  lines: AsyncIterable<string> | Iterable<string>,
  request: ApplyPlanRequest,
): Promise<ApplyPlanReport> {
  const start = performance.now()
  const { target: lower, data: dataLowers = [] } = request
  const { upper, lowers, data = [] } = realStack({ upper: request.upper, lowers: [lower], data: dataLowers })
  const target = lowers[0] as HostPath
  const planFd = openTemporaryPlan()
  try {
    const received = await receive(lines, planFd)
    const { header } = received.plan
    if (header.data.length !== data.length) {
      throw new PlanInvalidError(1, `it needs ${header.data.length} data-only layers, and ${data.length} are given`)
    }
    const stack = openStack({ upper, lowers, data, namespace: header.namespace }, header.below)
    try {
      const report = await apply({ request, stack, target, data, planFd, received })
      return { target, ...report, dryRun: request.dryRun === true, elapsedMs: performance.now() - start }
    } finally {
      closeStack(stack)
    }
  } finally {
    close(planFd)
  }
}

interface Application {
  readonly request: ApplyPlanRequest
  readonly stack: OpenStack
  readonly target: HostPath
  readonly data: readonly HostPath[]
  readonly planFd: number
  readonly received: Received
}

async function apply(application: Application): Promise<Pick<ApplyPlanReport, 'directories' | 'steps' | 'recovered'>> {
  const { request, stack, target, data, planFd, received } = application
  const { header } = received.plan
  const [layer, base] = stack.layers as readonly [Layer, Layer]
  const counts = { directories: received.directories, steps: received.steps }
  const recovered = request.dryRun === true ? false : await recoverBefore(target)
  assertMergeable({
    mode: 'in-place',
    upper: layer.path,
    lowers: [target],
    data,
    workdir: undefined,
    target,
    stack,
    dryRun: request.dryRun === true,
  })
  if (header.rename && !isOneFileSystem(layer.fd, base.fd)) {
    throw new PlanInvalidError(
      1,
      'it moves by renaming, and here upper and target are two file systems (rename: false)',
    )
  }
  const journal = request.dryRun === true ? undefined : (Journal.open(target, { create: true }) as Journal)
  let isSealed = false
  try {
    const check = new PreconditionCheck(stack, received.plan, planFd)
    check.run()
    if (check.total > 0) throw new PreconditionFailedError(check.failed, check.total, recovered)
    if (request.allowEmpty !== true) {
      const root = new RootWatch()
      for (const line of received.plan.lines) {
        if (line.path === '' && line.type === 'directory') root.add((readRecord(planFd, line) as DirectoryRecord).steps)
      }
      root.assertNotEmptied(base.fd, target)
    }
    if (journal === undefined) return { ...counts, recovered }
    const writer = await journal.write(headerOf(stack, header))
    for (const stage of received.plan.stages) writer.addStage(stage)
    for (const line of received.plan.lines) writer.addLine(lineOf(readRecord(planFd, line)))
    const plan = writer.seal()
    isSealed = true
    await execute(request, stack, journal, plan)
    return { ...counts, recovered }
  } catch (error) {
    if (!isSealed) journal?.remove() // nothing was touched yet
    throw error
  } finally {
    journal?.close()
  }
}

async function execute(request: ApplyPlanRequest, stack: OpenStack, journal: Journal, plan: SealedPlan): Promise<void> {
  const workers = request.workers ?? defaultWorkers(stack)
  const pool = new Pool({ stack: stackInit(stack) }, { workers, signal: request.signal })
  try {
    const { fd: targetFd } = stack.layers[1] as Layer
    journal.prepare(targetFd)
    await finishInPlace({
      stack,
      plan,
      journal,
      targetFd,
      pool,
      reflink: false,
      leftOut: false,
      resumed: false,
      ...(request.onProgress === undefined ? {} : { report: request.onProgress }),
    })
  } finally {
    await pool.close()
  }
}

/** A plan that has the right form, in a file of ours. */
interface Received {
  readonly plan: SealedPlan
  readonly directories: number
  readonly steps: number
}

/** Reads lines as an enemy's: what comes out has only known fields, each of its type and within its bounds. */
async function receive(lines: AsyncIterable<string> | Iterable<string>, planFd: number): Promise<Received> {
  const { create64 } = await xxhash()
  const hash = create64()
  let writer: PlanWriter | undefined
  let header: PlanHeader | undefined
  let end: PlanEnd | undefined
  let number = 0
  let records = 0
  const stages: StageRecord[] = []
  const structure = new Structure()
  for await (const text of lines) {
    const line = text.endsWith('\n') ? text.slice(0, -1) : text
    number++
    if (end !== undefined) throw new PlanInvalidError(number, 'there is something after the end')
    const read = new LineReader(number, line)
    if (header === undefined) {
      header = read.header()
      writer = await PlanWriter.start(planFd, header, 'plan')
      hash.update(`${line}\n`)
      continue
    }
    const kind = read.type()
    if (kind === 'end') {
      end = read.end()
      if (end.records !== records) throw new PlanInvalidError(number, `${records} records came, and not ${end.records}`)
      if (end.digest !== hex(hash.digest())) throw new PlanInvalidError(number, 'the digest does not fit')
      continue
    }
    hash.update(`${line}\n`)
    records++
    if (kind === 'stage') stages.push(structure.stage(number, read.stage()))
    else if (kind === 'clean') writer?.addLine(lineOf(structure.clean(number, read.clean(header))))
    else writer?.addLine(lineOf(structure.directory(number, read.directory(header))))
  }
  if (end === undefined || writer === undefined) throw new PlanInvalidError(number, 'it ends too early')
  structure.finish(number)
  for (const stage of stages) writer.addStage(stage)
  return { plan: writer.seal(), directories: structure.directories, steps: structure.steps }
}

type Fields = Readonly<Record<string, unknown>>

const NAME_MAX = 255
const XATTR_MAX = 65_536
const FLAGS = FS_IMMUTABLE_FL | FS_APPEND_FL
const NO_ID = 0xffff_ffff
const TIME_LIMIT_NS = 2n ** 63n * 1_000_000_000n

/** One line of a plan. Every method gives a new value of known fields, or throws. */
class LineReader {
  readonly #number: number
  readonly #fields: Fields

  constructor(number: number, line: string) {
    this.#number = number
    let parsed: unknown
    try {
      parsed = JSON.parse(line)
    } catch {
      this.#fail('it is not JSON')
    }
    this.#fields = this.#object(parsed, 'it')
  }

  type(): 'stage' | 'clean' | 'directory' | 'end' {
    return this.#oneOf(this.#fields['type'], ['stage', 'clean', 'directory', 'end'], 'type')
  }

  header(): PlanHeader {
    const fields = this.#fields
    this.#oneOf(fields['type'], ['header'], 'type')
    if (fields['format'] !== 1) this.#fail('its format is not known here')
    this.#oneOf(fields['mode'], ['in-place'], 'mode')
    if (fields['portable'] !== true || fields['consume'] !== true || fields['plain'] !== false) {
      this.#fail('it is no portable plan of a merge in place')
    }
    if (fields['publish'] !== undefined || fields['workdir'] !== undefined) this.#fail('it is bound to its machine')
    const data = this.#array(fields['data'], 'data')
    if (data.length > 500) this.#fail('it has too many data-only layers')
    return {
      type: 'header',
      format: 1,
      mode: 'in-place',
      namespace: this.#oneOf(fields['namespace'], ['trusted', 'user'], 'namespace'),
      // The paths of the machine that made it mean nothing here.
      upper: '',
      lowers: [''],
      data: data.map(() => ''),
      upperIno: '',
      targetIno: '',
      target: '',
      consume: true,
      rename: this.#boolean(fields['rename'], 'rename'),
      below: this.#boolean(fields['below'], 'below'),
      plain: false,
      portable: true,
    }
  }

  end(): PlanEnd {
    const records = this.#integer(this.#fields['records'], Number.MAX_SAFE_INTEGER, 'records')
    const digest = this.#string(this.#fields['digest'], 'digest')
    if (!/^[0-9a-f]{16}$/.test(digest)) this.#fail('the digest is none')
    return { type: 'end', records, digest }
  }

  stage(): StageRecord {
    const fields = this.#fields
    const [from, to] = [this.#path(fields['from'], 'from'), this.#path(fields['to'], 'to')]
    if (from === '' || to === '') this.#fail('the root is moved')
    const kind = this.#oneOf(fields['kind'], ['directory', 'file'], 'kind')
    const how = this.#oneOf(fields['how'], ['move', 'copy', 'stay', 'fill'], 'how')
    const upper = fields['upper'] === undefined ? undefined : this.#path(fields['upper'], 'upper')
    if ((kind === 'file') !== (upper !== undefined) || (upper !== undefined && upper !== to)) {
      this.#fail('upper does not fit')
    }
    if (kind === 'directory' && how !== 'move' && how !== 'copy') this.#fail(`a directory cannot ${how}`)
    const id = this.#integer(fields['id'], 0xffff_ffff, 'id')
    return { type: 'stage', id, from, to, kind, how, ...(upper === undefined ? {} : { upper }) }
  }

  clean(header: PlanHeader): CleanRecord {
    const fields = this.#fields
    const record: CleanRecord = { type: 'clean', upper: this.#path(fields['upper'], 'upper') }
    if (fields['whiteouts'] !== undefined) {
      record.whiteouts = this.#array(fields['whiteouts'], 'whiteouts').map((name) => this.#name(name))
    }
    if (fields['drop'] !== undefined) {
      record.drop = this.#array(fields['drop'], 'drop').map((pair) => {
        const [name, attributes] = this.#pair(pair, 'drop')
        return [this.#nameOrSelf(name), this.#marks(attributes, MARKS[header.namespace])]
      })
    }
    if (fields['flags'] !== undefined) {
      record.flags = this.#array(fields['flags'], 'flags').map((pair) => {
        const [name, flags] = this.#pair(pair, 'flags')
        return [this.#nameOrSelf(name), this.#flags(flags)]
      })
    }
    if (fields['times'] !== undefined) {
      const [atimeNs, mtimeNs] = this.#pair(fields['times'], 'times')
      record.times = [this.#time(atimeNs), this.#time(mtimeNs)]
    }
    return record
  }

  directory(header: PlanHeader): DirectoryRecord {
    const fields = this.#fields
    const path = this.#path(fields['path'], 'path')
    const marks = MARKS[header.namespace]
    const record: DirectoryRecord = {
      type: 'directory',
      path,
      meta: this.#meta(fields['meta'], marks),
      steps: this.#array(fields['steps'], 'steps').map((step) => this.#step(this.#object(step, 'a step'), header)),
    }
    if (fields['part'] !== undefined) record.part = this.#true(fields['part'], 'part')
    if (fields['upper'] !== undefined) {
      record.upper = this.#path(fields['upper'], 'upper')
      if (record.upper !== path) this.#fail('an upper has its names where the view has them')
    }
    if (fields['opaque'] !== undefined) record.opaque = this.#true(fields['opaque'], 'opaque')
    if (fields['redirect'] !== undefined) {
      const redirect = this.#text(fields['redirect'], 'redirect')
      if (!parseRedirect(Buffer.from(bytesOf(redirect), 'latin1')).ok) this.#fail('redirect is none')
      record.redirect = redirect
    }
    if ((record.opaque || record.redirect !== undefined) && !header.below) this.#fail('a mark where nothing lies below')
    if (fields['flags'] !== undefined) record.flags = this.#flags(fields['flags'])
    return record
  }

  #step(fields: Fields, header: PlanHeader): Step {
    const kind = this.#oneOf(fields['do'], ['remove', 'whiteout', 'place', 'mkdir', 'graft'], 'do')
    const was: Was = this.#oneOf(fields['was'], ['nothing', 'file', 'directory'], 'was')
    const expectTarget = this.#expectation(fields['expectTarget'])
    if ((was === 'nothing') !== (expectTarget === undefined))
      this.#fail('it does not say what it expects in the target')
    const common = { name: this.#name(fields['name']), was, ...(expectTarget === undefined ? {} : { expectTarget }) }
    if (kind === 'remove' || kind === 'mkdir') return { do: kind, ...common }
    if (kind === 'whiteout') {
      if (!header.below) this.#fail('a whiteout where nothing lies below')
      return { do: kind, ...common }
    }
    if (kind === 'graft') return this.#graft(fields, common, header)
    return this.#place(fields, common, header)
  }

  #graft(fields: Fields, common: Pick<GraftStep, 'name' | 'was' | 'expectTarget'>, header: PlanHeader): GraftStep {
    const marks = MARKS[header.namespace]
    const step: GraftStep = { do: 'graft', ...common, from: this.#path(fields['from'], 'from') }
    if (step.from === '') this.#fail('the root is moved')
    if (fields['meta'] !== undefined) step.meta = this.#meta(fields['meta'], marks)
    if (fields['drop'] !== undefined) step.drop = this.#marks(fields['drop'], marks)
    if (fields['flags'] !== undefined) step.flags = this.#flags(fields['flags'])
    if (fields['group'] !== undefined) step.group = this.#string(fields['group'], 'group')
    if (step.meta === undefined && step.group !== undefined) this.#fail('a directory has one name')
    return step
  }

  #place(fields: Fields, common: Pick<PlaceStep, 'name' | 'was' | 'expectTarget'>, header: PlanHeader): PlaceStep {
    const marks = MARKS[header.namespace]
    const step: PlaceStep = { do: 'place', ...common }
    // In place everything comes from where the record's upper has the same name.
    if (fields['from'] !== undefined) this.#fail('from another place of the upper')
    if (fields['data'] !== undefined) {
      const [layer, path] = this.#pair(fields['data'], 'data')
      const index = this.#integer(layer, 1 + header.data.length, 'data')
      if (index < 2) this.#fail('data is in no data-only layer')
      step.data = [index, this.#path(path, 'data')]
      if (step.data[1] === '') this.#fail('data is a directory')
    }
    if (fields['metacopy'] !== undefined) step.metacopy = this.#true(fields['metacopy'], 'metacopy')
    if (step.metacopy && (!header.below || step.data !== undefined)) this.#fail('a metacopy where nothing lies below')
    if (fields['tree'] !== undefined) step.tree = this.#true(fields['tree'], 'tree')
    if (fields['drop'] !== undefined) step.drop = this.#marks(fields['drop'], marks)
    if (fields['set'] !== undefined) step.set = this.#setMarks(fields['set'], marks)
    if (fields['flags'] !== undefined) step.flags = this.#flags(fields['flags'])
    if (fields['group'] !== undefined) step.group = this.#string(fields['group'], 'group')
    if (fields['sizeBytes'] !== undefined) {
      step.sizeBytes = this.#integer(fields['sizeBytes'], Number.MAX_SAFE_INTEGER, 'sizeBytes')
    }
    const expect = this.#expectation(fields['expect'])
    if (expect !== undefined) step.expect = expect
    if (step.tree) {
      if (step.data !== undefined || step.metacopy || step.group !== undefined) this.#fail('a tree is not a file')
      if (!header.rename) this.#fail('a tree moves only by renaming')
    } else if (expect === undefined) this.#fail('it does not say what it expects in the upper')
    if (step.set !== undefined && !header.below) this.#fail('a mark where nothing lies below')
    return step
  }

  #expectation(value: unknown): Expectation | undefined {
    if (value === undefined) return undefined
    const fields = this.#object(value, 'an expectation')
    const expectation: Expectation = { type: this.#integer(fields['type'], 15, 'type') }
    if (fields['sizeBytes'] !== undefined) {
      expectation.sizeBytes = this.#integer(fields['sizeBytes'], Number.MAX_SAFE_INTEGER, 'sizeBytes')
    }
    if (fields['mtimeNs'] !== undefined) expectation.mtimeNs = this.#time(fields['mtimeNs'])
    return expectation
  }

  #meta(value: unknown, marks: MarkNames): PlannedMeta {
    const fields = this.#object(value, 'meta')
    const meta: PlannedMeta = {
      mode: this.#integer(fields['mode'], 0o7777, 'mode'),
      uid: this.#integer(fields['uid'], NO_ID - 1, 'uid'),
      gid: this.#integer(fields['gid'], NO_ID - 1, 'gid'),
      atimeNs: this.#time(fields['atimeNs']),
      mtimeNs: this.#time(fields['mtimeNs']),
    }
    if (fields['xattrs'] === undefined) return meta
    const seen = new Set<string>()
    meta.xattrs = this.#array(fields['xattrs'], 'xattrs').map((pair) => {
      const [name, value] = this.#pair(pair, 'xattrs')
      const attribute = this.#attribute(name)
      if (isMark(bytesOf(attribute), marks)) this.#fail('a mark among the attributes')
      if (seen.has(attribute)) this.#fail('an attribute twice')
      seen.add(attribute)
      return [attribute, this.#base64(value)]
    })
    return meta
  }

  #setMarks(value: unknown, marks: MarkNames): [string, string][] {
    return this.#array(value, 'set').map((pair) => {
      const [name, bytes] = this.#pair(pair, 'set')
      const attribute = this.#attribute(name)
      const base64 = this.#base64(bytes)
      const isOpaque = attribute === marks.opaque && base64 === Buffer.from('y').toString('base64')
      const isRedirect = attribute === marks.redirect && parseRedirect(Buffer.from(base64, 'base64')).ok
      if (!isOpaque && !isRedirect) this.#fail('it sets an attribute that is no mark')
      return [attribute, base64]
    })
  }

  #marks(value: unknown, marks: MarkNames): string[] {
    return this.#array(value, 'drop').map((name) => {
      const attribute = this.#attribute(name)
      if (!isMark(bytesOf(attribute), marks)) this.#fail('it drops an attribute that is no mark')
      return attribute
    })
  }

  #attribute(value: unknown): string {
    const text = this.#text(value, 'an attribute')
    const bytes = bytesOf(text)
    if (bytes.length > NAME_MAX || !/^(user|trusted|security|system)\../s.test(bytes)) this.#fail('no attribute name')
    return text
  }

  #base64(value: unknown): string {
    const text = this.#string(value, 'a value')
    const bytes = Buffer.from(text, 'base64')
    if (bytes.length > XATTR_MAX || bytes.toString('base64') !== text) this.#fail('a value is not base64')
    return text
  }

  #flags(value: unknown): number {
    const flags = this.#integer(value, FLAGS, 'flags')
    if ((flags & ~FLAGS) !== 0) this.#fail('flags beyond immutable and append-only')
    return flags
  }

  #time(value: unknown): string {
    const text = this.#string(value, 'a time')
    if (!/^(0|-?[1-9]\d{0,29})$/.test(text)) this.#fail('a time is none')
    const ns = BigInt(text)
    if (ns >= TIME_LIMIT_NS || ns <= -TIME_LIMIT_NS) this.#fail('a time is none')
    return text
  }

  #path(value: unknown, what: string): string {
    const text = this.#text(value, what)
    if (text === '') return text
    for (const part of bytesOf(text).split('/')) this.#assertName(part, what)
    return text
  }

  #name(value: unknown): string {
    const text = this.#text(value, 'a name')
    this.#assertName(bytesOf(text), 'a name')
    return text
  }

  #nameOrSelf(value: unknown): string {
    return value === '' ? '' : this.#name(value)
  }

  #assertName(bytes: string, what: string): void {
    if (bytes === '' || bytes === '.' || bytes === '..' || bytes.length > NAME_MAX || /[/\0]/.test(bytes)) {
      this.#fail(`${what} is no name within a tree: ${printable(bytes.slice(0, NAME_MAX))}`)
    }
  }

  /** Text that stands for bytes, and is the one text that does. */
  #text(value: unknown, what: string): string {
    const text = this.#string(value, what)
    try {
      if (textOf(bytesOf(text)) === text) return text
    } catch (error) {
      if (errnoOf(error) !== 'EILSEQ') throw error
    }
    return this.#fail(`${what} is not text for bytes`)
  }

  #string(value: unknown, what: string): string {
    return typeof value === 'string' ? value : this.#fail(`${what} is no text`)
  }

  #boolean(value: unknown, what: string): boolean {
    return typeof value === 'boolean' ? value : this.#fail(`${what} is neither true nor false`)
  }

  #true(value: unknown, what: string): true {
    return value === true ? value : this.#fail(`${what} is not true`)
  }

  #integer(value: unknown, most: number, what: string): number {
    if (typeof value === 'number' && Number.isSafeInteger(value) && value >= 0 && value <= most) return value
    return this.#fail(`${what} is out of bounds`)
  }

  #oneOf<T extends string>(value: unknown, words: readonly T[], what: string): T {
    return words.includes(value as T) ? (value as T) : this.#fail(`${what} is not known`)
  }

  #array(value: unknown, what: string): readonly unknown[] {
    return Array.isArray(value) ? value : this.#fail(`${what} is no list`)
  }

  #pair(value: unknown, what: string): readonly [unknown, unknown] {
    if (Array.isArray(value) && value.length === 2) return value as unknown as readonly [unknown, unknown]
    return this.#fail(`${what} is no pair`)
  }

  #object(value: unknown, what: string): Fields {
    if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Fields
    return this.#fail(`${what} is no object`)
  }

  #fail(why: string): never {
    throw new PlanInvalidError(this.#number, why)
  }
}

/** How the records of a plan hang together. */
class Structure {
  directories = 0
  steps = 0
  /** What the steps of each directory make of its names, as far as it concerns other records. */
  readonly #made = new Map<string, 'mkdir' | 'tree' | 'graft' | 'other'>()
  readonly #records = new Map<string, { line: number; names: Set<string>; isWhole: boolean }>()
  readonly #cleans: { line: number; path: string }[] = []
  readonly #stages = new Map<string, { line: number; stage: StageRecord }>()
  readonly #grafts = new Map<string, { line: number; from: string; isDirectory: boolean }>()
  readonly #ids = new Set<number>()

  stage(line: number, stage: StageRecord): StageRecord {
    if (this.#ids.has(stage.id) || this.#stages.has(stage.to)) throw new PlanInvalidError(line, 'a stage twice')
    this.#ids.add(stage.id)
    this.#stages.set(stage.to, { line, stage })
    return stage
  }

  clean(line: number, record: CleanRecord): CleanRecord {
    this.#cleans.push({ line, path: record.upper })
    return record
  }

  directory(line: number, record: DirectoryRecord): DirectoryRecord {
    const { path } = record
    let known = this.#records.get(path)
    if (known === undefined) {
      known = { line, names: new Set(), isWhole: false }
      this.#records.set(path, known)
      this.directories++
    }
    if (record.part !== true) {
      if (known.isWhole) throw new PlanInvalidError(line, 'a directory twice')
      known.isWhole = true
    }
    for (const step of record.steps) {
      if (known.names.has(step.name)) throw new PlanInvalidError(line, 'a name twice')
      known.names.add(step.name)
      this.steps++
      const to = path === '' ? step.name : `${path}/${step.name}`
      if (step.do === 'mkdir') this.#made.set(to, 'mkdir')
      else if (step.do === 'place') this.#made.set(to, step.tree === true ? 'tree' : 'other')
      else if (step.do === 'graft') {
        this.#made.set(to, step.meta === undefined ? 'graft' : 'other')
        this.#grafts.set(to, { line, from: step.from, isDirectory: step.meta === undefined })
      } else this.#made.set(to, 'other')
      if (step.do !== 'remove' && step.do !== 'whiteout' && step.do !== 'mkdir' && record.upper === undefined) {
        throw new PlanInvalidError(line, 'something from an upper that has no such directory')
      }
    }
    return record
  }

  finish(last: number): void {
    if (this.#records.get('')?.isWhole !== true) throw new PlanInvalidError(last, 'the root has no record')
    for (const [path, { line, isWhole }] of this.#records) {
      if (!isWhole) throw new PlanInvalidError(line, 'a directory without its last record')
      if (path === '') continue
      if (!this.#records.has(parentOf(path))) throw new PlanInvalidError(line, 'a directory without its parent')
      const made = this.#made.get(path)
      if (made === 'other' || made === 'tree')
        throw new PlanInvalidError(line, 'a directory that something else replaces')
    }
    for (const { line, path } of this.#cleans) {
      if (!this.#isInTree(path)) throw new PlanInvalidError(line, 'it cleans what is not moved')
    }
    for (const [to, { line, stage }] of this.#stages) {
      const graft = this.#grafts.get(to)
      if (graft?.from !== stage.from || graft.isDirectory !== (stage.kind === 'directory')) {
        throw new PlanInvalidError(line, 'a stage that no step takes')
      }
    }
    for (const [to, { line }] of this.#grafts) {
      if (!this.#stages.has(to)) throw new PlanInvalidError(line, 'a step without its stage')
    }
  }

  #isInTree(path: string): boolean {
    for (let at = path; at !== ''; at = parentOf(at)) if (this.#made.get(at) === 'tree') return true
    return false
  }
}

function parentOf(path: string): string {
  const slash = path.lastIndexOf('/')
  return slash < 0 ? '' : path.slice(0, slash)
}

const FAILED_MAX = 1000
const TYPE_WORDS = ['?', 'a fifo', 'a character device', '?', 'a directory', '?', 'a block device', '?', 'a file']

function wordOf(type: number): string {
  return type === 10 ? 'a symlink' : type === 12 ? 'a socket' : (TYPE_WORDS[type] ?? '?')
}

/** Compares everything that a plan is about with the trees it is to be applied to. Reads only. */
class PreconditionCheck {
  readonly failed: FailedPrecondition[] = []
  total = 0
  readonly #plan: SealedPlan
  readonly #planFd: number
  readonly #upper: Layer
  readonly #target: Layer
  readonly #data: readonly Layer[]
  readonly #records: ReadonlySet<string>
  /** New directories of the result, and where in the target their content is now; `undefined`: nowhere. */
  readonly #made = new Map<EntryPath, EntryPath | undefined>()
  readonly #trees: EntryPath[] = []

  constructor(stack: OpenStack, plan: SealedPlan, planFd: number) {
    this.#plan = plan
    this.#planFd = planFd
    const [upper, target] = stack.layers as readonly [Layer, Layer]
    this.#upper = upper
    this.#target = target
    this.#data = stack.data
    this.#records = new Set(plan.lines.filter(({ type }) => type === 'directory').map(({ path }) => path))
  }

  run(): void {
    for (const stage of this.#plan.stages) this.#stage(stage)
    const cleans = new Map<EntryPath, CleanRecord>()
    let steps: Step[] = []
    const { lines } = this.#plan
    for (const [index, line] of lines.entries()) {
      const record = readRecord(this.#planFd, line)
      if (record.type === 'clean') {
        cleans.set(planPath(record.upper), record)
        continue
      }
      // All records of one directory stand together.
      steps = [...steps, ...record.steps]
      const next = lines[index + 1]
      if (next?.type === 'directory' && next.path === line.path) continue
      this.#directory(record, steps)
      steps = []
    }
    for (const tree of this.#trees) this.#tree(tree, cleans)
    for (const path of cleans.keys()) this.#fail('upper', path, 'a directory with marks', 'none')
  }

  #stage(stage: StageRecord): void {
    const from = planPath(stage.from)
    const stat = this.#statOf(this.#target, from)
    const wanted = stage.kind === 'directory' ? DT_DIR : DT_REG
    if (stat === undefined || typeOf(stat) !== wanted) {
      this.#fail('target', from, wordOf(wanted), stat === undefined ? 'nothing' : wordOf(typeOf(stat)))
    }
  }

  #directory(record: DirectoryRecord, steps: readonly Step[]): void {
    const path = planPath(record.path)
    const base = this.#baseOf(path)
    for (const step of steps) {
      const child = join(path, planName(step.name))
      if (step.do === 'mkdir') this.#made.set(child, undefined)
      else if (step.do === 'graft' && step.meta === undefined) this.#made.set(child, planPath(step.from))
      else if (step.do === 'place' && step.tree === true) this.#trees.push(child)
    }
    this.#withDirectory(this.#target, base, 'target', (fd) => {
      for (const step of steps) this.#inTarget(fd, step, base === undefined ? path : base)
    })
    if (record.upper === undefined) return
    this.#withDirectory(this.#upper, path, 'upper', (fd) => {
      if (fd !== undefined) this.#inUpper(fd, path, steps)
    })
  }

  #baseOf(path: EntryPath): EntryPath | undefined {
    for (let at = path, rest = ''; ; ) {
      if (this.#made.has(at)) {
        const base = this.#made.get(at)
        return base === undefined ? undefined : ((base + rest) as EntryPath)
      }
      if (at === ROOT) return path
      const { parent, name } = split(at)
      rest = `/${name}${rest}`
      at = parent
    }
  }

  /** Opens a directory that has to be there; `use` gets `undefined` where nothing is expected or found. */
  #withDirectory(
    layer: Layer,
    path: EntryPath | undefined,
    where: FailedPrecondition['in'],
    use: (fd: number | undefined) => void,
  ): void {
    let fd: number | undefined
    if (path !== undefined) {
      try {
        fd = openLayerDirectory(layer, path)
      } catch (error) {
        const code = errnoOf(error)
        if (code === undefined) throw error
        this.#fail(where, path, 'a directory', code === 'ENOENT' ? 'nothing' : code)
        return
      }
    }
    try {
      use(fd)
    } finally {
      if (fd !== undefined) close(fd)
    }
  }

  #inTarget(fd: number | undefined, step: Step, directory: EntryPath): void {
    const name = planName(step.name)
    const stat = fd === undefined ? undefined : tryStatAt(fd, name)
    this.#compare('target', join(directory, name), step.expectTarget, stat)
    const is = stat === undefined ? 'nothing' : stat.isDirectory ? 'directory' : 'file'
    if (step.expectTarget !== undefined && is !== step.was && stat !== undefined) {
      this.#fail('target', join(directory, name), step.was, is)
    }
  }

  #compare(
    where: FailedPrecondition['in'],
    path: EntryPath,
    expected: Expectation | undefined,
    stat: Stat | undefined,
  ): void {
    if (expected === undefined || stat === undefined) {
      if (expected === undefined && stat === undefined) return
      const word = stat === undefined ? 'nothing' : wordOf(typeOf(stat))
      this.#fail(where, path, expected === undefined ? 'nothing' : wordOf(expected.type), word)
      return
    }
    const type = typeOf(stat)
    if (type !== expected.type) this.#fail(where, path, wordOf(expected.type), wordOf(type))
    else if (expected.sizeBytes !== undefined && expected.sizeBytes !== stat.sizeBytes) {
      this.#fail(where, path, `${expected.sizeBytes} bytes`, `${stat.sizeBytes} bytes`)
    } else if (expected.mtimeNs !== undefined && expected.mtimeNs !== String(stat.mtimeNs)) {
      this.#fail(where, path, `last changed at ${expected.mtimeNs}`, `last changed at ${stat.mtimeNs}`)
    }
  }

  /** Exactly the names that the plan knows, each still of its kind: what came since would be left behind. */
  #inUpper(fd: number, path: EntryPath, steps: readonly Step[]): void {
    const known = new Map(steps.map((step) => [planName(step.name) as string, step]))
    for (const { name } of sortedDirents(fd)) {
      const step = known.get(name)
      known.delete(name)
      const child = join(path, name)
      const raw = tryInspect(fd, name, this.#upper.marks)
      if (raw === undefined) continue
      if (step !== undefined) this.#upperName(step, child, raw)
      else if (raw.type !== DT_DIR || !this.#records.has(textOf(child))) {
        this.#fail('upper', child, 'nothing', raw.whiteout === undefined ? wordOf(raw.type) : 'a whiteout')
      } else if (raw.opaque) this.#fail('upper', child, 'a directory that merges', 'an opaque directory')
    }
    for (const name of known.keys()) this.#fail('upper', join(path, name as Name), 'something', 'nothing')
  }

  #upperName(step: Step, path: EntryPath, raw: RawEntry): void {
    const isWhiteout = raw.whiteout !== undefined
    const actual = isWhiteout ? 'a whiteout' : raw.metacopy === undefined ? wordOf(raw.type) : 'a metacopy'
    const want = (expected: string, isMet: boolean) => {
      if (!isMet) this.#fail('upper', path, expected, actual)
    }
    switch (step.do) {
      case 'remove':
      case 'whiteout':
        want('a whiteout', isWhiteout)
        return
      case 'mkdir':
        want('a directory', raw.type === DT_DIR)
        return
      case 'graft':
        if (step.meta === undefined) want('a directory', raw.type === DT_DIR)
        else want('a metacopy', raw.metacopy !== undefined)
        return
      case 'alias':
        want('no alias', false)
        return
      case 'place': {
        if (step.tree === true) {
          want('a directory', raw.type === DT_DIR)
          return
        }
        want('no whiteout', !isWhiteout)
        this.#compare('upper', path, step.expect, raw.stat)
        const isMetacopy = step.metacopy === true || step.data !== undefined
        if (raw.type === DT_REG)
          want(isMetacopy ? 'a metacopy' : 'a whole file', isMetacopy === (raw.metacopy !== undefined))
        if (step.data !== undefined) this.#dataFile(step.data)
      }
    }
  }

  #dataFile([layer, path]: readonly [number, string]): void {
    const at = planPath(path)
    const stat = this.#statOf(this.#data[layer - 2] as Layer, at)
    if (stat?.isFile !== true)
      this.#fail('target', at, 'a file in a data-only layer', stat === undefined ? 'nothing' : 'none')
  }

  /** A tree that moves as a whole has no mark and no whiteout that the plan does not take away beforehand. */
  #tree(root: EntryPath, cleans: Map<EntryPath, CleanRecord>): void {
    const pending: EntryPath[] = [root]
    for (let path = pending.pop(); path !== undefined; path = pending.pop()) {
      const current = path
      const clean = cleans.get(current)
      cleans.delete(current)
      this.#withDirectory(this.#upper, current, 'upper', (fd) => {
        if (fd === undefined) return
        const whiteouts = new Set(clean?.whiteouts)
        const dropped = new Map(clean?.drop)
        for (const { name } of sortedDirents(fd)) {
          const raw = tryInspect(fd, name, this.#upper.marks)
          if (raw === undefined) continue
          const child = join(current, name)
          if (raw.type === DT_DIR) pending.push(child)
          if ((raw.whiteout !== undefined) !== whiteouts.delete(textOf(name))) {
            this.#fail('upper', child, 'as it was when the plan was made', 'now a whiteout, or none any more')
            continue
          }
          if (raw.whiteout !== undefined || raw.type === DT_DIR) continue
          const marks = raw.attributes.filter((attribute) => isMark(attribute, this.#upper.marks)).map(textOf)
          const planned = dropped.get(textOf(name)) ?? []
          if (marks.some((mark) => !planned.includes(mark)))
            this.#fail('upper', child, 'without marks', marks.join(', '))
        }
        for (const name of whiteouts) this.#fail('upper', join(current, planName(name)), 'a whiteout', 'nothing')
      })
    }
  }

  #statOf(layer: Layer, path: EntryPath): Stat | undefined {
    const { parent, name } = split(path)
    let fd: number
    try {
      fd = openLayerDirectory(layer, parent)
    } catch (error) {
      if (errnoOf(error) === undefined) throw error
      return undefined
    }
    try {
      return tryStatAt(fd, name)
    } finally {
      close(fd)
    }
  }

  #fail(where: FailedPrecondition['in'], path: EntryPath, expected: string, actual: string): void {
    this.total++
    if (this.failed.length < FAILED_MAX) this.failed.push({ path, in: where, expected, actual })
  }
}
