import type { ByteString } from '@lsync/posix'
import { type Connection, ConnectionLostError } from '@lsync/ssh'
import type { DescribedFile } from '../describe.ts'
import type { Checkpoint } from '../model/checkpoint.ts'
import type { Failure, TreePath } from '../model/operation.ts'
import { FRAME } from '../protocol/frame.ts'
import {
  decodeCheckpoint,
  decodeDescription,
  decodeFailures,
  decodeState,
  encodeCheckpoint,
  encodeDescribe,
  encodePath,
} from '../protocol/message.ts'
import { TargetGoneError } from '../target-state.ts'
import { ClientSession, type SessionOptions } from './client-session.ts'
import type { Target, TargetState } from './target.ts'

export interface RemoteTargetRequest extends Omit<SessionOptions, 'signal'> {
  /** What messages call it. */
  readonly description: string
  /** Beneath what the server serves. */
  readonly path: ByteString
  readonly connect: (signal: AbortSignal) => Promise<Connection>
}

const MOST_DESCRIBED_BYTES = 64 << 20

/**
 * A target behind `lsync serve`. After the connection is lost every call fails with CONNECTION_LOST; `close` and a new
 * `open` connect again.
 */
export class RemoteTarget implements Target {
  readonly description: string
  readonly delivery = { mode: 'encoded' } as const
  readonly #request: RemoteTargetRequest
  #session: ClientSession | undefined

  constructor(request: RemoteTargetRequest) {
    this.description = request.description
    this.#request = request
  }

  async open(signal: AbortSignal, isKnown = false): Promise<TargetState> {
    const session = await this.#connect(signal)
    this.#session = session
    // To be opened, it would be made.
    if (isKnown) await this.#assertKnown(session)
    return decodeState(await session.request(FRAME.open, encodePath(this.#request.path)))
  }

  async #assertKnown(session: ClientSession): Promise<void> {
    const status = await session.request(FRAME.status, encodePath(this.#request.path)).catch((cause: unknown) => {
      if ((cause as { code?: unknown }).code !== 'SERVED_PATH') throw cause
      throw new TargetGoneError(this.description, 'was synced before and cannot be found there any more')
    })
    if (decodeCheckpoint(status) !== undefined) return
    throw new TargetGoneError(this.description, 'was synced before and does not know it: it may not be mounted there')
  }

  /** What the target holds durably, asked without taking it. */
  async peek(signal: AbortSignal): Promise<Checkpoint | undefined> {
    const session = await this.#connect(signal)
    try {
      return decodeCheckpoint(await session.request(FRAME.status, encodePath(this.#request.path)))
    } finally {
      session.end()
    }
  }

  async deliver(lane: number, batch: Uint8Array): Promise<readonly Failure[]> {
    return decodeFailures(await this.#opened.request(FRAME.deliver, batch, lane))
  }

  async describe(path: TreePath): Promise<readonly DescribedFile[] | undefined> {
    const session = this.#opened
    if (!session.canDescribe) return undefined
    const files: DescribedFile[] = []
    let bytes = 0
    // What a server tells beyond that is taken for unknown: it may never come to an end.
    for (let isWhole = false; !isWhole && bytes < MOST_DESCRIBED_BYTES; ) {
      const after = files.at(-1)?.name ?? ''
      const answer = await session.request(FRAME.describe, encodeDescribe(path, after))
      const part = decodeDescription(answer, after)
      files.push(...part.files)
      bytes += answer.length
      isWhole = part.isWhole
    }
    return files
  }

  async barrier(checkpoint?: Checkpoint): Promise<void> {
    await this.#opened.request(FRAME.barrier, encodeCheckpoint(checkpoint))
  }

  async close(): Promise<void> {
    const session = this.#session
    this.#session = undefined
    if (session === undefined) return
    try {
      await session.request(FRAME.close, new Uint8Array(0))
    } catch {
      // Whatever ended the connection has freed the target, too.
    } finally {
      session.end()
    }
  }

  get #opened(): ClientSession {
    if (this.#session === undefined) throw new ConnectionLostError('it is closed')
    return this.#session
  }

  async #connect(signal: AbortSignal): Promise<ClientSession> {
    const connection = await this.#request.connect(signal)
    return ClientSession.start(connection, { ...this.#request, signal })
  }
}
