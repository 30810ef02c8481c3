import { mkdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { outlineOf } from '../../../../test/layers/outline.ts'
import { scratch } from '../../../../test/layers/scratch.ts'
import type { Meta } from '../model/entry.ts'
import { type EntryPath, ROOT } from '../model/path.ts'
import { PortableSink, readPortableLayer } from './portable.ts'

const FIRST = { format: 'lsync-portable-layer', version: 1 }
const meta = { mode: '755', uid: 0, gid: 0, atime: '0', mtime: '0' }
const root = { path: '', kind: 'directory', ...meta }
const dir = (path: string, more: object = {}) => ({ path, kind: 'directory', ...meta, ...more })
const whiteout = (path: string) => ({ path, kind: 'whiteout' })
const file = (path: string, more: object = {}) => ({ path, kind: 'file', ...meta, size: 0, ...more })

function read(lines: readonly (object | string)[], prepare: (path: string) => void = () => {}) {
  const place = scratch()
  const text = lines.map((line) => (typeof line === 'string' ? line : JSON.stringify(line))).join('\n')
  writeFileSync(`${place.path}/.lsync-layer.jsonl`, `${text}\n`)
  mkdirSync(`${place.path}/data`)
  prepare(place.path)
  return outlineOf(readPortableLayer(place.fd))
}

const layer = (...entries: object[]) => [FIRST, root, ...entries, { end: true, entries: entries.length + 1 }]
const throwing = (code: string) => expect.objectContaining({ code })

test('the documented manifest is what is written', () => {
  const place = scratch()
  const plain: Meta = { mode: 0o644, uid: 1, gid: 2, atimeNs: 3n, mtimeNs: -4n, xattrs: [] }
  const sink = new PortableSink(place.fd)
  sink.add({ entry: { kind: 'directory', path: ROOT, meta: plain, opaque: false } })
  sink.add({ entry: { kind: 'whiteout', path: 'a\xff' as EntryPath, form: 'xattr' } })
  sink.add({ entry: { kind: 'directory', path: 'd' as EntryPath, meta: plain, opaque: true } })
  sink.finish()
  sink.close()
  const meta = '"mode":"644","uid":1,"gid":2,"atime":"3","mtime":"-4"'
  expect(readFileSync(`${place.path}/.lsync-layer.jsonl`, 'utf8').split('\n')).toEqual([
    '{"format":"lsync-portable-layer","version":1}',
    `{"path":"","kind":"directory",${meta}}`,
    '{"path":"a\\udcff","kind":"whiteout","form":"xattr"}',
    `{"path":"d","kind":"directory",${meta},"opaque":true}`,
    '{"end":true,"entries":3}',
    '',
  ])
})

test('a manifest as documented is read', () => {
  const entries = [whiteout('w'), dir('d', { opaque: true }), whiteout('d/x'), file('d/f'), file('e')]
  expect(read(layer(...entries))).toEqual({ w: 'whiteout', d: 'dir opaque', 'd/x': 'whiteout', 'd/f': '', e: '' })
})

describe('a manifest that is cut or foreign is refused', () => {
  test.each([
    ['no end', [FIRST, root]],
    ['lost entries', [FIRST, root, { end: true, entries: 2 }]],
    ['something after the end', [...layer(), file('f')]],
    ['another format', [{ format: 'tar' }, root]],
    ['a later version', [{ ...FIRST, version: 2 }, root]],
    ['no JSON', [FIRST, '{"path":']],
    ['no object', [FIRST, '[]']],
  ])('%s', (_what, lines) => {
    expect(() => read(lines)).toThrow(throwing('ARCHIVE_BROKEN'))
  })
})

describe('an entry that is hostile or out of place is refused by name', () => {
  test.each([
    ['dot-dot', '../x', [file('../x')]],
    ['dot-dot within', 'a/../../x', [dir('a'), file('a/../../x')]],
    ['an absolute path', '/etc', [dir('/etc')]],
    ['a dot', '.', [dir('.')]],
    ['a doubled slash', 'a//b', [dir('a'), file('a//b')]],
    ['a name that is too long', 'n'.repeat(256), [file('n'.repeat(256))]],
    ['a parent that is missing', 'a/b', [file('a/b')]],
    ['a parent that is a symlink', 'a/b', [{ path: 'a', kind: 'symlink', ...meta, target: '/etc' }, file('a/b')]],
    ['a parent that is a file', 'a/b', [file('a'), file('a/b')]],
    ['the same name twice', 'a', [file('a'), file('a')]],
    ['a whiteout beside its name', 'a', [whiteout('a'), file('a')]],
    ['the wrong order', 'a', [file('b'), file('a')]],
    ['a whiteout after a name', 'b', [file('a'), whiteout('b')]],
    ['a second root', '', [dir('')]],
    ['a return to a directory that was left', 'a/y', [dir('a'), file('a/x'), file('b'), file('a/y')]],
    ['a mode that is none', 'a', [file('a', { mode: '99' })]],
    ['a mode with type bits', 'a', [file('a', { mode: '100644' })]],
    ['an owner that is none', 'a', [file('a', { uid: 2 ** 32 - 1 })]],
    ['a negative size', 'a', [file('a', { size: -1 })]],
    ['data that is nowhere', 'a', [file('a', { size: 1 })]],
    ['a character device 0:0', 'a', [{ path: 'a', kind: 'character', ...meta, device: [0, 0] }]],
    ['a redirect that leaves', 'a', [dir('a', { redirect: '../x' })]],
    ['an unknown kind', 'a', [{ path: 'a', kind: 'door', ...meta }]],
    ['a group of two kinds', 'b', [file('a', { group: 1 }), { path: 'b', kind: 'fifo', ...meta, group: 1 }]],
    ['an attribute that is not base64', 'a', [file('a', { xattrs: [['user.a', '!']] })]],
    [
      'the same attribute twice',
      'a',
      [
        file('a', {
          xattrs: [
            ['user.a', ''],
            ['user.a', ''],
          ],
        }),
      ],
    ],
  ])('%s', (_what, path, entries) => {
    expect(() => read(layer(...entries))).toThrow(expect.objectContaining({ code: 'ENTRY_REFUSED', path }))
  })
})

describe('data is only read from where it belongs', () => {
  const one = layer(file('f', { size: 4, data: 0 }))

  test('a file of the right size', () => {
    const prepare = (path: string) => {
      mkdirSync(`${path}/data/000000`)
      writeFileSync(`${path}/data/000000/000`, 'data')
    }
    expect(read(one, prepare)).toEqual({ f: 'data' })
  })

  test('a file of another size is refused', () => {
    const prepare = (path: string) => {
      mkdirSync(`${path}/data/000000`)
      writeFileSync(`${path}/data/000000/000`, 'much data')
    }
    expect(() => read(one, prepare)).toThrow(throwing('ARCHIVE_BROKEN'))
  })

  test('a symlink in its place is not followed', () => {
    const prepare = (path: string) => {
      mkdirSync(`${path}/data/000000`)
      symlinkSync('/etc/passwd', `${path}/data/000000/000`)
    }
    expect(() => read(one, prepare)).toThrow(throwing('NOT_A_FILE'))
  })

  test('a symlink in the place of its directory is not followed', () => {
    const prepare = (path: string) => symlinkSync('/etc', `${path}/data/000000`)
    expect(() => read(one, prepare)).toThrow(expect.objectContaining({ code: expect.stringMatching(/ELOOP|ENOTDIR/) }))
  })
})
