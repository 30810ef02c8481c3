import { expect, test } from 'vitest'
import { countOf, durationOf, progressLine, sizeOf } from './progress-line.ts'

test('progress with a known total shows share, rate and time left', () => {
  const line = progressLine({ phase: 'apply', done: 12_345, total: 50_000, startMs: 1000 }, 3000)
  expect(line).toBe('apply     12,345/50,000  24%  6,173/s  ETA 0:07')
})

test('progress without a total shows what is done, and no rate in its first moments', () => {
  expect(progressLine({ phase: 'scan', done: 7, startMs: 0 }, 50)).toBe('scan      7')
  expect(progressLine({ phase: 'durable', done: 0, startMs: 0 }, 5000)).toBe('durable ')
})

test('counts, sizes and durations read well from nothing to much', () => {
  expect([0, 999, 1000, 1_234_567].map(countOf)).toEqual(['0', '999', '1,000', '1,234,567'])
  expect([0, 999, 1000, 1_440_000_000].map(sizeOf)).toEqual(['0 B', '999 B', '1.0 kB', '1.4 GB'])
  expect([4, 12_340, 125_000].map(durationOf)).toEqual(['0.00 s', '12.3 s', '2 min 5 s'])
})
