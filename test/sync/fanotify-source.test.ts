import { execFileSync, spawnSync } from 'node:child_process'
import {
  chmodSync,
  closeSync,
  linkSync,
  mkdirSync,
  openSync,
  readFileSync,
  renameSync,
  rmdirSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs'
import fc from 'fast-check'
import { describe, expect, test, vi } from 'vitest'
import { type ByteString, hostPath, openRoot, RENAME_EXCHANGE, rename, withFd } from '../../packages/posix/src/index.ts'
import { FanotifySource } from '../../packages/sync/src/source/fanotify.ts'
import type { SourceRequest } from '../../packages/sync/src/source/source.ts'
import { mayMount } from '../posix/privileges.ts'
import { useFileSystem, withFileSystem } from '../support/image.ts'
import { mountOverlay, plainOptions } from '../support/overlay.ts'
import { mapShared, mount, run, unmount } from '../support/system.ts'
import { watching } from './hints.ts'

const MS_BIND = 0x1000
const fanotify = (request: SourceRequest) => new FanotifySource(request)

function directories(base: string, ...names: string[]): void {
  for (const name of names) mkdirSync(`${base}/${name}`, { recursive: true })
}

describe.skipIf(!mayMount).each(['ext4', 'xfs', 'btrfs', 'tmpfs'] as const)(
  'an upper on %s in a live mount',
  (kind) => {
    const fs = useFileSystem(kind)

    /** Mounts a stack whose lower `fill` makes, and runs `use` with what a watch on the upper says. */
    async function withUpper(
      fill: (lower: string) => void,
      use: (merged: string, saidAfter: (act: () => void) => Promise<string[]>) => Promise<void>,
    ): Promise<void> {
      const root = fs.current.fresh()
      directories(root, 'l', 'u', 'w', 'm')
      fill(`${root}/l`)
      mountOverlay(
        { lowers: [`${root}/l`], upper: `${root}/u`, work: `${root}/w` },
        { ...plainOptions, redirectDir: 'on' },
        `${root}/m`,
      )
      try {
        const { stop, said } = await watching(`${root}/u`, fanotify)
        await use(`${root}/m`, async (act) => {
          await said()
          act()
          return said()
        })
        await stop()
      } finally {
        unmount(`${root}/m`)
      }
    }

    test('every kind of change that is made through the mount is hinted at on the upper', () =>
      withUpper(
        (lower) => {
          directories(lower, 'd/sub', 'full')
          for (const name of ['d/a', 'd/b', 'd/c', 'd/sub/s', 'full/g']) writeFileSync(`${lower}/${name}`, name)
        },
        async (m, saidAfter) => {
          expect(await saidAfter(() => writeFileSync(`${m}/new`, 'x'))).toContain('new')
          expect(await saidAfter(() => linkSync(`${m}/new`, `${m}/linked`))).toContain('linked')
          // A copy-up of the directory, prepared in the work directory: its content has had its events there.
          const copiedUp = await saidAfter(() => writeFileSync(`${m}/d/a`, 'longer'))
          expect(copiedUp).toEqual(expect.arrayContaining([' -> d', 'tree d', 'd/a']))
          expect(await saidAfter(() => rmSync(`${m}/d/b`))).toContain(' -> d/b') // a whiteout comes in
          expect(await saidAfter(() => chmodSync(`${m}/d/c`, 0o700))).toContain('d/c')
          expect(await saidAfter(() => run('setfattr', '-n', 'trusted.x', '-v', '1', `${m}/d`))).toContain('d/.')
          expect(await saidAfter(() => mkdirSync(`${m}/own`))).toEqual(expect.arrayContaining(['own', 'tree own']))
          expect(await saidAfter(() => renameSync(`${m}/own`, `${m}/d/own`))).toContain('own -> d/own')
          expect(await saidAfter(() => renameSync(`${m}/d`, `${m}/e`))).toContain('d -> e')
          expect(await saidAfter(() => rmSync(`${m}/full`, { recursive: true }))).toContain(' -> full')
          expect(await saidAfter(() => run('mknod', `${m}/fifo`, 'p'))).toContain('fifo')
          expect(await saidAfter(() => rmSync(`${m}/fifo`))).toContain('fifo')
        },
      ))

    test('a directory that the kernel makes opaque or fills in its work directory is hinted at as a whole tree', () =>
      withUpper(
        (lower) => {
          directories(lower, 'd', 'e')
          for (const name of ['d/a', 'e/b']) writeFileSync(`${lower}/${name}`, name)
        },
        async (m, saidAfter) => {
          rmSync(`${m}/d`, { recursive: true })
          // Neither the mark nor what is in the prepared directory is named: the tree hint stands for all of it.
          expect(await saidAfter(() => mkdirSync(`${m}/d`))).toEqual(expect.arrayContaining([' -> d', 'tree d']))
          rmSync(`${m}/e/b`)
          const emptied = await saidAfter(() => rmdirSync(`${m}/e`))
          expect(emptied).toContain(' -> e')
        },
      ))

    test('a file that stays open is hinted at with each write', () =>
      withUpper(
        () => {},
        async (m, saidAfter) => {
          const fd = openSync(`${m}/log`, 'a')
          try {
            for (let i = 0; i < 3; i++) expect(await saidAfter(() => writeSync(fd, 'line\n'))).toEqual(['log'])
          } finally {
            closeSync(fd)
          }
        },
      ))

    test('a write through a shared mapping is hinted at when the mapping goes, not before', () =>
      withUpper(
        () => {},
        async (m, saidAfter) => {
          writeFileSync(`${m}/mapped`, 'before')
          const fd = openSync(`${m}/mapped`, 'r+')
          const mapping = mapShared(fd, 6)
          if (mapping === undefined) throw new Error('no shared mapping')
          expect(await saidAfter(() => closeSync(fd))).toEqual([])
          expect(await saidAfter(() => mapping.fill(0, 1, 0x42))).toEqual([])
          expect(readFileSync(`${m}/mapped`, 'utf8')).toBe('Before')
          expect(await saidAfter(() => mapping.unmap())).toEqual(['mapped'])
        },
      ))
  },
)

describe.skipIf(!mayMount)('a fanotify source', () => {
  const fs = useFileSystem('ext4')

  test('tells of what lies beneath its root and of nothing beside it', async () => {
    const base = fs.current.fresh()
    directories(base, 'root/in', 'beside')
    const { said } = await watching(`${base}/root`, fanotify)
    for (const name of ['root/in/f', 'beside/f', 'root/g', 'h']) writeFileSync(`${base}/${name}`, '')
    expect(await said()).toEqual(['in/f', 'g'])
  })

  test('a name that is not UTF-8 comes as its bytes', async () => {
    const base = fs.current.fresh()
    const { source, hints } = await watching(base, fanotify)
    writeFileSync(Buffer.concat([Buffer.from(`${base}/`), Buffer.from([0xff, 0x0a])]), '')
    await source.drain()
    expect(hints).toMatchObject([{ kind: 'name', name: '\xff\n' }])
  })

  test('a move within the root is one hint with both ends, an exchange is two', async () => {
    const base = fs.current.fresh()
    directories(base, 'one', 'two')
    writeFileSync(`${base}/one/f`, '')
    writeFileSync(`${base}/g`, '')
    const { said } = await watching(base, fanotify)
    renameSync(`${base}/one/f`, `${base}/two/f`)
    expect(await said()).toEqual(['one/f -> two/f'])
    withFd(openRoot(hostPath(base)), (fd) => rename(fd, 'g' as ByteString, fd, 'two' as ByteString, RENAME_EXCHANGE))
    expect(await said()).toEqual(['g -> two', 'two -> g'])
  })

  test('a move across the edge of the root shows the end that lies inside, and the whole tree that came in', async () => {
    const base = fs.current.fresh()
    directories(base, 'root', 'beside/d/deep')
    const { said } = await watching(`${base}/root`, fanotify)
    renameSync(`${base}/beside/d`, `${base}/root/d`)
    expect(await said()).toEqual([' -> d', 'tree d'])
    writeFileSync(`${base}/root/d/deep/f`, '')
    expect(await said()).toEqual(['d/deep/f'])
    renameSync(`${base}/root/d`, `${base}/beside/d`)
    expect(await said()).toEqual(['d -> '])
    writeFileSync(`${base}/beside/d/deep/f`, 'x')
    expect(await said()).toEqual([])
  })

  test('where its root was moved to, it goes on', async () => {
    const base = fs.current.fresh()
    directories(base, 'a/root/d', 'b')
    const { said } = await watching(`${base}/a/root`, fanotify)
    writeFileSync(`${base}/a/root/d/f`, '')
    expect(await said()).toEqual(['d/f'])
    renameSync(`${base}/a`, `${base}/b/a`)
    renameSync(`${base}/b/a/root`, `${base}/b/root`)
    writeFileSync(`${base}/b/root/d/g`, '')
    expect(await said()).toEqual([`${base}/b/root/d/g`])
  })

  test('a root that was removed is lost', async () => {
    const base = fs.current.fresh()
    directories(base, 'root')
    const { said } = await watching(`${base}/root`, fanotify)
    rmdirSync(`${base}/root`)
    expect(await said()).toContain('lost: the root itself was removed')
  })

  test('roots share one group, also one inside another, and each hears its own', async () => {
    const base = fs.current.fresh()
    directories(base, 'x/inner/d', 'y')
    const groups = () => run('sh', '-c', `grep -ls ^fanotify /proc/${process.pid}/fdinfo/* | wc -l`).trim()
    const before = Number(groups())
    const [x, inner, y] = [
      await watching(`${base}/x`, fanotify),
      await watching(`${base}/x/inner`, fanotify),
      await watching(`${base}/y`, fanotify),
    ]
    // One group, which has two descriptors: the event loop's and that which drain reads.
    expect(Number(groups()) - before).toBe(2)
    for (const name of ['x/f', 'x/inner/d/f', 'y/f']) writeFileSync(`${base}/${name}`, '')
    // One of them takes the events of all.
    await x.source.drain()
    expect([await x.said(), await inner.said(), await y.said()]).toEqual([['f', 'inner/d/f'], ['d/f'], ['f']])
    await x.stop()
    writeFileSync(`${base}/x/inner/g`, '')
    expect([await inner.said(), x.hints]).toEqual([['g'], []])
    for (const { stop } of [inner, y]) await stop()
    expect(Number(groups())).toBe(before)
  })

  test('hints come by themselves, without a drain', async () => {
    const base = fs.current.fresh()
    const { hints } = await watching(base, fanotify)
    for (let i = 0; i < 5; i++) {
      writeFileSync(`${base}/f${i}`, '')
      await vi.waitFor(() => expect(hints).toHaveLength(i + 1), 10_000)
    }
  })

  test('whatever another process did before drain was called has been said when it returns', async () => {
    const base = fs.current.fresh()
    const { said } = await watching(base, fanotify)
    for (let round = 0; round < 20; round++) {
      execFileSync('sh', ['-c', `for i in 1 2 3 4 5; do echo x > ${base}/$i; done; mkdir ${base}/d${round}`])
      expect(new Set(await said())).toEqual(new Set(['1', '2', '3', '4', '5', `d${round}`, `tree d${round}`]))
    }
  })

  test('a bounded queue that overflows says that anything may have been missed', async () => {
    const limit = Number(readFileSync('/proc/sys/fs/fanotify/max_queued_events', 'utf8'))
    await withFileSystem('tmpfs', async ({ root }) => {
      const { stop, said } = await watching(root, fanotify, { boundedQueue: true })
      for (let i = 0; i < limit + 10; i++) writeFileSync(`${root}/${i}`, '')
      expect((await said()).at(-1)).toBe('lost: the queue of events overflowed')
      writeFileSync(`${root}/after`, '')
      expect(await said()).toEqual(['after'])
      await stop()
    })
  })

  test('a root that is reached through a bind mount hears of itself, not of what that mount leaves out', async () => {
    const base = fs.current.fresh()
    directories(base, 'whole/part/d', 'mounted')
    mount(`${base}/whole/part`, `${base}/mounted`, '', MS_BIND, '')
    try {
      const { stop, said } = await watching(`${base}/mounted`, fanotify)
      writeFileSync(`${base}/whole/part/d/f`, '')
      writeFileSync(`${base}/whole/g`, '')
      expect(await said()).toEqual(['d/f'])
      await stop()
    } finally {
      unmount(`${base}/mounted`)
    }
  })

  test('after any moves of directories, exactly what happens beneath the root is said', async () => {
    const pick = fc.nat(11)
    const step = fc.record({ what: fc.constantFrom('move', 'write', 'drain'), from: pick, to: pick })
    await fc.assert(
      fc.asyncProperty(fc.array(step, { maxLength: 40 }), async (steps) => {
        const base = fs.current.fresh()
        const paths = ['in', 'out', 'in/a', 'in/b', 'in/a/c', 'out/d', 'out/e', 'out/e/f', 'in/b/g', 'in/b/g/h']
        directories(base, ...paths)
        const { stop, said } = await watching(`${base}/in`, fanotify)
        for (const { what, from, to } of steps) {
          const [old = '', into = ''] = [paths[from % paths.length], paths[to % paths.length]]
          if (what === 'drain') await said()
          else if (what === 'write') writeFileSync(`${base}/${old}/w`, '')
          else if (from % paths.length > 1 && `${into}/`.indexOf(`${old}/`) !== 0) {
            const next = `${into}/${old.slice(old.lastIndexOf('/') + 1)}`
            renameSync(`${base}/${old}`, `${base}/${next}`)
            for (const [at, path] of paths.entries()) {
              if (path === old || path.startsWith(`${old}/`)) paths[at] = next + path.slice(old.length)
            }
          }
        }
        await said()
        for (const path of paths) writeFileSync(`${base}/${path}/last`, '')
        const inside = paths.filter((path) => path === 'in' || path.startsWith('in/'))
        expect((await said()).sort()).toEqual(inside.map((path) => `${path}/last`.slice(3)).sort())
        await stop()
      }),
      { numRuns: 150 },
    )
  })
})

describe.skipIf(!mayMount)('where a mark is refused', () => {
  const start = (root: string) => watching(root, fanotify)

  test('a process without the privilege is told what it lacks', () => {
    const script = `
      import { mkdtempSync } from 'node:fs'
      import { hostPath, openRoot } from './packages/posix/src/index.ts'
      import { whyNotFanotify } from './packages/sync/src/source/fanotify.ts'
      console.log(whyNotFanotify(openRoot(hostPath('/tmp'))))`
    const unprivileged = ['--reuid=65534', '--regid=65534', '--clear-groups', '--inh-caps=-all', '--bounding-set=-all']
    const { stdout, stderr } = spawnSync(
      'setpriv',
      [...unprivileged, process.execPath, '--input-type=module-typescript', '-e', script],
      { encoding: 'utf8' },
    )
    expect({ stdout, stderr }).toMatchObject({ stdout: expect.stringContaining('lacks CAP_SYS_ADMIN') })
  })

  test('a btrfs subvolume has it no way, the top of that file system has', () =>
    withFileSystem('btrfs', async ({ root }) => {
      run('btrfs', 'subvolume', 'create', `${root}/sub`)
      await expect(start(`${root}/sub`)).rejects.toMatchObject({
        code: 'SOURCE_UNAVAILABLE',
        message: expect.stringContaining('btrfs subvolume'),
      })
      await (await start(root)).stop()
    }))

  test('a merged mount itself cannot be watched, since its files cannot be opened by handle', () =>
    withFileSystem('tmpfs', async ({ root }) => {
      directories(root, 'l', 'u', 'w', 'm')
      mountOverlay({ lowers: [`${root}/l`], upper: `${root}/u`, work: `${root}/w` }, plainOptions, `${root}/m`)
      try {
        await expect(start(`${root}/m`)).rejects.toMatchObject({ code: 'SOURCE_UNAVAILABLE' })
      } finally {
        unmount(`${root}/m`)
      }
    }))
})
