import { hostname } from 'node:os'
import { setTimeout as sleep } from 'node:timers/promises'
import { errnoOf, LsyncError } from '@lsync/posix'
import { userName } from './key-file.ts'
import { formatTime, parseTime } from './model/go-text.ts'
import type { ObjectId } from './model/tree.ts'
import type { Repository } from './repository.ts'

// All are restic's, so that both understand each other. Source: its design document, "Locks", and its behaviour.
const STALE_MS = 30 * 60_000
const REFRESH_MS = 5 * 60_000
/** A lock that could not be refreshed for so long may be taken for stale by others. */
const LOST_MS = 25 * 60_000

/** A lock's file. */
export interface LockInfo {
  readonly id: ObjectId
  readonly time: string
  readonly exclusive: boolean
  readonly hostname: string
  readonly username: string
  readonly pid: number
}

/** Somebody else works on the repository in a way that does not go together with this. */
export class RepositoryLockedError extends LsyncError {
  constructor(location: string, other: LockInfo) {
    const who = `process ${other.pid} of ${other.username || 'somebody'} on ${other.hostname}`
    super('REPOSITORY_LOCKED', `${location} is locked by ${who} since ${other.time}`, {
      hint: 'wait for it to end; if it is not running any more, `lsync snapshot unlock`',
    })
  }
}

/** A lock could not be refreshed for so long that others may have taken it for stale. */
export class LockLostError extends LsyncError {
  constructor(location: string, cause: unknown) {
    super('LOCK_LOST', `the lock on ${location} could not be refreshed`, { hint: 'run the command again', cause })
  }
}

/** The right to read and add (shared), or to remove (exclusive). Refreshed until it is released. */
export class RepositoryLock {
  /** Aborted when the lock may have been lost, and when the signal is with which it was acquired. */
  readonly signal: AbortSignal
  readonly #repository: Repository
  readonly #exclusive: boolean
  readonly #lost = new AbortController()
  #id: ObjectId
  #refreshedMs = performance.now()
  #timer: NodeJS.Timeout | undefined
  #refreshing: Promise<void> = Promise.resolve()
  #settled: Promise<void> = Promise.resolve()

