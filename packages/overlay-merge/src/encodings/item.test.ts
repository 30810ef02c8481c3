import type { ByteString } from '@lsync/posix'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import type { Xattr } from '../model/entry.ts'
import { isMark, MARKS } from '../model/marks.ts'
import { translateXattrs } from './item.ts'

const xattr = (name: string): Xattr => ({ name: name as ByteString, value: Buffer.from(name) })
const names = (list: readonly Xattr[]) => list.map(({ name }) => name)

const anyName = fc
  .tuple(
    fc.constantFrom('user', 'trusted', 'security'),
    fc.constantFrom('', 'overlay.', 'overlay.overlay.'),
    fc.constantFrom('opaque', 'a'),
  )
  .map((parts) => `${parts[0]}.${parts[1]}${parts[2]}`)
const anyContent = fc.uniqueArray(anyName).map((list) => list.sort().map(xattr))
const anyNamespace = fc.constantFrom('trusted' as const, 'user' as const)

test('what a layer stores of content is never a mark of its own namespace', () =>
  fc.assert(
    fc.property(anyContent, anyNamespace, (content, namespace) => {
      const stored = translateXattrs(content, undefined, namespace)
      expect(stored.filter(({ name }) => isMark(name, MARKS[namespace]))).toEqual([])
    }),
  ))

test('content comes back from a layer as it was, and from one layer to another', () =>
  fc.assert(
    fc.property(anyContent, anyNamespace, anyNamespace, (content, first, second) => {
      const stored = translateXattrs(content, undefined, first)
      expect(translateXattrs(stored, first, undefined)).toEqual(content)
      expect(translateXattrs(translateXattrs(stored, first, second), second, undefined)).toEqual(content)
    }),
  ))

test('the other namespace is never escaped', () => {
  expect(names(translateXattrs([xattr('user.overlay.opaque')], undefined, 'trusted'))).toEqual(['user.overlay.opaque'])
  expect(names(translateXattrs([xattr('trusted.overlay.x')], 'user', 'trusted'))).toEqual(['trusted.overlay.overlay.x'])
})
