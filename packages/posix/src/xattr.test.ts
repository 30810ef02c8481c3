import { execFileSync } from 'node:child_process'
import { mkdirSync, symlinkSync, writeFileSync } from 'node:fs'
import fc from 'fast-check'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { temporary } from '../../../test/posix/temporary.ts'
import type { ByteString } from './bytes.ts'
import { O_NOFOLLOW, O_PATH, O_RDONLY, openat, withFd } from './open.ts'
import { getXattr, listXattrs, removeXattr, setXattr, useXattrAtCalls } from './xattr.ts'

const name = (text: string) => text as ByteString

/** The attributes in getfattr's words: name="0s" + base64. */
function getfattr(path: string): string[] {
  return execFileSync('getfattr', ['-h', '-d', '-e', 'base64', '--absolute-names', '-m', '^user', path])
    .toString()
    .split('\n')
    .filter((line) => line.startsWith('user.'))
    .sort()
}

describe.each([
  { way: 'the *xattrat calls of Linux 6.13', use: true },
  { way: '/proc/self/fd', use: false },
])('by $way', ({ use }) => {
  beforeEach(() => useXattrAtCalls(use))
  afterEach(() => useXattrAtCalls(undefined))

  test('what is set is what getfattr shows, any bytes in the value', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, '')
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 100 }), (value) => {
        setXattr(fd, name('f'), name('user.v'), value)
        expect(getXattr(fd, name('f'), name('user.v'))).toEqual(Buffer.from(value))
      }),
    )
    setXattr(fd, name('f'), name('user.v'), Buffer.from([0, 255, 10, 34]))
    setXattr(fd, name('f'), name('user.empty'), Buffer.alloc(0))
    expect(getfattr(`${path}/f`)).toEqual(['user.empty=0s', 'user.v=0sAP8KIg=='])
    expect(listXattrs(fd, name('f')).sort()).toEqual(['user.empty', 'user.v'])
    removeXattr(fd, name('f'), name('user.v'))
    expect(getfattr(`${path}/f`)).toEqual(['user.empty=0s'])
  })

  test('what getfattr set is what is read, names that are not UTF-8 included', () => {
    const { path, fd } = temporary()
    mkdirSync(`${path}/d`)
    execFileSync('setfattr', ['-n', 'user.größe', '-v', '0x00ff', `${path}/d`])
    expect(listXattrs(fd, name('d'))).toEqual([Buffer.from('user.größe').toString('latin1')])
    setXattr(fd, name('d'), name('user.\xff'), Buffer.from('odd'))
    expect(listXattrs(fd, name('d'))).toContain('user.\xff')
    expect(getXattr(fd, name('d'), name('user.\xff'))?.toString()).toBe('odd')
  })

  test('a value of 64 KiB, the most that the kernel takes, comes back whole', () => {
    const { path, fd } = temporary('/dev/shm')
    writeFileSync(`${path}/f`, '')
    const value = Buffer.alloc(65_536, 'lsync ')
    setXattr(fd, name('f'), name('user.big'), value)
    expect(getXattr(fd, name('f'), name('user.big'))?.equals(value)).toBe(true)
    expect(() => setXattr(fd, name('f'), name('user.big'), Buffer.alloc(65_537))).toThrowError(
      expect.objectContaining({ code: 'E2BIG' }),
    )
  })

  test('lists and values come back whole at any length', () => {
    const { path, fd } = temporary('/dev/shm')
    writeFileSync(`${path}/f`, '')
    for (const length of [511, 512, 513, 4096]) {
      const value = Buffer.alloc(length, 'lsync ')
      setXattr(fd, name('f'), name('user.v'), value)
      expect(getXattr(fd, name('f'), name('user.v'))?.equals(value)).toBe(true)
    }
    removeXattr(fd, name('f'), name('user.v'))
    const names = Array.from({ length: 40 }, (_, index) => `user.${index + 10}.${'x'.repeat(index + 20)}`)
    for (const [index, attribute] of names.entries()) {
      setXattr(fd, name('f'), name(attribute), Buffer.from('v'))
      expect(listXattrs(fd, name('f')).sort()).toEqual(names.slice(0, index + 1))
    }
  })

  test('a slice of a larger buffer is written from its own start', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, '')
    setXattr(fd, name('f'), name('user.v'), Buffer.from('abcdef').subarray(2, 4))
    expect(getXattr(fd, name('f'), name('user.v'))?.toString()).toBe('cd')
    setXattr(fd, name('f'), name('user.v'), new Uint8Array(Buffer.from('xyz')).subarray(1))
    expect(getXattr(fd, name('f'), name('user.v'))?.toString()).toBe('yz')
  })

  test('an absent attribute is undefined, and removing it is fine', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, '')
    expect(getXattr(fd, name('f'), name('user.none'))).toBeUndefined()
    expect(listXattrs(fd, name('f'))).toEqual([])
    removeXattr(fd, name('f'), name('user.none'))
    expect(() => getXattr(fd, name('none'), name('user.v'))).toThrowError(expect.objectContaining({ code: 'ENOENT' }))
  })

  test('a symlink is not followed: what it points to is neither read nor changed', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, '')
    execFileSync('setfattr', ['-n', 'user.v', '-v', 'secret', `${path}/f`])
    symlinkSync('f', `${path}/link`)
    expect(getXattr(fd, name('link'), name('user.v'))).toBeUndefined()
    expect(listXattrs(fd, name('link'))).toEqual([])
    // user.* is not allowed on symlinks at all.
    expect(() => setXattr(fd, name('link'), name('user.v'), Buffer.from('x'))).toThrowError(
      expect.objectContaining({ code: 'EPERM' }),
    )
    expect(getfattr(`${path}/f`)).toEqual(['user.v=0sc2VjcmV0'])
  })

  test('the empty name is the fd itself, be it a file, a directory or O_PATH', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, '')
    setXattr(fd, '', name('user.directory'), Buffer.from('1'))
    expect(getfattr(path)).toEqual(['user.directory=0sMQ=='])
    for (const flags of [O_RDONLY, O_PATH | O_NOFOLLOW]) {
      withFd(openat(fd, name('f'), flags), (file) => {
        setXattr(file, '', name('user.v'), Buffer.from('1'))
        expect(listXattrs(file, '')).toEqual(['user.v'])
        expect(getXattr(file, '', name('user.v'))?.toString()).toBe('1')
        removeXattr(file, '', name('user.v'))
        expect(getXattr(file, '', name('user.v'))).toBeUndefined()
      })
    }
  })

  test('an ACL set by setfacl passes through to another file unchanged', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, '')
    writeFileSync(`${path}/g`, '')
    execFileSync('setfacl', ['-m', 'u:1:rw,g:2:r,m:rwx', `${path}/f`])
    const attribute = name('system.posix_acl_access')
    const acl = getXattr(fd, name('f'), attribute)
    expect(acl).toBeDefined()
    setXattr(fd, name('g'), attribute, acl as Buffer)
    const show = (file: string) => execFileSync('getfacl', ['-n', '-c', '-p', `${path}/${file}`]).toString()
    expect(show('g')).toBe(show('f'))
    expect(show('g')).toContain('user:1:rw-')
  })
})
