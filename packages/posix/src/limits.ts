import { allocate, entering, fail, libcFunction } from './native.ts'

const prlimitNative = libcFunction('prlimit', 'i', 'iipp')
const RLIMIT_NOFILE = 7

const limits = allocate(32)

/**
 * Raises the number of files that this process may have open to its hard limit, and the hard limit to `atLeast` where
 * CAP_SYS_RESOURCE allows. Returns the limit now in force. Source: prlimit(2).
 */
export function raiseFileLimit(atLeast = 0): number {
  entering('prlimit', 'RLIMIT_NOFILE')
  const old = limits.address + 16
  if (prlimitNative(0, RLIMIT_NOFILE, 0, old) < 0) fail('prlimit', 'RLIMIT_NOFILE')
  const soft = limits.buffer.readBigUInt64LE(16)
  const hard = limits.buffer.readBigUInt64LE(24)
  if (hard < BigInt(atLeast) && set(BigInt(atLeast), BigInt(atLeast))) return atLeast
  if (soft < hard && set(hard, hard)) return Number(hard)
  return Number(soft)
}

function set(soft: bigint, hard: bigint): boolean {
  limits.buffer.writeBigUInt64LE(soft, 0)
  limits.buffer.writeBigUInt64LE(hard, 8)
  return prlimitNative(0, RLIMIT_NOFILE, limits.address, 0) >= 0
}
