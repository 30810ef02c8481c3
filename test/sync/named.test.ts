import {
  appendFileSync,
  chmodSync,
  copyFileSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  renameSync,
  rmSync,
  symlinkSync,
  truncateSync,
  unlinkSync,
  utimesSync,
  writeFileSync,
} from 'node:fs'
import type { HostPath } from '@lsync/posix'
import { openSync, previewSync, type Sync } from '@lsync/sync'
import { describe, expect, test } from 'vitest'
import { useFileSystem } from '../support/image.ts'
import { canMountImages } from '../support/ready.ts'
import { differences, keepWorkers, withSync } from '../support/syncing.ts'
import { mount, unmount } from '../support/system.ts'
import { readTree } from '../support/tree.ts'

describe.skipIf(!canMountImages())('a sync', () => {
  const disk = useFileSystem('ext4')
  keepWorkers(disk)

  function site() {
    const at = disk.current.fresh()
    mkdirSync(`${at}/u`)
    const request = { source: `${at}/u` as HostPath, targets: [`${at}/t` as HostPath], stateDir: `${at}/state` }
    return { at, upper: `${at}/u`, target: `${at}/t`, request }
  }

  /** What a flush after a change sends, with the target equal afterwards. */
  async function sent(sync: Sync, { upper, target }: { upper: string; target: string }, change: () => void) {
    const before = sync.status.targets[0]
    change()
    expect(await sync.flush()).toMatchObject({ isSettled: true, failures: [] })
    expect(differences(upper, target)).toEqual([])
    const after = sync.status.targets[0]
    return { files: (after?.files ?? 0) - (before?.files ?? 0), bytes: (after?.bytes ?? 0) - (before?.bytes ?? 0) }
  }

  test.each<[string, (upper: string, file: string) => void]>([
    [
      'gone',
      (upper, file) => {
        linkSync(file, `${upper}/link`)
        writeFileSync(`${upper}/link`, 'through a link')
        unlinkSync(`${upper}/link`)
      },
    ],
    [
      'that of another file',
      (upper, file) => {
        rmSync(`${upper}/link`, { force: true })
        linkSync(file, `${upper}/link`)
        writeFileSync(`${upper}/link`, 'through a link')
        unlinkSync(`${upper}/link`)
        writeFileSync(`${upper}/link`, 'another file')
      },
    ],
    [
      'renamed, and gone then',
      (upper, file) => {
        linkSync(file, `${upper}/link`)
        writeFileSync(`${upper}/link`, 'through a link')
        renameSync(`${upper}/link`, `${upper}/d/again`)
        unlinkSync(`${upper}/d/again`)
      },
    ],
  ])('sees what was written through a name of a file that is %s when somebody looks', async (_, write) => {
    const { upper, target, request } = site()
    mkdirSync(`${upper}/d`)
    for (const name of ['one', 'two']) writeFileSync(`${upper}/d/${name}`, 'before')
    linkSync(`${upper}/d/two`, `${upper}/d/second`)
    await withSync({ ...request, sourceChoice: 'fanotify' }, async (sync) => {
      await sync.flush()
      sync.pause()
      for (const name of ['one', 'second']) write(upper, `${upper}/d/${name}`)
      await sync.flush()
      expect(differences(upper, target)).toEqual([])
      for (const name of ['one', 'two']) expect(readFileSync(`${target}/d/${name}`, 'latin1')).toBe('through a link')
    })
  })

  test('sends nothing for what was only touched, moved or linked, and of a big file its changed blocks', async () => {
    const where = site()
    const { upper, request } = where
    mkdirSync(`${upper}/d/e`, { recursive: true })
    for (let index = 0; index < 50; index++) writeFileSync(`${upper}/d/e/f${index}`, `content ${index}`)
    writeFileSync(`${upper}/big`, Buffer.alloc(20 << 20, 'x'))
    await withSync(request, async (sync) => {
      await sync.flush()
      const change = (what: () => void) => sent(sync, where, what)
      expect(await change(() => utimesSync(`${upper}/d/e/f1`, 1, 2))).toMatchObject({ bytes: 0 })
      expect(await change(() => chmodSync(`${upper}/big`, 0o600))).toMatchObject({ bytes: 0 })
      expect(await change(() => renameSync(`${upper}/d`, `${upper}/moved`))).toMatchObject({ bytes: 0 })
      expect(await change(() => renameSync(`${upper}/moved/e/f2`, `${upper}/moved/e/f3`))).toMatchObject({ bytes: 0 })
      expect(await change(() => linkSync(`${upper}/moved/e/f4`, `${upper}/linked`))).toMatchObject({ bytes: 0 })
      const newDirectory = () => {
        mkdirSync(`${upper}/new/inner`, { recursive: true })
        renameSync(`${upper}/moved`, `${upper}/new/inner/moved`)
        renameSync(`${upper}/big`, `${upper}/new/big`)
      }
      expect(await change(newDirectory)).toMatchObject({ bytes: 0 })
      const { bytes } = await change(() => appendFileSync(`${upper}/new/big`, 'y'))
      expect(bytes).toBeGreaterThan(0)
      expect(bytes).toBeLessThanOrEqual(2 * 128 * 1024)
    })
  })

  test('keeps no journal open that is damaged', async () => {
    const { at, request } = site()
    await withSync(request, (sync) => sync.flush())
    const [name] = readdirSync(`${at}/state/targets`)
    const journal = `${at}/state/targets/${name}/journal`
    writeFileSync(journal, 'no\nline\n')
    await expect(openSync(request)).rejects.toMatchObject({ code: 'SYNC_JOURNAL_DAMAGED' })
    const open = readdirSync('/proc/self/fd').map((fd) => {
      try {
        return readlinkSync(`/proc/self/fd/${fd}`)
      } catch {
        return ''
      }
    })
    expect(open).not.toContain(journal)
  })

  test.each<[string, (upper: string) => void]>([
    [
      'a directory leaves another that goes, without a file that it had',
      (u) => {
        unlinkSync(`${u}/top/mid/box/tool/f`)
        renameSync(`${u}/top/mid/box`, `${u}/box`)
        rmSync(`${u}/top`, { recursive: true })
      },
    ],
    [
      'a directory moves into a new one, and another to where one in it was',
      (u) => {
        mkdirSync(`${u}/new/dir`, { recursive: true })
        renameSync(`${u}/top/mid/box`, `${u}/new/dir/box`)
        rmSync(`${u}/new/dir/box/tool`, { recursive: true })
        renameSync(`${u}/other`, `${u}/new/dir/box/tool`)
        rmSync(`${u}/top`, { recursive: true })
      },
    ],
  ])('carries over, as it happens and after a restart: %s', async (_, change) => {
    for (const isFollowed of [true, false]) {
      const { upper, target, request } = site()
      mkdirSync(`${upper}/top/mid/box/tool/inner`, { recursive: true })
      writeFileSync(`${upper}/top/mid/box/tool/f`, 'x')
      mkdirSync(`${upper}/other`)
      await withSync(request, async (sync) => {
        await sync.flush()
        if (!isFollowed) return
        change(upper)
        expect(await sync.flush()).toMatchObject({ isSettled: true, failures: [] })
      })
      if (!isFollowed) change(upper)
      await withSync(request, (sync) => sync.flush())
      expect(differences(upper, target)).toEqual([])
    }
  })

  test.each<[string, (upper: string) => void]>([
    ['files that change places', (u) => swap(`${u}/a/f0`, `${u}/b/f1`)],
    ['directories that change places', (u) => swap(`${u}/a`, `${u}/b`)],
    [
      'a chain of renames',
      (u) => {
        renameSync(`${u}/a`, `${u}/c`)
        renameSync(`${u}/c`, `${u}/d`)
      },
    ],
    [
      'a directory that becomes a symlink',
      (u) => {
        rmSync(`${u}/a`, { recursive: true })
        symlinkSync('b', `${u}/a`)
      },
    ],
    [
      'a file that becomes a directory',
      (u) => {
        unlinkSync(`${u}/a/f0`)
        mkdirSync(`${u}/a/f0`)
        writeFileSync(`${u}/a/f0/x`, 'x')
      },
    ],
    [
      'a directory moved into one that was in it',
      (u) => {
        renameSync(`${u}/b/in`, `${u}/out`)
        renameSync(`${u}/b`, `${u}/out/b`)
      },
    ],
    [
      'hard links added and split',
      (u) => {
        linkSync(`${u}/a/f0`, `${u}/l1`)
        linkSync(`${u}/a/f1`, `${u}/l2`)
        unlinkSync(`${u}/a/f1`)
        copyFileSync(`${u}/l1`, `${u}/c`)
        renameSync(`${u}/c`, `${u}/l1`)
      },
    ],
    ['a large sparse file', (u) => truncateSync(`${u}/a/f0`, 200 << 20)],
    [
      'a file that is replaced by a rename',
      (u) => {
        writeFileSync(`${u}/tmp`, 'new')
        renameSync(`${u}/tmp`, `${u}/a/f0`)
      },
    ],
  ])('carries over %s', async (_, change) => {
    const where = site()
    for (const directory of ['a', 'b', 'b/in']) {
      mkdirSync(`${where.upper}/${directory}`)
      for (let index = 0; index < 3; index++)
        writeFileSync(`${where.upper}/${directory}/f${index}`, `${directory}${index}`)
    }
    await withSync(where.request, async (sync) => {
      await sync.flush()
      await sent(sync, where, () => change(where.upper))
    })
  })

  test('to several targets keeps an index for each, and one that is full does not hold up the others', async () => {
    const { at, upper, target, request } = site()
    mkdirSync(`${at}/small`)
    mount('tmpfs', `${at}/small`, 'tmpfs', 0, 'size=1m')
    try {
      writeFileSync(`${upper}/f`, 'f')
      const targets = [target as HostPath, `${at}/small` as HostPath]
      await withSync({ ...request, targets }, async (sync) => {
        await sync.flush()
        const problems: string[] = []
        sync.events.on('problem', ({ target: which, error }) => problems.push(`${which}: ${error.message}`))
        writeFileSync(`${upper}/large`, Buffer.alloc(3 << 20, 'x'))
        await expect(sync.flush()).rejects.toMatchObject({ code: 'BATCH_FAILED' })
        await expect.poll(() => differences(upper, target), { timeout: 20_000 }).toEqual([])
        writeFileSync(`${upper}/large`, 'small now')
        await expect.poll(() => sync.flush().then(() => 'done', String), { timeout: 30_000 }).toBe('done')
        const inside = /^\.lsync-[0-9a-f]{32}$/
        const there = readdirSync(`${at}/small`).filter((name) => !inside.test(name))
        expect(there.sort()).toEqual(['f', 'large'])
        expect(readFileSync(`${at}/small/large`, 'utf8')).toBe('small now')
        expect(differences(upper, target)).toEqual([])
      })
    } finally {
      unmount(`${at}/small`)
    }
  })

  test('leaves out what is excluded, and tells beforehand what it would do', async () => {
    const { upper, target, request } = site()
    for (const path of ['keep', 'cache/deep', 'a/cache']) mkdirSync(`${upper}/${path}`, { recursive: true })
    for (const path of ['keep/x.tmp', 'keep/y.tmp', 'cache/deep/f', 'a/cache/f', 'a/f'])
      writeFileSync(`${upper}/${path}`, path)
    const filtered = { ...request, exclude: ['cache/', '*.tmp'], include: ['y.tmp'] }
    const described = { description: target }
    expect(await previewSync(filtered, described)).toEqual([{ path: '', change: 'new' }])
    await withSync({ ...filtered, once: true }, (sync) => sync.flush())
    expect([...readTree(target).keys()]).toEqual(['', 'a', 'a/f', 'keep', 'keep/y.tmp'])
    expect(await previewSync(filtered, described)).toEqual([])
    writeFileSync(`${upper}/a/f`, 'changed')
    unlinkSync(`${upper}/keep/y.tmp`)
    mkdirSync(`${upper}/fresh`)
    const found = (await previewSync(filtered, described)).filter(({ path }) => !['a', 'keep', ''].includes(path))
    expect(found).toEqual([
      { path: 'a/f', change: 'changed' },
      { path: 'fresh', change: 'new' },
      { path: 'keep/y.tmp', change: 'gone' },
    ])
  })

  test('takes a target that holds other things only when told so, and then makes it equal', async () => {
    const { upper, target, request } = site()
    mkdirSync(`${upper}/d`)
    writeFileSync(`${upper}/d/f`, 'f')
    mkdirSync(`${target}/d/old`, { recursive: true })
    writeFileSync(`${target}/precious`, 'precious')
    await expect(openSync({ ...request, once: true })).rejects.toMatchObject({ code: 'TARGET_NOT_OURS' })
    expect(readFileSync(`${target}/precious`, 'utf8')).toBe('precious')
    await withSync({ ...request, once: true, adopt: true }, (sync) => sync.flush())
    expect(differences(upper, target)).toEqual([])
    // The state of the upper is lost: the target is known, and not by this index.
    rmSync(`${request.stateDir}`, { recursive: true })
    writeFileSync(`${target}/d/stray`, 'x')
    await expect(openSync({ ...request, once: true })).rejects.toMatchObject({ code: 'TARGET_NOT_OURS' })
    await withSync({ ...request, once: true, adopt: true }, (sync) => sync.flush())
    expect(differences(upper, target)).toEqual([])
  })

  test('refuses state and targets inside the upper', async () => {
    const { upper, request } = site()
    for (const wrong of [{ stateDir: `${upper}/state` }, { targets: [`${upper}/t` as HostPath] }, { targets: [] }]) {
      await expect(openSync({ ...request, ...wrong })).rejects.toMatchObject({ code: 'SYNC_REQUEST_INVALID' })
    }
  })
})

function swap(one: string, other: string): void {
  renameSync(one, `${one}.aside`)
  renameSync(other, one)
  renameSync(`${one}.aside`, other)
}
