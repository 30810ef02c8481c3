import { expect, test } from 'vitest'
import { aclFromText, aclToText } from './acl-text.ts'

const hex = (text: string, kind: 'access' | 'default' = 'access') => {
  const bytes = aclFromText(text, kind)
  return bytes === undefined ? undefined : Buffer.from(bytes).toString('hex')
}

test('an ACL in text becomes what setfacl stores', () => {
  // getfattr -e hex of `setfacl -m u:5:rw` on a file of mode 0644.
  const stored =
    '02000000' + '01000600ffffffff' + '0200060005000000' + '04000400ffffffff' + '10000600ffffffff' + '20000400ffffffff'
  expect(hex('user::rw-,user:5:rw-,group::r--,mask::rw-,other::r--')).toBe(stored)
  expect(hex('other::r--\nmask::rw-\ngroup::r--\nuser:lisa:rw-:5\nuser::rw-\n')).toBe(stored)
})

test('an access ACL that only repeats the mode is none, a default ACL is not', () => {
  expect(hex('user::rw-,group::r--,other::r--')).toBe('')
  expect(hex('user::rw-,group::r--,other::r--', 'default')).toHaveLength(2 * (4 + 3 * 8))
  expect(hex('', 'default')).toBe('')
})

test('a user without a number cannot be taken over', () => {
  expect(hex('user::rw-,user:lisa:rw-,group::r--,mask::rw-,other::r--')).toBeUndefined()
})

test('an ACL goes to text and back', () => {
  const text = 'user::rwx,user:5:rw-,user:4000000:---,group::r-x,group:9:r--,mask::rwx,other::--x'
  expect(aclToText(aclFromText(text, 'access') as Uint8Array)).toBe(text)
  expect(aclToText(Buffer.from('nonsense'))).toBeUndefined()
})
