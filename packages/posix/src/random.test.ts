import { expect, test } from 'vitest'
import { randomHex } from './random.ts'

test('random names have two digits a byte and do not repeat', () => {
  const names = Array.from({ length: 1000 }, () => randomHex(8))
  expect(names.every((name) => /^[0-9a-f]{16}$/.test(name))).toBe(true)
  expect(new Set(names).size).toBe(names.length)
})

test('more than one call of the kernel gives for sure is refused', () => {
  expect(randomHex(256)).toHaveLength(512)
  expect(() => randomHex(257)).toThrow(RangeError)
})
