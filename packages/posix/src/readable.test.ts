import { mkdirSync, writeFileSync } from 'node:fs'
import { expect, test, vi } from 'vitest'
import { temporary } from '../../../test/posix/temporary.ts'
import { FAN_CREATE, FAN_EVENT_ON_CHILD, FAN_ONDIR, fanotifyInit, fanotifyMark, parseFanotify } from './fanotify.ts'
import { close } from './open.ts'
import { watchReadable } from './readable.ts'

async function withWatch(
  use: (path: string, names: string[], watch: ReturnType<typeof watchReadable>) => Promise<void>,
): Promise<void> {
  const { path, fd } = temporary()
  const group = fanotifyInit({ unlimited: false })
  const names: string[] = []
  const watch = watchReadable(
    group,
    65536,
    (bytes) => names.push(...parseFanotify(bytes).map(({ at }) => at?.name as string)),
    (error) => names.push(error.code),
  )
  try {
    fanotifyMark(group, 'add', 'inode', FAN_CREATE | FAN_ONDIR | FAN_EVENT_ON_CHILD, fd)
    await use(path, names, watch)
  } finally {
    watch.close()
    close(group)
  }
}

test('what becomes readable is handed over by the event loop', () =>
  withWatch(async (path, names) => {
    mkdirSync(`${path}/one`)
    await vi.waitFor(() => expect(names).toEqual(['one']), 10_000)
    writeFileSync(`${path}/two`, '')
    await vi.waitFor(() => expect(names).toEqual(['one', 'two']), 10_000)
  }))

test('while paused everything waits in the kernel, and comes with the resumption', () =>
  withWatch(async (path, names, watch) => {
    mkdirSync(`${path}/before`)
    await vi.waitFor(() => expect(names).toEqual(['before']), 10_000)
    watch.pause()
    mkdirSync(`${path}/paused`)
    await new Promise((resolve) => setTimeout(resolve, 50))
    expect(names).toEqual(['before'])
    watch.resume()
    await vi.waitFor(() => expect(names).toEqual(['before', 'paused']), 10_000)
  }))
