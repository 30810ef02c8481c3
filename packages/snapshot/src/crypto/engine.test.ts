import { createHash, randomBytes } from 'node:crypto'
import { zstdCompressSync, zstdDecompressSync } from 'node:zlib'
import { allocate } from '@lsync/posix'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { compressBound, createEngine, SEAL_BYTES } from './engine.ts'
import { poly1305 } from './poly1305.ts'

const key = { encrypt: randomBytes(32), macK: randomBytes(16), macR: randomBytes(16) }
const engines = { native: createEngine(key, 'native'), portable: createEngine(key, 'portable') }
const content = () => fc.uint8Array({ maxLength: 5000, size: 'max' })

function memoryWith(bytes: Uint8Array) {
  const memory = allocate(Math.max(1, bytes.length))
  memory.buffer.set(bytes)
  return memory
}

test('this Node has the native engine', () => {
  expect(engines.native.form).toBe('native')
  expect(createEngine(key).form).toBe('native')
})

test('Poly1305 gives the tag of RFC 8439', () => {
  const tag = poly1305(
    Buffer.from('Cryptographic Forum Research Group'),
    Buffer.from('85d6be7857556d337f4452fe42d506a80103808afb0db2fd4abff6af4149f51b', 'hex'),
  )
  expect(tag.toString('hex')).toBe('a8061dc1305136c6c22b8baf0c0127a9')
})

test('Poly1305 reduces sums at the edge of the modulus (RFC 8439, A.3, vectors 7 and 10)', () => {
  const wrap = poly1305(
    Buffer.from(
      'fffffffffffffffffffffffffffffffff0ffffffffffffffffffffffffffffff11000000000000000000000000000000',
      'hex',
    ),
    Buffer.from(`01${'00'.repeat(31)}`, 'hex'),
  )
  expect(wrap.toString('hex')).toBe(`05${'00'.repeat(15)}`)
  const limbs = poly1305(
    Buffer.from(
      'e33594d7505e43b900000000000000003394d7505e4379cd01000000000000000000000000000000000000000000000001000000000000000000000000000000',
      'hex',
    ),
    Buffer.from(`01000000000000000400000000000000${'00'.repeat(16)}`, 'hex'),
  )
  expect(limbs.toString('hex')).toBe('14000000000000005500000000000000')
})

describe.each([
  ['native', 'portable'],
  ['portable', 'native'],
  ['native', 'native'],
] as const)('what the %s engine writes and the %s one reads', (writer, reader) => {
  test('sealed bytes open to the same, and only unchanged', () =>
    fc.assert(
      fc.property(content(), fc.nat(), (bytes, flip) => {
        const sealed = allocate(bytes.length + SEAL_BYTES)
        engines[writer].seal(memoryWith(bytes), 0, bytes.length, sealed, 0)
        const opened = allocate(Math.max(1, bytes.length))
        expect(engines[reader].open(sealed, 0, sealed.buffer.length, opened, 0)).toBe(true)
        expect(opened.buffer.subarray(0, bytes.length).equals(bytes)).toBe(true)
        const bit = flip % (sealed.buffer.length * 8)
        sealed.buffer[bit >> 3] = (sealed.buffer[bit >> 3] as number) ^ (1 << (bit & 7))
        opened.buffer.fill(0)
        expect(engines[reader].open(sealed, 0, sealed.buffer.length, opened, 0)).toBe(false)
        expect(opened.buffer.every((byte) => byte === 0)).toBe(true)
      }),
    ))

  test('compressed bytes come back, and never more than there is room for', () =>
    fc.assert(
      fc.property(content(), (bytes) => {
        const frame = allocate(compressBound(bytes.length))
        const length = engines[writer].compress(memoryWith(bytes), 0, bytes.length, frame, 0)
        const back = allocate(bytes.length + 1)
        expect(engines[reader].decompress(frame, 0, length, back, 0, bytes.length)).toBe(bytes.length)
        expect(back.buffer.subarray(0, bytes.length).equals(bytes)).toBe(true)
        if (bytes.length > 0) {
          expect(engines[reader].decompress(frame, 0, length, back, 0, bytes.length - 1)).toBeUndefined()
        }
      }),
    ))
})

describe.each(['native', 'portable'] as const)('the %s engine', (form) => {
  const engine = engines[form]

  test('hashes as SHA-256', () =>
    fc.assert(
      fc.property(content(), (bytes) => {
        const digest = allocate(32)
        engine.hash(memoryWith(bytes), 0, bytes.length, digest, 0)
        expect(digest.buffer.toString('hex')).toBe(createHash('sha256').update(bytes).digest('hex'))
      }),
    ))

  test('never uses a nonce twice', () => {
    const seen = new Set<string>()
    const sealed = allocate(SEAL_BYTES)
    for (let i = 0; i < 1000; i++) {
      engine.seal(sealed, 0, 0, sealed, 0)
      seen.add(sealed.buffer.toString('hex', 0, 16))
    }
    expect(seen.size).toBe(1000)
  })

  test("understands and is understood by Node's zstd", () => {
    const bytes = Buffer.from('lsync '.repeat(1000))
    const frame = allocate(compressBound(bytes.length))
    const length = engine.compress(memoryWith(bytes), 0, bytes.length, frame, 0)
    expect(zstdDecompressSync(frame.buffer.subarray(0, length)).equals(bytes)).toBe(true)
    const theirs = zstdCompressSync(bytes)
    const back = allocate(bytes.length)
    expect(engine.decompress(memoryWith(theirs), 0, theirs.length, back, 0, bytes.length)).toBe(bytes.length)
  })

  test('a frame that is none is told apart, and addresses beyond a memory are refused', () => {
    const memory = memoryWith(Buffer.from('no frame'))
    expect(engine.decompress(memory, 0, 8, memory, 0, 8)).toBeUndefined()
    expect(engine.open(memory, 0, 8, memory, 0)).toBe(false)
    for (const bad of [-1, 1, Number.NaN]) {
      expect(() => engine.hash(memory, bad, 8, allocate(32), 0)).toThrow(RangeError)
      expect(() => engine.seal(memory, bad, 8, allocate(64), 0)).toThrow(RangeError)
      expect(() => engine.compress(memory, bad, 8, allocate(999), 0)).toThrow(RangeError)
    }
  })
})
