import {
  areUppersFree,
  type ByteString,
  errnoOf,
  getXattr,
  type HostPath,
  LsyncError,
  mountsBeneath,
  O_DIRECTORY,
  O_PATH,
  openat,
  openRoot,
  overlayUsersOf,
  printable,
  probe,
  readDirents,
  seesTrustedXattrs,
  statFd,
  textOf,
  upperUse,
  withFd,
} from '@lsync/posix'
import { hasJournal, journalPathOf } from './journal.ts'
import type { EntryPath } from './model/path.ts'
import type { MergeMode, Step } from './model/plan.ts'
import type { Need } from './plan.ts'
import {
  IndexNeededError,
  MergeUnfinishedError,
  PrivilegeMissingError,
  SubmountError,
  TargetCannotHoldError,
} from './problems.ts'
import type { OpenStack } from './stack.ts'

/** A layer is part of a live mount, where the kernel leaves changes from outside undefined. */
export class LayerBusyError extends LsyncError {
  constructor(path: HostPath, how: string) {
    super('LAYER_BUSY', `${printable(path)} is in use by a live mount (${how})`, { path, hint: 'unmount it first' })
  }
}

/** One root lies in another, or is another. */
export class RootsNestedError extends LsyncError {
  constructor(inner: string, outer: string) {
    const relation = inner === outer ? 'is named twice' : `lies inside ${printable(outer)}`
    super('ROOTS_NESTED', `${printable(inner)} ${relation}`, { path: inner, hint: 'name separate directories' })
  }
}

/** The result would be an empty tree. */
export class ResultEmptyError extends LsyncError {
  constructor(target: HostPath) {
    super('RESULT_EMPTY', `nothing would be left in ${printable(target)}`, {
      path: target,
      hint: 'see `lsync diff`; if that is what you want, say --allow-empty',
    })
  }
}

/** A volatile upper whose system may have crashed. */
export class VolatileUpperError extends LsyncError {
  constructor(workdir: HostPath) {
    super('VOLATILE_UPPER', `${printable(workdir)} says that the upper was mounted volatile: it was never synced`, {
      path: workdir,
      hint: 'if the system has not gone down since, remove work/incompat in the workdir; else discard the upper',
    })
  }
}

/** What is checked before a merge looks at a single entry. */
export interface MergeSite {
  readonly mode: MergeMode
  readonly upper: HostPath
  readonly lowers: readonly HostPath[]
  readonly data: readonly HostPath[]
  readonly workdir: HostPath | undefined
  readonly target: HostPath
  readonly stack: OpenStack
  /** Nothing will be recovered first, so that what was interrupted at the target counts, too. */
  readonly dryRun?: boolean
}

/**
 * Refuses what cannot end well, each with the way out.
 * @throws {LsyncError} PRIVILEGE_MISSING, ROOTS_NESTED, MERGE_UNFINISHED, SUBMOUNT_IN_LAYER, LAYER_BUSY, INDEX_NEEDED,
 *   VOLATILE_UPPER
 */
export function assertMergeable(site: MergeSite): void {
  const { upper, lowers, data, stack, target, workdir } = site
  if (stack.namespace === 'trusted' && !seesTrustedXattrs()) {
    throw new PrivilegeMissingError(upper)
  }
  const layers = [upper, ...lowers, ...data]
  assertSeparate(layers, site.mode === 'in-place' ? undefined : target)
  for (const path of site.dryRun === true ? [...layers, target] : layers) {
    if (hasJournal(path)) throw new MergeUnfinishedError(path)
  }
  for (const path of layers) {
    const [mount] = mountsBeneath(path)
    if (mount !== undefined) throw new SubmountError(mount.target)
  }
  assertUnused(site)
  if (workdir === undefined) assertNoIndex(stack, upper)
  else assertDurable(workdir)
}

function assertSeparate(layers: readonly HostPath[], target: HostPath | undefined): void {
  const chains = layers.map((path) => ({ path, chain: chainOf(path) }))
  if (target !== undefined) {
    // The target is not there yet: it must not come to lie inside a layer.
    const chain = chainOf(journalPathOf(target).parent)
    for (const layer of chains) {
      if (chain.includes(layer.chain[0] as string)) throw new RootsNestedError(target, layer.path)
    }
  }
  for (const inner of chains) {
    for (const outer of chains) {
      if (inner !== outer && inner.chain.includes(outer.chain[0] as string)) {
        throw new RootsNestedError(inner.path, outer.path)
      }
    }
  }
}

