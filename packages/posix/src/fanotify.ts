import type { ByteString } from './bytes.ts'
import { errnoName, PosixError } from './errors.ts'
import { type FileHandle, readHandle } from './handle.ts'
import { allocate, cString, entering, errno, fail, libcFunction, libcFunctionAsync, type Memory } from './native.ts'

const initNative = libcFunction('fanotify_init', 'i', 'uu')
const markNative = libcFunction('fanotify_mark', 'i', 'iupip')
const readNative = libcFunction('read', 'l', 'ipp')
const pollAsync = libcFunctionAsync('poll', 'i', 'ppi')

const FAN_CLOEXEC = 0x1
const FAN_NONBLOCK = 0x2
const FAN_UNLIMITED_QUEUE = 0x10
const FAN_UNLIMITED_MARKS = 0x20
const FAN_REPORT_FID = 0x200
const FAN_REPORT_DFID_NAME = 0xc00
const FAN_REPORT_TARGET_FID = 0x1000

const FAN_MARK_ADD = 0x1
const FAN_MARK_REMOVE = 0x2
const FAN_MARK_ONLYDIR = 0x8

// Events, for masks and in `FanotifyEvent.mask`. Source: fanotify_mark(2).
export const FAN_ACCESS = 0x1
export const FAN_MODIFY = 0x2
export const FAN_ATTRIB = 0x4
export const FAN_CLOSE_WRITE = 0x8
export const FAN_MOVED_FROM = 0x40
export const FAN_MOVED_TO = 0x80
export const FAN_CREATE = 0x100
export const FAN_DELETE = 0x200
export const FAN_DELETE_SELF = 0x400
export const FAN_MOVE_SELF = 0x800
export const FAN_Q_OVERFLOW = 0x4000
export const FAN_EVENT_ON_CHILD = 0x0800_0000
export const FAN_RENAME = 0x1000_0000
export const FAN_ONDIR = 0x4000_0000

/** A name in a directory, the directory by its handle: `openByHandle` opens it, `handleKey` makes it a Map key. */
export interface DirectoryName {
  readonly directory: FileHandle
  /** The file system's id in hexadecimal, as statfs(2) has it in f_fsid. */
  readonly fsid: string
  /** `.` when the event is about the directory itself. */
  readonly name: ByteString
}

/** One event. Several changes of one name may come merged, with their bits together in `mask`. */
export interface FanotifyEvent {
  readonly mask: number
  /** The process that did it; 0 when it is of another pid namespace. */
  readonly pid: number
  /** The queue was full: events are lost, and this one says nothing else. */
  readonly overflow: boolean
  readonly isDirectory: boolean
  /** Where it happened, for every event but a rename. */
  readonly at?: DirectoryName
  /** FAN_RENAME: the name before and after; one is absent when its directory is outside what was marked. */
  readonly from?: DirectoryName
  readonly to?: DirectoryName
  /** The inode that it happened to, where the kernel tells (Linux 5.17). */
  readonly target?: FileHandle
}

/**
 * A fanotify group that reports names in directories by handle (FAN_REPORT_DFID_NAME) and, where the kernel can, the
 * inode too. Non-blocking and close-on-exec. `unlimited` lifts the limits on queue and marks and needs CAP_SYS_ADMIN;
 * without it the queue holds fs.fanotify.max_queued_events. Source: fanotify_init(2).
 */
export function fanotifyInit(options: { readonly unlimited?: boolean } = {}): number {
  const { unlimited = true } = options
  entering('fanotify_init', '')
  const limits = unlimited ? FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS : 0
  const flags = FAN_CLOEXEC | FAN_NONBLOCK | limits | FAN_REPORT_DFID_NAME
  const withTarget = initNative(flags | FAN_REPORT_FID | FAN_REPORT_TARGET_FID, 0)
  if (withTarget >= 0) return withTarget
  if (errnoName(errno()) !== 'EINVAL') fail('fanotify_init', '')
  const fd = initNative(flags, 0)
  return fd < 0 ? fail('fanotify_init', '') : fd
}

/** What a mark covers: one directory or file, all that is reached through one mount, or a whole file system. */
export type MarkScope = 'inode' | 'mount' | 'filesystem'

const SCOPES: Readonly<Record<MarkScope, number>> = { inode: 0, mount: 0x10, filesystem: 0x100 }

