import type { ByteString } from '@lsync/posix'
import {
  SFTP_CREATE,
  SFTP_EXCLUSIVE,
  SFTP_READ,
  SFTP_WRITE,
  type SftpAttributes,
  type SftpClient,
  type SftpEntry,
  SftpError,
} from '@lsync/ssh'
import { type DescribedFile, describeShown } from '../describe.ts'
import type { Extent, Operation, RawMeta, TreePath } from '../model/operation.ts'
import type { ContentOperation } from '../protocol/operation-codec.ts'
import { checkPath, OperationRefusedError, placeOf, STATE_INSIDE } from '../target-path.ts'
import type { FileSink, OperationSink, PlainOperation } from './sftp-lane.ts'
import { isDirectory, moveOver, removeTree, type SftpPlace } from './sftp-place.ts'
import type { TargetLoss } from './target.ts'

const S_IFMT = 0o170000
const S_IFREG = 0o100000
const MAX_SECONDS = 0xffff_ffff
const ZEROS = Buffer.alloc(256 << 10)

/**
 * Operations as a tree on an SFTP server. What SFTP has no words for is left out, and named in the losses.
 *
 * SFTP takes paths and follows the symlinks in them. Each parent directory is therefore asked for by its path without
 * symlinks before it is used, which whoever may write on the server itself can still race against (docs/security.md).
 */
export class SftpTree implements OperationSink {
  readonly #client: SftpClient
  readonly #place: SftpPlace
  readonly #losses: ReadonlySet<TargetLoss['what']>
  readonly #parents = new Map<string, Promise<void>>()
  /** Trees that were taken away; a barrier waits until they are gone. */
  #cleaning: Promise<void> = Promise.resolve()

  constructor(client: SftpClient, place: SftpPlace, losses: ReadonlySet<TargetLoss['what']>) {
    this.#client = client
    this.#place = place
    this.#losses = losses
  }

  async apply(operation: PlainOperation): Promise<void> {
    switch (operation.do) {
      case 'remove':
        return this.#remove(operation.path)
      case 'out':
        return this.#out(operation.path, operation.stage)
      case 'in':
        return this.#in(operation.stage, operation.path)
      case 'rename':
        return this.#rename(operation.from, operation.to)
      case 'directory':
        return this.#directory(operation.path)
      case 'keep':
        return this.#keep(operation)
      case 'link':
        return this.#link(operation.path, operation.to)
      case 'symlink':
        return this.#symlink(operation)
      case 'special':
        // It cannot be there, and neither may what was there before.
        return this.#remove(operation.path)
      case 'meta':
        return this.#setMeta(operation)
    }
  }

