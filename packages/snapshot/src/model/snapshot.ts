import { type ByteString, bytesOf, LsyncError, textOf } from '@lsync/posix'
import { jsonText, parseTime } from './go-text.ts'
import { isId, type ObjectId } from './tree.ts'

/** One version of a tree. Source: restic's design document, "Snapshots". */
export interface Snapshot {
  readonly id: ObjectId
  /** RFC 3339. */
  readonly time: string
  readonly parent: ObjectId | undefined
  readonly tree: ObjectId
  /** What was saved: absolute paths. */
  readonly paths: readonly ByteString[]
  readonly hostname: string
  readonly username: string
  readonly uid: number
  readonly gid: number
  readonly excludes: readonly string[]
  readonly tags: readonly string[]
  /** The snapshot that this one had been before its tags changed, or before it was copied. */
  readonly original: ObjectId | undefined
  /** Fields that newer writers have. They stay when tags change. */
  readonly others: Readonly<Record<string, unknown>>
}

/** A snapshot's file makes no sense. */
export class SnapshotInvalidError extends LsyncError {
  constructor(snapshotId: ObjectId, why: string) {
    super('SNAPSHOT_INVALID', `snapshot ${snapshotId.slice(0, 8)} is not valid: ${why}`, {
      path: snapshotId,
      hint: 'see `lsync snapshot check`',
    })
  }
}

/** The JSON of a snapshot's file. */
export function encodeSnapshot(snapshot: Omit<Snapshot, 'id'>): Buffer {
  const { time, parent, tree, paths, hostname, username, uid, gid, excludes, tags, original, others } = snapshot
  const list = (name: string, values: readonly string[]) =>
    values.length === 0 ? [] : [`"${name}":[${values.map(jsonText).join(',')}]`]
  const fields = [
    `"time":"${time}"`,
    ...(parent === undefined ? [] : [`"parent":"${parent}"`]),
    `"tree":"${tree}"`,
    // Bytes that are not UTF-8 cannot be told here; the tree has them.
    `"paths":[${paths.map((path) => jsonText(textOf(path).toWellFormed())).join(',')}]`,
    ...(hostname === '' ? [] : [`"hostname":${jsonText(hostname)}`]),
    ...(username === '' ? [] : [`"username":${jsonText(username)}`]),
    ...(uid === 0 ? [] : [`"uid":${uid}`]),
    ...(gid === 0 ? [] : [`"gid":${gid}`]),
    ...list('excludes', excludes),
    ...list('tags', tags),
    ...(original === undefined ? [] : [`"original":"${original}"`]),
    ...Object.entries(others).map(([name, value]) => `${jsonText(name)}:${JSON.stringify(value)}`),
  ]
  return Buffer.from(`{${fields.join(',')}}`)
}

/**
 * Reads a snapshot's file.
 * @throws {SnapshotInvalidError}
 */
export function decodeSnapshot(id: ObjectId, content: Buffer): Snapshot {
  let raw: unknown
  try {
    raw = JSON.parse(content.toString())
  } catch {
    throw new SnapshotInvalidError(id, 'it is not JSON')
  }
  if (typeof raw !== 'object' || raw === null) throw new SnapshotInvalidError(id, 'it is not an object')
  const { time, parent, tree, paths, hostname, username, uid, gid, excludes, tags, original, ...others } =
    raw as Readonly<Record<string, unknown>>
  if (typeof time !== 'string' || parseTime(time) === undefined) throw new SnapshotInvalidError(id, 'it has no time')
  if (!isId(tree)) throw new SnapshotInvalidError(id, 'it has no tree')
  return {
    id,
    time,
    parent: isId(parent) ? parent : undefined,
    tree,
    paths: texts(paths).map((path) => bytesOf(path.toWellFormed())),
    hostname: typeof hostname === 'string' ? hostname : '',
    username: typeof username === 'string' ? username : '',
    uid: typeof uid === 'number' ? uid : 0,
    gid: typeof gid === 'number' ? gid : 0,
    excludes: texts(excludes),
    tags: texts(tags),
    original: isId(original) ? original : undefined,
    others,
  }
}

function texts(list: unknown): string[] {
  return Array.isArray(list) ? list.filter((item): item is string => typeof item === 'string') : []
}
