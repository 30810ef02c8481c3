import { randomHex } from '@lsync/posix'
import { z } from 'zod'
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

export interface EtcdLeasesOptions {
  /** `http://host:2379` or https, of all members; one that does not answer is passed over. */
  readonly endpoints: readonly string[]
  /** The root's name in etcd: keys are `lsync/<root>/claim` and `lsync/<root>/alive`. */
  readonly root: string
  readonly user?: { readonly name: string; readonly password: string } | undefined
  /** Default 30 s. etcd rounds it up to whole seconds, and to no less than its election time-out allows. */
  readonly durationMs?: number | undefined
}

const ATTEMPT_MS = 5000

// What of etcd's answers is read. Source: etcd's api/etcdserverpb/rpc.proto, as its JSON gateway writes it: 64-bit numbers as
// strings, zero and false left out.
const number64 = z.coerce.number().default(0)
const KeyValues = z.object({
  kvs: z.array(z.object({ key: z.string(), value: z.string().default(''), mod_revision: number64 })).default([]),
})
const Transaction = z.object({ succeeded: z.boolean().default(false) })
const Grant = z.object({ ID: z.string(), TTL: number64 })
const KeptAlive = z.object({ result: z.object({ TTL: number64 }) })
const Token = z.object({ token: z.string() })

/** A claim in etcd and, once given back, to whom. */
interface Found {
  readonly state: LeaseState
  readonly revision: number
  readonly isAlive: boolean
}

/**
 * Leases in etcd (3.4 and later, by its JSON gateway): the claim is one key, changed by transactions that compare its revision, and the
 * heartbeat a key that etcd itself lets expire, so that no clock but etcd's own counts. Every question goes to a quorum.
 */
export class EtcdLeases implements Leases, LeaseKeeper {
  readonly durationMs: number
  readonly #endpoints: readonly string[]
  readonly #user: EtcdLeasesOptions['user']
  readonly #claimKey: string
  readonly #aliveKey: string
  readonly #where: string
  /** etcd's own lease behind the heartbeat key, by epoch. */
  readonly #grants = new Map<number, string>()
  #token: string | undefined

  constructor(options: EtcdLeasesOptions) {
    this.durationMs = options.durationMs ?? DEFAULT_DURATION_MS
    this.#endpoints = options.endpoints.map((endpoint) => endpoint.replace(/\/+$/, ''))
    this.#user = options.user
    this.#claimKey = `lsync/${options.root}/claim`
    this.#aliveKey = `lsync/${options.root}/alive`
    this.#where = `etcd:${options.root}`
  }

