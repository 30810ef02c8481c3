import { mkdirSync } from 'node:fs'
import { expect, test } from 'vitest'
import { freshDirectory, lsync } from './lsync.ts'

// The goals are 80 and 150 ms on a quiet machine (`bench merge --row start-up`); this holds off an order of magnitude.
function bestOf(runs: number, args: readonly string[]): number {
  const times: number[] = []
  for (let run = 0; run < runs; run++) {
    const start = performance.now()
    expect(lsync(args).code).toBe(0)
    times.push(performance.now() - start)
  }
  return Math.min(...times)
}

test('lsync --version takes less than 1 s', () => {
  expect(bestOf(5, ['--version'])).toBeLessThan(1_000)
})

test('merging an empty upper takes less than 4 s', () => {
  const directory = freshDirectory()
  for (const name of ['up', 'low']) mkdirSync(`${directory}/${name}`)
  const layers = ['--upper', `${directory}/up`, '--lower', `${directory}/low`, '--namespace', 'user']
  expect(bestOf(5, ['merge', ...layers, '--in-place', '--yes'])).toBeLessThan(4_000)
})
