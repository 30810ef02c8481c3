import { mkdirSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { temporary } from '../../../test/posix/temporary.ts'
import type { ByteString } from './bytes.ts'
import {
  awaitReadable,
  FAN_CLOSE_WRITE,
  FAN_CREATE,
  FAN_DELETE,
  FAN_EVENT_ON_CHILD,
  FAN_MOVED_FROM,
  FAN_MOVED_TO,
  FAN_ONDIR,
  FAN_Q_OVERFLOW,
  fanotifyInit,
  fanotifyMark,
  parseFanotify,
  readFanotify,
} from './fanotify.ts'
import { handleAt, handleKey } from './handle.ts'
import { withFd } from './open.ts'

const NAMES = FAN_CREATE | FAN_DELETE | FAN_MOVED_FROM | FAN_MOVED_TO | FAN_CLOSE_WRITE | FAN_ONDIR | FAN_EVENT_ON_CHILD

describe('a mark on one directory, which needs no privilege', () => {
  test('events name the directory by the handle that handleAt gives', async () => {
    const { path, fd } = temporary()
    const { events } = await withGroup(fd, async (group) => {
      mkdirSync(`${path}/d`)
      writeFileSync(Buffer.concat([Buffer.from(`${path}/`), Buffer.from([0xff, 0x0a])]), 'x')
      renameSync(`${path}/d`, `${path}/e`)
      rmSync(`${path}/e`, { recursive: true })
      expect(await awaitReadable(group, 1000)).toBe(true)
      return { events: readFanotify(group) }
    })
    const here = handleAt(fd, '')
    for (const { at } of events) expect(handleKey(at?.directory as never)).toBe(handleKey(here as never))
    const bits = (name: string) =>
      events.filter(({ at }) => at?.name === name).reduce((sum, { mask }) => sum | mask, 0) & ~FAN_ONDIR
    expect(bits('d')).toBe(FAN_CREATE | FAN_MOVED_FROM)
    expect(bits('e')).toBe(FAN_MOVED_TO | FAN_DELETE)
    expect(bits('\xff\n')).toBe(FAN_CREATE | FAN_CLOSE_WRITE)
    expect(events.find(({ at }) => at?.name === 'd')?.isDirectory).toBe(true)
  })

  test('without events there is nothing to read, and waiting ends with the timeout', async () => {
    const { fd } = temporary()
    await withGroup(fd, async (group) => {
      expect(readFanotify(group)).toEqual([])
      expect(await awaitReadable(group, 10)).toBe(false)
    })
  })

  test('a mark that is removed is silent', async () => {
    const { path, fd } = temporary()
    await withGroup(fd, async (group) => {
      fanotifyMark(group, 'remove', 'inode', NAMES, fd)
      writeFileSync(`${path}/f`, '')
      expect(readFanotify(group)).toEqual([])
    })
  })
})

async function withGroup<T>(fd: number, use: (group: number) => Promise<T>): Promise<T> {
  const group = fanotifyInit({ unlimited: false })
  try {
    fanotifyMark(group, 'add', 'inode', NAMES, fd)
    return await use(group)
  } finally {
    withFd(group, () => {})
  }
}

describe('parseFanotify', () => {
  const head = (length: number, mask: number) => {
    const buffer = Buffer.alloc(24)
    buffer.writeUInt32LE(length, 0)
    buffer[4] = 3
    buffer.writeUInt16LE(24, 6)
    buffer.writeUInt32LE(mask, 8)
    return buffer
  }

  test('an overflow says so and nothing else, whatever records follow', () => {
    expect(parseFanotify(Buffer.concat([head(44, FAN_Q_OVERFLOW), Buffer.alloc(20)]))).toEqual([
      { mask: FAN_Q_OVERFLOW, pid: 0, overflow: true, isDirectory: false },
    ])
  })

  test('records of unknown types are skipped', () => {
    const unknown = Buffer.from([99, 0, 8, 0, 1, 2, 3, 4])
    expect(parseFanotify(Buffer.concat([head(32, FAN_CREATE), unknown, head(24, FAN_DELETE)]))).toMatchObject([
      { mask: FAN_CREATE },
      { mask: FAN_DELETE },
    ])
  })

  test('another version of the format is refused', () => {
    const buffer = head(24, FAN_CREATE)
    buffer[4] = 9
    expect(() => parseFanotify(buffer)).toThrowError(expect.objectContaining({ code: 'EPROTO' }))
  })

  test('a name that is padded with zeros ends at the first', () => {
    const record = Buffer.alloc(40)
    record[0] = 2
    record.writeUInt16LE(40, 2)
    record.writeUInt32LE(8, 12)
    record.write('name', 28)
    expect(parseFanotify(Buffer.concat([head(64, FAN_CREATE), record]))[0]?.at?.name).toBe('name' as ByteString)
  })
})
