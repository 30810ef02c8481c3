import { type Memory, memoryOver } from '@lsync/posix'
import { degreeOf, type Polynomial, remainderOf } from './polynomial.ts'
import * as wasm from './wasm.ts'

/** Chunks are of at least and at most so many bytes; the last of a file may be smaller. */
export const MIN_CHUNK_BYTES = 512 * 1024
export const MAX_CHUNK_BYTES = 8 * 1024 * 1024

// A cut is where the fingerprint of the last 64 bytes ends in 20 zero bits: about once in a MiB.
const WINDOW_BYTES = 64
const CUT_MASK = (1 << 20) - 1

const PAGE_BYTES = 65536
const OUT_TABLE = 0
const MOD_TABLE = 2048
const CONTENT = 4096

// One fingerprint is a chain of dependent loads. Four at once, a stripe apart, keep the processor busy.
const LANES = 4
const STRIPE_BYTES = 8192

// The locals of the WebAssembly function: two parameters, then its own. `PLACE` is where a window begins.
const FIRST = 0
const END = 1
const PLACE = 2
const STOP = 3
const BEST = 4
const FINGERPRINT = 5
const NONE = -1

/**
 * Cuts content by restic's scheme: Rabin fingerprints over a window of 64 bytes, with the repository's polynomial.
 *
 * Content is put into `memory` between `start` and `end` by whoever reads it, and cut where it lies. A fingerprint depends
 * on the last 64 bytes alone, so there is no state between calls.
 * Source: restic's design document, "Backups and Deduplication".
 */
export class Chunker {
  /** What to read into. It never moves. */
  readonly memory: Memory
  readonly start = CONTENT
  readonly end: number
  readonly #run: (at: number, end: number) => number

  /** `capacityBytes` of room for content, at least one longest chunk. */
  constructor(polynomial: Polynomial, capacityBytes: number) {
    if (capacityBytes < MAX_CHUNK_BYTES) throw new RangeError('no room for a chunk')
    const pages = Math.ceil((CONTENT + capacityBytes) / PAGE_BYTES)
    const memory = new WebAssembly.Memory({ initial: pages, maximum: pages })
    this.memory = memoryOver(memory.buffer)
    this.end = CONTENT + capacityBytes
    writeTables(new DataView(memory.buffer), polynomial)
    const module = new WebAssembly.Module(program(degreeOf(polynomial), pages))
    const { exports } = new WebAssembly.Instance(module, { env: { memory } })
    this.#run = exports['run'] as (first: number, end: number) => number
  }

  /**
   * The length of the first chunk of the content at `[at, at + length)`; `undefined` when more content is needed to
   * tell. `isLast`: there is no more, so that the rest is a chunk.
   */
  nextCut(at: number, length: number, isLast: boolean): number | undefined {
    if (at < this.start || at + length > this.end) throw new RangeError('beyond the end of the memory')
    const searched = Math.min(length, MAX_CHUNK_BYTES)
    const cut = searched < MIN_CHUNK_BYTES ? 0 : this.#run(at + MIN_CHUNK_BYTES, at + searched)
    if (cut > 0) return cut - at
    if (searched === MAX_CHUNK_BYTES) return MAX_CHUNK_BYTES
    return isLast && length > 0 ? length : undefined
  }

  /**
   * Takes out of the content at `[start, filled)` what can be cut, chunk by chunk in their order, and moves the rest to
   * `start`. Returns where the rest ends. `isLast`: there is no more, so that there is no rest.
   */
  takeChunks(filled: number, isLast: boolean, take: (at: number, length: number) => void): number {
    let at = this.start
    for (;;) {
      const length = this.nextCut(at, filled - at, isLast)
      if (length === undefined) break
      take(at, length)
      at += length
    }
    this.memory.buffer.copyWithin(this.start, at, filled)
    return this.start + filled - at
  }
}

/** `out[b]`: what the oldest byte of a window adds. `mod[b]`: what takes 8 bits above the degree off, and their remainder. */
function writeTables(memory: DataView, polynomial: Polynomial): void {
  const degree = BigInt(degreeOf(polynomial))
  for (let bit = 0; bit < 8; bit++) {
    const out = remainderOf(1n << BigInt((WINDOW_BYTES - 1) * 8 + bit), polynomial)
    const above = 1n << (degree + BigInt(bit))
    const mod = above | remainderOf(above, polynomial)
    // Both are linear: the entry of a byte is the sum of those of its bits.
    for (let rest = 0; rest < 1 << bit; rest++) {
      const byte = ((1 << bit) + rest) * 8
      memory.setBigUint64(OUT_TABLE + byte, memory.getBigUint64(OUT_TABLE + rest * 8, true) ^ out, true)
      memory.setBigUint64(MOD_TABLE + byte, memory.getBigUint64(MOD_TABLE + rest * 8, true) ^ mod, true)
    }
  }
}

