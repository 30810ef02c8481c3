import { setTimeout as delay } from 'node:timers/promises'
import { type ByteString, openRoot, withFd } from '@lsync/posix'
import type { Repository } from '@lsync/snapshot'
import { z } from 'zod'
import type { ContainerRoot } from './container-root.ts'
import { HomeMissingError } from './home.ts'
import { quiescenceByFreezer } from './quiescence.ts'
import { readRecord, replaceRecord } from './record-file.ts'
import type { RootStatus } from './status.ts'

const Every = z.int().min(1)

/** What is done for a root without being asked. Only the node that has the lease does it, but for `prefetch`. */
export const Policies = z.strictObject({
  /** A live version, so often, of a mounted root with changes; `cgroup` is frozen for its end. */
  solidify: z.strictObject({ everyMs: Every, cgroup: z.string().min(1).max(4096).exactOptional() }).exactOptional(),
  /**
   * Layers are folded when a mount has more than `maxLayers`; all of them, the base included, when more than `maxDepth` lie above it, or
   * when more than `maxShadowedBytes` of them are in no view, which is measured so often.
   */
  compact: z
    .strictObject({
      maxLayers: z.int().min(1).exactOptional(),
      maxDepth: z.int().min(1).exactOptional(),
      maxShadowedBytes: z.int().min(1).exactOptional(),
      measureEveryMs: Every.exactOptional(),
    })
    .exactOptional(),
  gc: z.strictObject({ keep: z.int().min(1), everyMs: Every.exactOptional() }).exactOptional(),
  /** The newest version's layers are in the cache of this node. */
  prefetch: z.literal(true).exactOptional(),
  /** The newest version is saved in a repository, so often; how it is opened is the caller's. */
  backup: z
    .strictObject({
      repository: z.string().min(1).max(4096),
      passwordFile: z.string().min(1).max(4096),
      everyMs: Every,
    })
    .exactOptional(),
})
export type Policies = z.infer<typeof Policies>

/** `policies.json` of a root on a node. */
export const PoliciesRecord = z.strictObject({ format: z.literal(1), policies: Policies })
export type PoliciesRecord = z.infer<typeof PoliciesRecord>

const POLICIES_JSON = 'policies.json' as ByteString

/** The policies of a root on this node; none where none were set. */
export function readPolicies({ statePath: path }: ContainerRoot): Policies {
  return withFd(openRoot(path), (fd) => readRecord({ fd, path }, POLICIES_JSON, PoliciesRecord)?.policies ?? {})
}

/** Replaces the policies of a root on this node, durably. */
export function writePolicies({ statePath: path }: ContainerRoot, policies: Policies): void {
  const record = PoliciesRecord.parse({ format: 1, policies })
  withFd(openRoot(path), (fd) => replaceRecord({ fd, path }, POLICIES_JSON, record))
}

export interface PoliciesOptions {
  readonly signal: AbortSignal
  /** Opens the repository of `backup`. */
  readonly connect?: (
    backup: NonNullable<Policies['backup']>,
    signal: AbortSignal,
  ) => Promise<{ readonly repository: Repository; close(): Promise<void> }>
  /** How often it is looked whether something is to be done. Default a minute. */
  readonly lookMs?: number
  readonly onDone?: (done: PolicyDone) => void
}

/** One thing that was done by a policy. */
export interface PolicyDone {
  readonly policy: keyof Policies
  /** What was done, as the verb reports it. */
  readonly report: object
}

const LOOK_MS = 60_000
const MEASURE_MS = 3_600_000
const GC_MS = 86_400_000

/**
 * Does for a root what its policies say, one after the other, as `ContainerRoot` would be asked to. What fails is told as `problem`, and is
 * tried again when its time comes.
 */
export class PolicyKeeper {
  readonly #root: ContainerRoot
  readonly #options: PoliciesOptions
  readonly #lastMs = new Map<string, number>()
  /** How far the sync was at the last live version: an upper that has not changed makes none. */
  #lastSequence: number | undefined

  constructor(root: ContainerRoot, options: PoliciesOptions) {
    this.#root = root
    this.#options = options
  }

  /** Looks again and again, until it is aborted. Changed policies count from the next look on. */
  async run(): Promise<void> {
    const { signal, lookMs = LOOK_MS } = this.#options
    while (!signal.aborted) {
      await this.look()
      await delay(lookMs, undefined, { signal }).catch(() => undefined)
    }
  }

