import { availableParallelism } from 'node:os'
import {
  close,
  fsync,
  getXattr,
  type HostPath,
  LsyncError,
  link,
  listXattrs,
  makeDirectory,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_RDONLY,
  openat,
  openBeneath,
  openRoot,
  printable,
  RENAME_NOREPLACE,
  realPath,
  setTimes,
  statFd,
  textOf,
  tryRename,
  tryStatAt,
  withFd,
} from '@lsync/posix'
import { type CloneContext, type CloneMethod, type ClonePart, copyLinked, protect } from './clone.ts'
import { chooseClone, isRemote, isSnapshot, snapshotTree } from './clone-method.ts'
import { despiteProtection } from './effects.ts'
import { addFlags } from './encodings/inode.ts'
import { consumeUpper, type Execution, executePlan, recordAt, setFlags } from './executing.ts'
import { type Alias, findAliases, openIndex } from './index-aliases.ts'
import { Journal, PlanWriter, placeOf, planLines, type SealedPlan, TREE } from './journal.ts'
import { isMark } from './model/marks.ts'
import { type EntryPath, join, ROOT, split } from './model/path.ts'
import { type MergeMode, type PlanHeader, planPath } from './model/plan.ts'
import { addTo } from './multimap.ts'
import type { Need, PlanContext, PlanCounts } from './plan.ts'
import { openTemporaryPlan, type Planned, type Progress, planStack } from './planning.ts'
import { Pool, TURN_MS, takeShare } from './pool.ts'
import { OutputExistsError } from './problems.ts'
import { type RecoverOptions, recoverBefore } from './recover.ts'
import { OpenSources, resolve } from './resolve.ts'
import { assertHolds, assertMergeable, type Holding, type Loss } from './safety.ts'
import { hasManyEntries, type Layer } from './scan.ts'
import { closeStack, type OpenStack, openStack, type StackRequest, stackInit } from './stack.ts'
import type { Job, LinePlace, WorkInit } from './work.ts'

/** What to merge, and into what. */
export interface MergeRequest extends StackRequest {
  /**
   * `in-place`: the upper is folded into the first lower and used up; with more lowers that one stays a layer on them.
   * `output`: a new tree that is what the whole stack shows. `delta`: the upper and all lowers become one layer, for
   * whatever lies below them.
   */
  readonly mode: MergeMode
  /** The tree to make; not there yet. For `output` and `delta`. */
  readonly output?: HostPath
  /** The workdir of the upper, where it was mounted with index=on. */
  readonly workdir?: HostPath
  /** How a new tree gets what does not change. Default `auto`: the cheapest that works. */
  readonly clone?: CloneMethod | 'auto'
  /** `output`: give escaped attributes their plain names, for a tree that is run and not mounted as a layer. */
  readonly plain?: boolean
  /** Plan only: nothing is changed. */
  readonly dryRun?: boolean
  /** With `dryRun`: gets every line of the plan, sorted by path. */
  readonly onPlanLine?: (line: string) => void
  /** Threads at work; 0 and 1 mean the calling one alone. Default 2 on local disks, 16 over a network. */
  readonly workers?: number
  /** Allow a result without any entry. */
  readonly allowEmpty?: boolean
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: Progress) => void
}

/** What a merge did. Sizes in bytes, times in ms. */
export interface MergeReport {
  readonly mode: MergeMode
  readonly target: HostPath
  readonly clone?: CloneMethod
  readonly counts: PlanCounts
  /** What the target holds only nearly. */
  readonly losses: readonly Loss[]
  readonly recovered: boolean
  readonly dryRun: boolean
  readonly elapsedMs: number
}

/** A request that contradicts itself. */
export class RequestInvalidError extends LsyncError {
  constructor(message: string, hint: string) {
    super('REQUEST_INVALID', message, { hint })
  }
}

/** A hard link that index=on keeps track of has names in a lower that an in-place merge does not change. */
export class IndexBelowError extends LsyncError {
  constructor(path: EntryPath) {
    super('INDEX_BELOW', `${printable(path)} shows an inode of the index, and lies below the first lower`, {
      path,
      hint: 'merge to a new version with --output',
    })
  }
}

/**
 * Folds an upper layer into what lies below it, so that the result shows exactly what the kernel's overlay mount shows.
 * Journalled: killed at any point, `recover` (or the next merge) brings the old view or the new one, nothing between.
 * @throws {LsyncError} with a code of docs/errors.md; nothing was changed unless the error says otherwise
 */
