import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { Socket } from 'node:net'
import { homedir, userInfo } from 'node:os'
import { printable } from '@lsync/posix'
import type { AnyAuthMethod, Client, ClientChannel, ConnectConfig } from 'ssh2'
import type { RemoteAddress } from './address.ts'
import type { Connection } from './connection.ts'
import { ConnectionLostError } from './errors.ts'
import { gatherWrites } from './gather-writes.ts'
import { hostName, KnownHosts } from './known-hosts.ts'
import { passKeysAsObjects } from './packet-keys.ts'
import { endOf, errorOfExit } from './remote-command.ts'
import {
  AuthenticationError,
  ConnectError,
  HostKeyChangedError,
  HostKeyRevokedError,
  HostKeyUnknownError,
  IdentityError,
} from './ssh-errors.ts'

export interface SshOptions {
  /** Private keys to try before the agent's and the usual files. */
  readonly identities?: readonly string[]
  /** Instead of ~/.ssh/known_hosts and the system's. */
  readonly knownHosts?: readonly string[]
  /** For the connection, the keys and the login together. */
  readonly connectTimeoutMs?: number
}

const DEFAULT_TIMEOUT_MS = 30_000
const KEEPALIVE_MS = 15_000
const KEEPALIVE_MISSED = 4
// sshd's MaxSessions is 10 by default.
const MAX_CHANNELS = 8
const MAX_KEY_FILE_BYTES = 64 << 10
// Measured on loopback: 120 MB/s, with AES in the processor. The others follow for servers that lack it.
const CIPHERS = ['aes128-gcm@openssh.com', 'aes256-gcm@openssh.com', 'aes128-ctr', 'aes256-ctr'] as const
const HOST_KEY_TYPES = [
  'ssh-ed25519',
  'ecdsa-sha2-nistp256',
  'ecdsa-sha2-nistp384',
  'ecdsa-sha2-nistp521',
  'rsa-sha2-512',
  'rsa-sha2-256',
] as const
type HostKeyType = (typeof HOST_KEY_TYPES)[number]

/** One connection to a machine with the channels in it. */
interface OpenChannel {
  readonly channel: ClientChannel
  readonly end: ReturnType<typeof endOf>
}

interface Shared {
  readonly client: Client
  channels: number
  failure: Error | undefined
}

/**
 * SSH connections of one process, shared by all that go to the same machine as the same user, eight channels each.
 * Host keys are checked against known_hosts, and one that is unknown or has changed is never accepted.
 */
export class SshConnections {
  readonly #options: SshOptions
  readonly #shared = new Map<string, Promise<Shared>[]>()

  constructor(options: SshOptions = {}) {
    this.#options = options
  }

  /** Runs a command there. Its standard input and output are the connection. */
  execute(address: RemoteAddress, command: string, signal: AbortSignal): Promise<Connection> {
    return this.#channel(address, signal, (client, done) => client.exec(command, done))
  }

  /** A subsystem of the server, such as `sftp`. */
  subsystem(address: RemoteAddress, name: string, signal: AbortSignal): Promise<Connection> {
    return this.#channel(address, signal, (client, done) => client.subsys(name, done))
  }

  async #channel(
    address: RemoteAddress,
    signal: AbortSignal,
    ask: (client: Client, done: (error: Error | undefined, channel: ClientChannel) => void) => void,
  ): Promise<Connection> {
    const shared = await this.#take(address, signal)
    const { channel, end } = await new Promise<OpenChannel>((resolve, reject) => {
      ask(shared.client, (error, opened) => {
        if (error) return reject(error)
        // Listened to at once: how the command ended may have come together with word that it was started.
        opened.once('close', () => this.#release(shared))
        resolve({ channel: opened, end: endOf(opened) })
      })
    }).catch((error: Error) => {
      this.#release(shared)
      throw shared.failure ?? new ConnectError(whereOf(address), error.message, error)
    })
    return {
      readable: channel,
      writable: channel,
      destroy: () => {
        channel.destroy()
        // A connection that fell silent says nothing of its channels' ends either, and nobody must try it again.
        if (shared.channels > 1) return
        shared.failure ??= new ConnectionLostError('it was given up')
        shared.client.destroy()
      },
      explain: async () => errorOfExit(await end, whereOf(address)) ?? shared.failure,
    }
  }

  async #take(address: RemoteAddress, signal: AbortSignal): Promise<Shared> {
    signal.throwIfAborted()
    const key = `${userOf(address)}@${whereOf(address)}`
    const list = this.#shared.get(key) ?? []
    this.#shared.set(key, list)
    for (const known of [...list]) {
      const shared = await known.catch(() => undefined)
      if (shared === undefined || shared.failure !== undefined || shared.channels >= MAX_CHANNELS) continue
      shared.channels++
      return shared
    }
    const made = connect(address, this.#options, signal)
    list.push(made)
    const forget = () => void list.splice(list.indexOf(made), 1)
    const shared = await made.catch((error) => {
      forget()
      throw error
    })
    shared.client.once('close', forget)
    shared.channels++
    return shared
  }

  #release(shared: Shared): void {
    shared.channels--
    if (shared.channels > 0) return
    // From here on nobody may take it, though it is not closed yet.
    shared.failure ??= new ConnectionLostError('it was closed')
    shared.client.end()
  }
}

function userOf({ user }: RemoteAddress): string {
  return user ?? userInfo().username
}

function whereOf({ host, port }: RemoteAddress): string {
  return hostName(host, port ?? 22)
}

