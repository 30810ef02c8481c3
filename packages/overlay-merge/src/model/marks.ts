import type { ByteString } from '@lsync/posix'
import type { Redirect } from './entry.ts'

/** Whose marks count, as the mount decides: `trusted.overlay.*`, or `user.overlay.*` with the option userxattr. */
export type Namespace = 'trusted' | 'user'

/** The attribute names of one namespace. Source: kernel overlayfs.rst; overlay-format "internal xattrs". */
export interface MarkNames {
  readonly prefix: string
  readonly escape: string
  readonly opaque: ByteString
  readonly whiteout: ByteString
  readonly redirect: ByteString
  readonly metacopy: ByteString
  readonly origin: ByteString
  readonly impure: ByteString
  readonly nlink: ByteString
  readonly protattr: ByteString
}

function marksOf(namespace: Namespace): MarkNames {
  const prefix = `${namespace}.overlay.`
  const mark = (name: string) => `${prefix}${name}` as ByteString
  return {
    prefix,
    // A name that begins so is the container's own attribute, stored one level deeper.
    escape: `${prefix}overlay.`,
    opaque: mark('opaque'),
    whiteout: mark('whiteout'),
    redirect: mark('redirect'),
    metacopy: mark('metacopy'),
    origin: mark('origin'),
    impure: mark('impure'),
    nlink: mark('nlink'),
    protattr: mark('protattr'),
  }
}

export const MARKS: Readonly<Record<Namespace, MarkNames>> = { trusted: marksOf('trusted'), user: marksOf('user') }

/** A mark of the namespace, which the merged view hides; escaped names of a nested overlay are not. */
export function isMark(name: string, marks: MarkNames): boolean {
  return name.startsWith(marks.prefix) && !name.startsWith(marks.escape)
}

/** What the value of `NS.opaque` says of a directory: exactly `y` closes it, exactly `x` is a hint, all else nothing. */
export function opaqueMeaning(value: Uint8Array | undefined): 'closed' | 'hint' | 'nothing' {
  if (value?.length !== 1) return 'nothing'
  return value[0] === 0x79 ? 'closed' : value[0] === 0x78 ? 'hint' : 'nothing'
}

/** Whether a redirect's value is one the kernel accepts, and which kind; it compares up to the first NUL. */
export function parseRedirect(
  value: Uint8Array,
): { ok: true; redirect: Redirect } | { ok: false; errno: 'EINVAL' | 'EACCES' } {
  const end = value.indexOf(0)
  const text = Buffer.from(value.subarray(0, end < 0 ? value.length : end)).toString('latin1')
  if (text === '') return { ok: false, errno: 'EINVAL' }
  const parts = text.startsWith('/') ? text.slice(1).split('/') : [text]
  if (!text.startsWith('/') && text.includes('/')) return { ok: false, errno: 'EINVAL' }
  if (parts.includes('')) return { ok: false, errno: 'EINVAL' }
  if (parts.includes('.') || parts.includes('..')) return { ok: false, errno: 'EACCES' }
  return { ok: true, redirect: text as Redirect }
}
