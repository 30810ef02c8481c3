import { createHash } from 'node:crypto'
import {
  type Entry,
  type LayerItem,
  MARKS,
  type Meta,
  marksOf,
  type Namespace,
  piecesOf,
  readTarLayer,
  type Spool,
  type TarReadOptions,
} from '@lsync/overlay-merge'
import {
  type ByteString,
  type HostPath,
  S_IFBLK,
  S_IFCHR,
  S_IFDIR,
  S_IFIFO,
  S_IFLNK,
  S_IFREG,
  S_IFSOCK,
} from '@lsync/posix'
import type { Polynomial } from './chunk/polynomial.ts'
import { ChunkStream } from './chunk-stream.ts'
import { byPath, type CreateReport, type CreateRequest, describeSnapshot, normalized } from './create.ts'
import { formatTime } from './model/go-text.ts'
import { nodeTypeOf } from './model/mode.ts'
import { bareDirectory, encodeNode, type ObjectId, type TreeNode } from './model/tree.ts'
import { type ObjectWriter, withObjectWriter } from './object-writer.ts'
import type { Repository } from './repository.ts'
import { closeNode, emptyCounts, joinShown, openNode, type SaveProblem } from './save.ts'

export interface TarCreateRequest
  extends Pick<CreateRequest, 'tags' | 'hostname' | 'timeNs' | 'signal' | 'onProgress'> {
  /** The archive: plain, gzip or zstd. */
  readonly archive: AsyncIterable<Uint8Array>
  /** Absolute: what the snapshot calls the archive's root. */
  readonly path: HostPath
  /**
   * What the archive is. `plain` (the default): a tree, as `docker export` gives it. `oci`: a layer of an image, saved as the
   * kernel layer that it stands for. A namespace: the tar of a kernel layer.
   */
  readonly form?: 'plain' | 'oci' | Namespace
  readonly limits?: TarReadOptions['limits']
}

/**
 * Makes a snapshot of a tar archive without unpacking it anywhere. The same archive makes the same tree, whenever and
 * wherever: what a tar does not tell (change times, inode numbers, names of users) is not made up.
 *
 * The archive is read to its end before anything counts; one that is cut, hostile or absurd leaves no snapshot.
 * @throws {RepositoryLockedError} {CreateInvalidError} {ArchiveBrokenError} {LimitExceededError}
 * {LayerEntryRefusedError} and what the backend throws
 */
export async function createSnapshotOfTar(repository: Repository, request: TarCreateRequest): Promise<CreateReport> {
  const startMs = performance.now()
  const path = normalized(request.path)
  return withObjectWriter(repository, { exclusive: false, signal: request.signal }, async (writer, lock) => {
    const { signal } = lock
    const spool = new ChunkSpool(writer, repository.polynomial)
    // Items are asked for twice, and tell twice what is left out of them.
    const losses = new Map<string, SaveProblem>()
    const { form = 'plain', limits, archive, onProgress } = request
    let members = 0
    const { index } = await readTarLayer(archive, {
      form,
      spool,
      signal,
      // A directory that the archive only implies is no loss: there is nothing to be known of it.
      impliedMeta: () => NO_META,
      onLoss: ({ path: lost, what }) => {
        const shown = lost === '' ? path : joinShown(path, lost)
        losses.set(`${shown}\0${what}`, { path: shown, code: 'LOSS', message: `left out: ${what}` })
      },
      onMember: () => onProgress?.({ phase: 'save', done: ++members }),
      ...(limits === undefined ? {} : { limits }),
    })
    const builder = new TreeBuilder(writer, spool, form === 'oci' ? 'trusted' : form)
    const tree = await builder.build(path, () => index.items())
    await writer.flush()
    await lock.settled()
    const snapshotId = await repository.writeSnapshot(
      describeSnapshot({ ...request, paths: [path], tree, parent: undefined }),
      signal,
    )
    const { objectsAdded, addedBytes } = writer
    const counts = { ...spool.counts, objectsAdded, addedBytes }
    const problems = [...losses.values()].sort(byPath)
    const elapsedMs = performance.now() - startMs
    return { snapshotId, tree, parent: undefined, counts, problems, skipped: [], elapsedMs }
  })
}

const NO_META: Meta = { mode: 0o755, uid: 0, gid: 0, atimeNs: 0n, mtimeNs: 0n, xattrs: [] }

/** Cuts the data of files into chunks as it comes, and stores them. */
class ChunkSpool implements Spool {
  readonly counts = emptyCounts()
  readonly #contents = new Map<number, readonly ObjectId[]>()
  readonly #chunks: ChunkStream

  constructor(writer: ObjectWriter, polynomial: Polynomial) {
    this.#chunks = new ChunkStream(writer, polynomial)
  }

  async put(...[number, member, body]: Parameters<Spool['put']>): Promise<void> {
    let at = 0
    for await (const { offset, bytes } of piecesOf(member, body)) {
      await this.#chunks.addZeros(offset - at)
      await this.#chunks.add(bytes)
      at = offset + bytes.length
    }
    await this.#chunks.addZeros(member.sizeBytes - at)
    this.#contents.set(number, await this.#chunks.finish())
    this.counts.readBytes += member.sizeBytes
  }

