import { type HostPath, LsyncError, printable } from '@lsync/posix'
import { z } from 'zod'

export const RECORD_ID = /^[0-9a-f]{32}$/
/** The name of a layer, of a root or of a node: 32 random hex digits, which lead nowhere as part of a path. */
export const RecordId = z.string().regex(RECORD_ID)
export type RecordId = z.infer<typeof RecordId>

/** Numbers of versions; 1 is what `init` publishes. */
const VersionNumber = z.int().positive()
/** What people write: one line, without control characters. */
const Line = z
  .string()
  .max(1000)
  .regex(/^[^\u0000-\u001f\u007f]*$/)
/** The name of a root on a node, and of a tag: one component of a path. */
export const RootName = z.string().regex(/^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$/)
const AtMs = z.int().nonnegative()

/**
 * Who keeps the right to write a root. It is said once for all nodes, in the home: two that asked different keepers would both have it.
 * Default: files in the home.
 */
export const LeaseKeeping = z.strictObject({
  /** `http://host:2379` or https, of all members. */
  etcd: z
    .array(z.url({ protocol: /^https?$/ }))
    .min(1)
    .max(100)
    .exactOptional(),
  /** How long a claim stands after its last heartbeat. */
  durationMs: z.int().min(1000).max(86_400_000).exactOptional(),
})
export type LeaseKeeping = z.infer<typeof LeaseKeeping>

/** `root.json` of a home: what the home is of. Written once. */
export const RootRecord = z.strictObject({
  format: z.literal(1),
  id: RecordId,
  createdAtMs: AtMs,
  /** Whose marks the layers have. */
  namespace: z.enum(['trusted', 'user']),
  /** How new layers are kept: as directories, or each as one image. What is there in the other form stays good. */
  layerForm: z.enum(['tree', 'sealed']),
  /** The version of another root that this one began as. */
  forkedFrom: z.strictObject({ rootId: RecordId, version: VersionNumber }).exactOptional(),
  lease: LeaseKeeping.exactOptional(),
})
export type RootRecord = z.infer<typeof RootRecord>

/** `layer.json` of a layer. Written before the layer has its place, and never again. */
export const LayerRecord = z.strictObject({
  format: z.literal(1),
  id: RecordId,
  /** `tree`: the directory `tree`. `erofs`: the image `layer.erofs`. */
  form: z.enum(['tree', 'erofs']),
  /** A bottom has nothing beneath it, and neither whiteouts nor marks that would say something of it. */
  isBottom: z.boolean(),
  /**
   * The layers that this one stands for, top first, as versions name them: itself, or those that were compacted into it. A
   * bottom stands for them only at the end of a version's list.
   */
  covers: z.array(RecordId).min(1).max(10_000),
  madeBy: z.enum(['init', 'solidify', 'live', 'compact', 'fork', 'seal']),
  createdAtMs: AtMs,
  /** Names in the layer, whiteouts included, and bytes in its files, where they were counted. */
  entries: z.int().nonnegative().exactOptional(),
  contentBytes: z.int().nonnegative().exactOptional(),
  /** An image: its size, and the SHA-256 of it. */
  image: z.strictObject({ sizeBytes: z.int().positive(), sha256: z.string().regex(/^[0-9a-f]{64}$/) }).exactOptional(),
})
export type LayerRecord = z.infer<typeof LayerRecord>

/** `versions/<number>.json`. Created exclusively, and never changed. */
export const VersionRecord = z.strictObject({
  format: z.literal(1),
  number: VersionNumber,
  /** The version that it was made on; absent in the first. */
  parent: VersionNumber.exactOptional(),
  /** The lease under which it was published; 0: by `init`, before anybody could have one. */
  epoch: z.int().nonnegative(),
  /** Top first. */
  layers: z.array(RecordId).min(1).max(10_000),
  madeBy: z.enum(['init', 'solidify', 'live', 'rollback', 'fork']),
  /** Rollback: the version whose layers these are. */
  sameAs: VersionNumber.exactOptional(),
  createdAtMs: AtMs,
  /** The node that published it, and its name then. */
  nodeId: RecordId,
  nodeName: Line,
  message: Line.exactOptional(),
  tags: z.array(RootName).max(100).exactOptional(),
})
export type VersionRecord = z.infer<typeof VersionRecord>

/**
 * `versions/<number>.json`, too: no version, but what whoever took a lease over puts in the place of the next one. What was
 * published under an older lease after that does not count.
 */
export const FenceRecord = z.strictObject({
  format: z.literal(1),
  number: VersionNumber,
  /** The lease that begins here. */
  epoch: z.int().positive(),
  isFence: z.literal(true),
})
export type FenceRecord = z.infer<typeof FenceRecord>

/** `mounted/<id>.json` of a home: what a node uses, so that nobody removes it. */
export const MountedRecord = z.strictObject({
  format: z.literal(1),
  /** `mount`: under the upper of a node. `work`: read for a while; it counts for a day. */
  purpose: z.enum(['mount', 'work']),
  /** The node's for a mount, else one of its own. */
  id: RecordId,
  nodeId: RecordId,
  nodeName: Line,
  /** The version that lies under the node's upper. */
  version: VersionNumber,
  /** The layers that its mount has, as they are on the store. */
  layers: z.array(RecordId).min(1).max(10_000),
  epoch: z.int().nonnegative(),
  sinceMs: AtMs,
})
export type MountedRecord = z.infer<typeof MountedRecord>

