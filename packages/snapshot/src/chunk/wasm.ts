// A WebAssembly module written down as what it is: nested byte lists. Source: WebAssembly core specification, binary format.

export type Code = readonly (number | Code)[]

export const I32 = 0x7f
export const I64 = 0x7e
const FUNCTION_TYPE = 0x60
const EMPTY_BLOCK = 0x40

/** Unsigned LEB128, of values up to 2^32. */
function unsigned(value: number): number[] {
  const bytes: number[] = []
  let rest = value
  do {
    const low = rest % 128
    rest = Math.floor(rest / 128)
    bytes.push(rest > 0 ? low | 128 : low)
  } while (rest > 0)
  return bytes
}

/** Signed LEB128. */
function signed(value: number): number[] {
  const bytes: number[] = []
  let rest = BigInt(value)
  for (;;) {
    const low = Number(rest & 127n)
    rest >>= 7n
    if ((rest === 0n && low < 64) || (rest === -1n && low >= 64)) return [...bytes, low]
    bytes.push(low | 128)
  }
}

export const get = (local: number): Code => [0x20, unsigned(local)]
export const set = (local: number, value: Code): Code => [value, 0x21, unsigned(local)]
export const i32 = (value: number): Code => [0x41, signed(value)]
export const i64 = (value: number): Code => [0x42, signed(value)]
export const add32 = (left: Code, right: Code): Code => [left, right, 0x6a]
export const shiftLeft32 = (left: Code, right: Code): Code => [left, right, 0x74]
export const isBelow32 = (left: Code, right: Code): Code => [left, right, 0x49]
export const isNot32 = (left: Code, right: Code): Code => [left, right, 0x47]
export const and64 = (left: Code, right: Code): Code => [left, right, 0x83]
export const or64 = (left: Code, right: Code): Code => [left, right, 0x84]
export const xor64 = (left: Code, right: Code): Code => [left, right, 0x85]
export const shiftLeft64 = (left: Code, right: Code): Code => [left, right, 0x86]
export const shiftRight64 = (left: Code, right: Code): Code => [left, right, 0x88]
export const isZero64 = (value: Code): Code => [value, 0x50]
export const low32 = (value: Code): Code => [value, 0xa7]
/** One byte of memory as i32, and as i64. */
export const byte32 = (address: Code, offset = 0): Code => [address, 0x2d, 0, unsigned(offset)]
export const byte64 = (address: Code, offset = 0): Code => [address, 0x31, 0, unsigned(offset)]
export const load64 = (address: Code, offset: number): Code => [address, 0x29, 3, unsigned(offset)]
export const loop = (...body: Code[]): Code => [0x03, EMPTY_BLOCK, body, 0x0b]
export const when = (condition: Code, ...body: Code[]): Code => [condition, 0x04, EMPTY_BLOCK, body, 0x0b]
/** Goes to the start of the loop that is `depth` blocks out. */
export const repeat = (depth: number): Code => [0x0c, unsigned(depth)]
export const giveBack = (value: Code): Code => [value, 0x0f]

const section = (id: number, body: Code): Code => {
  const bytes = flatten(body)
  return [id, unsigned(bytes.length), bytes]
}
const text = (word: string): Code => [unsigned(word.length), [...Buffer.from(word)]]

/** A module that exports one function `run` from i32s to i32, over the memory that is imported as `env.memory`. */
export function moduleOf(parameters: number, locals: readonly number[], pages: number, body: Code): Uint8Array {
  const declared = [unsigned(locals.length), locals.map((type) => [1, type])]
  const code = flatten([declared, body, 0x0b])
  return Uint8Array.from(
    flatten([
      [0, 0x61, 0x73, 0x6d, 1, 0, 0, 0],
      section(1, [1, FUNCTION_TYPE, unsigned(parameters), Array(parameters).fill(I32), 1, I32]),
      section(2, [1, text('env'), text('memory'), 2, 1, unsigned(pages), unsigned(pages)]),
      section(3, [1, 0]),
      section(7, [1, text('run'), 0, 0]),
      section(10, [1, unsigned(code.length), code]),
    ]),
  )
}

function flatten(code: Code): number[] {
  return code.flatMap((part) => (typeof part === 'number' ? [part] : flatten(part)))
}