export async function merge(asked: MergeRequest): Promise<MergeReport> {
  const start = performance.now()
  const request = resolved(asked)
  const target = checkRequest(request)
  const recovered = request.dryRun === true ? false : await recoverBefore(target, threadsOf(request))
  const inPlace = request.mode === 'in-place'
  if (!inPlace && isThere(target)) throw new OutputExistsError(target)
  const below = request.mode === 'delta' || (inPlace && request.lowers.length > 1)
  const stack = openStack(request, below, inPlace ? 1 : request.lowers.length)
  const pool = makePool(request, stack)
  try {
    assertMergeable({
      mode: request.mode,
      upper: request.upper,
      lowers: request.lowers,
      data: request.data ?? [],
      workdir: request.workdir,
      target,
      stack,
      dryRun: request.dryRun === true,
    })
    const index = openAliases(request, stack)
    try {
      const run: Run = { request, stack, index, pool }
      const report = await (inPlace ? mergeInPlace(run) : mergeToNew(run, target))
      return { ...report, recovered, dryRun: request.dryRun === true, elapsedMs: performance.now() - start }
    } finally {
      if (index.indexFd !== undefined) close(index.indexFd)
    }
  } finally {
    await pool.close()
    closeStack(stack)
  }
}

// Absolute and without symlinks: the journal lies beside the target, wherever that really is, and names its layers.
function resolved(request: MergeRequest): MergeRequest {
  const { output, workdir, data } = request
  return {
    ...request,
    upper: realPath(request.upper),
    lowers: request.lowers.map(realPath),
    ...(data === undefined ? {} : { data: data.map(realPath) }),
    ...(workdir === undefined ? {} : { workdir: realPath(workdir) }),
    ...(output === undefined ? {} : { output: realTarget(output) }),
  }
}

/** The absolute path, without symlinks, of something that may not exist yet in a directory that does. */
export function realTarget(path: HostPath): HostPath {
  const { parent, name } = placeOf(path)
  if (name === '.' || name === '..') throw new RequestInvalidError(`${printable(path)} names no new tree`, 'name it')
  const real = realPath(parent)
  return (real === '/' ? `/${name}` : `${real}/${name}`) as HostPath
}

function checkRequest(request: MergeRequest): HostPath {
  if (request.lowers.length === 0) throw new RequestInvalidError('no lower layer is named', 'name one with --lower')
  if (request.mode === 'in-place') {
    if (request.output !== undefined) {
      throw new RequestInvalidError('an in-place merge makes no new tree', 'leave --output and --delta out')
    }
    if (request.plain === true) {
      throw new RequestInvalidError('in place the lower stays a layer', 'use --output with --plain')
    }
    return request.lowers[0] as HostPath
  }
  if (request.output === undefined) throw new RequestInvalidError('no new tree is named', 'name one with --output')
  return request.output
}

/** The index of the upper's workdir, and the names that show its inodes. */
type Index = Pick<PlanContext, 'aliases' | 'indexFd'>

function openAliases(request: MergeRequest, stack: OpenStack): Index {
  if (request.workdir === undefined) return {}
  const indexFd = openIndex(request.workdir)
  if (indexFd === undefined) return { aliases: [] }
  try {
    return {
      indexFd,
      aliases: request.mode === 'in-place' ? aliasesInPlace(request, stack, indexFd) : findAliases(stack, indexFd),
    }
  } catch (error) {
    close(indexFd)
    throw error
  }
}

// In place only the first lower changes, but names of those below it can show an inode of the index, too.
function aliasesInPlace(request: MergeRequest, stack: OpenStack, indexFd: number): readonly Alias[] {
  const whole = openStack(request, false)
  const opened = new OpenSources(stack)
  try {
    const aliases = findAliases(whole, indexFd)
    for (const { directory, name, index, layer } of aliases) {
      if (layer < stack.layers.length) continue
      const isMetacopy = getXattr(indexFd, index, (stack.layers[0] as Layer).marks.metacopy) !== undefined
      if (isMetacopy || resolve(stack, directory, opened).kind !== 'directory')
        throw new IndexBelowError(join(directory, name))
    }
    return aliases
  } finally {
    opened.close()
    closeStack(whole)
  }
}

function isThere(path: HostPath): boolean {
  const { parent, name } = placeOf(path)
  return withFd(openRoot(parent), (fd) => tryStatAt(fd, name) !== undefined)
}

function threadsOf({ workers, signal }: MergeRequest): RecoverOptions {
  return { ...(workers === undefined ? {} : { workers }), ...(signal === undefined ? {} : { signal }) }
}

interface Run {
  readonly request: MergeRequest
  readonly stack: OpenStack
  readonly index: Index
  readonly pool: Pool
}

type Part = Omit<MergeReport, 'recovered' | 'dryRun' | 'elapsedMs'>

