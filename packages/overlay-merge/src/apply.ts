import {
  type ByteString,
  close,
  errnoOf,
  getXattr,
  link,
  makeDirectory,
  makeNode,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_RDONLY,
  openat,
  openBeneath,
  removeDirectory,
  removeXattr,
  rename,
  S_IFCHR,
  setTimes,
  setXattr,
  statAt,
  statFd,
  tryStatAt,
  tryUnlink,
  withFd,
} from '@lsync/posix'
import {
  copyObject,
  despiteProtection,
  fileProtection,
  fillMetacopy,
  moveOver,
  protectionOf,
  removeFile,
  removeTree,
  resultMeta,
  type Trash,
  takeAway,
  withoutProtection,
} from './effects.ts'
import { addFlags, finishDirectory, inheritsAcls, readMeta, writeMeta } from './encodings/inode.ts'
import type { Xattr } from './model/entry.ts'
import { MARKS, type MarkNames } from './model/marks.ts'
import { type EntryPath, join, split } from './model/path.ts'
import {
  type AliasStep,
  type CleanRecord,
  type DirectoryRecord,
  type GraftStep,
  metaFrom,
  type PlaceStep,
  type PlanHeader,
  planName,
  planPath,
  type StageRecord,
  type Step,
  type WhiteoutStep,
} from './model/plan.ts'
import { ChangedMeanwhileError } from './problems.ts'
import { sortedDirents } from './scan.ts'

/** What carrying out a plan needs. The fds belong to the caller. */
export interface ApplyContext {
  readonly header: PlanHeader
  /** Every layer of the stack, data-only ones last, by index. */
  readonly layerFds: readonly number[]
  readonly targetFd: number
  readonly stageFd: number
  readonly trash: Trash
  /** By the result path they are for. */
  readonly stages: ReadonlyMap<EntryPath, StageRecord>
  readonly reflink: boolean
  /** The target was made without the names that steps remove or replace. */
  readonly leftOut: boolean
  /** An earlier run may have done some of the steps. */
  readonly resumed: boolean
  readonly indexFd?: number
}

/** The order in which the kinds of steps happen; all of one phase is done before the next begins. */
export type Phase = 'clean' | 'structure' | 'entries' | 'finish' | 'entries-and-finish' | 'flags' | 'consume'

/** Carries out what one record holds for one phase. Each step may run twice. */
export function applyRecord(context: ApplyContext, record: DirectoryRecord | CleanRecord, phase: Phase): void {
  if (record.type === 'clean') {
    if (phase === 'clean') cleanDirectory(context, record)
    return
  }
  const work = new RecordWork(context, record)
  try {
    work.run(phase)
  } finally {
    work.close()
  }
}

/** Moves (or copies) one redirect's source out of the way of everything else. */
export function applyStage(context: ApplyContext, stage: StageRecord): void {
  const name = stageName(stage.id)
  if (stage.how === 'stay') return
  if (stage.how === 'fill') {
    applyFill(context, stage)
    return
  }
  if (tryStatAt(context.stageFd, name) !== undefined) {
    if (stage.how === 'move') return
    removeTree(context.stageFd, name) // half a copy
  }
  const from = split(planPath(stage.from))
  withFd(openBeneath(context.targetFd, from.parent, O_DIRECTORY | O_NOFOLLOW), (dirfd) => {
    if (stage.how === 'move') {
      despiteProtection(
        [
          { dirfd, name: from.name },
          { dirfd, name: '' },
        ],
        () => rename(dirfd, from.name, context.stageFd, name),
      )
      return
    }
    copyTree(dirfd, from.name, context.stageFd, name, context.reflink)
  })
}