/**
 * Adds the events of `mask` to what a group watches, or removes them. Name events (create, delete, rename) cannot be
 * had of a mount. A file system mark needs CAP_SYS_ADMIN.
 * @throws {PosixError} EXDEV for a btrfs subvolume that is not the file system's root, ENODEV or ENOTSUP where the file
 *   system has no id or no handles. Source: fanotify_mark(2).
 */
export function fanotifyMark(
  group: number,
  action: 'add' | 'remove',
  scope: MarkScope,
  mask: number,
  dirfd: number,
): void {
  entering('fanotify_mark', '')
  const flags = (action === 'add' ? FAN_MARK_ADD : FAN_MARK_REMOVE) | SCOPES[scope] | FAN_MARK_ONLYDIR
  if (markNative(group, flags, mask, dirfd, cString('.')) < 0) fail('fanotify_mark', '')
}

const BUFFER_BYTES = 256 * 1024
let memory: Memory | undefined

/** The events that wait, oldest first, as many as fit one read (256 KiB); none when there are none. */
export function readFanotify(group: number): FanotifyEvent[] {
  memory ??= allocate(BUFFER_BYTES)
  const end = readNative(group, memory.address, BUFFER_BYTES)
  if (end >= 0) return parseFanotify(memory.buffer.subarray(0, end))
  const code = errnoName(errno())
  if (code === 'EAGAIN' || code === 'EINTR') return []
  throw new PosixError(code, { syscall: 'read', path: 'fanotify' })
}

const POLLIN = 1

/**
 * Waits until an fd can be read, at most `timeoutMs`. Holds a thread of libuv's pool meanwhile, so keep the timeout
 * short (a second) and the waits few. Source: poll(2).
 */
export async function awaitReadable(fd: number, timeoutMs: number): Promise<boolean> {
  const query = allocate(8)
  query.buffer.writeInt32LE(fd, 0)
  query.buffer.writeInt16LE(POLLIN, 4)
  const ready = await pollAsync(query.address, 1, timeoutMs)
  return ready > 0 && (query.buffer.readInt16LE(6) & POLLIN) !== 0
}

const METADATA_VERSION = 3
const INFO_FID = 1
const INFO_DFID_NAME = 2
const INFO_DFID = 3
const INFO_OLD_DFID_NAME = 10
const INFO_NEW_DFID_NAME = 12

/** Parses what a read of a group gave: fanotify(7), "Reading fanotify events". Records of unknown types are skipped. */
export function parseFanotify(buffer: Buffer): FanotifyEvent[] {
  const events: FanotifyEvent[] = []
  for (let at = 0; at + 24 <= buffer.length; ) {
    const length = buffer.readUInt32LE(at)
    if (buffer[at + 4] !== METADATA_VERSION || length < 24) {
      throw new PosixError('EPROTO', { syscall: 'read', path: 'fanotify' })
    }
    events.push(parseEvent(buffer, at, at + length))
    at += length
  }
  return events
}

function parseEvent(buffer: Buffer, start: number, end: number): FanotifyEvent {
  const mask = buffer.readUInt32LE(start + 8)
  const info: { -readonly [K in 'at' | 'from' | 'to']?: DirectoryName } & { target?: FileHandle } = {}
  const overflow = (mask & FAN_Q_OVERFLOW) !== 0
  for (let at = start + buffer.readUInt16LE(start + 6); !overflow && at + 4 <= end; ) {
    const type = buffer[at]
    const length = buffer.readUInt16LE(at + 2)
    if (length < 4) break
    if (type === INFO_FID) info.target = readHandle(buffer, at + 12)
    else if (type === INFO_DFID_NAME || type === INFO_DFID) info.at = readName(buffer, at, at + length)
    else if (type === INFO_OLD_DFID_NAME) info.from = readName(buffer, at, at + length)
    else if (type === INFO_NEW_DFID_NAME) info.to = readName(buffer, at, at + length)
    at += length
  }
  return {
    mask,
    pid: buffer.readInt32LE(start + 20),
    overflow,
    isDirectory: (mask & FAN_ONDIR) !== 0,
    ...info,
  }
}

function readName(buffer: Buffer, at: number, end: number): DirectoryName {
  const directory = readHandle(buffer, at + 12)
  const from = at + 20 + directory.bytes.length
  const stop = buffer.indexOf(0, from)
  // A record without a name is padded up to its end.
  const name = from >= end ? '' : buffer.toString('latin1', from, stop < 0 || stop > end ? end : stop)
  return {
    directory,
    fsid: buffer.toString('hex', at + 4, at + 12),
    name: (name === '' ? '.' : name) as ByteString,
  }
}
