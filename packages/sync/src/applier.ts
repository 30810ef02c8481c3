import { randomBytes } from 'node:crypto'
import {
  ACL_ACCESS,
  ACL_DEFAULT,
  clearProtection,
  despiteProtection,
  type InodeKind,
  inheritsAcls,
  type Meta,
  moveOver,
  openNew,
  openRegular,
  removeTree,
  type Trash,
  takeAway,
  type WriteMetaOptions,
  withoutProtection,
  writeMeta,
  type Xattr,
} from '@lsync/overlay-merge'
import {
  type ByteString,
  close,
  copyData,
  errnoOf,
  getInodeFlags,
  link,
  makeDirectory,
  makeNode,
  makeSymlink,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  O_RDWR,
  openat,
  openBeneath,
  PosixError,
  punchHole,
  RENAME_NOREPLACE,
  rawStatFd,
  readDirents,
  removeXattr,
  S_IFBLK,
  S_IFCHR,
  S_IFIFO,
  S_IFSOCK,
  STATX_WORD,
  type Stat,
  setInodeFlags,
  truncate,
  tryLink,
  tryRename,
  tryStatAt,
  tryUnlink,
  withFd,
  writeAt,
} from '@lsync/posix'
import { MadeDirectories } from './made-directories.ts'
import type { Extent, Operation, RawMeta, TreePath } from './model/operation.ts'
import { checkPath, OperationRefusedError, placeOf, STATE_INSIDE } from './target-path.ts'
import type { TargetLoss } from './transport/target.ts'

/** Operations that bring content with them. */
export type ContentOperation = Extract<Operation, { do: 'file' | 'patch' }>
export type PlainOperation = Exclude<Operation, ContentOperation>

export interface ApplierOptions {
  /** The target's root, open for reading. */
  readonly rootFd: number
  /** A private directory on the root's file system, from which a rename into the root is possible. */
  readonly stageFd: number
  /** What the target cannot hold; it is left out instead of failing. */
  readonly losses?: ReadonlySet<TargetLoss['what']>
  /** Never takes the place of anything: a name that is there makes the operation fail with EEXIST, without a race. */
  readonly onlyNew?: boolean
  /** This thread has a umask of its own, 0: files can be made with the mode that they are to have. */
  readonly hasOwnUmask?: boolean
  /** Directories of the target that were made and are not finished, where several work on it together. */
  readonly made?: MadeDirectories
}

interface Parent {
  readonly fd: number
  /** Made by this applier and not finished: nothing stands in the way of names, and nobody has seen it whole. */
  isFresh: boolean
  /** Nobody else can reach what is in it. */
  isPrivate: boolean
  readonly inheritsAcls: boolean
  /** What files that were made in it with a mode then had, by that mode: the next ones have the same. */
  readonly made: Map<number, Made>
}

type Made = Pick<Stat, 'uid' | 'gid' | 'permissions'>

const PARENTS = 64
const SPECIAL_TYPES: ReadonlySet<number> = new Set([S_IFIFO, S_IFSOCK, S_IFCHR, S_IFBLK])
const NO_LOSSES: ReadonlySet<TargetLoss['what']> = new Set()
const NO_XATTRS: readonly Xattr[] = []
// Labels that the target's own security modules give and take.
const KEPT_XATTRS: ReadonlySet<string> = new Set([
  'security.selinux',
  'security.ima',
  'security.evm',
  'security.SMACK64',
])

/**
 * Carries out operations at a target with synchronous system calls. It opens every path anew from the root without
 * following a symlink, and keeps some parents open; who lets several appliers work on one root calls `forget` before
 * each stretch of work in which directories cannot have been moved by another.
 *
 * Each operation may be repeated. None leaves half of what it does under a name of the target: what is new is made in
 * the stage and renamed, except in a directory that this applier has just made itself.
 */
