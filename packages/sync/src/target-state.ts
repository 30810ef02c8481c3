import { createHash, randomBytes } from 'node:crypto'
import { ACL_ACCESS, ACL_DEFAULT, openNew, removeTree, TargetBusyError } from '@lsync/overlay-merge'
import {
  AT_FDCWD,
  type ByteString,
  close,
  errnoOf,
  FS_IMMUTABLE_FL,
  fsync,
  getInodeFlags,
  getXattr,
  type HostPath,
  LsyncError,
  makeDirectory,
  makeNode,
  makeSymlink,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_RDONLY,
  openat,
  openRoot,
  printable,
  readAt,
  readDirents,
  removeXattr,
  rename,
  S_IFCHR,
  setInodeFlags,
  setOwner,
  setTimes,
  setXattr,
  statAt,
  statFd,
  tryLink,
  tryLock,
  tryRename,
  tryStatAt,
  tryUnlink,
  withFd,
  writeAt,
} from '@lsync/posix'
import type { Checkpoint } from './model/checkpoint.ts'
import { STATE_INSIDE } from './target-path.ts'
import type { TargetLoss, TargetState } from './transport/target.ts'

/** The state of a target cannot be believed. Nothing was changed. */
export class TargetStateDamagedError extends LsyncError {
  constructor(path: string, why: string) {
    super('TARGET_STATE_DAMAGED', `the state ${printable(path)} of the target is damaged: ${why}`, {
      path,
      hint: 'check the disk; removing that directory makes the next sync compare the whole tree',
    })
  }
}

/** The directory that was a target is not there: not mounted, something lies over it, or it was removed. Nothing was made. */
export class TargetGoneError extends LsyncError {
  constructor(path: string, why: string) {
    super('TARGET_GONE', `${printable(path)} ${why}`, {
      path,
      hint: 'mount it, or bring it back; if it is gone for good, start anew with --adopt',
    })
  }
}

/** How a target is opened. */
export interface OpenPlace {
  /** Makes the directory if it is missing; its parent must be there. */
  readonly create: boolean
  /** It was synced before: where it does not say so, it is another directory, and stays as it is. */
  readonly isKnown?: boolean
}

const CHECKPOINT = 'checkpoint' as ByteString
const CHECKPOINT_NEW = 'checkpoint.new' as ByteString
const STAGE = 'stage' as ByteString
const BESIDE_PREFIX = '.lsync.sync.'
const NAME_MAX = 255
const STAGED = /^n(\d{1,15})$/
const CHECKPOINT_MAX_BYTES = 4096

/**
 * A directory as the target of a sync, locked: its root, the stage from which files are renamed into it, and what it
 * durably holds. The state lies beside the target as `.lsync.sync.NAME`, or as `.lsync-HEX` in it where nothing can be
 * renamed from beside (the root of a mount or of a subvolume).
 */
export class TargetPlace {
  readonly rootFd: number
  readonly stageFd: number
  readonly state: TargetState
  /** Where the state lies. */
  readonly statePath: HostPath
  readonly #stateFd: number
  /** Opens whatever has the target's path now. */
  readonly #find: () => number
  #next: number

  private constructor(
    rootFd: number,
    stateFd: number,
    stageFd: number,
    statePath: HostPath,
    isInside: boolean,
    find: () => number,
  ) {
    this.rootFd = rootFd
    this.#find = find
    this.#stateFd = stateFd
    this.stageFd = stageFd
    this.statePath = statePath
    const stored = readCheckpoint(stateFd, statePath)
    this.#next = Math.max(stored?.nextStage ?? 0, clearTemporary(stageFd))
    this.state = {
      checkpoint: stored?.checkpoint,
      isEmpty: isEmptyRoot(rootFd, isInside),
      nextStage: this.#next,
      losses: findLosses(stageFd),
    }
  }

