import {
  chmodSync,
  chownSync,
  existsSync,
  linkSync,
  lstatSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from 'node:fs'
import { importLayer } from '@lsync/overlay-merge'
import type { ByteString, HostPath } from '@lsync/posix'
import {
  type Operation,
  OperationEncoder,
  parseTarget,
  type RawMeta,
  type RemoteAddress,
  remoteTarget,
  SshConnections,
} from '@lsync/sync'
import { describe, expect, test } from 'vitest'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { hasSshd, type SshServer, useSshServer } from '../support/sshd.ts'
import { keepWorkers, withSync } from '../support/syncing.ts'
import { run } from '../support/system.ts'
import { readTree } from '../support/tree.ts'
import { batchOf, codesOf, fileOf, meta, never, path } from './wire.ts'

const isRoot = process.geteuid?.() === 0

function sftpTarget(server: SshServer, at: string, rsh = false, sftpForm: 'tree' | 'portable' = 'tree') {
  const address = parseTarget(`sftp://${server.user}@${server.address}:${server.port}${encodeURI(at)}`) as RemoteAddress
  const connections = new SshConnections({ identities: [server.clientKey], knownHosts: [server.knownHosts] })
  const [program, ...options] = server.ssh
  const words = options.filter((_, i) => options[i] !== '-p' && options[i - 1] !== '-p')
  const common = { connections, timeoutMs: 20_000, sftpForm }
  return remoteTarget(address, rsh ? { ...common, rsh: [program, ...words].join(' ') } : common)
}

describe.skipIf(!needs('sshd', hasSshd) || !needs('root', isRoot))('a target on an SFTP server', () => {
  const disk = useFileSystem('ext4')
  const sshd = useSshServer()

  function place(): string {
    const at = disk.current.fresh()
    mkdirSync(`${at}/t`)
    return `${at}/t`
  }

  test.each([
    ['ssh2', false],
    ['ssh', true],
  ] as const)('by %s holds what SFTP has words for, and names the rest', async (_, rsh) => {
    const at = place()
    const target = sftpTarget(sshd.current, at, rsh)
    const state = await target.open(never)
    expect(state.isEmpty).toBe(true)
    expect(state.losses.map(({ what }) => what).sort()).toEqual([
      'acl',
      'durable',
      'flags',
      'holes',
      'special',
      'time',
      'trusted-xattr',
      'xattr',
    ])
    const failures = await target.deliver(
      0,
      batchOf(
        { do: 'directory', path: path('d') },
        fileOf('d/f', 'content', { mode: 0o4711, uid: 7, gid: 8, mtimeNs: 1_500_000_000_999_999_999n }),
        fileOf('d/\xff\n\\', 'bytes'),
        fileOf('missing/f', 'lost'),
        { do: 'symlink', path: path('d/s'), meta: meta({ uid: 9 }), target: path('/etc/passwd') },
        { do: 'link', path: path('d/g'), to: path('d/f') },
        { do: 'link', path: path('d/g'), to: path('d/f') },
        fileOf('d/w', 'was there'),
        { do: 'special', path: path('d/w'), meta: meta(), type: 0o020000, rdev: 0 },
        fileOf('d/v', 'was there'),
        { do: 'link', path: path('d/v'), to: path('d/w') },
        { do: 'rename', from: path('d/w'), to: path('d/u') },
        { do: 'meta', path: path('d'), kind: 'directory', meta: meta({ mode: 0o1777 }) },
      ),
    )
    expect(codesOf(failures)).toEqual([[3, 'ENOENT']])
    await target.barrier({ root: 'r1', sequence: 5 })
    const stat = statSync(`${at}/d/f`)
    expect([stat.mode & 0o7777, stat.uid, stat.gid, stat.mtimeMs, stat.nlink]).toEqual([0o4711, 7, 8, 1.5e12, 2])
    expect(readFileSync(`${at}/d/g`, 'latin1')).toBe('content')
    expect(readFileSync(Buffer.from(`${at}/d/\xff\n\\`, 'latin1'), 'latin1')).toBe('bytes')
    expect(readlinkSync(`${at}/d/s`)).toBe('/etc/passwd')
    expect(lstatSync(`${at}/d/s`).uid).toBe(9)
    expect(lstatSync(`${at}/d/s`).mtimeMs).toBe(1000)
    expect(readdirSync(Buffer.from(`${at}/d`), 'latin1').sort()).toEqual(['f', 'g', 's', '\xff\n\\'])
    expect(statSync(`${at}/d`).mode & 0o7777).toBe(0o1777)
    await target.close()
    const again = sftpTarget(sshd.current, at, rsh)
    expect(await again.open(never)).toMatchObject({ checkpoint: { root: 'r1', sequence: 5 }, isEmpty: false })
    await again.close()
    expect(readdirSync(`${at}/..`).sort()).toEqual(['.lsync.sync.t', 't'])
    expect(readdirSync(`${at}/../.lsync.sync.t`).sort()).toEqual(['checkpoint', 'stage'])
  })

  test('replaces, moves, removes and keeps as a tree on disk would', async () => {
    const at = place()
    for (const name of ['a', 'b', 'dir/x/y']) mkdirSync(`${at}/${name}`, { recursive: true })
    writeFileSync(`${at}/a/1`, 'one')
    writeFileSync(`${at}/b/2`, 'two')
    writeFileSync(`${at}/f`, 'old')
    mkdirSync(`${at}/closed`)
    writeFileSync(`${at}/closed/x`, '')
    chmodSync(`${at}/closed`, 0)
    const target = sftpTarget(sshd.current, at)
    const { nextStage } = await target.open(never)
    const failures = await target.deliver(
      0,
      batchOf(
        { do: 'out', path: path('a'), stage: nextStage },
        { do: 'out', path: path('b'), stage: nextStage + 1 },
        { do: 'in', stage: nextStage, path: path('b') },
        { do: 'in', stage: nextStage + 1, path: path('a') },
        { do: 'in', stage: nextStage + 1, path: path('a') },
        fileOf('f', 'new'),
        fileOf('dir', 'now a file'),
        { do: 'remove', path: path('closed') },
        { do: 'remove', path: path('closed') },
        { do: 'directory', path: path('k') },
        fileOf('k/1', '1'),
        fileOf('k/2', '2'),
        fileOf('k/3', '3'),
        { do: 'keep', path: path('k'), names: [path('2')] },
        { do: 'rename', from: path('k/2'), to: path('f2') },
        { do: 'rename', from: path('k/2'), to: path('f2') },
      ),
    )
    expect(failures).toEqual([])
    await target.barrier()
    await target.close()
    expect(readdirSync(at).sort()).toEqual(['a', 'b', 'dir', 'f', 'f2', 'k'])
    expect([readdirSync(`${at}/a`), readdirSync(`${at}/b`), readdirSync(`${at}/k`)]).toEqual([['2'], ['1'], []])
    expect([readFileSync(`${at}/f`, 'latin1'), readFileSync(`${at}/dir`, 'latin1')]).toEqual(['new', 'now a file'])
    expect(readdirSync(`${at}/../.lsync.sync.t/stage`)).toEqual([])
  })

  test('patches a file atomically, or where it is when it has other names', async () => {
    const at = place()
    const base = Buffer.alloc(300_000, 'b')
    writeFileSync(`${at}/one`, base)
    writeFileSync(`${at}/two`, base)
    linkSync(`${at}/two`, `${at}/two-again`)
    const before = statSync(`${at}/two`).ino
    const target = sftpTarget(sshd.current, at)
    await target.open(never)
    const encoder = new OperationEncoder()
    for (const [name, shared] of [
      ['one', false],
      ['two', true],
    ] as const) {
      encoder.operation({
        do: 'patch',
        path: path(name),
        meta: meta(),
        sizeBytes: 310_000,
        extents: [
          [10, 3],
          [305_000, 2],
        ],
        holes: [[100, 1000]],
        shared,
      })
      encoder.content(Buffer.from('NEWzz'))
      encoder.finish()
    }
    expect(await target.deliver(0, encoder.take())).toEqual([])
    await target.close()
    const expected = Buffer.concat([base, Buffer.alloc(10_000)])
    expected.write('NEW', 10)
    expected.write('zz', 305_000)
    expected.fill(0, 100, 1100)
    for (const name of ['one', 'two', 'two-again']) expect(readFileSync(`${at}/${name}`).equals(expected)).toBe(true)
    expect(statSync(`${at}/two-again`).ino).toBe(before)
  })

  test('writes files that span batches, sparse ones, many at once, and none that was aborted', async () => {
    const at = place()
    const target = sftpTarget(sshd.current, at)
    await target.open(never)
    const encoder = new OperationEncoder()
    const results = []
    encoder.operation({
      do: 'file',
      path: path('huge'),
      meta: meta(),
      sizeBytes: 20 << 20,
      extents: [
        [1 << 20, 3 << 20],
        [8 << 20, 5 << 20],
      ],
    })
    for (let i = 0; i < 8; i++) {
      encoder.content(Buffer.alloc(1 << 20, 'x'))
      results.push(target.deliver(3, encoder.take()))
    }
    encoder.finish()
    encoder.operation({ do: 'file', path: path('gone'), meta: meta(), sizeBytes: 5, extents: [[0, 5]] })
    encoder.content(Buffer.from('abc'))
    encoder.abort()
    results.push(target.deliver(3, encoder.take()))
    results.push(target.deliver(4, batchOf(...Array.from({ length: 500 }, (_, i) => fileOf(`s${i}`, `small ${i}`)))))
    expect((await Promise.all(results)).flat()).toEqual([])
    await target.close()
    expect(readdirSync(at)).toHaveLength(501)
    const bytes = readFileSync(`${at}/huge`)
    const isFilled = (from: number, to: number, value: number) =>
      bytes.subarray(from, to).every((byte) => byte === value)
    expect([
      isFilled(0, 1 << 20, 0),
      isFilled(1 << 20, 4 << 20, 0x78),
      isFilled(4 << 20, 8 << 20, 0),
      isFilled(8 << 20, 13 << 20, 0x78),
      isFilled(13 << 20, 20 << 20, 0),
    ]).toEqual([true, true, true, true, true])
    expect(statSync(`${at}/huge`).blocks * 512).toBeLessThan(9 << 20)
    for (let i = 0; i < 500; i++) expect(readFileSync(`${at}/s${i}`, 'latin1')).toBe(`small ${i}`)
  })

  test('a directory that was replaced by a symlink is neither written through nor emptied', async () => {
    const at = place()
    const outside = disk.current.fresh()
    writeFileSync(`${outside}/f`, 'precious')
    mkdirSync(`${outside}/d`)
    symlinkSync(outside, `${at}/link`)
    const target = sftpTarget(sshd.current, at)
    await target.open(never)
    const failures = await target.deliver(
      0,
      batchOf(
        fileOf('link/new', 'x'),
        fileOf('link/d/new', 'x'),
        { do: 'remove', path: path('link/f') },
        { do: 'keep', path: path('link'), names: [] },
        { do: 'meta', path: path('link'), kind: 'directory', meta: meta({ mode: 0 }) },
        { do: 'meta', path: path('link'), kind: 'file', meta: meta({ mode: 0o777 }) },
        { do: 'link', path: path('stolen'), to: path('link/f') },
        { do: 'remove', path: path('link') },
      ),
    )
    expect(failures.map(({ index }) => index)).toEqual([0, 1, 2, 3, 4, 5, 6])
    await target.close()
    expect(readdirSync(outside).sort()).toEqual(['d', 'f'])
    expect(statSync(outside).mode & 0o777).not.toBe(0)
    expect(readdirSync(`${outside}/d`)).toEqual([])
    expect(readdirSync(at)).toEqual([])
  })

  test('a target is taken by one client, and again by the same machine after its client was killed or cut', async () => {
    const at = place()
    const target = sftpTarget(sshd.current, at)
    await target.open(never)
    const lock = `${at}/../.lsync.sync.t/lock`
    const owner = JSON.parse(readFileSync(lock, 'latin1'))
    writeFileSync(lock, JSON.stringify({ ...owner, host: 'another' }))
    await expect(sftpTarget(sshd.current, at).open(never)).rejects.toMatchObject({ code: 'TARGET_BUSY' })
    writeFileSync(lock, JSON.stringify({ ...owner, pid: 1, start: '0' }))
    sshd.current.cutConnections()
    await expect(target.deliver(0, batchOf(fileOf('f', 'x')))).rejects.toMatchObject({ code: 'CONNECTION_LOST' })
    await target.close()
    await target.open(never)
    expect(await target.deliver(0, batchOf(fileOf('f', 'x')))).toEqual([])
    await target.close()
    expect(existsSync(lock)).toBe(false)
  })

  describe('as a portable layer', () => {
    const marks = (name: string, value: string) =>
      [[`trusted.overlay.${name}` as ByteString, Buffer.from(value)]] as const

    async function restored(at: string): Promise<string> {
      const to = `${disk.current.fresh()}/layer`
      await importLayer({ form: 'portable', from: at as HostPath, to: to as HostPath, namespace: 'trusted' })
      return to
    }

    test('gives the exact layer back by `lsync layer import`, also after it was opened again and changed', async () => {
      const at = place()
      const first = sftpTarget(sshd.current, at, false, 'portable')
      const { nextStage } = await first.open(never)
      const xattrs = [
        ['security.capability', Buffer.from('0100000200040000000000000000000000000000', 'hex')],
        ['user.\xff', Buffer.from([0, 255])],
      ] as unknown as RawMeta['xattrs']
      const encoder = new OperationEncoder()
      const add = (operation: Operation, content = '') => {
        encoder.operation(operation)
        if (operation.do !== 'file' && operation.do !== 'patch') return
        encoder.content(Buffer.from(content, 'latin1'))
        encoder.finish()
      }
      const file = (name: string, content: string, more: Partial<RawMeta> = {}) => add(...fileOf(name, content, more))
      add({ do: 'directory', path: path('d') })
      file('d/f', 'content', { mode: 0o4711, uid: 7, gid: 8, mtimeNs: -1_500_000_000_999_999_999n, xattrs })
      file('d/empty', '')
      add({ do: 'link', path: path('d/g'), to: path('d/f') })
      add({ do: 'symlink', path: path('d/\xff\n'), meta: meta({ uid: 9 }), target: path('/etc/passwd') })
      add({ do: 'special', path: path('d/w'), meta: meta(), type: 0o020000, rdev: 0 })
      add({ do: 'special', path: path('d/null'), meta: meta(), type: 0o020000, rdev: 0x103 })
      add({ do: 'special', path: path('d/p'), meta: meta(), type: 0o010000, rdev: 0 })
      add({
        do: 'meta',
        path: path('d'),
        kind: 'directory',
        meta: meta({ mode: 0o1777, xattrs: marks('opaque', 'y') }),
      })
      add({
        do: 'file',
        path: path('meta'),
        meta: meta({ xattrs: marks('metacopy', '') }),
        sizeBytes: 5000,
        extents: [],
      })
      add({ do: 'directory', path: path('r') })
      file('r/1', 'x'.repeat(100_000))
      add({ do: 'meta', path: path('r'), kind: 'directory', meta: meta({ xattrs: marks('redirect', '/old/r') }) })
      add({ do: 'meta', path: path(''), kind: 'directory', meta: meta({ mode: 0o755 }) })
      add({ do: 'meta', path: path('r'), kind: 'directory', meta: meta({ xattrs: marks('redirect', '/a/../b') }) })
      add({ do: 'rename', from: path('nothing'), to: path('n') })
      expect(codesOf(await first.deliver(0, encoder.take()))).toEqual([
        [14, 'MARK_INVALID'],
        [15, 'ENOENT'],
      ])
      await first.barrier({ root: 'r1', sequence: 1 })
      await first.close()

      const got = readTree(await restored(at))
      const shown = (name: string) => {
        const { type, mode, uid, content, rdev, links } = got.get(name) ?? {}
        return [name, type, mode?.toString(8), uid, content ?? rdev ?? links]
      }
      expect(['d', 'd/f', 'd/g', 'd/empty', 'd/null', 'd/p', 'd/w'].map(shown)).toEqual([
        ['d', 'directory', '1777', 0, undefined],
        ['d/f', 'file', '4711', 7, 'content'],
        ['d/g', 'file', '4711', 7, 'content'],
        ['d/empty', 'file', '644', 0, ''],
        ['d/null', 'character', '644', 0, 0x103],
        ['d/p', 'fifo', '644', 0, undefined],
        ['d/w', 'character', '0', 0, 0],
      ])
      expect(got.get('d/f')?.links).toEqual(['d/f', 'd/g'])
      expect(got.get('d/f')?.mtimeNs).toBe(-1_500_000_000_999_999_999n)
      expect([...(got.get('d/f')?.xattrs ?? [])]).toEqual([
        ['security.capability', '0100000200040000000000000000000000000000'],
        ['user.\xff', '00ff'],
      ])
      expect(got.get('d/\xff\n')).toMatchObject({ type: 'symlink', target: '/etc/passwd', uid: 9 })
      expect(got.get('d')?.xattrs.get('trusted.overlay.opaque')).toBe('79')
      expect(got.get('r')?.xattrs.get('trusted.overlay.redirect')).toBe(Buffer.from('/old/r').toString('hex'))
      expect(got.get('meta')).toMatchObject({ type: 'file', sizeBytes: 5000 })
      expect(got.get('meta')?.xattrs.get('trusted.overlay.metacopy')).toBe('')

      const again = sftpTarget(sshd.current, at, false, 'portable')
      expect(await again.open(never)).toMatchObject({ checkpoint: { root: 'r1', sequence: 1 }, isEmpty: false })
      const patch = {
        path: path('d/f'),
        meta: meta({ mode: 0o600 }),
        sizeBytes: 9,
        extents: [[0, 3]],
        holes: [],
      } as const
      add({ do: 'patch', ...patch, shared: true }, 'CON')
      add({ do: 'out', path: path('r'), stage: nextStage + 5 })
      add({ do: 'rename', from: path('d'), to: path('e') })
      add({ do: 'in', stage: nextStage + 5, path: path('d') })
      add({ do: 'patch', ...patch, path: path('d/1'), sizeBytes: 10, shared: false }, 'abc')
      file('new', 'new')
      add({ do: 'keep', path: path(''), names: [path('d'), path('e'), path('new')] })
      expect(await again.deliver(0, encoder.take())).toEqual([])
      // Until the barrier the layer there is the old one.
      expect(readTree(await restored(at)).has('meta')).toBe(true)
      await again.barrier({ root: 'r1', sequence: 2 })
      await again.close()
      const after = readTree(await restored(at))
      expect([...after.keys()].sort()).toEqual(
        ['', 'd', 'd/1', 'e', 'e/\xff\n', 'e/empty', 'e/f', 'e/g', 'e/null', 'e/p', 'e/w', 'new'].sort(),
      )
      expect([after.get('e/g')?.content, after.get('e/f')?.mode, after.get('d/1')?.content]).toEqual([
        'CONtent\0\0',
        0o600,
        'abcxxxxxxx',
      ])
      expect(readdirSync(`${at}/data/000000`)).toHaveLength(3)
    })

    test('data that no manifest names is removed when it is opened again', async () => {
      const at = place()
      const first = sftpTarget(sshd.current, at, false, 'portable')
      await first.open(never)
      await first.deliver(0, batchOf(fileOf('a', 'a')))
      await first.barrier({ root: 'r', sequence: 1 })
      await first.deliver(0, batchOf(fileOf('a', 'b'), fileOf('c', 'c')))
      sshd.current.cutConnections()
      await first.close()
      expect(readdirSync(`${at}/data/000000`)).toHaveLength(3)
      await first.open(never)
      expect(readdirSync(`${at}/data/000000`)).toEqual(['000'])
      expect(await first.deliver(0, batchOf(fileOf('c', 'c')))).toEqual([])
      await first.barrier({ root: 'r', sequence: 2 })
      await first.close()
      const layer = readTree(await restored(at))
      expect([layer.get('a')?.content, layer.get('c')?.content]).toEqual(['a', 'c'])
    })
  })
})

describe.skipIf(!needs('sshd', hasSshd) || !needs('root', isRoot))('a tree that is adopted on an SFTP server', () => {
  const disk = useFileSystem('ext4')
  const sshd = useSshServer()
  keepWorkers(disk)

  /** Carries everything over; gives what was sent. */
  function carry(at: string, adopt: boolean) {
    const targets = [sftpTarget(sshd.current, `${at}/t`)]
    const request = { source: `${at}/u` as HostPath, targets, stateDir: `${at}/state`, once: true, adopt }
    return withSync(request, async (sync) => {
      expect(await sync.flush()).toMatchObject({ isSettled: true, failures: [] })
      return sync.status.targets[0]?.bytes ?? 0
    })
  }

  /** Some files of 100 bytes and one of two blocks, and a copy of them by something else. */
  function build(): { at: string; u: string; t: string } {
    const at = disk.current.fresh()
    const [u, t] = [`${at}/u`, `${at}/t`]
    mkdirSync(`${u}/d/e`, { recursive: true })
    for (const name of ['same', 'other', 'longer', 'mode', 'owner', 'later', 'link', 'd/same', 'd/e/same']) {
      writeFileSync(`${u}/${name}`, `of ${name} `.padEnd(100, '.'))
      utimesSync(`${u}/${name}`, 1_600_000_000.25, 1_600_000_000.25)
    }
    writeFileSync(`${u}/d/large`, Buffer.alloc(256 << 10, 'large'))
    run('cp', '-a', u, t)
    return { at, u, t }
  }

  test('is sent what differs in type, size or second, and metadata', async () => {
    const { at, u, t } = build()
    writeFileSync(`${t}/longer`, 'short')
    utimesSync(`${t}/later`, 1_600_000_001, 1_600_000_001)
    chmodSync(`${t}/mode`, 0o600)
    chownSync(`${t}/owner`, 7, 8)
    run('ln', '-sfT', '/etc/passwd', `${t}/link`)
    writeFileSync(`${t}/only there`, 'x')
    // In the same second, as long as before: only `--adopt` takes that for the same.
    writeFileSync(`${t}/other`, 'x'.repeat(100))
    utimesSync(`${t}/other`, 1_600_000_000.75, 1_600_000_000.75)
    const inode = statSync(`${t}/same`).ino
    await expect(carry(at, false)).rejects.toMatchObject({ code: 'TARGET_NOT_OURS' })
    expect(await carry(at, true)).toBe(300)
    for (const name of ['longer', 'later', 'link', 'mode', 'owner', 'd/same']) {
      expect(readFileSync(`${t}/${name}`, 'latin1')).toBe(readFileSync(`${u}/${name}`, 'latin1'))
      expect(lstatSync(`${t}/${name}`)).toMatchObject({ mode: 0o100644, uid: 0, gid: 0, size: 100 })
    }
    expect(statSync(`${t}/same`).ino).toBe(inode)
    expect(existsSync(`${t}/only there`)).toBe(false)
    expect(readFileSync(`${t}/other`, 'latin1')).toBe('x'.repeat(100))
    // From here on the content decides, as ever.
    writeFileSync(`${u}/same`, 'y'.repeat(100))
    utimesSync(`${u}/same`, 1_600_000_000.25, 1_600_000_000.25)
    expect(await carry(at, false)).toBe(100)
    expect(readFileSync(`${t}/same`, 'latin1')).toBe('y'.repeat(100))
  })

  test('names of one inode there become files of their own', async () => {
    const { at, t } = build()
    run('ln', '-f', `${t}/same`, `${t}/d/same`)
    // The second one is alone when its directory is looked at.
    expect(await carry(at, true)).toBe(100)
    expect(statSync(`${t}/same`).nlink).toBe(1)
    expect(statSync(`${t}/d/same`).nlink).toBe(1)
  })

  test('nothing is told of content to those who have not said that the tree is to be taken', async () => {
    const { at } = build()
    const target = sftpTarget(sshd.current, `${at}/t`)
    await target.open(never)
    expect(await target.describe?.(path('d'), false)).toBeUndefined()
    expect((await target.describe?.(path('d'), true))?.map(({ name }) => name).sort()).toEqual(['large', 'same'])
    await target.close()
  })
})
