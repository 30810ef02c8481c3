import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import type { HostPath } from '@lsync/posix'
import { openSync } from '@lsync/sync'
import { expect, test } from 'vitest'
import { temporary } from '../posix/temporary.ts'

// They share threads, which end with the last of them: none may wait for an answer of a thread that has been ended.
test('syncs of one process that are stopped at the same time all end', async () => {
  const { path } = temporary()
  const copy = async (at: string) => {
    mkdirSync(`${at}/upper`, { recursive: true })
    writeFileSync(`${at}/upper/file`, at)
    const [source, target] = [`${at}/upper` as HostPath, `${at}/target` as HostPath]
    const sync = await openSync({ source, targets: [target], stateDir: `${at}/state`, once: true })
    await sync.flush()
    await sync.stop()
    expect(readFileSync(`${target}/file`, 'utf8')).toBe(at)
  }
  for (let round = 0; round < 6; round++) {
    await Promise.all(Array.from({ length: 10 }, (_, i) => copy(`${path}/${round}-${i}`)))
  }
}, 60_000)