  dataOf(): Record<never, never> {
    return {}
  }

  /** The chunks of a file. */
  contentOf(number: number): readonly ObjectId[] {
    return this.#contents.get(number) ?? []
  }
}

/** A directory whose content is still coming. */
interface Level {
  /** Beneath the archive's root. */
  readonly path: ByteString | ''
  /** Its node, up to where its tree belongs. */
  readonly node: string
  readonly nodes: string[]
}

/** Makes trees of the items of an archive, which come with each directory before its content. */
class TreeBuilder {
  readonly #writer: ObjectWriter
  readonly #spool: ChunkSpool
  readonly #namespace: 'plain' | Namespace
  /** How many names the inodes have that have several, and what stands for their number. */
  readonly #links = new Map<string, { count: number; readonly inode: number }>()

  constructor(writer: ObjectWriter, spool: ChunkSpool, namespace: 'plain' | Namespace) {
    this.#writer = writer
    this.#spool = spool
    this.#namespace = namespace
  }

  /** The tree of a snapshot that shows the items beneath `path`. */
  async build(path: HostPath, itemsOf: () => Iterable<LayerItem>): Promise<ObjectId> {
    for (const { entry } of itemsOf()) this.#countName(entry)
    const levels: Level[] = []
    const names = path.split('/').filter((name) => name !== '')
    let root: ObjectId | undefined
    const leave = async () => {
      const level = levels.pop() as Level
      const tree = await this.#writer.addTree(level.nodes)
      const above = levels.at(-1)
      if (above === undefined) root = tree
      else above.nodes.push(closeNode(level.node, tree))
    }
    for (const item of itemsOf()) {
      const { path: at } = item.entry
      while (levels.length > 0 && !isBeneath(at, (levels.at(-1) as Level).path)) await leave()
      const name = (at === '' ? (names.at(-1) ?? '') : at.slice(at.lastIndexOf('/') + 1)) as ByteString
      const node = this.#nodeOf(item, name)
      if (node.type === 'dir') levels.push({ path: at, node: openNode(node), nodes: [] })
      else (levels.at(-1) as Level).nodes.push(encodeNode(node))
    }
    // The last one is the archive's root itself.
    while (levels.length > 1) await leave()
    const last = levels[0] as Level
    await leave()
    return this.#writer.addAbove(path, last.node, root as ObjectId)
  }

  #countName(entry: Entry): void {
    if (entry.kind === 'whiteout' || entry.kind === 'directory' || entry.linkGroup === undefined) return
    const known = this.#links.get(entry.linkGroup)
    if (known !== undefined) known.count++
    else this.#links.set(entry.linkGroup, { count: 1, inode: numberFor(entry.path) })
  }

  #nodeOf(item: LayerItem, name: ByteString): TreeNode {
    const { counts } = this.#spool
    const { entry } = item
    if (entry.kind === 'whiteout') {
      counts.others++
      return { ...bareDirectory(name), type: 'chardev', mode: S_IFCHR, links: 1 }
    }
    const { meta } = entry
    const mtime = formatTime(meta.mtimeNs)
    const marks = this.#namespace === 'plain' ? [] : marksOf(item, MARKS[this.#namespace])
    const base: TreeNode = {
      ...bareDirectory(name),
      type: nodeTypeOf(formatOf(entry)),
      mode: formatOf(entry) | meta.mode,
      mtime,
      atime: mtime,
      ctime: mtime,
      uid: meta.uid,
      gid: meta.gid,
      xattrs: [...meta.xattrs, ...marks].map(({ name: attribute, value }) => [attribute, Buffer.from(value)]),
    }
    if (entry.kind === 'directory') {
      counts.directories++
      return base
    }
    const links = entry.linkGroup === undefined ? undefined : this.#links.get(entry.linkGroup)
    const linked = { links: links?.count ?? 1, inode: links !== undefined && links.count > 1 ? links.inode : 0 }
    if (entry.kind !== 'file') {
      counts.others++
      if (entry.kind === 'symlink') return { ...base, ...linked, linkTarget: entry.target }
      const isDevice = entry.type === 'character' || entry.type === 'block'
      return isDevice ? { ...base, ...linked, device: entry.rdev } : base
    }
    counts.filesNew++
    counts.totalBytes += entry.sizeBytes
    const content = item.spooled === undefined ? [] : this.#spool.contentOf(item.spooled)
    return { ...base, ...linked, sizeBytes: entry.sizeBytes, content }
  }
}

function isBeneath(path: string, directory: string): boolean {
  return path !== '' && (directory === '' || path.startsWith(`${directory}/`))
}

const FORMATS = { fifo: S_IFIFO, socket: S_IFSOCK, character: S_IFCHR, block: S_IFBLK } as const

function formatOf(entry: Exclude<Entry, { kind: 'whiteout' }>): number {
  if (entry.kind === 'special') return FORMATS[entry.type]
  return entry.kind === 'file' ? S_IFREG : entry.kind === 'directory' ? S_IFDIR : S_IFLNK
}

/** A number that is the same for the same first name of an inode, whatever else an archive has. */
function numberFor(path: string): number {
  return createHash('sha256').update(path, 'latin1').digest().readUIntBE(0, 6)
}