/** `node.json` in the state of a node. */
export const NodeRecord = z.strictObject({ format: z.literal(1), id: RecordId, name: Line })
export type NodeRecord = z.infer<typeof NodeRecord>

/** `errors.json` of a root on a node: what failed last, the newest first. Replaced as a whole. */
export const ErrorsRecord = z.strictObject({
  format: z.literal(1),
  errors: z
    .array(
      z.strictObject({
        atMs: AtMs,
        verb: z.string().max(100),
        code: z.string().max(100),
        message: z.string().max(4000),
      }),
    )
    .max(10),
})
export type ErrorsRecord = z.infer<typeof ErrorsRecord>

/** `cache.json` in the state of a node: how much its cache of layers may hold. Replaced as a whole. */
export const CacheRecord = z.strictObject({ format: z.literal(1), limitBytes: z.int().nonnegative() })
export type CacheRecord = z.infer<typeof CacheRecord>

/** The right to write that a node has, to take it up again in another process. */
const HeldLease = z.strictObject({ epoch: z.int().positive(), token: RecordId })

/** `config.json` of a root on a node. Replaced as a whole. */
export const NodeRootRecord = z.strictObject({
  format: z.literal(1),
  name: RootName,
  /** The home's path on this node, without symlinks; bytes as `textOf` writes them. */
  home: z.string().min(1).max(20_000),
  rootId: RecordId,
  /** What lies under the upper. */
  base: z.strictObject({ version: VersionNumber, layers: z.array(RecordId).min(1).max(10_000) }),
  /** The upper: the id that it gets as a layer. Until then its copy on the store is `incoming/<epoch>/<id>/tree`. */
  upperId: RecordId,
  /** The epoch in whose directory the copy lies. */
  incomingEpoch: z.int().nonnegative(),
  /** The last version that was made of this upper while it stayed in use; the next one replaces its layer. */
  liveVersion: VersionNumber.exactOptional(),
  lease: HeldLease.exactOptional(),
  /** The highest epoch that this node has seen. */
  seenEpoch: z.int().nonnegative(),
})
export type NodeRootRecord = z.infer<typeof NodeRootRecord>

/** `journal/solidify.json` of a root on a node, while a solidify is under way. Replaced as a whole at each step. */
export const SolidifyRecord = z.strictObject({
  format: z.literal(1),
  /**
   * `syncing`: nothing of it is visible. `promoting`: the layer gets its place, and then its version. `published`: the version
   * is there; what is left is to make the upper the layer's replica.
   */
  step: z.enum(['syncing', 'promoting', 'published']),
  isLive: z.boolean(),
  layerId: RecordId,
  /** A sealed layer of what changed last, on top of that one; the same id where it is all that there is. */
  deltaId: RecordId.exactOptional(),
  /** The upper that follows; stopped only. */
  nextUpperId: RecordId,
  epoch: z.int().positive(),
  /** What the version will be made on, and its layers. */
  parent: VersionNumber,
  layers: z.array(RecordId).min(1).max(10_000),
  createdAtMs: AtMs,
  message: Line.exactOptional(),
  tags: z.array(RootName).max(100).exactOptional(),
  /** The version that was published. */
  version: VersionNumber.exactOptional(),
  wasMounted: z.boolean(),
  /** The upper was given back to the container, while nobody could say whether the version is there. */
  ranOn: z.boolean(),
  /** A cgroup that is frozen meanwhile, and thawed by whoever recovers. */
  cgroup: z.string().min(1).max(4096).exactOptional(),
})
export type SolidifyRecord = z.infer<typeof SolidifyRecord>

/** A record of a home or a node's state cannot be read. */
export class RecordDamagedError extends LsyncError {
  constructor(path: string, why: string) {
    super('RECORD_DAMAGED', `${printable(path)} cannot be read: ${why}`, {
      path,
      hint: 'restore it from a backup of the store; nothing was changed',
    })
  }
}

/** A record was written by an lsync that knows more than this one. */
export class RecordNewerError extends LsyncError {
  constructor(path: string, format: number) {
    super('RECORD_NEWER', `${printable(path)} has format ${format}, which this lsync does not know`, {
      path,
      hint: 'use the newest lsync on every node',
    })
  }
}

/** Records are small; a file that is not is none of ours. */
export const RECORD_MAX_BYTES = 1 << 20

/**
 * Reads a record of format 1.
 * @throws {RecordNewerError} if its format is a later one
 * @throws {RecordDamagedError} if it is anything else than such a record
 */
export function parseRecord<T extends z.ZodType>(shape: T, text: string, path: HostPath): z.infer<T> {
  const found = checkRecord(shape, text)
  if ('record' in found) return found.record
  if ('newerFormat' in found) throw new RecordNewerError(path, found.newerFormat)
  throw new RecordDamagedError(path, found.why)
}

/** What a text says as a record of format 1, or why it is none. */
export function checkRecord<T extends z.ZodType>(
  shape: T,
  text: string,
): { readonly record: z.infer<T> } | { readonly newerFormat: number } | { readonly why: string } {
  let raw: unknown
  try {
    raw = JSON.parse(text)
  } catch {
    return { why: 'it is no JSON' }
  }
  const format = (raw as { format?: unknown } | null)?.format
  if (typeof format === 'number' && format > 1) return { newerFormat: format }
  const parsed = shape.safeParse(raw)
  if (parsed.success) return { record: parsed.data }
  const issues = parsed.error.issues.map((issue) => `${issue.path.join('.') || 'record'}: ${issue.message}`)
  return { why: issues.join('; ') }
}
