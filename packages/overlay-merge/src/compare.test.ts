import { mkdirSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { type ByteString, close, type HostPath, openat, openRoot, withFd, writeAt } from '@lsync/posix'
import fc from 'fast-check'
import { afterEach, expect, test } from 'vitest'
import { compareTrees, firstDifference, OpenTree } from './compare.ts'

const made: string[] = []
afterEach(() => {
  for (const path of made.splice(0)) rmSync(path, { recursive: true, force: true })
})

function temporary(): string {
  const path = mkdtempSync(`${tmpdir()}/lsync-compare-`)
  made.push(path)
  return path
}

/** A file of this size whose bytes are 0 but for the pieces, with holes where the file system has them. */
function write(path: string, sizeBytes: number, pieces: readonly (readonly [offset: number, bytes: Buffer])[]): void {
  writeFileSync(path, '')
  truncateSync(path, sizeBytes)
  withFd(openat(-100, path as ByteString, 1), (fd) => {
    for (const [offset, bytes] of pieces) writeAt(fd, offset, bytes)
  })
  truncateSync(path, sizeBytes)
}

function differenceOf(left: string, right: string): number | undefined {
  return withFd(openat(-100, left as ByteString, 0), (one) =>
    withFd(openat(-100, right as ByteString, 0), (other) => firstDifference(one, other)),
  )
}

test('the first difference of two files is that of their bytes, wherever their holes are', () => {
  const directory = temporary()
  const anyFile = fc.record({
    sizeBytes: fc.integer({ min: 0, max: 300_000 }),
    pieces: fc.array(
      fc.tuple(fc.nat({ max: 290_000 }), fc.oneof(fc.constant(Buffer.alloc(5000)), fc.constant(Buffer.from('x')))),
      { maxLength: 3 },
    ),
  })
  fc.assert(
    fc.property(anyFile, anyFile, fc.boolean(), (one, other, same) => {
      const second = same ? { ...one, pieces: one.pieces.slice(0, 2) } : other
      write(`${directory}/one`, one.sizeBytes, one.pieces)
      write(`${directory}/other`, second.sizeBytes, second.pieces)
      expect(differenceOf(`${directory}/one`, `${directory}/other`)).toBe(plain(bytesOf(one), bytesOf(second)))
    }),
    { numRuns: 100 },
  )
})

function bytesOf({ sizeBytes, pieces }: { sizeBytes: number; pieces: readonly (readonly [number, Buffer])[] }): Buffer {
  const bytes = Buffer.alloc(sizeBytes)
  for (const [offset, piece] of pieces) piece.copy(bytes, Math.min(offset, sizeBytes))
  return bytes
}

function plain(one: Buffer, other: Buffer): number | undefined {
  for (let at = 0; at < Math.max(one.length, other.length); at++) if (one[at] !== other[at]) return at
  return undefined
}

test('a tree equals itself, also when threads share the work', async () => {
  const directory = temporary()
  writeFileSync(`${directory}/f`, '1')
  const fd = openRoot(directory as HostPath)
  try {
    const tree = new OpenTree(fd)
    expect(await compareTrees(tree, tree)).toEqual({ equal: true, differences: [], total: 0, entries: 2, bytes: 1 })
  } finally {
    close(fd)
  }
})

test('threads find what the calling one finds, in the same order', async () => {
  const [left, right] = [temporary(), temporary()]
  for (let i = 0; i < 120; i++) {
    for (const root of [left, right]) {
      mkdirSync(`${root}/d${i}`)
      for (let j = 0; j < 60; j++) writeFileSync(`${root}/d${i}/f${j}`, `${i} ${j}`)
    }
    if (i % 7 === 0) writeFileSync(`${right}/d${i}/f3`, 'other')
    if (i % 11 === 0) writeFileSync(`${right}/d${i}/more`, '')
  }
  const fds = [left, right].map((root) => openRoot(root as HostPath)) as [number, number]
  try {
    const [expected, actual] = fds.map((fd) => new OpenTree(fd)) as [OpenTree, OpenTree]
    const grain = { timeGranularityNs: 10n ** 18n }
    const alone = await compareTrees(expected, actual, { ...grain, workers: 0 })
    const shared = await compareTrees(expected, actual, { ...grain, workers: 2 })
    expect(shared).toEqual(alone)
    expect(alone.total).toBe(18 + 11)
  } finally {
    for (const fd of fds) close(fd)
  }
})

test('an abort ends the comparison', async () => {
  const directory = temporary()
  for (let i = 0; i < 3000; i++) mkdirSync(`${directory}/d${i}`)
  const fd = openRoot(directory as HostPath)
  try {
    const tree = new OpenTree(fd)
    const abort = new AbortController()
    const comparing = compareTrees(tree, tree, {
      signal: abort.signal,
      onProgress: () => abort.abort(new Error('enough')),
    })
    await expect(comparing).rejects.toThrow('enough')
  } finally {
    close(fd)
  }
})
