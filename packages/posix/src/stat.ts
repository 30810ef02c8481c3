import type { ByteString } from './bytes.ts'
import { errnoName, PosixError } from './errors.ts'
import { allocate, cString, errno, libcFunction } from './native.ts'

const statxNative = libcFunction('statx', 'i', 'ipiup')

const AT_SYMLINK_NOFOLLOW = 0x100
const AT_NO_AUTOMOUNT = 0x800
const AT_EMPTY_PATH = 0x1000
const STATX_TYPE = 1
const STATX_SIZE = 0x200
const MASK = 0x7ff | 0x800 | 0x1000 // basic stats, birth time, mount id

export const S_IFMT = 0o170000
export const S_IFSOCK = 0o140000
export const S_IFLNK = 0o120000
export const S_IFREG = 0o100000
export const S_IFBLK = 0o060000
export const S_IFDIR = 0o040000
export const S_IFCHR = 0o020000
export const S_IFIFO = 0o010000

/** An inode number: a number where that is exact, else a bigint. */
export type Ino = number | bigint

/** What statx(2) says of one inode. Sizes in bytes, `blocks` in units of 512, times in ns since 1970 (bigint). */
export class Stat {
  readonly mode: number
  readonly nlink: number
  readonly uid: number
  readonly gid: number
  readonly ino: Ino
  readonly sizeBytes: number
  readonly blocks: number
  /** Major in the upper 32 bits' place: `major * 2^32 + minor`, an opaque but comparable number. */
  readonly dev: number
  /** The device a device node stands for, as mknod(2) takes it. */
  readonly rdev: number
  readonly mountId: number
  readonly isMountRoot: boolean
  /** Immutable or append-only (chattr +i, +a), where the file system tells. */
  readonly isProtected: boolean
  // Plain numbers: most of those who ask for a Stat look at one of its times, if any.
  readonly #atimeS: number
  readonly #atimeNs: number
  readonly #btimeS: number
  readonly #btimeNs: number
  readonly #ctimeS: number
  readonly #ctimeNs: number
  readonly #mtimeS: number
  readonly #mtimeNs: number

  constructor(raw: DataView) {
    this.nlink = raw.getUint32(16, true)
    this.uid = raw.getUint32(20, true)
    this.gid = raw.getUint32(24, true)
    this.mode = raw.getUint16(28, true)
    this.ino = unsigned64(raw, 32)
    this.sizeBytes = Number(unsigned64(raw, 40))
    this.blocks = Number(unsigned64(raw, 48))
    this.#atimeS = secondsAt(raw, 64)
    this.#atimeNs = raw.getUint32(72, true)
    this.#btimeS = secondsAt(raw, 80)
    this.#btimeNs = raw.getUint32(88, true)
    this.#ctimeS = secondsAt(raw, 96)
    this.#ctimeNs = raw.getUint32(104, true)
    this.#mtimeS = secondsAt(raw, 112)
    this.#mtimeNs = raw.getUint32(120, true)
    this.rdev = makeDevice(raw.getUint32(128, true), raw.getUint32(132, true))
    this.dev = raw.getUint32(136, true) * 0x1_0000_0000 + raw.getUint32(140, true)
    this.mountId = Number(unsigned64(raw, 144))
    const attributes = raw.getUint32(8, true)
    this.isMountRoot = (attributes & 0x2000) !== 0
    this.isProtected = (attributes & 0x30) !== 0
  }

