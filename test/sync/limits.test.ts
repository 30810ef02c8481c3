import { mkdirSync, readFileSync, renameSync, statSync, utimesSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import type { HostPath } from '@lsync/posix'
import { openSync } from '@lsync/sync'
import { expect, test } from 'vitest'
import { temporary } from '../posix/temporary.ts'

const RATE = 8 << 20

test('one large file is written at the rate that is to be held, not at once and paid for afterwards', async () => {
  const { path: at } = temporary()
  mkdirSync(`${at}/u`)
  const content = Buffer.alloc(3 * RATE, 'content')
  writeFileSync(`${at}/u/large`, content)
  const startedAt = performance.now()
  const sync = await openSync({
    source: `${at}/u` as HostPath,
    targets: [`${at}/t` as HostPath],
    stateDir: `${at}/state`,
    bytesPerSecond: RATE,
    once: true,
  })
  try {
    const flushed = sync.flush()
    const arrived = () => statSync(`${at}/t/large`, { throwIfNoEntry: false })?.size ?? 0
    while (arrived() < content.length) await delay(20)
    // A quarter of a second's worth is there at the start, and pieces of 1 MB are paid for after they are written.
    expect(performance.now() - startedAt).toBeGreaterThan(2000)
    await flushed
    expect(readFileSync(`${at}/t/large`).equals(content)).toBe(true)
    expect(performance.now() - startedAt).toBeLessThan(60_000)
  } finally {
    await sync.stop()
  }
})

test('more changes than a batch holds are carried over in several, and what moves from one to another arrives', async () => {
  const { path: at } = temporary()
  const names = Array.from({ length: 33_500 }, (_, index) => `d${index % 20}/f${index}`)
  for (let index = 0; index < 20; index++) mkdirSync(`${at}/u/d${index}`, { recursive: true })
  for (const name of names) writeFileSync(`${at}/u/${name}`, '')
  writeFileSync(`${at}/u/d0/content`, 'content')
  const request = { source: `${at}/u` as HostPath, targets: [`${at}/t` as HostPath], stateDir: `${at}/state` }
  const first = await openSync({ ...request, once: true })
  await first.flush()
  await first.stop()
  for (const name of names) utimesSync(`${at}/u/${name}`, 1, 1)
  renameSync(`${at}/u/d0/content`, `${at}/u/d19/content`)
  const sync = await openSync({ ...request, once: true })
  try {
    const before = sync.status.targets[0]?.checkpoint?.sequence ?? 0
    const { isSettled, checkpoints } = await sync.flush()
    expect(isSettled).toBe(true)
    expect((checkpoints[0]?.sequence ?? 0) - before).toBeGreaterThanOrEqual(2)
    expect(names.filter((name) => statSync(`${at}/t/${name}`).mtimeMs !== 1000)).toEqual([])
    expect(readFileSync(`${at}/t/d19/content`, 'utf8')).toBe('content')
    expect(statSync(`${at}/t/d0/content`, { throwIfNoEntry: false })).toBeUndefined()
  } finally {
    await sync.stop()
  }
})
