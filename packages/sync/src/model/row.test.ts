import { type ByteString, STATX_WORD } from '@lsync/posix'
import { expect, it } from 'vitest'
import { isUnchangedRow } from '../planner.ts'
import { isUnchanged, ROW_BYTES, Row, writeImage } from './row.ts'

const NAME = 'file' as ByteString

function lookOf(changed: Readonly<Record<number, number>> = {}) {
  const words = new Uint32Array(64)
  words[STATX_WORD.mode] = 0o100644
  words[STATX_WORD.change] = 1000
  words[STATX_WORD.change + 2] = 1
  for (const [word, value] of Object.entries(changed)) words[Number(word)] = value
  const image = Buffer.alloc(ROW_BYTES)
  writeImage(image, 0, words, NAME.length)
  return { words, row: new Row(NAME, image) }
}

it('finds an inode unchanged that is', () => {
  const { row, words } = lookOf()
  expect(isUnchanged(row.image, 0, words)).toBe(true)
  expect(isUnchangedRow(row, lookOf().row)).toBe(true)
})

// A look in the middle of utimensat(2), chmod(2) or chown(2) has the change time of after, and the rest of before.
it.each([
  ['mtime, seconds', { [STATX_WORD.modification]: 7 }],
  ['mtime, nanoseconds', { [STATX_WORD.modification + 2]: 7 }],
  ['mode', { [STATX_WORD.mode]: 0o100600 }],
  ['owner', { [STATX_WORD.uid]: 7 }],
  ['group', { [STATX_WORD.gid]: 7 }],
])('finds it changed where the change time is the same, and not: %s', (_what, changed) => {
  const before = lookOf().row
  const { row, words } = lookOf(changed)
  expect(isUnchanged(before.image, 0, words)).toBe(false)
  expect(isUnchangedRow(before, row)).toBe(false)
})
