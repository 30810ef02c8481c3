import { constants } from 'node:os'
import { printable } from './bytes.ts'

/** What an error carries besides its code and message. */
export interface ErrorDetail {
  readonly path?: string
  readonly syscall?: string
  readonly hint?: string
  readonly cause?: unknown
}

/** Every failure that lsync foresees. `code` is API, listed in docs/errors.md; `hint` says what to do next. */
export class LsyncError extends Error {
  readonly code: string
  readonly path: string | undefined
  readonly syscall: string | undefined
  readonly hint: string | undefined

  constructor(code: string, message: string, detail: ErrorDetail = {}) {
    super(message, detail.cause === undefined ? undefined : { cause: detail.cause })
    this.name = new.target.name
    this.code = code
    this.path = detail.path
    this.syscall = detail.syscall
    this.hint = detail.hint
  }
}

const errnoNames = new Map(Object.entries(constants.errno).map(([name, number]) => [number, name]))
// EWOULDBLOCK and EOPNOTSUPP share their numbers with these, which are the names that people know.
errnoNames.set(constants.errno.EAGAIN, 'EAGAIN')
errnoNames.set(constants.errno.ENOTSUP, 'ENOTSUP')
errnoNames.set(117, 'EUCLEAN')
errnoNames.set(15, 'ENOTBLK')

/** The symbolic name of an errno, or `E<number>` for one that this table lacks. */
export function errnoName(errno: number): string {
  return errnoNames.get(errno) ?? `E${errno}`
}

/**
 * A system call failed. `code` is the errno's name (`ENOENT`), `path` what it was about (raw bytes), `reason` what the
 * kernel said beyond the errno, where it did.
 */
export class PosixError extends LsyncError {
  constructor(errno: string, detail: { syscall: string; path: string; hint?: string; reason?: string }) {
    const hint = detail.hint ?? HINTS[errno]
    const reason = detail.reason ? ` (${detail.reason})` : ''
    super(errno, `${detail.syscall} failed on ${printable(detail.path) || 'the layer root'}: ${errno}${reason}`, {
      syscall: detail.syscall,
      path: detail.path,
      ...(hint === undefined ? {} : { hint }),
    })
  }
}

const HINTS: Readonly<Record<string, string>> = {
  ENOSPC: 'free space or inodes on the target, then run `lsync recover`',
  EDQUOT: 'raise the quota on the target, then run `lsync recover`',
  EACCES: 'run as root, or as the owner of the tree',
  EPERM: 'run as root in the initial user namespace, and clear immutable flags (lsattr)',
  EROFS: 'remount the file system writable',
  EMFILE: 'raise the limit on open files (ulimit -n)',
  ENFILE: 'raise fs.file-max',
  EIO: 'check the device (dmesg), then run `lsync recover`',
  ELOOP: 'a symlink stands where a directory was expected; nothing behind it was touched',
}

/** The errno name when `error` is a failed system call (ours or Node's), else `undefined`. */
export function errnoOf(error: unknown): string | undefined {
  if (error instanceof PosixError) return error.code
  const code = (error as { code?: unknown } | undefined)?.code
  return typeof code === 'string' && /^E[A-Z0-9]+$/.test(code) ? code : undefined
}
