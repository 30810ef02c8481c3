import {
  AT_FDCWD,
  type ByteString,
  FS_APPEND_FL,
  FS_IMMUTABLE_FL,
  getInodeFlags,
  type HostPath,
  link,
  makeDevice,
  makeDirectory,
  makeNode,
  makeSymlink,
  O_APPEND,
  O_CREAT,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  O_RDWR,
  O_TRUNC,
  O_WRONLY,
  openat,
  openBeneath,
  openRoot,
  PosixError,
  RENAME_EXCHANGE,
  readDirents,
  removeDirectory,
  removeXattr,
  rename,
  S_IFBLK,
  S_IFCHR,
  S_IFIFO,
  S_IFSOCK,
  type Stat,
  setInodeFlags,
  setModeAt,
  setOwner,
  setTimes,
  setXattr,
  statFd,
  truncate,
  tryRename,
  tryStatAt,
  unlink,
  withFd,
  writeAt,
} from '@lsync/posix'
import fc from 'fast-check'
import { removeBeneath, removeTree } from './build.ts'
import { copyBeneath } from './copy.ts'
import { type OverlayOptions, type Stack, withOverlay } from './overlay.ts'
import { mapAndFill } from './system.ts'

/**
 * Where an operation happens: a path (bytes), or a number that picks one of the names that are there and suit the
 * operation, so that most operations find something to do.
 */
export type Place = string | number

/** One thing a user does to a tree. What cannot be done in the state it meets does nothing. */
export type Operation =
  | { do: 'write'; path: Place; content: string; repeat?: number }
  | { do: 'append'; path: Place; content: string }
  | { do: 'truncate'; path: Place; sizeBytes: number }
  | { do: 'map'; path: Place; offset: number; length: number }
  | { do: 'punch'; path: Place; sizeBytes: number; offset: number }
  | { do: 'mkdir'; path: Place; mode: number }
  | { do: 'remake'; path: Place }
  | { do: 'unlink'; path: Place }
  | { do: 'rmdir'; path: Place }
  | { do: 'remove'; path: Place }
  | { do: 'link'; path: Place; to: Place }
  | { do: 'rename'; path: Place; to: Place }
  | { do: 'exchange'; path: Place; to: Place }
  | { do: 'symlink'; path: Place; target: string }
  | { do: 'mknod'; path: Place; type: 'fifo' | 'socket' | 'character' | 'block'; major: number; minor: number }
  | { do: 'chmod'; path: Place; mode: number }
  | { do: 'chown'; path: Place; uid: number; gid: number }
  | { do: 'setxattr'; path: Place; name: string; value: string }
  | { do: 'removexattr'; path: Place; name: string }
  | { do: 'setfacl'; path: Place; which: 'access' | 'default'; uid: number; permissions: number }
  | { do: 'setcap'; path: Place; capabilities: number }
  | { do: 'utimes'; path: Place; mtimeNs: bigint }
  | { do: 'chattr'; path: Place; flag: 'i' | 'a'; on: boolean }

const directoryNames = ['a', 'b', 'c']
// Mostly files, so that paths through directories stay free; the overlap makes files of directories and back.
const leafNames = ['a', 'b', 'f', 'g', 'h', 'i']
// Each of these has broken some tool: newline, not UTF-8, backslash, the longest name, a name that AUFS would take for
// a whiteout, text in UTF-8 bytes.
export const hostileNames = ['x\ny', '\xff\xfe', 'c\\d', 'n'.repeat(255), '.wh.a', '\xc3\xa9 \xe2\x82\xac']

const anyHostile = { weight: 1, arbitrary: fc.constantFrom(...hostileNames) }
const anyParent = fc.oneof({ weight: 14, arbitrary: fc.constantFrom(...directoryNames) }, anyHostile)
const anyLeaf = fc.oneof({ weight: 10, arbitrary: fc.constantFrom(...leafNames) }, anyHostile)
const anyPath = fc
  .oneof(
    { weight: 4, arbitrary: fc.tuple(anyLeaf) },
    { weight: 5, arbitrary: fc.tuple(anyParent, anyLeaf) },
    { weight: 3, arbitrary: fc.tuple(anyParent, anyParent, anyLeaf) },
    { weight: 1, arbitrary: fc.tuple(anyParent, anyParent, anyParent, anyLeaf) },
  )
  .map((names) => names.join('/'))
