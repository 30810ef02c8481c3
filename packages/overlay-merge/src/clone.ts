import {
  type ByteString,
  close,
  DT_CHR,
  DT_DIR,
  DT_REG,
  DT_UNKNOWN,
  type HostPath,
  listXattrs,
  makeDirectory,
  O_DIRECTORY,
  O_NOFOLLOW,
  openBeneath,
  PosixError,
  type Stat,
  setTimes,
  sizeAt,
  statAt,
  statFd,
  textOf,
  tryLink,
  withFd,
} from '@lsync/posix'
import { copyObject, fileProtection, protectionOf, resultMeta } from './effects.ts'
import { addFlags, finishDirectory, inheritsAcls, readMeta, type WriteMetaOptions } from './encodings/inode.ts'
import type { Meta } from './model/entry.ts'
import { isMark, type MarkNames } from './model/marks.ts'
import { type EntryPath, join, type Name, split } from './model/path.ts'
import { type Need, needsOf } from './plan.ts'
import { TargetCannotHoldError } from './problems.ts'
import { nameRanges, typeOf } from './scan.ts'

/** Ways to clone a whole tree at once. */
export type SnapshotMethod = 'moosefs' | 'btrfs'

/** How the new tree gets what does not change. */
export type CloneMethod = SnapshotMethod | 'reflink' | 'hardlink' | 'copy'

/** What cloning a tree entry by entry needs. */
export interface CloneContext {
  readonly fromFd: number
  readonly toFd: number
  /** What errors call the new tree. */
  readonly target: HostPath
  /** What its file system cannot hold: the first entry that needs some of it ends the clone. */
  readonly lacking: readonly Need[]
  readonly method: 'reflink' | 'hardlink' | 'copy'
  /** The clone stays a layer on something: whiteouts and marks stay. Otherwise it is the bottom, where they go. */
  readonly below: boolean
  /** Escaped attributes get their plain names. */
  readonly plain: boolean
  readonly marks: MarkNames
}

/** What cloning some directories gave. */
export interface ClonePart {
  readonly next: EntryPath[]
  /** Names of files with several names, where they are copied: one inode each for `key`. */
  readonly groups: [key: string, path: string][]
  /** Immutable and append-only directories, which become so when the clone is whole. */
  readonly flagged: [path: EntryPath, flags: number][]
  readonly counts: { directories: number; objects: number; bytes: number }
}

export function emptyClonePart(): ClonePart {
  return { next: [], groups: [], flagged: [], counts: { directories: 0, objects: 0, bytes: 0 } }
}

/** The names among some (in byte order) that are to be left out. They are asked for once, a range at a time. */
export type LeftOut = (names: readonly { readonly name: string }[]) => ReadonlySet<string>

const NOTHING: ReadonlySet<string> = new Set()
export const leaveOutNothing: LeftOut = () => NOTHING

/**
 * Clones one directory of the source into the one of the same path that exists in the target: links or copies what is
 * not a directory, makes the subdirectories (given back in `part.next`), and sets the directory's metadata last. What
 * `leftOut` gives is left out.
 */
export function cloneDirectory(context: CloneContext, path: EntryPath, part: ClonePart, leftOut: LeftOut): void {
  const from = openBeneath(context.fromFd, path, O_DIRECTORY | O_NOFOLLOW)
  try {
    const to = openBeneath(context.toFd, path, O_DIRECTORY | O_NOFOLLOW)
    try {
      let inherits: boolean | undefined
      for (const { lists } of nameRanges([from])) {
        const entries = lists[0] ?? []
        const replaced = leftOut(entries)
        for (const entry of entries) {
          if (replaced.has(entry.name)) continue
          const { name } = entry
          const type = entry.type === DT_UNKNOWN ? typeOf(statAt(from, name)) : entry.type
          if (type === DT_DIR) {
            makeDirectory(to, name, 0o700)
            part.next.push(join(path, name))
            continue
          }
          const fate = fateOf(context, from, name, type)
          if (fate === 'absent') continue
          if (context.method === 'hardlink' && fate === 'same' && tryShare(from, to, name)) {
            part.counts.objects++
            continue
          }
          inherits ??= inheritsAcls(to)
          copyEntry(context, { from, to, name, path: join(path, name) }, inherits, part)
        }
      }
      const stat = statFd(from)
      const meta = cloneMeta(context, from, '', stat)
      const flags = stat.isProtected ? protectionOf(from) : 0
      assertHeld(context, path, stat, meta, flags)
      inherits ??= inheritsAcls(to)
      finishDirectory(to, meta, { dropInheritedAcls: inherits })
      if (flags !== 0) part.flagged.push([path, flags])
      part.counts.directories++
    } finally {
      close(to)
    }
  } finally {
    close(from)
  }
}

/**
 * What a bottom layer's entry becomes: nothing (a whiteout hides nothing there), a copy without its marks, or the very
 * inode, since a link shares all its attributes.
 */
