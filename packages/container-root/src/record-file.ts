import { openNew } from '@lsync/overlay-merge'
import {
  type ByteString,
  errnoOf,
  fsync,
  type HostPath,
  makeDirectory,
  O_NOFOLLOW,
  O_NONBLOCK,
  O_RDONLY,
  openat,
  PosixError,
  RENAME_NOREPLACE,
  randomHex,
  readAt,
  rename,
  statFd,
  tryLink,
  tryRename,
  unlink,
  withFd,
  writeAt,
} from '@lsync/posix'
import type { z } from 'zod'
import { parseRecord, RECORD_MAX_BYTES, RecordDamagedError } from './records.ts'

/** A directory of records: its fd, and what messages call it. */
export interface RecordPlace {
  readonly fd: number
  readonly path: HostPath
}

const NEW_PREFIX = '.new-'

/**
 * The record `name` in a directory; `undefined` where there is none.
 * @throws {RecordDamagedError}, {RecordNewerError}, and {RecordDamagedError} for what is no regular file
 */
export function readRecord<T extends z.ZodType>(
  place: RecordPlace,
  name: ByteString,
  shape: T,
): z.infer<T> | undefined {
  const path = `${place.path}/${name}` as HostPath
  let fd: number
  try {
    fd = openat(place.fd, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
  } catch (cause) {
    const code = errnoOf(cause)
    if (code === 'ENOENT') return undefined
    if (code === 'ELOOP') throw new RecordDamagedError(path, 'it is a symlink')
    throw cause
  }
  return withFd(fd, () => {
    const stat = statFd(fd)
    if (!stat.isFile) throw new RecordDamagedError(path, 'it is no file')
    if (stat.sizeBytes > RECORD_MAX_BYTES) throw new RecordDamagedError(path, 'it is too big')
    return parseRecord(shape, readAt(fd, 0, RECORD_MAX_BYTES).toString('utf8'), path)
  })
}

/** Puts a record in the place of what had its name, durably. Either the old or the new one is there, whole. */
export function replaceRecord(place: RecordPlace, name: ByteString, record: object): void {
  withNew(place, record, (temporary) => rename(place.fd, temporary, place.fd, name))
  fsync(place.fd, place.path)
}

/**
 * Creates a record, durably and whole, if nothing has its name. `false` if something has. Exclusive on every store whose hard
 * links, renames without replacing, or directories are.
 */
export function createRecord(place: RecordPlace, name: ByteString, record: object): boolean {
  const isCreated = withNew(place, record, (temporary) => {
    const linked = tryLink(place.fd, temporary, place.fd, name)
    if (linked === undefined) return true
    if (linked === 'EEXIST') return false
    const moved = tryRename(place.fd, temporary, place.fd, name, RENAME_NOREPLACE)
    if (moved === undefined) return true
    if (moved === 'EEXIST') return false
    return claimAndMove(place, temporary, name)
  })
  if (isCreated) fsync(place.fd, place.path)
  return isCreated
}

// A store with neither hard links nor exclusive renames (some FUSE ones): making a directory is exclusive everywhere.
function claimAndMove(place: RecordPlace, temporary: ByteString, name: ByteString): boolean {
  try {
    makeDirectory(place.fd, `${name.replace(/\.json$/, '')}.claim` as ByteString, 0o700)
  } catch (cause) {
    if (errnoOf(cause) === 'EEXIST') return false
    throw cause
  }
  const code = tryRename(place.fd, temporary, place.fd, name)
  if (code !== undefined) throw new PosixError(code, { syscall: 'renameat2', path: `${place.path}/${name}` })
  return true
}

/** Removes a record, durably. */
export function removeRecord(place: RecordPlace, name: ByteString): void {
  if (unlink(place.fd, name)) fsync(place.fd, place.path)
}

function withNew<T>(place: RecordPlace, record: object, use: (temporary: ByteString) => T): T {
  const temporary = `${NEW_PREFIX}${randomHex(8)}` as ByteString
  try {
    withFd(openNew(place.fd, temporary), (fd) => {
      writeAt(fd, 0, Buffer.from(`${JSON.stringify(record)}\n`), place.path)
      fsync(fd, place.path)
    })
    return use(temporary)
  } finally {
    unlink(place.fd, temporary)
  }
}
