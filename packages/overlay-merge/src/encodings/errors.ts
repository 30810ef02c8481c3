import { type ErrorDetail, LsyncError, printable } from '@lsync/posix'

/** A name or member of a layer is refused: hostile, broken, or against the chosen policy. Nothing of it was written. */
export class LayerEntryRefusedError extends LsyncError {
  constructor(path: string, reason: string, hint = 'do not use this layer unless you trust where it comes from') {
    super('ENTRY_REFUSED', `${printable(path) || 'the layer root'} is refused: ${reason}`, { path, hint })
  }
}

/** What the layer holds has no equivalent in the form asked for. */
export class NotExpressibleError extends LsyncError {
  constructor(path: string, form: string, what: string, hint: string) {
    super('NOT_EXPRESSIBLE', `${printable(path) || 'the layer root'}: ${what} cannot be written as ${form}`, {
      path,
      hint,
    })
  }
}

/** A redirect or a metacopy refers to the layers beneath, which this form cannot. */
export class NeedsDerefError extends LsyncError {
  constructor(path: string, form: string, what: 'redirect' | 'metacopy') {
    super('NEEDS_DEREF', `${printable(path)} is a ${what}, which ${form} cannot express`, {
      path,
      hint: 'unfold it first with `lsync deref`',
    })
  }
}

/** The marks of a layer are such that the kernel itself would answer with an error. */
export class MarkInvalidError extends LsyncError {
  constructor(path: string, reason: string) {
    super('MARK_INVALID', `${printable(path) || 'the layer root'}: ${reason}`, {
      path,
      hint: 'look at it with `lsync check --repair`',
    })
  }
}

/** Another file system is mounted inside the layer; overlayfs would show the directory beneath it. */
export class LayerSubmountError extends LsyncError {
  constructor(path: string) {
    super('SUBMOUNT_IN_LAYER', `${printable(path)} is a mount point inside the layer`, {
      path,
      hint: 'unmount it, or bind-mount the layer elsewhere (mount --bind leaves submounts out) and use that',
    })
  }
}

/** A file or directory is not what it was when it was listed. */
export class LayerChangedError extends LsyncError {
  constructor(path: string) {
    super('LAYER_CHANGED', `${printable(path)} changed while it was read`, {
      path,
      hint: 'stop whatever changes the layer, then start again',
    })
  }
}

/** An archive ends too early, or its bytes are not those of its format. */
export class ArchiveBrokenError extends LsyncError {
  constructor(reason: string, path = '', detail: ErrorDetail = {}) {
    super('ARCHIVE_BROKEN', path === '' ? `the archive ${reason}` : `the archive ${reason}, at ${printable(path)}`, {
      path,
      hint: 'fetch or make it again',
      ...detail,
    })
  }
}

/** A limit that guards against archive bombs was passed. */
export class LimitExceededError extends LsyncError {
  constructor(path: string, limit: string, value: number) {
    super('LIMIT_EXCEEDED', `${printable(path) || 'the archive'} exceeds ${limit} = ${value}`, {
      path,
      hint: `raise ${limit} if you trust the archive`,
    })
  }
}

/** The result's place is taken. */
export class TargetExistsError extends LsyncError {
  constructor(path: string) {
    super('OUTPUT_EXISTS', `${printable(path)} exists already`, { path, hint: 'remove it, or name another target' })
  }
}

/** The target's file system (or the caller's privilege) cannot hold an owner, attribute or node. */
export class TargetCannotHoldError extends LsyncError {
  constructor(path: string, what: string, cause: unknown) {
    super('TARGET_CANNOT_HOLD', `${printable(path) || 'the layer root'}: the target cannot hold ${what}`, {
      path,
      hint: 'run as root on another file system, use the portable form, or allow losses (--lossy)',
      cause,
    })
  }
}

/** `trusted.*` attributes are invisible here, without a word from the kernel: every opaque directory would be missed. */
export class TrustedXattrsHiddenError extends LsyncError {
  constructor(path: string) {
    super(
      'PRIVILEGE_MISSING',
      'trusted.* attributes cannot be seen without CAP_SYS_ADMIN in the initial user namespace',
      {
        path,
        hint: 'run as root on the host, or use the namespace `user` if the layer was mounted with userxattr',
      },
    )
  }
}
