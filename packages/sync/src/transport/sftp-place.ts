import { createHash, randomBytes } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { hostname } from 'node:os'
import { TargetBusyError } from '@lsync/overlay-merge'
import type { ByteString } from '@lsync/posix'
import {
  SFTP_CREATE,
  SFTP_EXCLUSIVE,
  SFTP_READ,
  SFTP_WRITE,
  type SftpAttributes,
  type SftpClient,
  SftpError,
} from '@lsync/ssh'
import type { Checkpoint } from '../model/checkpoint.ts'
import { STATE_INSIDE } from '../target-path.ts'
import { TargetStateDamagedError } from '../target-state.ts'

const STATE_BESIDE = '.lsync.sync.'
const NAME_MAX = 255
const RECORD_BYTES = 4096
const STAGED = /^n(\d{1,15})$/
const HEARTBEAT_MS = 20_000
// Of the server's clock. A client that is there writes six times as often.
const STALE_S = 120
const S_IFMT = 0o170000
const S_IFDIR = 0o040000

export const isDirectory = (found: SftpAttributes | undefined) => ((found?.mode ?? 0) & S_IFMT) === S_IFDIR

/** Where a target lies on an SFTP server, and its state beside it (or in it, where no rename leads in from beside). */
export class SftpPlace {
  /** Absolute, without symlinks. */
  readonly root: ByteString
  /** A private directory from which files are renamed into the target. */
  readonly stage: ByteString
  readonly #client: SftpClient
  readonly #state: ByteString
  readonly #lock: Buffer
  readonly #heart: NodeJS.Timeout
  readonly #tag = randomBytes(6).toString('hex')
  #count = 0
  checkpoint: Checkpoint | undefined
  nextStage = 0
  isEmpty = false

