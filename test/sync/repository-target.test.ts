import { appendFileSync, linkSync, mkdirSync, renameSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { hostname } from 'node:os'
import { setTimeout as delay } from 'node:timers/promises'
import { RepositoryTarget, type RepositoryTargetRequest } from '@lsync/container-root'
import { type HostPath, hostPath } from '@lsync/posix'
import {
  type Backend,
  createSnapshot,
  LocalBackend,
  listSnapshots,
  Repository,
  removeLocks,
  restoreSnapshot,
  type Snapshot,
} from '@lsync/snapshot'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { FailingBackend, GoneError } from '../support/failing-backend.ts'
import { useFileSystem } from '../support/image.ts'
import { anyOperations, applyOperations, type Operation } from '../support/operations.ts'
import { type OverlayOptions, plainOptions } from '../support/overlay.ts'
import { canMountImages } from '../support/ready.ts'
import { newRepository, PASSWORD, Restic, reopen } from '../support/repository.ts'
import { runs } from '../support/runs.ts'
import { differences, hidesWrites, keepWorkers, withFollowed, withSync } from '../support/syncing.ts'
import { isPresent } from '../support/system.ts'

const CELLS: readonly OverlayOptions[] = [
  { ...plainOptions, redirectDir: 'on', metacopy: true },
  { ...plainOptions, namespace: 'user' },
]

type More = Partial<Pick<RepositoryTargetRequest, 'keep'>> & { readonly backend?: (inner: Backend) => Backend }

function targetAt(path: string, source: HostPath, { backend = (inner) => inner, ...more }: More = {}) {
  return new RepositoryTarget({
    description: `repo:${path}`,
    source,
    connect: async (signal) => {
      const opened = backend(new LocalBackend(hostPath(path)))
      const repository = await Repository.open(opened, { password: PASSWORD, signal })
      return { repository, close: async () => repository.close() }
    },
    ...more,
  })
}

async function snapshotsIn(path: string): Promise<Snapshot[]> {
  return listSnapshots(await reopen(path))
}

/** In what the latest snapshot differs from the upper. */
async function missing(path: string, upper: string, at: string, namespace: 'trusted' | 'user' = 'trusted') {
  const repository = await reopen(path)
  const snapshot = (await listSnapshots(repository)).at(-1)
  if (snapshot === undefined) return ['no snapshot']
  rmSync(at, { recursive: true, force: true })
  const { problems } = await restoreSnapshot(repository, { snapshot, target: hostPath(at) })
  expect(problems).toEqual([])
  return differences(upper, at, namespace, { holes: false })
}

/** A snapshot keeps no flags. */
function withoutFlags(operations: readonly Operation[]): Operation[] {
  return operations.filter((operation) => operation.do !== 'chattr')
}

describe.skipIf(!canMountImages())('a repository that follows an upper', () => {
  const disk = useFileSystem('ext4')
  keepWorkers(disk)
  let count = 0

  test.each(CELLS)(
    'has, after a flush, a snapshot that restores to the upper, whatever was done: $namespace marks',
    async (options) => {
      await fc.assert(
        fc.asyncProperty(
          anyOperations(0, 20),
          fc.array(anyOperations(1, 12), { minLength: 1, maxLength: 4, size: 'max' }),
          async (anyBottom, anyBursts) => {
            const bottom = withoutFlags(anyBottom)
            const bursts = anyBursts.map(withoutFlags)
            const directory = disk.current.fresh()
            const { path } = await newRepository()
            await withFollowed(directory, bottom, options, async ({ merged, upper, state }) => {
              const { namespace } = options
              const done: Operation[][] = []
              const request = () => ({ source: upper, targets: [targetAt(path, upper)], stateDir: state, namespace })
              await withSync(request(), async (sync) => {
                const failures: string[] = []
                sync.events.on('failure', ({ path: at, code }) => failures.push(`${at}: ${code}`))
                sync.events.on('problem', ({ error }) => failures.push(String(error)))
                for (const burst of bursts) {
                  done.push(applyOperations(merged, burst))
                  await delay(count++ % 3 === 0 ? 30 : 1)
                }
                const report = await sync.flush({ sweep: bursts.some(hidesWrites) })
                expect(await missing(path, upper, `${directory}/r`, namespace), JSON.stringify(done, show)).toEqual([])
                expect(failures).toEqual([])
                expect(report).toMatchObject({ isSettled: true, failures: [] })
              })
              applyOperations(merged, bursts.flat())
              await withSync(request(), async (sync) => {
                await sync.flush()
                expect(await missing(path, upper, `${directory}/r`, namespace)).toEqual([])
              })
            })
          },
        ),
        runs(4),
      )
    },
    120_000,
  )

  /** An upper, and what is done to it: each step is a burst. */
  function prepared() {
    const at = disk.current.fresh()
    const upper = hostPath(`${at}/u`)
    mkdirSync(`${upper}/d/e`, { recursive: true })
    for (let i = 0; i < 20; i++) writeFileSync(`${upper}/d/e/f${i}`, `${i}`)
    writeFileSync(`${upper}/one`, 'linked')
    linkSync(`${upper}/one`, `${upper}/d/two`)
    const steps = [
      () => renameSync(`${upper}/d/e`, `${upper}/moved`),
      () => {
        appendFileSync(`${upper}/one`, ', changed')
        symlinkSync('one', `${upper}/link`)
      },
      () => {
        rmSync(`${upper}/moved/f3`)
        mkdirSync(`${upper}/new/er`, { recursive: true })
        writeFileSync(`${upper}/new/er/g`, 'g')
      },
    ]
    return { at, upper, steps, state: `${at}/state` }
  }

  test('reads what moved or changed and nothing else, and restic finds every snapshot whole', async () => {
    const { at, upper, steps, state } = prepared()
    const { path } = await newRepository()
    await withSync({ source: upper, targets: [targetAt(path, upper)], stateDir: state }, async (sync) => {
      await sync.flush()
      for (const step of steps) {
        step()
        await sync.flush()
        expect(await missing(path, upper, `${at}/r`)).toEqual([])
      }
    })
    const snapshots = await snapshotsIn(path)
    // What is carried over more than once leaves one snapshot.
    expect(new Set(snapshots.map(({ tree }) => tree)).size).toBe(snapshots.length)
    expect(snapshots.length).toBeGreaterThanOrEqual(4)
    expect(snapshots.at(-1)).toMatchObject({
      hostname: hostname(),
      paths: [upper],
      tags: ['sync'],
      others: { lsync_sync: { root: expect.any(String), sequence: expect.any(Number), nextStage: expect.any(Number) } },
    })
    if (isPresent('restic')) expect(new Restic(path).run('check', '--read-data')).toContain('no errors were found')
  })

  test('keeps what was excluded out of every snapshot', async () => {
    const { at, upper, state } = prepared()
    const { path } = await newRepository()
    for (const name of ['cache', 'new/cache']) mkdirSync(`${upper}/${name}`, { recursive: true })
    for (const name of ['cache/c', 'new/cache/c', 'new/kept']) writeFileSync(`${upper}/${name}`, '')
    const request = { source: upper, targets: [targetAt(path, upper)], stateDir: state, exclude: ['cache/'] }
    await withSync(request, async (sync) => {
      await sync.flush()
      renameSync(`${upper}/new`, `${upper}/newer`)
      await sync.flush()
    })
    expect(await missing(path, upper, `${at}/r`)).toEqual(
      ['cache', 'cache/c', 'newer/cache', 'newer/cache/c'].map((name) => expect.stringContaining(`${name}: missing`)),
    )
  })

  test.each(['before', 'after'] as const)(
    'is never behind the checkpoint, wherever the repository goes (%s a change)',
    async (when) => {
      for (let failAt = 1; ; failAt += 3) {
        const { at, upper, steps, state } = prepared()
        const { path } = await newRepository()
        let isGone = false
        const failing = new FailingBackend(new LocalBackend(hostPath(path)), failAt, when)
        const targets = [targetAt(path, upper, { backend: () => failing })]
        await withSync({ source: upper, targets, stateDir: state }, async (sync) => {
          sync.events.on('problem', () => undefined)
          await sync.flush()
          for (const step of steps) {
            step()
            await sync.flush()
          }
        }).catch((error: unknown) => {
          isGone = true
          if (!(error instanceof GoneError)) throw error
        })
        await removeLocks(await reopen(path), { all: true })
        for (const step of steps) if (isGone) tryTo(step)
        await withSync({ source: upper, targets: [targetAt(path, upper)], stateDir: state }, async (sync) => {
          await sync.flush()
          expect(await missing(path, upper, `${at}/r`), `gone ${when} change ${failAt}`).toEqual([])
        })
        if (!isGone) break
      }
    },
    120_000,
  )

  test('is not emptied when the state of the sync is lost, and equals the upper after the next flush', async () => {
    const { at, upper, steps, state } = prepared()
    const { path } = await newRepository()
    await withSync({ source: upper, targets: [targetAt(path, upper)], stateDir: state }, (sync) => sync.flush())
    rmSync(state, { recursive: true })
    for (const step of steps) step()
    // Opening alone tells the repository of another index.
    await withSync(
      { source: upper, targets: [targetAt(path, upper)], stateDir: state, once: true },
      async () => undefined,
    )
    expect((await snapshotsIn(path)).at(-1)?.others['lsync_sync']).toMatchObject({ isForeign: true, sequence: 0 })
    expect((await missing(path, upper, `${at}/r`)).length).toBeGreaterThan(0)
    await withSync({ source: upper, targets: [targetAt(path, upper)], stateDir: state }, (sync) => sync.flush())
    expect(await missing(path, upper, `${at}/r`)).toEqual([])
  })

  test('is thinned by the rules, its own snapshots alone', async () => {
    const { at, upper, steps, state } = prepared()
    const { path } = await newRepository()
    const target = targetAt(path, upper, { keep: { last: 2 } })
    await withSync({ source: upper, targets: [target], stateDir: state }, async (sync) => {
      await sync.flush()
      for (const step of steps) {
        step()
        await sync.flush()
      }
      const other = { targets: [{ path: upper }], timeNs: 1_000_000_000n }
      const { snapshotId } = await createSnapshot(await reopen(path), other)
      const before = (await snapshotsIn(path)).length
      expect(await target.thin()).toBe(before - 3)
      expect((await snapshotsIn(path)).map(({ id }) => id)).toContain(snapshotId)
      appendFileSync(`${upper}/one`, ' more')
      await sync.flush()
    })
    expect(await missing(path, upper, `${at}/r`)).toEqual([])
  })
})

function tryTo(step: () => void): void {
  try {
    step()
  } catch {
    // It was done before everything went.
  }
}

function show(_: string, value: unknown): unknown {
  return typeof value === 'bigint' ? String(value) : value
}
