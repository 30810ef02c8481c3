import { execFileSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { afterEach, describe, expect, test } from 'vitest'
import {
  attachMount,
  type ByteString,
  bindMount,
  close,
  createOverlay,
  type HostPath,
  hostPath,
  type MountWay,
  mountFileSystem,
  mountOverlay,
  mountsBeneath,
  O_DIRECTORY,
  O_PATH,
  O_RDONLY,
  openat,
  openRoot,
  overlayLayers,
  readAt,
  readMountInfo,
  setMountAttributes,
  unmount,
  useMountWay,
  withFd,
} from '../../packages/posix/src/index.ts'
import { mayMount } from './privileges.ts'
import { temporary } from './temporary.ts'

const WAYS: MountWay[] = ['fd', 'string', 'mount(2)']
const HOSTILE = [' ', ',', ':', '\\', '\\:', '\\,', 'a\\', '\n', '\t', '\xff\xfe', '#', '\\054', 'a\'"$', '::', '=,=']

afterEach(() => useMountWay(undefined))

/** A lower, a second lower, an upper and a work directory beneath a directory of any name. */
function layers(path: string, odd = 'plain') {
  const base = Buffer.from(`${path}/${odd}`, 'latin1')
  const make = (name: string) => {
    const at = Buffer.concat([base, Buffer.from(`/${name}`)])
    mkdirSync(at, { recursive: true })
    return at
  }
  const [lower, second, upper, work] = ['lower', 'second', 'upper', 'work'].map(make) as [
    Buffer,
    Buffer,
    Buffer,
    Buffer,
  ]
  writeFileSync(Buffer.concat([lower, Buffer.from('/low')]), 'low')
  writeFileSync(Buffer.concat([second, Buffer.from('/deep')]), 'deep')
  mkdirSync(`${path}/merged`, { recursive: true })
  const host = (at: Buffer) => at.toString('latin1') as HostPath
  return {
    stack: { lowers: [host(lower), host(second)], upper: host(upper), work: host(work) },
    upper,
    merged: `${path}/merged`,
  }
}

function mounted<T>(target: string, use: () => T): T {
  try {
    return use()
  } finally {
    unmount(hostPath(target))
  }
}

describe.skipIf(!mayMount)('mountOverlay', () => {
  describe.each(WAYS)('by %s', (way) => {
    test.each(HOSTILE)('layers in a directory named %j are mounted, and mountinfo gives their paths back', (odd) => {
      const { path } = temporary()
      const { stack, upper, merged } = layers(path, odd)
      useMountWay(way)
      expect(mountOverlay(stack, hostPath(merged))).toBe(way)
      mounted(merged, () => {
        expect(readdirSync(merged).sort()).toEqual(['deep', 'low'])
        writeFileSync(`${merged}/new`, 'new')
        expect(readFileSync(Buffer.concat([upper, Buffer.from('/new')]), 'utf8')).toBe('new')
        const mount = readMountInfo().find(({ target }) => target === merged)
        const found = overlayLayers(mount as NonNullable<typeof mount>)
        expect(found.filter(({ role }) => role === 'lower').map(({ paths }) => paths[0])).toEqual(stack.lowers)
        // Upper and work have two readings, of which the line does not say which is meant.
        expect(found.find(({ role }) => role === 'upper')?.paths).toContain(stack.upper)
        expect(found.find(({ role }) => role === 'work')?.paths).toContain(stack.work)
      })
    })

    test('options reach the kernel', () => {
      const { path } = temporary()
      const { stack, upper, merged } = layers(path)
      useMountWay(way)
      mountOverlay({ ...stack, options: { userxattr: true, nosuid: true } }, hostPath(merged))
      mounted(merged, () => {
        execFileSync('sh', ['-c', `rm ${merged}/low && mkdir ${merged}/low`])
        const marks = execFileSync('getfattr', ['-d', '-m', '^user', `${upper}/low`, '--absolute-names']).toString()
        expect(marks).toContain('user.overlay.opaque="y"')
        const mount = readMountInfo().find(({ target }) => target === merged)
        expect(mount?.options).toContain('nosuid')
      })
    })

    test('a read-only overlay takes no writes', () => {
      const { path } = temporary()
      const { stack, merged } = layers(path)
      useMountWay(way)
      mountOverlay({ ...stack, readOnly: true }, hostPath(merged))
      mounted(merged, () => expect(() => writeFileSync(`${merged}/x`, '')).toThrow('EROFS'))
    })
  })

  test('100 lowers of 250 bytes each, far more than a page of options, are all there', () => {
    const { path } = temporary('/dev/shm')
    const lowers = Array.from({ length: 100 }, (_, i) => {
      const lower = `${path}/${'n'.repeat(220)}${i}`
      mkdirSync(lower)
      writeFileSync(`${lower}/f${i}`, '')
      return hostPath(lower)
    })
    mkdirSync(`${path}/merged`)
    for (const way of ['fd', 'string'] as const) {
      useMountWay(way)
      mountOverlay({ lowers }, hostPath(`${path}/merged`))
      mounted(`${path}/merged`, () => expect(readdirSync(`${path}/merged`)).toHaveLength(100))
    }
    useMountWay('mount(2)')
    expect(() => mountOverlay({ lowers }, hostPath(`${path}/merged`))).toThrowError(
      expect.objectContaining({ code: 'ENAMETOOLONG' }),
    )
  })

  test('layers may be fds, and only one deeper than PATH_MAX is refused by the kernel', () => {
    const { path, fd } = temporary('/dev/shm')
    const { merged } = layers(path)
    let at = openat(fd, '.' as ByteString, O_PATH | O_DIRECTORY)
    for (let depth = 0; depth < 25; depth++) {
      const parent = `/proc/self/fd/${at}/${'d'.repeat(200)}`
      mkdirSync(parent)
      const next = openRoot(hostPath(parent), O_PATH)
      close(at)
      at = next
    }
    try {
      withFd(openRoot(hostPath(`${path}/plain/second`), O_PATH), (second) => {
        mountOverlay({ lowers: [second, hostPath(`${path}/plain/lower`)] }, hostPath(merged))
        mounted(merged, () => expect(readdirSync(merged).sort()).toEqual(['deep', 'low']))
        expect(() => mountOverlay({ lowers: [at, second] }, hostPath(merged))).toThrowError(
          expect.objectContaining({ code: 'ENAMETOOLONG' }),
        )
      })
    } finally {
      close(at)
    }
  })

  test('an error holds what the kernel said, and nothing stays mounted', () => {
    const { path } = temporary()
    const { stack, merged } = layers(path)
    expect(() => mountOverlay({ ...stack, options: { nonsense: 'on' } }, hostPath(merged))).toThrowError(
      expect.objectContaining({ code: 'EINVAL', message: expect.stringContaining("Unknown parameter 'nonsense'") }),
    )
    const [lower] = stack.lowers
    expect(() => mountOverlay({ lowers: [lower as HostPath, lower as HostPath] }, hostPath(merged))).toThrowError(
      expect.objectContaining({ code: 'ELOOP', hint: expect.stringContaining('each layer once') }),
    )
    expect(() => mountOverlay({ lowers: [hostPath('/none')] }, hostPath(merged))).toThrowError(
      expect.objectContaining({ code: 'ENOENT', path: '/none' }),
    )
    expect(mountsBeneath(hostPath(path))).toEqual([])
  })

  test('text never stands for a directory that is mounted nowhere', () => {
    const { path } = temporary()
    const { stack, merged } = layers(path)
    const detached = createOverlay({ lowers: stack.lowers })
    withFd(detached, () => {
      useMountWay('string')
      // Its path would be `/`, which is another directory.
      expect(() => mountOverlay({ lowers: [detached, ...stack.lowers] }, hostPath(merged))).toThrowError(
        expect.objectContaining({ code: 'ESTALE' }),
      )
    })
  })
})

describe.skipIf(!mayMount)('mounts', () => {
  test('a detached overlay is used by its fd alone, and attached later', () => {
    const { path } = temporary()
    const { stack, upper, merged } = layers(path)
    withFd(createOverlay(stack), (detached) => {
      expect(mountsBeneath(hostPath(path))).toEqual([])
      withFd(openat(detached, 'low' as ByteString, O_RDONLY), (f) => expect(readAt(f, 0, 9).toString()).toBe('low'))
      writeFileSync(`/proc/self/fd/${detached}/new`, '')
      expect(existsSync(`${upper}/new`)).toBe(true)
      attachMount(detached, hostPath(merged))
    })
    mounted(merged, () => expect(readdirSync(merged).sort()).toEqual(['deep', 'low', 'new']))
  })

  test('a tmpfs is mounted with its options, and mountsBeneath sees it', () => {
    const { path } = temporary()
    mkdirSync(`${path}/m`)
    mountFileSystem('tmpfs', hostPath('mine'), hostPath(`${path}/m`), { size: '64k', noexec: true, mode: '711' })
    mounted(`${path}/m`, () => {
      const [mount, ...others] = mountsBeneath(hostPath(path))
      expect(mount).toMatchObject({ type: 'tmpfs', source: 'mine', target: `${path}/m` })
      expect(mount?.options).toContain('noexec')
      expect(others).toEqual([])
      expect(
        execFileSync('stat', ['-c', '%a', `${path}/m`])
          .toString()
          .trim(),
      ).toBe('711')
    })
    expect(() => mountFileSystem('nonsense', undefined, hostPath(`${path}/m`))).toThrowError(
      expect.objectContaining({ code: 'ENODEV' }),
    )
  })

  test('a bind mount shows the same files, read-only if asked, and recursive if asked', () => {
    const { path } = temporary()
    for (const name of ['a/sub', 'b']) mkdirSync(`${path}/${name}`, { recursive: true })
    writeFileSync(`${path}/a/f`, 'f')
    mountFileSystem('tmpfs', undefined, hostPath(`${path}/a/sub`))
    mounted(`${path}/a/sub`, () => {
      writeFileSync(`${path}/a/sub/inside`, '')
      bindMount(hostPath(`${path}/a`), hostPath(`${path}/b`), { readOnly: true })
      mounted(`${path}/b`, () => {
        expect(readFileSync(`${path}/b/f`, 'utf8')).toBe('f')
        expect(readdirSync(`${path}/b/sub`)).toEqual([])
        expect(() => writeFileSync(`${path}/b/f`, '')).toThrow('EROFS')
        setMountAttributes(hostPath(`${path}/b`), { clear: ['ro'], propagation: 'private' })
        writeFileSync(`${path}/b/f`, 'g')
      })
      bindMount(hostPath(`${path}/a`), hostPath(`${path}/b`), { recursive: true, readOnly: true })
      try {
        expect(readdirSync(`${path}/b/sub`)).toEqual(['inside'])
        expect(() => writeFileSync(`${path}/b/sub/x`, '')).toThrow('EROFS')
      } finally {
        unmount(hostPath(`${path}/b`), { lazy: true })
      }
    })
  })

  test('a busy mount is unmounted lazily only, and what is not mounted not at all', () => {
    const { path } = temporary()
    mkdirSync(`${path}/m`)
    mountFileSystem('tmpfs', undefined, hostPath(`${path}/m`))
    withFd(openRoot(hostPath(`${path}/m`)), () => {
      expect(() => unmount(hostPath(`${path}/m`))).toThrowError(expect.objectContaining({ code: 'EBUSY' }))
      unmount(hostPath(`${path}/m`), { lazy: true })
    })
    expect(() => unmount(hostPath(`${path}/m`))).toThrowError(expect.objectContaining({ code: 'EINVAL' }))
  })
})
