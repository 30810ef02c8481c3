import { release } from 'node:os'
import {
  type ByteString,
  close,
  type DirectoryName,
  errnoOf,
  FAN_ATTRIB,
  FAN_CLOSE_WRITE,
  FAN_CREATE,
  FAN_DELETE,
  FAN_MODIFY,
  FAN_MOVED_FROM,
  FAN_MOVED_TO,
  FAN_ONDIR,
  FAN_RENAME,
  type FanotifyEvent,
  type FileHandle,
  fanotifyInit,
  fanotifyMark,
  type HostPath,
  handleAt,
  handleKey,
  mountedHandleAt,
  O_DIRECTORY,
  O_PATH,
  O_RDONLY,
  openat,
  openByHandle,
  type PosixError,
  parseFanotify,
  type ReadableWatch,
  readFanotify,
  watchReadable,
  withFd,
} from '@lsync/posix'
import { Ancestry } from './ancestry.ts'
import { SourceUnavailableError } from './errors.ts'
import { type HintRouting, hintEvent } from './fanotify-hints.ts'
import type { BlindSpot, Hint, Source, SourceRequest } from './source.ts'

const NAMES = FAN_CREATE | FAN_DELETE | FAN_CLOSE_WRITE | FAN_MODIFY | FAN_ATTRIB | FAN_ONDIR
const PAIRED = NAMES | FAN_RENAME
// Linux before 5.17 has no FAN_RENAME.
const UNPAIRED = NAMES | FAN_MOVED_FROM | FAN_MOVED_TO

/**
 * One group with a mark on a whole file system, read through one mount of it, for all the roots that are reached through
 * that mount.
 */
class Hub implements HintRouting<Member> {
  readonly #key: string
  readonly #mountFd: number
  readonly #group: number
  readonly #ancestry: Ancestry<Member>
  #watch: ReadableWatch | undefined
  #pause: NodeJS.Timeout | undefined
  #stopped = false

