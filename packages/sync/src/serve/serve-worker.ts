import { parentPort } from 'node:worker_threads'
import { zstdDecompressSync } from 'node:zlib'
import { type ByteString, errnoOf, type HostPath, LsyncError, syncFileSystem, takeOwnUmask } from '@lsync/posix'
import { ProtocolError } from '@lsync/ssh'
import { Applier } from '../applier.ts'
import { describeDirectory } from '../describe.ts'
import { MadeDirectories, type MadeNews } from '../made-directories.ts'
import type { Checkpoint } from '../model/checkpoint.ts'
import type { TreePath } from '../model/operation.ts'
import { encodeDescription, encodeError, encodeFailures, encodeState } from '../protocol/message.ts'
import { MAX_BATCH_BYTES } from '../protocol/operation-codec.ts'
import type { TargetPlace } from '../target-state.ts'
import type { TargetLoss } from '../transport/target.ts'
import { appendOnly } from './append-only.ts'
import { Lane } from './lane.ts'
import { openServed } from './place.ts'

/** Descriptors of the open target; they are the process's, so every worker may use them. */
export interface ServedTarget {
  readonly rootFd: number
  readonly stageFd: number
  readonly losses: readonly TargetLoss['what'][]
  readonly isAppendOnly: boolean
}

/** What the server asks of a worker. The first one also keeps the target's state. */
export type ServeJob =
  | {
      readonly job: 'open'
      readonly root: HostPath
      readonly path: ByteString
      readonly create: boolean
      readonly isAppendOnly: boolean
    }
  | { readonly job: 'target'; readonly target: ServedTarget }
  | { readonly job: 'describe'; readonly path: TreePath; readonly after: ByteString }
  | {
      readonly job: 'batch'
      readonly lane: number
      readonly bytes: Uint8Array
      readonly isCompressed: boolean
      /** What other workers have made since this one's last batch. */
      readonly news: readonly MadeNews[]
    }
  | { readonly job: 'barrier'; readonly checkpoint: Checkpoint | undefined; readonly nextStage: number }
  | { readonly job: 'disown' }
  | { readonly job: 'end' }

/** `payload` is the answer's. `isBroken`: the client broke the protocol, or lsync has a bug; nothing may follow. */
export type ServeResult =
  | {
      readonly done: Uint8Array
      readonly target?: ServedTarget
      readonly highestStage?: number
      /** Operations that were carried out. */
      readonly files?: number
      readonly news?: readonly MadeNews[]
    }
  | { readonly failed: Uint8Array; readonly isBroken: boolean; readonly reason: string }

const hasOwnUmask = takeOwnUmask()
const lanes = new Map<number, Lane>()
const made = new MadeDirectories()
let target: ServedTarget | undefined
let place: TargetPlace | undefined

parentPort?.on('message', (job: ServeJob) => {
  let result: ServeResult
  try {
    result = run(job)
  } catch (error) {
    const isForeseen = error instanceof LsyncError || errnoOf(error) !== undefined
    const isBroken = !isForeseen || error instanceof ProtocolError
    const reason = error instanceof Error ? (isForeseen ? error.message : (error.stack ?? '')) : String(error)
    result = { failed: encodeError(error), isBroken, reason }
  }
  parentPort?.postMessage(result)
})

function run(job: ServeJob): ServeResult {
  switch (job.job) {
    case 'open': {
      place = openServed(job.root, job.path, job.create)
      const { rootFd, stageFd, state } = place
      const losses = state.losses.map(({ what }) => what)
      target = { rootFd, stageFd, losses, isAppendOnly: job.isAppendOnly }
      return { done: encodeState(state), target }
    }
    case 'target':
      target = job.target
      return NOTHING
    case 'batch': {
      const bytes = job.isCompressed ? decompressed(job.bytes) : job.bytes
      made.learn(job.news)
      const { failures, highestStage, operations } = laneOf(job.lane).run(bytes)
      return { done: encodeFailures(failures), highestStage, files: operations, news: made.takeNews() }
    }
    case 'disown':
      for (const lane of lanes.values()) lane.disown()
      return NOTHING
    case 'describe':
      if (target === undefined) return { done: encodeDescription({ files: [], isWhole: true }) }
      return { done: encodeDescription(describeDirectory(target.rootFd, job.path, job.after)) }
    case 'barrier':
      for (const lane of lanes.values()) lane.disown()
      if (target !== undefined) syncFileSystem(target.rootFd, '')
      place?.assertThere()
      if (job.checkpoint !== undefined) place?.storeCheckpoint(job.checkpoint, job.nextStage)
      return NOTHING
    case 'end':
      for (const lane of lanes.values()) lane.end()
      lanes.clear()
      made.clear()
      place?.close()
      place = undefined
      return NOTHING
  }
}

const NOTHING: ServeResult = { done: new Uint8Array(0) }

function laneOf(number: number): Lane {
  const known = lanes.get(number)
  if (known !== undefined) return known
  const { rootFd, stageFd, losses, isAppendOnly } = target as ServedTarget
  const applier = new Applier({ rootFd, stageFd, losses: new Set(losses), onlyNew: isAppendOnly, hasOwnUmask, made })
  const lane = new Lane(applier, isAppendOnly ? appendOnly(rootFd) : () => 'go')
  lanes.set(number, lane)
  return lane
}

/** The batch in a compressed payload. What says one size and has another never takes more memory than the largest. */
function decompressed(payload: Uint8Array): Uint8Array {
  const bytes = Buffer.from(payload.buffer, payload.byteOffset, payload.byteLength)
  const sizeBytes = bytes.readUInt32LE(0)
  if (sizeBytes > MAX_BATCH_BYTES) throw new ProtocolError(`a batch of ${sizeBytes} bytes`)
  let batch: Buffer
  try {
    batch = zstdDecompressSync(bytes.subarray(4), { maxOutputLength: Math.max(1, sizeBytes) })
  } catch (cause) {
    throw new ProtocolError('a batch that zstd does not know', { cause })
  }
  if (batch.length !== sizeBytes) throw new ProtocolError('a batch of another size than it says')
  return batch
}
