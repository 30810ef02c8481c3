import { type Namespace, openDirectory } from '@lsync/overlay-merge'
import {
  type ByteString,
  close,
  DT_REG,
  DT_UNKNOWN,
  errnoOf,
  handleAt,
  LsyncError,
  listsAcls,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_PATH,
  O_RDONLY,
  openBeneath,
  openByHandle,
  printable,
  rawStatFd,
  readDirents,
  STATX_WORD,
  syncFileSystem,
  tryRawStatAt,
  withFd,
} from '@lsync/posix'
import type { PlainOperation } from './applier.ts'
import { type DescribedFile, listingOf, NO_LISTING, openListing, type TargetListing } from './describe.ts'
import { compilePatterns, type IsExcluded, type Patterns } from './filter.ts'
import { hasFineTimes } from './fine-times.ts'
import { pageRows } from './index-pages.ts'
import type { DirectoryHandle, NamePlace } from './model/index-change.ts'
import type { Operation, TreePath } from './model/operation.ts'
import { eachRow, isUnchanged, type Row, rowAt, rowBytes } from './model/row.ts'
import type { MetaTask } from './planner.ts'
import {
  isRacy,
  type Known,
  keptAttributes,
  metaOf,
  rowOf,
  type SendContext,
  type Sent,
  sendFile,
  sendOther,
} from './send.ts'
import { DirectSink, EncodedSink, type Sink } from './sink.ts'
import type { Target, TargetLoss } from './transport/target.ts'

/** What a worker knows of one session: an upper and a target. */
export interface SessionInit {
  readonly session: number
  readonly upperFd: number
  readonly delivery: Target['delivery']
  readonly losses: readonly TargetLoss['what'][]
  readonly namespace: Namespace
  readonly patterns: Patterns
  /** A rate is to be held, inside of a large file, too. */
  readonly isLimited: boolean
}

/** A directory that is to be carried over. */
export interface FreshDirectory {
  readonly id: number
  readonly parent: number
  readonly name: ByteString
  readonly path: TreePath
  /** Of the directory that was found there: another one in its place is none of this. */
  readonly identity: string
  /** The target may hold names in it that the upper does not. */
  readonly isDirty: boolean
}

export type Job =
  /** Carries over whole directories, with what is beneath them, within a budget. */
  | {
      readonly do: 'fresh'
      readonly directories: readonly FreshDirectory[]
      /** Ids for directories and block lists that are found. */
      readonly directoryIds: readonly [first: number, count: number]
      readonly blocksIds: readonly [first: number, count: number]
      /** Directories that have an id already, by identity. */
      readonly known: readonly (readonly [identity: string, id: number])[]
      /** Inodes that are not to be copied, since they are moved to their places. */
      readonly moved: readonly string[]
      /**
       * What the target has in directories that are dirty, by id; those that are not among them are left in the `rest`.
       * `undefined`: the worker looks there itself, or nobody can.
       */
      readonly described: readonly (readonly [id: number, files: readonly DescribedFile[]])[] | undefined
      readonly budgetMs: number
      readonly budgetBytes: number
    }
  | { readonly do: 'look'; readonly directories: readonly LookDirectory[] }
  /** Compares directories with their rows of the index. */
  | { readonly do: 'scan'; readonly directories: readonly IndexedDirectory[] }
  /** Looks for inodes beneath new directories. */
  | { readonly do: 'peek'; readonly path: TreePath; readonly identities: readonly string[] }
  /** Looks at what is named by handles, wherever it is. */
  | { readonly do: 'find'; readonly handles: readonly DirectoryHandle[] }
  | { readonly do: 'operations'; readonly operations: readonly PlainOperation[] }
  | { readonly do: 'contents'; readonly tasks: readonly SendTask[] }
  | { readonly do: 'metas'; readonly tasks: readonly MetaTask[] }
  | { readonly do: 'sync' }

export interface LookDirectory {
  readonly id: number
  readonly path: TreePath
  readonly handle: DirectoryHandle | undefined
  /** Of the directory, where it cannot be opened by its handle. */
  readonly identity: string
  readonly names: readonly ByteString[]
}

