import { link, open, readdir, readFile, stat, unlink, writeFile } from 'node:fs/promises'
import { setTimeout as delay } from 'node:timers/promises'
import { AT_FDCWD, bytesOf, errnoOf, RENAME_NOREPLACE, randomHex, tryRename } from '@lsync/posix'
import {
  bootMs,
  DEFAULT_DURATION_MS,
  isFreeFor,
  Lease,
  type LeaseClaim,
  LeaseDamagedError,
  LeaseHeldError,
  type LeaseKeeper,
  LeaseLostError,
  type LeaseRequest,
  type LeaseState,
  type Leases,
  LeaseUnreachableError,
  nextClaim,
  parseClaim,
  type TakeoverRequest,
  unreadableState,
} from './lease.ts'

export interface FileLeasesOptions {
  /** Default 30 s. The same for all nodes of a root is best; each claim carries its own. */
  readonly durationMs?: number | undefined
}

/** Claims kept for people to look at; older ones go with the next claim. */
const KEPT_CLAIMS = 8
/** So often, with so much between, is an unfinished claim looked at before it counts as damaged. */
const WRITING_LOOKS = 10
const WRITING_MS = 100
/** Stores that keep whole seconds show up to one second less than has passed. */
const CLOCK_GRAIN_MS = 1000

/**
 * Leases as files in a directory of the shared store: `<epoch>.json` is created exclusively and never changed, `<epoch>.beat` moves
 * while its holder lives, `<epoch>.released` says that it was given back. Works on any mounted file system whose exclusive
 * creation is exclusive among its clients (local ones, MooseFS, CephFS, NFS; the latter mounted with `lookupcache=positive` or
 * stricter). The calls run on libuv's pool, so a store that hangs blocks nobody else.
 */
export class FileLeases implements Leases, LeaseKeeper {
  readonly durationMs: number
  readonly #directory: string

  /** `directory` must be there: where it is not, the store is not mounted, and nobody can say who holds the root. */
  constructor(directory: string, options: FileLeasesOptions = {}) {
    this.#directory = directory
    this.durationMs = options.durationMs ?? DEFAULT_DURATION_MS
  }

  async read(signal?: AbortSignal): Promise<LeaseState | undefined> {
    const epoch = await this.#newestEpoch(signal)
    return epoch === 0 ? undefined : this.#stateOf(epoch, signal)
  }

