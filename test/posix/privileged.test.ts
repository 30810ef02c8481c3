import { execFileSync } from 'node:child_process'
import {
  linkSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import {
  type ByteString,
  copyData,
  createSubvolume,
  deleteSubvolume,
  FS_IMMUTABLE_FL,
  getInodeFlags,
  getXattr,
  handleAt,
  handleKey,
  hostPath,
  isSubvolume,
  listXattrs,
  makeDevice,
  makeNode,
  O_CREAT,
  O_PATH,
  O_RDONLY,
  O_RDWR,
  openat,
  openBeneath,
  openByHandle,
  openRoot,
  RENAME_WHITEOUT,
  readAt,
  rename,
  S_IFBLK,
  S_IFCHR,
  setInodeFlags,
  setOwner,
  setTimes,
  setXattr,
  snapshotSubvolume,
  statAt,
  statFd,
  tryClone,
  unlink,
  useXattrAtCalls,
  withFd,
} from '../../packages/posix/src/index.ts'
import { useFileSystem, withFileSystem } from '../support/image.ts'
import { mount, run, unmount } from '../support/system.ts'
import { mayMount } from './privileges.ts'
import { temporary } from './temporary.ts'

const name = (text: string) => text as ByteString

describe.skipIf(!mayMount).each([true, false])('trusted attributes, by the newer calls: %s', (use) => {
  beforeEach(() => useXattrAtCalls(use))
  afterEach(() => useXattrAtCalls(undefined))

  test('they are those of getfattr, on a file, a directory and a symlink itself', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, '')
    mkdirSync(`${path}/d`)
    symlinkSync('f', `${path}/l`)
    for (const entry of ['f', 'd', 'l']) {
      setXattr(fd, name(entry), name('trusted.overlay.opaque'), Buffer.from('y'))
      const shown = execFileSync('getfattr', ['-h', '-d', '-m', '^trusted', '--absolute-names', `${path}/${entry}`])
      expect(shown.toString()).toContain('trusted.overlay.opaque="y"')
      execFileSync('setfattr', ['-h', '-n', 'trusted.other', '-v', '0x0001', `${path}/${entry}`])
      expect(getXattr(fd, name(entry), name('trusted.other'))).toEqual(Buffer.from([0, 1]))
      expect(listXattrs(fd, name(entry)).sort()).toEqual(['trusted.other', 'trusted.overlay.opaque'])
    }
    withFd(openat(fd, name('l'), O_PATH | 0o400000), (link) => {
      expect(listXattrs(link, '').sort()).toEqual(['trusted.other', 'trusted.overlay.opaque'])
    })
  })

  test('file capabilities pass through unchanged', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, '')
    writeFileSync(`${path}/g`, '')
    execFileSync('setcap', ['cap_net_raw+ep', `${path}/f`])
    setXattr(fd, name('g'), name('security.capability'), getXattr(fd, name('f'), name('security.capability')) as Buffer)
    expect(execFileSync('getcap', [`${path}/g`]).toString()).toContain('cap_net_raw=ep')
  })
})

