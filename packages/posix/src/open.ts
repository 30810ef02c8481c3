import type { ByteString, HostPath } from './bytes.ts'
import { errnoName, PosixError } from './errors.ts'
import { allocate, cString, entering, errno, fail, libcFunction, type Memory } from './native.ts'

const openatNative = libcFunction('openat', 'i', 'ipiu')
const openat2Native = libcFunction('syscall', 'l', 'lipppp')
const closeNative = libcFunction('close', 'i', 'i')
const dupNative = libcFunction('fcntl', 'i', 'iii')
const preadNative = libcFunction('pread', 'l', 'ippl')
const pwriteNative = libcFunction('pwrite', 'l', 'ippl')
const ftruncateNative = libcFunction('ftruncate', 'i', 'il')

export const AT_FDCWD = -100
export const O_RDONLY = 0
export const O_WRONLY = 1
export const O_RDWR = 2
export const O_CREAT = 0o100
export const O_EXCL = 0o200
export const O_TRUNC = 0o1000
export const O_APPEND = 0o2000
export const O_NONBLOCK = 0o4000
// arm64 swaps the values of these three with others; x86-64 and the generic table differ.
const generic = process.arch === 'arm64'
export const O_DIRECTORY = generic ? 0o40000 : 0o200000
export const O_NOFOLLOW = generic ? 0o100000 : 0o400000
export const O_TMPFILE = 0o20000000 | O_DIRECTORY
export const O_NOATIME = 0o1000000
export const O_CLOEXEC = 0o2000000
export const O_PATH = 0o10000000

const SYS_openat2 = 437
const RESOLVE_NO_XDEV = 1
const RESOLVE_NO_MAGICLINKS = 2
const RESOLVE_NO_SYMLINKS = 4
const RESOLVE_BENEATH = 8
const RESOLVE_IN_ROOT = 16

/** Opens a directory that the caller names and vouches for. Everything below it is opened beneath its fd. */
export function openRoot(path: HostPath, flags = O_RDONLY): number {
  return openat(AT_FDCWD, path, flags | O_DIRECTORY)
}

/** openat(2), close-on-exec. With a `name` from content, pass O_NOFOLLOW, or use `openBeneath`. */
export function openat(dirfd: number, name: ByteString, flags: number, mode = 0): number {
  entering('openat', name)
  const fd = openatNative(dirfd, cString(name), flags | O_CLOEXEC, mode)
  return fd < 0 ? fail('openat', name) : fd
}

const how = allocate(24)
// The kernel answers EAGAIN when a rename anywhere races with `..`-free resolution it cannot prove; trying again is
// what openat2(2) asks for.
const RACE_RETRIES = 1000
const STEP_BYTES = 3500

/**
 * Opens what `path` names beneath `dirfd`: no symlink is followed at any component, `..`, absolute paths and other
 * mounts are refused (ELOOP, EXDEV). `''` opens the directory itself again. Paths beyond PATH_MAX are opened in steps.
 * Source: openat2(2).
 */
export function openBeneath(dirfd: number, path: ByteString | '', flags: number, mode = 0): number {
  if (path === '') return openat(dirfd, '.' as ByteString, flags | O_DIRECTORY)
  entering('openat2', path)
  let base = dirfd
  let rest: string = path
  try {
    while (rest.length > STEP_BYTES) {
      const cut = rest.lastIndexOf('/', STEP_BYTES)
      if (cut <= 0) break
      const next = openat2(base, rest.slice(0, cut), O_PATH | O_DIRECTORY, 0, path)
      if (base !== dirfd) close(base)
      base = next
      rest = rest.slice(cut + 1)
    }
    return openat2(base, rest, flags, mode, path)
  } finally {
    if (base !== dirfd) close(base)
  }
}

/**
 * Opens what `path` names for a process whose root is `rootFd`: `..` and symlinks, absolute ones included, stay in that
 * root, other mounts are entered. For paths that another process or namespace wrote down. Source: openat2(2).
 */
