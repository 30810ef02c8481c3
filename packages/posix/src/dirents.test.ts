import { execFileSync } from 'node:child_process'
import { mkdirSync, symlinkSync, writeFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { temporary } from '../../../test/posix/temporary.ts'
import type { ByteString } from './bytes.ts'
import { DT_DIR, DT_FIFO, DT_LNK, DT_REG, readDirents } from './dirents.ts'
import { O_DIRECTORY, O_RDONLY, openat, withFd } from './open.ts'

function list(fd: number): Map<string, number> {
  const found = new Map<string, number>()
  readDirents(fd, (name, type) => {
    expect(found.has(name)).toBe(false)
    found.set(name, type)
  })
  return found
}

test('names are bytes, and types and names are those that find(1) prints', () => {
  const { path, fd } = temporary()
  const at = (name: string) => Buffer.concat([Buffer.from(`${path}/`), Buffer.from(name, 'latin1')])
  const odd = ['\xff\xfe', 'a\nb', 'c\\d', 'n'.repeat(255), '\x01', '...', '.hidden']
  for (const name of odd) writeFileSync(at(name), '')
  mkdirSync(`${path}/directory`)
  symlinkSync('nowhere', `${path}/link`)
  execFileSync('mkfifo', [`${path}/fifo`])
  const letters = new Map([
    [DT_REG, 'f'],
    [DT_DIR, 'd'],
    [DT_LNK, 'l'],
    [DT_FIFO, 'p'],
  ])
  const ours = [...list(fd)].map(([name, type]) => `${name}\0${letters.get(type)}\0`)
  const theirs = execFileSync('find', [path, '-mindepth', '1', '-maxdepth', '1', '-printf', '%f\\0%y\\0'])
    .toString('latin1')
    .split(/(?<=\0[fdlp]\0)/)
  expect(ours.sort()).toEqual(theirs.sort())
})

test('a directory of many buffers is read whole, and again from the start', () => {
  const { path, fd } = temporary('/dev/shm')
  const names = Array.from({ length: 3000 }, (_, i) => `${i}-${'x'.repeat(i % 200)}`)
  for (const name of names) writeFileSync(`${path}/${name}`, '')
  expect([...list(fd).keys()].sort()).toEqual([...names].sort())
  expect(list(fd).size).toBe(3000)
})

test('a callback may read other directories, and an error in it leaves the next reading whole', () => {
  const { path, fd } = temporary()
  for (const name of ['a', 'b', 'c']) {
    mkdirSync(`${path}/${name}`)
    writeFileSync(`${path}/${name}/inside-${name}`, '')
  }
  const found: string[] = []
  readDirents(fd, (name) => {
    withFd(openat(fd, name, O_RDONLY | O_DIRECTORY), (inner) => {
      readDirents(inner, (deeper) => found.push(`${name}/${deeper}`))
    })
  })
  expect(found.sort()).toEqual(['a/inside-a', 'b/inside-b', 'c/inside-c'])
  expect(() =>
    readDirents(fd, () => {
      throw new Error('stop')
    }),
  ).toThrow('stop')
  expect(list(fd).size).toBe(3)
})

test('a callback that gives back false ends the reading, and the next one begins at the start', () => {
  const { path, fd } = temporary()
  for (const name of ['a', 'b', 'c']) writeFileSync(`${path}/${name}`, '')
  let count = 0
  readDirents(fd, () => ++count < 2)
  expect(count).toBe(2)
  expect(list(fd).size).toBe(3)
})

test('reading a file as a directory is ENOTDIR', () => {
  const { path, fd } = temporary()
  writeFileSync(`${path}/f`, '')
  withFd(openat(fd, 'f' as ByteString, O_RDONLY), (file) => {
    expect(() => list(file)).toThrowError(expect.objectContaining({ code: 'ENOTDIR', syscall: 'getdents64' }))
  })
})
