import type { ByteString } from './bytes.ts'
import { errnoName, PosixError } from './errors.ts'
import { allocate, cString, entering, errno, libcFunction } from './native.ts'
import { O_CLOEXEC } from './open.ts'

const nameToHandleNative = libcFunction('name_to_handle_at', 'i', 'ipppi')
const openByHandleNative = libcFunction('open_by_handle_at', 'i', 'ipi')

const AT_EMPTY_PATH = 0x1000
const MAX_HANDLE_BYTES = 128

/** What names an inode of one file system for good: it survives renames and reboots, and goes stale with the inode. */
export interface FileHandle {
  /** The file system's own number for the form of `bytes`. */
  readonly type: number
  readonly bytes: Buffer
}

const raw = allocate(8 + MAX_HANDLE_BYTES)
const mountIdOut = allocate(4)

/**
 * The handle of `name` beneath `dirfd` (of the fd itself for `''`), not following a symlink. `undefined` where the file
 * system has no handles. Source: name_to_handle_at(2).
 */
export function handleAt(dirfd: number, name: ByteString | ''): FileHandle | undefined {
  return mountedHandleAt(dirfd, name)?.handle
}

/** As `handleAt`, with the id of the mount that the name was reached through (the numbers of mountinfo). */
export function mountedHandleAt(
  dirfd: number,
  name: ByteString | '',
): { readonly handle: FileHandle; readonly mountId: number } | undefined {
  raw.buffer.writeUInt32LE(MAX_HANDLE_BYTES, 0)
  const flags = name === '' ? AT_EMPTY_PATH : 0
  if (nameToHandleNative(dirfd, cString(name), raw.address, mountIdOut.address, flags) < 0) {
    const code = errnoName(errno())
    if (code === 'ENOTSUP') return undefined
    throw new PosixError(code, { syscall: 'name_to_handle_at', path: name })
  }
  return { handle: readHandle(raw.buffer, 0), mountId: mountIdOut.buffer.readInt32LE(0) }
}

/** Reads a `struct file_handle` (length, type, bytes) at an offset. The bytes are the caller's. */
export function readHandle(buffer: Buffer, at: number): FileHandle {
  const length = buffer.readUInt32LE(at)
  return { type: buffer.readInt32LE(at + 4), bytes: Buffer.from(buffer.subarray(at + 8, at + 8 + length)) }
}

/** A handle as a Map key; equal for equal handles of one file system. */
export function handleKey(handle: FileHandle): string {
  return `${handle.type}:${handle.bytes.toString('latin1')}`
}

/**
 * Opens the inode that a handle names. `mountFd` is any open file of that file system (not O_PATH); what is opened is
 * seen through its mount. `undefined` when the inode is gone. Needs CAP_DAC_READ_SEARCH. Source: open_by_handle_at(2).
 */
export function openByHandle(mountFd: number, handle: FileHandle, flags: number): number | undefined {
  entering('open_by_handle_at', '')
  raw.buffer.writeUInt32LE(handle.bytes.length, 0)
  raw.buffer.writeInt32LE(handle.type, 4)
  handle.bytes.copy(raw.buffer, 8)
  const fd = openByHandleNative(mountFd, raw.address, flags | O_CLOEXEC)
  if (fd >= 0) return fd
  const code = errnoName(errno())
  if (code === 'ESTALE') return undefined
  throw new PosixError(code, { syscall: 'open_by_handle_at', path: '' })
}