  async acquire(request: LeaseRequest): Promise<Lease> {
    const state = await this.read(request.signal)
    const claim = nextClaim(this.#directory, state, request, this.durationMs, randomHex(16))
    if (!isFreeFor(state, request.node)) throw new LeaseHeldError(this.#directory, state)
    return this.#claim(claim, request.signal)
  }

  async takeover(request: TakeoverRequest): Promise<Lease> {
    const { signal, force = false } = request
    const state = await this.#readForTakeover(request)
    const claim = nextClaim(this.#directory, state, request, this.durationMs, randomHex(16))
    if (state === undefined || isFreeFor(state, request.node) || force) return this.#claim(claim, signal)
    const last = await this.#watchSilence(state, request.node, signal)
    const lease = await this.#claim(claim, signal)
    // A beat between the last look and the claim: its holder may count on a whole duration from then on.
    if ((await this.#pulse(state.claim.epoch, signal)) !== last) {
      await delay(state.claim.durationMs + CLOCK_GRAIN_MS, undefined, { ...(signal && { signal }) })
      await lease.heartbeat()
    }
    return lease
  }

  async resume({ epoch, token }: { readonly epoch: number; readonly token: string }): Promise<Lease> {
    const claim = await this.#readClaim(epoch)
    if (claim === undefined || claim.token !== token) {
      throw new LeaseLostError(this.#directory, epoch, 'the claim is not on the store')
    }
    // Nobody knows when it beat last, so it counts as expired until it has.
    const lease = new Lease(this, this.#directory, claim, bootMs() - claim.durationMs)
    await lease.heartbeat()
    return lease
  }

  async check(epoch: number, signal?: AbortSignal): Promise<void> {
    await this.#standing(epoch, signal)
  }

  /** The claim of an epoch that is the newest one and was not given back. @throws {LeaseLostError} for another one */
  async #standing(epoch: number, signal?: AbortSignal): Promise<LeaseClaim> {
    const newest = await this.#newestEpoch(signal)
    if (newest !== epoch) {
      throw new LeaseLostError(
        this.#directory,
        epoch,
        newest === 0 ? 'there is no claim' : `epoch ${newest} was claimed`,
      )
    }
    const { claim, isReleased } = await this.#stateOf(epoch, signal)
    if (isReleased) throw new LeaseLostError(this.#directory, epoch, 'it was given back')
    return claim
  }

  async beat({ epoch, durationMs }: LeaseClaim): Promise<void> {
    await this.#within(writeDurably(this.#path(`${epoch}.beat`), `${randomHex(8)}\n`, 'w'), undefined, durationMs)
  }

  async assertNewest({ epoch, token }: LeaseClaim): Promise<void> {
    const claim = await this.#standing(epoch)
    if (claim.token !== token) {
      throw new LeaseLostError(this.#directory, epoch, 'the claim on the store is not this one')
    }
  }

  async release({ epoch }: LeaseClaim, to: string | undefined): Promise<void> {
    await this.#within(
      this.#publish(`${epoch}.released`, JSON.stringify({ format: 1, ...(to !== undefined && { to }) })),
    )
  }

  /** A claim that is damaged stands in nobody's way who forces. */
  async #readForTakeover({ signal, force = false, seenEpoch = 0 }: TakeoverRequest): Promise<LeaseState | undefined> {
    try {
      return await this.read(signal)
    } catch (error) {
      if (!force || !(error instanceof LeaseDamagedError)) throw error
      return unreadableState(Math.max(await this.#newestEpoch(signal), seenEpoch), this.durationMs)
    }
  }

  async #claim(claim: LeaseClaim, signal?: AbortSignal): Promise<Lease> {
    const startedMs = bootMs()
    const made = this.#publish(`${claim.epoch}.json`, `${JSON.stringify(claim)}\n`)
    if (!(await this.#within(made, signal))) {
      const found = await this.#readClaim(claim.epoch, signal)
      // A network file system may have done it, lost the answer, and found it done when it asked again.
      if (found?.token !== claim.token) throw new LeaseHeldError(this.#directory, await this.read(signal))
    }
    await this.beat(claim)
    await this.assertNewest(claim)
    await this.#within(this.#forget(claim.epoch - KEPT_CLAIMS), signal)
    return new Lease(this, this.#directory, claim, startedMs)
  }

  /**
   * Waits until the holder has been silent for its duration: by this machine's clock, and by the store's, so that one clock that
   * runs too fast takes nothing over. Returns the last pulse.
   * @throws {LeaseHeldError} when it beats
   */
  async #watchSilence(state: LeaseState, node: string, signal: AbortSignal | undefined): Promise<string> {
    const { epoch, durationMs } = state.claim
    const probe = this.#path(`.clock-${randomHex(8)}`)
    const storeMs = async () => {
      await writeFile(probe, '')
      await writeFile(probe, '.')
      return (await stat(probe)).mtimeMs
    }
    try {
      const first = await this.#pulse(epoch, signal)
      const startedMs = bootMs()
      let storeStartedMs = await this.#within(storeMs(), signal)
      const neededMs = durationMs + CLOCK_GRAIN_MS
      for (;;) {
        await delay(Math.min(durationMs / 4, 1000), undefined, { ...(signal && { signal }) })
        const now = await this.read(signal)
        if (now?.claim.token !== state.claim.token) throw new LeaseHeldError(this.#directory, now)
        if (isFreeFor(now, node)) return first
        const pulse = await this.#pulse(epoch, signal)
        if (pulse !== first) throw new LeaseHeldError(this.#directory, now, 'its holder lives')
        const storeNowMs = await this.#within(storeMs(), signal)
        // A store whose clock was set back is watched anew.
        storeStartedMs = Math.min(storeStartedMs, storeNowMs)
        const elapsedMs = bootMs() - startedMs
        if (elapsedMs >= neededMs && storeNowMs - storeStartedMs + CLOCK_GRAIN_MS >= durationMs) return pulse
        if (elapsedMs > 4 * neededMs) throw new LeaseHeldError(this.#directory, now, "the store's clock stands still")
      }
    } finally {
      await unlink(probe).catch(() => undefined)
    }
  }

  /** Changes whenever the holder shows that it lives. */
  async #pulse(epoch: number, signal: AbortSignal | undefined): Promise<string> {
    const path = this.#path(`${epoch}.beat`)
    return this.#within(
      (async () => {
        try {
          // Opening the file is what makes NFS ask the server.
          const content = await readFile(path, 'latin1')
          return `${content}${(await stat(path)).mtimeMs}`
        } catch (error) {
          if (errnoOf(error) === 'ENOENT') return ''
          throw error
        }
      })(),
      signal,
    )
  }

  async #newestEpoch(signal?: AbortSignal): Promise<number> {
    const names = await this.#within(readdir(this.#directory), signal)
    return names.reduce((newest, name) => Math.max(newest, epochOf(name, 'json') ?? 0), 0)
  }

  async #stateOf(epoch: number, signal?: AbortSignal): Promise<LeaseState> {
    const claim = await this.#readClaim(epoch, signal)
    if (claim === undefined) throw new LeaseDamagedError(this.#path(`${epoch}.json`), 'it vanished')
    const released = await this.#within(textOfFile(this.#path(`${epoch}.released`)), signal)
    if (released === undefined) return { claim, isReleased: false }
    return { claim, isReleased: true, releasedTo: recipientOf(released) }
  }

  async #readClaim(epoch: number, signal?: AbortSignal): Promise<LeaseClaim | undefined> {
    const path = this.#path(`${epoch}.json`)
    for (let attempt = 0; ; attempt++) {
      const text = await this.#within(textOfFile(path), signal)
      if (text === undefined) return undefined
      try {
        const claim = parseClaim(text, path)
        if (claim.epoch !== epoch) throw new LeaseDamagedError(path, `it is of epoch ${claim.epoch}`)
        return claim
      } catch (error) {
        // Where exclusive creation is all that a store has, a claim is seen before it is written.
        if (text.endsWith('\n') || attempt >= WRITING_LOOKS) throw error
        await delay(WRITING_MS, undefined, { ...(signal && { signal }) })
      }
    }
  }

  /** Creates a file with its whole content, durably. `false` when it was there already. */
  async #publish(name: string, content: string): Promise<boolean> {
    const path = this.#path(name)
    const temporary = this.#path(`.${name}-${randomHex(8)}`)
    await writeDurably(temporary, content, 'wx')
    try {
      if (!(await becomes(temporary, path, content))) return false
    } finally {
      await unlink(temporary).catch(() => undefined)
    }
    await syncDirectory(this.#directory)
    return true
  }

  async #forget(upTo: number): Promise<void> {
    for (const name of await readdir(this.#directory)) {
      const epoch = epochOf(name, 'json') ?? epochOf(name, 'beat') ?? epochOf(name, 'released')
      if (epoch !== undefined && epoch <= upTo) await unlink(this.#path(name)).catch(() => undefined)
    }
  }

  #path(name: string): string {
    return `${this.#directory}/${name}`
  }

  /** A store that hangs must not hang its user for ever. */
  async #within<T>(work: Promise<T>, signal?: AbortSignal, limitMs = this.durationMs): Promise<T> {
    const timer = new AbortController()
    try {
      const late = delay(Math.max(limitMs, 5000), undefined, { signal: timer.signal, ref: true }).then(() => {
        throw new LeaseUnreachableError(this.#directory, new Error('the store does not answer'))
      })
      const aborted = new Promise<never>((_, reject) => {
        signal?.addEventListener('abort', () => reject(signal.reason), { once: true, signal: timer.signal })
      })
      signal?.throwIfAborted()
      return await Promise.race([work, late, aborted])
    } catch (error) {
      const code = errnoOf(error)
      if (code === undefined) throw error
      throw new LeaseUnreachableError(this.#directory, error)
    } finally {
      timer.abort()
    }
  }
}

function epochOf(name: string, suffix: string): number | undefined {
  const [, digits, found] = /^([1-9][0-9]{0,14})\.(json|beat|released)$/.exec(name) ?? []
  return digits !== undefined && found === suffix ? Number(digits) : undefined
}

function recipientOf(text: string): string | undefined {
  try {
    const to = (JSON.parse(text) as { to?: unknown } | null)?.to
    return typeof to === 'string' ? to : undefined
  } catch {
    return undefined
  }
}

/** Gives a whole file its name if nothing has that: by a link, a rename that replaces nothing, or exclusive creation. */
async function becomes(temporary: string, path: string, content: string): Promise<boolean> {
  try {
    await link(temporary, path)
    return true
  } catch (error) {
    if (errnoOf(error) === 'EEXIST') return false
    // A store without hard links says so in many ways. What follows is as exclusive, and tells of its own failures.
  }
  const code = tryRename(AT_FDCWD, bytesOf(temporary), AT_FDCWD, bytesOf(path), RENAME_NOREPLACE)
  if (code === undefined) return true
  if (code === 'EEXIST') return false
  try {
    await writeDurably(path, content, 'wx')
    return true
  } catch (error) {
    if (errnoOf(error) === 'EEXIST') return false
    throw error
  }
}

async function writeDurably(path: string, content: string, flags: 'w' | 'wx'): Promise<void> {
  const file = await open(path, flags, 0o600)
  try {
    await file.writeFile(content)
    await file.sync()
  } finally {
    await file.close()
  }
}

async function syncDirectory(path: string): Promise<void> {
  const directory = await open(path)
  try {
    await directory.sync()
  } catch (error) {
    // Some FUSE file systems sync no directories.
    if (errnoOf(error) !== 'EINVAL' && errnoOf(error) !== 'ENOSYS') throw error
  } finally {
    await directory.close()
  }
}

async function textOfFile(path: string): Promise<string | undefined> {
  try {
    return await readFile(path, 'utf8')
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return undefined
    throw error
  }
}
