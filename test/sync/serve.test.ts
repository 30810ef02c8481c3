import {
  existsSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs'
import { OperationEncoder } from '@lsync/sync'
import { describe, expect, test } from 'vitest'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { batchOf, codesOf, fileOf, meta, never, path, targetHere } from './wire.ts'

const isRoot = process.geteuid?.() === 0

describe.skipIf(!needs('root', isRoot))('lsync serve', () => {
  const disk = useFileSystem('ext4')

  async function opened(more: Parameters<typeof targetHere>[2] = {}, target = 't') {
    const root = disk.current.fresh()
    mkdirSync(`${root}/t`)
    const here = targetHere(root, target, more)
    const state = await here.remote.open(never)
    return { root, at: `${root}/t`, state, ...here }
  }

  test('carries out operations in the order of their lane, and says what failed', async () => {
    const { remote, at, state } = await opened()
    expect(state).toEqual({ checkpoint: undefined, isEmpty: true, nextStage: 0, losses: [] })
    const failures = await remote.deliver(
      0,
      batchOf(
        { do: 'directory', path: path('d') },
        fileOf('d/f', 'content', { mode: 0o4711, uid: 7 }),
        fileOf('missing/f', 'lost'),
        { do: 'symlink', path: path('d/s'), meta: meta(), target: path('/etc/passwd') },
        { do: 'link', path: path('d/g'), to: path('d/f') },
        { do: 'special', path: path('d/w'), meta: meta(), type: 0o020000, rdev: 0 },
        { do: 'meta', path: path('d'), kind: 'directory', meta: meta({ mode: 0o1777 }) },
        { do: 'rename', from: path('nothing'), to: path('d/n') },
      ),
    )
    expect(codesOf(failures)).toEqual([
      [2, 'ENOENT'],
      [7, 'ENOENT'],
    ])
    await remote.barrier({ root: 'r1', sequence: 5 })
    expect(readFileSync(`${at}/d/g`, 'latin1')).toBe('content')
    expect(statSync(`${at}/d/f`).mode & 0o7777).toBe(0o4711)
    expect(statSync(`${at}/d`).mode & 0o7777).toBe(0o1777)
    expect(lstatSync(`${at}/d/w`).isCharacterDevice()).toBe(true)
    await remote.close()
    expect((await remote.open(never)).checkpoint).toEqual({ root: 'r1', sequence: 5 })
    expect(await remote.peek(never)).toEqual({ root: 'r1', sequence: 5 })
    await remote.close()
  })

  test('writes files that span batches, sparse ones, and none that was aborted', async () => {
    const { remote, at } = await opened()
    const encoder = new OperationEncoder()
    const results = []
    const huge = Buffer.alloc(1 << 20, 'x')
    encoder.operation({
      do: 'file',
      path: path('huge'),
      meta: meta(),
      sizeBytes: 40 << 20,
      extents: [
        [1 << 20, 4 << 20],
        [20 << 20, 12 << 20],
      ],
    })
    for (let i = 0; i < 16; i++) {
      encoder.content(huge)
      if (encoder.isFull) results.push(remote.deliver(3, encoder.take()))
    }
    encoder.finish()
    encoder.operation({ do: 'file', path: path('gone'), meta: meta(), sizeBytes: 5, extents: [[0, 5]] })
    encoder.content(Buffer.from('abc'))
    encoder.abort()
    results.push(remote.deliver(3, encoder.take()))
    expect((await Promise.all(results)).flat()).toEqual([])
    expect(readdirSync(at)).toEqual(['huge'])
    expect(statSync(`${at}/huge`).size).toBe(40 << 20)
    expect(statSync(`${at}/huge`).blocks * 512).toBeLessThan(17 << 20)
    const bytes = readFileSync(`${at}/huge`)
    expect(bytes.subarray(1 << 20, 5 << 20).every((byte) => byte === 0x78)).toBe(true)
    expect(bytes.subarray(5 << 20, 20 << 20).every((byte) => byte === 0)).toBe(true)
    await remote.close()
  })

  test('a failure in the middle of a file counts where the file ends, and the rest goes on', async () => {
    const { remote, at } = await opened()
    const encoder = new OperationEncoder()
    encoder.operation({ do: 'file', path: path('no/dir'), meta: meta(), sizeBytes: 8, extents: [[0, 8]] })
    encoder.content(Buffer.from('1234'))
    expect(await remote.deliver(0, encoder.take())).toEqual([])
    encoder.content(Buffer.from('5678'))
    encoder.finish()
    encoder.operation({ do: 'directory', path: path('after') })
    expect(codesOf(await remote.deliver(0, encoder.take()))).toEqual([[0, 'ENOENT']])
    expect(readdirSync(at)).toEqual(['after'])
    await remote.close()
  })

  test.each(['always', 'auto', 'never'] as const)('compression %s gives the same tree', async (how) => {
    const root = disk.current.fresh()
    const text = 'the same line again and again\n'.repeat(5000)
    const compress = how === 'always' ? true : how === 'never' ? false : 'auto'
    const here = targetHere(root, 't', {}, 20_000, compress)
    await here.remote.open(never)
    await Promise.all(
      Array.from({ length: 40 }, (_, i) => here.remote.deliver(i % 8, batchOf(fileOf(`f${i}`, text + i)))),
    )
    await here.remote.close()
    for (let i = 0; i < 40; i++) expect(readFileSync(`${root}/t/f${i}`, 'latin1')).toBe(text + i)
    const received = (await here.servers[0]?.report)?.receivedBytes ?? 0
    if (how === 'always') expect(received).toBeLessThan((40 * text.length) / 20)
    if (how === 'never') expect(received).toBeGreaterThan(40 * text.length)
  })

  test('one client has a target; the next one is told that it is busy, until the first is gone', async () => {
    const { root, remote, servers } = await opened()
    const second = targetHere(root, 't')
    await expect(second.remote.open(never)).rejects.toMatchObject({ code: 'TARGET_BUSY' })
    await second.remote.close()
    servers[0]?.connection.destroy()
    await servers[0]?.ended
    await expect(remote.barrier()).rejects.toMatchObject({ code: 'CONNECTION_LOST' })
    await second.remote.open(never)
    await second.remote.close()
  })

  test('a client that is cut off in the middle of a file leaves nothing of it, and the old one whole', async () => {
    const { root, at, remote, servers } = await opened()
    await remote.deliver(0, batchOf(fileOf('f', 'old')))
    const encoder = new OperationEncoder()
    encoder.operation({ do: 'file', path: path('f'), meta: meta(), sizeBytes: 100, extents: [[0, 100]] })
    encoder.content(Buffer.alloc(50, 'n'))
    await remote.deliver(0, encoder.take())
    servers[0]?.connection.destroy()
    await servers[0]?.ended
    expect(readFileSync(`${at}/f`, 'latin1')).toBe('old')
    expect(readdirSync(at)).toEqual(['f'])
    expect(readdirSync(`${root}/.lsync.sync.t/stage`)).toEqual([])
  })

  describe('serves its directory and nothing else', () => {
    test.each(['a/../../x', '..', '/etc', 'a//b', '.', 'a\0b'])('%j is refused', async (target) => {
      const root = disk.current.fresh()
      const { remote, servers } = targetHere(root, target)
      await expect(remote.open(never)).rejects.toMatchObject({ code: 'PROTOCOL_VIOLATED' })
      await servers[0]?.ended
      expect(readdirSync(root)).toEqual([])
    })

    test('a symlink on the way or at the end is not followed', async () => {
      const root = disk.current.fresh()
      const outside = disk.current.fresh()
      mkdirSync(`${outside}/d`)
      symlinkSync(outside, `${root}/link`)
      symlinkSync(`${outside}/d`, `${root}/end`)
      for (const target of ['link', 'link/d', 'link/new', 'end']) {
        const { remote } = targetHere(root, target)
        await expect(remote.open(never)).rejects.toMatchObject({ code: 'SERVED_PATH' })
        await expect(remote.peek(never)).rejects.toMatchObject({ code: 'SERVED_PATH' })
        await remote.close()
      }
      expect(readdirSync(outside)).toEqual(['d'])
      expect(readdirSync(root).sort()).toEqual(['end', 'link'])
    })

    test('the state of another target is no target', async () => {
      const { root, remote } = await opened()
      const { remote: other } = targetHere(root, '.lsync.sync.t/stage')
      await expect(other.open(never)).rejects.toMatchObject({ code: 'SERVED_PATH' })
      await other.close()
      await remote.close()
    })

    test('a directory that was replaced by a symlink is not written through', async () => {
      const { at, remote } = await opened()
      const outside = disk.current.fresh()
      await remote.deliver(0, batchOf({ do: 'symlink', path: path('d'), meta: meta(), target: path(outside) }))
      const failures = await remote.deliver(0, batchOf(fileOf('d/f', 'x'), { do: 'remove', path: path('d/f') }))
      expect(codesOf(failures)).toEqual([[0, 'ENOTDIR']])
      expect(readdirSync(outside)).toEqual([])
      expect(readdirSync(at)).toEqual(['d'])
      await remote.close()
    })
  })

  test('--read-only tells the checkpoint and changes nothing', async () => {
    const { root, remote } = await opened()
    await remote.barrier({ root: 'r', sequence: 3 })
    await remote.close()
    const before = readdirSync(root).sort()
    const { remote: reader } = targetHere(root, 't', { access: 'read-only' })
    expect(await reader.peek(never)).toEqual({ root: 'r', sequence: 3 })
    await expect(reader.open(never)).rejects.toMatchObject({ code: 'ACCESS_REFUSED' })
    await reader.close()
    const { remote: missing } = targetHere(root, 'new', { access: 'read-only' })
    await expect(missing.peek(never)).rejects.toMatchObject({ code: 'SERVED_PATH' })
    await expect(missing.open(never)).rejects.toMatchObject({ code: 'ACCESS_REFUSED' })
    await missing.close()
    expect(readdirSync(root).sort()).toEqual(before)
  })

  describe('--append-only', () => {
    async function appending() {
      const root = disk.current.fresh()
      mkdirSync(`${root}/t/old`, { recursive: true })
      writeFileSync(`${root}/t/f`, 'old', { mode: 0o644 })
      const { remote } = targetHere(root, 't', { access: 'append-only' })
      await remote.open(never)
      return { at: `${root}/t`, remote }
    }

    test('takes new names of every kind, and the metadata of directories', async () => {
      const { at, remote } = await appending()
      const failures = await remote.deliver(
        0,
        batchOf(
          { do: 'directory', path: path('d') },
          fileOf('d/f', 'new'),
          fileOf('old/f', 'new'),
          { do: 'symlink', path: path('s'), meta: meta(), target: path('x') },
          { do: 'special', path: path('p'), meta: meta(), type: 0o010000, rdev: 0 },
          { do: 'link', path: path('g'), to: path('f') },
          { do: 'directory', path: path('old') },
          { do: 'meta', path: path('old'), kind: 'directory', meta: meta({ mode: 0o700 }) },
          { do: 'remove', path: path('nothing') },
        ),
      )
      expect(failures).toEqual([])
      expect(readdirSync(at).sort()).toEqual(['d', 'f', 'g', 'old', 'p', 's'])
      expect(statSync(`${at}/old`).mode & 0o777).toBe(0o700)
      await remote.close()
    })

    test('refuses to change, rename, replace or remove what is there', async () => {
      const { at, remote } = await appending()
      const patch = { do: 'patch', path: path('f'), meta: meta(), sizeBytes: 1, extents: [], holes: [] } as const
      const encoder = new OperationEncoder()
      encoder.operation({ ...patch, shared: true })
      encoder.finish()
      encoder.operation({ ...patch, shared: false })
      encoder.finish()
      const failures = [
        ...(await remote.deliver(
          0,
          batchOf(
            fileOf('f', 'new'),
            { do: 'remove', path: path('f') },
            { do: 'rename', from: path('f'), to: path('g') },
            { do: 'out', path: path('f'), stage: 1 },
            { do: 'in', path: path('g'), stage: 1 },
            { do: 'keep', path: path(''), names: [] },
            { do: 'directory', path: path('f') },
            { do: 'symlink', path: path('f'), meta: meta(), target: path('x') },
            { do: 'special', path: path('old'), meta: meta(), type: 0o010000, rdev: 0 },
            { do: 'link', path: path('f'), to: path('old/nothing') },
            { do: 'meta', path: path('f'), kind: 'file', meta: meta({ mode: 0o4777 }) },
            fileOf('old', 'x'),
          ),
        )),
        ...(await remote.deliver(1, encoder.take())),
      ]
      expect(failures.map(({ index }) => index)).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 0, 1])
      expect(readFileSync(`${at}/f`, 'latin1')).toBe('old')
      expect(readdirSync(at).sort()).toEqual(['f', 'old'])
      await remote.close()
    })

    test('an operation that is repeated after a lost connection is done, and not a failure', async () => {
      const { remote } = await appending()
      const batch = () =>
        batchOf(
          { do: 'directory', path: path('d') },
          fileOf('d/f', 'new'),
          { do: 'symlink', path: path('s'), meta: meta(), target: path('x') },
          { do: 'special', path: path('p'), meta: meta(), type: 0o010000, rdev: 0 },
          { do: 'link', path: path('d/g'), to: path('d/f') },
        )
      expect(await remote.deliver(0, batch())).toEqual([])
      expect(await remote.deliver(0, batch())).toEqual([])
      await remote.close()
    })

    test('two lanes that make one name do not replace each other', async () => {
      const { at, remote } = await appending()
      for (let i = 0; i < 50; i++) {
        const results = await Promise.all(
          [0, 1].map((lane) =>
            remote.deliver(lane, batchOf(fileOf(`n${i}`, `lane ${lane}`, { mtimeNs: BigInt(lane) }))),
          ),
        )
        const winner = results.findIndex((failures) => failures.length === 0)
        expect(results.flat()).toHaveLength(1)
        expect(readFileSync(`${at}/n${i}`, 'latin1')).toBe(`lane ${winner}`)
      }
      await remote.close()
    })
  })

  test('makes a target whose parent is there, and says so when it is not', async () => {
    const root = disk.current.fresh()
    const { remote } = targetHere(root, 'new')
    await remote.open(never)
    await remote.close()
    expect(existsSync(`${root}/new`)).toBe(true)
    const deep = targetHere(root, 'a/b')
    await expect(deep.remote.open(never)).rejects.toMatchObject({ code: 'SERVED_PATH' })
    await deep.remote.close()
  })
})
