import type { ByteString } from '@lsync/posix'
import { LsyncError } from '@lsync/posix'
import { isMatched, parsePatterns } from './model/exclude.ts'
import type { NodeType } from './model/mode.ts'
import type { Snapshot } from './model/snapshot.ts'
import { ObjectTable } from './object-table.ts'
import { readAhead } from './read-ahead.ts'
import type { Repository } from './repository.ts'
import type { Located } from './select.ts'
import { type ShownNode, visitTrees, walkTree } from './walk.ts'

/** What lies at a place of a snapshot and, if it is a directory, beneath it: each directory before what is in it. */
export async function* listContent(
  repository: Repository,
  { path, node, tree }: Located,
  options: { readonly isRecursive?: boolean; readonly signal?: AbortSignal | undefined } = {},
): AsyncGenerator<ShownNode> {
  if (node !== undefined) yield { path, node }
  if (tree !== undefined) yield* walkTree(repository, tree, path, options)
}

export interface FindRequest {
  readonly snapshots: readonly Snapshot[]
  /** Of the form of create's `--exclude`; one that matches is enough. */
  readonly patterns: readonly string[]
  readonly types?: readonly NodeType[]
  readonly signal?: AbortSignal | undefined
}

/** Names in snapshots that match; directories that match are not looked into for more of the same match. */
export async function* findInSnapshots(
  repository: Repository,
  { snapshots, patterns, types, signal }: FindRequest,
): AsyncGenerator<ShownNode & { readonly snapshot: Snapshot }> {
  const wanted = parsePatterns(patterns)
  for (const snapshot of snapshots) {
    let matchedAbove: string | undefined
    for await (const { path, node } of walkTree(repository, snapshot.tree, '/' as ByteString, { signal })) {
      if (matchedAbove !== undefined && path.startsWith(matchedAbove)) continue
      if (!isMatched(wanted, path)) continue
      if (node.type === 'dir') matchedAbove = `${path}/`
      if (types === undefined || types.includes(node.type)) yield { snapshot, path, node }
    }
  }
}

/** What was asked to be written out has no content. */
export class ContentNoneError extends LsyncError {
  constructor(path: ByteString) {
    super('CONTENT_NONE', 'only a file has content to write out', { path, hint: 'restore it instead' })
  }
}

/** The content of a file, chunk by chunk, each checked against its hash. @throws {ContentNoneError} */
export async function* dumpFile(
  repository: Repository,
  { path, node }: Located,
  signal?: AbortSignal,
): AsyncGenerator<Buffer> {
  if (node?.content === undefined) throw new ContentNoneError(path)
  yield* readAhead(repository, node.content, signal)
}

/** What some snapshots hold and take. */
export interface SnapshotStats {
  readonly snapshots: number
  readonly files: number
  readonly directories: number
  /** What restoring each of them would write, links counted once. */
  readonly restoreBytes: number
  /** Different objects that they need, their content, and what they take in packs. */
  readonly objects: number
  readonly contentBytes: number
  readonly storedBytes: number
}

/** Counts what snapshots hold. The index is loaded. */
export async function measureSnapshots(
  repository: Repository,
  snapshots: readonly Snapshot[],
  signal?: AbortSignal,
): Promise<SnapshotStats> {
  let [files, directories, restoreBytes, objects, contentBytes, storedBytes] = [0, 0, 0, 0, 0, 0]
  const seen = new ObjectTable()
  const note = (kind: 'data' | 'tree', id: string) => {
    seen.grow()
    if (!seen.claim(kind, id)) return
    const location = repository.table.locate(kind, id)
    objects++
    contentBytes += location === undefined ? 0 : (location.uncompressedLength ?? location.length - 32)
    storedBytes += location?.length ?? 0
  }
  for (const { tree } of snapshots) {
    const links = new Set<string>()
    for await (const { node } of walkTree(repository, tree, '/' as ByteString, { signal })) {
      if (node.type === 'dir') directories++
      if (node.type !== 'file') continue
      files++
      const key = `${node.deviceId}:${node.inode}`
      if (node.links < 2 || !links.has(key)) restoreBytes += node.sizeBytes
      if (node.links > 1) links.add(key)
    }
  }
  const roots = snapshots.map(({ tree }) => ({ id: tree, path: '/' as ByteString }))
  await visitTrees(
    repository,
    roots,
    {
      tree: (id, nodes) => {
        note('tree', id)
        for (const { content } of nodes) for (const piece of content ?? []) note('data', piece)
      },
      problem: (_id, _path, error) => {
        throw error
      },
    },
    signal,
  )
  return { snapshots: snapshots.length, files, directories, restoreBytes, objects, contentBytes, storedBytes }
}
