import { mkdirSync, writeFileSync } from 'node:fs'
import { type ByteString, makeNode, S_IFCHR, setXattr } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { outlineOf } from '../../../../test/layers/outline.ts'
import { scratch } from '../../../../test/layers/scratch.ts'
import type { Meta } from '../model/entry.ts'
import type { EntryPath } from '../model/path.ts'
import { aufsTreeForm, parseWhName, readAufsTree, realInode } from './aufs.ts'
import { TreeSink } from './tree-sink.ts'

const META: Meta = { mode: 0o755, uid: 0, gid: 0, atimeNs: 0n, mtimeNs: 0n, xattrs: [] }

test.each([
  ['plain', { means: 'name' }],
  ['.whx', { means: 'name' }],
  ['.wh.a', { means: 'whiteout', name: 'a' }],
  ['.wh..hidden', { means: 'whiteout', name: '.hidden' }],
  ['.wh..wh', { means: 'whiteout', name: '.wh' }],
  ['.wh..wh..opq', { means: 'opaque' }],
  ['.wh..wh.aufs', { means: 'bookkeeping' }],
  ['.wh..wh.plnk', { means: 'bookkeeping' }],
  ['.wh.', { means: 'invalid' }],
  ['.wh..', { means: 'invalid' }],
  ['.wh...', { means: 'invalid' }],
  ['.wh....', { means: 'whiteout', name: '...' }],
])('%s', (name, meaning) => {
  expect(parseWhName(name)).toEqual(meaning)
})

function tree(files: readonly string[]): { path: string; fd: number } {
  const place = scratch()
  for (const name of files) {
    if (name.endsWith('/')) mkdirSync(`${place.path}/${name}`)
    else writeFileSync(`${place.path}/${name}`, name.includes('.wh.') ? '' : name)
  }
  return place
}

describe('a tree in the .wh. form', () => {
  test('whites out, is opaque, and leaves the bookkeeping of AUFS out', () => {
    const losses: string[] = []
    const { fd } = tree([
      '.wh.gone',
      '.wh..wh.aufs',
      '.wh..wh.plnk/',
      '.wh..wh.plnk/1.2',
      'd/',
      'd/.wh..wh..opq',
      'd/f',
    ])
    expect(outlineOf(readAufsTree(fd, { onLoss: ({ path }) => losses.push(path) }))).toEqual({
      d: 'dir opaque',
      'd/f': 'd/f',
      gone: 'whiteout',
    })
    expect(losses).toEqual(['.wh..wh.aufs', '.wh..wh.plnk'])
  })

  test('a name beats its own whiteout, and a directory hides what is below', () => {
    const { fd } = tree(['.wh.f', 'f', '.wh.d', 'd/', 'd/x'])
    expect(outlineOf(readAufsTree(fd))).toEqual({ d: 'dir opaque', 'd/x': 'd/x', f: 'f' })
  })

  test.each([['.wh.'], ['.wh..'], ['.wh...']])('%s is refused', (name) => {
    const { fd } = tree([name])
    expect(() => [...readAufsTree(fd)]).toThrow(expect.objectContaining({ code: 'ENTRY_REFUSED', path: name }))
  })

  test('a marker that holds something is refused', () => {
    const place = tree(['.wh.d/'])
    expect(() => [...readAufsTree(place.fd)]).toThrow(expect.objectContaining({ code: 'ENTRY_REFUSED' }))
    const other = tree([])
    writeFileSync(`${other.path}/.wh.f`, 'content')
    expect(() => [...readAufsTree(other.fd)]).toThrow(expect.objectContaining({ code: 'ENTRY_REFUSED' }))
  })

  test('whiteouts of siblings at several depths are kept apart', () => {
    const { fd } = tree(['.wh.x', 'a/', 'a/.wh.x', 'a/b/', 'a/b/x', 'a/c', 'x2', 'z/', 'z/x'])
    expect(outlineOf(readAufsTree(fd))).toEqual({
      a: 'dir',
      'a/b': 'dir',
      'a/b/x': 'a/b/x',
      'a/c': 'a/c',
      'a/x': 'whiteout',
      x: 'whiteout',
      x2: 'x2',
      z: 'dir',
      'z/x': 'z/x',
    })
  })
})

describe('an upper of fuse-overlayfs', () => {
  test('loses what fuse-overlayfs put into it', () => {
    const { path, fd } = tree(['d/', 'd/.wh..wh..opq', 'd/f', 'e/', 'e/f'])
    makeNode(fd, 'gone' as ByteString, S_IFCHR, 0)
    makeNode(fd, '.wh..opq' as ByteString, S_IFCHR, 0)
    setXattr(fd, 'e' as ByteString, 'user.fuseoverlayfs.opaque' as ByteString, Buffer.from('y'))
    setXattr(fd, 'e' as ByteString, 'user.fuseoverlayfs.origin' as ByteString, Buffer.from('x'))
    setXattr(fd, 'e' as ByteString, 'user.kept' as ByteString, Buffer.from('1'))
    expect(path).toBeDefined()
    expect(outlineOf(readAufsTree(fd, { variant: 'fuse-overlayfs' }))).toEqual({
      d: 'dir opaque',
      'd/f': 'd/f',
      e: 'dir opaque user.kept=1',
      'e/f': 'e/f',
      gone: 'whiteout',
    })
  })

  test.each([
    ['7:8:4755', { kind: 'file', uid: 7, gid: 8, mode: 0o4755 }],
    ['7:8:600:block-8-17', { kind: 'special', uid: 7, gid: 8, mode: 0o600, rdev: 0x811 }],
    ['7:8:644:pipe', { kind: 'special', uid: 7, gid: 8, mode: 0o644 }],
    ['nonsense', { kind: 'file', uid: 0, gid: 0, mode: 0o755 }],
  ])('the real owner, mode and type in override_stat count: %s', (value, expected) => {
    const xattrs = [{ name: 'user.containers.override_stat' as ByteString, value: Buffer.from(value) }]
    const real = realInode({ kind: 'file', sizeBytes: 0, meta: { ...META, xattrs } })
    expect({ ...real, ...real.meta }).toMatchObject({ ...expected, xattrs: [] })
  })
})

describe('what a .wh. tree cannot hold is refused with a hint', () => {
  const path = (text: string) => text as EntryPath
  test.each([
    [
      'a name that looks like a marker',
      'NOT_EXPRESSIBLE',
      { kind: 'symlink', path: path('.wh.a'), meta: META, target: 'x' as ByteString },
    ],
    ['a whiteout of a long name', 'NOT_EXPRESSIBLE', { kind: 'whiteout', path: path('n'.repeat(252)), form: 'device' }],
    [
      'a redirect',
      'NEEDS_DEREF',
      { kind: 'directory', path: path('d'), meta: META, opaque: false, redirect: 'x' as never },
    ],
    ['a metacopy', 'NEEDS_DEREF', { kind: 'file', path: path('f'), meta: META, sizeBytes: 1, metacopy: {} }],
  ] as const)('%s', (_what, code, entry) => {
    const sink = new TreeSink(scratch().fd, { form: aufsTreeForm() })
    sink.add({ entry: { kind: 'directory', path: path(''), meta: META, opaque: false } })
    expect(() => sink.add({ entry })).toThrow(
      expect.objectContaining({ code, path: entry.path, hint: expect.any(String) }),
    )
    sink.close()
  })
})
