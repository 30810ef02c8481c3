import { execFileSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { temporary } from '../../../test/posix/temporary.ts'
import type { ByteString } from './bytes.ts'
import { copyData, nextData, punchHole, tryClone } from './copy.ts'
import { O_CREAT, O_RDONLY, O_RDWR, O_TRUNC, openat, readAt, truncate, withFd, writeAt } from './open.ts'
import { statFd } from './stat.ts'

const name = (text: string) => text as ByteString

function extents(fd: number): string[] {
  const found: string[] = []
  for (let at = 0; ; ) {
    const data = nextData(fd, at)
    if (data === undefined) return found
    found.push(`${data.start}-${data.end}`)
    at = data.end
  }
}

function copyFile(dirfd: number, from: string, to: string, reflink = true): void {
  withFd(openat(dirfd, name(from), O_RDONLY), (source) =>
    withFd(openat(dirfd, name(to), O_CREAT | O_TRUNC | O_RDWR, 0o600), (target) => {
      const { sizeBytes } = statFd(source)
      expect(copyData(source, target, sizeBytes, to, reflink)).toBe(sizeBytes)
    }),
  )
}

describe.each(['/dev/shm', '/tmp'])('copyData in %s', (base) => {
  test('content, size and holes of the copy are those of the original', () => {
    const { path, fd } = temporary(base)
    const BLOCK = 4096
    const anyExtents = fc.array(fc.tuple(fc.nat(100), fc.integer({ min: 1, max: 5 })), { maxLength: 6 })
    fc.assert(
      fc.property(anyExtents, fc.nat(120 * BLOCK), (pieces, sizeBytes) => {
        withFd(openat(fd, name('from'), O_CREAT | O_TRUNC | O_RDWR, 0o600), (file) => {
          for (const [block, count] of pieces) writeAt(file, block * BLOCK, Buffer.alloc(count * BLOCK, block + 1))
          truncate(file, sizeBytes)
        })
        copyFile(fd, 'from', 'to', false)
        const [from, to] = ['from', 'to'].map((file) => openat(fd, name(file), O_RDONLY)) as [number, number]
        withFd(from, () => withFd(to, () => expect(extents(to)).toEqual(extents(from))))
        execFileSync('cmp', [`${path}/from`, `${path}/to`])
      }),
      { numRuns: 30 },
    )
  })

  test('a terabyte of hole costs no space, and its ends are kept', () => {
    const { path, fd } = temporary(base)
    withFd(openat(fd, name('from'), O_CREAT | O_RDWR, 0o600), (file) => {
      writeAt(file, 0, Buffer.from('start'))
      writeAt(file, 1 << 30, Buffer.from('middle'))
      truncate(file, 2 ** 40)
    })
    copyFile(fd, 'from', 'to')
    withFd(openat(fd, name('to'), O_RDONLY), (file) => {
      expect(statFd(file).sizeBytes).toBe(2 ** 40)
      expect(readAt(file, 1 << 30, 6).toString()).toBe('middle')
      expect(extents(file)).toEqual([`0-4096`, `${1 << 30}-${(1 << 30) + 4096}`])
    })
    expect(
      Number(
        execFileSync('du', ['-k', `${path}/to`])
          .toString()
          .split('\t')[0],
      ),
    ).toBeLessThan(100)
  })

  test('a file that shrank since its size was read gets that size, the rest a hole', () => {
    const { path, fd } = temporary(base)
    writeFileSync(`${path}/from`, 'short')
    withFd(openat(fd, name('from'), O_RDONLY), (source) =>
      withFd(openat(fd, name('to'), O_CREAT | O_RDWR, 0o600), (target) => {
        copyData(source, target, 1_000_000, '', false)
        expect(statFd(target).sizeBytes).toBe(1_000_000)
        expect(readAt(target, 0, 6).toString()).toBe('short\0')
      }),
    )
  })
})

test('from one file system to another, and from a file without holes to seek, the bytes arrive', () => {
  const [here, there] = [temporary('/tmp'), temporary('/dev/shm')]
  const content = Buffer.alloc(700_001, 'lsync ')
  writeFileSync(`${here.path}/f`, content)
  withFd(openat(here.fd, name('f'), O_RDONLY), (source) =>
    withFd(openat(there.fd, name('f'), O_CREAT | O_RDWR, 0o600), (target) => {
      expect(tryClone(source, target)).toBe(false)
      copyData(source, target, content.length)
      expect(readAt(target, 0, 1 << 20).equals(content)).toBe(true)
    }),
  )
})

test('an empty file is copied without a call', () => {
  expect(copyData(-1, -1, 0)).toBe(0)
})

test.each(['/dev/shm', '/tmp'])(
  'a punched hole reads as zeros and holds no data, and the size stays, in %s',
  (base) => {
    const { fd } = temporary(base)
    withFd(openat(fd, name('punched'), O_CREAT | O_TRUNC | O_RDWR, 0o600), (file) => {
      writeAt(file, 0, Buffer.alloc(3 * 65_536, 1))
      punchHole(file, 65_536, 65_536)
      expect(extents(file)).toEqual(['0-65536', '131072-196608'])
      expect(readAt(file, 65_535, 65_538)).toEqual(Buffer.concat([Buffer.of(1), Buffer.alloc(65_536), Buffer.of(1)]))
      expect(statFd(file).sizeBytes).toBe(3 * 65_536)
    })
  },
)
