import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { decodeHeader, decodePax, encodeHeader, encodePax, formatTime, parseTime } from './tar-header.ts'

describe('pax records', () => {
  test('any bytes in a value come back as they were', () =>
    fc.assert(
      fc.property(fc.array(fc.tuple(fc.constantFrom('path', 'SCHILY.xattr.user.\xff'), fc.uint8Array())), (list) => {
        const records = decodePax(encodePax(list))
        for (const [key, value] of new Map(list)) expect(records.get(key)).toEqual(Buffer.from(value))
      }),
    ))

  test.each([10, 100, 1000])('a length that counts its own digits is right around %i bytes', (bytes) => {
    for (let size = bytes - 10; size < bytes + 4; size++) {
      const value = Buffer.alloc(size, 120)
      expect(decodePax(encodePax([['k', value]])).get('k')).toEqual(value)
    }
  })

  test.each(['5 a=\n9999 b=1\n', 'x a=b\n', '6 ab=c', '4 ab\n', '0 a=b\n', '-5 a=b\n', '99999999999999 a=b\n'])(
    'a record that lies about its length is refused: %j',
    (text) => {
      expect(() => decodePax(Buffer.from(text))).toThrow(expect.objectContaining({ code: 'ARCHIVE_BROKEN' }))
    },
  )
})

describe('times', () => {
  test('a time in ns survives as text', () =>
    fc.assert(
      fc.property(fc.bigInt({ min: -(2n ** 60n), max: 2n ** 63n }), (ns) => {
        expect(parseTime(formatTime(ns))).toBe(ns)
      }),
    ))

  test('a time is written without needless digits', () => {
    expect(formatTime(1_500_000_000n)).toBe('1.5')
    expect(formatTime(-500_000_000n)).toBe('-0.5')
    expect(formatTime(3_000_000_000n)).toBe('3')
  })
})

describe('headers', () => {
  test('numbers of any size come back, octal or base 256', () =>
    fc.assert(
      fc.property(fc.maxSafeNat(), fc.maxSafeNat(), (sizeBytes, uid) => {
        const header = decodeHeader(encodeHeader({ name: 'a', type: '0', sizeBytes, uid: uid % 2 ** 32, mode: 0 }))
        expect(header).toMatchObject({ sizeBytes, uid: uid % 2 ** 32, mode: 0, name: 'a' })
      }),
    ))

  test('a flipped bit anywhere in a header is noticed', () => {
    const block = encodeHeader({ name: 'name', type: '0', sizeBytes: 5 })
    for (let i = 0; i < 512; i++) {
      // The two bytes after the checksum's digits end it, and may be anything that ends a number.
      if (i >= 154 && i < 156) continue
      const damaged = Buffer.from(block)
      damaged[i] = (damaged[i] as number) ^ 0x02
      expect(() => decodeHeader(damaged), `byte ${i}`).toThrow(expect.objectContaining({ code: 'ARCHIVE_BROKEN' }))
    }
  })

  test('a checksum over signed bytes, as old archivers made it, is accepted', () => {
    const block = encodeHeader({ name: '\xff\xff', type: '0', sizeBytes: 0 })
    const unsigned = Number.parseInt(block.toString('latin1', 148, 154), 8)
    block.write(`${(unsigned - 512).toString(8).padStart(6, '0')}\0 `, 148, 'latin1')
    expect(decodeHeader(block)?.name).toBe('\xff\xff')
  })
})