export interface ScanDirectory {
  readonly id: number
  readonly path: TreePath
}

/** A directory with its rows of the index. */
export interface IndexedDirectory extends ScanDirectory {
  readonly pages: readonly Uint8Array[]
}

export interface SendTask extends NamePlace {
  readonly path: TreePath
  readonly identity: string
  readonly isWhiteout: boolean
  readonly row: Uint8Array | undefined
  /** Hashes of its blocks, as the target has them. */
  readonly blocks: Uint8Array | undefined
  readonly isShared: boolean
}

/** Something about one name went wrong; the others went on. */
export interface NameFailure extends NamePlace {
  readonly path: TreePath
  readonly code: string
  readonly message: string
}

export interface Tally {
  files: number
  bytes: number
}

/** A piece of the `arena`. */
export type Piece = readonly [offset: number, length: number]

export interface FreshResult extends Tally {
  /** All bytes of the result, handed over instead of copied. */
  readonly arena: Uint8Array<ArrayBuffer>
  readonly directories: readonly {
    readonly id: number
    readonly parent: number
    readonly name: ByteString
    readonly path: TreePath
    readonly handle: DirectoryHandle | undefined
    /** It was found by this job. */
    readonly isNew: boolean
    /** Its rows, where it was carried over; else it was only made. */
    readonly pages: readonly Piece[] | undefined
  }[]
  readonly rest: readonly FreshDirectory[]
  /** A directory has more directories in it than ids were given. */
  readonly needsIds: number
  /** To be looked at; `isForced` where the target may have something that the index does not know. */
  readonly again: readonly (NamePlace & { readonly isForced: boolean })[]
  readonly blocks: readonly { readonly id: number; readonly hashes: Uint8Array }[]
  readonly failures: readonly NameFailure[]
  /** Of the directories themselves. */
  readonly rows: readonly { readonly id: number; readonly row: Piece }[]
}

export interface LookResult {
  readonly seen: readonly (NamePlace & {
    readonly row: Uint8Array | undefined
    readonly handle: DirectoryHandle | undefined
  })[]
  /** Directories that are not where the index says. */
  readonly displaced: readonly number[]
  readonly failures: readonly NameFailure[]
}

export interface ScanResult {
  readonly dirty: readonly NamePlace[]
  /** Directories in them that the index knows. */
  readonly children: readonly ScanDirectory[]
  readonly failures: readonly NameFailure[]
  readonly entries: number
}

export interface PeekResult {
  /** From the top down, without those that lead nowhere. */
  readonly found: readonly {
    readonly path: TreePath
    readonly row: Uint8Array
    readonly handle: DirectoryHandle | undefined
    readonly isHit: boolean
  }[]
}

export interface FindResult {
  /** Rows of those that have a name and are no directories. */
  readonly rows: readonly Uint8Array[]
}

export interface OperationsResult {
  readonly failures: readonly { readonly index: number; readonly code: string; readonly message: string }[]
}

export interface ContentsResult extends Tally {
  readonly sent: readonly (NamePlace & {
    readonly row: Uint8Array
    readonly blocks: Uint8Array | undefined
    readonly isUnsettled: boolean
    readonly how: Sent['how']
  })[]
  /** Something else has the name by now. */
  readonly again: readonly (NamePlace & { readonly path: TreePath })[]
  readonly failures: readonly NameFailure[]
}

export interface MetasResult {
  readonly rows: readonly { readonly id: number; readonly row: Uint8Array; readonly isUnsettled: boolean }[]
  readonly again: readonly number[]
  readonly failures: readonly NameFailure[]
}

export interface JobResults {
  fresh: FreshResult
  look: LookResult
  scan: ScanResult
  peek: PeekResult
  find: FindResult
  operations: OperationsResult
  contents: ContentsResult
  metas: MetasResult
  sync: undefined
}

/** Gone, or something else, while it was looked at. */
const VANISHED: ReadonlySet<string> = new Set(['ENOENT', 'ENOTDIR', 'ELOOP', 'ESTALE', 'NOT_A_FILE'])
const EMPTY_NAME = '' as ByteString