describe.skipIf(!mayMount)('devices and owners', () => {
  test('a whiteout and other devices are what stat(1) says', () => {
    const { path, fd } = temporary()
    makeNode(fd, name('whiteout'), S_IFCHR, 0)
    makeNode(fd, name('block'), S_IFBLK | 0o600, makeDevice(0xabc, 0x12345))
    const shown = execFileSync('stat', ['-c', '%F %t:%T', `${path}/whiteout`, `${path}/block`]).toString()
    expect(shown).toBe('character special file 0:0\nblock special file abc:12345\n')
    expect([statAt(fd, name('whiteout')).isWhiteoutDevice, statAt(fd, name('block')).isWhiteoutDevice]).toEqual([
      true,
      false,
    ])
    expect(statAt(fd, name('block')).rdev).toBe(makeDevice(0xabc, 0x12345))
  })

  test('RENAME_WHITEOUT leaves a whiteout behind', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, 'x')
    rename(fd, name('f'), fd, name('g'), RENAME_WHITEOUT)
    expect(statAt(fd, name('f')).isWhiteoutDevice).toBe(true)
    expect(readFileSync(`${path}/g`, 'utf8')).toBe('x')
  })

  test('an owner is set on a symlink itself, and ids beyond 31 bits are kept', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, '')
    symlinkSync('f', `${path}/l`)
    setOwner(fd, name('l'), 4_000_000_000, 12)
    expect(lstatSync(`${path}/l`)).toMatchObject({ uid: 4_000_000_000, gid: 12 })
    expect(lstatSync(`${path}/f`).uid).toBe(process.getuid?.())
    expect(statAt(fd, name('l')).uid).toBe(4_000_000_000)
  })

  test('an immutable file is known, and cannot be removed until it is not', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, '')
    withFd(openat(fd, name('f'), O_RDONLY), (file) => {
      execFileSync('chattr', ['+i', `${path}/f`])
      try {
        expect(getInodeFlags(file) & FS_IMMUTABLE_FL).toBe(FS_IMMUTABLE_FL)
        expect(() => unlink(fd, name('f'))).toThrowError(
          expect.objectContaining({ code: 'EPERM', hint: expect.stringContaining('lsattr') }),
        )
      } finally {
        setInodeFlags(file, getInodeFlags(file) & ~FS_IMMUTABLE_FL)
      }
    })
    expect(unlink(fd, name('f'))).toBe(true)
  })

  test('a handle opens its file after a rename, and not after its end', () => {
    const { path, fd } = temporary()
    writeFileSync(`${path}/f`, 'content')
    linkSync(`${path}/f`, `${path}/other`)
    const handle = handleAt(fd, name('f')) as NonNullable<ReturnType<typeof handleAt>>
    expect(handleKey(handleAt(fd, name('other')) as typeof handle)).toBe(handleKey(handle))
    renameSync(`${path}/f`, `${path}/g`)
    withFd(openByHandle(fd, handle, O_RDONLY) as number, (f) => expect(readAt(f, 0, 99).toString()).toBe('content'))
    unlink(fd, name('g'))
    unlink(fd, name('other'))
    expect(openByHandle(fd, handle, O_RDONLY)).toBeUndefined()
  })

  test('a mount in the tree is not entered by openBeneath, not even with a bind mount of the same file system', () => {
    const { path, fd } = temporary()
    mkdirSync(`${path}/d/m`, { recursive: true })
    writeFileSync(`${path}/d/f`, '')
    run('mount', '--bind', `${path}/d`, `${path}/d/m`)
    try {
      expect(() => openBeneath(fd, name('d/m/f'), O_RDONLY)).toThrowError(expect.objectContaining({ code: 'EXDEV' }))
      withFd(openBeneath(fd, name('d/f'), O_RDONLY), () => {})
    } finally {
      unmount(`${path}/d/m`)
    }
  })

  test('times beyond what ext4 holds are cut by the kernel, as Stat shows', async () => {
    await withFileSystem('ext4', ({ root }) =>
      withFd(openRoot(hostPath(root)), (fd) => {
        writeFileSync(`${root}/f`, '')
        const old = -(2n ** 31n) * 1_000_000_000n
        setTimes(fd, name('f'), old, old - 1_000_000_000n)
        expect(statAt(fd, name('f')).atimeNs).toBe(old)
        expect(statAt(fd, name('f')).mtimeNs).toBe(old)
        const late = 15_032_385_535n * 1_000_000_000n // 2446, the end of ext4's 34 bits
        setTimes(fd, name('f'), late, late + 1_000_000_000n)
        expect([statAt(fd, name('f')).atimeNs, statAt(fd, name('f')).mtimeNs]).toEqual([late, late])
        expect(
          execFileSync('stat', ['-c', '%Y', `${root}/f`])
            .toString()
            .trim(),
        ).toBe('15032385535')
      }),
    )
  })

  test('an old ext4 without d_type is read with DT_UNKNOWN and never with a wrong type', async () => {
    const { DT_UNKNOWN, readDirents } = await import('../../packages/posix/src/index.ts')
    await withFileSystem('ext4-nodtype', ({ root }) =>
      withFd(openRoot(hostPath(root)), (fd) => {
        writeFileSync(`${root}/f`, '')
        mkdirSync(`${root}/d`)
        const types = new Map<string, number>()
        readDirents(fd, (entry, type) => types.set(entry, type))
        expect([types.get('f'), types.get('d')]).toEqual([DT_UNKNOWN, DT_UNKNOWN])
      }),
    )
  })
})

