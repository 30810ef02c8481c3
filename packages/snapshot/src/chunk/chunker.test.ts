import { execFileSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import fc from 'fast-check'
import { describe, expect, onTestFinished, test } from 'vitest'
import { needs } from '../../../../test/support/needs.ts'
import { isPresent } from '../../../../test/support/system.ts'
import { Chunker, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES } from './chunker.ts'
import {
  degreeOf,
  isIrreducible,
  parsePolynomial,
  polynomialText,
  randomPolynomial,
  remainderOf,
} from './polynomial.ts'

const polynomial = parsePolynomial('25b468838dcb75')
const MIB = 1024 * 1024

/** Content that looks random, the same on each run. */
function noise(lengthBytes: number, seed: string): Buffer {
  return createHash('shake256', { outputLength: lengthBytes }).update(seed).digest()
}

function cutsOf(chunker: Chunker, content: Buffer): number[] {
  const lengths: number[] = []
  for (let at = 0; at < content.length; ) {
    const room = Math.min(content.length - at, chunker.end - chunker.start)
    chunker.memory.buffer.set(content.subarray(at, at + room), chunker.start)
    const length = chunker.nextCut(chunker.start, room, at + room === content.length)
    if (length === undefined) throw new Error('there was room for a longest chunk')
    lengths.push(length)
    at += length
  }
  return lengths
}

/** The definition, computed by polynomial division and nothing else. */
function isCutAfter(content: Buffer, place: number): boolean {
  const window = content.subarray(place - 64, place)
  return (remainderOf(BigInt(`0x${window.toString('hex')}`), polynomial) & 0xfffffn) === 0n
}

describe('the chunker', () => {
  const chunker = new Chunker(polynomial, MAX_CHUNK_BYTES)

  test('cuts where the fingerprint of the last 64 bytes ends in 20 zero bits, and nowhere earlier', () => {
    const content = noise(6 * MIB, 'cuts')
    let at = 0
    for (const length of cutsOf(chunker, content)) {
      const chunk = content.subarray(at, at + length)
      at += length
      if (at < content.length) expect(isCutAfter(chunk, length)).toBe(true)
      // Division is slow, so a sample of the places that were passed.
      for (let place = MIN_CHUNK_BYTES; place < length; place += 997) expect(isCutAfter(chunk, place)).toBe(false)
    }
    expect(at).toBe(content.length)
  })

  test('a chunk of zeros has the least length', () => {
    expect(cutsOf(chunker, Buffer.alloc(3 * MIN_CHUNK_BYTES + 1))).toEqual([
      MIN_CHUNK_BYTES,
      MIN_CHUNK_BYTES,
      MIN_CHUNK_BYTES,
      1,
    ])
  })

  test('content without a cut is cut at the greatest length', () => {
    const content = Buffer.alloc(MAX_CHUNK_BYTES + 5, 1)
    expect(cutsOf(chunker, content)).toEqual([MAX_CHUNK_BYTES, 5])
  })

  test('cuts do not depend on what was inserted long before them', () => {
    const content = noise(12 * MIB, 'shift')
    const ends = (lengths: number[]) => lengths.map((_, i) => lengths.slice(0, i + 1).reduce((a, b) => a + b))
    const before = ends(cutsOf(chunker, content))
    const after = ends(cutsOf(chunker, Buffer.concat([noise(100, 'inserted'), content])))
    expect(after.filter((end) => before.includes(end - 100)).length).toBeGreaterThan(before.length / 2)
  })

  test('cuts are the same however little is known at a time, and wherever it lies', () =>
    fc.assert(
      fc.property(fc.nat(), fc.integer({ min: 100_000, max: 700_000 }), fc.nat({ max: 5000 }), (seed, step, shift) => {
        const content = noise(3 * MIB, String(seed))
        const whole = cutsOf(chunker, content)[0] as number
        const roomy = new Chunker(polynomial, MAX_CHUNK_BYTES + 5000)
        roomy.memory.buffer.set(content, roomy.start + shift)
        let length: number | undefined
        for (let known = step; length === undefined; known += step) {
          const isLast = known >= content.length
          length = roomy.nextCut(roomy.start + shift, Math.min(known, content.length), isLast)
        }
        expect(length).toBe(whole)
      }),
      { numRuns: 20 },
    ))

  const hasRestic = needs('restic', isPresent('restic'))
  test.skipIf(!hasRestic)('cuts where restic does', () => {
    const directory = mkdtempSync(`${tmpdir()}/lsync-chunks-`)
    onTestFinished(() => rmSync(directory, { recursive: true, force: true }))
    const content = Buffer.concat([
      noise(20 * MIB, 'a'),
      Buffer.alloc(2 * MIB),
      Buffer.alloc(9 * MIB, 'x'),
      noise(999, 'b'),
    ])
    writeFileSync(`${directory}/big`, content)
    const env = { ...process.env, RESTIC_PASSWORD: 'x', RESTIC_REPOSITORY: `${directory}/repo` }
    const restic = (...args: string[]) => execFileSync('restic', ['--no-cache', ...args], { env, encoding: 'utf8' })
    restic('init')
    restic('backup', '--stdin-filename', 'big', `${directory}/big`)
    const config = JSON.parse(restic('cat', 'config')) as { chunker_polynomial: string }
    const stored = new Set([...restic('list', 'blobs').matchAll(/^data (\w+)$/gm)].map(([, id]) => id))
    const own = new Chunker(parsePolynomial(config.chunker_polynomial), MAX_CHUNK_BYTES)
    let at = 0
    const ids = cutsOf(own, readFileSync(`${directory}/big`)).map((length) => {
      at += length
      return createHash('sha256')
        .update(content.subarray(at - length, at))
        .digest('hex')
    })
    expect(new Set(ids)).toEqual(stored)
    expect(ids.length).toBeGreaterThan(10)
  })
})

describe('polynomials', () => {
  test('a random one is irreducible and of degree 53', () => {
    const random = randomPolynomial()
    expect(degreeOf(random)).toBe(53)
    expect(isIrreducible(random)).toBe(true)
    expect(parsePolynomial(polynomialText(random))).toBe(random)
  })

  test('a product is not irreducible', () => {
    expect(isIrreducible(0b111n)).toBe(true)
    expect(isIrreducible(0b101n)).toBe(false)
    expect(isIrreducible(0b10101n)).toBe(false)
    expect(isIrreducible(0b11111n)).toBe(true)
  })

  test.each(['', '0', 'zz', '25b468838dcb74', '3', 'ffffffffffffffffff'])('%j of a config is refused', (text) => {
    expect(() => parsePolynomial(text)).toThrow(expect.objectContaining({ code: 'POLYNOMIAL_INVALID' }))
  })
})