async function connect(address: RemoteAddress, options: SshOptions, signal: AbortSignal): Promise<Shared> {
  // Loading it takes as long as starting lsync does, and only those who go over ssh need it.
  const { default: ssh2 } = await import('ssh2')
  const { host, port = 22 } = address
  const where = whereOf(address)
  const timeoutMs = options.connectTimeoutMs ?? DEFAULT_TIMEOUT_MS
  const known = new KnownHosts((options.knownHosts ?? defaultKnownHosts()).map(readIfThere))
  const tried: string[] = []
  let hostKeyError: Error | undefined
  let isReady = false
  const client = new ssh2.Client()
  const socket = new Socket()
  // `connect` itself would take it back.
  socket.once('connect', () => gatherWrites(socket))
  const shared: Shared = { client, channels: 0, failure: undefined }
  const config: ConnectConfig = {
    sock: socket,
    username: userOf(address),
    readyTimeout: timeoutMs,
    keepaliveInterval: KEEPALIVE_MS,
    keepaliveCountMax: KEEPALIVE_MISSED,
    algorithms: { cipher: [...CIPHERS], serverHostKey: orderedTypes(known.typesFor(host, port)) },
    hostVerifier: (key: Buffer) => {
      hostKeyError = hostKeyProblem(known, address, key)
      return hostKeyError === undefined
    },
    authHandler: authMethods(ssh2.utils.parseKey, userOf(address), options, tried) as AnyAuthMethod[],
  }
  return new Promise((resolve, reject) => {
    const fail = (error: Error) => {
      shared.failure ??= error
      reject(error)
      client.destroy()
    }
    const abort = () => fail(signal.reason)
    signal.addEventListener('abort', abort, { once: true })
    // Small requests would otherwise wait for the answer to the one before (Nagle): 40 ms each, measured on loopback.
    client.on('connect', () => client.setNoDelay(true))
    client.on('ready', () => {
      signal.removeEventListener('abort', abort)
      isReady = true
      resolve(shared)
    })
    client.on('error', (error: Error & { level?: string }) => {
      signal.removeEventListener('abort', abort)
      if (hostKeyError !== undefined) fail(hostKeyError)
      else if (error.level === 'client-authentication') fail(new AuthenticationError(where, tried))
      else if (isReady) fail(new ConnectionLostError(error.message, { cause: error }))
      else fail(new ConnectError(where, error.message, error))
    })
    client.on('close', () => {
      signal.removeEventListener('abort', abort)
      fail(new ConnectionLostError('it was closed from the other side'))
    })
    passKeysAsObjects(client)
    client.connect(config)
    socket.connect({ host, port })
  })
}

/** The types by which a host is known come first, so that it shows the key that can be compared. */
function orderedTypes(known: readonly string[]): HostKeyType[] {
  const isKnown = (type: string) => known.includes(type.startsWith('rsa-sha2-') ? 'ssh-rsa' : type)
  return [...HOST_KEY_TYPES.filter(isKnown), ...HOST_KEY_TYPES.filter((type) => !isKnown(type))]
}

function hostKeyProblem(known: KnownHosts, address: RemoteAddress, key: Buffer): Error | undefined {
  const where = whereOf(address)
  const fingerprint = `SHA256:${createHash('sha256').update(key).digest('base64').replace(/=+$/, '')}`
  switch (known.judge(address.host, address.port ?? 22, key)) {
    case 'known':
      return undefined
    case 'changed':
      return new HostKeyChangedError(where, fingerprint)
    case 'revoked':
      return new HostKeyRevokedError(where, fingerprint)
    case 'authority':
      return new HostKeyUnknownError(where, fingerprint, true)
    case 'unknown':
      return new HostKeyUnknownError(where, fingerprint, false)
  }
}

function defaultKnownHosts(): string[] {
  return [
    `${homedir()}/.ssh/known_hosts`,
    `${homedir()}/.ssh/known_hosts2`,
    '/etc/ssh/ssh_known_hosts',
    '/etc/ssh/ssh_known_hosts2',
  ]
}

function readIfThere(path: string): string {
  try {
    return readFileSync(path, 'latin1')
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException
    if (code === 'ENOENT' || code === 'ENOTDIR' || code === 'EACCES') return ''
    throw error
  }
}

/** What to try, in this order: the keys that were named, the agent's, the usual files. `tried` gets each as it comes. */
function authMethods(parse: ParseKey, username: string, options: SshOptions, tried: string[]): object[] {
  const methods: object[] = []
  for (const path of options.identities ?? []) {
    const key = privateKey(parse, path)
    if (key instanceof Error) throw new IdentityError(path, key.message)
    methods.push({ type: 'publickey', username, key })
    tried.push(path)
  }
  const agent = process.env['SSH_AUTH_SOCK']
  if (agent !== undefined && agent !== '') {
    methods.push({ type: 'agent', username, agent })
    tried.push('the agent')
  }
  for (const name of ['id_ed25519', 'id_ecdsa', 'id_rsa']) {
    const path = `${homedir()}/.ssh/${name}`
    const key = privateKey(parse, path)
    if (key instanceof Error) continue
    methods.push({ type: 'publickey', username, key })
    tried.push(path)
  }
  return methods
}

type ParseKey = typeof import('ssh2')['utils']['parseKey']

function privateKey(parse: ParseKey, path: string): Buffer | Error {
  let bytes: Buffer
  try {
    bytes = readFileSync(path)
  } catch (error) {
    return error as Error
  }
  if (bytes.length > MAX_KEY_FILE_BYTES) return new Error('it is too large')
  const parsed = parse(bytes)
  if (parsed instanceof Error) return parsed
  return parsed.isPrivateKey() ? bytes : new Error(`${printable(path)} is no private key`)
}