/** Brings the data of metacopies with several names into the upper's inode, from the still untouched target. */
function applyFill(context: ApplyContext, stage: StageRecord): void {
  const from = split(planPath(stage.from))
  const to = split(planPath(stage.upper as string))
  const root = stage.inIndex === true ? context.indexFd : context.layerFds[0]
  withFd(openBeneath(context.targetFd, from.parent, O_DIRECTORY | O_NOFOLLOW), (dataDir) =>
    withFd(openBeneath(root as number, to.parent, O_DIRECTORY | O_NOFOLLOW), (upperDir) =>
      fillMetacopy(upperDir, to.name, { dir: dataDir, name: from.name }, marksOf(context)),
    ),
  )
}

function stageName(id: number): ByteString {
  return `s${id}` as ByteString
}

function marksOf(context: ApplyContext): MarkNames {
  return MARKS[context.header.namespace]
}

function cleanDirectory(context: ApplyContext, record: CleanRecord): void {
  let fd: number
  try {
    fd = openBeneath(context.layerFds[0] as number, planPath(record.upper), O_DIRECTORY | O_NOFOLLOW)
  } catch (error) {
    if (context.resumed && errnoOf(error) === 'ENOENT') return // moved already, and so cleaned before
    throw error
  }
  withFd(fd, () => {
    for (const whiteout of record.whiteouts ?? []) removeFile(fd, planName(whiteout))
    for (const [name, attributes] of record.drop ?? []) dropAttributes(fd, planName(name), attributes, context.trash)
    if (record.times !== undefined) setTimes(fd, '', BigInt(record.times[0]), BigInt(record.times[1]))
    for (const [name, flags] of record.flags ?? []) addFlags(fd, planName(name), flags)
  })
}

function dropAttributes(dirfd: number, name: ByteString | '', attributes: readonly string[], trash: Trash): void {
  for (const attribute of attributes) {
    despiteOwnFlags(dirfd, name, () => removeXattr(dirfd, name, planName(attribute)), trash)
  }
}

// An upper that lsync made, or somebody's hand, has real flags, which go along.
function despiteOwnFlags(dirfd: number, name: ByteString | '', change: () => void, trash: Trash): void {
  try {
    change()
  } catch (error) {
    if (errnoOf(error) !== 'EPERM') throw error
    withoutProtection(dirfd, name, change, trash)
  }
}

function xattrsOf(planned: PlaceStep['set'] = []): Xattr[] {
  return planned.map(([name, value]) => ({ name: planName(name), value: Buffer.from(value, 'base64') }))
}

function putAttributes(dirfd: number, name: ByteString, planned: PlaceStep['set'], trash: Trash): void {
  for (const xattr of xattrsOf(planned)) {
    despiteOwnFlags(dirfd, name, () => setXattr(dirfd, name, xattr.name, xattr.value), trash)
  }
}

/** One directory record at work: its directories are opened when they are first needed. */
class RecordWork {
  readonly #context: ApplyContext
  readonly #record: DirectoryRecord
  readonly #path: EntryPath
  #target: number | undefined
  #upper: number | undefined
  #inherits: boolean | undefined

  constructor(context: ApplyContext, record: DirectoryRecord) {
    this.#context = context
    this.#record = record
    this.#path = planPath(record.path)
  }

