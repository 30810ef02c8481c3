import type { ByteString } from '@lsync/posix'
import { S_IFCHR, S_IFDIR, S_IFREG } from '@lsync/posix'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { formatTime, isSameTime, jsonText, parseTime, quoteName, unquoteName } from './go-text.ts'
import { goModeOf, modeOf, nodeTypeOf } from './mode.ts'
import { decodeTree, encodeNode, encodeTree, type TreeNode } from './tree.ts'

const anyBytes = (constraints?: { minLength?: number; maxLength?: number }) =>
  fc.uint8Array(constraints).map((bytes) => Buffer.from(bytes).toString('latin1') as ByteString)
const anyName = () =>
  fc
    .oneof(
      anyBytes({ minLength: 1, maxLength: 40 }),
      fc.constantFrom('a', '\xff', '\xc3\xa9', 'a\\x41', '"', '\xe2\x80\x8b'),
    )
    .map((name) => name.replace(/[/\0]/g, '_') as ByteString)
    .filter((name) => name !== '.' && name !== '..')
const anyId = () => fc.uint8Array({ minLength: 32, maxLength: 32 }).map((bytes) => Buffer.from(bytes).toString('hex'))
const anyTimeNs = () => fc.bigInt({ min: -(2n ** 62n), max: 2n ** 62n })
const anyNode = (name: ByteString): fc.Arbitrary<TreeNode> =>
  fc.record({
    name: fc.constant(name),
    type: fc.constant('file'),
    mode: fc.nat({ max: 0o7777 }).map((bits) => S_IFREG | bits),
    mtime: anyTimeNs().map(formatTime),
    atime: anyTimeNs().map(formatTime),
    ctime: anyTimeNs().map(formatTime),
    uid: fc.nat(),
    gid: fc.nat(),
    user: fc.string(),
    group: fc.constant(''),
    inode: fc.oneof(fc.nat(), fc.bigInt({ min: 2n ** 53n, max: 2n ** 64n - 1n })),
    deviceId: fc.nat(),
    sizeBytes: fc.maxSafeNat(),
    links: fc.nat(),
    linkTarget: anyBytes(),
    xattrs: fc.array(
      fc.tuple(
        anyName(),
        fc.uint8Array().map((value) => Buffer.from(value)),
      ),
    ),
    device: fc.nat(),
    content: fc.array(anyId()),
    subtree: fc.constant(undefined),
  })

test('a tree comes back from its text', () =>
  fc.assert(
    fc.property(
      fc.uniqueArray(anyName(), { maxLength: 4 }).chain((names) => fc.tuple(...names.sort().map(anyNode))),
      (nodes) => {
        expect(decodeTree(encodeTree(nodes.map(encodeNode)))).toEqual(nodes)
      },
    ),
  ))

test('the text of a node is the one that restic 0.14 wrote of it', () => {
  const written =
    '{"nodes":[{"name":"b\\\\xff\\\\\\"\\\\\\\\\\\\né\\\\u200b\\u003c\\u0026","type":"file","mode":8389101,"mtime":"2026-11-24T11:16:25.249468079Z","atime":"2026-11-24T11:16:25.249468079Z","ctime":"2026-11-24T11:16:25.259465099Z","uid":0,"gid":0,"user":"root","group":"root","inode":2148094,"device_id":65024,"size":3,"links":2,"extended_attributes":[{"name":"user.t","value":"Ymlu"}],"content":["98ea6e4f216f2fb4b69fff9b3a44842c38686ca685f3f55dc48c5d3fb1107be4"]},{"name":"c1","type":"chardev","mode":69206436,"mtime":"2026-11-24T11:16:25Z","atime":"2026-11-24T11:16:25Z","ctime":"2026-11-24T11:16:25Z","uid":0,"gid":0,"user":"root","group":"root","inode":2148129,"device_id":65024,"links":1,"device":1281,"content":null}]}\n'
  const nodes = decodeTree(Buffer.from(written))
  expect(nodes[0]?.name).toBe('b\xff"\\\n\xc3\xa9\xe2\x80\x8b<&')
  expect(nodes[0]?.mode).toBe(S_IFREG | 0o4755)
  expect(nodes[1]?.mode).toBe(S_IFCHR | 0o644)
  expect(encodeTree(nodes.map(encodeNode)).toString()).toBe(written)
})

describe('names', () => {
  test('any bytes come back', () =>
    fc.assert(
      fc.property(anyBytes(), (name) => {
        expect(unquoteName(quoteName(name))).toBe(name)
      }),
    ))

  test.each([
    ['a"b', 'a\\"b'],
    ['\x07\x00\x1b\x7f', '\\a\\x00\\x1b\\x7f'],
    ['\xc2\xa0', '\\u00a0'],
    ['\xf3\xa0\x80\x81', '\\U000e0001'],
    ['\xf0\x9f\x98\x80', '\u{1f600}'],
    ['\xc3', '\\xc3'],
    ['\xef\xbf\xbd', '\ufffd'],
  ])('%j is quoted as Go quotes it', (name, quoted) => {
    expect(quoteName(name as ByteString)).toBe(quoted)
  })

  test.each(['"', '\\', '\\q', '\\x1', '\\ud800', '\\U00110000', 'a\nb', "\\'"])(
    '%j is not a quoted name',
    (quoted) => {
      expect(unquoteName(quoted)).toBeUndefined()
    },
  )

  test('octal escapes are understood', () => expect(unquoteName('\\377\\101')).toBe('\xffA'))
})

