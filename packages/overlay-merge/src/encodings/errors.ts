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