  run(phase: Phase): void {
    switch (phase) {
      case 'structure':
        for (const step of this.#record.steps) this.#structure(step)
        return
      case 'entries':
        for (const step of this.#record.steps) this.#entry(step)
        return
      case 'finish':
        this.#finish()
        return
      case 'entries-and-finish':
        for (const step of this.#record.steps) this.#entry(step)
        this.#finish()
        return
      case 'flags':
        this.#flags()
        return
      case 'consume':
        this.#consume()
        return
      case 'clean':
        return
    }
  }

  close(): void {
    if (this.#target !== undefined) close(this.#target)
    if (this.#upper !== undefined) close(this.#upper)
  }

  get #targetFd(): number {
    this.#target ??= openBeneath(this.#context.targetFd, this.#path, O_DIRECTORY | O_NOFOLLOW)
    return this.#target
  }

  get #upperFd(): number {
    if (this.#upper === undefined) {
      const path = planPath(this.#record.upper as string)
      this.#upper = openBeneath(this.#context.layerFds[0] as number, path, O_DIRECTORY | O_NOFOLLOW)
    }
    return this.#upper
  }

  get #consumesByRename(): boolean {
    return this.#context.header.consume && this.#context.header.rename && this.#record.upper !== undefined
  }

  #structure(step: Step): void {
    const name = planName(step.name)
    if (step.do === 'mkdir') {
      takeAway(this.#targetFd, name, this.#context.trash)
      despiteProtection([{ dirfd: this.#targetFd, name: '' }], () => makeDirectory(this.#targetFd, name, 0o700))
    } else if (step.do === 'graft' && step.meta === undefined) {
      const stage = this.#stageOf(name)
      const { stageFd, trash, resumed } = this.#context
      if (!moveOver(stageFd, stageName(stage.id), this.#targetFd, name, trash) && !resumed) {
        throw new ChangedMeanwhileError(join(this.#path, name))
      }
    }
  }

  #entry(step: Step): void {
    const name = planName(step.name)
    const { trash } = this.#context
    switch (step.do) {
      case 'remove':
        if (this.#isThere(step) || this.#context.resumed) takeAway(this.#targetFd, name, trash)
        if (this.#consumesByRename) this.#dropUpper(name)
        return
      case 'whiteout':
        this.#whiteout(step, name)
        return
      case 'place':
        this.#place(step, name)
        return
      case 'graft':
        if (step.meta !== undefined && step.group === undefined) this.#graftFile(step, name)
        return
      case 'alias':
        this.#alias(step, name)
        return
      case 'mkdir':
        return
    }
  }

  #isThere({ was }: Step): boolean {
    return was !== 'nothing' && !this.#context.leftOut
  }

  // The upper's whiteout goes after what it hid, so that the view never changes.
  #dropUpper(name: ByteString): void {
    removeFile(this.#upperFd, name)
  }

  #whiteout(step: WhiteoutStep, name: ByteString): void {
    const { trash } = this.#context
    if (this.#consumesByRename) {
      const upper = tryStatAt(this.#upperFd, name)
      if (upper?.isWhiteoutDevice === true) {
        moveOver(this.#upperFd, name, this.#targetFd, name, trash)
        return
      }
    }
    const present = tryStatAt(this.#targetFd, name)
    if (present?.isWhiteoutDevice !== true) {
      if (step.was !== 'nothing' || present !== undefined) takeAway(this.#targetFd, name, trash)
      despiteProtection([{ dirfd: this.#targetFd, name: '' }], () => makeNode(this.#targetFd, name, S_IFCHR, 0))
    }
    if (this.#consumesByRename) this.#dropUpper(name)
  }

  #place(step: PlaceStep, name: ByteString): void {
    if (this.#context.header.rename && (step.from === undefined || step.from[0] === 0)) {
      this.#withSource(step, (fromDir, from) => {
        if (step.data !== undefined) this.#fillFrom(step.data, fromDir, from)
        this.#moveFromUpper(step, fromDir, from, name)
      })
      return
    }
    if (step.group === undefined) this.#copy(step, name)
  }

  #withSource(step: PlaceStep, use: (dirfd: number, name: ByteString) => void): void {
    if (step.from === undefined) {
      use(this.#upperFd, planName(step.name))
      return
    }
    const { parent, name } = split(planPath(step.from[1]))
    const root = this.#context.layerFds[step.from[0]] as number
    withFd(openBeneath(root, parent, O_DIRECTORY | O_NOFOLLOW), (dirfd) => use(dirfd, name))
  }

  // The data of a metacopy lies in a data-only layer: it goes into the upper's inode, which then moves.
  #fillFrom(data: [layer: number, path: string], dirfd: number, name: ByteString): void {
    if (this.#context.resumed && tryStatAt(dirfd, name) === undefined) return
    const at = split(planPath(data[1]))
    withFd(openBeneath(this.#context.layerFds[data[0]] as number, at.parent, O_DIRECTORY | O_NOFOLLOW), (dir) =>
      fillMetacopy(dirfd, name, { dir, name: at.name }, marksOf(this.#context)),
    )
  }

  #moveFromUpper(step: PlaceStep | GraftStep, fromDir: number, from: ByteString, to: ByteString): void {
    const { resumed, trash } = this.#context
    const change = step.drop !== undefined || (step.do === 'place' && step.set !== undefined)
    if (change && (!resumed || tryStatAt(fromDir, from) !== undefined)) {
      // What the mark means must be true before it goes: an opaque directory's name is cleared by the move itself.
      dropAttributes(fromDir, from, step.drop ?? [], trash)
      if (step.do === 'place') putAttributes(fromDir, from, step.set, trash)
    }
    if (!moveOver(fromDir, from, this.#targetFd, to, trash) && !resumed) {
      throw new ChangedMeanwhileError(join(this.#path, to))
    }
  }

  #copy(step: PlaceStep, name: ByteString): void {
    this.#withSource(step, (fromDir, from) => {
      const { header, layerFds, reflink, stageFd, trash } = this.#context
      const stat = statAt(fromDir, from)
      const meta = resultMeta(fromDir, from, stat, marksOf(this.#context), header.plain)
      const marks: Xattr[] = xattrsOf(step.set)
      const { metacopy } = marksOf(this.#context)
      const value = step.metacopy === true ? getXattr(fromDir, from, metacopy) : undefined
      if (value !== undefined) marks.unshift({ name: metacopy, value })
      const request = {
        fromDir,
        from,
        stat,
        meta: marks.length === 0 ? meta : { ...meta, xattrs: [...meta.xattrs, ...marks] },
        reflink,
        ...(step.metacopy === true ? { withoutData: true } : {}),
      }
      const copy = (data?: { dir: number; name: ByteString }) => {
        const whole = data === undefined ? request : { ...request, data }
        if (header.publish !== undefined) {
          // Nobody sees this tree yet, so there is nothing to replace atomically.
          if (this.#isThere(step)) takeAway(this.#targetFd, name, trash)
          this.#inherits ??= inheritsAcls(this.#targetFd)
          const options = { dropInheritedAcls: this.#inherits }
          despiteProtection([{ dirfd: this.#targetFd, name: '' }], () =>
            copyObject(whole, this.#targetFd, name, options),
          )
        } else {
          const temporary = trash.next()
          copyObject(whole, stageFd, temporary, {})
          moveOver(stageFd, temporary, this.#targetFd, name, trash)
        }
      }
      if (step.data === undefined) copy()
      else {
        const at = split(planPath(step.data[1]))
        const root = layerFds[step.data[0]] as number
        withFd(openBeneath(root, at.parent, O_DIRECTORY | O_NOFOLLOW), (dir) => copy({ dir, name: at.name }))
      }
    })
  }

  #stageOf(name: ByteString): StageRecord {
    const stage = this.#context.stages.get(join(this.#path, name))
    if (stage === undefined) throw new Error(`no stage for ${name}`)
    return stage
  }

  #graftFile(step: GraftStep, name: ByteString): void {
    const stage = this.#stageOf(name)
    const { trash, resumed, stageFd } = this.#context
    if (stage.how === 'fill') {
      this.#moveFromUpper(step, this.#upperFd, name, name)
      return
    }
    const meta = metaFrom(step.meta as NonNullable<typeof step.meta>)
    const options = { removeOthers: (attribute: ByteString) => attribute !== '' }
    if (stage.how === 'stay') {
      despiteProtection([{ dirfd: this.#targetFd, name }], () => writeMeta(this.#targetFd, name, 'file', meta, options))
    } else {
      const from = stageName(stage.id)
      if (tryStatAt(stageFd, from) !== undefined) {
        despiteProtection([{ dirfd: stageFd, name: from }], () => writeMeta(stageFd, from, 'file', meta, options))
        moveOver(stageFd, from, this.#targetFd, name, trash)
      } else if (!resumed) throw new ChangedMeanwhileError(join(this.#path, name))
    }
    if (this.#consumesByRename) this.#dropUpper(name)
  }

  #alias(step: AliasStep, name: ByteString): void {
    const { indexFd, stageFd, trash, resumed } = this.#context
    if (indexFd === undefined) throw new Error('an index alias without an index')
    const source = planName(step.from)
    if (resumed && tryStatAt(indexFd, source) === undefined) return
    dropAttributes(indexFd, source, step.drop ?? [], trash)
    putAttributes(indexFd, source, step.set, trash)
    const temporary = trash.next()
    link(indexFd, source, stageFd, temporary)
    moveOver(stageFd, temporary, this.#targetFd, name, trash)
    tryUnlink(stageFd, temporary)
  }

  /** One inode with several names: the first gets what its step says, the others become links to it. */
  placeGrouped(step: PlaceStep | GraftStep): void {
    if (step.do === 'place') this.#copy(step, planName(step.name))
    else this.#graftFile(step, planName(step.name))
  }

  linkTo(first: EntryPath, step: Step): void {
    const name = planName(step.name)
    const { targetFd, stageFd, trash } = this.#context
    const { parent, name: firstName } = split(first)
    withFd(openBeneath(targetFd, parent, O_DIRECTORY | O_NOFOLLOW), (dirfd) => {
      const temporary = trash.next()
      link(dirfd, firstName, stageFd, temporary)
      moveOver(stageFd, temporary, this.#targetFd, name, trash)
      // rename(2) does nothing when both are one inode already, as in a second run.
      tryUnlink(stageFd, temporary)
    })
  }

  #finish(): void {
    const { header } = this.#context
    const marks = marksOf(this.#context)
    const meta = metaFrom(this.#record.meta)
    const xattrs = [...meta.xattrs]
    if (header.below && this.#record.opaque === true) xattrs.push({ name: marks.opaque, value: Buffer.from('y') })
    if (header.below && this.#record.redirect !== undefined) {
      xattrs.push({ name: marks.redirect, value: Buffer.from(planName(this.#record.redirect), 'latin1') })
    }
    const fd = this.#targetFd
    despiteProtection([{ dirfd: fd, name: '' }], () =>
      finishDirectory(
        fd,
        { ...meta, xattrs },
        { old: statFd(fd), removeOthers: (attribute) => attribute !== 'security.selinux' },
      ),
    )
  }

  #flags(): void {
    const fd = this.#targetFd
    for (const step of this.#record.steps) {
      const flags = 'flags' in step ? step.flags : undefined
      if (flags !== undefined) addFlags(fd, planName(step.name), flags)
    }
    // An immutable root could not be published any more: it becomes one after that.
    const isUnpublished = this.#path === '' && this.#context.header.publish !== undefined
    if (this.#record.flags !== undefined && !isUnpublished) addFlags(fd, '', this.#record.flags)
  }

  // What was moved is gone from the upper; what was copied goes now, after the target is durable.
  #consume(): void {
    if (this.#record.upper === undefined) return
    try {
      for (const step of this.#record.steps) {
        if (step.do === 'mkdir' || step.do === 'alias' || (step.do === 'graft' && step.meta === undefined)) continue
        if (step.do === 'place' && step.from !== undefined) continue
        this.#dropUpper(planName(step.name))
      }
    } catch (error) {
      if (errnoOf(error) !== 'ENOENT') throw error // an earlier run has removed the directory
    }
  }
}

/** Removes directories of the upper that are empty now, all of one parent. What is gone already is fine. */
export function removeUpperDirectories(context: ApplyContext, parent: EntryPath, names: readonly ByteString[]): void {
  let fd: number
  try {
    fd = openBeneath(context.layerFds[0] as number, parent, O_DIRECTORY | O_NOFOLLOW)
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return
    throw error
  }
  withFd(fd, () => {
    for (const name of names) {
      despiteProtection(
        [
          { dirfd: fd, name },
          { dirfd: fd, name: '' },
        ],
        () => removeDirectory(fd, name),
      )
    }
  })
}

/** One name of a link group: the record it is in, and its step. */
export interface GroupMember {
  readonly record: DirectoryRecord
  readonly step: PlaceStep | GraftStep
}

/** Places one inode with all its names. */
export function applyGroup(context: ApplyContext, members: readonly GroupMember[]): void {
  let first: EntryPath | undefined
  for (const { record, step } of members) {
    const work = new RecordWork(context, record)
    try {
      if (first === undefined) {
        work.placeGrouped(step)
        first = join(planPath(record.path), planName(step.name))
      } else work.linkTo(first, step)
    } finally {
      work.close()
    }
  }
}

/**
 * Copies a tree with everything in it, marks included, below a new name. For redirect targets that show in two places.
 * Iterative, so depth costs no stack; link groups stay linked within the copy.
 */
export function copyTree(fromDir: number, from: ByteString, toDir: number, to: ByteString, reflink: boolean): void {
  const rootStat = statAt(fromDir, from)
  if (!rootStat.isDirectory) {
    const meta = readMeta(fromDir, from, rootStat)
    const inodeFlags = fileProtection(fromDir, from, rootStat)
    copyObject({ fromDir, from, stat: rootStat, meta, reflink }, toDir, to, { inodeFlags })
    return
  }
  const flagged: [EntryPath, number][] = []
  makeDirectory(toDir, to, 0o700)
  const links = new Map<string, EntryPath>()
  withFd(openat(fromDir, from, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (fromRoot) =>
    withFd(openat(toDir, to, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (toRoot) => {
      const pending: EntryPath[] = ['' as EntryPath]
      for (let path = pending.pop(); path !== undefined; path = pending.pop()) {
        const current = path
        withFd(openBeneath(fromRoot, current, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (source) =>
          withFd(openBeneath(toRoot, current, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (target) => {
            for (const { name } of sortedDirents(source)) {
              const stat = statAt(source, name)
              if (stat.isDirectory) {
                makeDirectory(target, name, 0o700)
                pending.push(join(current, name))
                continue
              }
              const key = `${stat.dev}:${stat.ino}`
              const earlier = stat.nlink > 1 ? links.get(key) : undefined
              if (earlier !== undefined) {
                const at = split(earlier)
                withFd(openBeneath(toRoot, at.parent, O_DIRECTORY | O_NOFOLLOW), (dirfd) =>
                  link(dirfd, at.name, target, name),
                )
                continue
              }
              if (stat.nlink > 1) links.set(key, join(current, name))
              copyObject(
                { fromDir: source, from: name, stat, meta: readMeta(source, name, stat), reflink },
                target,
                name,
                {},
              )
              const flags = fileProtection(source, name, stat)
              if (flags !== 0) flagged.push([join(current, name), flags])
            }
            const stat = statFd(source)
            finishDirectory(target, readMeta(source, '', stat), { removeOthers: () => true })
            if (stat.isProtected && current !== '') flagged.push([current, protectionOf(source)])
          }),
        )
      }
      // Not before all is linked and filled. The root's own are those of the directory that it is for.
      for (const [path, flags] of flagged) {
        const at = split(path)
        withFd(openBeneath(toRoot, at.parent, O_DIRECTORY | O_NOFOLLOW), (dirfd) => addFlags(dirfd, at.name, flags))
      }
    }),
  )
}
