import { execFileSync } from 'node:child_process'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { shellWord } from './shell-word.ts'

test('plain paths stay as they are', () => {
  expect(shellWord('/srv/up-1.2_a:b')).toBe('/srv/up-1.2_a:b')
})

test('bash reads every word back as its bytes', () => {
  const byte = fc.integer({ min: 1, max: 255 }).map((code) => String.fromCharCode(code))
  fc.assert(
    fc.property(fc.array(fc.string({ unit: byte }), { minLength: 1, maxLength: 50 }), (words) => {
      const line = `printf '%s\\0' ${words.map(shellWord).join(' ')}`
      const read = execFileSync('bash', ['-c', line]).toString('latin1').split('\0').slice(0, -1)
      expect(read).toEqual(words)
    }),
    { numRuns: 20 },
  )
})