export class Applier {
  readonly #rootFd: number
  readonly #stageFd: number
  readonly #losses: ReadonlySet<TargetLoss['what']>
  readonly #onlyNew: boolean
  readonly #hasOwnUmask: boolean
  readonly #parents = new Map<string, Parent>()
  /** The one that was asked for last: the next name is mostly in it, too. */
  #last: { readonly path: TreePath; readonly parent: Parent } | undefined
  readonly #made: MadeDirectories
  readonly #tag = randomBytes(6).toString('hex')
  #count = 0
  readonly #trashed: ByteString[] = []
  readonly #trash: Trash

  constructor({
    rootFd,
    stageFd,
    losses = NO_LOSSES,
    onlyNew = false,
    hasOwnUmask = false,
    made = new MadeDirectories(),
  }: ApplierOptions) {
    this.#rootFd = rootFd
    this.#stageFd = stageFd
    this.#losses = losses
    this.#onlyNew = onlyNew
    this.#hasOwnUmask = hasOwnUmask
    this.#made = made
    this.#trash = {
      fd: stageFd,
      next: () => {
        const name = this.#temporaryName()
        this.#trashed.push(name)
        return name
      },
    }
  }

  /**
   * Carries out an operation that has no content.
   * @throws {PosixError} when the target refuses
   * @throws {OperationRefusedError} for paths and numbers that no honest sender makes
   */
  apply(operation: PlainOperation): void {
    try {
      this.#apply(operation)
    } finally {
      this.#emptyTrash()
    }
  }

  /**
   * Begins an operation with content. The writer's `finish` gives the file its name, `discard` leaves the target as it
   * was (a `shared` patch excepted, which writes into the file where it is).
   */
  open(operation: ContentOperation): FileWriter {
    const { parent, name } = placeOf(operation.path)
    checkSize(operation)
    const meta = this.#meta(operation.meta)
    if (operation.do === 'patch') {
      return operation.shared
        ? this.#openShared(parent, name, operation, meta)
        : this.#openPatch(parent, name, operation, meta)
    }
    const place = this.#parent(parent)
    const mode = this.#modeToMake(place, meta.mode)
    const inPlace = place.isFresh ? tryOpenNew(place.fd, name, mode) : undefined
    if (inPlace !== undefined) {
      const old = madeIn(place, mode, inPlace)
      return new FileWriter(inPlace, operation, {
        finish: (fd) => writeMeta(fd, '', 'file', meta, { old, inodeFlags: this.#flags(operation.meta) }),
        discard: () => tryUnlink(place.fd, name),
      })
    }
    const temporary = this.#temporaryName()
    return this.#stagedWriter(openNew(this.#stageFd, temporary), temporary, parent, name, operation, meta)
  }

  /** Says that a directory is new and nobody else's: names in it are made in place. */
  adopt(path: TreePath): void {
    const place = this.#parent(path)
    place.isFresh = !place.inheritsAcls
    place.isPrivate = isPrivate(rawStatFd(place.fd))
  }

  /** Directories that it has made are not new any more: what is in them counts from here on, or others work there. */
  disown(): void {
    this.#made.clear()
    for (const place of this.#parents.values()) place.isFresh = false
  }

  /** Closes all directories that were kept open. One that it has made is still new when it is opened again. */
  forget(): void {
    for (const { fd } of this.#parents.values()) close(fd)
    this.#parents.clear()
    this.#last = undefined
  }

  #apply(operation: PlainOperation): void {
    switch (operation.do) {
      case 'remove':
        this.#remove(operation.path)
        return
      case 'out':
        this.#out(operation.path, operation.stage)
        return
      case 'in':
        this.#in(operation.stage, operation.path)
        return
      case 'rename':
        this.#rename(operation.from, operation.to)
        return
      case 'directory':
        this.#directory(operation.path)
        return
      case 'keep':
        this.#keep(operation)
        return
      case 'link':
        this.#link(operation.path, operation.to)
        return
      case 'symlink':
        this.#symlink(operation)
        return
      case 'special':
        this.#special(operation)
        return
      case 'meta':
        this.#setMeta(operation)
        return
    }
  }

  #remove(path: TreePath): void {
    const { parent, name } = placeOf(path)
    const place = this.#tryParent(parent)
    if (place === undefined) return
    this.#drop(path)
    takeAway(place.fd, name, this.#trash)
  }

  #out(path: TreePath, stage: number): void {
    const stageName = stageNameOf(stage)
    const { parent, name } = placeOf(path)
    if (tryStatAt(this.#stageFd, stageName) !== undefined) return
    const place = this.#parent(parent)
    this.#drop(path)
    if (moveOver(place.fd, name, this.#stageFd, stageName, this.#trash) || this.#mayBeLost) return
    throw missing('out', path)
  }

  #in(stage: number, path: TreePath): void {
    const { parent, name } = placeOf(path)
    const place = this.#parent(parent)
    this.#drop(path)
    moveOver(this.#stageFd, stageNameOf(stage), place.fd, name, this.#trash)
  }

  #rename(from: TreePath, to: TreePath): void {
    const source = placeOf(from)
    const target = placeOf(to)
    const sourcePlace = this.#tryParent(source.parent)
    const targetPlace = this.#parent(target.parent)
    this.#drop(from)
    this.#drop(to)
    if (sourcePlace !== undefined) {
      if (moveOver(sourcePlace.fd, source.name, targetPlace.fd, target.name, this.#trash)) return
    }
    if (tryStatAt(targetPlace.fd, target.name) === undefined && !this.#mayBeLost) throw missing('rename', from)
  }

  #directory(path: TreePath): void {
    if (path === '') return
    const { parent, name } = placeOf(path)
    const place = this.#parent(parent)
    for (;;) {
      try {
        despiteProtection([{ dirfd: place.fd, name: '' }], () => makeDirectory(place.fd, name, 0o700))
        break
      } catch (error) {
        if (errnoOf(error) !== 'EEXIST') throw error
        if (tryStatAt(place.fd, name)?.isDirectory === true) return
        if (this.#onlyNew) throw error
        takeAway(place.fd, name, this.#trash)
      }
    }
    this.#drop(path)
    const fd = openat(place.fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
    // Its children would inherit them; what belongs to it comes with its metadata.
    if (place.inheritsAcls) for (const acl of [ACL_DEFAULT, ACL_ACCESS]) removeXattr(fd, '', acl)
    const words = rawStatFd(fd)
    this.#remember(path, words)
    this.#hold(path, { fd, isFresh: true, isPrivate: isPrivate(words), inheritsAcls: false, made: new Map() })
  }

  // In a tree that only grows, what a crash left half written in its place could never be made whole.
  #remember(path: TreePath, words: Uint32Array): void {
    if (this.#onlyNew) return
    this.#made.add(path, identityOf(words))
  }

  #keep({ path, names, after, last }: Extract<Operation, { do: 'keep' }>): void {
    if (path !== '') checkPath(path)
    const place = this.#tryParent(path)
    if (place === undefined) return
    const kept = new Set(names)
    const others: ByteString[] = []
    readDirents(place.fd, (name) => {
      if ((after !== undefined && name <= after) || (last !== undefined && name > last)) return
      if (!kept.has(name) && !(path === '' && STATE_INSIDE.test(name))) others.push(name)
    })
    for (const name of others) {
      this.#drop((path === '' ? name : `${path}/${name}`) as TreePath)
      takeAway(place.fd, name, this.#trash)
    }
  }

  #link(path: TreePath, to: TreePath): void {
    const existing = placeOf(to)
    const { parent, name } = placeOf(path)
    const { fd } = this.#parent(parent)
    const fromFd = this.#parent(existing.parent).fd
    const source = tryStatAt(fromFd, existing.name)
    if (source === undefined) {
      if (!this.#mayBeLost) throw missing('link', to)
      this.#remove(path)
      return
    }
    if (this.#losses.has('hard-link')) {
      this.#copy(fromFd, existing.name, fd, name)
      return
    }
    const stat = tryStatAt(fd, name)
    if (stat !== undefined && stat.ino === source.ino && stat.dev === source.dev) return
    const linkTo = (dirfd: number, as: ByteString) => {
      const code = tryLink(fromFd, existing.name, dirfd, as)
      if (code === undefined) return
      if (code !== 'EPERM') throw new PosixError(code, { syscall: 'linkat', path })
      if (dirfd !== this.#stageFd) clearProtection(dirfd, '')
      withoutProtection(fromFd, existing.name, () => {
        const again = tryLink(fromFd, existing.name, dirfd, as)
        if (again !== undefined) throw new PosixError(again, { syscall: 'linkat', path })
      })
    }
    if (stat === undefined || this.#onlyNew) {
      linkTo(fd, name)
      return
    }
    this.#drop(path)
    const temporary = this.#temporaryName()
    linkTo(this.#stageFd, temporary)
    this.#publish(temporary, fd, name)
  }

  // Where there are no hard links, each name has the content for itself.
  #copy(fromFd: number, fromName: ByteString, toFd: number, name: ByteString): void {
    const { fd, stat } = openRegular(fromFd, fromName)
    withFd(fd, () => {
      const temporary = this.#temporaryName()
      withFd(openNew(this.#stageFd, temporary), (to) => {
        copyData(fd, to, stat.sizeBytes, name)
        writeMeta(to, '', 'file', this.#meta({ ...metaOf(stat), xattrs: [] }))
      })
      this.#publish(temporary, toFd, name)
    })
  }

  #symlink(operation: Extract<Operation, { do: 'symlink' }>): void {
    this.#make(operation, 'symlink', (dirfd, name) => makeSymlink(operation.target, dirfd, name))
  }

  #special(operation: Extract<Operation, { do: 'special' }>): void {
    const { type, rdev } = operation
    if (!SPECIAL_TYPES.has(type)) throw new OperationRefusedError(operation.path, 'no such type of file')
    if (this.#losses.has('special')) {
      // It cannot be there, and neither may what was there before.
      this.#remove(operation.path)
      return
    }
    this.#make(operation, 'special', (dirfd, name) => makeNode(dirfd, name, type | 0o600, rdev))
  }

  #make(
    { path, meta }: { readonly path: TreePath; readonly meta: RawMeta },
    kind: InodeKind,
    create: (dirfd: number, name: ByteString) => void,
  ): void {
    const { parent, name } = placeOf(path)
    const place = this.#parent(parent)
    const options: WriteMetaOptions = { withoutTimes: this.#losses.has('symlink-meta') && kind === 'symlink' }
    const temporary = this.#temporaryName()
    if (place.isFresh && tryStatAt(place.fd, name) === undefined) {
      create(place.fd, name)
      writeMeta(place.fd, name, kind, this.#meta(meta), options)
      return
    }
    create(this.#stageFd, temporary)
    writeMeta(this.#stageFd, temporary, kind, this.#meta(meta), options)
    this.#drop(path)
    this.#publish(temporary, place.fd, name)
  }

  #setMeta({ path, kind, meta }: Extract<Operation, { do: 'meta' }>): void {
    const options: WriteMetaOptions = {
      removeOthers: isRemovable,
      inodeFlags: kind === 'directory' || kind === 'file' ? this.#flags(meta) : 0,
      withoutTimes: this.#losses.has('symlink-meta') && kind === 'symlink',
    }
    const raw = this.#meta(meta)
    if (kind === 'directory') {
      if (path !== '') checkPath(path)
      const place = this.#parent(path)
      place.isFresh = false
      this.#made.finish(path)
      despiteProtection([{ dirfd: place.fd, name: '' }], () => writeMeta(place.fd, '', kind, raw, options))
      return
    }
    const { parent, name } = placeOf(path)
    const place = this.#parent(parent)
    despiteProtection([{ dirfd: place.fd, name }], () => writeMeta(place.fd, name, kind, raw, options))
  }

  #openPatch(
    parent: TreePath,
    name: ByteString,
    operation: Extract<Operation, { do: 'patch' }>,
    meta: Meta,
  ): FileWriter {
    const { fd: base, stat } = openRegular(this.#parent(parent).fd, name)
    return withFd(base, () => {
      const temporary = this.#temporaryName()
      const fd = openNew(this.#stageFd, temporary)
      try {
        copyData(base, fd, stat.sizeBytes, name)
        prepare(fd, operation)
      } catch (error) {
        close(fd)
        tryUnlink(this.#stageFd, temporary)
        throw error
      }
      return this.#stagedWriter(fd, temporary, parent, name, operation, meta)
    })
  }

  #openShared(
    parent: TreePath,
    name: ByteString,
    operation: Extract<Operation, { do: 'patch' }>,
    meta: Meta,
  ): FileWriter {
    const place = this.#parent(parent)
    close(openRegular(place.fd, name).fd)
    const fd = despiteProtection([{ dirfd: place.fd, name }], () =>
      openat(place.fd, name, O_RDWR | O_NOFOLLOW | O_NONBLOCK),
    )
    try {
      prepare(fd, operation)
    } catch (error) {
      close(fd)
      throw error
    }
    return new FileWriter(fd, operation, {
      finish: () =>
        writeMeta(fd, '', 'file', meta, { removeOthers: isRemovable, inodeFlags: this.#flags(operation.meta) }),
      discard: () => undefined,
    })
  }

  #stagedWriter(
    fd: number,
    temporary: ByteString,
    parent: TreePath,
    name: ByteString,
    operation: ContentOperation,
    meta: Meta,
  ): FileWriter {
    return new FileWriter(fd, operation, {
      finish: () => {
        writeMeta(fd, '', 'file', meta)
        this.#drop(operation.path)
        this.#publish(temporary, this.#parent(parent).fd, name)
        // An immutable file could not be renamed any more.
        const flags = this.#flags(operation.meta)
        if (flags !== 0) setInodeFlags(fd, getInodeFlags(fd) | flags, name)
      },
      discard: () => tryUnlink(this.#stageFd, temporary),
    })
  }

  #publish(temporary: ByteString, dirfd: number, name: ByteString): void {
    try {
      if (this.#onlyNew) moveBeside(this.#stageFd, temporary, dirfd, name)
      else moveOver(this.#stageFd, temporary, dirfd, name, this.#trash)
    } catch (error) {
      tryUnlink(this.#stageFd, temporary)
      throw error
    } finally {
      this.#emptyTrash()
    }
  }

  #parent(path: TreePath): Parent {
    if (this.#last?.path !== path) this.#last = { path, parent: this.#findParent(path) }
    return this.#last.parent
  }

  #findParent(path: TreePath): Parent {
    if (path === '') {
      const held = this.#parents.get('')
      if (held !== undefined) return held
      const fd = openat(this.#rootFd, '.' as ByteString, O_RDONLY | O_DIRECTORY)
      return this.#hold(path, oldParent(fd))
    }
    const held = this.#parents.get(path)
    if (held !== undefined) {
      this.#parents.delete(path)
      this.#parents.set(path, held)
      return held
    }
    const fd = openBeneath(this.#rootFd, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
    const made = this.#made.identityOf(path)
    if (made !== undefined) {
      const words = rawStatFd(fd)
      if (made === identityOf(words)) {
        const isFresh = true
        return this.#hold(path, { fd, isFresh, isPrivate: isPrivate(words), inheritsAcls: false, made: new Map() })
      }
    }
    return this.#hold(path, oldParent(fd))
  }

  // A parent that is missing, or is no directory, holds nothing.
  #tryParent(path: TreePath): Parent | undefined {
    try {
      return this.#parent(path)
    } catch (error) {
      const code = errnoOf(error)
      if (code === 'ENOENT' || code === 'ENOTDIR' || code === 'ELOOP') return undefined
      throw error
    }
  }

  #hold(path: TreePath, parent: Parent): Parent {
    this.#parents.set(path, parent)
    this.#last = { path, parent }
    if (this.#parents.size > PARENTS) {
      for (const [oldest, { fd }] of this.#parents) {
        if (oldest === '') continue
        this.#parents.delete(oldest)
        close(fd)
        break
      }
    }
    return parent
  }

  /** Forgets a path, whose place something else takes, with all beneath it. */
  #drop(path: TreePath): void {
    this.#last = undefined
    const beneath = `${path}/`
    for (const [held, { fd }] of this.#parents) {
      if (held !== path && !held.startsWith(beneath)) continue
      this.#parents.delete(held)
      close(fd)
    }
  }

  #emptyTrash(): void {
    for (let name = this.#trashed.pop(); name !== undefined; name = this.#trashed.pop()) removeTree(this.#stageFd, name)
  }

  #temporaryName(): ByteString {
    return `t${this.#tag}.${this.#count++}` as ByteString
  }

  /** What is missing may be a special file, which this target does not hold. */
  get #mayBeLost(): boolean {
    return this.#losses.has('special')
  }

  // With the mode that it is to have at once where nobody can reach a file before it is whole.
  #modeToMake({ isPrivate }: Parent, mode: number): number {
    return isPrivate && this.#hasOwnUmask && (mode & ~0o777) === 0 ? mode : 0o600
  }

  #flags(meta: RawMeta): number {
    return this.#losses.has('flags') ? 0 : meta.inodeFlags
  }

  #meta({ mode, uid, gid, mtimeNs, xattrs }: RawMeta): Meta {
    const keepsOwner = !this.#losses.has('owner')
    return {
      mode,
      uid: keepsOwner ? uid : SAME_OWNER,
      gid: keepsOwner ? gid : SAME_OWNER,
      atimeNs: mtimeNs,
      mtimeNs,
      xattrs: xattrs.length === 0 ? NO_XATTRS : this.#xattrs(xattrs),
    }
  }

  #xattrs(xattrs: RawMeta['xattrs']): readonly Xattr[] {
    const kept = this.#losses.size === 0 ? xattrs : xattrs.filter(([name]) => !this.#loses(name))
    return kept.map(([name, value]) => ({ name, value }))
  }

  #loses(name: string): boolean {
    if (name.startsWith('system.posix_acl_')) return this.#losses.has('acl')
    if (name.startsWith('user.')) return this.#losses.has('xattr')
    return this.#losses.has('trusted-xattr')
  }
}

// chown(2): this id is left as it is.
const SAME_OWNER = 0xffff_ffff

interface WriterEnds {
  readonly finish: (fd: number) => void
  readonly discard: () => void
}

/** A file of the target that is being written. Exactly one of `finish` and `discard` ends it. */
export class FileWriter {
  /** Open for writing; for those who copy from file to file. */
  readonly fd: number
  readonly #operation: ContentOperation
  readonly #ends: WriterEnds

  constructor(fd: number, operation: ContentOperation, ends: WriterEnds) {
    this.fd = fd
    this.#operation = operation
    this.#ends = ends
  }

  /**
   * Writes content that belongs at `offset`.
   * @throws {OperationRefusedError} outside the size of the file
   */
  write(offset: number, bytes: Uint8Array): void {
    if (offset < 0 || offset + bytes.length > this.#operation.sizeBytes) {
      throw new OperationRefusedError(this.#operation.path, 'content lies outside the file')
    }
    writeAt(this.fd, offset, bytes, this.#operation.path)
  }

  /** Sets size and metadata, and gives the file its name. */
  finish(): void {
    try {
      const { path, sizeBytes, extents } = this.#operation
      const last = extents.at(-1)
      // What ends in data has its size already.
      if (sizeBytes > 0 && (last === undefined || last[0] + last[1] < sizeBytes || this.#operation.do === 'patch')) {
        truncate(this.fd, sizeBytes, path)
      }
      this.#ends.finish(this.fd)
    } catch (error) {
      this.#ends.discard()
      throw error
    } finally {
      close(this.fd)
    }
  }

  /** Leaves the target's name as it was. */
  discard(): void {
    close(this.fd)
    this.#ends.discard()
  }
}

function prepare(fd: number, { path, sizeBytes, holes }: Extract<Operation, { do: 'patch' }>): void {
  truncate(fd, sizeBytes, path)
  for (const [offset, length] of holes) punchHole(fd, offset, length, path)
}

function checkSize(operation: ContentOperation): void {
  const { path, sizeBytes } = operation
  checkExtents(path, sizeBytes, operation.extents)
  if (operation.do === 'patch') checkExtents(path, sizeBytes, operation.holes)
}

function checkExtents(path: TreePath, sizeBytes: number, extents: readonly Extent[]): void {
  if (!isCount(sizeBytes)) throw new OperationRefusedError(path, 'no file has such a size')
  let end = 0
  for (const [offset, length] of extents) {
    if (!isCount(offset) || !isCount(length) || offset < end || offset + length > sizeBytes) {
      throw new OperationRefusedError(path, 'extents ascend and lie inside the file')
    }
    end = offset + length
  }
}

function stageNameOf(stage: number): ByteString {
  if (!isCount(stage)) throw new OperationRefusedError('', 'a stage number is a whole number')
  return `n${stage}` as ByteString
}

function isCount(value: number): boolean {
  return Number.isSafeInteger(value) && value >= 0
}

function isRemovable(name: string): boolean {
  return !KEPT_XATTRS.has(name) && (!name.startsWith('system.') || name.startsWith('system.posix_acl_'))
}

function tryOpenNew(dirfd: number, name: ByteString, mode: number): number | undefined {
  try {
    return openNew(dirfd, name, mode)
  } catch (error) {
    if (errnoOf(error) === 'EEXIST') return undefined
    throw error
  }
}

function metaOf(stat: { permissions: number; uid: number; gid: number; mtimeNs: bigint }): RawMeta {
  return {
    mode: stat.permissions,
    uid: stat.uid,
    gid: stat.gid,
    mtimeNs: stat.mtimeNs,
    xattrs: [],
    inodeFlags: 0,
  }
}

/** Gives a non-directory a name that nothing has. */
function moveBeside(fromDir: number, from: ByteString, toDir: number, to: ByteString): void {
  const code = tryRename(fromDir, from, toDir, to, RENAME_NOREPLACE)
  if (code === undefined) return
  if (code !== 'EINVAL' && code !== 'ENOSYS') throw new PosixError(code, { syscall: 'renameat2', path: to })
  // A file system without that flag (FUSE); a new link does not replace anything either.
  link(fromDir, from, toDir, to)
  tryUnlink(fromDir, from)
}

function oldParent(fd: number): Parent {
  return { fd, isFresh: false, isPrivate: false, inheritsAcls: inheritsAcls(fd), made: new Map() }
}

function isPrivate(words: Uint32Array): boolean {
  const { mode, uid } = STATX_WORD
  return ((words[mode] as number) & 0o077) === 0 && words[uid] === process.geteuid?.()
}

/** What a file that was just made with `mode` has: one look for each directory and mode. */
function madeIn({ made }: Parent, mode: number, fd: number): Made {
  const known = made.get(mode)
  if (known !== undefined) return known
  const words = rawStatFd(fd)
  const { uid, gid, mode: at } = STATX_WORD
  const found = {
    uid: words[uid] as number,
    gid: words[gid] as number,
    permissions: (words[at] as number) & 0o7777,
  }
  made.set(mode, found)
  return found
}

/** Inode number and time of birth. */
function identityOf(words: Uint32Array): string {
  const { ino, birth } = STATX_WORD
  return `${words[ino]}.${words[ino + 1]}.${words[birth]}.${words[birth + 2]}`
}

function missing(what: string, path: TreePath): PosixError {
  return new PosixError('ENOENT', { syscall: what, path })
}