const anyPick = fc.nat({ max: 99 })
const anyExisting: fc.Arbitrary<Place> = fc.oneof({ weight: 6, arbitrary: anyPick }, { weight: 1, arbitrary: anyPath })
const anyExistingOrRoot: fc.Arbitrary<Place> = fc.oneof(
  { weight: 9, arbitrary: anyExisting },
  { weight: 1, arbitrary: fc.constant('') },
)
/** Where something new goes: mostly a free name, sometimes onto what is there. */
const anyTarget: fc.Arbitrary<Place> = fc.oneof({ weight: 3, arbitrary: anyPath }, { weight: 1, arbitrary: anyPick })
const anyContent = fc.constantFrom('', 'one', 'two', 'three\n', '\x00\xff')
const anyMode = fc.constantFrom(0o644, 0o600, 0o755, 0o700, 0o4755, 0o2755, 0o6711, 0o1777, 0o000, 0o2644)
const anyId = fc.constantFrom(0, 1, 1000, 100_000)
const anyAttribute = fc.constantFrom(
  'user.a',
  'user.b',
  'trusted.a',
  'security.lsync',
  'trusted.overlay.opaque',
  'trusted.overlay.custom',
  'trusted.overlay.overlay.redirect',
  'user.overlay.opaque',
  'user.overlay.whiteout',
  'trusted.overlayfoo',
)
const anyValue = fc.constantFrom('', 'y', 'x', 'text', '\x00\x01', 'v'.repeat(300))
const anyTime = fc.constantFrom(
  0n,
  1n,
  1_000_000_000_123_456_789n,
  1_700_000_000_000_000_001n,
  3_000_000_000_000_000_000n,
)

type Weighted = { weight: number; arbitrary: fc.Arbitrary<Operation> }
function weighted<T extends Operation>(weight: number, name: T['do'], fields: Fields<T>): Weighted {
  return { weight, arbitrary: fc.record({ do: fc.constant(name), ...fields }) as unknown as fc.Arbitrary<Operation> }
}
type Fields<T extends Operation> = { [K in keyof Omit<T, 'do'>]: fc.Arbitrary<T[K] | undefined> }
type Op<K extends Operation['do']> = Extract<Operation, { do: K }>

const fillings: Weighted[] = [
  weighted<Op<'write'>>(12, 'write', {
    path: anyTarget,
    content: anyContent,
    repeat: fc.oneof({ weight: 8, arbitrary: fc.constant(1) }, { weight: 1, arbitrary: fc.constantFrom(2000, 30_000) }),
  }),
  weighted<Op<'mkdir'>>(4, 'mkdir', { path: anyPath, mode: anyMode }),
  weighted<Op<'link'>>(6, 'link', { path: anyExisting, to: anyTarget }),
]

const anyOperation: fc.Arbitrary<Operation> = fc.oneof(
  ...fillings,
  weighted<Op<'append'>>(3, 'append', { path: anyExisting, content: anyContent }),
  weighted<Op<'truncate'>>(3, 'truncate', { path: anyExisting, sizeBytes: fc.constantFrom(0, 2, 4096, 200_000) }),
  weighted<Op<'map'>>(2, 'map', { path: anyExisting, offset: fc.constantFrom(0, 1), length: fc.constantFrom(1, 2) }),
  weighted<Op<'punch'>>(2, 'punch', {
    path: anyExisting,
    sizeBytes: fc.constantFrom(300_000, 1_500_000),
    offset: fc.constantFrom(0, 131_072, 262_144),
  }),
  weighted<Op<'remake'>>(2, 'remake', { path: anyExisting }),
  weighted<Op<'unlink'>>(6, 'unlink', { path: anyExisting }),
  weighted<Op<'rmdir'>>(1, 'rmdir', { path: anyExisting }),
  weighted<Op<'remove'>>(1, 'remove', { path: anyExisting }),
  weighted<Op<'rename'>>(10, 'rename', { path: anyExisting, to: anyTarget }),
  weighted<Op<'exchange'>>(4, 'exchange', { path: anyExisting, to: anyExisting }),
  weighted<Op<'symlink'>>(4, 'symlink', {
    path: anyTarget,
    target: fc.constantFrom('a', '../b', '/nowhere/at/all', 'x\ny', '\xff'),
  }),
  weighted<Op<'mknod'>>(2, 'mknod', {
    path: anyPath,
    type: fc.constantFrom('fifo', 'socket', 'character', 'block'),
    major: fc.constantFrom(1, 4000),
    minor: fc.constantFrom(3, 300, 1_048_575),
  }),
  weighted<Op<'chmod'>>(5, 'chmod', { path: anyExistingOrRoot, mode: anyMode }),
  weighted<Op<'chown'>>(3, 'chown', { path: anyExistingOrRoot, uid: anyId, gid: anyId }),
  weighted<Op<'setxattr'>>(5, 'setxattr', { path: anyExistingOrRoot, name: anyAttribute, value: anyValue }),
  weighted<Op<'removexattr'>>(2, 'removexattr', { path: anyExistingOrRoot, name: anyAttribute }),
  weighted<Op<'setfacl'>>(3, 'setfacl', {
    path: anyExistingOrRoot,
    which: fc.constantFrom('access', 'default'),
    uid: fc.constantFrom(9, 1000),
    permissions: fc.constantFrom(0, 5, 7),
  }),
  weighted<Op<'setcap'>>(2, 'setcap', { path: anyExisting, capabilities: fc.constantFrom(0x2000, 0x400) }),
  weighted<Op<'utimes'>>(4, 'utimes', { path: anyExistingOrRoot, mtimeNs: anyTime }),
  weighted<Op<'chattr'>>(1, 'chattr', { path: anyExisting, flag: fc.constantFrom('i', 'a'), on: fc.boolean() }),
)