  private constructor(client: SftpClient, root: ByteString, state: ByteString, lock: Buffer) {
    this.#client = client
    this.root = root
    this.#state = state
    this.stage = `${state}/stage` as ByteString
    this.#lock = lock
    this.#heart = setInterval(() => {
      // Whoever lost the connection is told so by the next operation.
      client.write(lock, 0, Buffer.from(OWNER), `${state}/lock`).catch(() => undefined)
    }, HEARTBEAT_MS)
  }

  /**
   * Takes a target; makes its directory if only that is missing.
   * @throws {TargetBusyError} if another client has it
   */
  static async take(client: SftpClient, path: ByteString): Promise<SftpPlace> {
    if ((await client.lstat(path)) === undefined) await client.mkdir(path, 0o755)
    const root = await client.realpath(path)
    // The root of the server has nothing beside it.
    const beside = root === '/' ? undefined : besideOf(root)
    const found = beside === undefined ? undefined : await tryState(client, root, beside)
    const [inside] = (await client.readdir(root)).filter(({ name }) => STATE_INSIDE.test(name))
    const within = `${root === '/' ? '' : root}/${inside?.name ?? `.lsync-${randomBytes(16).toString('hex')}`}`
    const state = found ?? (within as ByteString)
    if (found === undefined) await makeState(client, state)
    const place = new SftpPlace(client, root, state, await takeLock(client, state, root))
    try {
      await place.#read()
    } catch (error) {
      await place.release()
      throw error
    }
    return place
  }

  /** A name in the stage that nothing has. */
  temporary(): ByteString {
    return `${this.stage}/t${this.#tag}.${this.#count++}` as ByteString
  }

  staged(stage: number): ByteString {
    return `${this.stage}/n${stage}` as ByteString
  }

  /** What the target durably holds, from now on. Everything before it must be durable. */
  async store(checkpoint: Checkpoint): Promise<void> {
    const record = JSON.stringify({ version: 1, ...checkpoint, nextStage: this.nextStage })
    await replaceFile(this.#client, this.temporary(), `${this.#state}/checkpoint` as ByteString, [
      Buffer.from(`${record}\n${checksum(record)}\n`),
    ])
    this.checkpoint = checkpoint
  }

  /** Names in the stage that were taken out of the tree for good. */
  async abandoned(): Promise<ByteString[]> {
    const entries = await this.#client.readdir(this.stage)
    return entries.filter(({ name }) => STAGED.test(name)).map(({ name }) => `${this.stage}/${name}` as ByteString)
  }

  /** Gives the target back to others. */
  async release(): Promise<void> {
    clearInterval(this.#heart)
    await this.#client.remove(`${this.#state}/lock` as ByteString)
    await this.#client.close(this.#lock)
  }

  /** Stops the heartbeat when the connection is gone. The lock goes stale, or is taken again by this host. */
  abandon(): void {
    clearInterval(this.#heart)
  }

  async #read(): Promise<void> {
    const entries = await this.#client.readdir(this.root)
    this.isEmpty = entries.every(({ name }) => `${this.root}/${name}` === this.#state)
    for (const { name } of await this.#client.readdir(this.stage)) {
      const [, number] = STAGED.exec(name) ?? []
      if (number !== undefined) this.nextStage = Math.max(this.nextStage, Number(number) + 1)
      else await removeTree(this.#client, `${this.stage}/${name}` as ByteString)
    }
    const path = `${this.#state}/checkpoint` as ByteString
    const text = await readSmall(this.#client, path)
    if (text === undefined) return
    const [record = '', sum] = text.split('\n')
    if (sum !== checksum(record)) throw new TargetStateDamagedError(path, 'the checkpoint has another checksum')
    const { version, root, sequence, nextStage } = JSON.parse(record)
    if (version !== 1 || typeof root !== 'string' || !Number.isSafeInteger(sequence)) {
      throw new TargetStateDamagedError(path, `the checkpoint has version ${version}`)
    }
    this.checkpoint = { root, sequence }
    this.nextStage = Math.max(this.nextStage, Number(nextStage) || 0)
  }
}

/** Writes a whole file under a temporary name and gives it its own. */
export async function replaceFile(
  client: SftpClient,
  temporary: ByteString,
  path: ByteString,
  pieces: Iterable<Uint8Array>,
): Promise<void> {
  const handle = await client.open(temporary, SFTP_WRITE | SFTP_CREATE | SFTP_EXCLUSIVE)
  try {
    let offset = 0
    for (const piece of pieces) {
      const writes: Promise<void>[] = []
      for (let at = 0; at < piece.length; at += client.writeBytes) {
        writes.push(client.write(handle, offset + at, piece.subarray(at, at + client.writeBytes), path))
      }
      offset += piece.length
      await Promise.all(writes)
    }
    if (client.has('fsync@openssh.com')) await client.fsync(handle, path)
  } finally {
    await client.close(handle)
  }
  await moveOver(client, temporary, path, async (there) => {
    await client.remove(there)
  })
}

/**
 * Renames over whatever has the new name; what the server does not replace by itself, `takeAway` removes before.
 * `false`: there was nothing to rename.
 */
export async function moveOver(
  client: SftpClient,
  from: ByteString,
  to: ByteString,
  takeAway: (path: ByteString) => Promise<void>,
): Promise<boolean> {
  for (let attempt = 0; ; attempt++) {
    try {
      await client.rename(from, to)
      return true
    } catch (error) {
      if (!(error instanceof SftpError)) throw error
      if (error.code === 'ENOENT' && (await client.lstat(from)) === undefined) return false
      if (attempt > 0 || (await client.lstat(to)) === undefined) throw error
      await takeAway(to)
    }
  }
}

/** Removes what has a name, with all beneath it. No symlink is followed. */
export async function removeTree(client: SftpClient, path: ByteString): Promise<void> {
  const found = await client.lstat(path)
  if (found !== undefined) await removeFound(client, path, found)
}

async function removeFound(client: SftpClient, path: ByteString, found: SftpAttributes): Promise<void> {
  if (!isDirectory(found)) return client.remove(path)
  // Its owner may have taken its own rights away.
  if (((found.mode ?? 0) & 0o700) !== 0o700) await client.setstat(path, { mode: 0o700 })
  const entries = await client.readdir(path)
  await Promise.all(
    entries.map(({ name, attributes }) => removeFound(client, `${path}/${name}` as ByteString, attributes)),
  )
  await client.rmdir(path)
}

function besideOf(root: ByteString): ByteString {
  const slash = root.lastIndexOf('/')
  const base = root.slice(slash + 1)
  const name = `${STATE_BESIDE}${base}`
  const parent = root.slice(0, slash)
  if (name.length <= NAME_MAX) return `${parent}/${name}` as ByteString
  const digest = createHash('sha256').update(base, 'latin1').digest('hex').slice(0, 16)
  return `${parent}/${name.slice(0, NAME_MAX - 17)}.${digest}` as ByteString
}

/** The state beside the target, if it can be there. */
async function tryState(client: SftpClient, root: ByteString, state: ByteString): Promise<ByteString | undefined> {
  try {
    const isNew = (await client.lstat(state)) === undefined
    await makeState(client, state)
    if (!isNew) return state
    const mtime = (await client.lstat(root))?.mtime
    const [from, to] = [`${state}/stage/probe`, `${root}/.lsync-${randomBytes(16).toString('hex')}`] as ByteString[]
    await client.close(await client.open(from as ByteString, SFTP_WRITE | SFTP_CREATE))
    try {
      await client.rename(from as ByteString, to as ByteString)
      await client.remove(to as ByteString)
      if (mtime !== undefined) await client.setstat(root, { mtime })
    } catch (error) {
      await client.remove(from as ByteString)
      throw error
    }
    return state
  } catch (error) {
    if (error instanceof SftpError) return undefined
    throw error
  }
}

async function makeState(client: SftpClient, state: ByteString): Promise<void> {
  for (const path of [state, `${state}/stage` as ByteString]) {
    const found = await client.lstat(path)
    if (found === undefined) await client.mkdir(path, 0o700)
    else if (!isDirectory(found)) throw new TargetStateDamagedError(path, 'it is no directory')
    else if (((found.mode ?? 0) & 0o022) !== 0) {
      throw new TargetStateDamagedError(path, 'others may write into it')
    }
  }
}

/** Who has a lock: this process, so that it finds its own again after a lost connection. */
const OWNER = JSON.stringify({
  host: hostname(),
  boot: bootId(),
  pid: process.pid,
  start: startTimeOf(process.pid),
})

async function takeLock(client: SftpClient, state: ByteString, root: ByteString): Promise<Buffer> {
  const path = `${state}/lock` as ByteString
  for (let attempt = 0; ; attempt++) {
    try {
      return await makeLock(client, state, path)
    } catch (error) {
      if (!(error instanceof SftpError) || attempt > 2) throw error
      if ((await client.lstat(path)) === undefined) continue
      if (!(await isStale(client, state, path))) throw new TargetBusyError(root)
      await client.remove(path)
    }
  }
}

async function makeLock(client: SftpClient, state: ByteString, path: ByteString): Promise<Buffer> {
  if (client.has('hardlink@openssh.com')) {
    const linked = await linkLock(client, state, path)
    if (linked !== undefined) return linked
  }
  const handle = await client.open(path, SFTP_WRITE | SFTP_CREATE | SFTP_EXCLUSIVE)
  await client.write(handle, 0, Buffer.from(OWNER), path)
  return handle
}

/**
 * The lock appears with its owner in it: of one whose line was cut before it had written nobody would know whose it is, and
 * it would stand in everybody's way until it is stale. `undefined` where the server's file system makes no hard links.
 */
async function linkLock(client: SftpClient, state: ByteString, path: ByteString): Promise<Buffer | undefined> {
  const first = `${state}/stage/t${randomBytes(6).toString('hex')}` as ByteString
  const handle = await client.open(first, SFTP_WRITE | SFTP_CREATE | SFTP_EXCLUSIVE)
  try {
    await client.write(handle, 0, Buffer.from(OWNER), first)
    await client.hardlink(first, path)
  } catch (error) {
    await client.close(handle)
    await client.remove(first)
    if (!(error instanceof SftpError) || (await client.lstat(path)) !== undefined) throw error
    return undefined
  }
  await client.remove(first)
  return handle
}

async function isStale(client: SftpClient, state: ByteString, path: ByteString): Promise<boolean> {
  const owner = await readSmall(client, path)
  if (owner !== undefined && isGone(owner)) return true
  const probe = `${state}/stage/t${randomBytes(6).toString('hex')}` as ByteString
  const handle = await client.open(probe, SFTP_WRITE | SFTP_CREATE | SFTP_EXCLUSIVE)
  const now = (await client.fstat(handle, probe)).mtime ?? 0
  await client.close(handle)
  await client.remove(probe)
  return now - ((await client.lstat(path))?.mtime ?? 0) > STALE_S
}

/** Whether a lock is of this machine, and of this process itself or of one that has ended. */
function isGone(owner: string): boolean {
  try {
    const { host, boot, pid, start } = JSON.parse(owner)
    if (host !== hostname() || typeof pid !== 'number') return false
    return boot !== bootId() || pid === process.pid || startTimeOf(pid) !== start
  } catch {
    return false
  }
}

function bootId(): string {
  return readFileSync('/proc/sys/kernel/random/boot_id', 'latin1').trim()
}

/** Tells processes apart that had one pid. Source: proc_pid_stat(5), field 22. */
function startTimeOf(pid: number): string | undefined {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'latin1')
    return text.slice(text.lastIndexOf(')') + 2).split(' ')[19]
  } catch {
    return undefined
  }
}

async function readSmall(client: SftpClient, path: ByteString): Promise<string | undefined> {
  if ((await client.lstat(path)) === undefined) return undefined
  const handle = await client.open(path, SFTP_READ)
  try {
    return (await client.read(handle, 0, RECORD_BYTES)).toString('latin1')
  } finally {
    await client.close(handle)
  }
}

function checksum(record: string): string {
  return createHash('sha256').update(record, 'latin1').digest('hex')
}
