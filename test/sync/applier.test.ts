import { type ChildProcess, fork } from 'node:child_process'
import { mkdirSync, readdirSync, renameSync, statSync, symlinkSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import type { ByteString, HostPath } from '@lsync/posix'
import { LsyncError, S_IFCHR, S_IFIFO, setSyscallHook } from '@lsync/posix'
import { Applier, type Operation, type RawMeta, TargetPlace, type TreePath } from '@lsync/sync'
import { afterEach, describe, expect, test } from 'vitest'
import { buildTree, character, dir, fifo, file, linkTo, sparse, symlink } from '../support/build.ts'
import { failAt } from '../support/faults.ts'
import { descriptorsBelow, useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { diffTrees, readTree } from '../support/tree.ts'

const isRoot = process.geteuid?.() === 0
const swapper = fileURLToPath(new URL('../hostile/swapper.ts', import.meta.url))
const path = (text: string) => text as TreePath

function meta(more: Partial<RawMeta> = {}): RawMeta {
  return { mode: 0o644, uid: 0, gid: 0, mtimeNs: 1_000_000_000n, xattrs: [], inodeFlags: 0, ...more }
}

function carryOut(applier: Applier, operation: Operation, content = ''): void {
  if (operation.do !== 'file' && operation.do !== 'patch') {
    applier.apply(operation)
    return
  }
  const writer = applier.open(operation)
  let at = 0
  for (const [offset, length] of operation.extents) {
    writer.write(offset, Buffer.from(content.slice(at, at + length), 'latin1'))
    at += length
  }
  writer.finish()
}

function fileOf(name: string, content: string, more: Partial<RawMeta> = {}): Operation {
  const extents = content === '' ? [] : ([[0, content.length]] as const)
  return { do: 'file', path: path(name), meta: meta(more), sizeBytes: content.length, extents }
}

describe.skipIf(!needs('root', isRoot)).each(['ext4', 'tmpfs'] as const)('an applier on %s', (kind) => {
  const disk = useFileSystem(kind)
  const children: ChildProcess[] = []
  afterEach(() => {
    for (const child of children.splice(0)) child.kill('SIGKILL')
  })

  function site(spec = dir()) {
    const at = disk.current.fresh()
    const root = `${at}/target`
    buildTree(root, spec)
    const place = TargetPlace.open(root as HostPath, { create: false })
    return { at, root, place, applier: new Applier(place) }
  }

  function expectTree(root: string, at: string, spec: ReturnType<typeof dir>): void {
    buildTree(`${at}/expected`, spec)
    const differences = diffTrees(readTree(`${at}/expected`), readTree(root)).filter((line) => !line.includes('mtime'))
    expect(differences).toEqual([])
  }

  test('every operation may be repeated and gives the same tree', () => {
    const { at, root, place, applier } = site(
      dir({
        old: dir({ x: file('x') }),
        moved: dir({ y: file('y') }),
        a: file('a'),
        b: file('b'),
        type: dir({ z: file('z') }),
      }),
    )
    const operations: [Operation, string?][] = [
      [{ do: 'remove', path: path('old') }],
      [{ do: 'out', path: path('a'), stage: 0 }],
      [{ do: 'out', path: path('moved'), stage: 1 }],
      [{ do: 'in', stage: 0, path: path('b') }],
      [{ do: 'directory', path: path('new') }],
      [{ do: 'in', stage: 1, path: path('new/moved') }],
      [fileOf('type', 'now a file', { mode: 0o4755, uid: 5, gid: 6 }), 'now a file'],
      [fileOf('new/empty', '')],
      [{ do: 'link', path: path('new/link'), to: path('b') }],
      [{ do: 'symlink', path: path('new/symlink'), meta: meta({ mode: 0o777, uid: 7 }), target: 'any' as ByteString }],
      [{ do: 'special', path: path('new/fifo'), meta: meta({ mode: 0o600 }), type: S_IFIFO, rdev: 0 }],
      [{ do: 'special', path: path('gone'), meta: meta({ mode: 0 }), type: S_IFCHR, rdev: 0 }],
      [{ do: 'meta', path: path('new'), kind: 'directory', meta: meta({ mode: 0o2750, gid: 8 }) }],
      [{ do: 'meta', path: path(''), kind: 'directory', meta: meta({ mode: 0o755 }) }],
    ]
    for (const [operation, content] of operations) {
      carryOut(applier, operation, content)
      carryOut(applier, operation, content)
    }
    // A dead process's successor repeats what it did not see finished.
    const again = new Applier(place)
    for (const [operation, content] of operations.slice(3)) carryOut(again, operation, content)
    expectTree(
      root,
      at,
      dir({
        b: file('a'),
        type: file('now a file', { mode: 0o4755, uid: 5, gid: 6 }),
        gone: character(0, 0, { mode: 0 }),
        new: dir(
          {
            moved: dir({ y: file('y') }),
            empty: file(''),
            link: linkTo('b'),
            symlink: symlink('any', { uid: 7 }),
            fifo: fifo({ mode: 0o600 }),
          },
          { mode: 0o2750, gid: 8 },
        ),
      }),
    )
    expect(readdirSync(`${at}/.lsync.sync.target/stage`)).toEqual([])
    again.forget()
    applier.forget()
    place.close()
  })

  test('names in a directory that it has made are made in their places until it is finished', () => {
    const { root, place, applier } = site(dir({ old: dir() }))
    let renames = 0
    setSyscallHook((syscall) => {
      if (syscall === 'renameat2') renames++
    })
    const renamesOf = (act: () => void): number => {
      const before = renames
      act()
      return renames - before
    }
    try {
      const add = (name: string) => renamesOf(() => carryOut(applier, fileOf(name, 'x')))
      expect(add('old/1')).toBe(1)
      for (const name of ['new', 'other', 'moved']) carryOut(applier, { do: 'directory', path: path(name) })
      expect(add('new/1')).toBe(0)
      // Between batches it is closed.
      applier.forget()
      expect(add('new/2')).toBe(0)
      expect(add('new/2')).toBe(1)
      // Another one in its place is not the one that it has made.
      renameSync(`${root}/moved`, `${root}/elsewhere`)
      mkdirSync(`${root}/moved`)
      expect(add('moved/1')).toBe(1)
      carryOut(applier, { do: 'meta', path: path('new'), kind: 'directory', meta: meta({ mode: 0o755 }) })
      expect(add('new/3')).toBe(1)
      applier.forget()
      expect(add('new/4')).toBe(1)
      expect(add('other/1')).toBe(0)
      applier.disown()
      expect(add('other/2')).toBe(1)
      applier.forget()
      expect(add('other/3')).toBe(1)
    } finally {
      setSyscallHook(undefined)
      applier.forget()
      place.close()
    }
  })

  test('owner and mode are right in a directory that gives others, with and without a umask of its own', () => {
    for (const hasOwnUmask of [false, true]) {
      const { at, root, place } = site(dir({ shared: dir({}, { mode: 0o2775, gid: 50 }) }))
      const applier = new Applier({ rootFd: place.rootFd, stageFd: place.stageFd, hasOwnUmask })
      const umask = hasOwnUmask ? process.umask(0) : process.umask(0o077)
      try {
        carryOut(applier, { do: 'directory', path: path('shared/new') })
        for (const [index, mode] of [0o644, 0o640, 0o644, 0o4755, 0o600, 0o2770, 0o4755, 0o666].entries()) {
          for (const [uid, gid] of [
            [0, 0],
            [0, 50],
            [7, 8],
          ] as const) {
            carryOut(applier, fileOf(`shared/new/${index}.${uid}.${gid}`, 'x', { mode, uid, gid }))
            const stat = statSync(`${root}/shared/new/${index}.${uid}.${gid}`)
            expect([stat.mode & 0o7777, stat.uid, stat.gid]).toEqual([mode, uid, gid])
          }
        }
      } finally {
        process.umask(umask)
        applier.forget()
        place.close()
      }
      expect(readdirSync(`${at}/.lsync.sync.target/stage`)).toEqual([])
    }
  })

  test('a patch keeps what its extents do not cover, in a new inode or for all names of the old one', () => {
    const { at, root, place, applier } = site(
      dir({
        one: file('0123456789'),
        two: file('0123456789'),
        other: linkTo('two'),
        big: sparse(1 << 20, [[0, 'x'.repeat(200_000)]]),
      }),
    )
    const patch = (name: string, shared: boolean): Operation => ({
      do: 'patch',
      path: path(name),
      meta: meta({ mode: 0o600 }),
      sizeBytes: 12,
      extents: [
        [2, 2],
        [8, 4],
      ],
      holes: [],
      shared,
    })
    carryOut(applier, patch('one', false), 'abcdef')
    carryOut(applier, patch('two', true), 'abcdef')
    carryOut(applier, {
      do: 'patch',
      path: path('big'),
      meta: meta(),
      sizeBytes: 1 << 20,
      extents: [],
      holes: [[65_536, 134_464]],
      shared: false,
    })
    const patched = file('01ab4567cdef', { mode: 0o600 })
    expectTree(
      root,
      at,
      dir({ one: patched, two: patched, other: linkTo('two'), big: sparse(1 << 20, [[0, 'x'.repeat(65_536)]]) }),
    )
    applier.forget()
    place.close()
  })

  test('a name that is kept stays, all others of the directory go, and the state of the target is not one of them', () => {
    const { at, root, place, applier } = site(
      dir({ a: file('a'), b: dir({ c: dir({ d: file('d') }) }), e: symlink('x') }),
    )
    const keep: Operation = { do: 'keep', path: path(''), names: ['a', 'never there'] as ByteString[] }
    carryOut(applier, keep)
    carryOut(applier, keep)
    expectTree(root, at, dir({ a: file('a') }))
    applier.forget()
    place.close()
  })

  test('only names within bounds are looked at for those to keep', () => {
    const { at, root, place, applier } = site(
      dir({ a: file('a'), b: file('b'), c: file('c'), d: file('d'), e: file('e') }),
    )
    const [after, last, names] = ['a', 'd', ['c']] as unknown as [ByteString, ByteString, ByteString[]]
    carryOut(applier, { do: 'keep', path: path(''), names, after, last })
    expectTree(root, at, dir({ a: file('a'), c: file('c'), e: file('e') }))
    applier.forget()
    place.close()
  })

  test('immutable and append-only files and directories are changed, and can become so', () => {
    const { at, root, place, applier } = site(
      dir({
        d: dir(
          { f: file('old', { flags: 'i' }), g: file('old', { flags: 'a' }), h: file('h', { flags: 'i' }) },
          { flags: 'i' },
        ),
      }),
    )
    carryOut(applier, fileOf('d/f', 'new', { inodeFlags: 0x20 }), 'new')
    carryOut(applier, { do: 'meta', path: path('d/g'), kind: 'file', meta: meta({ mode: 0o600 }) })
    carryOut(applier, { do: 'link', path: path('l'), to: path('d/h') })
    carryOut(applier, { do: 'meta', path: path('d'), kind: 'directory', meta: meta({ mode: 0o755, inodeFlags: 0x10 }) })
    carryOut(applier, { do: 'meta', path: path(''), kind: 'directory', meta: meta({ mode: 0o755 }) })
    expectTree(
      root,
      at,
      dir({
        d: dir(
          { f: file('new', { flags: 'a' }), g: file('old', { mode: 0o600 }), h: file('h', { flags: 'i' }) },
          { flags: 'i' },
        ),
        l: linkTo('d/h'),
      }),
    )
    for (const name of ['d', 'd/f', 'd/h'])
      carryOut(applier, { do: 'meta', path: path(name), kind: name === 'd' ? 'directory' : 'file', meta: meta() })
    applier.forget()
    place.close()
  })

  test('what is made beneath a default ACL gets only what its metadata says', () => {
    const acl = '\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff\x04\0\x05\0\xff\xff\xff\xff\x20\0\x05\0\xff\xff\xff\xff'
    const { at, root, place, applier } = site(dir({}, { xattrs: { 'system.posix_acl_default': acl } }))
    carryOut(applier, { do: 'directory', path: path('d') })
    carryOut(applier, fileOf('d/f', 'x', { mode: 0o606 }), 'x')
    carryOut(applier, fileOf('f', 'x', { mode: 0o606 }), 'x')
    carryOut(applier, { do: 'meta', path: path('d'), kind: 'directory', meta: meta({ mode: 0o707 }) })
    expectTree(
      root,
      at,
      dir(
        { d: dir({ f: file('x', { mode: 0o606 }) }, { mode: 0o707 }), f: file('x', { mode: 0o606 }) },
        { xattrs: { 'system.posix_acl_default': acl } },
      ),
    )
    applier.forget()
    place.close()
  })

  test.each<[string, Operation]>([
    ['..', fileOf('../out', '')],
    ['. inside', { do: 'remove', path: path('a/./b') }],
    ['an absolute path', { do: 'directory', path: path('/tmp/x') }],
    ['NUL', { do: 'directory', path: path('a\0b') }],
    ['the root', { do: 'remove', path: path('') }],
    ['a long name', { do: 'directory', path: path('n'.repeat(256)) }],
    ['a stage number', { do: 'in', stage: -1, path: path('x') }],
    ['a fraction', { do: 'out', stage: 0.5, path: path('a') }],
    ['the place of the state', { do: 'directory', path: path(`.lsync-${'0'.repeat(32)}`) }],
    ['a type', { do: 'special', path: path('x'), type: 0o100000, rdev: 0, meta: meta() }],
    ['an extent outside the file', { ...fileOf('x', 'abc'), sizeBytes: 2 } as Operation],
  ])('%s is refused and nothing happens', (_, operation) => {
    const { at, root, place, applier } = site(dir({ a: dir({ b: file('b') }) }))
    expect(() => carryOut(applier, operation, 'abc')).toThrow(expect.objectContaining({ code: 'OPERATION_REFUSED' }))
    expectTree(root, at, dir({ a: dir({ b: file('b') }) }))
    applier.forget()
    place.close()
  })

  test('a directory that is swapped for a symlink while it is applied to leads nowhere', async () => {
    const { at, root, place, applier } = site(dir({ a: dir({ f1: file('f'), sub: dir() }) }))
    const outside = `${at}/outside`
    mkdirSync(`${outside}/sub`, { recursive: true })
    for (const name of ['f1', 'gone', 'sub/f1']) writeFileSync(`${outside}/${name}`, 'precious')
    const before = readTree(outside)
    symlinkSync(outside, `${root}/z`)
    for (const name of ['z/f1', 'z/sub/f1'])
      expect(() => carryOut(applier, fileOf(name, 'x'), 'x')).toThrow(/ELOOP|ENOTDIR/)
    carryOut(applier, { do: 'remove', path: path('z/gone') })
    const child = fork(swapper, [root, 'a', outside])
    children.push(child)
    await new Promise((resolve) => child.once('message', resolve))
    for (let round = 0; round < 400; round++) {
      for (const operation of [
        fileOf('a/f1', 'x'),
        fileOf('a/sub/f1', 'x'),
        { do: 'remove', path: path('a/gone') },
        { do: 'keep', path: path('a'), names: ['f1' as ByteString] },
        { do: 'link', path: path('a/l'), to: path('a/f1') },
        { do: 'meta', path: path('a/f1'), kind: 'file', meta: meta({ mode: 0 }) },
        { do: 'meta', path: path('a'), kind: 'directory', meta: meta({ mode: 0o700 }) },
        { do: 'rename', from: path('a/f1'), to: path('a/f2') },
      ] satisfies Operation[]) {
        try {
          carryOut(applier, operation, 'x')
        } catch (error) {
          expect(error).toBeInstanceOf(LsyncError)
        }
        if (round % 2 === 0) applier.forget()
      }
    }
    child.kill('SIGKILL')
    expect(readTree(outside)).toEqual(before)
    applier.forget()
    place.close()
  })
})

describe.skipIf(!needs('root', isRoot))('the state of a target', () => {
  const disk = useFileSystem('tmpfs')

  test('is locked, keeps its checkpoint, and never gives a stage number twice', () => {
    const at = `${disk.current.fresh()}/t` as HostPath
    const place = TargetPlace.open(at, { create: true })
    expect(place.state).toEqual({ checkpoint: undefined, isEmpty: true, nextStage: 0, losses: [] })
    expect(() => TargetPlace.open(at, { create: true })).toThrow(expect.objectContaining({ code: 'TARGET_BUSY' }))
    const applier = new Applier(place)
    carryOut(applier, { do: 'directory', path: path('d') })
    carryOut(applier, { do: 'out', path: path('d'), stage: 6 })
    applier.forget()
    place.close()
    const second = TargetPlace.open(at, { create: true })
    expect(second.state.nextStage).toBe(7)
    second.storeCheckpoint({ root: 'r', sequence: 3 }, 9)
    second.close()
    const third = TargetPlace.open(at, { create: false })
    expect(third.state).toMatchObject({ checkpoint: { root: 'r', sequence: 3 }, isEmpty: true, nextStage: 9 })
    third.close()
  })

  test('an opening that fails anywhere leaves nothing open, and keeps this process from none later', async () => {
    const base = disk.current.fresh()
    const open = async (at: string) => TargetPlace.open(at as HostPath, { create: true }).close()
    for (let n = 0; ; n++) {
      const at = `${base}/t${n}`
      const { wasInjected, error, syscall } = await failAt(n, 'EIO', () => open(at))
      expect([syscall, descriptorsBelow(base)]).toEqual([syscall, []])
      await open(at)
      if (!wasInjected) {
        expect([error, n > 10]).toEqual([undefined, true])
        break
      }
    }
  })

  test('a checkpoint that was changed is not believed', () => {
    const at = `${disk.current.fresh()}/t` as HostPath
    const place = TargetPlace.open(at, { create: true })
    place.storeCheckpoint({ root: 'r', sequence: 3 })
    const { statePath } = place
    place.close()
    writeFileSync(`${statePath}/checkpoint`, '{"version":1,"root":"r","sequence":4,"nextStage":0}\n0\n')
    expect(() => TargetPlace.open(at, { create: true })).toThrow(
      expect.objectContaining({ code: 'TARGET_STATE_DAMAGED' }),
    )
  })

  test('lies inside a target that is the root of a mount, where no operation reaches it', () => {
    const root = disk.current.root as HostPath
    const place = TargetPlace.open(root, { create: false })
    const inside = place.statePath.slice(root.length + 1)
    expect(inside).toMatch(/^\.lsync-[0-9a-f]{32}$/)
    const applier = new Applier(place)
    carryOut(applier, { do: 'keep', path: path(''), names: [] })
    expect(readdirSync(root)).toEqual([inside])
    expect(() => carryOut(applier, { do: 'remove', path: path(inside) })).toThrow('kept for the state')
    applier.forget()
    place.close()
    const again = TargetPlace.open(root, { create: false })
    expect(again.statePath).toBe(place.statePath)
    expect(again.state.isEmpty).toBe(true)
    again.close()
  })
})
