import { execFileSync } from 'node:child_process'
import { linkSync, mkdirSync, symlinkSync, truncateSync, utimesSync, writeFileSync } from 'node:fs'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { temporary } from '../../../test/posix/temporary.ts'
import type { ByteString } from './bytes.ts'
import { setTimes } from './metadata.ts'
import { O_PATH, openat, withFd } from './open.ts'
import { makeDevice, type Stat, statAt, statFd, tryStatAt } from './stat.ts'

const name = (text: string) => text as ByteString

function statOf(path: string, format: string): string {
  return execFileSync('stat', ['-c', format, path]).toString().trim()
}

function show({ mode, nlink, uid, gid, ino, sizeBytes, blocks }: Stat): string {
  return [mode.toString(16), nlink, uid, gid, ino, sizeBytes, blocks].join(' ')
}

function seconds(timeNs: bigint): string {
  const whole = timeNs / 1_000_000_000n - (timeNs % 1_000_000_000n < 0n ? 1n : 0n)
  const rest = timeNs - whole * 1_000_000_000n
  return `${whole} ${rest.toString().padStart(9, '0')}`
}

describe('statAt', () => {
  test('file, directory, symlink, fifo and hard link are what stat(1) says', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/file`, 'content', { mode: 0o640 })
    linkSync(`${path}/file`, `${path}/other`)
    truncateSync(`${path}/file`, 5_000_000_000)
    mkdirSync(`${path}/directory`)
    symlinkSync('nowhere', `${path}/link`)
    execFileSync('mkfifo', [`${path}/fifo`])
    for (const entry of ['file', 'other', 'directory', 'link', 'fifo']) {
      const stat = statAt(fd, name(entry))
      expect(show(stat), entry).toBe(statOf(`${path}/${entry}`, '%f %h %u %g %i %s %b'))
      const times = [stat.atimeNs, stat.mtimeNs, stat.ctimeNs].map((time) => seconds(time).replace(' ', '.'))
      expect(times.join(' '), entry).toBe(statOf(`${path}/${entry}`, '%.9X %.9Y %.9Z'))
      withFd(openat(fd, name(entry), O_PATH | 0o400000), (file) => expect(show(statFd(file))).toBe(show(stat)))
    }
  })

  test('an absent name is undefined, or ENOENT when it must be there', () => {
    const { fd } = temporary()
    expect(tryStatAt(fd, name('none'))).toBeUndefined()
    expect(() => statAt(fd, name('none'))).toThrowError(expect.objectContaining({ code: 'ENOENT', path: 'none' }))
    expect(() => tryStatAt(fd, name('n'.repeat(256)))).toThrowError(expect.objectContaining({ code: 'ENAMETOOLONG' }))
  })

  test('a mount root is known as such, and its mount id is that of mountinfo', () => {
    withFd(openat(-100, name('/proc'), O_PATH), (proc) => {
      expect(statFd(proc).isMountRoot).toBe(true)
      const ids = execFileSync('sh', ['-c', 'awk \'$5=="/proc"{print $1}\' /proc/self/mountinfo']).toString()
      expect(ids.trim().split('\n')).toContain(String(statFd(proc).mountId))
    })
    expect(statFd(temporary().fd).isMountRoot).toBe(false)
  })
})

describe('times', () => {
  test.each([
    ['before 1970', -1_234_567_890_123_456_789n],
    ['one nanosecond before 1970', -1n],
    ['1970', 0n],
    ['after 2038', (1n << 31n) * 1_000_000_000n + 987_654_321n],
    ['after 2106', (1n << 33n) * 1_000_000_000n + 1n],
  ])('a time %s is kept to the nanosecond, as stat(1) sees it', (_, timeNs) => {
    // tmpfs holds every time; ext4 ends in 1901 and 2446.
    const { path, fd } = temporary('/dev/shm')
    writeFileSync(`${path}/f`, '')
    setTimes(fd, name('f'), timeNs, timeNs)
    expect(statAt(fd, name('f')).mtimeNs).toBe(timeNs)
    expect(statAt(fd, name('f')).atimeNs).toBe(timeNs)
    if (timeNs >= 0n) expect(statOf(`${path}/f`, '%.9Y')).toBe(seconds(timeNs).replace(' ', '.'))
  })

  test('any time comes back exactly', () => {
    const { path, fd } = temporary('/dev/shm')
    writeFileSync(`${path}/f`, '')
    const anyTime = fc.bigInt({ min: -(1n << 62n), max: 1n << 62n })
    fc.assert(
      fc.property(anyTime, anyTime, (atimeNs, mtimeNs) => {
        setTimes(fd, name('f'), atimeNs, mtimeNs)
        const stat = statAt(fd, name('f'))
        expect([stat.atimeNs, stat.mtimeNs]).toEqual([atimeNs, mtimeNs])
      }),
    )
  })

  test('the time that Node sets is the time read', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, '')
    utimesSync(`${path}/f`, 1_000_000_000.5, 2)
    const stat = statAt(fd, name('f'))
    expect([stat.atimeNs, stat.mtimeNs]).toEqual([1_000_000_000_500_000_000n, 2_000_000_000n])
  })
})

test('makeDevice packs major and minor as stat(1) shows them for devices here', () => {
  for (const device of ['null', 'zero', 'tty', 'full']) {
    const [major, minor] = statOf(`/dev/${device}`, '%t %T').split(' ')
    const expected = makeDevice(Number.parseInt(major as string, 16), Number.parseInt(minor as string, 16))
    expect(statAt(-100, name(`/dev/${device}`)).rdev).toBe(expected)
  }
  // glibc's makedev, by hand
  expect(makeDevice(0xabc, 0x12345)).toBe(0x123abc45)
  expect(makeDevice(0xfff, 0xfffff)).toBe(0xffffffff)
  expect(makeDevice(0xabcde, 0x12345678)).toBe(0xab123456cde78)
})
