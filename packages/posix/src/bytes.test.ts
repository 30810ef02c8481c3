import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { bytesOf, printable, textOf } from './bytes.ts'
import { PosixError } from './errors.ts'

const anyBytes = () =>
  fc
    .oneof(
      fc.uint8Array({ maxLength: 40 }),
      // Mostly text with damage, where valid and invalid sequences meet.
      fc
        .tuple(fc.string({ unit: 'grapheme', maxLength: 12 }), fc.array(fc.tuple(fc.nat(60), fc.nat(255))))
        .map(([text, hits]) => {
          const bytes = Buffer.from(text)
          for (const [at, value] of hits) if (at < bytes.length) bytes[at] = value
          return bytes
        }),
    )
    .map((bytes) => Buffer.from(bytes).toString('latin1'))

describe('bytesOf and textOf', () => {
  test('bytesOf is the inverse of textOf for any bytes', () => {
    fc.assert(
      fc.property(anyBytes(), (bytes) => {
        expect(bytesOf(textOf(bytes))).toBe(bytes)
      }),
      { numRuns: 2000 },
    )
  })

  test('bytes that are UTF-8 are that text, a byte order mark included', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'binary' }), (text) => {
        const bytes = Buffer.from(text).toString('latin1')
        expect(textOf(bytes)).toBe(text)
        expect(bytesOf(text)).toBe(bytes)
      }),
    )
    expect(textOf('\xef\xbb\xbfa')).toBe('\ufeffa')
  })

  test('every byte that is not UTF-8 becomes one escape, and the text around it stays', () => {
    expect(textOf('a\xffb\xc3\xa9\xe2\x82')).toBe('a\udcffbé\udce2\udc82')
  })

  test('a surrogate half written as UTF-8 is not text but three bytes', () => {
    expect(textOf('\xed\xb2\x80')).toBe('\udced\udcb2\udc80')
    expect(bytesOf('\udced\udcb2\udc80')).toBe('\xed\xb2\x80')
  })

  test('an escape after a character outside the BMP is still its byte', () => {
    expect(bytesOf(textOf('\xf0\x9f\x98\x80\x80'))).toBe('\xf0\x9f\x98\x80\x80')
  })

  test.each(['\ud800', 'a\udc7f', '\udd00b', '\udbff\ud800'])(
    'the lone surrogate in %j stands for no bytes',
    (text) => {
      expect(() => bytesOf(text)).toThrowError(expect.objectContaining({ code: 'EILSEQ' }))
      expect(() => bytesOf(text)).toThrow(PosixError)
    },
  )
})

describe('printable', () => {
  test('the result is one line without control characters, whatever the bytes', () => {
    fc.assert(
      fc.property(anyBytes(), (bytes) => {
        expect(printable(bytes)).not.toMatch(/[\p{Cc}\p{Cs}\p{Zl}\p{Zp}]/u)
      }),
    )
  })

  test('different bytes never look the same', () => {
    fc.assert(
      fc.property(anyBytes(), anyBytes(), (one, other) => {
        expect(printable(one) === printable(other)).toBe(one === other)
      }),
    )
    expect(printable('\x85')).not.toBe(printable('\xc2\x85'))
    expect(printable('\\x85')).not.toBe(printable('\x85'))
  })

  test('a direction override is shown, not obeyed', () => {
    expect(printable(bytesOf('a\u202etxt.exe'))).toBe('a\\u{202e}txt.exe')
  })
})
