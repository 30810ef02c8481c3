import { errnoName, PosixError } from './errors.ts'
import { allocate, entering, errno, fail, libcFunction } from './native.ts'
import { truncate, writeAt } from './open.ts'

const copyRangeNative = libcFunction('copy_file_range', 'l', 'ipippu')
const lseekNative = libcFunction('lseek', 'l', 'ili')
const ioctlNative = libcFunction('ioctl', 'i', 'ipp')
const readNative = libcFunction('pread', 'l', 'ippl')
const writeNative = libcFunction('pwrite', 'l', 'ippl')

const fallocateNative = libcFunction('fallocate', 'i', 'iill')

const FALLOC_FL_KEEP_SIZE = 1
const FALLOC_FL_PUNCH_HOLE = 2
const FICLONE = 0x4004_9409
const SEEK_DATA = 3
const SEEK_HOLE = 4
const offsets = allocate(16)
const BLOCK_BYTES = 256 * 1024
let block: ReturnType<typeof allocate> | undefined

/** Shares the extents of `from` with the empty file `to` (reflink). `false` where the file system cannot. */
export function tryClone(from: number, to: number, path = ''): boolean {
  entering('FICLONE', path)
  if (ioctlNative(to, FICLONE, from) >= 0) return true
  const code = errnoName(errno())
  if (code === 'ENOTSUP' || code === 'EXDEV' || code === 'EINVAL' || code === 'ENOTTY' || code === 'ENOSYS')
    return false
  throw new PosixError(code, { syscall: 'FICLONE', path })
}

/**
 * Copies the data of `from` into the empty file `to`: a reflink where possible, else only the extents that hold data,
 * so holes stay holes. Returns the size in bytes that `from` had. Source: lseek(2), copy_file_range(2), ioctl_ficlone(2).
 */
export function copyData(from: number, to: number, sizeBytes: number, path = '', reflink = true): number {
  if (sizeBytes === 0) return 0
  if (reflink && tryClone(from, to, path)) return sizeBytes
  let at = 0
  for (;;) {
    const start = lseekNative(from, at, SEEK_DATA)
    if (start < 0) {
      const code = errnoName(errno())
      if (code === 'ENXIO') break
      if (code !== 'EINVAL') throw new PosixError(code, { syscall: 'lseek', path })
      copyRange(from, to, at, Number.MAX_SAFE_INTEGER, path)
      break
    }
    const end = lseekNative(from, start, SEEK_HOLE)
    if (end < 0) fail('lseek', path)
    const copied = copyRange(from, to, start, end - start, path)
    if (copied < end - start) break // the file shrank meanwhile; the caller compares ctimes
    at = end
    if (at >= sizeBytes) break
  }
  truncate(to, sizeBytes, path)
  return sizeBytes
}

function copyRange(from: number, to: number, start: number, lengthBytes: number, path: string): number {
  entering('copy_file_range', path)
  let done = 0
  while (done < lengthBytes) {
    offsets.buffer.writeBigInt64LE(BigInt(start + done), 0)
    offsets.buffer.writeBigInt64LE(BigInt(start + done), 8)
    const want = Math.min(lengthBytes - done, 1 << 30)
    const count = copyRangeNative(from, offsets.address, to, offsets.address + 8, want, 0)
    if (count === 0) return done
    if (count < 0) {
      const code = errnoName(errno())
      if (code === 'EINTR' || code === 'EAGAIN') continue
      if (code === 'EXDEV' || code === 'EINVAL' || code === 'ENOSYS' || code === 'ENOTSUP' || code === 'EIO') {
        // Some FUSE and network file systems answer EIO to the call and yet read and write well.
        return done + pumpRange(from, to, start + done, lengthBytes - done, path)
      }
      throw new PosixError(code, { syscall: 'copy_file_range', path })
    }
    done += count
  }
  return done
}

function pumpRange(from: number, to: number, start: number, lengthBytes: number, path: string): number {
  block ??= allocate(BLOCK_BYTES)
  let done = 0
  while (done < lengthBytes) {
    const count = readNative(from, block.address, Math.min(BLOCK_BYTES, lengthBytes - done), start + done)
    if (count < 0) fail('pread', path)
    if (count === 0) return done
    for (let written = 0; written < count; ) {
      const part = writeNative(to, block.address + written, count - written, start + done + written)
      if (part < 0) fail('pwrite', path)
      written += part
    }
    done += count
  }
  return done
}

/** The next data and hole at or after `offset`: `[start, end)` in bytes, or `undefined` when only a hole is left. */
export function nextData(fd: number, offset: number): { start: number; end: number } | undefined {
  const start = lseekNative(fd, offset, SEEK_DATA)
  if (start < 0) {
    if (errnoName(errno()) === 'ENXIO') return undefined
    fail('lseek', '')
  }
  const end = lseekNative(fd, start, SEEK_HOLE)
  if (end < 0) fail('lseek', '')
  return { start, end }
}

/**
 * Makes `length` bytes at `offset` a hole, the size stays. Where the file system cannot, they become zeros.
 * Source: fallocate(2), FALLOC_FL_PUNCH_HOLE.
 */
export function punchHole(fd: number, offset: number, length: number, path = ''): void {
  if (length <= 0) return
  entering('fallocate', path)
  if (fallocateNative(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length) >= 0) return
  const code = errnoName(errno())
  if (code !== 'ENOTSUP' && code !== 'ENOSYS') throw new PosixError(code, { syscall: 'fallocate', path })
  const zeros = Buffer.alloc(Math.min(length, BLOCK_BYTES))
  for (let done = 0; done < length; done += zeros.length) {
    writeAt(fd, offset + done, zeros.subarray(0, Math.min(zeros.length, length - done)), path)
  }
}