  private constructor(repository: Repository, exclusive: boolean, id: ObjectId, signal: AbortSignal | undefined) {
    this.#repository = repository
    this.#exclusive = exclusive
    this.#id = id
    this.signal = AbortSignal.any([this.#lost.signal, ...(signal === undefined ? [] : [signal])])
  }

  /**
   * Locks a repository.
   * @throws {RepositoryLockedError} when another lock stands against it; stale ones do not
   */
  static async acquire(
    repository: Repository,
    { exclusive, signal }: { readonly exclusive: boolean; readonly signal?: AbortSignal | undefined },
  ): Promise<RepositoryLock> {
    await assertNoOther(repository, exclusive, undefined, signal)
    const lock = new RepositoryLock(repository, exclusive, await writeLock(repository, exclusive), signal)
    try {
      await assertNoOther(repository, exclusive, lock.#id, signal)
      // Storage may show a file late. Who removes waits for that; who adds checks again before anything counts.
      lock.#settled = settle(repository, exclusive, lock.#id)
      if (exclusive) await lock.#settled
      else lock.#settled.catch(() => undefined)
    } catch (error) {
      await repository.backend.delete({ kind: 'lock', name: lock.#id })
      throw error
    }
    lock.#timer = setInterval(() => lock.#refresh(), REFRESH_MS)
    lock.#timer.unref()
    return lock
  }

  /**
   * Resolves when it is certain that nobody else took a lock at the same moment. Before anything counts, this is awaited.
   * @throws {RepositoryLockedError}
   */
  async settled(): Promise<void> {
    await this.#settled
    await this.#refreshing
    this.#lost.signal.throwIfAborted()
    // A machine that slept may have been taken for dead; whoever took it removed the file.
    const file = await this.#repository.backend.stat({ kind: 'lock', name: this.#id })
    if (file === undefined) throw new LockLostError(this.#repository.backend.location, undefined)
  }

  /** Gives the lock back. A second time does nothing. */
  async release(): Promise<void> {
    clearInterval(this.#timer)
    await this.#refreshing
    await this.#settled.catch(() => undefined)
    await this.#repository.backend.delete({ kind: 'lock', name: this.#id })
  }

  #refresh(): void {
    this.#refreshing = this.#refreshing.then(async () => {
      try {
        // The new one is there before the old one goes, so that there is always one.
        const next = await writeLock(this.#repository, this.#exclusive)
        const old = this.#id
        this.#id = next
        this.#refreshedMs = performance.now()
        await this.#repository.backend.delete({ kind: 'lock', name: old })
      } catch (error) {
        if (performance.now() - this.#refreshedMs > LOST_MS) {
          this.#lost.abort(new LockLostError(this.#repository.backend.location, error))
        }
      }
    })
  }
}

/** What holds a repository still while it is read. */
export interface ReadingLock {
  /** Aborted when the repository may change under the reader, and when the signal is with which it was asked for. */
  readonly signal: AbortSignal
  release(): Promise<void>
}

/**
 * A shared lock for reading. With `noLock` none is taken: for storage that cannot be written to, or may not. What somebody prunes
 * meanwhile is then missing, and named.
 */
export async function lockForReading(
  repository: Repository,
  { noLock, signal }: { readonly noLock?: boolean | undefined; readonly signal?: AbortSignal | undefined },
): Promise<ReadingLock> {
  if (noLock === true) return { signal: signal ?? new AbortController().signal, release: async () => undefined }
  return RepositoryLock.acquire(repository, { exclusive: false, signal })
}

async function settle(repository: Repository, exclusive: boolean, own: ObjectId): Promise<void> {
  if (repository.backend.settleMs === 0) return
  await sleep(repository.backend.settleMs)
  await assertNoOther(repository, exclusive, own)
}

async function writeLock(repository: Repository, exclusive: boolean): Promise<ObjectId> {
  const lock = {
    time: formatTime(BigInt(Date.now()) * 1_000_000n),
    exclusive,
    hostname: hostname(),
    username: userName(),
    pid: process.pid,
    uid: process.getuid?.() ?? 0,
    gid: process.getgid?.() ?? 0,
  }
  return repository.writeFile('lock', Buffer.from(JSON.stringify(lock)))
}

async function assertNoOther(
  repository: Repository,
  exclusive: boolean,
  own: ObjectId | undefined,
  signal?: AbortSignal,
): Promise<void> {
  for (const lock of await listLocks(repository, signal)) {
    if (lock.id === own || isStale(lock)) continue
    if (exclusive || lock.exclusive) throw new RepositoryLockedError(repository.backend.location, lock)
  }
}

/** All locks of a repository that can be read; one that is being removed is none. */
export async function listLocks(repository: Repository, signal?: AbortSignal): Promise<LockInfo[]> {
  const locks: LockInfo[] = []
  for await (const { name, sizeBytes } of repository.backend.list('lock', { signal })) {
    // What a crash left behind, or somebody is about to write.
    if (sizeBytes === 0) continue
    try {
      const raw = JSON.parse((await repository.readFile('lock', name, signal)).toString()) as Partial<LockInfo>
      const { time, exclusive, hostname, username, pid } = raw
      locks.push({
        id: name,
        time: typeof time === 'string' ? time : '',
        exclusive: exclusive === true,
        hostname: String(hostname ?? ''),
        username: String(username ?? ''),
        pid: Number(pid ?? 0),
      })
    } catch (error) {
      const code = (error as { code?: unknown }).code
      if (code !== 'REPOSITORY_FILE_MISSING' && code !== 'REPOSITORY_FILE_DAMAGED' && !(error instanceof SyntaxError)) {
        throw error
      }
    }
  }
  return locks
}

/** Whether nobody holds a lock any more: it is old, or its process on this machine is gone. */
export function isStale(lock: LockInfo, nowMs = Date.now()): boolean {
  const timeNs = parseTime(lock.time)
  if (timeNs === undefined || nowMs - Number(timeNs / 1_000_000n) > STALE_MS) return true
  if (lock.hostname !== hostname() || lock.pid <= 0) return false
  try {
    process.kill(lock.pid, 0)
    return false
  } catch (error) {
    return errnoOf(error) === 'ESRCH'
  }
}

/** Removes stale locks, or all. Returns how many. */
export async function removeLocks(repository: Repository, options: { readonly all: boolean }): Promise<number> {
  let removed = 0
  for (const lock of await listLocks(repository)) {
    if (!options.all && !isStale(lock)) continue
    if (await repository.backend.delete({ kind: 'lock', name: lock.id })) removed++
  }
  return removed
}
