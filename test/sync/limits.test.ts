import { mkdirSync, readFileSync, statSync, writeFileSync } from 'node:fs'
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
