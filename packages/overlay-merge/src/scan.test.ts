import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { type HostPath, openRoot, withFd } from '@lsync/posix'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { hasManyEntries, nameRanges, openLayer } from './scan.ts'

let root: string
beforeEach(() => {
  root = mkdtempSync(`${tmpdir()}/lsync-scan-`)
})
afterEach(() => rmSync(root, { recursive: true }))

function fill(directory: string, names: readonly string[]): void {
  mkdirSync(`${root}/${directory}`)
  for (const name of names) writeFileSync(`${root}/${directory}/${name}`, '')
}

test('more names than are held at a time come in ranges: each once, in order, those of all directories together', () => {
  const upper = Array.from({ length: 500 }, (_, i) => `name-${(i * 7919) % 1000}`)
  const lower = Array.from({ length: 300 }, (_, i) => `name-${(i * 104729) % 1000}-too`)
  fill('upper', upper)
  fill('lower', lower)
  withFd(openRoot(`${root}/upper` as HostPath), (upperFd) =>
    withFd(openRoot(`${root}/lower` as HostPath), (lowerFd) => {
      const ranges = [...nameRanges([upperFd, lowerFd], 100)]
      expect(ranges.length).toBeGreaterThan(4)
      const named = (index: number) => ranges.map(({ lists }) => (lists[index] ?? []).map(({ name }) => name as string))
      expect(named(0).flat()).toEqual([...upper].sort())
      expect(named(1).flat()).toEqual([...lower].sort())
      for (const [index, { includes }] of ranges.entries()) {
        expect([...(named(0)[index] ?? []), ...(named(1)[index] ?? [])].every(includes)).toBe(true)
        expect(ranges.filter((range) => range.includes(`name-${index}`))).toHaveLength(1)
      }
      expect([...nameRanges([upperFd, lowerFd])]).toHaveLength(1)
    }),
  )
})

test('a layer has many entries when it has many names, or many directories', () => {
  fill('few', ['a', 'b'])
  fill(
    'names',
    Array.from({ length: 1200 }, (_, i) => `${i}`),
  )
  fill('directories', [])
  for (let i = 0; i < 60; i++) mkdirSync(`${root}/directories/${i}`)
  const isLarge = (name: string) => {
    const layer = openLayer(`${root}/${name}` as HostPath, 'user')
    return withFd(layer.fd, () => hasManyEntries(layer))
  }
  expect(['few', 'names', 'directories'].map(isLarge)).toEqual([false, true, true])
})
