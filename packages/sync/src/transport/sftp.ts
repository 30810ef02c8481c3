import type { Namespace } from '@lsync/overlay-merge'
import type { ByteString } from '@lsync/posix'
import {
  type Connection,
  ConnectionLostError,
  SFTP_CREATE,
  SFTP_EXCLUSIVE,
  SFTP_WRITE,
  SftpClient,
  SftpError,
} from '@lsync/ssh'
import type { DescribedFile } from '../describe.ts'
import type { Checkpoint } from '../model/checkpoint.ts'
import type { Failure, TreePath } from '../model/operation.ts'
import { ConcurrentLane } from './sftp-lane.ts'
import { removeTree, SftpPlace } from './sftp-place.ts'
import { SftpPortable } from './sftp-portable.ts'
import { SftpTree } from './sftp-tree.ts'
import type { Target, TargetLoss, TargetState } from './target.ts'

export interface SftpTargetRequest {
  readonly description: string
  /** Absolute on the server. */
  readonly path: ByteString
  readonly connect: (signal: AbortSignal) => Promise<Connection>
  readonly timeoutMs: number
  /** `tree`: what SFTP has no words for is left out; `portable`: the layer in the portable form, which holds all of it. */
  readonly form: 'tree' | 'portable'
  /** Whose marks a portable layer means. */
  readonly namespace: Namespace
}

interface Opened {
  readonly client: SftpClient
  readonly place: SftpPlace
  readonly sink: SftpTree | SftpPortable
  readonly lanes: Map<number, ConcurrentLane>
}

/** A target on an SFTP server, where there is no lsync. It holds what SFTP has words for; the rest is in its losses. */
export class SftpTarget implements Target {
  readonly description: string
  readonly delivery = { mode: 'encoded' } as const
  readonly #request: SftpTargetRequest
  #open: Opened | undefined

  constructor(request: SftpTargetRequest) {
    this.description = request.description
    this.#request = request
  }

  async open(signal: AbortSignal): Promise<TargetState> {
    const connection = await this.#request.connect(signal)
    const client = await SftpClient.start(connection, this.#request.timeoutMs)
    try {
      const place = await SftpPlace.take(client, this.#request.path)
      const { form, namespace } = this.#request
      const losses = form === 'tree' ? await findLosses(client, place) : portableLosses(client)
      const sink =
        form === 'tree'
          ? new SftpTree(client, place, new Set(losses.map(({ what }) => what)))
          : await SftpPortable.open(client, place, namespace)
      this.#open = { client, place, sink, lanes: new Map() }
      const { checkpoint, isEmpty, nextStage } = place
      return { checkpoint, isEmpty, nextStage, losses }
    } catch (error) {
      client.end()
      throw error
    }
  }

  deliver(lane: number, batch: Uint8Array): Promise<readonly Failure[]> {
    const { client, lanes, sink } = this.#opened
    // Whoever was told so of one batch may leave others out: what follows would make no sense.
    if (client.failure !== undefined) return Promise.reject(client.failure)
    let known = lanes.get(lane)
    if (known === undefined) {
      known = new ConcurrentLane(sink)
      lanes.set(lane, known)
    }
    return known.run(batch)
  }

  async describe(path: TreePath, isAdopted: boolean): Promise<readonly DescribedFile[] | undefined> {
    const { sink } = this.#opened
    return isAdopted && sink instanceof SftpTree ? sink.describe(path) : undefined
  }

  async barrier(checkpoint?: Checkpoint): Promise<void> {
    const { client, place, sink } = this.#opened
    if (sink instanceof SftpPortable) {
      if (checkpoint !== undefined) sink.clearStage()
      await sink.store()
    } else {
      await sink.settle()
      sink.forgetAll()
    }
    if (checkpoint === undefined) return
    await place.store(checkpoint)
    for (const path of await place.abandoned()) await removeTree(client, path)
  }

  async close(): Promise<void> {
    const opened = this.#open
    this.#open = undefined
    if (opened === undefined) return
    const { client, place, sink, lanes } = opened
    try {
      for (const lane of lanes.values()) await lane.end()
      if (sink instanceof SftpTree) await sink.settle()
      await place.release()
    } catch (error) {
      // The lock goes with the process, or when nobody has written to it for two minutes.
      place.abandon()
      if (!(error instanceof ConnectionLostError)) throw error
    } finally {
      client.end()
    }
  }

  get #opened(): Opened {
    if (this.#open === undefined) throw new ConnectionLostError('it is closed')
    return this.#open
  }
}

/** What SFTP has no words for, and what this server does not do. */
async function findLosses(client: SftpClient, place: SftpPlace): Promise<readonly TargetLoss[]> {
  const losses: TargetLoss[] = [
    { what: 'xattr', message: 'SFTP has no extended attributes: user.* are not kept' },
    {
      what: 'trusted-xattr',
      message:
        'SFTP has no extended attributes: trusted.* and security.* are not kept, the marks of overlayfs among them',
    },
    { what: 'acl', message: 'SFTP has no POSIX ACLs' },
    { what: 'special', message: 'SFTP makes no devices, sockets and pipes: they are left out, whiteouts among them' },
    { what: 'time', message: 'SFTP keeps modification times in whole seconds from 1970 to 2106' },
    { what: 'flags', message: 'SFTP has no flags immutable and append-only (chattr)' },
    { what: 'durable', message: durabilityOf(client) },
    HOLES,
  ]
  if (!(await keepsOwners(client, place))) {
    losses.push({ what: 'owner', message: 'owners are not kept: everything belongs to the user that logs in' })
  }
  if (!client.has('hardlink@openssh.com')) {
    losses.push({ what: 'hard-link', message: 'the server makes no hard links: they become separate files' })
  }
  if (!client.has('lsetstat@openssh.com')) {
    losses.push({ what: 'symlink-meta', message: 'owners and times of symlinks are not kept' })
  }
  if (!client.has('posix-rename@openssh.com')) {
    losses.push({
      what: 'atomic',
      message: 'the server cannot rename over a file: while one is replaced, it is missing',
    })
  }
  return losses
}

/** What the portable form does not say. */
function portableLosses(client: SftpClient): readonly TargetLoss[] {
  return [
    { what: 'flags', message: 'the portable form has no flags immutable and append-only (chattr)' },
    { what: 'durable', message: durabilityOf(client) },
    HOLES,
  ]
}

const HOLES: TargetLoss = {
  what: 'holes',
  message: 'SFTP punches no holes: a sparse file that changes in part has none after',
}

function durabilityOf(client: SftpClient): string {
  return client.has('fsync@openssh.com')
    ? 'the content of files is made durable, but SFTP has no way to make their names so'
    : 'the server has no way to make anything durable'
}

async function keepsOwners(client: SftpClient, place: SftpPlace): Promise<boolean> {
  const path = place.temporary()
  const handle = await client.open(path, SFTP_WRITE | SFTP_CREATE | SFTP_EXCLUSIVE)
  try {
    await client.fsetstat(handle, { uid: 1, gid: 1 }, path)
    return (await client.fstat(handle, path)).uid === 1
  } catch (error) {
    if (error instanceof SftpError) return false
    throw error
  } finally {
    await client.close(handle)
    await client.remove(path)
  }
}