test.each(['', '.', '..', 'a/b', '/', '\0', 'x'.repeat(256)])('a tree with the name %.20j is refused', (name) => {
  const text = JSON.stringify({ nodes: [{ name: quoteName(name as ByteString), type: 'file', content: [] }] })
  expect(() => decodeTree(Buffer.from(text))).toThrow(expect.objectContaining({ code: 'TREE_INVALID' }))
})

test.each([
  ['not JSON', 'x'],
  ['no list', '{"nodes":3}'],
  ['a node that is none', '{"nodes":[null]}'],
  ['an unknown type', '{"nodes":[{"name":"a","type":"irregular"}]}'],
  ['a directory without a tree', '{"nodes":[{"name":"a","type":"dir"}]}'],
  ['an id that is a path', '{"nodes":[{"name":"a","type":"file","content":["../../etc/passwd"]}]}'],
  ['a negative size', '{"nodes":[{"name":"a","type":"file","size":-1}]}'],
  ['a size beyond all bounds', '{"nodes":[{"name":"a","type":"file","size":1e300}]}'],
  ['a time that is none', '{"nodes":[{"name":"a","type":"file","mtime":"yesterday"}]}'],
  ['a name twice', '{"nodes":[{"name":"a","type":"file"},{"name":"a","type":"file"}]}'],
  ['names out of order', '{"nodes":[{"name":"b","type":"file"},{"name":"a","type":"file"}]}'],
])('a tree with %s is refused', (_, text) => {
  expect(() => decodeTree(Buffer.from(text))).toThrow(expect.objectContaining({ code: 'TREE_INVALID' }))
})

test('every mode comes back, and is a number of Go', () => {
  for (const bits of [0, 0o644, 0o1777, 0o2755, 0o4755, 0o7777]) {
    for (const format of [S_IFREG, S_IFDIR, S_IFCHR, 0o120000, 0o140000, 0o060000, 0o010000]) {
      expect(modeOf(nodeTypeOf(format), goModeOf(format | bits))).toBe(format | bits)
    }
  }
  expect(goModeOf(S_IFDIR | 0o755)).toBe(2147484141)
})

test.each([
  ['<&>', '"\\u003c\\u0026\\u003e"'],
  ['\u2028', '"\\u2028"'],
  ['\b\f\n', '"\\u0008\\u000c\\n"'],
  ['"\\', '"\\"\\\\"'],
  ['\\b\\f', '"\\\\b\\\\f"'],
  ['é', '"é"'],
])('%j becomes the JSON that Go writes', (text, json) => expect(jsonText(text)).toBe(json))

describe('times', () => {
  test('come back to the nanosecond', () =>
    fc.assert(
      fc.property(anyTimeNs(), (timeNs) => {
        expect(parseTime(formatTime(timeNs))).toBe(timeNs)
      }),
    ))

  test.each([
    ['2014-12-22T14:47:59.912418701+01:00', 1_419_256_079_912_418_701n],
    ['2014-12-22T13:47:59.9-00:30', 1_419_257_879_900_000_000n],
    ['1969-12-31T23:59:59.5Z', -500_000_000n],
    ['0001-01-01T00:00:00Z', -62_135_596_800_000_000_000n],
  ])('%s is read', (text, timeNs) => expect(parseTime(text)).toBe(timeNs))

  test('a time is read the same after another one of its second', () => {
    const texts = ['', '.', '.5', '.000000001', '.1234567890', '.5x'].flatMap((fraction) =>
      ['Z', '+01:00', '-01:00', '', 'z', '+1:00'].map((zone) => `2024-05-01T12:00:00${fraction}${zone}`),
    )
    const elsewhere = '2001-01-01T00:00:00Z'
    const alone = texts.map((text) => {
      parseTime(elsewhere)
      return parseTime(text)
    })
    for (const first of ['2024-05-01T12:00:00Z', '2024-05-01T12:00:00.25+01:00']) {
      expect(
        texts.map((text) => {
          parseTime(first)
          return parseTime(text)
        }),
      ).toEqual(alone)
    }
  })

  test('the same moment in two time zones is the same', () => {
    expect(isSameTime('2014-12-22T14:47:59.1+01:00', '2014-12-22T13:47:59.1Z')).toBe(true)
    expect(isSameTime('2014-12-22T14:47:59.1+01:00', '2014-12-22T13:47:59.2Z')).toBe(false)
  })

  test('a year that cannot be written becomes the nearest', () => {
    expect(formatTime(10n ** 30n)).toMatch(/^9999-12-3/)
    expect(formatTime(-(10n ** 30n))).toMatch(/^0000-01-0/)
  })
})
