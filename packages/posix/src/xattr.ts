import type { ByteString } from './bytes.ts'
import { errnoName, PosixError } from './errors.ts'
import { allocate, cString, entering, errno, libcFunction } from './native.ts'

const setNative = libcFunction('syscall', 'l', 'lipuppp')
const getNative = libcFunction('syscall', 'l', 'lipuppp')
const listNative = libcFunction('syscall', 'l', 'lipupp')
const removeNative = libcFunction('syscall', 'l', 'lipup')
const lsetNative = libcFunction('lsetxattr', 'i', 'ppppi')
const lgetNative = libcFunction('lgetxattr', 'l', 'pppp')
const llistNative = libcFunction('llistxattr', 'l', 'ppp')
const lremoveNative = libcFunction('lremovexattr', 'i', 'pp')

const SYS_setxattrat = 463
const SYS_getxattrat = 464
const SYS_listxattrat = 465
const SYS_removexattrat = 466
const AT_SYMLINK_NOFOLLOW = 0x100
const AT_EMPTY_PATH = 0x1000
const VALUE_BYTES = 64 * 1024
// The kernel takes and clears as much memory as it is offered for a list or a value, whatever is in it: 3 µs for 64 KB.
const FIRST_BYTES = 512

const value = allocate(VALUE_BYTES)
const args = allocate(16)
// Linux 6.13 brought calls relative to a directory fd; before, /proc/self/fd/N/name does the same without races.
let hasAtCalls: boolean | undefined

function atCalls(): boolean {
  if (hasAtCalls === undefined) {
    listNative(SYS_listxattrat, -1, cString('x'), 0, 0, 0)
    hasAtCalls = errnoName(errno()) !== 'ENOSYS'
  }
  return hasAtCalls
}

/** Makes the next calls of this thread use (or not use) the calls of Linux 6.13; for tests of the older way. */
export function useXattrAtCalls(use: boolean | undefined): void {
  hasAtCalls = use
}

function procPath(dirfd: number, name: string): string {
  return name === '' ? `/proc/self/fd/${dirfd}` : `/proc/self/fd/${dirfd}/${name}`
}

// `/proc/self/fd/N` itself is a magic link, so only the form without a name must be followed.
const getFollow = libcFunction('getxattr', 'l', 'pppp')
const setFollow = libcFunction('setxattr', 'i', 'ppppi')
const listFollow = libcFunction('listxattr', 'l', 'ppp')
const removeFollow = libcFunction('removexattr', 'i', 'pp')

const NOT_TRIED = -2

/** Whether /proc/self/fd has to do it: on older kernels, and for an O_PATH fd, which the newer calls refuse (EBADF). */
function needsProc(result: number, name: string): boolean {
  return result === NOT_TRIED || (result < 0 && name === '' && errnoName(errno()) === 'EBADF')
}

function atFlags(name: string): number {
  return name === '' ? AT_EMPTY_PATH : AT_SYMLINK_NOFOLLOW
}

/**
 * The names of the extended attributes of `name` beneath `dirfd` (of the fd itself for `''`), in the file system's
 * order; symlinks are not followed. Empty where the file system has none. Without CAP_SYS_ADMIN in the initial user
 * namespace the kernel leaves `trusted.*` out without saying so.
 */
export function listXattrs(dirfd: number, name: ByteString | ''): ByteString[] {
  return listWithin(dirfd, name, FIRST_BYTES)
}

function listWithin(dirfd: number, name: ByteString | '', mostBytes: number): ByteString[] {
  let length = NOT_TRIED
  if (atCalls()) length = listNative(SYS_listxattrat, dirfd, cString(name), atFlags(name), value.address, mostBytes)
  if (needsProc(length, name)) {
    length = (name === '' ? listFollow : llistNative)(cString(procPath(dirfd, name)), value.address, mostBytes)
  }
  if (length < 0) {
    const code = errnoName(errno())
    if (code === 'ENOTSUP') return []
    if (code === 'ERANGE' && mostBytes < VALUE_BYTES) return listWithin(dirfd, name, VALUE_BYTES)
    throw new PosixError(code, { syscall: 'listxattr', path: name })
  }
  if (length === 0) return []
  return value.buffer.toString('latin1', 0, length - 1).split('\0') as ByteString[]
}

/** The value of one attribute. An absent attribute is an answer (`undefined`), not a failure. */
export function getXattr(dirfd: number, name: ByteString | '', attribute: ByteString): Buffer | undefined {
  return getWithin(dirfd, name, attribute, FIRST_BYTES)
}

function getWithin(dirfd: number, name: ByteString | '', attribute: ByteString, mostBytes: number): Buffer | undefined {
  const key = cString(attribute, 1)
  let length = NOT_TRIED
  if (atCalls()) {
    writeArgs(value.address, mostBytes, 0)
    length = getNative(SYS_getxattrat, dirfd, cString(name), atFlags(name), key, args.address, 16)
  }
  if (needsProc(length, name)) {
    length = (name === '' ? getFollow : lgetNative)(cString(procPath(dirfd, name)), key, value.address, mostBytes)
  }
  if (length < 0) {
    const code = errnoName(errno())
    if (code === 'ERANGE' && mostBytes < VALUE_BYTES) return getWithin(dirfd, name, attribute, VALUE_BYTES)
    if (code === 'ENODATA' || code === 'ENOTSUP') return undefined
    throw new PosixError(code, { syscall: 'getxattr', path: name })
  }
  return Buffer.from(value.buffer.subarray(0, length))
}

/** Sets one attribute, creating or replacing it. */
export function setXattr(dirfd: number, name: ByteString | '', attribute: ByteString, bytes: Uint8Array): void {
  entering('setxattr', name)
  if (bytes.length > VALUE_BYTES) throw new PosixError('E2BIG', { syscall: `setxattr ${attribute}`, path: name })
  // Small arrays live on the heap, where a collection may move them between here and the call.
  value.buffer.set(bytes)
  const { address } = value
  const key = cString(attribute, 1)
  let result = NOT_TRIED
  if (atCalls()) {
    writeArgs(address, bytes.length, 0)
    result = setNative(SYS_setxattrat, dirfd, cString(name), atFlags(name), key, args.address, 16)
  }
  if (needsProc(result, name)) {
    result = (name === '' ? setFollow : lsetNative)(cString(procPath(dirfd, name)), key, address, bytes.length, 0)
  }
  if (result < 0) throw new PosixError(errnoName(errno()), { syscall: `setxattr ${attribute}`, path: name })
}

/** Removes one attribute. Its absence is fine. */
export function removeXattr(dirfd: number, name: ByteString | '', attribute: ByteString): void {
  entering('removexattr', name)
  const key = cString(attribute, 1)
  let result = NOT_TRIED
  if (atCalls()) result = removeNative(SYS_removexattrat, dirfd, cString(name), atFlags(name), key)
  if (needsProc(result, name)) {
    result = (name === '' ? removeFollow : lremoveNative)(cString(procPath(dirfd, name)), key)
  }
  if (result >= 0) return
  const code = errnoName(errno())
  if (code !== 'ENODATA' && code !== 'ENOTSUP') {
    throw new PosixError(code, { syscall: `removexattr ${attribute}`, path: name })
  }
}

function writeArgs(address: number, sizeBytes: number, flags: number): void {
  args.buffer.writeBigUInt64LE(BigInt(address), 0)
  args.buffer.writeUInt32LE(sizeBytes, 8)
  args.buffer.writeUInt32LE(flags, 12)
}