/** The thread that a workshop is in. */
export interface WorkshopThread {
  /** Hands over encoded operations. */
  readonly emit: (batch: Uint8Array<ArrayBuffer>) => void
  /** Waits until so many bytes that it has just written may have been. */
  readonly pay: (bytes: number) => void
  readonly hasOwnUmask: boolean
}

/** Does the jobs of one session in one thread, with synchronous system calls. */
export class Workshop {
  readonly #init: SessionInit
  readonly #sink: Sink
  readonly #context: SendContext
  readonly #isExcluded: IsExcluded | undefined

  constructor(init: SessionInit, { emit, pay, hasOwnUmask }: WorkshopThread) {
    this.#init = init
    const { delivery } = init
    this.#sink =
      delivery.mode === 'direct'
        ? new DirectSink({ ...delivery, losses: new Set(init.losses), hasOwnUmask }, init.isLimited ? pay : undefined)
        : new EncodedSink(emit)
    this.#context = {
      sink: this.#sink,
      keeps: keptAttributes(init.namespace),
      listsAcls: listsAcls(init.upperFd),
      hasFineTimes: hasFineTimes(init.upperFd),
    }
    this.#isExcluded = compilePatterns(init.patterns)
  }

  run<K extends Job['do']>(job: Extract<Job, { do: K }>): JobResults[K]
  run(job: Job): JobResults[keyof JobResults] {
    try {
      switch (job.do) {
        case 'fresh':
          return new FreshCopy(this.#init, this.#context, this.#isExcluded, job).run()
        case 'look':
          return this.#look(job.directories)
        case 'scan':
          return this.#scan(job.directories)
        case 'peek':
          return this.#peek(job.path, new Set(job.identities))
        case 'find':
          return this.#find(job.handles)
        case 'operations':
          return this.#operations(job.operations)
        case 'contents':
          return this.#contents(job.tasks)
        case 'metas':
          return this.#metas(job.tasks)
        case 'sync':
          if (this.#init.delivery.mode === 'direct') syncFileSystem(this.#init.delivery.rootFd)
          return undefined
      }
    } finally {
      this.#sink.flush()
      this.#sink.forget()
    }
  }

  close(): void {
    this.#sink.forget()
  }

  #look(directories: readonly LookDirectory[]): LookResult {
    const seen: LookResult['seen'][number][] = []
    const displaced: number[] = []
    const failures: NameFailure[] = []
    for (const directory of directories) {
      const { id, path, names } = directory
      if (id === 0) {
        const row = rowOf(EMPTY_NAME, rawStatFd(this.#init.upperFd))
        seen.push({ directory: 0, name: EMPTY_NAME, row: row.image, handle: handleAt(this.#init.upperFd, '') })
        continue
      }
      let fd: number | undefined
      try {
        fd = this.#openDirectory(directory)
      } catch (error) {
        for (const name of names) failures.push(failureOf({ directory: id, name }, join(path, name), error))
        continue
      }
      if (fd === undefined) {
        displaced.push(id)
        for (const name of names) seen.push({ directory: id, name, row: undefined, handle: undefined })
        continue
      }
      withFd(fd, (dirfd) => {
        for (const name of names) {
          try {
            seen.push({ directory: id, name, ...this.#lookAt(dirfd, name, join(path, name)) })
          } catch (error) {
            failures.push(failureOf({ directory: id, name }, join(path, name), error))
          }
        }
      })
    }
    return { seen, displaced, failures }
  }

  #lookAt(dirfd: number, name: ByteString, path: TreePath) {
    const words = tryRawStatAt(dirfd, name)
    if (words === undefined) return { row: undefined, handle: undefined }
    const row = rowOf(name, words)
    if (this.#isExcluded?.(path, name, row.isDirectory) === true) return { row: undefined, handle: undefined }
    return { row: row.image, handle: row.isDirectory ? handleOf(dirfd, name) : undefined }
  }

  // By its handle it is found wherever it has moved to; its names are looked at where they really are.
  #openDirectory({ path, handle, identity }: LookDirectory): number | undefined {
    if (handle !== undefined) {
      try {
        const plain = { type: handle.type, bytes: Buffer.from(handle.bytes) }
        return openByHandle(this.#init.upperFd, plain, O_RDONLY | O_DIRECTORY)
      } catch (error) {
        const code = errnoOf(error)
        if (code !== 'EPERM' && code !== 'ENOTSUP' && code !== 'ESTALE') throw error
        if (code === 'ESTALE') return undefined
      }
    }
    let fd: number
    try {
      fd = openBeneath(this.#init.upperFd, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
    } catch (error) {
      if (VANISHED.has(errnoOf(error) ?? '')) return undefined
      throw error
    }
    if (rowOf(EMPTY_NAME, rawStatFd(fd)).identity === identity) return fd
    close(fd)
    return undefined
  }

  #scan(directories: readonly IndexedDirectory[]): ScanResult {
    const children: ScanDirectory[] = []
    const dirty: NamePlace[] = []
    const failures: NameFailure[] = []
    let entries = 0
    for (const directory of directories) {
      const { id, path } = directory
      try {
        entries += this.#scanDirectory(directory, dirty, children)
      } catch (error) {
        // The directory above tells that it is gone.
        if (!VANISHED.has(codeOf(error))) failures.push(failureOf({ directory: id, name: EMPTY_NAME }, path, error))
      }
    }
    return { dirty, children, failures, entries }
  }

  #scanDirectory(directory: IndexedDirectory, dirty: NamePlace[], children: ScanDirectory[]): number {
    const { id, path } = directory
    const pages = directory.pages.map((page) => Buffer.from(page.buffer, page.byteOffset, page.byteLength))
    const fd = openBeneath(this.#init.upperFd, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
    return withFd(fd, () => {
      const places = new Map<string, number>()
      for (const [number, page] of pages.entries())
        eachRow(page, (name, at) => places.set(name, number * PAGE_SPAN + at))
      let entries = 0
      readDirents(fd, (name) => {
        entries++
        const words = tryRawStatAt(fd, name)
        if (words === undefined) return
        const place = places.get(name)
        if (place === undefined) {
          const isDirectory = ((words[7] as number) & 0o170000) === 0o040000
          if (this.#isExcluded?.(join(path, name), name, isDirectory) !== true) dirty.push({ directory: id, name })
          return
        }
        places.delete(name)
        const page = pages[Math.floor(place / PAGE_SPAN)] as Buffer
        const at = place % PAGE_SPAN
        const isSame = isUnchanged(page, at, words)
        if (!isSame) dirty.push({ directory: id, name })
        const row = page.readUInt16LE(at + 12) >> 12 === 4 ? rowAt(page, at) : undefined
        if (row !== undefined && (isSame || rowOf(name, words).identity === row.identity)) {
          children.push({ id: row.ref, path: join(path, name) })
        }
      })
      for (const name of places.keys()) dirty.push({ directory: id, name: name as ByteString })
      return entries
    })
  }

  #peek(root: TreePath, identities: ReadonlySet<string>): PeekResult {
    const found: PeekResult['found'][number][] = []
    const visit = (fd: number, path: TreePath): boolean => {
      let leads = false
      const names: ByteString[] = []
      readDirents(fd, (name) => names.push(name))
      for (const name of names) {
        const words = tryRawStatAt(fd, name)
        if (words === undefined) continue
        const row = rowOf(name, words)
        const at = join(path, name)
        if (this.#isExcluded?.(at, name, row.isDirectory) === true) continue
        const handle = row.isDirectory ? handleOf(fd, name) : undefined
        if (identities.has(row.identity)) found.push({ path: at, row: row.image, handle, isHit: true })
        else if (row.isDirectory) {
          const place = found.length
          let leadsOn = false
          try {
            leadsOn = withFd(openDirectory(fd, name), (child) => visit(child, at))
          } catch (error) {
            if (!VANISHED.has(errnoOf(error) ?? '')) throw error
          }
          if (!leadsOn) continue
          found.splice(place, 0, { path: at, row: row.image, handle, isHit: false })
        } else continue
        leads = true
      }
      return leads
    }
    try {
      withFd(openBeneath(this.#init.upperFd, root, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (fd) => visit(fd, root))
    } catch (error) {
      if (!VANISHED.has(errnoOf(error) ?? '')) throw error
    }
    return { found }
  }

  #find(handles: readonly DirectoryHandle[]): FindResult {
    const rows: Uint8Array[] = []
    for (const { type, bytes } of handles) {
      let fd: number | undefined
      try {
        fd = openByHandle(this.#init.upperFd, { type, bytes: Buffer.from(bytes) }, O_PATH)
      } catch (error) {
        // What cannot be opened so cannot be found so: it is left to the sweep.
        if (errnoOf(error) === undefined) throw error
      }
      if (fd === undefined) continue
      const row = withFd(fd, (opened) => rowOf(EMPTY_NAME, rawStatFd(opened)))
      if (row.nlink > 0 && !row.isDirectory && !row.isWhiteout) rows.push(row.image)
    }
    return { rows }
  }

  #operations(operations: readonly Operation[]): OperationsResult {
    const failures: OperationsResult['failures'][number][] = []
    for (const [index, operation] of operations.entries()) {
      try {
        this.#sink.run(operation as PlainOperation)
      } catch (error) {
        failures.push({ index, code: codeOf(error), message: messageOf(error) })
      }
    }
    return { failures }
  }

  #contents(tasks: readonly SendTask[]): ContentsResult {
    const sent: ContentsResult['sent'][number][] = []
    const again: ContentsResult['again'][number][] = []
    const failures: NameFailure[] = []
    const tally: Tally = { files: 0, bytes: 0 }
    for (const task of tasks) {
      const { directory, path } = task
      const name = path.slice(path.lastIndexOf('/') + 1) as ByteString
      const place = { directory, name }
      try {
        const result = this.#send(task, name)
        if (result === undefined) {
          again.push({ ...place, path })
          continue
        }
        const { row, blocks, isUnsettled, how } = result
        sent.push({ ...place, row: row.image, blocks, isUnsettled, how })
        if (how !== 'nothing') tally.files++
        tally.bytes += result.bytes
      } catch (error) {
        if (VANISHED.has(codeOf(error)) && !this.#isThere(path, task.identity)) again.push({ ...place, path })
        else failures.push(failureOf(place, path, error))
      }
    }
    return { sent, again, failures, ...tally }
  }

  #isThere(path: TreePath, identity: string): boolean {
    const slash = path.lastIndexOf('/')
    try {
      return withFd(this.#openParent(path), (fd) => {
        const words = tryRawStatAt(fd, path.slice(slash + 1) as ByteString)
        return words !== undefined && rowOf(EMPTY_NAME, words).identity === identity
      })
    } catch {
      return false
    }
  }

  #openParent(path: TreePath): number {
    const slash = path.lastIndexOf('/')
    const parent = (slash < 0 ? '' : path.slice(0, slash)) as TreePath
    return openBeneath(this.#init.upperFd, parent, O_RDONLY | O_DIRECTORY | O_NOFOLLOW)
  }

  #send(task: SendTask, name: ByteString): Sent | undefined {
    return withFd(this.#openParent(task.path), (fd) => {
      const words = tryRawStatAt(fd, name)
      if (words === undefined) return undefined
      const seen = rowOf(name, words)
      // The inode of a whiteout says nothing.
      const isSame = task.isWhiteout ? seen.isWhiteout : !seen.isWhiteout && seen.identity === task.identity
      if (seen.isDirectory || !isSame) return undefined
      const known = task.row === undefined ? undefined : rowAt(Buffer.concat([task.row]), 0)
      if (!seen.isFile) return sendOther(this.#context, fd, seen, task.path, known)
      return sendFile(
        this.#context,
        fd,
        name,
        task.path,
        known && { row: known, blocks: task.blocks, isShared: task.isShared },
      )
    })
  }

  #metas(tasks: readonly MetaTask[]): MetasResult {
    const rows: MetasResult['rows'][number][] = []
    const again: number[] = []
    const failures: NameFailure[] = []
    for (const { id, path, identity } of tasks) {
      try {
        withFd(openBeneath(this.#init.upperFd, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (fd) => {
          if (rowOf(EMPTY_NAME, rawStatFd(fd)).identity !== identity) {
            again.push(id)
            return
          }
          const { row, isUnsettled } = sendDirectoryMeta(this.#context, fd, nameOf(path), path)
          rows.push({ id, row: row.image, isUnsettled })
        })
      } catch (error) {
        if (VANISHED.has(codeOf(error))) again.push(id)
        else failures.push(failureOf({ directory: id, name: EMPTY_NAME }, path, error))
      }
    }
    return { rows, again, failures }
  }
}

// Larger than any page.
const PAGE_SPAN = 1 << 28

/** Gives a directory its metadata, after everything in it. */
function sendDirectoryMeta(
  context: SendContext,
  fd: number,
  name: ByteString,
  path: TreePath,
): { row: Row; isUnsettled: boolean } {
  const row = rowOf(name, rawStatFd(fd))
  context.sink.run({ do: 'meta', path, kind: 'directory', meta: metaOf(row, fd, '', context) })
  const isUnsettled = isRacy(row, context)
  return { row: isUnsettled ? row.with({ settled: false }) : row, isUnsettled }
}

/** Carries over directories that the target does not have. */
class FreshCopy {
  readonly #upperFd: number
  readonly #delivery: SessionInit['delivery']
  readonly #context: SendContext
  readonly #isExcluded: IsExcluded | undefined
  readonly #job: Extract<Job, { do: 'fresh' }>
  readonly #described: ReadonlyMap<number, readonly DescribedFile[]> | undefined
  readonly #undescribed: FreshDirectory[] = []
  readonly #known: ReadonlyMap<string, number>
  readonly #moved: ReadonlySet<string>
  #nextDirectory: number
  #nextBlocks: number
  readonly #tally: Tally = { files: 0, bytes: 0 }
  readonly #directories = new Map<number, FreshResult['directories'][number]>()
  readonly #again: (NamePlace & { readonly isForced: boolean })[] = []
  readonly #blocks: { id: number; hashes: Uint8Array }[] = []
  readonly #failures: NameFailure[] = []
  readonly #rows: { id: number; row: Piece }[] = []
  readonly #pieces: Uint8Array[] = []
  #pieceBytes = 0
  #needsIds = 0

  constructor(
    { upperFd, delivery }: Pick<SessionInit, 'upperFd' | 'delivery'>,
    context: SendContext,
    isExcluded: IsExcluded | undefined,
    job: Extract<Job, { do: 'fresh' }>,
  ) {
    this.#upperFd = upperFd
    this.#delivery = delivery
    this.#described = job.described && new Map(job.described)
    this.#context = context
    this.#isExcluded = isExcluded
    this.#job = job
    this.#known = new Map(job.known)
    this.#moved = new Set(job.moved)
    ;[this.#nextDirectory] = job.directoryIds
    ;[this.#nextBlocks] = job.blocksIds
  }

  run(): FreshResult {
    const start = performance.now()
    const { budgetMs, budgetBytes } = this.#job
    const queue = [...this.#job.directories]
    for (let next = queue.pop(); next !== undefined; next = queue.pop()) {
      if (next.isDirty && this.#described?.has(next.id) === false) {
        this.#undescribed.push(next)
        continue
      }
      const children: FreshDirectory[] = []
      if (!this.#carry(next, children)) {
        queue.push(next)
        break
      }
      queue.push(...children.reverse())
      if (performance.now() - start > budgetMs || this.#tally.bytes > budgetBytes) break
    }
    return {
      arena: this.#arena(),
      directories: [...this.#directories.values()],
      rest: [...queue, ...this.#undescribed],
      needsIds: this.#needsIds,
      again: this.#again,
      blocks: this.#blocks,
      failures: this.#failures,
      rows: this.#rows,
      ...this.#tally,
    }
  }

  /** `false` when there are not enough ids for what is in it. */
  #carry(directory: FreshDirectory, children: FreshDirectory[]): boolean {
    const { parent, name, path } = directory
    const place = { directory: parent, name }
    try {
      return withFd(openBeneath(this.#upperFd, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW), (fd) => {
        try {
          return this.#carryDirectory(fd, directory, children)
        } catch (error) {
          // A directory that was removed can still be open, and has nothing in it.
          if ((rawStatFd(fd)[STATX_WORD.nlink] as number) > 0) this.#failures.push(failureOf(place, path, error))
          else this.#again.push({ ...place, isForced: false })
          return true
        }
      })
    } catch (error) {
      if (VANISHED.has(codeOf(error))) this.#again.push({ ...place, isForced: false })
      else this.#failures.push(failureOf(place, path, error))
    }
    return true
  }

  #carryDirectory(fd: number, directory: FreshDirectory, children: FreshDirectory[]): boolean {
    const { id, parent, name: ownName, path, isDirty } = directory
    const own = rowOf(ownName, rawStatFd(fd))
    if (own.identity !== directory.identity) {
      this.#again.push({ directory: parent, name: ownName, isForced: false })
      return true
    }
    const names: ByteString[] = []
    const types: number[] = []
    readDirents(fd, (name, type) => {
      names.push(name)
      types.push(type)
    })
    const [first, count] = this.#job.directoryIds
    if (this.#nextDirectory + names.length > first + count) {
      const directories = types.filter((type) => type !== DT_REG).length
      if (this.#nextDirectory + directories > first + count) {
        this.#needsIds = directories
        return false
      }
    }
    const rows: Buffer[] = []
    if (!isDirty) this.#context.sink.adopt(path)
    if (isDirty) {
      this.#context.sink.run({ do: 'directory', path })
      this.#context.sink.run({
        do: 'keep',
        path,
        names: names.filter((name) => !this.#isOut(fd, join(path, name), name)),
      })
    }
    const listing = this.#listingOf(directory)
    try {
      for (const [index, name] of names.entries()) {
        const type = types[index] as number
        try {
          this.#carryName(fd, { directory: id, name }, join(path, name), type, listing, rows, children)
        } catch (error) {
          // The target may say the same of its own side, where it is a failure.
          const isGone = VANISHED.has(codeOf(error)) && this.#hasChanged(fd, name, type)
          if (isGone) this.#again.push({ directory: id, name, isForced: isDirty })
          else this.#failures.push(failureOf({ directory: id, name }, join(path, name), error))
        }
      }
    } finally {
      listing?.close()
    }
    this.#finish(fd, { id, parent, path }, own, rows)
    return true
  }

  /** What the target has there; `undefined` where it has nothing. */
  #listingOf({ id, path, isDirty }: FreshDirectory): TargetListing | undefined {
    if (!isDirty) return undefined
    const described = this.#described?.get(id)
    if (described !== undefined) return listingOf(described)
    return this.#delivery.mode === 'direct' ? openListing(this.#delivery.rootFd, path) : NO_LISTING
  }

  #piece(bytes: Uint8Array): Piece {
    this.#pieces.push(bytes)
    this.#pieceBytes += bytes.length
    return [this.#pieceBytes - bytes.length, bytes.length]
  }

  // Small buffers share memory with others, all of which would be copied for each that is sent to another thread.
  #arena(): Uint8Array<ArrayBuffer> {
    const arena = new Uint8Array(this.#pieceBytes)
    let at = 0
    for (const piece of this.#pieces) {
      arena.set(piece, at)
      at += piece.length
    }
    return arena
  }

  #hasChanged(fd: number, name: ByteString, type: number): boolean {
    const words = tryRawStatAt(fd, name)
    return words === undefined || (type !== DT_UNKNOWN && ((words[7] as number) & 0o170000) >> 12 !== type)
  }

  #isOut(fd: number, path: TreePath, name: ByteString): boolean {
    if (this.#isExcluded === undefined) return false
    const words = tryRawStatAt(fd, name)
    return words === undefined || this.#isExcluded(path, name, rowOf(name, words).isDirectory)
  }

  #finish(fd: number, at: { id: number; parent: number; path: TreePath }, own: Row, rows: Buffer[]): void {
    const { id, parent, path } = at
    const { row, isUnsettled } = sendDirectoryMeta(this.#context, fd, own.name, path)
    const isSame = !isUnsettled && row.change === own.change
    // Names may have come while they were carried over: all of it is compared again.
    if (!isSame) this.#again.push({ directory: id, name: '.' as ByteString, isForced: false })
    const pages = pageRows([Buffer.concat(rows)]).map((page) => this.#piece(page))
    const made = this.#directories.get(id)
    this.#directories.set(id, {
      id,
      parent,
      name: own.name,
      path,
      handle: made?.handle,
      isNew: made !== undefined,
      pages,
    })
    this.#rows.push({ id, row: this.#piece((isSame ? row : row.with({ settled: false })).image) })
  }

  #carryName(
    fd: number,
    place: NamePlace,
    path: TreePath,
    type: number,
    listing: TargetListing | undefined,
    rows: Buffer[],
    children: FreshDirectory[],
  ): void {
    const { name } = place
    if (type === DT_REG && this.#moved.size === 0) {
      if (this.#isExcluded?.(path, name, false) === true) return
      this.#carryFile(fd, place, path, listing, rows)
      return
    }
    const words = tryRawStatAt(fd, name)
    if (words === undefined) return
    const row = rowOf(name, words)
    if (this.#isExcluded?.(path, name, row.isDirectory) === true) return
    const hasLinks = row.nlink > 1 && !row.isDirectory && !row.isWhiteout
    const isDirty = listing !== undefined
    if (!hasLinks && this.#moved.has(row.identity)) return
    if (row.isDirectory) {
      const id = this.#known.get(row.identity) ?? this.#nextDirectory++
      this.#context.sink.run({ do: 'directory', path })
      this.#directories.set(id, {
        id,
        parent: place.directory,
        name,
        path,
        handle: handleOf(fd, name),
        isNew: true,
        pages: undefined,
      })
      rows.push(rowBytes(row.with({ ref: id, settled: false })))
      children.push({ id, parent: place.directory, name, path, identity: row.identity, isDirty })
      return
    }
    if (hasLinks) {
      this.#again.push({ ...place, isForced: isDirty })
      return
    }
    if (row.isFile) this.#carryFile(fd, place, path, listing, rows)
    else this.#keep(place, sendOther(this.#context, fd, row, path, undefined), rows)
  }

  #carryFile(fd: number, place: NamePlace, path: TreePath, listing: TargetListing | undefined, rows: Buffer[]): void {
    const sent = sendFile(this.#context, fd, place.name, path, this.#knownFile(fd, place.name, listing), 'single')
    if (sent === undefined) this.#again.push({ ...place, isForced: listing !== undefined })
    else this.#keep(place, sent, rows)
  }

  #knownFile(fd: number, name: ByteString, listing: TargetListing | undefined): Known | undefined {
    const words = listing === undefined ? undefined : tryRawStatAt(fd, name)
    return words === undefined ? undefined : listing?.known(name, rowOf(name, words).sizeBytes)
  }

  #keep(place: NamePlace, { row, blocks, isUnsettled, bytes }: Sent, rows: Buffer[]): void {
    this.#tally.files++
    this.#tally.bytes += bytes
    if (isUnsettled) this.#again.push({ ...place, isForced: false })
    const [first, count] = this.#job.blocksIds
    if (blocks === undefined || this.#nextBlocks >= first + count) {
      rows.push(rowBytes(row))
      return
    }
    const id = this.#nextBlocks++
    this.#blocks.push({ id, hashes: blocks })
    rows.push(rowBytes(row.with({ ref: id })))
  }
}

function handleOf(fd: number, name: ByteString): DirectoryHandle | undefined {
  try {
    return handleAt(fd, name)
  } catch (error) {
    if (errnoOf(error) === 'ENOENT') return undefined
    throw error
  }
}

function join(parent: TreePath, name: ByteString): TreePath {
  return (parent === '' ? name : `${parent}/${name}`) as TreePath
}

function nameOf(path: TreePath): ByteString {
  return path.slice(path.lastIndexOf('/') + 1) as ByteString
}

function codeOf(error: unknown): string {
  return error instanceof LsyncError ? error.code : (errnoOf(error) ?? 'UNKNOWN')
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error)
}

function failureOf(place: NamePlace, path: TreePath, error: unknown): NameFailure {
  if (!(error instanceof LsyncError)) throw error
  return { ...place, path, code: codeOf(error), message: `${printable(path)}: ${messageOf(error)}` }
}
