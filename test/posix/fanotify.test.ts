import { execFileSync } from 'node:child_process'
import { mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import {
  type ByteString,
  FAN_ATTRIB,
  FAN_CLOSE_WRITE,
  FAN_CREATE,
  FAN_DELETE,
  FAN_MODIFY,
  FAN_ONDIR,
  FAN_RENAME,
  type FanotifyEvent,
  fanotifyInit,
  fanotifyMark,
  handleAt,
  handleKey,
  hostPath,
  mountOverlay,
  O_PATH,
  openByHandle,
  openRoot,
  pathOfFd,
  readFanotify,
  statFd,
  unmount,
  withFd,
} from '../../packages/posix/src/index.ts'
import { useFileSystem, withFileSystem } from '../support/image.ts'
import { mayMount } from './privileges.ts'

const MASK = FAN_CREATE | FAN_DELETE | FAN_RENAME | FAN_CLOSE_WRITE | FAN_MODIFY | FAN_ATTRIB | FAN_ONDIR

/** Runs `act` under a mark on the whole file system of `root` and gives the events that it made. */
function eventsOf(root: string, act: () => void, unlimited = true): FanotifyEvent[] {
  return withFd(openRoot(hostPath(root)), (fd) =>
    withFd(fanotifyInit({ unlimited }), (group) => {
      fanotifyMark(group, 'add', 'filesystem', MASK, fd)
      act()
      const events: FanotifyEvent[] = []
      for (;;) {
        const more = readFanotify(group)
        if (more.length === 0) return events
        events.push(...more)
      }
    }),
  )
}

function keyOf(path: string): string {
  return withFd(openRoot(hostPath(path)), (fd) =>
    handleKey(handleAt(fd, '') as NonNullable<ReturnType<typeof handleAt>>),
  )
}

describe.skipIf(!mayMount).each(['tmpfs', 'ext4'] as const)('a file system mark on %s', (kind) => {
  const fs = useFileSystem(kind)

  test('a directory made a moment ago already reports what happens in it', () => {
    const root = fs.current.fresh()
    const events = eventsOf(root, () => {
      mkdirSync(`${root}/a/b`, { recursive: true })
      writeFileSync(`${root}/a/b/f`, 'x')
    })
    const inside = events.filter(({ at }) => at?.name === 'f')
    expect(inside.reduce((sum, { mask }) => sum | mask, 0)).toBe(FAN_CREATE | FAN_MODIFY | FAN_CLOSE_WRITE)
    for (const { at } of inside) expect(at && handleKey(at.directory)).toBe(keyOf(`${root}/a/b`))
    expect(inside[0]?.pid).toBe(process.pid)
    // The handle of the file itself comes along, so that it can be told from a later file of the same name.
    const target = withFd(openRoot(hostPath(`${root}/a/b`)), (fd) => handleAt(fd, 'f' as ByteString))
    expect(inside[0]?.target).toEqual(target)
  })

  test('a rename is one event with both directories and both names', () => {
    const root = fs.current.fresh()
    for (const name of ['one', 'two', 'one/dir']) mkdirSync(`${root}/${name}`)
    const odd = Buffer.concat([Buffer.from(`${root}/two/`), Buffer.from([0xff, 0x0a])])
    writeFileSync(`${root}/one/f`, '')
    const events = eventsOf(root, () => {
      renameSync(`${root}/one/f`, odd)
      renameSync(`${root}/one/dir`, `${root}/two/dir2`)
    }).filter(({ mask }) => (mask & FAN_RENAME) !== 0)
    expect(events.map(({ from, to, isDirectory }) => [from?.name, to?.name, isDirectory])).toEqual([
      ['f', '\xff\n', false],
      ['dir', 'dir2', true],
    ])
    for (const { from, to } of events) {
      expect([from && handleKey(from.directory), to && handleKey(to.directory)]).toEqual([
        keyOf(`${root}/one`),
        keyOf(`${root}/two`),
      ])
    }
  })

  test('the directory of an event is opened by its handle, wherever it has moved, and is undefined once gone', () => {
    const root = fs.current.fresh()
    mkdirSync(`${root}/before`)
    const [event] = eventsOf(root, () => writeFileSync(`${root}/before/f`, ''))
    const directory = event?.at?.directory as NonNullable<ReturnType<typeof handleAt>>
    renameSync(`${root}/before`, `${root}/after`)
    withFd(openRoot(hostPath(root)), (fd) => {
      withFd(openByHandle(fd, directory, O_PATH) as number, (found) => {
        expect(pathOfFd(found)).toBe(`${root}/after`)
        expect(statFd(found).isDirectory).toBe(true)
      })
      rmSync(`${root}/after`, { recursive: true })
      expect(openByHandle(fd, directory, O_PATH)).toBeUndefined()
    })
  })

  test('a changed mode is reported for the name, and for a directory with the name "."', () => {
    const root = fs.current.fresh()
    mkdirSync(`${root}/d`)
    const events = eventsOf(root, () => execFileSync('chmod', ['700', `${root}/d`])).filter(
      ({ mask }) => (mask & FAN_ATTRIB) !== 0,
    )
    const names = events.map(({ at }) => (at === undefined ? '' : `${handleKey(at.directory)}/${at.name}`))
    const asChild = `${keyOf(root)}/d`
    const asItself = `${keyOf(`${root}/d`)}/.`
    expect(names.length).toBeGreaterThan(0)
    expect(names.every((name) => name === asChild || name === asItself)).toBe(true)
  })
})

describe.skipIf(!mayMount)('fanotify', () => {
  test('a full queue says so once, after the events that it kept', async () => {
    await withFileSystem('tmpfs', ({ root }) => {
      const limit = Number(readFileSync('/proc/sys/fs/fanotify/max_queued_events', 'utf8'))
      const make = () => {
        for (let i = 0; i < limit + 100; i++) mkdirSync(`${root}/${i}`)
      }
      const events = eventsOf(root, make, false)
      expect(events.filter(({ overflow }) => overflow)).toHaveLength(1)
      expect(events.at(-1)).toMatchObject({ overflow: true })
      expect(events.at(-1)).not.toHaveProperty('at')
      expect(events).toHaveLength(limit + 1)
    })
  }, 30_000)

  test('an unlimited queue keeps them all', async () => {
    await withFileSystem('tmpfs', ({ root }) => {
      const limit = Number(readFileSync('/proc/sys/fs/fanotify/max_queued_events', 'utf8'))
      const events = eventsOf(root, () => {
        for (let i = 0; i < limit + 100; i++) mkdirSync(`${root}/${i}`)
      })
      expect(events).toHaveLength(limit + 100)
    })
  }, 30_000)

  test('what is written through an overlay is reported on the file system of its upper', async () => {
    await withFileSystem('ext4', ({ root }) => {
      for (const name of ['l', 'u', 'w', 'm']) mkdirSync(`${root}/${name}`)
      const host = (name: string) => hostPath(`${root}/${name}`)
      mountOverlay({ lowers: [host('l')], upper: host('u'), work: host('w') }, host('m'))
      try {
        const upper = keyOf(`${root}/u`)
        const events = eventsOf(root, () => writeFileSync(`${root}/m/f`, 'x'))
        const mine = events.filter(({ at }) => at?.name === 'f' && handleKey(at.directory) === upper)
        expect(mine.reduce((sum, { mask }) => sum | mask, 0) & FAN_CLOSE_WRITE).toBe(FAN_CLOSE_WRITE)
      } finally {
        unmount(host('m'))
      }
    })
  })
})
