import { hostname } from 'node:os'
import { errnoOf, type HostPath, type LsyncError } from '@lsync/posix'
import {
  type ContentWriter,
  type ForgetRequest,
  forgetSnapshots,
  type KeepRules,
  listSnapshots,
  type ObjectId,
  type Repository,
  type Snapshot,
  SnapshotEditor,
  type Taken,
} from '@lsync/snapshot'
import {
  type Checkpoint,
  type ContentOperation,
  type Extent,
  type Failure,
  type Operation,
  OperationDecoder,
  type PlainOperation,
  type Target,
  type TargetState,
} from '@lsync/sync'

export interface RepositoryTargetRequest {
  /** What messages call it. */
  readonly description: string
  /** What the snapshots call the upper, absolute. */
  readonly source: HostPath
  /** Opens the repository; `close` gives it back. Called again after a failure. */
  readonly connect: (signal: AbortSignal) => Promise<{ readonly repository: Repository; close(): Promise<void> }>
  /** Whose snapshots they are; by default this machine's. */
  readonly hostname?: string
  /** By which the snapshots of a sync are told from others. Default `sync`. */
  readonly tag?: string
  /** Which snapshots `thin` keeps; by default all. */
  readonly keep?: KeepRules
}

/** The field of a snapshot that says what of a sync it holds. */
const FIELD = 'lsync_sync'

const LOSSES: TargetState['losses'] = [
  { what: 'flags', message: 'a snapshot keeps no flags (chattr +i, +a)' },
  { what: 'holes', message: 'a snapshot does not tell holes from zeros' },
]

interface Connected {
  readonly repository: Repository
  close(): Promise<void>
}

/**
 * A repository as the target of a sync: operations change a tree of it, and each barrier makes a snapshot.
 *
 * The checkpoint is a field of the snapshot that holds it, so that it can never be ahead of it. What a crash leaves in the
 * stage is lost, and the operation that wants it fails: then the sync sends it anew.
 */
export class RepositoryTarget implements Target {
  readonly description: string
  readonly delivery = { mode: 'encoded' } as const
  readonly #request: RepositoryTargetRequest
  readonly #lanes = new Map<number, Lane>()
  readonly #stage = new Map<number, Taken>()
  #connected: Connected | undefined
  #editor: SnapshotEditor | undefined
  #signal: AbortSignal | undefined
  #latest: { readonly id: ObjectId; readonly tree: ObjectId } | undefined
  #checkpoint: Checkpoint | undefined
  #nextStage = 0
  /** What the last snapshot shows is that of another index: it goes when the first operation comes. */
  #isForeign = false
  /** The last snapshot is the first one: there is nothing in it but the checkpoint. */
  #isFirst = false
  /** Lanes deliver at the same time, and a snapshot is made of what all have delivered. */
  #turn: Promise<unknown> = Promise.resolve()

  constructor(request: RepositoryTargetRequest) {
    this.#request = request
    this.description = request.description
  }

