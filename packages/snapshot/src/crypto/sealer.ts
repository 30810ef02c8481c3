import { createHash } from 'node:crypto'
import { allocate } from '@lsync/posix'
import { type Engine, SEAL_BYTES } from './engine.ts'

/** Seals bytes that lie anywhere: for files, of which there are few. */
export function sealBytes(engine: Engine, plain: Uint8Array): Buffer {
  const source = allocate(Math.max(1, plain.length))
  source.buffer.set(plain)
  const sealed = allocate(plain.length + SEAL_BYTES)
  engine.seal(source, 0, plain.length, sealed, 0)
  return sealed.buffer
}

/** The plaintext of sealed bytes, or `undefined` when the MAC is wrong. */
export function openBytes(engine: Engine, sealed: Uint8Array): Buffer | undefined {
  if (sealed.length < SEAL_BYTES) return undefined
  const source = allocate(sealed.length)
  source.buffer.set(sealed)
  const plain = allocate(Math.max(1, sealed.length - SEAL_BYTES))
  if (!engine.open(source, 0, sealed.length, plain, 0)) return undefined
  return plain.buffer.subarray(0, sealed.length - SEAL_BYTES)
}

/** SHA-256 in hexadecimal. */
export function hashOf(content: Uint8Array): string {
  return createHash('sha256').update(content).digest('hex')
}