function headerOf(request: MergeRequest, target: HostPath, stack: OpenStack, rename: boolean): PlanHeader {
  const depth = stack.layers.length - 1
  return {
    type: 'header',
    format: 1,
    mode: request.mode,
    namespace: stack.namespace,
    upper: textOf(request.upper),
    lowers: request.lowers.slice(0, depth).map(textOf),
    data: (request.data ?? []).map(textOf),
    upperIno: inoOf(stack.layers[0]),
    targetIno: inoOf(stack.layers.at(-1)),
    ...(request.workdir === undefined ? {} : { workdir: textOf(request.workdir) }),
    target: textOf(target),
    ...(request.mode === 'in-place' ? {} : { publish: textOf(target) }),
    consume: request.mode === 'in-place',
    rename,
    below: stack.below,
    plain: request.plain === true,
    portable: false,
  }
}

function inoOf(layer: OpenStack['layers'][number] | undefined): string {
  return layer === undefined ? '' : String(statFd(layer.fd).ino)
}

async function mergeInPlace({ request, stack, index, pool }: Run): Promise<Part> {
  const upper = stack.layers[0] as OpenStack['layers'][number]
  const base = stack.layers[1] as OpenStack['layers'][number]
  const rename = isOneFileSystem(upper.fd, base.fd)
  const header = headerOf(request, base.path, stack, rename)
  pool.prepare(planInit(request, stack, rename, index))
  if (request.dryRun === true) {
    const { counts } = await planForLooking(request, stack, header, pool)
    return { mode: request.mode, target: base.path, counts, losses: [] }
  }
  const journal = Journal.open(base.path, { create: true }) as Journal
  let sealed = false
  try {
    let losses: readonly Loss[] = []
    const planned = await planStack({
      stack,
      rename,
      pool,
      writer: await journal.write(header),
      accept: (root, needs) => {
        if (request.allowEmpty !== true) root.assertNotEmptied(base.fd, base.path)
        const site = isBeside(journal, base.fd) ? journal.path : base.path
        if (!rename) losses = assertHolds(site, base.path, needs).losses
        // What is renamed is there already, but for flags that only the view has so far.
        else if (needs.has('inodeFlags')) assertHolds(site, base.path, onlyFlags(needs))
      },
      ...(request.onProgress === undefined ? {} : { report: request.onProgress }),
    })
    sealed = true
    journal.prepare(base.fd)
    await finishInPlace({
      stack,
      plan: planned.plan,
      journal,
      targetFd: base.fd,
      pool,
      reflink: false,
      leftOut: false,
      resumed: false,
      ...(index.indexFd === undefined ? {} : { indexFd: index.indexFd }),
      ...(request.onProgress === undefined ? {} : { report: request.onProgress }),
    })
    return { mode: request.mode, target: base.path, counts: planned.counts, losses }
  } catch (error) {
    if (!sealed) journal.remove() // nothing was touched yet
    throw error
  } finally {
    journal.close()
  }
}

function onlyFlags(needs: ReadonlyMap<Need, EntryPath>): Map<Need, EntryPath> {
  return new Map([...needs].filter(([need]) => need === 'inodeFlags'))
}

/**
 * Applies, makes durable, uses up the upper, removes the journal, and closes the pool. Also the second half of a
 * recovery.
 */
export async function finishInPlace(execution: Execution): Promise<void> {
  const { journal, plan, pool, targetFd } = execution
  await executePlan(execution)
  await consumeUpper(execution)
  if (journal.isInside) leaveTarget(journal, plan, targetFd)
  await setFlags(execution)
  // A thread takes some ms to end, and so does the disk.
  const ended = pool.close()
  journal.remove()
  await ended
}

// What was moved aside inside the target changed the times of its root when it went.
function leaveTarget(journal: Journal, plan: SealedPlan, targetFd: number): void {
  journal.removeInside(targetFd)
  const meta = recordAt(journal, plan, '')?.meta
  if (meta !== undefined) {
    // An earlier run may have made it immutable already.
    despiteProtection([{ dirfd: targetFd, name: '' }], () =>
      setTimes(targetFd, '', BigInt(meta.atimeNs), BigInt(meta.mtimeNs)),
    )
  }
  fsync(targetFd, plan.header.target)
}