  async read(signal?: AbortSignal): Promise<LeaseState | undefined> {
    return (await this.#find(signal))?.state
  }

  async acquire(request: LeaseRequest): Promise<Lease> {
    const found = await this.#find(request.signal)
    const claim = nextClaim(this.#where, found?.state, request, this.durationMs, randomHex(16))
    if (!isFreeFor(found?.state, request.node)) throw new LeaseHeldError(this.#where, found?.state)
    return this.#claim(claim, found?.revision ?? 0, request.signal)
  }

  async takeover(request: TakeoverRequest): Promise<Lease> {
    const { force = false, signal } = request
    const found = await this.#find(signal, { allowDamaged: force })
    const claim = nextClaim(this.#where, found?.state, request, this.durationMs, randomHex(16))
    // etcd keeps the key for a whole duration after the last beat, so a holder whose key is gone knows that it expired.
    if (found?.isAlive === true && !isFreeFor(found.state, request.node) && !force) {
      throw new LeaseHeldError(this.#where, found.state, 'its holder lives, or did a moment ago')
    }
    return this.#claim(claim, found?.revision ?? 0, signal)
  }

  async resume({ epoch, token }: { readonly epoch: number; readonly token: string }): Promise<Lease> {
    const found = await this.#find()
    if (found === undefined || found.state.claim.epoch !== epoch || found.state.claim.token !== token) {
      throw new LeaseLostError(this.#where, epoch, 'the claim is not the one in etcd')
    }
    const { claim } = found.state
    const lease = new Lease(this, this.#where, claim, bootMs() - claim.durationMs)
    await lease.heartbeat()
    return lease
  }

  async check(epoch: number, signal?: AbortSignal): Promise<void> {
    await this.#standing(epoch, signal)
  }

  /** The claim of an epoch that is the newest one and was not given back. @throws {LeaseLostError} for another one */
  async #standing(epoch: number, signal?: AbortSignal): Promise<LeaseClaim> {
    const found = await this.#find(signal)
    if (found === undefined) throw new LeaseLostError(this.#where, epoch, 'there is no claim')
    const { claim, isReleased } = found.state
    if (claim.epoch !== epoch) throw new LeaseLostError(this.#where, epoch, `epoch ${claim.epoch} was claimed`)
    if (isReleased) throw new LeaseLostError(this.#where, epoch, 'it was given back')
    return claim
  }

  async beat(claim: LeaseClaim): Promise<void> {
    const grant = this.#grants.get(claim.epoch)
    if (grant !== undefined) {
      const { result } = await this.#call('lease/keepalive', { ID: grant }, KeptAlive)
      if (result.TTL > 0) return
    }
    // The key has expired, or another process made it. If nobody claimed the root meanwhile it may stand again.
    const found = await this.#find()
    if (found === undefined || found.state.claim.token !== claim.token) {
      throw new LeaseLostError(this.#where, claim.epoch, 'another claim was made')
    }
    const ID = await this.#grant(claim)
    const put = { request_put: { key: base64(this.#aliveKey), value: base64(String(claim.epoch)), lease: ID } }
    if (!(await this.#compareAndDo(found.revision, [put]))) {
      throw new LeaseLostError(this.#where, claim.epoch, 'another claim was made')
    }
  }

  async assertNewest({ epoch, token }: LeaseClaim): Promise<void> {
    const claim = await this.#standing(epoch)
    if (claim.token !== token) throw new LeaseLostError(this.#where, epoch, 'the claim in etcd is not this one')
  }

  async release(claim: LeaseClaim, to: string | undefined): Promise<void> {
    const found = await this.#find()
    if (found?.state.claim.token !== claim.token) return
    const value = JSON.stringify({ ...claim, released: { ...(to !== undefined && { to }) } })
    await this.#compareAndDo(found.revision, [
      { request_put: { key: base64(this.#claimKey), value: base64(value) } },
      { request_delete_range: { key: base64(this.#aliveKey) } },
    ])
    const grant = this.#grants.get(claim.epoch)
    if (grant !== undefined) await this.#call('lease/revoke', { ID: grant }, z.object({}))
    this.#grants.delete(claim.epoch)
  }

  async #claim(claim: LeaseClaim, revision: number, signal?: AbortSignal): Promise<Lease> {
    const startedMs = bootMs()
    const ID = await this.#grant(claim, signal)
    const done = await this.#compareAndDo(
      revision,
      [
        { request_put: { key: base64(this.#claimKey), value: base64(JSON.stringify(claim)) } },
        { request_put: { key: base64(this.#aliveKey), value: base64(String(claim.epoch)), lease: ID } },
      ],
      signal,
    )
    // An answer may have been lost and the transaction tried again: then it failed because it had succeeded.
    const state = done ? undefined : await this.read(signal)
    if (!done && state?.claim.token !== claim.token) throw new LeaseHeldError(this.#where, state)
    return new Lease(this, this.#where, claim, startedMs)
  }

  async #grant(claim: LeaseClaim, signal?: AbortSignal): Promise<string> {
    const TTL = String(Math.ceil(claim.durationMs / 1000))
    const { ID } = await this.#call('lease/grant', { TTL, ID: '0' }, Grant, signal)
    this.#grants.set(claim.epoch, ID)
    return ID
  }

  /** A transaction that does its steps if the claim's key has not changed since `revision` (0: it was not there). */
  async #compareAndDo(revision: number, success: readonly object[], signal?: AbortSignal): Promise<boolean> {
    const compare = [{ key: base64(this.#claimKey), target: 'MOD', result: 'EQUAL', mod_revision: String(revision) }]
    return (await this.#call('kv/txn', { compare, success }, Transaction, signal)).succeeded
  }

  async #find(signal?: AbortSignal, { allowDamaged = false } = {}): Promise<Found | undefined> {
    const range = {
      key: base64(`${this.#claimKey.slice(0, -'claim'.length)}a`),
      range_end: base64(`${this.#claimKey}~`),
    }
    const { kvs } = await this.#call('kv/range', range, KeyValues, signal)
    const find = (key: string) => kvs.find((entry) => entry.key === base64(key))
    const found = find(this.#claimKey)
    if (found === undefined) return undefined
    const text = Buffer.from(found.value, 'base64').toString()
    const alive = find(this.#aliveKey)
    try {
      const claim = parseClaim(text, this.#where)
      const { released } = JSON.parse(text) as { released?: { to?: unknown } }
      const state = {
        claim,
        isReleased: released !== undefined,
        ...(typeof released?.to === 'string' && { releasedTo: released.to }),
      }
      const isAlive = alive !== undefined && Buffer.from(alive.value, 'base64').toString() === String(claim.epoch)
      return { state, revision: found.mod_revision, isAlive }
    } catch (error) {
      if (!allowDamaged || !(error instanceof LeaseDamagedError)) throw error
      const epoch = Number(/"epoch":\s*([1-9][0-9]{0,14})\b/.exec(text)?.[1] ?? 1)
      return { state: unreadableState(epoch, this.durationMs), revision: found.mod_revision, isAlive: true }
    }
  }

  /** Asks the members in turn until one answers. */
  async #call<T>(method: string, body: object, shape: z.ZodType<T>, signal?: AbortSignal): Promise<T> {
    let failure: unknown = new Error('no endpoint was named')
    for (const endpoint of this.#endpoints) {
      try {
        return shape.parse(await this.#post(endpoint, method, body, signal))
      } catch (error) {
        signal?.throwIfAborted()
        failure = error
      }
    }
    throw new LeaseUnreachableError(this.#where, failure)
  }

  async #post(
    endpoint: string,
    method: string,
    body: object,
    signal: AbortSignal | undefined,
    isAgain = false,
  ): Promise<unknown> {
    if (this.#user !== undefined && method !== 'auth/authenticate') {
      this.#token ??= await this.#authenticate(endpoint, this.#user, signal)
    }
    const token = this.#token
    const response = await fetch(`${endpoint}/v3/${method}`, {
      method: 'POST',
      body: JSON.stringify(body),
      headers: token === undefined ? {} : { Authorization: token },
      signal: AbortSignal.any([AbortSignal.timeout(ATTEMPT_MS), ...(signal === undefined ? [] : [signal])]),
    })
    const text = await response.text()
    if (response.ok) return JSON.parse(text)
    // Tokens live for some minutes, or as long as the member: then another one is asked for, once.
    if (token !== undefined && (response.status === 401 || /invalid auth token/.test(text))) {
      this.#token = undefined
      if (!isAgain) return this.#post(endpoint, method, body, signal, true)
    }
    throw new Error(`etcd says ${response.status}: ${text.trim().slice(0, 200)}`)
  }

  async #authenticate(
    endpoint: string,
    user: { name: string; password: string },
    signal?: AbortSignal,
  ): Promise<string> {
    return Token.parse(await this.#post(endpoint, 'auth/authenticate', user, signal)).token
  }
}

function base64(text: string): string {
  return Buffer.from(text).toString('base64')
}
