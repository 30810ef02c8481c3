import { execFileSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { temporary } from '../../../test/posix/temporary.ts'
import type { ByteString } from './bytes.ts'
import { fdatasync, fsync, syncFileSystem, tryLock } from './durability.ts'
import { close, O_RDWR, openat, withFd } from './open.ts'

const name = (text: string) => text as ByteString

test('an exclusive lock keeps others out until its file is closed, shared ones keep only exclusive ones out', () => {
  const { path, fd } = temporary()
  writeFileSync(`${path}/f`, '')
  const [first, second] = [openat(fd, name('f'), O_RDWR), openat(fd, name('f'), O_RDWR)]
  expect(tryLock(first, 'exclusive')).toBe(true)
  expect([tryLock(second, 'exclusive'), tryLock(second, 'shared')]).toEqual([false, false])
  const flock = ['-n', '-s', `${path}/f`, 'true']
  expect(() => execFileSync('flock', flock)).toThrow()
  close(first)
  expect(tryLock(second, 'shared')).toBe(true)
  execFileSync('flock', flock)
  close(second)
})

test('files and directories are synced, and an error names the call', () => {
  const { path, fd } = temporary()
  writeFileSync(`${path}/f`, 'x')
  withFd(openat(fd, name('f'), O_RDWR), (file) => {
    fsync(file)
    fdatasync(file)
  })
  fsync(fd)
  syncFileSystem(fd)
  expect(() => fsync(-1, 'gone')).toThrowError(
    expect.objectContaining({ code: 'EBADF', syscall: 'fsync', path: 'gone' }),
  )
})