  /** Does what is due now. */
  async look(): Promise<void> {
    const policies = readPolicies(this.#root)
    await this.#attempt('prefetch', () => this.#prefetch(policies))
    const status = await this.#root.status({ signal: this.#options.signal })
    if (status.lease?.isOurs !== true || status.lease.isReleased) return
    await this.#attempt('solidify', () => this.#solidify(policies, status))
    await this.#attempt('compact', () => this.#compact(policies))
    await this.#attempt('gc', () => this.#gc(policies))
    await this.#attempt('backup', () => this.#backup(policies))
  }

  async #prefetch({ prefetch }: Policies): Promise<object | undefined> {
    if (prefetch !== true) return undefined
    const head = this.#root.home.head().number
    if (this.#lastMs.get('prefetch') === head) return undefined
    const report = await this.#root.prefetch({ version: head, signal: this.#options.signal })
    this.#lastMs.set('prefetch', head)
    return report
  }

  async #solidify({ solidify }: Policies, status: RootStatus): Promise<object | undefined> {
    if (solidify === undefined || !status.isMounted || !status.hasChanges) return undefined
    const head = this.#root.home.head()
    if (head.createdAtMs + solidify.everyMs > Date.now() || !this.#isDue('solidify', solidify.everyMs)) return undefined
    const sequence = status.sync?.targets[0]?.checkpoint?.sequence
    if (sequence !== undefined && sequence === this.#lastSequence && status.liveVersion === head.number)
      return undefined
    const { cgroup } = solidify
    const report = await this.#root.solidify({
      live: true,
      message: 'by policy',
      signal: this.#options.signal,
      ...(cgroup === undefined ? {} : { quiescence: quiescenceByFreezer(cgroup) }),
    })
    this.#lastSequence = (await this.#root.status()).sync?.targets[0]?.checkpoint?.sequence
    return report
  }

  async #compact({ compact }: Policies): Promise<object | undefined> {
    if (compact === undefined) return undefined
    const { maxLayers, maxDepth, maxShadowedBytes, measureEveryMs = MEASURE_MS } = compact
    const { signal } = this.#options
    const layers = this.#root.home.requireLayers(this.#root.home.head().layers)
    const depth = layers.reduce((sum, { isBottom, covers }) => sum + (isBottom ? 0 : covers.length), 0)
    const measures = maxShadowedBytes !== undefined && layers.length > 1 && this.#isDue('measure', measureEveryMs)
    const { space } = measures ? await this.#root.status({ space: true, signal }) : {}
    const all = depth > (maxDepth ?? Number.POSITIVE_INFINITY) || (space?.shadowedBytes ?? 0) > (maxShadowedBytes ?? 0)
    if (!all && layers.length <= (maxLayers ?? Number.POSITIVE_INFINITY)) return undefined
    const asked = all ? { maxLayers: 1, intoBottom: true } : { maxLayers: maxLayers as number }
    const report = await this.#root.compact({ ...asked, signal })
    return report.layerId === undefined ? undefined : report
  }

  async #gc({ gc }: Policies): Promise<object | undefined> {
    if (gc === undefined || !this.#isDue('gc', gc.everyMs ?? GC_MS)) return undefined
    return this.#root.gc({ keep: gc.keep, signal: this.#options.signal })
  }

  async #backup({ backup }: Policies): Promise<object | undefined> {
    const { connect, signal } = this.#options
    if (backup === undefined || connect === undefined || !this.#isDue('backup', backup.everyMs)) return undefined
    const { repository, close } = await connect(backup, signal)
    try {
      const report = await this.#root.backup(repository, { signal })
      return report.isNew ? report : undefined
    } finally {
      await close()
    }
  }

  #isDue(what: string, everyMs: number): boolean {
    const nowMs = performance.now()
    const lastMs = this.#lastMs.get(what)
    if (lastMs !== undefined && lastMs + everyMs > nowMs) return false
    this.#lastMs.set(what, nowMs)
    return true
  }

  async #attempt(policy: keyof Policies, use: () => Promise<object | undefined>): Promise<void> {
    if (this.#options.signal.aborted) return
    try {
      const report = await use()
      if (report !== undefined) this.#options.onDone?.({ policy, report })
    } catch (error) {
      if (!this.#options.signal.aborted) this.#root.events.emit('problem', { verb: policy, error: error as Error })
    }
  }
}

/**
 * Follows a root and keeps its policies until it is aborted. It claims nothing: it begins when the root is mounted.
 * @throws {HomeMissingError} once the store is not there any more, or mounted anew: open the root again then
 */
export async function keepRoot(root: ContainerRoot, options: PoliciesOptions): Promise<void> {
  const { lookMs = LOOK_MS } = options
  const gone = new AbortController()
  const signal = AbortSignal.any([options.signal, gone.signal])
  const keeper = new PolicyKeeper(root, { ...options, signal })
  const follow = async () => {
    while (!signal.aborted) {
      // A copy that stays on this node is of use for live versions only.
      const isOfUse = root.home.record.layerForm === 'tree' || readPolicies(root).solidify !== undefined
      try {
        if (isOfUse) await root.follow({ signal, waits: true })
      } catch (error) {
        root.events.emit('problem', { verb: 'sync', error: error as Error })
      }
      await delay(lookMs, undefined, { signal }).catch(() => undefined)
    }
  }
  const watch = async () => {
    while (!signal.aborted) {
      if (!root.home.isInPlace()) gone.abort()
      await delay(lookMs, undefined, { signal }).catch(() => undefined)
    }
  }
  await Promise.all([follow(), watch(), keeper.run()])
  if (gone.signal.aborted) throw new HomeMissingError(root.home.path)
}