export function openInRoot(rootFd: number, path: ByteString, flags: number): number {
  entering('openat2', path)
  return openat2(rootFd, path, flags, 0, path, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
}

const BENEATH = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV

function openat2(
  dirfd: number,
  path: string,
  flags: number,
  mode: number,
  whole: string,
  resolve: number = BENEATH,
): number {
  // All three fit into the lower half of their 64-bit fields, whose upper half stays 0.
  how.buffer.writeUInt32LE((flags | O_CLOEXEC) >>> 0, 0)
  how.buffer.writeUInt32LE(mode, 8)
  how.buffer.writeUInt32LE(resolve, 16)
  for (let attempt = 0; ; attempt++) {
    const fd = openat2Native(SYS_openat2, dirfd, cString(path), how.address, 24, 0)
    if (fd >= 0) return fd
    const name = errnoName(errno())
    if ((name !== 'EAGAIN' && name !== 'EINTR') || attempt >= RACE_RETRIES) {
      throw new PosixError(name, { syscall: 'openat2', path: whole })
    }
  }
}

/** close(2). Errors are ignored: nothing can be done about them, and data is made durable by fsync or syncfs. */
export function close(fd: number): void {
  closeNative(fd)
}

/** A second fd for the same open file, close-on-exec. */
export function duplicate(fd: number): number {
  const F_DUPFD_CLOEXEC = 1030
  const copy = dupNative(fd, F_DUPFD_CLOEXEC, 0)
  return copy < 0 ? fail('fcntl', '') : copy
}

/** Runs `use` with an fd and closes it afterwards, whatever happens. */
export function withFd<T>(fd: number, use: (fd: number) => T): T {
  try {
    return use(fd)
  } finally {
    close(fd)
  }
}

/** The most that `readShared` reads at once. */
export const SHARED_BYTES = 128 * 1024
const transfer = allocate(SHARED_BYTES)

/** pread(2) until `length` bytes or the end of the file. The returned bytes are the caller's. */
export function readAt(fd: number, offset: number, length: number): Buffer {
  const parts: Buffer[] = []
  let done = 0
  while (done < length) {
    const count = preadNative(fd, transfer.address, Math.min(length - done, transfer.buffer.length), offset + done)
    if (count < 0) {
      if (errnoName(errno()) === 'EINTR') continue
      fail('pread', '')
    }
    if (count === 0) break
    parts.push(Buffer.from(transfer.buffer.subarray(0, count)))
    done += count
  }
  return parts.length === 1 ? (parts[0] as Buffer) : Buffer.concat(parts)
}

/**
 * As `readAt`, of at most `SHARED_BYTES`, but without a copy: the bytes are valid until the next read or write of this
 * thread through this module. `writeAt` takes them as they are. For those who read millions of small files: 0.2 GB that
 * are allocated for them keep the garbage collector as busy as the disk.
 */
export function readShared(fd: number, offset: number, length: number): Buffer {
  return transfer.buffer.subarray(0, readInto(fd, offset, transfer, 0, length))
}

/**
 * pread(2) into `memory` at `at`, until `length` bytes or the end of the file: no copy in between. Returns how many
 * bytes there were.
 */
export function readInto(fd: number, offset: number, memory: Memory, at: number, length: number, path = ''): number {
  if (at < 0 || length < 0 || at + length > memory.buffer.length) throw new RangeError('beyond the end of the memory')
  let done = 0
  while (done < length) {
    const count = preadNative(fd, memory.address + at + done, length - done, offset + done)
    if (count < 0) {
      if (errnoName(errno()) === 'EINTR') continue
      fail('pread', path)
    }
    if (count === 0) break
    done += count
  }
  return done
}

/** As `readAt`, for UTF-8. */
export function readTextAt(fd: number, offset: number, length: number): string {
  if (length <= transfer.buffer.length) {
    const count = preadNative(fd, transfer.address, length, offset)
    if (count === length) return transfer.buffer.toString('utf8', 0, length)
  }
  return readAt(fd, offset, length).toString('utf8')
}

/** Writes all of `bytes` at `offset`. */
export function writeAt(fd: number, offset: number, bytes: Uint8Array, path = ''): void {
  entering('pwrite', path)
  const isShared = bytes.buffer === transfer.buffer.buffer
  let done = 0
  while (done < bytes.length) {
    const length = Math.min(bytes.length - done, transfer.buffer.length)
    let from = 0
    if (isShared) from = bytes.byteOffset - transfer.buffer.byteOffset + done
    else transfer.buffer.set(done === 0 && length === bytes.length ? bytes : bytes.subarray(done, done + length))
    const count = pwriteNative(fd, transfer.address + from, length, offset + done)
    if (count < 0) {
      if (errnoName(errno()) === 'EINTR') continue
      fail('pwrite', path)
    }
    done += count
  }
}

/** Writes `length` bytes of `memory` from `at` on at `offset`: no copy in between. */
export function writeFrom(fd: number, offset: number, memory: Memory, at: number, length: number, path = ''): void {
  if (at < 0 || length < 0 || at + length > memory.buffer.length) throw new RangeError('beyond the end of the memory')
  entering('pwrite', path)
  let done = 0
  while (done < length) {
    const count = pwriteNative(fd, memory.address + at + done, length - done, offset + done)
    if (count < 0) {
      if (errnoName(errno()) === 'EINTR') continue
      fail('pwrite', path)
    }
    done += count
  }
}

/** ftruncate(2): sets the size; a larger size makes a hole. */
export function truncate(fd: number, sizeBytes: number, path = ''): void {
  entering('ftruncate', path)
  if (ftruncateNative(fd, sizeBytes) < 0) fail('ftruncate', path)
}
