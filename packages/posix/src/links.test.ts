import { execFileSync } from 'node:child_process'
import { existsSync, lstatSync, mkdirSync, readFileSync, readlinkSync, symlinkSync, writeFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { temporary } from '../../../test/posix/temporary.ts'
import type { ByteString } from './bytes.ts'
import {
  link,
  linkFd,
  makeDirectory,
  makeNode,
  makeSymlink,
  RENAME_EXCHANGE,
  RENAME_NOREPLACE,
  readSymlink,
  removeDirectory,
  rename,
  tryLink,
  tryRename,
  tryUnlink,
  unlink,
} from './links.ts'
import { O_RDWR, O_TMPFILE, openat, withFd, writeAt } from './open.ts'
import { S_IFIFO, S_IFSOCK, statAt } from './stat.ts'

const name = (text: string) => text as ByteString

test('rename replaces, refuses with NOREPLACE, and swaps with EXCHANGE', () => {
  const { path, fd } = temporary()
  writeFileSync(`${path}/a`, 'a')
  writeFileSync(`${path}/b`, 'b')
  expect(tryRename(fd, name('a'), fd, name('b'), RENAME_NOREPLACE)).toBe('EEXIST')
  expect(tryRename(fd, name('a'), fd, name('b'), RENAME_EXCHANGE)).toBeUndefined()
  expect(readFileSync(`${path}/a`, 'utf8') + readFileSync(`${path}/b`, 'utf8')).toBe('ba')
  rename(fd, name('a'), fd, name('b'))
  expect(existsSync(`${path}/a`)).toBe(false)
  expect(readFileSync(`${path}/b`, 'utf8')).toBe('b')
  expect(() => rename(fd, name('none'), fd, name('b'))).toThrowError(expect.objectContaining({ code: 'ENOENT' }))
})

test('a hard link is a second name of the same inode, and a symlink itself is linked', () => {
  const { path, fd } = temporary()
  writeFileSync(`${path}/a`, '')
  symlinkSync('a', `${path}/s`)
  link(fd, name('a'), fd, name('b'))
  link(fd, name('s'), fd, name('t'))
  expect(execFileSync('stat', ['-c', '%h %F', `${path}/a`, `${path}/t`]).toString()).toBe(
    '2 regular empty file\n2 symbolic link\n',
  )
  expect(statAt(fd, name('b')).ino).toBe(statAt(fd, name('a')).ino)
  expect(tryLink(fd, name('a'), fd, name('b'))).toBe('EEXIST')
})

test('removing what is absent is false, and the kinds are told apart', () => {
  const { path, fd } = temporary()
  mkdirSync(`${path}/d/e`, { recursive: true })
  writeFileSync(`${path}/f`, '')
  expect([unlink(fd, name('none')), removeDirectory(fd, name('none'))]).toEqual([false, false])
  expect(tryUnlink(fd, name('d'))).toBe('EISDIR')
  expect(() => removeDirectory(fd, name('f'))).toThrowError(expect.objectContaining({ code: 'ENOTDIR' }))
  expect(() => removeDirectory(fd, name('d'))).toThrowError(expect.objectContaining({ code: 'ENOTEMPTY' }))
  expect([unlink(fd, name('f')), removeDirectory(fd, name('d/e'))]).toEqual([true, true])
})

test('a symlink holds any bytes up to 4095, and names may be 255 bytes long', () => {
  const { path, fd } = temporary()
  for (const target of ['\xff\xfe', 'a\nb', 't'.repeat(4095), '/', ' ']) {
    const at = name(`${'n'.repeat(254)}${target.length % 10}`)
    unlink(fd, at)
    makeSymlink(name(target), fd, at)
    expect(readSymlink(fd, at)).toBe(target)
    expect(readlinkSync(`${path}/${at}`, 'buffer').toString('latin1')).toBe(target)
  }
  expect(() => makeSymlink(name('t'.repeat(4096)), fd, name('long'))).toThrowError(
    expect.objectContaining({ code: 'ENAMETOOLONG' }),
  )
})

test('fifo and socket are made as such', () => {
  const { path, fd } = temporary()
  makeNode(fd, name('fifo'), S_IFIFO | 0o600, 0)
  makeNode(fd, name('socket'), S_IFSOCK | 0o600, 0)
  expect([lstatSync(`${path}/fifo`).isFIFO(), lstatSync(`${path}/socket`).isSocket()]).toEqual([true, true])
})

test('a directory made has the mode asked for less the umask', () => {
  const { path, fd } = temporary()
  makeDirectory(fd, name('d'), 0o777)
  expect(lstatSync(`${path}/d`).mode & 0o777).toBe(0o777 & ~process.umask())
})

test('an unnamed file gets a name when it is complete', () => {
  const { path, fd } = temporary()
  withFd(openat(fd, name('.'), O_TMPFILE | O_RDWR, 0o600), (file) => {
    writeAt(file, 0, Buffer.from('whole'))
    linkFd(file, fd, name('f'))
  })
  expect(readFileSync(`${path}/f`, 'utf8')).toBe('whole')
})
