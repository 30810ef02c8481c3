import createXxhash from 'xxhash-wasm'

const { h64Raw } = await createXxhash()

/** The lower 32 bits of XXH64: what guards frames against damage. */
export function checksumOf(bytes: Uint8Array, seed: bigint): number {
  return Number(BigInt.asUintN(32, h64Raw(bytes, seed)))
}