/** Without fast-check's bias to small values, which would leave little to merge; shrinking finds the small cases. */
export function anyOperations(minLength: number, maxLength: number): fc.Arbitrary<Operation[]> {
  return fc.noBias(fc.array(anyOperation, { minLength, maxLength, size: 'max' }))
}

/** A history: how the bottom was filled, then what was done in each session on top of it. */
export interface History {
  readonly bottom: readonly Operation[]
  readonly sessions: readonly (readonly Operation[])[]
}

const anyFilling = fc.noBias(fc.array(fc.oneof(...fillings), { minLength: 4, maxLength: 30, size: 'max' }))

/** A history that grows a stack with this many lowers: one session for each further lower, and the last for the upper. */
export function anyHistory(lowers: number): fc.Arbitrary<History> {
  return fc.record({
    bottom: fc.tuple(anyFilling, anyOperations(0, 20)).map(([filling, changes]) => [...filling, ...changes]),
    sessions: fc.array(anyOperations(1, 25), { minLength: lowers, maxLength: lowers }),
  })
}

/** Layers on disk, ready to be mounted, all beneath one directory. */
export interface GrownStack extends Stack {
  readonly upper: string
  readonly work: string
  /** What was really done, the bottom first. */
  readonly done: readonly (readonly Operation[])[]
}

/** Lives through a history in `directory`: `l1` is the bottom, each session is a mount of its own, `u` is the upper. */
export function growStack(directory: string, history: History, options: OverlayOptions): GrownStack {
  const bottom = `${directory}/l1`
  makeDirectory(AT_FDCWD, bottom as ByteString, 0o755)
  const done = [applyOperations(bottom, history.bottom, options.namespace)]
  let lowers = [bottom]
  for (const [index, operations] of history.sessions.entries()) {
    const isLast = index === history.sessions.length - 1
    const upper = `${directory}/${isLast ? 'u' : `l${index + 2}`}`
    const work = `${upper}.work`
    makeDirectory(AT_FDCWD, upper as ByteString, 0o755)
    done.push(withOverlay({ lowers, upper, work }, options, (merged) => applyOperations(merged, operations)))
    if (isLast) return { lowers, upper, work, done }
    // Its index and workdir belong to the mount in which it was the upper.
    removeTree(work)
    lowers = [upper, ...lowers]
  }
  throw new Error('a history has at least one session')
}

/**
 * Does the operations in a tree, as root. `bareNamespace` says that the tree is a layer itself and not a mount: then
 * attributes that would be marks of that namespace are left alone, since no user could have set them. Returns what was
 * really done, with the picked paths, for a reader of a failure.
 */
export function applyOperations(
  root: string,
  operations: readonly Operation[],
  bareNamespace?: 'trusted' | 'user',
): Operation[] {
  const done: Operation[] = []
  withFd(openRoot(root as HostPath), (fd) => {
    for (const operation of operations) {
      if (operation.do === 'setxattr' && operation.name.startsWith(`${bareNamespace}.overlay.`)) continue
      const placed = place(fd, operation)
      if (placed === undefined) continue
      try {
        apply(fd, placed)
        done.push(placed)
      } catch (cause) {
        if (!(cause instanceof PosixError)) throw cause
      }
    }
  })
  return done
}

type Placed = Operation & { path: string; to?: string }

