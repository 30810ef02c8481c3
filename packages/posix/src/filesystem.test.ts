import { execFileSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { temporary } from '../../../test/posix/temporary.ts'
import { isSubvolume } from './btrfs.ts'
import type { ByteString } from './bytes.ts'
import { hasCapability, isInitialUserNamespace, seesTrustedXattrs } from './credentials.ts'
import { fileSystemMagic, fileSystemOf, listsAcls } from './filesystem.ts'
import { handleAt, handleKey } from './handle.ts'
import { raiseFileLimit } from './limits.ts'
import { openRoot, withFd } from './open.ts'

describe('fileSystemOf', () => {
  test.each(['/dev/shm', '/proc', '/tmp'])('%s is what stat -f and findmnt say', (path) => {
    withFd(openRoot(path as never), (fd) => {
      const info = fileSystemOf(fd)
      const [magic, total, name] = execFileSync('stat', ['-f', '-c', '%t %b*%S %l', path]).toString().trim().split(' ')
      expect(info.magic.toString(16)).toBe(magic)
      expect(info.totalBytes).toBe((total as string).split('*').reduce((product, part) => product * Number(part), 1))
      expect(String(info.maxNameBytes)).toBe(name)
      // One line for each of the mounts stacked there.
      const types = execFileSync('findmnt', ['-n', '-o', 'FSTYPE', '-T', path]).toString().trim().split('\n')
      expect(info.type).toBe(types.at(-1))
      expect(fileSystemMagic(fd)).toBe(info.magic)
      if (info.type !== 'btrfs') expect(isSubvolume(fd)).toBe(false)
    })
  })
})

test.each([
  ['/dev/shm', true],
  ['/proc', false],
])('whether listxattr names the ACLs on %s: %s', (path, lists) => {
  withFd(openRoot(path as never), (fd) => expect(listsAcls(fd)).toBe(lists))
})

describe('credentials', () => {
  test('capabilities are the bits of CapEff', () => {
    const bits = BigInt(`0x${/CapEff:\s*(\w+)/.exec(execFileSync('cat', ['/proc/self/status']).toString())?.[1]}`)
    expect(hasCapability('CAP_CHOWN')).toBe((bits & 1n) !== 0n)
    expect(hasCapability('CAP_SYS_ADMIN')).toBe(((bits >> 21n) & 1n) !== 0n)
    expect(hasCapability('CAP_MKNOD')).toBe(((bits >> 27n) & 1n) !== 0n)
    expect(hasCapability('CAP_CHECKPOINT_RESTORE')).toBe(((bits >> 40n) & 1n) !== 0n)
  })

  test('trusted attributes are believed only with CAP_SYS_ADMIN in the initial user namespace', () => {
    expect(seesTrustedXattrs()).toBe(hasCapability('CAP_SYS_ADMIN') && isInitialUserNamespace())
  })
})

test('the file limit is raised to the hard one and never lowered', () => {
  const hard = () =>
    Number(/Max open files\s+\d+\s+(\d+)/.exec(execFileSync('cat', ['/proc/self/limits']).toString())?.[1])
  expect(raiseFileLimit()).toBe(hard())
  expect(raiseFileLimit()).toBe(hard())
})

test('a handle is the same for every name of an inode and another for every inode', () => {
  const { path, fd } = temporary()
  writeFileSync(`${path}/a`, '')
  writeFileSync(`${path}/b`, '')
  execFileSync('ln', [`${path}/a`, `${path}/c`])
  const [a, b, c] = ['a', 'b', 'c'].map((name) => handleKey(handleAt(fd, name as ByteString) as never))
  expect(c).toBe(a)
  expect(b).not.toBe(a)
  expect(() => handleAt(fd, 'none' as ByteString)).toThrowError(expect.objectContaining({ code: 'ENOENT' }))
})
