import { execFileSync } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, readlinkSync, symlinkSync, writeFileSync } from 'node:fs'
import { describe, expect, onTestFinished, test } from 'vitest'
import { temporary } from '../../../test/posix/temporary.ts'
import type { ByteString } from './bytes.ts'
import { PosixError } from './errors.ts'
import { makeDirectory, makeSymlink, removeDirectory } from './links.ts'
import { allocate, memoryOver, setSyscallHook } from './native.ts'
import {
  close,
  duplicate,
  O_CREAT,
  O_DIRECTORY,
  O_NOFOLLOW,
  O_PATH,
  O_RDONLY,
  O_RDWR,
  openat,
  openBeneath,
  openInRoot,
  openRoot,
  readAt,
  readInto,
  readShared,
  readTextAt,
  SHARED_BYTES,
  truncate,
  withFd,
  writeAt,
  writeFrom,
} from './open.ts'
import { statFd } from './stat.ts'

const name = (text: string) => text as ByteString
const code = (errno: string) => expect.objectContaining({ code: errno })

describe('openBeneath', () => {
  test('an ordinary path is opened, and the empty one is the directory again', () => {
    const { path, fd } = temporary()
    mkdirSync(`${path}/a/b`, { recursive: true })
    writeFileSync(`${path}/a/b/f`, 'content')
    withFd(openBeneath(fd, name('a/b/f'), O_RDONLY), (file) => expect(readAt(file, 0, 99).toString()).toBe('content'))
    withFd(openBeneath(fd, '', O_RDONLY), (again) => expect(statFd(again).ino).toBe(statFd(fd).ino))
  })

  test('a symlink is refused as first, middle and last component, also one that stays inside', () => {
    const { path, fd } = temporary()
    mkdirSync(`${path}/real/sub`, { recursive: true })
    writeFileSync(`${path}/real/sub/f`, '')
    symlinkSync('real', `${path}/link`)
    symlinkSync('sub', `${path}/real/link`)
    symlinkSync('f', `${path}/real/sub/link`)
    for (const hostile of ['link/sub/f', 'real/link/f', 'real/sub/link']) {
      expect(() => openBeneath(fd, name(hostile), O_RDONLY), hostile).toThrowError(code('ELOOP'))
    }
    expect(() => openBeneath(fd, name('link'), O_PATH | O_DIRECTORY)).toThrowError(code('ELOOP'))
    withFd(openBeneath(fd, name('link'), O_PATH | O_NOFOLLOW), (link) => expect(statFd(link).type).toBe(0o120000))
  })

  test('..-escape, absolute path and magic link are refused', () => {
    const { path, fd } = temporary()
    mkdirSync(`${path}/d`)
    for (const hostile of ['..', 'd/../..', '/etc/passwd', '../../../etc/passwd']) {
      expect(() => openBeneath(fd, name(hostile), O_RDONLY), hostile).toThrowError(code('EXDEV'))
    }
    withFd(openRoot('/proc/self' as never), (proc) => {
      expect(() => openBeneath(proc, name('root/etc/passwd'), O_RDONLY)).toThrowError(code('ELOOP'))
      expect(() => openBeneath(proc, name(`fd/${fd}`), O_RDONLY)).toThrowError(code('ELOOP'))
    })
  })

  test('another mount beneath the directory is not entered', () => {
    withFd(openRoot('/' as never), (root) => {
      expect(() => openBeneath(root, name('proc/version'), O_RDONLY)).toThrowError(code('EXDEV'))
    })
  })

  test('a file deeper than PATH_MAX is made, read and found by find', () => {
    const { path, fd } = temporary()
    const component = 'n'.repeat(200)
    let at = duplicate(fd)
    for (let depth = 0; depth < 45; depth++) {
      makeDirectory(at, name(component), 0o700)
      const next = openat(at, name(component), O_PATH | O_DIRECTORY | O_NOFOLLOW)
      close(at)
      at = next
    }
    close(at)
    const deep = name(`${`${component}/`.repeat(45)}leaf`)
    expect(deep.length).toBeGreaterThan(9000)
    withFd(openBeneath(fd, deep, O_CREAT | O_RDWR, 0o600), (file) => writeAt(file, 0, Buffer.from('deep')))
    withFd(openBeneath(fd, deep, O_RDONLY), (file) => expect(readAt(file, 0, 99).toString()).toBe('deep'))
    expect(execFileSync('find', [path, '-name', 'leaf', '-printf', '%s']).toString()).toBe('4')
    const linked = deep.split('/')
    withFd(openBeneath(fd, name(linked.slice(0, 20).join('/')), O_RDONLY), (half) => {
      makeSymlink(name(component), half, name('side'))
    })
    linked[20] = 'side'
    expect(() => openBeneath(fd, name(linked.join('/')), O_RDONLY)).toThrowError(code('ELOOP'))
  })

  test('no fd is left open, also after a failure half way down', () => {
    const { fd } = temporary()
    const count = () => withFd(openRoot('/proc/self/fd' as never), (list) => statFd(list).sizeBytes)
    const before = count()
    for (let i = 0; i < 20; i++) {
      expect(() => openBeneath(fd, name(`${'d/'.repeat(4000)}f`), O_RDONLY)).toThrow(PosixError)
    }
    expect(count()).toBe(before)
  })
})

