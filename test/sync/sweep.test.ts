import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { expect, test, vi } from 'vitest'
import { hostPath } from '../../packages/posix/src/index.ts'
import { openSync } from '../../packages/sync/src/index.ts'
import { mayMount } from '../posix/privileges.ts'
import { temporary } from '../posix/temporary.ts'
import { mount, unmount } from '../support/system.ts'

test.skipIf(!mayMount)('a change that no source tells of is carried over by the sweep, wherever it lies', async () => {
  const { path } = temporary()
  for (const name of ['u', 't', 's']) mkdirSync(`${path}/${name}`)
  mount('tmpfs', `${path}/u`, 'tmpfs', 0, 'size=16m')
  try {
    for (const name of ['a/b/c', 'd']) mkdirSync(`${path}/u/${name}`, { recursive: true })
    for (const name of ['a/b/c/f', 'd/g']) writeFileSync(`${path}/u/${name}`, 'before')
    const sync = await openSync({
      source: hostPath(`${path}/u`),
      targets: [hostPath(`${path}/t`)],
      stateDir: `${path}/s`,
      tickMs: 20,
      sweepMs: 2000,
      heedsPressure: false,
      // Looks once at the start and then not again for an hour: as blind as a source can be.
      sourceChoice: 'poll',
      pollIntervalMs: 3_600_000,
    })
    try {
      await sync.flush()
      writeFileSync(`${path}/u/a/b/c/f`, 'changed')
      writeFileSync(`${path}/u/new`, 'new')
      await vi.waitFor(() => {
        expect(readFileSync(`${path}/t/a/b/c/f`, 'utf8')).toBe('changed')
        expect(readFileSync(`${path}/t/new`, 'utf8')).toBe('new')
      }, 30_000)
    } finally {
      await sync.stop()
    }
  } finally {
    unmount(`${path}/u`)
  }
})
