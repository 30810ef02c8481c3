import { type ErrorDetail, type HostPath, LsyncError, printable } from '@lsync/posix'

/** The asked-for way of watching does not work on this file system or for this process. */
export class SourceUnavailableError extends LsyncError {
  constructor(kind: string, root: HostPath, reason: string, detail: ErrorDetail = {}) {
    super('SOURCE_UNAVAILABLE', `${kind} cannot watch ${printable(root)}: ${reason}`, {
      path: root,
      hint: 'let lsync choose the source (auto), or take poll, which works everywhere',
      ...detail,
    })
  }
}

/** The kernel's limit on inotify watches or instances is below what a tree needs, one for each directory. */
export class WatchLimitError extends LsyncError {
  constructor(root: HostPath, detail: ErrorDetail = {}) {
    super('WATCH_LIMIT', `the limit on inotify watches was reached below ${printable(root)}`, {
      path: root,
      hint: 'raise fs.inotify.max_user_watches and max_user_instances (sysctl), or run with CAP_SYS_ADMIN for fanotify',
      ...detail,
    })
  }
}