describe('openInRoot', () => {
  test('absolute symlinks and .. stay in that root', () => {
    const { path, fd } = temporary()
    mkdirSync(`${path}/etc`)
    writeFileSync(`${path}/etc/passwd`, 'mine')
    symlinkSync('/etc/passwd', `${path}/link`)
    for (const way of ['/link', '../../link', '/../etc/passwd']) {
      withFd(openInRoot(fd, name(way), O_RDONLY), (file) => expect(readAt(file, 0, 9).toString()).toBe('mine'))
    }
  })
})

describe('names', () => {
  test.each(['\xff\xfe', 'new\nline', 'back\\slash', 'n'.repeat(255), ' ', '-rf'])('%j is an ordinary name', (odd) => {
    const { path, fd } = temporary()
    withFd(openat(fd, name(odd), O_CREAT | O_RDWR, 0o600), (file) => writeAt(file, 0, Buffer.from('x')))
    const onDisk = Buffer.concat([Buffer.from(`${path}/`), Buffer.from(odd, 'latin1')])
    expect(readFileSync(onDisk, 'utf8')).toBe('x')
  })

  test('a name with NUL, and one longer than PATH_MAX, never reach the kernel', () => {
    const { fd } = temporary()
    expect(() => openat(fd, name('a\0b'), O_RDONLY)).toThrowError(code('EINVAL'))
    expect(() => openat(fd, name('a/'.repeat(3000)), O_RDONLY)).toThrowError(code('ENAMETOOLONG'))
  })

  test('an error carries errno name, system call, path and hint', () => {
    const { path, fd } = temporary()
    symlinkSync('nowhere', `${path}/l`)
    expect(() => openBeneath(fd, name('l'), O_RDONLY)).toThrowError(
      expect.objectContaining({
        code: 'ELOOP',
        syscall: 'openat2',
        path: 'l',
        hint: expect.stringContaining('symlink'),
      }),
    )
  })
})

describe('reading and writing', () => {
  test('more than one buffer is written and read back, from any offset', () => {
    const { fd } = temporary()
    const content = Buffer.alloc(200_001, 'lsync ')
    withFd(openat(fd, name('f'), O_CREAT | O_RDWR, 0o600), (file) => {
      writeAt(file, 3, content)
      expect(readAt(file, 3, 1 << 20).equals(content)).toBe(true)
      expect(readAt(file, 100_000, 5)).toEqual(content.subarray(99_997, 100_002))
      const text = Buffer.from('ä'.repeat(50_000))
      writeAt(file, 7, text)
      for (const length of [0, 2, 65_536, 100_000]) {
        expect(readTextAt(file, 7, length)).toBe(text.toString('utf8', 0, length))
      }
      expect(readTextAt(file, 200_000, 9)).toBe(content.toString('utf8', 199_997))
      expect(readAt(file, 1 << 21, 5)).toHaveLength(0)
      truncate(file, 10)
      expect(readAt(file, 0, 99)).toHaveLength(10)
    })
  })

  test('every fd is close-on-exec', () => {
    const { fd } = temporary()
    const copy = duplicate(fd)
    onTestFinished(() => close(copy))
    for (const open of [fd, copy]) {
      expect(readFileSync(`/proc/self/fdinfo/${open}`, 'utf8')).toMatch(/flags:\s+02\d{6}/)
    }
    expect(readlinkSync(`/proc/self/fd/${copy}`)).toBe(readlinkSync(`/proc/self/fd/${fd}`))
  })
})

