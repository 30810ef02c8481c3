import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import type { HostPath } from '@lsync/posix'
import type { Sync, SyncRequest } from '@lsync/sync'
import fc from 'fast-check'
import { describe, expect, test, vi } from 'vitest'
import { mayMount } from '../posix/privileges.ts'
import { temporary } from '../posix/temporary.ts'
import { useFileSystem } from '../support/image.ts'
import { anyOperations, applyOperations } from '../support/operations.ts'
import { canMountImages } from '../support/ready.ts'
import { runs } from '../support/runs.ts'
import { differences, hidesWrites, keepWorkers, withFollowed, withSync } from '../support/syncing.ts'
import { mount, unmount } from '../support/system.ts'

const WAIT = { timeout: 30_000, interval: 20 }

/** 300 directories of ten files, which take 15 s at the rate of `slowly`. */
function build(upper: string): void {
  for (let index = 0; index < 300; index++) {
    mkdirSync(`${upper}/d${index}/a/b/c`, { recursive: true })
    for (let file = 0; file < 10; file++) writeFileSync(`${upper}/d${index}/f${file}`, 'before')
    writeFileSync(`${upper}/d${index}/a/b/c/f`, 'before')
  }
}

function slowly(at: string): SyncRequest {
  return {
    source: `${at}/u` as HostPath,
    targets: [`${at}/t` as HostPath],
    stateDir: `${at}/state`,
    operationsPerSecond: 200,
    maxLagMs: 1000,
  }
}

const leftOf = (sync: Sync): number => sync.status.targets[0]?.queuedDirectories ?? 0
const filesOf = (sync: Sync): number => sync.status.targets[0]?.files ?? 0

function contentOf(path: string): string {
  return existsSync(path) ? readFileSync(path, 'utf8') : ''
}

