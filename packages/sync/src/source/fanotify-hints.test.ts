import {
  type ByteString,
  type DirectoryName,
  FAN_CREATE,
  FAN_DELETE,
  FAN_MODIFY,
  FAN_MOVED_FROM,
  FAN_MOVED_TO,
  FAN_ONDIR,
  FAN_Q_OVERFLOW,
  FAN_RENAME,
  type FanotifyEvent,
  type FileHandle,
  handleKey,
} from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { hintEvent } from './fanotify-hints.ts'
import type { Hint } from './source.ts'

const handle = (name: string): FileHandle => ({ type: 1, bytes: Buffer.from(name) })
const at = (directory: string, name: string): DirectoryName => ({
  directory: handle(directory),
  fsid: '0',
  name: name as ByteString,
})

/** Two roots, A and B; directories are named after the roots that they lie beneath: `A1`, `B1`, `AB1`, `x` in none. */
function hintsOf(event: Partial<FanotifyEvent>): { said: string[]; moved: (string | undefined)[] } {
  const said: string[] = []
  const moved: (string | undefined)[] = []
  hintEvent(
    { mask: 0, pid: 1, overflow: false, isDirectory: (event.mask ?? 0) >= FAN_ONDIR, ...event },
    {
      everybody: () => ['A', 'B'],
      ownersOf: ({ bytes }) => ['A', 'B'].filter((root) => bytes.toString().includes(root)),
      rootsAt: (key) => ['A', 'B'].filter((root) => handleKey(handle(root)) === key),
      moved: (directory) => moved.push(directory?.bytes.toString()),
      handleOf: ({ name }) => (name === 'gone' ? undefined : handle(`found ${name}`)),
      say: (root, hint) => said.push(`${root}: ${textOf(hint)}`),
    },
  )
  return { said, moved }
}

function textOf(hint: Hint): string {
  const end = (place: { directory: unknown; name: string } | undefined) =>
    place === undefined ? '' : `${(place.directory as { handle: FileHandle }).handle.bytes}/${place.name}`
  switch (hint.kind) {
    case 'name':
      return end(hint)
    case 'move':
      return `${end(hint.from)} -> ${end(hint.to)}`
    case 'tree':
      return `tree ${(hint.directory as { handle: FileHandle }).handle.bytes}`
    case 'lost':
      return 'lost'
  }
}

describe('an event is said to those beneath whose root it happened', () => {
  test('once for each of them', () => {
    expect(hintsOf({ mask: FAN_MODIFY, at: at('AB1', 'f') }).said).toEqual(['A: AB1/f', 'B: AB1/f'])
    expect(hintsOf({ mask: FAN_MODIFY, at: at('x', 'f') }).said).toEqual([])
  })

  test('a move from one root to another is half a move for each, and a tree for where it went', () => {
    const event = { mask: FAN_RENAME | FAN_ONDIR, from: at('A1', 'd'), to: at('B1', 'e'), target: handle('d') }
    expect(hintsOf(event)).toEqual({ said: ['A: A1/d -> ', 'B:  -> B1/e', 'B: tree d'], moved: ['d'] })
  })

  test('a move within one directory moves nothing beneath it to another root', () => {
    const event = { mask: FAN_RENAME | FAN_ONDIR, from: at('A1', 'd'), to: at('A1', 'e'), target: handle('d') }
    expect(hintsOf(event)).toEqual({ said: ['A: A1/d -> A1/e'], moved: [] })
  })

  test('an overflow is said to all, and whatever was known of directories is void', () => {
    expect(hintsOf({ mask: FAN_Q_OVERFLOW, overflow: true })).toEqual({
      said: ['A: lost', 'B: lost'],
      moved: [undefined],
    })
  })

  test('the removal of a root is said to those whose root it was', () => {
    expect(hintsOf({ mask: FAN_DELETE | FAN_ONDIR, at: at('x', 'root'), target: handle('A') }).said).toEqual([
      'A: lost',
    ])
    expect(hintsOf({ mask: FAN_DELETE | FAN_ONDIR, at: at('x', 'other'), target: handle('C') }).said).toEqual([])
  })
})

describe('on Linux before 5.17, which tells neither pairs nor inodes', () => {
  test('the two halves of a move are two hints, and a directory that comes in is a tree', () => {
    expect(hintsOf({ mask: FAN_MOVED_FROM | FAN_ONDIR, at: at('A1', 'd') }).said).toEqual(['A: A1/d'])
    expect(hintsOf({ mask: FAN_MOVED_TO | FAN_ONDIR, at: at('A1', 'e') })).toEqual({
      said: ['A: A1/e', 'A: tree found e'],
      moved: [undefined],
    })
  })

  test('a directory that is gone again is no tree', () => {
    expect(hintsOf({ mask: FAN_CREATE | FAN_ONDIR, at: at('A1', 'gone') }).said).toEqual(['A: A1/gone'])
  })

  test('a file that comes in is a name', () => {
    expect(hintsOf({ mask: FAN_MOVED_TO, at: at('A1', 'f') })).toEqual({ said: ['A: A1/f'], moved: [] })
  })
})