  async open(operation: ContentOperation): Promise<FileSink> {
    const path = await this.#named(operation.path)
    if (operation.do === 'patch' && operation.shared) return this.#openShared(path, operation)
    const temporary = this.#place.temporary()
    const handle = await this.#client.open(temporary, SFTP_WRITE | SFTP_CREATE | SFTP_EXCLUSIVE)
    const discard = async () => {
      await this.#client.close(handle)
      await this.#client.remove(temporary)
    }
    try {
      if (operation.do === 'patch') await this.#copyBase(path, handle, operation)
    } catch (error) {
      await discard()
      throw error
    }
    return this.#writer(handle, operation, {
      discard,
      finish: async () => {
        await this.#client.close(handle)
        this.#forget(operation.path)
        await this.#over(temporary, path)
      },
    })
  }

  /** The files in a directory as their attributes show them, without those that are said to have several names. */
  async describe(path: TreePath): Promise<readonly DescribedFile[]> {
    let entries: readonly SftpEntry[]
    try {
      entries = await this.#client.readdir(await this.#directoryPath(path))
    } catch (error) {
      // Whatever it is, a directory takes its place.
      if (error instanceof SftpError || error instanceof OperationRefusedError) return []
      throw error
    }
    const owner = !this.#losses.has('owner')
    return entries.flatMap(({ name, attributes, links = 1 }) => {
      const { mode, uid, gid, sizeBytes, mtime } = attributes
      if (mode === undefined || uid === undefined || gid === undefined) return []
      if (sizeBytes === undefined || mtime === undefined) return []
      if ((mode & S_IFMT) !== S_IFREG || links !== 1) return []
      return [describeShown(name, { mode, uid, gid, sizeBytes, mtime }, { owner })]
    })
  }

  /** Resolves when everything that was taken away is gone. */
  async settle(): Promise<void> {
    await this.#cleaning
  }

  /** What is known of directories is asked for again: others may have changed them. */
  forgetAll(): void {
    this.#parents.clear()
  }

  async #remove(path: TreePath): Promise<void> {
    const full = await this.#named(path).catch(ifGone)
    if (full === undefined) return
    this.#forget(path)
    await this.#takeAway(full)
  }

  async #out(path: TreePath, stage: number): Promise<void> {
    const staged = this.#place.staged(stage)
    this.#place.nextStage = Math.max(this.#place.nextStage, stage + 1)
    if ((await this.#client.lstat(staged)) !== undefined) return
    const full = await this.#named(path)
    this.#forget(path)
    // What is missing may be a special file, which is not held; here as in `rename` and `link`.
    await this.#client.rename(full, staged).catch(ifGone)
  }

  async #in(stage: number, path: TreePath): Promise<void> {
    const full = await this.#named(path)
    this.#forget(path)
    await this.#over(this.#place.staged(stage), full)
  }

  async #rename(from: TreePath, to: TreePath): Promise<void> {
    const source = await this.#named(from).catch(ifGone)
    const target = await this.#named(to)
    this.#forget(from)
    this.#forget(to)
    if (source !== undefined) await this.#over(source, target)
  }

  async #directory(path: TreePath): Promise<void> {
    if (path === '') return
    const full = await this.#named(path)
    try {
      await this.#client.mkdir(full, 0o700)
    } catch (error) {
      if (!(error instanceof SftpError)) throw error
      const found = await this.#client.lstat(full)
      if (found === undefined) throw error
      if (isDirectory(found)) return
      await this.#takeAway(full)
      await this.#client.mkdir(full, 0o700)
    }
    this.#forget(path)
  }

  async #keep({ path, names, after, last }: Extract<Operation, { do: 'keep' }>): Promise<void> {
    const directory = await this.#directoryPath(path).catch(ifGone)
    if (directory === undefined) return
    const kept = new Set<string>(names)
    for (const { name } of await this.#client.readdir(directory)) {
      if ((after !== undefined && name <= after) || (last !== undefined && name > last)) continue
      if (kept.has(name) || (path === '' && STATE_INSIDE.test(name))) continue
      this.#forget((path === '' ? name : `${path}/${name}`) as TreePath)
      await this.#takeAway(`${directory}/${name}` as ByteString)
    }
  }

  async #link(path: TreePath, to: TreePath): Promise<void> {
    const existing = await this.#named(to)
    if ((await this.#client.lstat(existing)) === undefined) return this.#remove(path)
    const full = await this.#named(path)
    if (this.#losses.has('hard-link')) return this.#copy(existing, full)
    this.#forget(path)
    const temporary = this.#place.temporary()
    await this.#client.hardlink(existing, temporary)
    await this.#over(temporary, full)
    // Two names of one inode are not renamed over each other: then the temporary one is left.
    if ((await this.#client.lstat(temporary)) !== undefined) await this.#client.remove(temporary)
  }

  async #symlink({ path, target, meta }: Extract<Operation, { do: 'symlink' }>): Promise<void> {
    const full = await this.#named(path)
    const temporary = this.#place.temporary()
    await this.#client.symlink(target, temporary)
    if (!this.#losses.has('symlink-meta')) {
      await Promise.all(this.#metaSteps(meta, true).map((step) => this.#client.lsetstat(temporary, step)))
    }
    this.#forget(path)
    await this.#over(temporary, full)
  }

  async #setMeta({ path, kind, meta }: Extract<Operation, { do: 'meta' }>): Promise<void> {
    if (kind === 'special') return
    const full = kind === 'directory' ? await this.#directoryPath(path) : await this.#named(path)
    if (kind === 'symlink' && this.#losses.has('symlink-meta')) return
    const canStopAtLinks = this.#client.has('lsetstat@openssh.com')
    if (!canStopAtLinks) {
      const found = await this.#client.lstat(full)
      if (found === undefined) throw new SftpError('ENOENT', path, 'it is not there')
      if (((found.mode ?? 0) & S_IFMT) !== S_IFREG && !isDirectory(found)) {
        throw new OperationRefusedError(path, 'it is neither a file nor a directory there')
      }
    }
    for (const step of this.#metaSteps(meta, kind === 'symlink')) {
      await (canStopAtLinks ? this.#client.lsetstat(full, step) : this.#client.setstat(full, step))
    }
  }

  /** The owner first: a change of it takes the setuid bit away. */
  #metaSteps({ mode, uid, gid, mtimeNs }: RawMeta, isSymlink: boolean): SftpAttributes[] {
    const mtime = Math.min(MAX_SECONDS, Math.max(0, Number(mtimeNs / 1_000_000_000n)))
    const owner = this.#losses.has('owner') ? [] : [{ uid, gid }]
    return [...owner, isSymlink ? { mtime } : { mode, mtime }]
  }

  async #openShared(path: ByteString, operation: Extract<Operation, { do: 'patch' }>): Promise<FileSink> {
    await this.#expectFile(path)
    const handle = await this.#client.open(path, SFTP_WRITE)
    try {
      await this.#prepare(handle, operation)
    } catch (error) {
      await this.#client.close(handle)
      throw error
    }
    const close = () => this.#client.close(handle)
    return this.#writer(handle, operation, { finish: close, discard: close })
  }

  async #copyBase(path: ByteString, to: Buffer, operation: Extract<Operation, { do: 'patch' }>): Promise<void> {
    await this.#expectFile(path)
    await this.#copyContent(path, to)
    await this.#prepare(to, operation)
  }

  async #copyContent(path: ByteString, to: Buffer): Promise<SftpAttributes> {
    const from = await this.#client.open(path, SFTP_READ)
    try {
      const found = await this.#client.fstat(from, path)
      if (this.#client.has('copy-data')) {
        if ((found.sizeBytes ?? 0) > 0) await this.#client.copyData(from, to, path)
        return found
      }
      for (let at = 0; ; ) {
        const bytes = await this.#client.read(from, at, 8 * this.#client.writeBytes)
        if (bytes.length === 0) return found
        await this.#write(to, at, bytes, path)
        at += bytes.length
      }
    } finally {
      await this.#client.close(from)
    }
  }

  async #prepare(handle: Buffer, { path, sizeBytes, holes }: Extract<Operation, { do: 'patch' }>): Promise<void> {
    await this.#client.fsetstat(handle, { sizeBytes }, path)
    // SFTP cannot punch holes; zeros read the same.
    for (const [offset, length] of holes) {
      for (let at = 0; at < length; at += ZEROS.length) {
        await this.#write(handle, offset + at, ZEROS.subarray(0, Math.min(ZEROS.length, length - at)), path)
      }
    }
  }

  // Where there are no hard links, each name has the content for itself.
  async #copy(existing: ByteString, path: ByteString): Promise<void> {
    await this.#expectFile(existing)
    const temporary = this.#place.temporary()
    const handle = await this.#client.open(temporary, SFTP_WRITE | SFTP_CREATE | SFTP_EXCLUSIVE)
    try {
      const { mode, mtime } = await this.#copyContent(existing, handle)
      await this.#client.fsetstat(
        handle,
        { ...(mode === undefined ? {} : { mode: mode & 0o7777 }), ...(mtime === undefined ? {} : { mtime }) },
        path,
      )
    } finally {
      await this.#client.close(handle)
    }
    await this.#over(temporary, path)
  }

  async #expectFile(path: ByteString): Promise<void> {
    const found = await this.#client.lstat(path)
    if (found === undefined) throw new SftpError('ENOENT', path, 'it is not there')
    if (((found.mode ?? 0) & S_IFMT) !== S_IFREG) throw new OperationRefusedError(path, 'it is no file there')
  }

  #writer(handle: Buffer, operation: ContentOperation, ends: Pick<FileSink, 'finish' | 'discard'>): FileSink {
    const { path, sizeBytes, extents, meta } = operation
    return {
      write: (offset, bytes) => this.#write(handle, offset, bytes, path),
      finish: async () => {
        try {
          const steps = this.#metaSteps(meta, false)
          const end = endOf(extents)
          // All at once: the server carries them out in this order.
          await Promise.all([
            ...(end < sizeBytes ? [this.#client.fsetstat(handle, { sizeBytes }, path)] : []),
            ...steps.map((step) => this.#client.fsetstat(handle, step, path)),
            ...(this.#client.has('fsync@openssh.com') ? [this.#client.fsync(handle, path)] : []),
          ])
        } catch (error) {
          await ends.discard()
          throw error
        }
        await ends.finish()
      },
      discard: ends.discard,
    }
  }

  async #write(handle: Buffer, offset: number, bytes: Uint8Array, path: string): Promise<void> {
    const size = this.#client.writeBytes
    if (bytes.length <= size) return this.#client.write(handle, offset, bytes, path)
    const writes: Promise<void>[] = []
    for (let at = 0; at < bytes.length; at += size) {
      writes.push(this.#client.write(handle, offset + at, bytes.subarray(at, at + size), path))
    }
    await Promise.all(writes)
  }

  #over(from: ByteString, to: ByteString): Promise<boolean> {
    return moveOver(this.#client, from, to, (path) => this.#takeAway(path))
  }

  async #takeAway(path: ByteString): Promise<void> {
    const trash = this.#place.temporary()
    try {
      await this.#client.rename(path, trash)
    } catch (error) {
      if (error instanceof SftpError && error.code === 'ENOENT') return
      throw error
    }
    this.#cleaning = this.#cleaning.then(() => removeTree(this.#client, trash))
    // It is reported where it is waited for.
    this.#cleaning.catch(() => undefined)
  }

  /** The path on the server of a name whose parent is where it seems to be. */
  async #named(path: TreePath): Promise<ByteString> {
    const { parent, name } = placeOf(path)
    return `${await this.#directoryPath(parent)}/${name}` as ByteString
  }

  async #directoryPath(path: TreePath): Promise<ByteString> {
    const { root } = this.#place
    if (path === '') return (root === '/' ? '' : root) as ByteString
    checkPath(path)
    const full = `${root === '/' ? '' : root}/${path}` as ByteString
    let known = this.#parents.get(path)
    if (known === undefined) {
      known = this.#client.realpath(full).then((real) => {
        if (real !== full) throw new OperationRefusedError(path, 'there is a symlink on the way to it')
      })
      this.#parents.set(path, known)
      known.catch(() => this.#parents.delete(path))
    }
    await known
    return full
  }

  /** Forgets a path, of which something else takes the place, with all beneath it. */
  #forget(path: TreePath): void {
    const beneath = `${path}/`
    for (const known of this.#parents.keys()) {
      if (known === path || known.startsWith(beneath)) this.#parents.delete(known)
    }
  }
}

function endOf(extents: readonly Extent[]): number {
  const last = extents.at(-1)
  return last === undefined ? 0 : last[0] + last[1]
}

function ifGone(error: unknown): undefined {
  if (error instanceof SftpError && error.code === 'ENOENT') return undefined
  throw error
}
