import { describe, expect, test } from 'vitest'
import { predict, ratesOf } from './last-delta.ts'

// A MooseFS, and a disk.
const slow = ratesOf([], 0.85)
const quick = ratesOf([], 0.03)

describe('what changed last', () => {
  test('travels as one layer from a store that is slow with small files, if there are enough of them', () => {
    expect(predict({ names: 1000, bytes: 5e6 }, slow, 'auto').form).toBe('sealed')
    expect(predict({ names: 10, bytes: 5e4 }, slow, 'auto').form).toBe('tree')
    expect(predict({ names: 1000, bytes: 5e6 }, quick, 'auto').form).toBe('tree')
    // A large file is one file.
    expect(predict({ names: 1, bytes: 1e9 }, slow, 'auto').form).toBe('tree')
  })

  test('travels as is asked for, and nothing is no layer', () => {
    expect(predict({ names: 1000, bytes: 5e6 }, slow, 'tree').form).toBe('tree')
    expect(predict({ names: 1, bytes: 1 }, quick, 'sealed').form).toBe('sealed')
    expect(predict({ names: 0, bytes: 0 }, slow, 'sealed')).toMatchObject({ form: 'tree', deltaMs: 0 })
  })

  test('takes longer the more it is, and never less than all else does', () => {
    const times = [0, 10, 100, 1000, 10_000].map((names) => predict({ names, bytes: names * 5000 }, slow, 'auto'))
    for (const [index, { deltaMs, fixedMs }] of times.entries()) {
      expect(deltaMs).toBeGreaterThanOrEqual(times[index - 1]?.deltaMs ?? 0)
      expect(fixedMs).toBe(slow.fixedMs)
    }
  })
})

test('what a store took of late counts more than what one small file takes there', () => {
  const rates = ratesOf([{ durationMs: 3000, files: 1000, bytes: 0 }], 0.1)
  expect(rates.fileMs).toBe(3)
  // Too few to say anything.
  expect(ratesOf([{ durationMs: 3000, files: 3, bytes: 0 }], 0.1).fileMs).toBe(ratesOf([], 0.1).fileMs)
  expect(ratesOf([{ durationMs: 1000, files: 1, bytes: 50e6 }], 0.1).bytesPerMs).toBe(50_000)
})