const { add32, and64, byte32, byte64, get, i32, i64, isBelow32, isZero64, load64, loop, repeat, set, when } = wasm

/** `run(first, end)`: the first place in `[first, end]` where the window before it asks for a cut, or 0. */
function program(degree: number, pages: number): Uint8Array {
  const lanes = Array.from({ length: LANES }, (_, lane) => lane)
  const beginWarmUp = [set(STOP, add32(get(PLACE), i32(WINDOW_BYTES)))]
  const endWarmUp = [set(PLACE, add32(get(PLACE), i32(-WINDOW_BYTES)))]
  const advance = [set(PLACE, add32(get(PLACE), i32(1))), when(isBelow32(get(PLACE), get(STOP)), repeat(1))]
  return wasm.moduleOf(2, [wasm.I32, wasm.I32, wasm.I32, ...lanes.map(() => wasm.I64)], pages, [
    set(PLACE, add32(get(FIRST), i32(-WINDOW_BYTES))),
    loop(
      when(
        isBelow32(add32(get(PLACE), i32(WINDOW_BYTES + LANES * STRIPE_BYTES)), get(END)),
        ...lanes.map((lane) => set(FINGERPRINT + lane, i64(0))),
        ...beginWarmUp,
        loop(...lanes.map((lane) => slideIn(lane, degree, 0)), ...advance),
        ...endWarmUp,
        set(BEST, i32(NONE)),
        set(STOP, add32(get(PLACE), i32(STRIPE_BYTES))),
        loop(
          ...lanes.flatMap((lane) => [
            when(isCut(lane), when(isBelow32(placeOf(lane), get(BEST)), set(BEST, placeOf(lane)))),
            slideOut(lane),
            slideIn(lane, degree, WINDOW_BYTES),
          ]),
          ...advance,
        ),
        when(wasm.isNot32(get(BEST), i32(NONE)), wasm.giveBack(get(BEST))),
        set(PLACE, add32(get(PLACE), i32((LANES - 1) * STRIPE_BYTES))),
        repeat(1),
      ),
    ),
    // The rest, one window after the other.
    set(FINGERPRINT, i64(0)),
    ...beginWarmUp,
    loop(slideIn(0, degree, 0), ...advance),
    ...endWarmUp,
    loop(
      when(isCut(0), wasm.giveBack(placeOf(0))),
      when(
        isBelow32(placeOf(0), get(END)),
        slideOut(0),
        slideIn(0, degree, WINDOW_BYTES),
        set(PLACE, add32(get(PLACE), i32(1))),
        repeat(1),
      ),
    ),
    i32(0),
  ])
}

/** The place right behind a lane's window: where it would cut. */
function placeOf(lane: number): wasm.Code {
  return add32(get(PLACE), i32(WINDOW_BYTES + lane * STRIPE_BYTES))
}

function isCut(lane: number): wasm.Code {
  return isZero64(and64(get(FINGERPRINT + lane), i64(CUT_MASK)))
}

/** Takes the first byte of a lane's window out of its fingerprint. */
function slideOut(lane: number): wasm.Code {
  const byte = byte32(get(PLACE), lane * STRIPE_BYTES)
  return set(FINGERPRINT + lane, wasm.xor64(get(FINGERPRINT + lane), load64(wasm.shiftLeft32(byte, i32(3)), OUT_TABLE)))
}

/** Appends the byte at `offset` of a lane's window to its fingerprint. */
function slideIn(lane: number, degree: number, offset: number): wasm.Code {
  const print = get(FINGERPRINT + lane)
  const index = wasm.low32(wasm.shiftRight64(print, i64(degree - 8)))
  const longer = wasm.or64(wasm.shiftLeft64(print, i64(8)), byte64(get(PLACE), lane * STRIPE_BYTES + offset))
  return set(FINGERPRINT + lane, wasm.xor64(longer, load64(wasm.shiftLeft32(index, i32(3)), MOD_TABLE)))
}
