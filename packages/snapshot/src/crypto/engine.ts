import type { Memory } from '@lsync/posix'
import { NativeEngine } from './native.ts'
import { PortableEngine } from './portable.ts'

/** The three keys of a repository (or of a password). Source: restic's design document, "Keys, Encryption and MAC". */
export interface CipherKey {
  /** 32 bytes, AES-256. */
  readonly encrypt: Buffer
  /** 16 bytes, the AES-128 key of Poly1305-AES. */
  readonly macK: Buffer
  /** 16 bytes, the multiplier of Poly1305. */
  readonly macR: Buffer
}

/** What sealing adds: an IV of 16 bytes in front, a MAC of 16 bytes behind. */
export const SEAL_BYTES = 32

/**
 * Hashing, compression and encryption from memory to memory, bound to one key. Synchronous; one thread uses an engine
 * at a time. Offsets and lengths are bytes; what lies beyond a memory's end throws a `RangeError`.
 */
export interface Engine {
  readonly form: 'native' | 'portable'
  /** SHA-256 of the bytes, 32 of them written to `toAt`. */
  hash(from: Memory, at: number, length: number, to: Memory, toAt: number): void
  /** One zstd frame with the content's size in it. Returns its length; the target needs `compressBound(length)`. */
  compress(from: Memory, at: number, length: number, to: Memory, toAt: number): number
  /** The content of one zstd frame, or `undefined` when it is none or does not fit into `capacity` bytes. */
  decompress(from: Memory, at: number, length: number, to: Memory, toAt: number, capacity: number): number | undefined
  /** IV, AES-256-CTR ciphertext and Poly1305-AES MAC: `length + SEAL_BYTES` bytes. */
  seal(from: Memory, at: number, length: number, to: Memory, toAt: number): void
  /** The plaintext of sealed bytes, `length - SEAL_BYTES` of them; `false` when the MAC is wrong, with nothing written. */
  open(from: Memory, at: number, length: number, to: Memory, toAt: number): boolean
  /** Gives contexts back. The engine is of no use afterwards. */
  close(): void
}

/** The most bytes that `compress` makes of `length` (ZSTD_COMPRESSBOUND of zstd.h). */
export function compressBound(length: number): number {
  return length + (length >> 8) + (length < 128 * 1024 ? (128 * 1024 - length) >> 11 : 0) + 64
}

/** The engine of this Node: OpenSSL and zstd by address where the binary exports them, else Node's modules. */
export function createEngine(key: CipherKey, form?: 'native' | 'portable'): Engine {
  if (form === 'portable' || !NativeEngine.isAvailable) return new PortableEngine(key)
  return new NativeEngine(key)
}