function fateOf(context: CloneContext, from: number, name: ByteString, type: number): 'absent' | 'copy' | 'same' {
  if (context.below || (type !== DT_REG && type !== DT_CHR)) return 'same'
  const { marks, plain } = context
  if (type === DT_CHR && statAt(from, name).isWhiteoutDevice) return 'absent'
  // In a layer, marks that mean nothing are invisible, and only an empty file can be a whiteout: a stat is a quarter of
  // the price of listing attributes on ext4, for every file of the tree.
  if (!plain && (type !== DT_REG || sizeAt(from, name) > 0)) return 'same'
  const attributes = listXattrs(from, name)
  if (attributes.includes(marks.whiteout) && sizeAt(from, name) === 0) return 'absent'
  return plain && attributes.some((attribute) => attribute.startsWith(marks.prefix)) ? 'copy' : 'same'
}

// `false` where the inode has all the links it can have, or is immutable: then a copy does.
function tryShare(from: number, to: number, name: ByteString): boolean {
  const code = tryLink(from, name, to, name)
  if (code === undefined) return true
  if (code === 'EMLINK' || code === 'EPERM') return false
  throw new PosixError(code, { syscall: 'linkat', path: name })
}

interface Place {
  readonly from: number
  readonly to: number
  readonly name: Name
  readonly path: EntryPath
}

function copyEntry(context: CloneContext, place: Place, inherits: boolean, part: ClonePart): void {
  const { from, to, name, path } = place
  const stat = statAt(from, name)
  if (stat.nlink > 1 && !stat.isWhiteoutDevice) {
    part.groups.push([`${stat.dev}:${stat.ino}`, textOf(path)])
    return
  }
  const inodeFlags = fileProtection(from, name, stat)
  const options: WriteMetaOptions = { dropInheritedAcls: inherits, inodeFlags }
  const meta = cloneMeta(context, from, name, stat)
  assertHeld(context, path, stat, meta, inodeFlags)
  copyObject({ fromDir: from, from: name, stat, meta, reflink: context.method === 'reflink' }, to, name, options)
  part.counts.objects++
  part.counts.bytes += stat.sizeBytes
}

/**
 * Copies one inode under the first of its names; the caller links the others and then sets the inode flags that are
 * given back, since an immutable inode takes no link.
 */
export function copyLinked(context: CloneContext, path: EntryPath): number {
  const { parent, name } = split(path)
  return withFd(openBeneath(context.fromFd, parent, O_DIRECTORY | O_NOFOLLOW), (from) =>
    withFd(openBeneath(context.toFd, parent, O_DIRECTORY | O_NOFOLLOW), (to) => {
      const stat = statAt(from, name)
      const meta = cloneMeta(context, from, name, stat)
      const flags = fileProtection(from, name, stat)
      assertHeld(context, path, stat, meta, flags)
      if (context.lacking.includes('hardLinks')) throw cannotHold(context, 'hardLinks', path)
      const before = statFd(to)
      const request = { fromDir: from, from: name, stat, meta, reflink: context.method === 'reflink' }
      copyObject(request, to, name, { dropInheritedAcls: inheritsAcls(to) })
      restoreTimes(to, before)
      return flags
    }),
  )
}

/** Sets inode flags (chattr) of a file or directory of the clone. */
export function protect(context: CloneContext, path: EntryPath, flags: number): void {
  const { parent, name } = split(path)
  withFd(openBeneath(context.toFd, parent, O_DIRECTORY | O_NOFOLLOW), (to) => addFlags(to, name, flags))
}

// The tree is built where nobody sees it yet, so that nothing is left of a clone that is refused.
function assertHeld(
  { lacking, ...context }: CloneContext,
  path: EntryPath,
  stat: Stat,
  meta: Meta,
  flags: number,
): void {
  if (lacking.length === 0) return
  const attributes = meta.xattrs.map(({ name }) => name)
  const needs: Need[] = stat.isWhiteoutDevice ? ['whiteouts'] : needsOf(stat, attributes)
  if (flags !== 0) needs.push('inodeFlags')
  const need = needs.find((one) => lacking.includes(one))
  if (need !== undefined) throw cannotHold(context, need, path)
}

function cannotHold({ target }: Pick<CloneContext, 'target'>, what: Need, path: EntryPath): TargetCannotHoldError {
  return new TargetCannotHoldError(target, [{ what, path }])
}

function restoreTimes(fd: number, stat: Stat): void {
  setTimes(fd, '', stat.atimeNs, stat.mtimeNs)
}

// In a layer the meaning stays (opaque, redirect, metacopy, whiteout), what is tied to the old inode goes.
function cloneMeta(context: CloneContext, dirfd: number, name: ByteString | '', stat: Stat): Meta {
  const { marks } = context
  if (!context.below) return resultMeta(dirfd, name, stat, marks, context.plain)
  const meaningful: readonly ByteString[] = [marks.opaque, marks.redirect, marks.metacopy, marks.whiteout]
  return readMeta(dirfd, name, stat, (attribute) => !isMark(attribute, marks) || meaningful.includes(attribute))
}