/** Replaces picks by the paths they stand for; `undefined` when there is nothing to pick. */
function place(root: number, operation: Operation): Placed | undefined {
  const suits = SUITABLE[operation.do] ?? (() => true)
  const pick = (at: Place, wanted: (stat: Stat) => boolean): string | undefined => {
    if (typeof at === 'string') return at
    const paths: string[] = []
    collect(root, '', wanted, paths)
    return paths.length === 0 ? undefined : paths[at % paths.length]
  }
  const path = pick(operation.path, suits)
  if (path === undefined) return undefined
  if (!('to' in operation)) return { ...operation, path } as Placed
  const to = pick(operation.to, () => true)
  return to === undefined ? undefined : ({ ...operation, path, to } as Placed)
}

const isFile = (stat: Stat) => stat.isFile
const SUITABLE: Partial<Record<Operation['do'], (stat: Stat) => boolean>> = {
  write: isFile,
  append: isFile,
  truncate: isFile,
  map: isFile,
  punch: isFile,
  setcap: isFile,
  unlink: (stat) => !stat.isDirectory,
  link: (stat) => !stat.isDirectory,
  rmdir: (stat) => stat.isDirectory,
  remake: (stat) => stat.isDirectory,
}

function collect(fd: number, path: string, wanted: (stat: Stat) => boolean, paths: string[]): void {
  const names: ByteString[] = []
  readDirents(fd, (name) => names.push(name))
  for (const name of names.sort()) {
    const stat = tryStatAt(fd, name)
    if (stat === undefined) continue
    const childPath = path === '' ? name : `${path}/${name}`
    if (wanted(stat)) paths.push(childPath)
    if (!stat.isDirectory) continue
    withFd(openat(fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (child) => collect(child, childPath, wanted, paths))
  }
}

function apply(root: number, operation: Placed): void {
  // Symlinks are never followed here, so that no operation leaves the tree.
  const at = operation.path.lastIndexOf('/')
  const parentPath = operation.path.slice(0, Math.max(0, at)) as ByteString
  const name = (operation.path === '' ? '.' : operation.path.slice(at + 1)) as ByteString
  if (CREATES.has(operation.do)) makeParents(root, parentPath)
  withFd(openBeneath(root, parentPath, O_RDONLY | O_DIRECTORY), (parent) => {
    if (operation.do !== 'link' && operation.do !== 'rename' && operation.do !== 'exchange') {
      applyOne(operation, parent, name)
      return
    }
    const to = operation.to as string
    const slash = to.lastIndexOf('/')
    const toParent = to.slice(0, Math.max(0, slash)) as ByteString
    if (operation.do !== 'exchange') makeParents(root, toParent)
    withFd(openBeneath(root, toParent, O_RDONLY | O_DIRECTORY), (toDir) =>
      applyTwo(operation.do, parent, name, toDir, to.slice(slash + 1) as ByteString),
    )
  })
}

const CREATES: ReadonlySet<string> = new Set(['write', 'mkdir', 'symlink', 'mknod'])

function makeParents(root: number, path: string): void {
  if (path === '') return
  const parts = path.split('/')
  for (let depth = 1; depth <= parts.length; depth++) {
    const parent = parts.slice(0, depth - 1).join('/') as ByteString
    withFd(openBeneath(root, parent, O_RDONLY | O_DIRECTORY), (fd) => {
      const name = parts[depth - 1] as ByteString
      if (tryStatAt(fd, name) === undefined) makeDirectory(fd, name, 0o755)
    })
  }
}

function applyTwo(
  what: 'link' | 'rename' | 'exchange',
  from: number,
  name: ByteString,
  toDir: number,
  to: ByteString,
): void {
  if (what === 'link') link(from, name, toDir, to)
  else if (what === 'exchange') rename(from, name, toDir, to, RENAME_EXCHANGE)
  else {
    const code = tryRename(from, name, toDir, to)
    if (code !== 'EXDEV') return
    // A directory that a lower layer provides, without redirect_dir: mv copies it and removes the original.
    if (tryStatAt(toDir, to) !== undefined) return
    copyBeneath(from, name, toDir, to)
    removeBeneath(from, name)
  }
}

function applyOne(operation: Operation, parent: number, name: ByteString): void {
  switch (operation.do) {
    case 'write':
      withFile(parent, name, O_WRONLY | O_CREAT | O_TRUNC, (fd) =>
        writeAt(fd, 0, Buffer.from(operation.content.repeat(operation.repeat ?? 1), 'latin1')),
      )
      break
    case 'append':
      withFile(parent, name, O_WRONLY | O_APPEND, (fd) => writeAt(fd, 0, Buffer.from(operation.content, 'latin1')))
      break
    case 'truncate':
      withFile(parent, name, O_WRONLY, (fd) => truncate(fd, operation.sizeBytes))
      break
    case 'map':
      withFile(parent, name, O_RDWR, (fd) => {
        if (statFd(fd).sizeBytes >= operation.offset + operation.length) {
          mapAndFill(fd, operation.offset, operation.length, 0x6d)
        }
      })
      break
    case 'punch':
      withFile(parent, name, O_WRONLY, (fd) => {
        truncate(fd, operation.sizeBytes)
        writeAt(fd, operation.offset, Buffer.from('data between holes'))
      })
      break
    case 'mkdir':
      makeDirectory(parent, name, operation.mode)
      setModeAt(parent, name, operation.mode)
      break
    case 'remake':
      removeBeneath(parent, name)
      makeDirectory(parent, name, 0o755)
      break
    case 'unlink':
      unlink(parent, name)
      break
    case 'rmdir':
      removeDirectory(parent, name)
      break
    case 'remove':
      if (name !== '.') removeBeneath(parent, name)
      break
    case 'symlink':
      if (tryStatAt(parent, name)?.isDirectory) removeBeneath(parent, name)
      else unlink(parent, name)
      makeSymlink(operation.target as ByteString, parent, name)
      break
    case 'mknod':
      {
        const type = { fifo: S_IFIFO, socket: S_IFSOCK, character: S_IFCHR, block: S_IFBLK }[operation.type]
        const isDevice = operation.type === 'character' || operation.type === 'block'
        makeNode(parent, name, type | 0o640, isDevice ? makeDevice(operation.major, operation.minor) : 0)
      }
      break
    case 'chmod':
      setModeAt(parent, name, operation.mode)
      break
    case 'chown':
      setOwner(parent, name, operation.uid, operation.gid)
      break
    case 'setxattr':
      setXattr(parent, name, operation.name as ByteString, Buffer.from(operation.value, 'latin1'))
      break
    case 'removexattr':
      removeXattr(parent, name, operation.name as ByteString)
      break
    case 'setfacl':
      setXattr(
        parent,
        name,
        `system.posix_acl_${operation.which}` as ByteString,
        aclOf(operation.uid, operation.permissions),
      )
      break
    case 'setcap':
      setXattr(parent, name, 'security.capability' as ByteString, capabilityOf(operation.capabilities))
      break
    case 'utimes':
      setTimes(parent, name, operation.mtimeNs, operation.mtimeNs)
      break
    case 'chattr':
      {
        const stat = tryStatAt(parent, name)
        if (!stat?.isFile && !stat?.isDirectory) return
        const bit = operation.flag === 'i' ? FS_IMMUTABLE_FL : FS_APPEND_FL
        withFd(openat(parent, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK), (fd) => {
          const flags = getInodeFlags(fd)
          setInodeFlags(fd, operation.on ? flags | bit : flags & ~bit)
        })
      }
      break
    default:
      throw new Error(`no such operation: ${operation.do}`)
  }
}

function withFile(parent: number, name: ByteString, flags: number, use: (fd: number) => void): void {
  const stat = tryStatAt(parent, name)
  // Devices and fifos are not opened: that would act on the machine, or wait for ever.
  if (stat === undefined ? (flags & O_CREAT) === 0 : !stat.isFile) return
  withFd(openat(parent, name, flags | O_NOFOLLOW | O_NONBLOCK, 0o644), use)
}

/** A POSIX ACL as `system.posix_acl_*` holds it: one named user beside the three classes. Source: linux/posix_acl_xattr.h. */
export function aclOf(uid: number, permissions: number): Buffer {
  const NO_ID = 0xffff_ffff
  const entries = [
    [0x01, 7, NO_ID],
    [0x02, permissions, uid],
    [0x04, 5, NO_ID],
    [0x10, 7, NO_ID],
    [0x20, 1, NO_ID],
  ] as const
  const bytes = Buffer.alloc(4 + entries.length * 8)
  bytes.writeUInt32LE(2, 0)
  for (const [index, [tag, allowed, id]] of entries.entries()) {
    bytes.writeUInt16LE(tag, 4 + index * 8)
    bytes.writeUInt16LE(allowed, 6 + index * 8)
    bytes.writeUInt32LE(id, 8 + index * 8)
  }
  return bytes
}

/** `security.capability`, version 2, effective, with these permitted bits. Source: linux/capability.h. */
export function capabilityOf(permitted: number): Buffer {
  const bytes = Buffer.alloc(20)
  bytes.writeUInt32LE(0x0200_0001, 0)
  bytes.writeUInt32LE(permitted, 4)
  return bytes
}
