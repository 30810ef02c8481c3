import { describe, expect, test } from 'vitest'
import { CompressionChoice } from './compression.ts'

const MB = 1 << 20

/** How many of 320 frames are compressed on a line of this rate (MB/s), by a zstd of that rate and ratio. */
function compressed(line: number, zstd: number, ratio: number): number {
  const choice = new CompressionChoice()
  let count = 0
  for (let i = 0; i < 320; i++) {
    const isCompressed = choice.decide()
    if (isCompressed) {
      count++
      choice.sawZstd(MB, MB * ratio, 1000 / zstd)
    }
    choice.sawLine(MB, 1000 / line)
  }
  return count
}

describe('frames are compressed', () => {
  test('on a line that is slower than zstd, when they get smaller', () => {
    expect(compressed(10, 300, 0.3)).toBeGreaterThan(300)
  })

  test('not on a line that is faster than zstd, but for a try now and then', () => {
    expect(compressed(1000, 300, 0.3)).toBeLessThanOrEqual(11)
  })

  test('not when they hardly get smaller', () => {
    expect(compressed(10, 300, 0.99)).toBeLessThanOrEqual(11)
  })

  test('never as long as the line was not full', () => {
    const choice = new CompressionChoice()
    expect(Array.from({ length: 100 }, () => choice.decide())).not.toContain(true)
  })

  test('again soon after content changes from incompressible to text', () => {
    const choice = new CompressionChoice()
    const run = (ratio: number) => {
      let count = 0
      for (let i = 0; i < 320; i++) {
        if (choice.decide()) {
          count++
          choice.sawZstd(MB, MB * ratio, 3)
        }
        choice.sawLine(MB, 100)
      }
      return count
    }
    expect(run(1)).toBeLessThanOrEqual(12)
    expect(run(0.2)).toBeGreaterThan(240)
  })
})
