import { errnoName, PosixError } from './errors.ts'
import { errno, libcFunction } from './native.ts'

const fcntlNative = libcFunction('fcntl', 'i', 'iii')

const F_SETSIG = 10
const F_SETLEASE = 1024
const F_RDLCK = 0
const F_WRLCK = 1
const F_UNLCK = 2
// Ignored by default, on every architecture that Node knows.
const SIGURG = 23

/**
 * Whether somebody has this file open for writing, or mapped shared and writable, right now. `fd` is a regular file, open
 * read-only. `undefined` where that cannot be known: a file of another user without CAP_LEASE, a file system without leases.
 *
 * A write through a mapping that began before changes no time as long as its page has not been written back, on tmpfs never. So a
 * file that had a writer while it was copied can differ from the copy with all of its times the same.
 * Source: fcntl(2), "Leases": a read lease is granted only where no one writes. It is let go at once.
 */
export function hasWriters(fd: number): boolean | undefined {
  return refusesLease(fd, F_RDLCK)
}

/**
 * Whether anybody else has the regular file open, by whatever name, the kernel for a mount or a loop device included. `undefined` where
 * that cannot be known. Source: fcntl(2), "Leases": a write lease is granted to a sole opener only. It is let go at once.
 */
export function hasOtherOpeners(fd: number): boolean | undefined {
  return refusesLease(fd, F_WRLCK)
}

function refusesLease(fd: number, kind: number): boolean | undefined {
  // Who opens it between the two calls breaks the lease, and the signal for that, SIGIO, would end the process.
  if (fcntlNative(fd, F_SETSIG, SIGURG) < 0) throw new PosixError(errnoName(errno()), { syscall: 'fcntl', path: '' })
  if (fcntlNative(fd, F_SETLEASE, kind) < 0) {
    const code = errnoName(errno())
    if (code === 'EAGAIN') return true
    if (code === 'EACCES' || code === 'EINVAL' || code === 'ENOTSUP') return undefined
    throw new PosixError(code, { syscall: 'fcntl', path: 'F_SETLEASE' })
  }
  fcntlNative(fd, F_SETLEASE, F_UNLCK)
  return false
}
