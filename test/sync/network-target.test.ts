import { existsSync, mkdirSync, readdirSync, writeFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { hostPath } from '../../packages/posix/src/index.ts'
import { openSync } from '../../packages/sync/src/index.ts'
import { workers } from '../../packages/sync/src/pool.ts'
import { hasBindfs, mayMount } from '../posix/privileges.ts'
import { temporary } from '../posix/temporary.ts'
import { run, unmount } from '../support/system.ts'

const mayUseFuse = hasBindfs()

/** Carries 200 directories to a target, and gives the number of threads that had a part in it. */
async function threadsFor(path: string, target: string): Promise<number> {
  for (let i = 0; i < 200; i++) {
    mkdirSync(`${path}/u/${i}`, { recursive: true })
    for (let file = 0; file < 5; file++) writeFileSync(`${path}/u/${i}/${file}`, 'content')
  }
  const sync = await openSync({
    source: hostPath(`${path}/u`),
    targets: [hostPath(target)],
    stateDir: `${path}/state`,
    once: true,
    heedsPressure: false,
  })
  try {
    expect(await sync.flush()).toMatchObject({ isSettled: true, failures: [] })
    expect(readdirSync(`${target}/199`)).toHaveLength(5)
    return workers.width
  } finally {
    await sync.stop()
  }
}

test.skipIf(!mayMount || !mayUseFuse)(
  'a target on a network file system gets more threads than one on a disk',
  async () => {
    const { path } = temporary()
    for (const name of ['store', 'mounted']) mkdirSync(`${path}/${name}`)
    run('bindfs', `${path}/store`, `${path}/mounted`)
    try {
      expect(await threadsFor(path, `${path}/mounted/t`)).toBeGreaterThan(2)
    } finally {
      unmount(`${path}/mounted`)
    }
    expect(existsSync(`${path}/store/t/199`)).toBe(true)
    const local = temporary()
    expect(await threadsFor(local.path, `${local.path}/t`)).toBe(2)
  },
)
