// Numbers are split into ten limbs of 13 bits, so that ten products and their sum are exact in a double.
const LIMBS = 10
const LIMB_BITS = 13
const LIMB_MASK = 0x1fff
const BLOCK_BYTES = 16

/**
 * Poly1305 of a message under a one-time key: 16 bytes r (clamped here), 16 bytes s. Node has the function only inside
 * ChaCha20-Poly1305. Source: RFC 8439, section 2.5.
 */
export function poly1305(message: Uint8Array, key: Uint8Array): Buffer {
  const r = limbsOf(clamped(key.subarray(0, BLOCK_BYTES)), 0)
  const sum = new Float64Array(LIMBS)
  const block = new Uint8Array(BLOCK_BYTES + 1)
  for (let at = 0; at < message.length; at += BLOCK_BYTES) {
    const length = Math.min(BLOCK_BYTES, message.length - at)
    block.fill(0)
    block.set(message.subarray(at, at + length))
    block[length] = 1
    const limbs = limbsOf(block, 0)
    for (let i = 0; i < LIMBS; i++) sum[i] = (sum[i] as number) + (limbs[i] as number)
    multiply(sum, r)
  }
  // The rest happens once a message, so it may be slow and plain.
  let number = 0n
  for (let i = LIMBS - 1; i >= 0; i--) number = (number << BigInt(LIMB_BITS)) + BigInt(sum[i] as number)
  number %= (1n << 130n) - 5n
  const pad = Buffer.from(key.subarray(BLOCK_BYTES, 2 * BLOCK_BYTES))
  number += pad.readBigUInt64LE(0) + (pad.readBigUInt64LE(8) << 64n)
  const tag = Buffer.alloc(BLOCK_BYTES)
  tag.writeBigUInt64LE(number & 0xffff_ffff_ffff_ffffn, 0)
  tag.writeBigUInt64LE((number >> 64n) & 0xffff_ffff_ffff_ffffn, 8)
  return tag
}

function clamped(r: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(BLOCK_BYTES + 1)
  bytes.set(r)
  for (const i of [3, 7, 11, 15]) bytes[i] = (bytes[i] as number) & 15
  for (const i of [4, 8, 12]) bytes[i] = (bytes[i] as number) & 252
  return bytes
}

/** Seventeen bytes, little end first, as limbs. */
function limbsOf(bytes: Uint8Array, at: number): Float64Array {
  const limbs = new Float64Array(LIMBS)
  for (let i = 0; i < LIMBS; i++) {
    const bit = i * LIMB_BITS
    const byte = at + (bit >> 3)
    const word = (bytes[byte] as number) | ((bytes[byte + 1] ?? 0) << 8) | ((bytes[byte + 2] ?? 0) << 16)
    limbs[i] = (word >> (bit & 7)) & LIMB_MASK
  }
  return limbs
}

/** `sum = sum * r mod 2^130 - 5`, not fully reduced: limbs may be a little above 13 bits. */
function multiply(sum: Float64Array, r: Float64Array): void {
  const product = new Float64Array(LIMBS)
  for (let i = 0; i < LIMBS; i++) {
    let total = 0
    for (let j = 0; j < LIMBS; j++) {
      const k = i - j
      // What overflows 2^130 comes back multiplied by 5.
      total += (sum[j] as number) * (k >= 0 ? (r[k] as number) : 5 * (r[k + LIMBS] as number))
    }
    product[i] = total
  }
  let carry = 0
  for (let i = 0; i < LIMBS; i++) {
    const value = (product[i] as number) + carry
    carry = Math.floor(value / (LIMB_MASK + 1))
    sum[i] = value - carry * (LIMB_MASK + 1)
  }
  sum[0] = (sum[0] as number) + carry * 5
}
