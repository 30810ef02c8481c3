import { execFileSync } from 'node:child_process'
import { lstatSync, mkdirSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { temporary } from '../../../test/posix/temporary.ts'
import type { ByteString } from './bytes.ts'
import { getInodeFlags, setInodeFlags, setModeAt, setModeFd, setOwner, setTimes } from './metadata.ts'
import { O_RDONLY, openat, withFd } from './open.ts'
import { statAt } from './stat.ts'

const name = (text: string) => text as ByteString

test('all twelve permission bits are set, by name and by fd', () => {
  const { path, fd } = temporary()
  writeFileSync(`${path}/f`, '')
  setModeAt(fd, name('f'), 0o6751)
  expect(lstatSync(`${path}/f`).mode & 0o7777).toBe(0o6751)
  withFd(openat(fd, name('f'), O_RDONLY), (file) => setModeFd(file, 0o1604))
  expect(lstatSync(`${path}/f`).mode & 0o7777).toBe(0o1604)
})

test('the mode of what a symlink points to is never changed', () => {
  const { path, fd } = temporary()
  writeFileSync(`${path}/f`, '', { mode: 0o600 })
  symlinkSync('f', `${path}/link`)
  expect(() => setModeAt(fd, name('link'), 0o777)).toThrowError(expect.objectContaining({ code: 'ENOTSUP' }))
  expect(statSync(`${path}/f`).mode & 0o777).toBe(0o600)
})

test('times of a symlink are its own', () => {
  const { path, fd } = temporary()
  writeFileSync(`${path}/f`, '')
  symlinkSync('f', `${path}/link`)
  const before = statAt(fd, name('f')).mtimeNs
  setTimes(fd, name('link'), 1_000_000_001n, 2_000_000_002n)
  expect(statAt(fd, name('link')).mtimeNs).toBe(2_000_000_002n)
  expect(statAt(fd, name('f')).mtimeNs).toBe(before)
  setTimes(fd, '', 3n, 4n)
  expect(statSync(path, { bigint: true }).mtimeNs).toBe(4n)
})

test('giving a file to its own owner is always allowed and clears setuid', () => {
  const { path, fd } = temporary()
  mkdirSync(`${path}/d`)
  writeFileSync(`${path}/f`, '')
  setModeAt(fd, name('f'), 0o4755)
  const { uid, gid } = statAt(fd, name('f'))
  setOwner(fd, name('f'), uid, gid)
  expect(statAt(fd, name('f')).permissions).toBe(0o755)
  setOwner(fd, '', uid, gid)
})

test('inode flags are those that lsattr shows', () => {
  const { path, fd } = temporary()
  mkdirSync(`${path}/d`)
  withFd(openat(fd, name('d'), O_RDONLY), (directory) => {
    const FS_NODUMP_FL = 0x40
    setInodeFlags(directory, getInodeFlags(directory) | FS_NODUMP_FL)
    expect(getInodeFlags(directory) & FS_NODUMP_FL).toBe(FS_NODUMP_FL)
    expect(execFileSync('lsattr', ['-d', `${path}/d`]).toString()).toMatch(/^\S*d\S* /)
  })
})

test('a file system without inode flags has none', () => {
  withFd(openat(-100, name('/proc'), O_RDONLY), (fd) => expect(getInodeFlags(fd)).toBe(0))
})
