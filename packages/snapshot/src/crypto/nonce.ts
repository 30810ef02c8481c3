import { randomFillSync } from 'node:crypto'

export const NONCE_BYTES = 16
const pool = Buffer.alloc(NONCE_BYTES * 256)
let used = pool.length

/** Writes a fresh random nonce to `at`. Drawn from the system in batches: one draw costs more than one encryption. */
export function writeNonce(to: Buffer, at: number): void {
  if (used === pool.length) {
    randomFillSync(pool)
    used = 0
  }
  pool.copy(to, at, used, used + NONCE_BYTES)
  // A nonce is never left where it could be taken twice.
  pool.fill(0, used, used + NONCE_BYTES)
  used += NONCE_BYTES
}
