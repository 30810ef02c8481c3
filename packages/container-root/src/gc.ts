import type { Home } from './home.ts'
import { chooseLayers } from './layer-choice.ts'
import type { LeaseClaim } from './lease.ts'
import type { LayerRecord, VersionRecord } from './records.ts'

/** What `gc` keeps. The newest version, versions with tags, and what a node has in use stay in any case. */
export interface GcPolicy {
  /** Of the newest versions so many. Default 10. */
  readonly keep?: number
  /** A layer that no version names can be one that is about to be named: it is kept for so long. Default a day. */
  readonly graceMs?: number
  /** The newest claim. Copies of uppers from before it go, once it is known for `graceMs`: until then a dead node's can be saved. */
  readonly claim?: Pick<LeaseClaim, 'epoch' | 'takenAt'>
  readonly dryRun?: boolean
  readonly signal?: AbortSignal
}

export interface GcReport {
  readonly versions: readonly number[]
  readonly layers: readonly string[]
  /** Layers that came into use again while they were taken away, and were brought back. */
  readonly restored: readonly string[]
  /** `EPOCH/NAME` in the incoming area: copies of uppers that nobody may publish, and what killed processes left. */
  readonly incoming: readonly string[]
}

const KEEP = 10
const GRACE_MS = 86_400_000

/**
 * Removes versions beyond the policy, and layers that nobody needs. Safe beside everything else on any node: a layer first
 * loses its name, then it is looked again whether somebody needs it, and whoever publishes or mounts looks after saying so.
 * Killed anywhere, the next run goes on.
 */
export async function collectGarbage(home: Home, policy: GcPolicy = {}): Promise<GcReport> {
  const { dryRun = false, graceMs = GRACE_MS, signal } = policy
  const restored = dryRun ? [] : restoreNeeded(home)
  const all = home.versions()
  const drop = versionsToDrop(all, home, policy.keep ?? KEEP)
  const kept = all.filter(({ number }) => !drop.includes(number))
  const named = new Set(all.flatMap(({ layers }) => layers))
  const needed = layersNeeded(home, kept)
  const oldMs = Date.now() - graceMs
  const layers = home
    .layers()
    .filter(({ id, covers, createdAtMs }) => !needed.has(id) && (named.has(covers[0] as string) || createdAtMs < oldMs))
    .map(({ id }) => id)
  const { epoch = 0, takenAt } = policy.claim ?? {}
  const isOver = takenAt !== undefined && Date.parse(takenAt) < oldMs
  const incoming = home.removeOldIncoming(isOver ? epoch : 0, oldMs, dryRun)
  if (dryRun) return { versions: drop, layers, restored, incoming }
  // Those that never counted first, while what makes them not count is there.
  for (const number of [...home.overtakenVersions(), ...drop]) home.trashVersion(number)
  for (const number of home.neededNoMoreFences()) home.trashVersion(number)
  home.dropOldClaims()
  for (const id of layers) {
    signal?.throwIfAborted()
    home.trashLayer(id)
  }
  // In this order: another gc may take something away right now that it has to look at yet.
  const gone = home.trashNames()
  const back = restoreNeeded(home)
  home.emptyTrash(gone)
  return {
    versions: drop,
    layers: layers.filter((id) => !back.includes(id)),
    restored: [...restored, ...back],
    incoming,
  }
}

function versionsToDrop(versions: readonly VersionRecord[], home: Home, keep: number): number[] {
  const inUse = new Set(usesOf(home).map(({ version }) => version))
  return versions
    .slice(0, Math.max(0, versions.length - Math.max(1, keep)))
    .filter(({ number, tags = [] }) => tags.length === 0 && !inUse.has(number))
    .map(({ number }) => number)
}

/** The layers that the versions are mounted from, and those in use. */
function layersNeeded(home: Home, versions: readonly VersionRecord[]): Set<string> {
  const available = home.layers()
  const needed = new Set(usesOf(home).flatMap(({ layers }) => layers))
  for (const { layers } of versions) {
    for (const { id } of chooseLayers(layers, available) ?? available.filter((one) => layers.includes(one.id))) {
      needed.add(id)
    }
  }
  return needed
}

/** Brings back what was taken away though a version or a node needs it. */
function restoreNeeded(home: Home): string[] {
  const trashed = home.trashedLayers()
  if (trashed.length === 0) return []
  const gone = new Set(trashed.map(({ id }) => id))
  const candidates = [...home.layers(), ...trashed]
  const cost = ({ id }: LayerRecord) => (gone.has(id) ? 1_000_000 : 1)
  const wanted = new Set(usesOf(home).flatMap(({ layers }) => layers))
  for (const { layers } of home.versions()) {
    for (const { id } of chooseLayers(layers, candidates, cost) ?? []) wanted.add(id)
  }
  return home.restoreTrashed(({ id }) => wanted.has(id))
}

/** What nodes have in use. Whoever only read it a day ago has long ended. */
function usesOf(home: Home): ReturnType<Home['mounted']> {
  const oldMs = Date.now() - GRACE_MS
  return home.mounted().filter(({ purpose, sinceMs }) => purpose === 'mount' || sinceMs > oldMs)
}
