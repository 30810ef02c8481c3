import { randomBytes, scrypt } from 'node:crypto'
import { hostname, userInfo } from 'node:os'
import { promisify } from 'node:util'
import { LsyncError } from '@lsync/posix'
import type { Backend, BackendCall } from './backend/backend.ts'
import { type CipherKey, createEngine } from './crypto/engine.ts'
import { hashOf, openBytes, sealBytes } from './crypto/sealer.ts'
import { formatTime } from './model/go-text.ts'
import type { ObjectId } from './model/tree.ts'

const scryptAsync = promisify<string, Buffer, number, object, Buffer>(scrypt)

/** What it costs to try a password: 128·N·r bytes of memory, p times. */
export interface PasswordCost {
  readonly N: number
  readonly r: number
  readonly p: number
}

/** 32 MiB, three times: 0.25 s of one core here. Source: OWASP's Password Storage Cheat Sheet. */
const DEFAULT_COST: PasswordCost = { N: 32768, r: 8, p: 3 }
// A key file comes from elsewhere; these bound the memory and time that it can ask for.
const MAX_SCRYPT_BYTES = 1024 * 1024 * 1024
const MAX_SCRYPT_P = 64

/** A key file: the repository's keys, sealed by a password. Source: restic's design document, "Keys, Encryption and MAC". */
export interface KeyFile {
  readonly created: string
  readonly username: string
  readonly hostname: string
  readonly kdf: 'scrypt'
  readonly N: number
  readonly r: number
  readonly p: number
  /** Base64. */
  readonly salt: string
  /** Base64 of the sealed `MasterKeyJson`. */
  readonly data: string
}

interface MasterKeyJson {
  readonly mac: { readonly k: string; readonly r: string }
  readonly encrypt: string
}

/** None of the repository's keys opens with this password. */
export class PasswordWrongError extends LsyncError {
  constructor(location: string) {
    super('PASSWORD_WRONG', `no key of ${location} opens with this password`, { hint: 'give the right password' })
  }
}

/** A key file that cannot be used. */
export class KeyInvalidError extends LsyncError {
  constructor(keyId: ObjectId, why: string) {
    super('KEY_INVALID', `key ${keyId.slice(0, 8)} cannot be used: ${why}`, { hint: 'bring it back from a copy' })
  }
}

/** A key as a listing shows it. */
export interface KeyInfo {
  readonly id: ObjectId
  readonly created: string
  readonly username: string
  readonly hostname: string
  /** Whether it is the one that opened the repository. */
  readonly isCurrent: boolean
}

/** Keys that nobody has had before. */
export function newMasterKey(): CipherKey {
  return { encrypt: randomBytes(32), macK: randomBytes(16), macR: randomBytes(16) }
}

/** Seals the keys with a password and stores the file. Returns its id. */
export async function writeKey(
  backend: Backend,
  master: CipherKey,
  password: string,
  call: BackendCall,
  cost: PasswordCost = DEFAULT_COST,
): Promise<string> {
  const salt = randomBytes(64)
  const { encrypt, macK, macR } = master
  const plain: MasterKeyJson = {
    mac: { k: macK.toString('base64'), r: macR.toString('base64') },
    encrypt: encrypt.toString('base64'),
  }
  const engine = createEngine(await derive(password, salt, cost))
  const data = sealBytes(engine, Buffer.from(JSON.stringify(plain)))
  engine.close()
  const file: KeyFile = {
    created: formatTime(BigInt(Date.now()) * 1_000_000n),
    username: userName(),
    hostname: hostname(),
    kdf: 'scrypt',
    ...cost,
    salt: salt.toString('base64'),
    data: data.toString('base64'),
  }
  const content = Buffer.from(JSON.stringify(file))
  const name = hashOf(content)
  await backend.put({ kind: 'key', name }, content, call)
  return name
}

/**
 * Finds the key that a password opens.
 * @throws {PasswordWrongError}
 */
export async function openMasterKey(
  backend: Backend,
  password: string,
  call: BackendCall,
): Promise<{ readonly keyId: ObjectId; readonly master: CipherKey }> {
  let problem: unknown
  for await (const { name } of backend.list('key', call)) {
    try {
      const master = await tryKey(name, await readKeyFile(backend, name, call), password)
      if (master !== undefined) return { keyId: name, master }
    } catch (error) {
      // One that is damaged does not keep the others from opening.
      if (!(error instanceof KeyInvalidError)) throw error
      problem ??= error
    }
  }
  throw problem ?? new PasswordWrongError(backend.location)
}

/** Reads and checks a key file. */
export async function readKeyFile(backend: Backend, keyId: ObjectId, call: BackendCall): Promise<KeyFile> {
  const content = await backend.get({ kind: 'key', name: keyId }, undefined, call)
  let file: Partial<KeyFile>
  try {
    file = JSON.parse(content.toString()) as Partial<KeyFile>
  } catch {
    throw new KeyInvalidError(keyId, 'it is not JSON')
  }
  const { kdf, N, r, p, salt, data, created = '', username = '', hostname = '' } = file ?? {}
  if (kdf !== 'scrypt') throw new KeyInvalidError(keyId, 'its key derivation is not scrypt')
  const isCount = (value: unknown): value is number => typeof value === 'number' && Number.isInteger(value) && value > 0
  if (!isCount(N) || !isCount(r) || !isCount(p) || 128 * N * r > MAX_SCRYPT_BYTES || p > MAX_SCRYPT_P) {
    throw new KeyInvalidError(keyId, 'its parameters of scrypt are absurd')
  }
  if (typeof salt !== 'string' || typeof data !== 'string') throw new KeyInvalidError(keyId, 'a field is missing')
  return { kdf, N, r, p, salt, data, created: String(created), username: String(username), hostname: String(hostname) }
}

async function tryKey(keyId: ObjectId, file: KeyFile, password: string): Promise<CipherKey | undefined> {
  const engine = createEngine(await derive(password, Buffer.from(file.salt, 'base64'), file))
  const plain = openBytes(engine, Buffer.from(file.data, 'base64'))
  engine.close()
  if (plain === undefined) return undefined
  const { mac, encrypt } = JSON.parse(plain.toString()) as MasterKeyJson
  const bytes = (text: string, length: number) => {
    const key = Buffer.from(String(text), 'base64')
    if (key.length !== length) throw new KeyInvalidError(keyId, 'a key in it is of the wrong length')
    return key
  }
  return { encrypt: bytes(encrypt, 32), macK: bytes(mac?.k, 16), macR: bytes(mac?.r, 16) }
}

async function derive(password: string, salt: Buffer, { N, r, p }: PasswordCost): Promise<CipherKey> {
  const key = await scryptAsync(password, salt, 64, { N, r, p, maxmem: 2 * MAX_SCRYPT_BYTES })
  return { encrypt: key.subarray(0, 32), macK: key.subarray(32, 48), macR: key.subarray(48, 64) }
}

/** The name of the user, or `''` where it has none. */
export function userName(): string {
  try {
    return userInfo().username
  } catch {
    return ''
  }
}