  async open(signal: AbortSignal): Promise<TargetState> {
    this.#signal = signal
    this.#connected = await this.#request.connect(signal)
    const { repository } = this.#connected
    const snapshots = await listSnapshots(repository, this.#filter, signal)
    const latest = snapshots.findLast((snapshot) => fieldOf(snapshot) !== undefined)
    const field = latest === undefined ? undefined : fieldOf(latest)
    this.#latest = latest
    this.#checkpoint = field?.checkpoint
    this.#isForeign = field?.isForeign === true
    this.#nextStage = Math.max(field?.nextStage ?? 0, this.#nextStage)
    const { source: path } = this.#request
    this.#editor = await SnapshotEditor.open(repository, { path, snapshot: latest, signal })
    this.#lanes.clear()
    this.#stage.clear()
    // Nothing in a repository stands in the way of a new copy: what is there stays in its own snapshots.
    return { checkpoint: this.#checkpoint, isEmpty: true, nextStage: this.#nextStage, losses: LOSSES }
  }

  deliver(lane: number, batch: Uint8Array): Promise<readonly Failure[]> {
    return this.#inTurn(async () => {
      let state = this.#lanes.get(lane)
      if (state === undefined) {
        state = new Lane()
        this.#lanes.set(lane, state)
      }
      const failures: Failure[] = []
      if (this.#isForeign) await this.#tree.clear()
      this.#isForeign = false
      let index = 0
      for (const record of state.decode(batch)) {
        const operation = record.kind === 'operation' ? record.operation : (state.operation as Operation)
        try {
          if (!(await this.#record(state, record))) continue
        } catch (error) {
          const code = errnoOf(error)
          if (code === undefined) throw error
          state.failure ??= error
          if (record.kind === 'operation' && hasContent(operation)) continue
          if (record.kind === 'content') continue
          failures.push({ index, code, path: pathOf(operation), message: (error as Error).message })
        }
        index++
      }
      return failures
    })
  }

  barrier(checkpoint?: Checkpoint): Promise<void> {
    return this.#inTurn(() => this.#save(checkpoint))
  }

  /**
   * Removes snapshots of this sync that the rules do not keep; how many. Not while a first pass runs, whose snapshots
   * hold a part only. 0 when somebody else uses the repository.
   */
  thin(): Promise<number> {
    const { keep } = this.#request
    return this.#inTurn(async () => {
      // The lock that is held for what is not committed yet would stand in the way.
      if (keep === undefined || this.#latest === undefined || this.#tree.isTouched) return 0
      return this.#forget({ keep })
    })
  }

  async close(): Promise<void> {
    await this.#turn
    const [editor, connected] = [this.#editor, this.#connected]
    this.#editor = undefined
    this.#connected = undefined
    try {
      await editor?.close()
    } finally {
      await connected?.close()
    }
  }

  get #filter() {
    const { source, tag = 'sync' } = this.#request
    return { hosts: [this.#request.hostname ?? hostname()], paths: [source], tags: [[tag]] }
  }

  get #tree(): SnapshotEditor {
    if (this.#editor === undefined) throw new Error('the target is not open')
    return this.#editor
  }

  #inTurn<T>(work: () => Promise<T>): Promise<T> {
    const next = this.#turn.then(work, work)
    this.#turn = next.catch(() => undefined)
    return next
  }

  async #save(checkpoint: Checkpoint | undefined): Promise<void> {
    const isTouched = this.#tree.isTouched
    const isOther = checkpoint !== undefined && checkpoint.root !== this.#checkpoint?.root
    if (!isTouched && !isOther && (checkpoint === undefined || checkpoint.sequence === this.#checkpoint?.sequence))
      return
    // Another index: the sync sends everything anew, to what it takes for empty. Until it does, the last snapshot stays.
    if (!isTouched && isOther) this.#isForeign = this.#latest !== undefined
    const { tag = 'sync' } = this.#request
    const held = checkpoint ?? this.#checkpoint
    const foreign = this.#isForeign ? { isForeign: true } : {}
    const { snapshotId, tree } = await this.#tree.commit({
      hostname: this.#request.hostname ?? hostname(),
      tags: [tag],
      fields: held === undefined ? {} : { [FIELD]: { ...held, nextStage: this.#nextStage, ...foreign } },
    })
    const isFirst = this.#isFirst
    this.#isFirst = this.#latest === undefined
    const before = this.#latest
    this.#latest = { id: snapshotId, tree }
    this.#checkpoint = held
    // A name was carried over once more and was the same: one snapshot of it is enough. The first one of all is empty.
    const isSpare = before !== undefined && (before.tree === tree || isFirst)
    if (isSpare && this.#stage.size === 0) await this.#forget({ ids: [before.id] })
  }

  /** Removes snapshots, unless somebody else uses the repository. How many. */
  async #forget(request: Pick<ForgetRequest, 'ids' | 'keep'>): Promise<number> {
    const { repository } = this.#connected as Connected
    try {
      return (await forgetSnapshots(repository, { ...this.#filter, ...request, signal: this.#signal })).removed.length
    } catch (error) {
      if ((error as LsyncError).code === 'REPOSITORY_LOCKED') return 0
      throw error
    }
  }

  /** Carries out one record. Whether an operation has come to its end with it. */
  async #record(state: Lane, record: DecodedRecord): Promise<boolean> {
    if (record.kind === 'operation') {
      const { operation } = record
      if (!hasContent(operation)) {
        await this.#carryOut(operation)
        return true
      }
      state.begin(operation)
      state.content =
        operation.do === 'file' ? await this.#tree.beginFile() : await this.#tree.beginPatch(operation.path)
      return false
    }
    if (record.kind === 'content') {
      if (state.failure === undefined) await state.add(record.bytes)
      return false
    }
    const { operation, content, failure } = state
    if (failure !== undefined) throw failure
    if (record.kind === 'abort' || operation === undefined || content === undefined) return true
    await state.skipHoles()
    const isShared = operation.do === 'patch' && operation.shared
    await this.#tree.finish(operation.path, await content.finish(operation.sizeBytes), operation.meta, { isShared })
    return true
  }

  async #carryOut(operation: PlainOperation): Promise<void> {
    const tree = this.#tree
    switch (operation.do) {
      case 'remove':
        return tree.remove(operation.path)
      case 'out': {
        this.#nextStage = Math.max(this.#nextStage, operation.stage + 1)
        const taken = await tree.take(operation.path)
        // Repeated: it is in the stage already.
        if (taken === undefined) tree.drop(taken)
        else this.#stage.set(operation.stage, taken)
        return
      }
      case 'in': {
        const taken = this.#stage.get(operation.stage)
        this.#stage.delete(operation.stage)
        return tree.put(operation.path, taken)
      }
      case 'rename':
        return tree.put(operation.to, await tree.take(operation.from))
      case 'directory':
        return tree.makeDirectory(operation.path)
      case 'keep':
        return tree.keep(operation.path, operation.names, operation)
      case 'link':
        return tree.link(operation.path, operation.to)
      case 'symlink':
        return tree.makeSymlink(operation.path, operation.target, operation.meta)
      case 'special':
        return tree.makeSpecial(operation.path, operation.type, operation.rdev, operation.meta)
      case 'meta':
        return tree.setMeta(operation.path, operation.meta)
    }
  }
}

type DecodedRecord =
  | { readonly kind: 'operation'; readonly operation: PlainOperation | ContentOperation }
  | { readonly kind: 'content'; readonly bytes: Buffer }
  | { readonly kind: 'finish' | 'abort' }

/** A part of a file that is written, or left out. */
interface Piece {
  readonly extent: Extent
  readonly isHole: boolean
}

/** One lane: what it sends comes in order, a file maybe in several batches. */
class Lane {
  readonly #decoder = new OperationDecoder()
  operation: ContentOperation | undefined
  content: ContentWriter | undefined
  /** Why the file cannot be made; what comes of it goes nowhere. */
  failure: unknown
  /** Extents and holes of the file, ascending; which one is next, and how much of it is done. */
  #pieces: readonly Piece[] = []
  #piece = 0
  #done = 0

  decode(batch: Uint8Array): DecodedRecord[] {
    const records: DecodedRecord[] = []
    this.#decoder.decode(batch, {
      operation: (operation) => records.push({ kind: 'operation', operation: operation as PlainOperation }),
      content: (bytes) => records.push({ kind: 'content', bytes: Buffer.from(bytes) }),
      finish: () => records.push({ kind: 'finish' }),
      abort: () => records.push({ kind: 'abort' }),
    })
    return records
  }

  begin(operation: ContentOperation): void {
    this.operation = operation
    this.content = undefined
    this.failure = undefined
    const holes = operation.do === 'patch' ? operation.holes : []
    this.#pieces = [
      ...operation.extents.map((extent) => ({ extent, isHole: false })),
      ...holes.map((extent) => ({ extent, isHole: true })),
    ].sort((left, right) => left.extent[0] - right.extent[0])
    this.#piece = 0
    this.#done = 0
  }

  async add(bytes: Buffer): Promise<void> {
    for (let at = 0; at < bytes.length; ) {
      await this.skipHoles()
      const { extent } = this.#pieces[this.#piece] as Piece
      const [offset, length] = extent
      const count = Math.min(length - this.#done, bytes.length - at)
      await this.content?.add(offset + this.#done, bytes.subarray(at, at + count))
      at += count
      this.#done += count
      if (this.#done === length) {
        this.#piece++
        this.#done = 0
      }
    }
  }

  /** The holes before the next extent, or after the last one. */
  async skipHoles(): Promise<void> {
    for (let piece = this.#pieces[this.#piece]; piece?.isHole === true; piece = this.#pieces[this.#piece]) {
      await this.content?.skip(...(piece.extent as [number, number]))
      this.#piece++
    }
  }
}

function hasContent(operation: Operation): operation is ContentOperation {
  return operation.do === 'file' || operation.do === 'patch'
}

function pathOf(operation: Operation): Failure['path'] {
  return operation.do === 'rename' ? operation.to : operation.path
}

interface Field {
  readonly checkpoint: Checkpoint
  readonly nextStage: number
  readonly isForeign: boolean
}

function fieldOf({ others, tags }: Snapshot): Field | undefined {
  // What `repair snapshots` has left of one holds less than was safe.
  if (tags.includes('repaired')) return undefined
  const field = others[FIELD] as Partial<Checkpoint & { nextStage: number; isForeign: boolean }> | undefined
  const { root, sequence, nextStage = 0, isForeign = false } = field ?? {}
  if (typeof root !== 'string' || !Number.isSafeInteger(sequence) || !Number.isSafeInteger(nextStage)) return undefined
  return { checkpoint: { root, sequence: sequence as number }, nextStage, isForeign }
}