  constructor(key: string, rootFd: number, mountId: number, unlimited: boolean) {
    this.#key = key
    this.#mountFd = openat(rootFd, '.' as ByteString, O_RDONLY | O_DIRECTORY)
    try {
      this.#group = openGroup(this.#mountFd, unlimited)
    } catch (error) {
      close(this.#mountFd)
      throw error
    }
    this.#ancestry = new Ancestry(this.#mountFd, mountId)
  }

  join(member: Member): void {
    this.#ancestry.add(member.rootKey, member)
    if (this.#watch === undefined) this.#listen()
  }

  leave(member: Member): void {
    this.#ancestry.remove(member.rootKey, member)
    if (this.#ancestry.everybody.length > 0) return
    this.#stopped = true
    clearTimeout(this.#pause)
    this.#watch?.close()
    close(this.#group)
    close(this.#mountFd)
    hubs.delete(this.#key)
  }

  #listen(): void {
    this.#watch = watchReadable(
      this.#group,
      BUFFER_BYTES,
      (bytes) => this.#take(parseFanotify(bytes)),
      (error) => this.#fail(error),
    )
  }

  /** Takes all that waits. The kernel queues an event before the call that caused it returns. */
  drain(): void {
    while (!this.#stopped) {
      const events = readFanotify(this.#group)
      if (events.length === 0) return
      for (const event of events) hintEvent(event, this)
    }
  }

  #take(events: readonly FanotifyEvent[]): void {
    for (const event of events) hintEvent(event, this)
    if (this.#stopped) return
    // While it waits in the queue, an event takes up later ones of the same kind, so a busy writer costs one each time.
    this.#watch?.pause()
    this.#pause = setTimeout(() => this.#watch?.resume(), PAUSE_MS)
  }

  #fail(error: PosixError): void {
    for (const member of this.#ancestry.everybody) member.say({ kind: 'lost', reason: error.message })
    if (this.#stopped) return
    clearTimeout(this.#pause)
    // The group itself goes on: what comes meanwhile waits in its queue.
    this.#pause = setTimeout(() => this.#listen(), RELISTEN_MS)
  }

  everybody = (): readonly Member[] => this.#ancestry.everybody
  ownersOf = (directory: FileHandle): readonly Member[] => this.#ancestry.ownersOf(directory)
  rootsAt = (key: string): readonly Member[] => this.#ancestry.rootsAt(key)
  moved = (directory: FileHandle | undefined): void => this.#ancestry.moved(directory)
  say = (to: Member, hint: Hint): void => to.say(hint)

  handleOf({ directory, name }: DirectoryName): FileHandle | undefined {
    const fd = openByHandle(this.#mountFd, directory, O_PATH | O_DIRECTORY)
    if (fd === undefined) return undefined
    try {
      return withFd(fd, () => handleAt(fd, name))
    } catch (error) {
      // It is gone again; its parent's hint is enough.
      if (errnoOf(error) === 'ENOENT') return undefined
      throw error
    }
  }
}

interface Member {
  readonly rootKey: string
  say(hint: Hint): void
}

const BUFFER_BYTES = 256 * 1024
const PAUSE_MS = 20
const RELISTEN_MS = 1000

// All roots of a process that lie on one mount share a group: a machine allows 128 groups to a user, and each would get
// every event of the file system.
const hubs = new Map<string, Hub>()

function openGroup(mountFd: number, unlimited: boolean): number {
  const group = fanotifyInit({ unlimited })
  try {
    try {
      fanotifyMark(group, 'add', 'filesystem', PAIRED, mountFd)
    } catch (error) {
      if (errnoOf(error) !== 'EINVAL') throw error
      fanotifyMark(group, 'add', 'filesystem', UNPAIRED, mountFd)
    }
    return group
  } catch (error) {
    close(group)
    throw error
  }
}

/** Why fanotify cannot watch here, in words; `undefined` when it can. Tries it, and leaves nothing behind. */
export function whyNotFanotify(rootFd: number): string | undefined {
  try {
    const fd = openat(rootFd, '.' as ByteString, O_RDONLY | O_DIRECTORY)
    try {
      close(openGroup(fd, true))
      const handle = handleAt(fd, '')
      if (handle === undefined) return 'this file system has no file handles'
      const again = openByHandle(fd, handle, O_PATH | O_DIRECTORY)
      if (again === undefined) return 'this file system does not open files by their handles'
      close(again)
      return undefined
    } finally {
      close(fd)
    }
  } catch (error) {
    const code = errnoOf(error)
    if (code === undefined) throw error
    return REASONS[code] ?? `the kernel says ${code}`
  }
}

const REASONS: Readonly<Record<string, string>> = {
  EPERM: 'this process lacks CAP_SYS_ADMIN, or CAP_DAC_READ_SEARCH, in the initial user namespace',
  EXDEV: 'it is in a btrfs subvolume, and only the top of the file system takes a mark',
  ENODEV: 'this file system has no id that events could carry',
  ENOTSUP: 'this file system has no file handles',
  ENOSYS: 'this kernel has no fanotify',
  EINVAL: 'this kernel is older than 5.9 and reports no names',
  EMFILE: 'this user has no fanotify groups left (fs.fanotify.max_user_groups)',
}

/**
 * Watches a root by a mark on its whole file system: no watch for each directory, so it is ready at once whatever the
 * tree's size, and a directory that has just been made is seen like all others.
 * @throws {SourceUnavailableError} from `start` where `whyNotFanotify` has a reason
 */
export class FanotifySource implements Source {
  readonly kind = 'fanotify'
  readonly blindSpots: readonly BlindSpot[]
  readonly #request: SourceRequest
  #hub: Hub | undefined
  #member: Member | undefined

  constructor(request: SourceRequest) {
    this.#request = request
    this.blindSpots = blindSpotsOf(release())
  }

  async start(handle: (hint: Hint) => void): Promise<void> {
    const { root, rootFd, boundedQueue = false } = this.#request
    const reason = whyNotFanotify(rootFd)
    const self = reason === undefined ? mountedHandleAt(rootFd, '') : undefined
    if (self === undefined) throw new SourceUnavailableError('fanotify', root as HostPath, reason ?? 'it has no handle')
    const key = `${self.mountId}${boundedQueue ? ' bounded' : ''}`
    const hub = hubs.get(key) ?? new Hub(key, rootFd, self.mountId, !boundedQueue)
    hubs.set(key, hub)
    this.#hub = hub
    this.#member = { rootKey: handleKey(self.handle), say: handle }
    hub.join(this.#member)
  }

  async drain(): Promise<void> {
    this.#hub?.drain()
  }

  async stop(): Promise<void> {
    if (this.#member !== undefined) this.#hub?.leave(this.#member)
    this.#hub = undefined
    this.#member = undefined
  }
}

/** What it cannot see under a kernel, by `uname -r`. */
export function blindSpotsOf(kernel: string): BlindSpot[] {
  const [major = 0, minor = 0] = kernel.split('.').map((part) => Number.parseInt(part, 10))
  const spots: BlindSpot[] = [
    {
      code: 'MAPPED_WRITES',
      message: 'Writes through a shared memory mapping are seen when the last mapping of the file goes, not before.',
    },
    {
      code: 'PREPARED_DIRECTORIES',
      message:
        'What overlayfs prepares in its work directory and renames in, and the opaque mark, give no event of their own; directories that appear are scanned.',
    },
  ]
  if (major < 6 || (major === 6 && minor < 5)) {
    spots.push({
      code: 'OVERLAY_WRITES',
      message: 'Linux before 6.5 reports no writes that are made through an overlay mount on its upper.',
    })
  }
  return spots
}