  /**
   * Opens a directory as a target.
   * @throws {TargetBusyError} if another process has it
   * @throws {TargetGoneError} if it is known and not there
   * @throws {TargetStateDamagedError} if somebody else could have written the state
   */
  static open(path: HostPath, options: OpenPlace): TargetPlace {
    const { parent } = placeOfState(path)
    const rootFd = openTarget(path, options)
    const find = () => openRoot(path)
    let parentFd: number
    try {
      parentFd = openRoot(parent)
    } catch (error) {
      close(rootFd)
      throw error
    }
    return withFd(parentFd, () => TargetPlace.#open({ rootFd, parentFd, path, find }, options))
  }

  /**
   * As `open`, for a directory that somebody else names: `name` in the directory `parentFd`, and no symlink. `path` is
   * what messages call it, and `find` opens whatever has it later.
   */
  static openAt(
    parentFd: number,
    name: ByteString,
    path: HostPath,
    find: () => number,
    options: OpenPlace,
  ): TargetPlace {
    // Nobody sees it before it has the mode of the upper.
    if (options.create && tryStatAt(parentFd, name) === undefined) makeDirectory(parentFd, name, 0o700)
    const rootFd = openat(parentFd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
    return TargetPlace.#open({ rootFd, parentFd, path, find }, options)
  }

  /** What a target holds durably, without taking it, waiting for who has it, or changing anything. */
  static peek(parentFd: number, name: ByteString, path: HostPath): Checkpoint | undefined {
    return withFd(openat(parentFd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (rootFd) =>
      findCheckpoint(path, rootFd, parentFd),
    )
  }

  static #open({ rootFd, parentFd, path, find }: FoundTarget, { isKnown = false }: OpenPlace): TargetPlace {
    try {
      if (isKnown && findCheckpoint(path, rootFd, parentFd) === undefined) {
        throw new TargetGoneError(path, 'was synced before and does not know it: it may not be mounted')
      }
      const beside = openBeside(path, rootFd, parentFd)
      const { fd, stageFd, path: statePath } = beside ?? openInside(path, rootFd)
      try {
        return new TargetPlace(rootFd, fd, stageFd, statePath, beside === undefined, find)
      } catch (error) {
        // Left open, its lock would keep this very process from trying again.
        close(stageFd)
        close(fd)
        throw error
      }
    } catch (error) {
      close(rootFd)
      throw error
    }
  }

  /**
   * Makes sure that the target is still what its path names, and through the same mount: what is written elsewhere, nobody
   * would find there.
   * @throws {TargetGoneError}
   */
  assertThere(): void {
    let fd: number
    try {
      fd = this.#find()
    } catch (cause) {
      if (errnoOf(cause) === undefined && !(cause instanceof LsyncError)) throw cause
      throw new TargetGoneError(this.statePath, 'belongs to a target that cannot be found any more')
    }
    withFd(fd, () => {
      const [now, then] = [statFd(fd), statFd(this.rootFd)]
      if (now.dev === then.dev && now.ino === then.ino && now.mountId === then.mountId) return
      throw new TargetGoneError(this.statePath, 'belongs to a target whose place another directory has now')
    })
  }

  /**
   * Stores durably what the target holds. Everything before it must be durable. What is still in the stage was taken
   * out of the tree for good.
   */
  storeCheckpoint(checkpoint: Checkpoint, nextStage: number = this.#next): void {
    this.#next = Math.max(this.#next, nextStage)
    const record = JSON.stringify({ version: 1, ...checkpoint, nextStage: this.#next })
    const line = `${record}\n${checksum(record)}\n`
    tryUnlink(this.#stateFd, CHECKPOINT_NEW)
    withFd(openNew(this.#stateFd, CHECKPOINT_NEW), (fd) => {
      writeAt(fd, 0, Buffer.from(line), this.statePath)
      fsync(fd, this.statePath)
    })
    rename(this.#stateFd, CHECKPOINT_NEW, this.#stateFd, CHECKPOINT)
    fsync(this.#stateFd, this.statePath)
    for (const name of namesIn(this.stageFd)) if (STAGED.test(name)) removeTree(this.stageFd, name)
  }

  close(): void {
    close(this.stageFd)
    close(this.#stateFd)
    close(this.rootFd)
  }
}

interface FoundTarget {
  readonly rootFd: number
  readonly parentFd: number
  readonly path: HostPath
  readonly find: () => number
}

/** What the state of a target holds, in the place where it would be opened; changes nothing. */
function findCheckpoint(path: HostPath, rootFd: number, parentFd: number): Checkpoint | undefined {
  const inside = namesIn(rootFd).filter((entry) => STATE_INSIDE.test(entry))
  const places: (readonly [number, ByteString])[] = inside.map((entry) => [rootFd, entry] as const)
  if (hasPlaceBeside(rootFd, parentFd)) places.unshift([parentFd, placeOfState(path).name])
  for (const [dirfd, entry] of places) {
    if (tryStatAt(dirfd, entry)?.isDirectory !== true) continue
    const stateFd = openat(dirfd, entry, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
    const found = withFd(stateFd, () => {
      assertOwn(stateFd, `${path}/${entry}`)
      return readCheckpoint(stateFd, `${path}/${entry}`)
    })
    if (found !== undefined) return found.checkpoint
  }
  return undefined
}

/** Whether a rename could lead from a directory beside a target into it. */
function hasPlaceBeside(rootFd: number, parentFd: number): boolean {
  const root = statFd(rootFd)
  return !root.isMountRoot && statFd(parentFd).mountId === root.mountId
}

function openTarget(path: HostPath, { create, isKnown = false }: OpenPlace): number {
  try {
    return openRoot(path)
  } catch (error) {
    if (errnoOf(error) !== 'ENOENT') throw error
    if (isKnown) throw new TargetGoneError(path, 'was synced before and does not exist: it may not be mounted')
    if (!create) throw error
  }
  makeDirectory(AT_FDCWD, path, 0o700)
  return openRoot(path)
}

interface OpenState {
  readonly fd: number
  readonly stageFd: number
  readonly path: HostPath
}

function openBeside(path: HostPath, rootFd: number, parentFd: number): OpenState | undefined {
  const { parent, name } = placeOfState(path)
  if (!hasPlaceBeside(rootFd, parentFd)) return undefined
  let fd: number
  try {
    fd = openOrMake(parentFd, name)
  } catch (error) {
    const code = errnoOf(error)
    if (code === 'EACCES' || code === 'EPERM' || code === 'EROFS') return undefined
    throw error
  }
  const stateAt = `${parent === '/' ? '' : parent}/${name}` as HostPath
  const state = lockState(fd, stateAt, path)
  let isGood = false
  try {
    isGood = canRename(state.stageFd, rootFd)
  } finally {
    // Left open, its lock would keep this very process from trying again.
    if (!isGood) for (const one of [state.stageFd, fd]) close(one)
  }
  return isGood ? state : undefined
}

function openInside(path: HostPath, rootFd: number): OpenState {
  const [found, more] = namesIn(rootFd).filter((name) => STATE_INSIDE.test(name))
  if (more !== undefined) throw new TargetStateDamagedError(`${path}/${more}`, 'there are two of them')
  const name = found ?? (`.lsync-${randomBytes(16).toString('hex')}` as ByteString)
  return lockState(openOrMake(rootFd, name), `${path}/${name}` as HostPath, path)
}

function lockState(fd: number, statePath: HostPath, target: HostPath): OpenState {
  try {
    assertOwn(fd, statePath)
    if (!tryLock(fd, 'exclusive', statePath)) throw new TargetBusyError(target)
    return { fd, stageFd: openOrMake(fd, STAGE), path: statePath }
  } catch (error) {
    close(fd)
    throw error
  }
}

// Nobody else may be able to plant a stage or a checkpoint.
function assertOwn(fd: number, statePath: string): void {
  const stat = statFd(fd)
  if (stat.uid !== process.geteuid?.() || (stat.mode & 0o022) !== 0) {
    throw new TargetStateDamagedError(statePath, 'it does not belong to this user alone')
  }
}

function openOrMake(dirfd: number, name: ByteString): number {
  const isNew = tryStatAt(dirfd, name) === undefined
  if (isNew) {
    makeDirectory(dirfd, name, 0o700)
    fsync(dirfd, name)
  }
  const fd = openat(dirfd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
  try {
    // What is made in the stage must not inherit anything from where it lies.
    if (isNew) for (const acl of [ACL_DEFAULT, ACL_ACCESS]) removeXattr(fd, '', acl)
    return fd
  } catch (error) {
    close(fd)
    throw error
  }
}

function placeOfState(path: HostPath): { parent: HostPath; name: ByteString } {
  const trimmed = path.replace(/\/+$/, '') || '/'
  const slash = trimmed.lastIndexOf('/')
  const parent = (slash < 0 ? '.' : trimmed.slice(0, slash) || '/') as HostPath
  const base = trimmed.slice(slash + 1) || 'root'
  const name = `${BESIDE_PREFIX}${base}`
  if (name.length <= NAME_MAX) return { parent, name: name as ByteString }
  const digest = createHash('sha256').update(base, 'latin1').digest('hex').slice(0, 16)
  return { parent, name: `${name.slice(0, NAME_MAX - 17)}.${digest}` as ByteString }
}

// Subvolumes and quota projects look like one file system, and no rename leads from one to the other.
function canRename(stageFd: number, rootFd: number): boolean {
  const name = `.lsync-${randomBytes(16).toString('hex')}` as ByteString
  close(openNew(stageFd, name))
  const before = statFd(rootFd)
  const code = tryRename(stageFd, name, rootFd, name)
  if (code === undefined) {
    tryUnlink(rootFd, name)
    setTimes(rootFd, '', before.atimeNs, before.mtimeNs)
    return true
  }
  tryUnlink(stageFd, name)
  // A protected or read-only root is no other file system; what is done to it later says so itself.
  return code !== 'EXDEV'
}

function isEmptyRoot(rootFd: number, isInside: boolean): boolean {
  return namesIn(rootFd).every((name) => isInside && STATE_INSIDE.test(name))
}

function namesIn(fd: number): ByteString[] {
  const names: ByteString[] = []
  readDirents(fd, (name) => names.push(name))
  return names
}

/** Removes what an interrupted run was making, and gives the first stage number after those that are there. */
function clearTemporary(stageFd: number): number {
  let next = 0
  for (const name of namesIn(stageFd)) {
    const [, number] = STAGED.exec(name) ?? []
    if (number === undefined) removeTree(stageFd, name)
    else next = Math.max(next, Number(number) + 1)
  }
  return next
}

interface StoredCheckpoint {
  readonly checkpoint: Checkpoint
  readonly nextStage: number
}

function readCheckpoint(stateFd: number, path: string): StoredCheckpoint | undefined {
  if (tryStatAt(stateFd, CHECKPOINT) === undefined) return undefined
  const text = withFd(openat(stateFd, CHECKPOINT, O_RDONLY | O_NOFOLLOW), (fd) =>
    readAt(fd, 0, CHECKPOINT_MAX_BYTES).toString('latin1'),
  )
  const [record = '', sum] = text.split('\n')
  if (sum !== checksum(record)) throw new TargetStateDamagedError(path, 'the checkpoint has another checksum')
  const { version, root, sequence, nextStage } = JSON.parse(record)
  if (version !== 1) throw new TargetStateDamagedError(path, `the checkpoint has version ${version}`)
  return { checkpoint: { root, sequence }, nextStage }
}

function checksum(record: string): string {
  return createHash('sha256').update(record, 'latin1').digest('hex')
}

/** One thing that a target may not be able to hold. `attempt` throws, or gives `false`, where it cannot. */
interface Trial {
  readonly what: TargetLoss['what']
  readonly message: string
  readonly attempt: (dirfd: number, name: ByteString) => boolean
}

const VALUE = Buffer.from('lsync')
// version 2; user::rw-, user 1:r--, group::r--, mask::r--, other::---
const ACL = Buffer.from(
  '0200000001000600ffffffff020004000100000004000400ffffffff10000400ffffffff20000000ffffffff',
  'hex',
)
const TIME_NS = 1_000_000_000_123_456_789n

const TRIALS: readonly Trial[] = [
  {
    what: 'owner',
    message: 'owners are not kept: everything belongs to the user that writes it',
    attempt: (dirfd, name) => {
      setOwner(dirfd, name, 1, 1)
      return statAt(dirfd, name).uid === 1
    },
  },
  {
    what: 'xattr',
    message: 'extended attributes user.* are not kept',
    attempt: (dirfd, name) => holdsXattr(dirfd, name, 'user.lsync', VALUE),
  },
  {
    what: 'trusted-xattr',
    message: 'extended attributes trusted.* and security.* are not kept, the marks of overlayfs among them',
    attempt: (dirfd, name) => holdsXattr(dirfd, name, 'trusted.lsync', VALUE),
  },
  {
    what: 'acl',
    message: 'POSIX ACLs are not kept',
    attempt: (dirfd, name) => holdsXattr(dirfd, name, ACL_ACCESS, ACL),
  },
  {
    what: 'time',
    message: 'modification times are kept less exactly than in ns',
    attempt: (dirfd, name) => {
      setTimes(dirfd, name, TIME_NS, TIME_NS)
      return statAt(dirfd, name).mtimeNs === TIME_NS
    },
  },
  {
    what: 'flags',
    message: 'the flags immutable and append-only (chattr) are not kept',
    attempt: (dirfd, name) =>
      withFd(openat(dirfd, name, O_RDONLY | O_NOFOLLOW), (fd) => {
        setInodeFlags(fd, getInodeFlags(fd) | FS_IMMUTABLE_FL)
        const flags = getInodeFlags(fd)
        setInodeFlags(fd, flags & ~FS_IMMUTABLE_FL)
        return (flags & FS_IMMUTABLE_FL) !== 0
      }),
  },
  {
    what: 'hard-link',
    message: 'hard links become separate files',
    attempt: (dirfd, name) => {
      const other = `${name}.link` as ByteString
      const code = tryLink(dirfd, name, dirfd, other)
      tryUnlink(dirfd, other)
      return code === undefined
    },
  },
  {
    what: 'special',
    message: 'devices, sockets and pipes are left out, whiteouts of overlayfs among them',
    attempt: (dirfd, name) => {
      const other = `${name}.node` as ByteString
      makeNode(dirfd, other, S_IFCHR, 0)
      const isWhiteout = statAt(dirfd, other).isWhiteoutDevice
      tryUnlink(dirfd, other)
      return isWhiteout
    },
  },
  {
    what: 'symlink-meta',
    message: 'the times of symlinks are not kept',
    attempt: (dirfd, name) => {
      const other = `${name}.symlink` as ByteString
      makeSymlink('lsync' as ByteString, dirfd, other)
      try {
        setTimes(dirfd, other, 1_000_000_000_000_000_000n, 1_000_000_000_000_000_000n)
        return statAt(dirfd, other).mtimeNs === 1_000_000_000_000_000_000n
      } finally {
        tryUnlink(dirfd, other)
      }
    },
  },
]

function holdsXattr(dirfd: number, name: ByteString, attribute: string, value: Buffer): boolean {
  setXattr(dirfd, name, attribute as ByteString, value)
  const stored = getXattr(dirfd, name, attribute as ByteString)
  return stored !== undefined
}

// These say that nothing can be written at the moment, not what can be held.
const NO_ANSWER: ReadonlySet<string> = new Set(['ENOSPC', 'EDQUOT', 'EROFS', 'EIO', 'EMFILE', 'ENFILE', 'ENOMEM'])

/** What the file system of the stage cannot hold, found out by trying. */
function findLosses(stageFd: number): readonly TargetLoss[] {
  const name = `t${randomBytes(6).toString('hex')}` as ByteString
  close(openNew(stageFd, name))
  try {
    return TRIALS.filter(({ attempt }) => !succeeds(() => attempt(stageFd, name))).map(({ what, message }) => ({
      what,
      message,
    }))
  } finally {
    tryUnlink(stageFd, name)
  }
}

function succeeds(attempt: () => boolean): boolean {
  try {
    return attempt()
  } catch (error) {
    const code = errnoOf(error)
    if (code === undefined || NO_ANSWER.has(code)) throw error
    return false
  }
}