async function mergeToNew({ request, stack, index, pool }: Run, target: HostPath): Promise<Part> {
  const header = headerOf(request, target, stack, false)
  pool.prepare(planInit(request, stack, false, index))
  if (request.dryRun === true) {
    const { counts } = await planForLooking(request, stack, header, pool)
    return { mode: request.mode, target, counts, losses: [] }
  }
  const journal = Journal.open(target, { create: true }) as Journal
  let treeFd: number | undefined
  let isWhole = false
  try {
    let holding: Holding = { losses: [], lacking: [] }
    const planned = await planStack({
      stack,
      rename: false,
      pool,
      writer: await journal.write(header),
      accept: (root, needs) => {
        const base = stack.layers.at(-1) as OpenStack['layers'][number]
        if (request.allowEmpty !== true && !stack.below) root.assertNotEmptied(base.fd, target)
        // The tree is built in the journal; what a crash leaves of the probe goes with it.
        holding = assertHolds(journal.path, target, needs)
      },
      ...(request.onProgress === undefined ? {} : { report: request.onProgress }),
    })
    const base = stack.layers.at(-1) as OpenStack['layers'][number]
    // A base that was once an upper has marks and whiteouts all over, which a bottom must not have.
    const wasUpper = listXattrs(base.fd, '').some((attribute) => isMark(attribute, base.marks))
    const perEntry = request.plain === true || (wasUpper && !stack.below)
    const clone = chooseClone({ fromFd: base.fd, toFd: journal.fd, perEntry }, request.clone ?? 'auto')
    if (isSnapshot(clone)) snapshotTree(clone, base.fd, journal.fd, TREE)
    else makeDirectory(journal.fd, TREE, 0o700)
    treeFd = openat(journal.fd, TREE, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
    if (!isSnapshot(clone)) {
      const to = { fd: treeFd, path: target, lacking: holding.lacking }
      await cloneBase({ request, stack, index, pool }, to, { plan: planned.plan, fd: journal.planFd }, clone)
    }
    journal.prepare(treeFd)
    const execution: Execution = {
      stack,
      plan: planned.plan,
      journal,
      targetFd: treeFd,
      pool,
      reflink: clone !== 'hardlink' && clone !== 'copy',
      leftOut: leavesOut(planned.plan) && !isSnapshot(clone),
      resumed: false,
      ...(index.indexFd === undefined ? {} : { indexFd: index.indexFd }),
      ...(request.onProgress === undefined ? {} : { report: request.onProgress }),
    }
    await executePlan(execution)
    if (journal.isInside) leaveTarget(journal, planned.plan, treeFd)
    await setFlags(execution)
    const ended = pool.close()
    publish(journal, target)
    protectRoot(journal, planned.plan, treeFd)
    isWhole = true
    journal.remove()
    await ended
    return { mode: request.mode, target, clone, counts: planned.counts, losses: holding.losses }
  } catch (error) {
    // Nobody has seen any of it: the old state is the only state. Or it has its name, and recovering adds what may be
    // missing then, the flags of the root.
    const isPublished = treeFd !== undefined && tryStatAt(journal.fd, TREE) === undefined
    if (isWhole || !isPublished) journal.remove()
    throw error
  } finally {
    if (treeFd !== undefined) close(treeFd)
    journal.close()
  }
}

/** Whether a rename leads from one open directory's tree into the other's. */
export function isOneFileSystem(left: number, right: number): boolean {
  const [one, other] = [statFd(left), statFd(right)]
  return one.dev === other.dev && one.mountId === other.mountId
}

// Whether the journal is on the file system of the target, as it is unless that is a mount point or a subvolume.
function isBeside(journal: Journal, targetFd: number): boolean {
  return statFd(journal.fd).dev === statFd(targetFd).dev
}

/**
 * Makes the root of a published tree immutable or append-only where it has to be, which no rename would have moved any
 * more. May be repeated.
 */
export function protectRoot(journal: Journal, plan: SealedPlan, treeFd: number): void {
  const flags = recordAt(journal, plan, '')?.flags
  if (flags === undefined) return
  addFlags(treeFd, '', flags)
  fsync(treeFd, plan.header.target)
}

/** Gives the finished tree its name, which nothing may have taken meanwhile. */
export function publish(journal: Journal, target: HostPath): void {
  const { parent, name } = placeOf(target)
  withFd(openRoot(parent), (parentFd) => {
    fsync(journal.fd, journal.path)
    let code = tryRename(journal.fd, TREE, parentFd, name, RENAME_NOREPLACE)
    if (code === 'EINVAL' || code === 'ENOSYS') {
      // Not every file system knows the flag (FUSE); the journal's lock keeps other lsyncs away from the name.
      if (tryStatAt(parentFd, name) !== undefined) throw new OutputExistsError(target)
      code = tryRename(journal.fd, TREE, parentFd, name)
    }
    if (code === 'EEXIST' || code === 'ENOTEMPTY') throw new OutputExistsError(target)
    if (code !== undefined)
      throw new LsyncError(code, `could not publish ${printable(target)}: ${code}`, { path: target })
    fsync(parentFd, parent)
  })
}

async function cloneBase(
  { request, stack, pool }: Run,
  to: { fd: number; path: HostPath; lacking: readonly Need[] },
  planned: { plan: SealedPlan; fd: number },
  method: CloneContext['method'],
): Promise<void> {
  const base = stack.layers.at(-1) as OpenStack['layers'][number]
  const clone = {
    fromFd: base.fd,
    toFd: to.fd,
    target: to.path,
    lacking: to.lacking,
    method,
    below: stack.below,
    plain: request.plain === true,
  }
  const changes = changesOf(planned.plan)
  pool.prepare({ stack: stackInit(stack), clone: { ...clone, planFd: planned.fd, changes } })
  const pending: EntryPath[] = [ROOT]
  const groups = new Map<string, EntryPath[]>()
  const flagged: ClonePart['flagged'] = []
  let done = 0
  await pool.drain(
    (idle): Job | undefined => {
      if (pending.length === 0) return undefined
      return { kind: 'clone', paths: takeShare(pending, idle), budgetMs: TURN_MS }
    },
    (result) => {
      const part = result as ClonePart
      pending.push(...part.next)
      flagged.push(...part.flagged)
      for (const [key, path] of part.groups) addTo(groups, key, planPath(path))
      done += part.counts.objects
      request.onProgress?.({ phase: 'clone', done })
    },
  )
  const context = { ...clone, marks: base.marks }
  linkGroups(context, [...groups.values()])
  // As in the base itself, they go along with what is moved and come off what is changed. The root is to be renamed yet.
  for (const [path, flags] of flagged) if (path !== ROOT) protect(context, path, flags)
}

// What will be replaced need not be cloned, unless something else is made of it.
function leavesOut({ stages }: SealedPlan): boolean {
  return stages.length === 0
}

function changesOf(plan: SealedPlan): Map<EntryPath, LinePlace[]> {
  const changes = new Map<EntryPath, LinePlace[]>()
  if (!leavesOut(plan)) return changes
  for (const { path, offset, length, replaces } of plan.lines) {
    if (replaces) addTo(changes, planPath(path), { offset, length })
  }
  return changes
}

/** Makes files with several names in a clone: one copy each, and links to it. */
export function linkGroups(context: CloneContext, groups: readonly EntryPath[][]): void {
  for (const paths of groups) {
    const [first, ...others] = paths.sort()
    if (first === undefined) continue
    const flags = copyLinked(context, first)
    const from = split(first)
    withFd(openBeneath(context.toFd, from.parent, O_DIRECTORY | O_NOFOLLOW), (fromDir) => {
      for (const other of others) {
        const to = split(other)
        withFd(openBeneath(context.toFd, to.parent, O_DIRECTORY | O_NOFOLLOW), (toDir) => {
          const before = statFd(toDir)
          link(fromDir, from.name, toDir, to.name)
          setTimes(toDir, '', before.atimeNs, before.mtimeNs)
        })
      }
    })
    if (flags !== 0) protect(context, first, flags)
  }
}

function planInit(request: MergeRequest, stack: OpenStack, rename: boolean, index: Index): WorkInit {
  return {
    stack: stackInit(stack),
    plan: { mode: request.mode, rename, plain: request.plain === true, portable: false, ...index },
  }
}

function makePool({ workers, signal }: MergeRequest, stack: OpenStack): Pool {
  const layers = [stack.layers[0], stack.layers.at(-1)] as Layer[]
  return new Pool(
    { stack: stackInit(stack) },
    { workers: workers ?? defaultWorkers(stack), signal, expectsMuch: () => layers.some(hasManyEntries) },
  )
}

/** Two on local disks, where more only wait for each other; many where each call is a trip over a network. */
export function defaultWorkers(stack: OpenStack): number {
  return stack.layers.some(({ fd }) => isRemote(fd)) ? 16 : Math.min(2, availableParallelism())
}

async function planForLooking(
  request: MergeRequest,
  stack: OpenStack,
  header: PlanHeader,
  pool: Pool,
): Promise<Planned> {
  const fd = openTemporaryPlan()
  try {
    const writer = await PlanWriter.start(fd, header, 'plan')
    const planned = await planStack({
      stack,
      rename: header.rename,
      pool,
      writer,
      ...(request.onProgress === undefined ? {} : { report: request.onProgress }),
    })
    if (request.onPlanLine !== undefined) planLines(planned.plan, fd, request.onPlanLine)
    return planned
  } finally {
    close(fd)
  }
}