describe.skipIf(!mayMount)('btrfs', () => {
  const fs = useFileSystem('btrfs')

  test('a snapshot holds what the subvolume held and changes apart from it', () => {
    const root = fs.current.fresh()
    withFd(openRoot(hostPath(root)), (fd) => {
      createSubvolume(fd, name('one'))
      expect(() => createSubvolume(fd, name('one'))).toThrowError(expect.objectContaining({ code: 'EEXIST' }))
      writeFileSync(`${root}/one/f`, 'before')
      withFd(openRoot(hostPath(`${root}/one`)), (source) => {
        expect([isSubvolume(source), isSubvolume(fd)]).toEqual([true, false])
        snapshotSubvolume(source, fd, name('two'))
        snapshotSubvolume(source, fd, name('\xff\n'), true)
      })
      writeFileSync(`${root}/one/f`, 'after')
      expect(readFileSync(`${root}/two/f`, 'utf8')).toBe('before')
      const odd = Buffer.concat([Buffer.from(`${root}/`), Buffer.from('\xff\n/f', 'latin1')])
      expect(readFileSync(odd, 'utf8')).toBe('before')
      expect(() => writeFileSync(odd, '')).toThrow('EROFS')
      expect(run('btrfs', 'subvolume', 'list', fs.current.root).trim().split('\n').length).toBeGreaterThanOrEqual(3)
      for (const subvolume of ['one', 'two', '\xff\n']) deleteSubvolume(fd, name(subvolume))
      expect(readdirSync(root)).toEqual([])
      expect(() => deleteSubvolume(fd, name('one'))).toThrowError(expect.objectContaining({ code: 'ENOENT' }))
    })
  })

  test('a plain directory is no source of a snapshot, and other file systems have no subvolumes', () => {
    const root = fs.current.fresh()
    withFd(openRoot(hostPath(root)), (fd) => {
      expect(() => snapshotSubvolume(fd, fd, name('x'))).toThrowError(expect.objectContaining({ code: 'EINVAL' }))
      expect(() => createSubvolume(fd, name('n'.repeat(256)))).toThrowError(
        expect.objectContaining({ code: 'ENAMETOOLONG' }),
      )
    })
    const { fd } = temporary('/dev/shm')
    expect(() => createSubvolume(fd, name('x'))).toThrowError(expect.objectContaining({ code: 'ENOTTY' }))
    expect(isSubvolume(fd)).toBe(false)
  })

  test('a subvolume inside a tree is another device but no mount, so openBeneath enters it', () => {
    const root = fs.current.fresh()
    withFd(openRoot(hostPath(root)), (fd) => {
      createSubvolume(fd, name('sub'))
      writeFileSync(`${root}/sub/f`, '')
      expect(statAt(fd, name('sub')).dev).not.toBe(statFd(fd).dev)
      expect(statAt(fd, name('sub')).mountId).toBe(statFd(fd).mountId)
      withFd(openBeneath(fd, name('sub/f'), O_RDONLY), () => {})
    })
  })

  test.each(['btrfs', 'xfs'] as const)('on %s a clone shares its extents until it is written', async (kind) => {
    const check = (root: string) =>
      withFd(openRoot(hostPath(root)), (fd) => {
        writeFileSync(`${root}/from`, Buffer.alloc(1 << 20, 'lsync'))
        withFd(openat(fd, name('from'), O_RDONLY), (from) =>
          withFd(openat(fd, name('to'), O_CREAT | O_RDWR, 0o600), (to) => {
            expect(tryClone(from, to)).toBe(true)
            expect(copyData(from, to, 1 << 20)).toBe(1 << 20)
          }),
        )
        run('sync', '-f', root)
        run('cmp', `${root}/from`, `${root}/to`)
        expect(run('filefrag', '-v', `${root}/to`)).toContain('shared')
      })
    if (kind === 'btrfs') check(fs.current.fresh())
    else await withFileSystem(kind, ({ root }) => check(root))
  })
})

describe.skipIf(!mayMount)('where xattrs, reflinks or holes are missing', () => {
  test('ramfs copies whole, has no attributes and says so by emptiness', () => {
    const { path } = temporary()
    mount('ramfs', path, 'ramfs', 0, '')
    try {
      withFd(openRoot(hostPath(path)), (fd) => {
        writeFileSync(`${path}/f`, 'content')
        expect(listXattrs(fd, name('f'))).toEqual([])
        expect(getXattr(fd, name('f'), name('user.v'))).toBeUndefined()
        expect(() => setXattr(fd, name('f'), name('user.v'), Buffer.from('x'))).toThrowError(
          expect.objectContaining({ code: 'ENOTSUP', path: 'f' }),
        )
        withFd(openat(fd, name('f'), O_RDONLY), (from) =>
          withFd(openat(fd, name('g'), O_CREAT | O_RDWR, 0o600), (to) => copyData(from, to, 7)),
        )
        expect(readFileSync(`${path}/g`, 'utf8')).toBe('content')
      })
    } finally {
      unmount(path)
    }
  })
})
