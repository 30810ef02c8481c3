import { errnoName, PosixError } from './errors.ts'
import { errno, libcFunction } from './native.ts'

const unshareNative = libcFunction('unshare', 'i', 'i')
const umaskNative = libcFunction('umask', 'i', 'u')

const CLONE_FS = 0x200

/**
 * Gives the calling thread a umask of its own, which is 0, so that it can make files with exactly the mode that they are
 * to have, whatever the other threads set. `false` where the kernel is told to refuse that (seccomp). For worker threads
 * that do nothing else: the thread does not follow the working directory of the process any more either.
 * Source: unshare(2), CLONE_FS.
 */
export function takeOwnUmask(): boolean {
  if (unshareNative(CLONE_FS) < 0) {
    const code = errnoName(errno())
    if (code === 'EPERM' || code === 'ENOSYS') return false
    throw new PosixError(code, { syscall: 'unshare', path: '' })
  }
  umaskNative(0)
  return true
}