describe.skipIf(!canMountImages())('while a long first pass goes on', () => {
  const disk = useFileSystem('ext4')
  keepWorkers(disk)

  test('what changes where it has been, and where it has not, does not wait for its end', async () => {
    const at = disk.current.fresh()
    build(`${at}/u`)
    await withSync(slowly(at), async (sync) => {
      await vi.waitFor(() => expect(filesOf(sync)).toBeGreaterThan(50), WAIT)
      const names = readdirSync(`${at}/u`)
      const reached = names.filter((name) => existsSync(`${at}/t/${name}/f9`))
      const unreached = names.filter((name) => !existsSync(`${at}/t/${name}/f9`))
      expect(unreached.length).toBeGreaterThan(100)
      // The pass begins at one end of the list, so the middle of what is left is far from it.
      const [one, other] = [reached[0] as string, unreached[unreached.length >> 1] as string]
      writeFileSync(`${at}/u/${one}/f3`, 'changed')
      writeFileSync(`${at}/u/${other}/a/b/c/f`, 'changed')
      mkdirSync(`${at}/u/${other}/a/new`)
      writeFileSync(`${at}/u/${other}/a/new/f`, 'changed')
      await vi.waitFor(() => {
        for (const path of [`${one}/f3`, `${other}/a/b/c/f`, `${other}/a/new/f`]) {
          expect(contentOf(`${at}/t/${path}`), path).toBe('changed')
        }
      }, WAIT)
      expect(leftOf(sync)).toBeGreaterThan(50)
    })
  })

  test('directories that move with what it has not reached end up where they are', async () => {
    const at = disk.current.fresh()
    build(`${at}/u`)
    await withSync({ ...slowly(at), operationsPerSecond: 1500 }, async (sync) => {
      await vi.waitFor(() => expect(filesOf(sync)).toBeGreaterThan(50), WAIT)
      // Known by now, and most of them not carried over.
      for (let index = 0; index < 300; index += 3) {
        const from = `${at}/u/d${index}`
        if (index % 2 === 0) {
          mkdirSync(`${at}/u/in/${index}`, { recursive: true })
          renameSync(from, `${at}/u/in/${index}/moved`)
        } else if (index % 5 === 0) rmSync(from, { recursive: true })
        else {
          renameSync(`${from}/a/b`, `${at}/u/b${index}`)
          renameSync(from, `${at}/u/b${index}/back`)
        }
        if (index % 60 === 0) await delay(200)
      }
      expect(leftOf(sync)).toBeGreaterThan(0)
      expect(await sync.flush()).toMatchObject({ isSettled: true, failures: [] })
      expect(differences(`${at}/u`, `${at}/t`)).toEqual([])
    })
  })

  test('whatever is done meanwhile, a target equals the upper afterwards', async () => {
    const options = { namespace: 'trusted', redirectDir: 'on', metacopy: true, index: false } as const
    await fc.assert(
      fc.asyncProperty(
        anyOperations(0, 20),
        fc.array(anyOperations(1, 12), { minLength: 6, maxLength: 12, size: 'max' }),
        async (bottom, bursts) => {
          const at = disk.current.fresh()
          await withFollowed(at, bottom, options, async ({ merged, upper, target, state }) => {
            for (const burst of bursts) applyOperations(merged, burst)
            for (let index = 0; index < 40; index++) {
              mkdirSync(`${merged}/zz${index}/deep`, { recursive: true })
              writeFileSync(`${merged}/zz${index}/deep/f`, 'f')
            }
            const request = { source: upper, targets: [target], stateDir: state, operationsPerSecond: 80, maxLagMs: 20 }
            await withSync(request, async (sync) => {
              for (const burst of bursts) {
                applyOperations(merged, burst)
                await delay(100)
              }
              const report = await sync.flush({ sweep: bursts.some(hidesWrites) })
              expect(differences(upper, target)).toEqual([])
              expect(report).toMatchObject({ isSettled: true, failures: [] })
            })
          })
        },
      ),
      runs(5),
    )
  })

  test('a pause stops it where it is, and it goes on from there', async () => {
    const at = disk.current.fresh()
    build(`${at}/u`)
    await withSync({ ...slowly(at), operationsPerSecond: 2000 }, async (sync) => {
      await vi.waitFor(() => expect(filesOf(sync)).toBeGreaterThan(50), WAIT)
      sync.pause()
      await vi.waitFor(() => expect(sync.status.targets[0]?.phase).toBe('waiting'), WAIT)
      const files = filesOf(sync)
      expect(leftOf(sync)).toBeGreaterThan(0)
      await delay(300)
      expect(filesOf(sync)).toBe(files)
      sync.resume()
      await vi.waitFor(() => expect(leftOf(sync)).toBe(0), WAIT)
      await sync.flush()
      expect(differences(`${at}/u`, `${at}/t`)).toEqual([])
    })
  })
})

test.skipIf(!mayMount)('a change that waits for too long is told of, and so is the end of that', async () => {
  const { path: at } = temporary()
  for (const name of ['u', 'store']) mkdirSync(`${at}/${name}`)
  mount('tmpfs', `${at}/store`, 'tmpfs', 0, 'size=1m')
  try {
    const request = {
      source: `${at}/u` as HostPath,
      targets: [`${at}/store/t` as HostPath],
      stateDir: `${at}/state`,
      maxLagMs: 300,
    }
    await withSync(request, async (sync) => {
      const told: boolean[] = []
      sync.events.on('lag', ({ isLate }) => told.push(isLate))
      sync.events.on('problem', () => undefined)
      await sync.flush()
      writeFileSync(`${at}/u/f`, 'f')
      await sync.flush()
      writeFileSync(`${at}/u/too-large`, Buffer.alloc(2 << 20, 'x'))
      await vi.waitFor(() => expect(told).toEqual([true]), WAIT)
      expect(sync.status.targets[0]).toMatchObject({ isLate: true })
      rmSync(`${at}/u/too-large`)
      await vi.waitFor(() => expect(told).toEqual([true, false]), WAIT)
      expect(sync.status.targets[0]).toMatchObject({ isLate: false, lagMs: 0 })
      expect(contentOf(`${at}/store/t/f`)).toBe('f')
    })
  } finally {
    unmount(`${at}/store`)
  }
})