// A directory and all that hold it, by identity: names say nothing, and `..` of an open directory cannot lie.
function chainOf(path: HostPath): string[] {
  const chain: string[] = []
  withFd(openRoot(path, O_PATH), (start) => {
    let fd = openat(start, '.' as ByteString, O_PATH | O_DIRECTORY)
    for (;;) {
      const id = withFd(fd, (current) => {
        const stat = statFd(current)
        fd = openat(current, '..' as ByteString, O_PATH | O_DIRECTORY)
        return `${stat.dev}:${stat.ino}:${stat.mountId}`
      })
      if (chain.at(-1) === id) {
        withFd(fd, () => undefined)
        return
      }
      chain.push(id)
    }
  })
  return chain.map((id) => id.slice(0, id.lastIndexOf(':')))
}

function assertUnused(site: MergeSite): void {
  const { upper, lowers, mode, stack } = site
  const changed = mode === 'in-place' ? [upper, ...lowers.slice(0, 1)] : [upper]
  const fds = changed.map((_, index) => (stack.layers[index] as OpenStack['layers'][number]).fd)
  const areFree = areUppersFree(fds)
  const users = overlayUsersOf(fds)
  for (const [index, path] of changed.entries()) {
    if (!areFree && upperUse(fds[index] as number) === 'in use') {
      throw new LayerBusyError(path, 'as an upper or workdir')
    }
    const uses = users[index]?.uses ?? []
    const use = uses.find(({ role }) => mode === 'in-place' || role === 'upper' || role === 'work')
    if (use !== undefined) throw new LayerBusyError(path, `${use.role} of ${printable(use.target)}`)
  }
}

// The kernel marks the root of an upper that it used with index=on by the handle of the lower's root.
function assertNoIndex(stack: OpenStack, upper: HostPath): void {
  const layer = stack.layers[0] as OpenStack['layers'][number]
  if (getXattr(layer.fd, '', layer.marks.nlink) !== undefined) throw new IndexNeededError(upper)
}

function assertDurable(workdir: HostPath): void {
  try {
    withFd(openRoot(`${workdir}/work/incompat/volatile` as HostPath), () => undefined)
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return
    throw error
  }
  throw new VolatileUpperError(workdir)
}

/** What a target cannot hold exactly, and gets nearly. Named in the report, never silent. */
export interface Loss {
  readonly what: 'nanosecond times' | 'times before 1970' | 'times after 2106' | 'holes'
  readonly why: string
}

const NEEDS: readonly Need[] = [
  'whiteouts',
  'devices',
  'fifos',
  'sockets',
  'symlinks',
  'hardLinks',
  'userXattrs',
  'trustedXattrs',
  'acls',
  'keepsOwner',
  'keepsSetuid',
  'inodeFlags',
]

/** What a target was found to be like. */
export interface Holding {
  readonly losses: readonly Loss[]
  /** What its file system cannot hold; nothing of it is needed so far. */
  readonly lacking: readonly Need[]
}

/**
 * Refuses a target whose file system lacks something that the result needs, before anything is written, and names what
 * it keeps only nearly.
 * @throws {TargetCannotHoldError}
 */
export function assertHolds(directory: HostPath, target: HostPath, needs: ReadonlyMap<Need, EntryPath>): Holding {
  const { abilities, limits } = probe(directory)
  const lacking = [...needs].filter(([need]) => abilities[need].value === false)
  if (lacking.length > 0) {
    throw new TargetCannotHoldError(
      target,
      lacking.map(([what, path]) => ({ what, path })),
    )
  }
  const losses: Loss[] = []
  const { timestampGranularityNs: granularity } = limits
  if (typeof granularity.value === 'number' && granularity.value > 1) {
    losses.push({ what: 'nanosecond times', why: `the file system keeps times to ${granularity.value} ns` })
  }
  if (abilities.timesBefore1970.value === false) losses.push({ what: 'times before 1970', why: 'not kept' })
  if (abilities.timesAfter2106.value === false) losses.push({ what: 'times after 2106', why: 'not kept' })
  if (abilities.sparseFiles.value === false) losses.push({ what: 'holes', why: 'files are stored in full' })
  return { losses, lacking: NEEDS.filter((need) => abilities[need].value === false) }
}

/** Follows the steps of a result's root, to tell whether anything will be left in it. */
export class RootWatch {
  #removed: Set<string> | undefined = new Set()

  /** Whether the steps so far only take away. */
  get isOpen(): boolean {
    return this.#removed !== undefined
  }

  add(steps: readonly Step[]): void {
    for (const step of steps) {
      if (step.do !== 'remove' && step.do !== 'whiteout') this.#removed = undefined
      this.#removed?.add(step.name)
    }
  }

  /**
   * Refuses a plan after which the root of the result has no entry although it had one before.
   * @throws {ResultEmptyError}
   */
  assertNotEmptied(baseFd: number, target: HostPath): void {
    const removed = this.#removed
    if (removed === undefined || removed.size === 0) return
    let left = false
    let isEmpty = true
    readDirents(baseFd, (name) => {
      isEmpty = false
      left = !removed.has(textOf(name))
      return !left
    })
    if (!isEmpty && !left) throw new ResultEmptyError(target)
  }
}
