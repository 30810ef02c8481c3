import { createCipheriv, hash, timingSafeEqual } from 'node:crypto'
import { constants, zstdCompressSync, zstdDecompressSync } from 'node:zlib'
import type { Memory } from '@lsync/posix'

import type { CipherKey, Engine } from './engine.ts'
import { NONCE_BYTES, writeNonce } from './nonce.ts'
import { poly1305 } from './poly1305.ts'

/** Node's own modules, for a Node that does not export OpenSSL and zstd. Same results, several times slower. */
export class PortableEngine implements Engine {
  readonly form = 'portable'
  readonly #key: CipherKey

  constructor(key: CipherKey) {
    this.#key = key
  }

  hash(from: Memory, at: number, length: number, to: Memory, toAt: number): void {
    to.buffer.set(hash('sha256', bytes(from, at, length), 'buffer'), toAt)
  }

  compress(from: Memory, at: number, length: number, to: Memory, toAt: number): number {
    const frame = zstdCompressSync(bytes(from, at, length), {
      params: { [constants.ZSTD_c_compressionLevel]: 3 },
      pledgedSrcSize: length,
    })
    to.buffer.set(frame, toAt)
    return frame.length
  }

  decompress(from: Memory, at: number, length: number, to: Memory, toAt: number, capacity: number): number | undefined {
    try {
      const content = zstdDecompressSync(bytes(from, at, length), { maxOutputLength: Math.max(1, capacity) })
      if (content.length > capacity) return undefined
      to.buffer.set(content, toAt)
      return content.length
    } catch {
      return undefined
    }
  }

  seal(from: Memory, at: number, length: number, to: Memory, toAt: number): void {
    const target = bytes(to, toAt, length + 32)
    const source = bytes(from, at, length)
    const nonce = Buffer.alloc(NONCE_BYTES)
    writeNonce(nonce, 0)
    const text = createCipheriv('aes-256-ctr', this.#key.encrypt, nonce).update(source)
    target.set(nonce)
    target.set(text, NONCE_BYTES)
    target.set(this.#authenticate(nonce, text), NONCE_BYTES + length)
  }

  open(from: Memory, at: number, length: number, to: Memory, toAt: number): boolean {
    if (length < 32) return false
    const sealed = bytes(from, at, length)
    const nonce = sealed.subarray(0, NONCE_BYTES)
    const text = sealed.subarray(NONCE_BYTES, length - 16)
    if (!timingSafeEqual(this.#authenticate(nonce, text), sealed.subarray(length - 16))) return false
    bytes(to, toAt, text.length).set(createCipheriv('aes-256-ctr', this.#key.encrypt, nonce).update(text))
    return true
  }

  close(): void {}

  #authenticate(nonce: Uint8Array, text: Uint8Array): Uint8Array {
    const cipher = createCipheriv('aes-128-ecb', this.#key.macK, null).setAutoPadding(false)
    return poly1305(text, Buffer.concat([this.#key.macR, cipher.update(nonce)]))
  }
}

function bytes(memory: Memory, at: number, length: number): Buffer {
  if (!(at >= 0 && length >= 0 && at + length <= memory.buffer.length)) {
    throw new RangeError('beyond the end of the memory')
  }
  return memory.buffer.subarray(at, at + length)
}
