import { errnoName, PosixError } from './errors.ts'
import { entering, errno, fail, libcFunction, libcFunctionAsync } from './native.ts'

const fsyncNative = libcFunction('fsync', 'i', 'i')
const fdatasyncNative = libcFunction('fdatasync', 'i', 'i')
const syncfsNative = libcFunction('syncfs', 'i', 'i')
const syncfsAsync = libcFunctionAsync('syncfs', 'i', 'i')
const flockNative = libcFunction('flock', 'i', 'ii')

const LOCK_SH = 1
const LOCK_EX = 2
const LOCK_NB = 4

/** fsync(2): the file's (or directory's) content and metadata are on stable storage when it returns. */
export function fsync(fd: number, path = ''): void {
  entering('fsync', path)
  if (fsyncNative(fd) < 0) fail('fsync', path)
}

/** fdatasync(2): as fsync, without metadata that reading does not need. */
export function fdatasync(fd: number, path = ''): void {
  entering('fdatasync', path)
  if (fdatasyncNative(fd) < 0) fail('fdatasync', path)
}

/** syncfs(2): everything written so far to the file system that holds `fd` is on stable storage. */
export function syncFileSystem(fd: number, path = ''): void {
  entering('syncfs', path)
  if (syncfsNative(fd) < 0) fail('syncfs', path)
}

/** As `syncFileSystem`, on a thread of libuv's pool. Which errno a failure had is not known: it is reported as EIO. */
export async function syncFileSystemAsync(fd: number, path = ''): Promise<void> {
  entering('syncfs', path)
  if ((await syncfsAsync(fd)) < 0) throw new PosixError('EIO', { syscall: 'syncfs', path })
}

/** flock(2) without waiting. `false` when another open file holds it. It goes with the last close of this open file. */
export function tryLock(fd: number, mode: 'shared' | 'exclusive', path = ''): boolean {
  entering('flock', path)
  if (flockNative(fd, (mode === 'shared' ? LOCK_SH : LOCK_EX) | LOCK_NB) >= 0) return true
  if (errnoName(errno()) === 'EAGAIN') return false
  return fail('flock', path)
}