  get atimeNs(): bigint {
    return nsOf(this.#atimeS, this.#atimeNs)
  }
  get btimeNs(): bigint {
    return nsOf(this.#btimeS, this.#btimeNs)
  }
  get ctimeNs(): bigint {
    return nsOf(this.#ctimeS, this.#ctimeNs)
  }
  get mtimeNs(): bigint {
    return nsOf(this.#mtimeS, this.#mtimeNs)
  }
  /** `ctimeNs` as whole seconds and the ns of the second, without a bigint. */
  get ctimeParts(): readonly [seconds: number, ns: number] {
    return [this.#ctimeS, this.#ctimeNs]
  }
  get mtimeParts(): readonly [seconds: number, ns: number] {
    return [this.#mtimeS, this.#mtimeNs]
  }
  get type(): number {
    return this.mode & S_IFMT
  }
  get permissions(): number {
    return this.mode & 0o7777
  }
  get isDirectory(): boolean {
    return this.type === S_IFDIR
  }
  get isFile(): boolean {
    return this.type === S_IFREG
  }
  /** A whiteout as the kernel writes it: a character device 0:0. */
  get isWhiteoutDevice(): boolean {
    return this.type === S_IFCHR && this.rdev === 0
  }
}

function secondsAt(raw: DataView, at: number): number {
  return raw.getInt32(at + 4, true) * 0x1_0000_0000 + raw.getUint32(at, true)
}

function nsOf(seconds: number, ns: number): bigint {
  return BigInt(seconds) * 1_000_000_000n + BigInt(ns)
}

/** The number that `mknodat` takes for a device (glibc's makedev). */
export function makeDevice(major: number, minor: number): number {
  if (major < 0x1000 && minor < 0x100000) return (minor & 0xff) + major * 0x100 + (minor >>> 8) * 0x100000
  const high = BigInt(major & ~0xfff) << 32n
  return Number(high) + (minor & 0xff) + (major & 0xfff) * 0x100 + (minor >>> 8) * 0x100000
}

function unsigned64(raw: DataView, at: number): Ino {
  const high = raw.getUint32(at + 4, true)
  return high < 0x20_0000 ? high * 0x1_0000_0000 + raw.getUint32(at, true) : raw.getBigUint64(at, true)
}

const out = allocate(256)
const view = new DataView(out.buffer.buffer, out.buffer.byteOffset, 256)
const words = new Uint32Array(out.buffer.buffer, out.buffer.byteOffset, 64)

/** statx(2) of `name` beneath `dirfd`, not following a symlink. `undefined` when there is nothing of that name. */
export function tryStatAt(dirfd: number, name: ByteString): Stat | undefined {
  if (statxNative(dirfd, cString(name), AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, MASK, out.address) < 0) {
    const code = errnoName(errno())
    if (code === 'ENOENT') return undefined
    throw new PosixError(code, { syscall: 'statx', path: name })
  }
  return new Stat(view)
}

/**
 * As `tryStatAt`, but the kernel's `struct statx` itself, as 32-bit words, which the next stat of this thread overwrites:
 * for those that stat millions of names and look at a few fields. `STATX_WORD` says where they are. `''` with an fd of
 * its own is not served: use `statFd`.
 */
export function tryRawStatAt(dirfd: number, name: ByteString): Uint32Array | undefined {
  if (statxNative(dirfd, cString(name), AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, MASK, out.address) < 0) {
    const code = errnoName(errno())
    if (code === 'ENOENT') return undefined
    throw new PosixError(code, { syscall: 'statx', path: name })
  }
  return words
}

/** As `tryRawStatAt`, of an open file. */
export function rawStatFd(fd: number): Uint32Array {
  if (statxNative(fd, cString(''), AT_EMPTY_PATH, MASK, out.address) < 0) {
    throw new PosixError(errnoName(errno()), { syscall: 'statx', path: '' })
  }
  return words
}

/** Where the fields of `struct statx` begin, in 32-bit words (little-endian). Source: linux/stat.h. */
export const STATX_WORD = {
  /** STATX_ATTR_*: 0x10 immutable, 0x20 append-only, 0x2000 mount root. */
  attributes: 2,
  nlink: 4,
  uid: 5,
  gid: 6,
  /** In the lower half. */
  mode: 7,
  ino: 8,
  size: 10,
  blocks: 12,
  birth: 20,
  change: 24,
  modification: 28,
  rdevMajor: 32,
  rdevMinor: 33,
} as const

/**
 * Only the type of `name` (S_IF*), cheaper than a whole `Stat` where a directory has thousands of names; for character
 * devices tell apart the whiteout with `tryStatAt`. `undefined` when there is nothing of that name.
 */
export function tryTypeAt(dirfd: number, name: ByteString): number | undefined {
  if (statxNative(dirfd, cString(name), AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, STATX_TYPE, out.address) < 0) {
    const code = errnoName(errno())
    if (code === 'ENOENT') return undefined
    throw new PosixError(code, { syscall: 'statx', path: name })
  }
  return view.getUint16(28, true) & S_IFMT
}

/** Only the size in bytes of `name`, cheaper than a whole `Stat`. */
export function sizeAt(dirfd: number, name: ByteString): number {
  if (statxNative(dirfd, cString(name), AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT, STATX_SIZE, out.address) < 0) {
    throw new PosixError(errnoName(errno()), { syscall: 'statx', path: name })
  }
  return Number(unsigned64(view, 40))
}

/** As `tryStatAt`, but absence is a failure. */
export function statAt(dirfd: number, name: ByteString): Stat {
  const stat = tryStatAt(dirfd, name)
  if (stat === undefined) throw new PosixError('ENOENT', { syscall: 'statx', path: name })
  return stat
}

/** statx(2) of an open file. */
export function statFd(fd: number): Stat {
  if (statxNative(fd, cString(''), AT_EMPTY_PATH, MASK, out.address) < 0) {
    throw new PosixError(errnoName(errno()), { syscall: 'statx', path: '' })
  }
  return new Stat(view)
}
