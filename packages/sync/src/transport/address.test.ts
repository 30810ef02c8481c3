import { bytesOf } from '@lsync/posix'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { formatTarget, parseTarget, TargetAddressError } from './address.ts'

describe('a target', () => {
  test.each([
    ['/srv/data/', { scheme: 'local', path: '/srv/data' }],
    ['/', { scheme: 'local', path: '/' }],
    ['ssh://host/a//b/', { scheme: 'ssh', user: undefined, host: 'host', port: undefined, path: '/a/b' }],
    ['ssh://host', { scheme: 'ssh', user: undefined, host: 'host', port: undefined, path: '/' }],
    ['sftp://me@h.example:2222/x', { scheme: 'sftp', user: 'me', host: 'h.example', port: 2222, path: '/x' }],
    ['ssh://me@[fe80::1%25eth0]:22/x', { scheme: 'ssh', user: 'me', host: 'fe80::1%eth0', port: 22, path: '/x' }],
    ['ssh://[::1]/x', { scheme: 'ssh', user: undefined, host: '::1', port: undefined, path: '/x' }],
    ['ssh://h/a%ff%20b', { scheme: 'ssh', user: undefined, host: 'h', port: undefined, path: '/a\xff b' }],
    ['ssh://h/ä', { scheme: 'ssh', user: undefined, host: 'h', port: undefined, path: '/\xc3\xa4' }],
  ])('%s is read', (text, address) => {
    expect(parseTarget(text)).toEqual(address)
  })

  test.each([
    'relative/path',
    '',
    'host:/path',
    'ftp://h/x',
    'ssh://-oProxyCommand=x/y',
    'ssh://-l@h/x',
    'ssh://u:secret@h/x',
    'ssh://h:0/x',
    'ssh://h:65536/x',
    'ssh://h:ssh/x',
    'ssh:///x',
    'ssh://::1/x',
    'ssh://h/a%2',
    'ssh://h/a%00',
    'ssh://h/../x',
    'ssh://h/%2e%2e/x',
    'ssh://h h/x',
    'ssh://u%0a@h/x',
  ])('%j is refused', (text) => {
    expect(() => parseTarget(text)).toThrow(TargetAddressError)
  })

  test('is read again as it was printed, whatever bytes its path has', () => {
    const anyName = fc
      .array(fc.integer({ min: 1, max: 255 }), { minLength: 1, maxLength: 8 })
      .map((codes) => String.fromCharCode(...codes).replaceAll('/', '_'))
      .filter((name) => name !== '.' && name !== '..')
    fc.assert(
      fc.property(fc.array(anyName, { maxLength: 4 }), (names) => {
        const path = bytesOf('/') + names.join('/')
        const address = { scheme: 'ssh', user: 'u', host: '::1', port: 5, path } as ReturnType<typeof parseTarget>
        expect(parseTarget(formatTarget(address))).toEqual(address)
      }),
    )
  })
})