describe('the system call hook', () => {
  test('it sees every changing call with its path, and may fail it before it happens', () => {
    const { path, fd } = temporary()
    const seen: string[] = []
    onTestFinished(() => setSyscallHook(undefined))
    setSyscallHook((syscall, about) => {
      seen.push(`${syscall} ${about}`)
      if (syscall === 'rmdir') throw new PosixError('EIO', { syscall, path: about })
    })
    makeDirectory(fd, name('d'), 0o700)
    expect(() => removeDirectory(fd, name('d'))).toThrowError(code('EIO'))
    setSyscallHook(undefined)
    expect(seen).toEqual(['mkdirat d', 'rmdir d'])
    expect(existsSync(`${path}/d`)).toBe(true)
    expect(removeDirectory(fd, name('d'))).toBe(true)
  })
})

describe('readInto', () => {
  test('the bytes arrive in place, up to the end of the file, and nothing else is touched', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, 'abcdef')
    withFd(openBeneath(fd, name('f'), O_RDONLY), (file) => {
      const memory = allocate(10)
      expect(readInto(file, 2, memory, 1, 8)).toBe(4)
      expect(memory.buffer.toString('latin1')).toBe('\0cdef\0\0\0\0\0')
      expect(() => readInto(file, 0, memory, 5, 6)).toThrow(RangeError)
    })
  })

  test('shared memory can be read into', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, 'abcdef')
    const shared = new SharedArrayBuffer(8)
    withFd(openBeneath(fd, name('f'), O_RDONLY), (file) => {
      expect(readInto(file, 0, memoryOver(shared), 2, 6)).toBe(6)
      expect(Buffer.from(shared).toString('latin1')).toBe('\0\0abcdef')
    })
  })
})

test('writeFrom writes the part of the memory that it is told, and nothing beyond its end', () => {
  const { path, fd } = temporary()
  writeFileSync(`${path}/f`, '......')
  withFd(openBeneath(fd, name('f'), O_RDWR), (file) => {
    const memory = allocate(6)
    memory.buffer.write('abcdef')
    writeFrom(file, 1, memory, 2, 3)
    expect(readFileSync(`${path}/f`, 'utf8')).toBe('.cde..')
    expect(() => writeFrom(file, 0, memory, 4, 3)).toThrow(RangeError)
  })
})

describe('readShared', () => {
  test('what it reads is written as it is, whole or in part, and never beyond the end', () => {
    const { path, fd } = temporary()
    const content = Buffer.alloc(SHARED_BYTES, 'lsync ').fill('!', SHARED_BYTES - 1)
    writeFileSync(`${path}/from`, content)
    withFd(openat(fd, name('from'), O_RDONLY), (from) =>
      withFd(openat(fd, name('to'), O_RDWR | O_CREAT, 0o600), (to) => {
        const bytes = readShared(from, 0, SHARED_BYTES)
        expect(bytes.equals(content)).toBe(true)
        writeAt(to, 0, bytes)
        expect(readFileSync(`${path}/to`).equals(content)).toBe(true)
        writeAt(to, 3, readShared(from, 0, 100).subarray(10, 20))
        expect(readFileSync(`${path}/to`).toString('latin1', 0, 15)).toBe(`lsy${content.toString('latin1', 10, 20)}sy`)
        expect(readShared(from, SHARED_BYTES - 4, 100).toString()).toBe(content.toString('latin1', SHARED_BYTES - 4))
        expect(readShared(from, SHARED_BYTES, 100).length).toBe(0)
      }),
    )
    withFd(openat(fd, name('from'), O_RDONLY), (from) =>
      expect(() => readShared(from, 0, SHARED_BYTES + 1)).toThrow(RangeError),
    )
  })
})
