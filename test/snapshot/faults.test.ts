import { spawn, spawnSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import { chmodSync, cpSync, mkdirSync, readdirSync, readFileSync, rmSync, statfsSync, writeFileSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { hostPath } from '@lsync/posix'
import {
  checkRepository,
  copySnapshots,
  createSnapshot,
  findSnapshot,
  forgetSnapshots,
  LocalBackend,
  listSnapshots,
  locatePath,
  pruneRepository,
  Repository,
  removeLocks,
  repairIndex,
  repairPacks,
  repairSnapshots,
  restoreSnapshot,
  tagSnapshots,
} from '@lsync/snapshot'
import { describe, expect, onTestFinished, test } from 'vitest'
import { buildTree, dir, file } from '../support/build.ts'
import { FailingBackend, GoneError } from '../support/failing-backend.ts'
import { needs } from '../support/needs.ts'
import { newRepository, PASSWORD, reopen, temporaryDirectory } from '../support/repository.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { mount, unmount } from '../support/system.ts'
import { readTree } from '../support/tree.ts'

const isRoot = needs('root', process.geteuid?.() === 0)

function folder(name: string, files: number) {
  return dir(
    Object.fromEntries(Array.from({ length: files }, (_, i) => [`f${i}`, file(`${name} ${i} `.repeat(i + 1))])),
  )
}

/** A repository with a history: some of it is needed by nobody, two snapshots have to survive whatever happens. */
async function history() {
  const { path, repository } = await newRepository()
  const tree = `${temporaryDirectory()}/tree`
  buildTree(tree, dir({ old: folder('old', 10), kept: folder('kept', 10) }))
  const save = () => createSnapshot(repository, { targets: [{ path: hostPath(tree) }] })
  const first = await save()
  rmSync(`${tree}/old`, { recursive: true })
  buildTree(`${tree}/new`, folder('new', 10))
  await save()
  writeFileSync(`${tree}/kept/f0`, 'changed')
  const last = await save()
  await forgetSnapshots(repository, { ids: [first.snapshotId] })
  return { path, tree, last }
}

/** Whether all that a repository says it has is there: no lock stands in the way, everything reads, the last tree is right. */
async function expectWhole(path: string, tree: string): Promise<Repository> {
  const repository = await reopen(path)
  await removeLocks(repository, { all: true })
  const { problems } = await checkRepository(repository, { readData: true })
  expect(problems.filter(({ severity }) => severity === 'error')).toEqual([])
  const target = `${temporaryDirectory()}/back`
  await restoreSnapshot(repository, { snapshot: await findSnapshot(repository, 'latest'), target: hostPath(target) })
  expect(readTree(target)).toEqual(readTree(tree))
  return repository
}

type Operation = (repository: Repository, context: Awaited<ReturnType<typeof history>>) => Promise<unknown>

const operations: Readonly<Record<string, Operation>> = {
  create: (repository, { tree }) =>
    createSnapshot(repository, { targets: [{ path: hostPath(tree) }], force: true, parent: 'none' }),
  forget: (repository) => forgetSnapshots(repository, { keep: { last: 1 } }),
  prune: (repository) => pruneRepository(repository, { maxUnused: 0 }),
  tag: async (repository, { last }) => tagSnapshots(repository, { ids: [last.snapshotId], add: ['x'] }),
  'repair index': (repository) => repairIndex(repository),
}

describe.skipIf(!isRoot).each(Object.entries(operations))('a crash of %s', (_, operate) => {
  test.each(['before', 'after'] as const)('right %s any change leaves everything that was saved', async (when) => {
    for (let failAt = 0, isDone = false; !isDone; failAt++) {
      const context = await history()
      const { path, tree } = context
      const backend = new FailingBackend(new LocalBackend(hostPath(path)), failAt, when)
      const repository = await Repository.open(backend, { password: PASSWORD })
      const before = await listSnapshots(repository)
      const outcome = await operate(repository, context).then(
        () => 'done',
        (error: unknown) => error,
      )
      repository.close()
      isDone = outcome === 'done'
      if (!isDone) expect(outcome).toBeInstanceOf(GoneError)
      expect(failAt).toBeLessThan(30)
      const after = await expectWhole(path, tree)
      const kept = await listSnapshots(after)
      // Forget may have got some way; nothing else takes a snapshot away.
      if (operate !== operations['forget']) expect(kept.length).toBeGreaterThanOrEqual(before.length)
      await pruneRepository(after, { maxUnused: 0 })
      expect((await checkRepository(after, { readData: true })).problems).toEqual([])
    }
  })
})

describe.skipIf(!isRoot)('a crash of copy', () => {
  test.each(['before', 'after'] as const)(
    'right %s any change leaves a target that a second run completes',
    async (when) => {
      const context = await history()
      const source = await reopen(context.path)
      const snapshots = await listSnapshots(source)
      for (let failAt = 0, isDone = false; !isDone; failAt++) {
        const { path } = await newRepository()
        const backend = new FailingBackend(new LocalBackend(hostPath(path)), failAt, when)
        const target = await Repository.open(backend, { password: PASSWORD })
        const outcome = await copySnapshots(source, target, { snapshots }).then(
          () => 'done',
          (error: unknown) => error,
        )
        target.close()
        isDone = outcome === 'done'
        const again = await reopen(path)
        await removeLocks(again, { all: true })
        await copySnapshots(source, again, { snapshots })
        expect(await listSnapshots(again)).toHaveLength(snapshots.length)
        await expectWhole(path, context.tree)
      }
    },
  )
})

/** A history in which a bit of one piece of a file is flipped. */
async function damaged() {
  const made = await history()
  const repository = await reopen(made.path)
  const context = { ...made, latest: await findSnapshot(repository, 'latest') }
  await repository.loadIndex()
  const located = await locatePath(repository, context.latest, hostPath(`${context.tree}/kept/f5`))
  const [piece] = located.node?.content ?? []
  const { packId, offset } = repository.table.locate('data', String(piece)) as { packId: string; offset: number }
  const pack = `${context.path}/data/${packId.slice(0, 2)}/${packId}`
  const bytes = readFileSync(pack)
  bytes[offset + 5] = (bytes[offset + 5] as number) ^ 1
  chmodSync(pack, 0o600)
  writeFileSync(pack, bytes)
  return { ...context, id: packId }
}

/** What a check of all content finds wrong. */
async function errorsIn(path: string): Promise<ReadonlySet<string>> {
  const { problems } = await checkRepository(await reopen(path), { readData: true })
  return new Set(problems.filter(({ severity }) => severity === 'error').map(({ code, id }) => `${code} ${id}`))
}

describe.skipIf(!isRoot).each(['before', 'after'] as const)('a crash right %s any change', (when) => {
  /** Runs `operate` again and again on repositories that are gone later each time, then once to the end. */
  async function crashAtEach(
    prepare: () => Promise<{ readonly path: string }>,
    operate: (repository: Repository) => Promise<unknown>,
    expectRight: (path: string) => Promise<void>,
  ) {
    const { path: prepared } = await prepare()
    for (let failAt = 0, isDone = false; !isDone; failAt++) {
      const path = `${temporaryDirectory()}/repository`
      cpSync(prepared, path, { recursive: true })
      const backend = new FailingBackend(new LocalBackend(hostPath(path)), failAt, when)
      const repository = await Repository.open(backend, { password: PASSWORD })
      const outcome = await operate(repository).then(
        () => 'done',
        (error: unknown) => error,
      )
      repository.close()
      isDone = outcome === 'done'
      if (!isDone) expect(outcome).toBeInstanceOf(GoneError)
      const again = await reopen(path)
      await removeLocks(again, { all: true })
      await operate(again)
      await expectRight(path)
    }
  }

  test('of repair packs loses what was damaged, and nothing else', async () => {
    let id = ''
    const prepare = async () => {
      const context = await damaged()
      id = context.id
      return context
    }
    const repair = (repository: Repository) => repairPacks(repository, [id])
    await crashAtEach(prepare, repair, async (path) => {
      const errors = [...(await errorsIn(path))]
      expect(errors).toHaveLength(1)
      expect(errors[0]).toMatch(/^OBJECT_MISSING /)
    })
  })

  test('of repair snapshots leaves snapshots that a second run makes whole', async () => {
    const prepare = async () => {
      const context = await damaged()
      await repairPacks(await reopen(context.path), [context.id])
      return context
    }
    const repair = async (repository: Repository) => {
      const snapshots = await listSnapshots(repository)
      return repairSnapshots(repository, { snapshots, forget: true })
    }
    await crashAtEach(prepare, repair, async (path) => {
      expect([...(await errorsIn(path))]).toEqual([])
      const left = await listSnapshots(await reopen(path))
      expect(new Set(left.map(({ original, id: own }) => original ?? own)).size).toBe(2)
    })
  })
})

const CHILD = fileURLToPath(new URL('../support/snapshot-child.ts', import.meta.url))

/** An operation that a process of its own runs, on a copy of what was prepared for it, until it is killed. */
interface Killed {
  /** `other`: what the process is told besides where the repository is. */
  readonly prepare: () => Promise<{ readonly path: string; readonly other: string; readonly tree: string }>
  /** The same in this process, to its end. */
  readonly complete: (repository: Repository, other: string) => Promise<unknown>
  /** What holds right after the kill, and what when it was completed. */
  readonly expectKilled: (path: string, tree: string) => Promise<unknown>
  readonly expectComplete: (path: string, tree: string) => Promise<unknown>
}

const repairsSnapshots = async (repository: Repository) =>
  repairSnapshots(repository, { snapshots: await listSnapshots(repository), forget: true })

const killed: Readonly<Record<string, Killed>> = {
  forget: {
    prepare: async () => {
      const context = await history()
      const repository = await reopen(context.path)
      for (let i = 0; i < 10; i++) {
        writeFileSync(`${context.tree}/kept/f1`, `version ${i}`)
        await createSnapshot(repository, { targets: [{ path: hostPath(context.tree) }] })
      }
      return { ...context, other: '' }
    },
    complete: (repository) => forgetSnapshots(repository, { keep: { last: 1 } }),
    expectKilled: expectWhole,
    expectComplete: async (path, tree) => {
      expect(await listSnapshots(await expectWhole(path, tree))).toHaveLength(1)
    },
  },
  copy: {
    prepare: async () => {
      const { path: source, tree } = await history()
      return { path: (await newRepository()).path, other: source, tree }
    },
    complete: async (repository, other) => {
      const source = await reopen(other)
      await copySnapshots(source, repository, { snapshots: await listSnapshots(source) })
    },
    // Whatever snapshots have arrived by then are whole.
    expectKilled: async (path) => expect([...(await errorsIn(path))]).toEqual([]),
    expectComplete: async (path, tree) => {
      expect(await listSnapshots(await expectWhole(path, tree))).toHaveLength(2)
    },
  },
  'repair index': {
    prepare: async () => {
      const context = await history()
      rmSync(`${context.path}/index`, { recursive: true })
      mkdirSync(`${context.path}/index`)
      return { ...context, other: '' }
    },
    complete: (repository) => repairIndex(repository),
    // Snapshots are as they were, and nothing but what was missing before is missing.
    expectKilled: async (path) => {
      expect(await listSnapshots(await reopen(path))).toHaveLength(2)
      for (const error of await errorsIn(path)) expect(error).toMatch(/^OBJECT_MISSING /)
    },
    expectComplete: expectWhole,
  },
  'repair packs': {
    prepare: async () => {
      const context = await damaged()
      return { ...context, other: context.id }
    },
    complete: (repository, other) => repairPacks(repository, [other]),
    expectKilled: async (path) => {
      expect(await listSnapshots(await reopen(path))).toHaveLength(2)
      for (const error of await errorsIn(path)) expect(error).toMatch(/^(OBJECT|PACK)_(DAMAGED|MISSING) /)
    },
    expectComplete: async (path) => {
      // The one piece that the flipped bit was in, and nothing else.
      const errors = [...(await errorsIn(path))]
      expect(errors).toHaveLength(1)
      expect(errors[0]).toMatch(/^OBJECT_MISSING /)
    },
  },
  'repair snapshots': {
    prepare: async () => {
      const context = await damaged()
      await repairPacks(await reopen(context.path), [context.id])
      return { ...context, other: '' }
    },
    complete: repairsSnapshots,
    expectKilled: async (path) => {
      const left = await listSnapshots(await reopen(path))
      expect(new Set(left.map(({ original, id }) => original ?? id)).size).toBe(2)
    },
    expectComplete: async (path) => {
      expect([...(await errorsIn(path))]).toEqual([])
      expect(await listSnapshots(await reopen(path))).toHaveLength(2)
    },
  },
}

/** What can run out of room. */
const filled: Readonly<Record<string, Killed>> = {
  ...killed,
  create: {
    prepare: async () => {
      const context = await history()
      writeFileSync(`${context.tree}/kept/f0`, randomBytes(60_000))
      return { ...context, other: context.tree }
    },
    complete: (repository, other) => createSnapshot(repository, { targets: [{ path: hostPath(other) }] }),
    expectKilled: async (path) => {
      expect(await listSnapshots(await reopen(path))).toHaveLength(2)
      expect([...(await errorsIn(path))]).toEqual([])
    },
    expectComplete: async (path, tree) => {
      expect(await listSnapshots(await expectWhole(path, tree))).toHaveLength(3)
    },
  },
  prune: {
    prepare: async () => ({ ...(await history()), other: '' }),
    complete: (repository) => pruneRepository(repository, { maxUnused: 0 }),
    expectKilled: expectWhole,
    expectComplete: expectWhole,
  },
}

describe.skipIf(!isRoot)('a full disk', () => {
  test.each(Object.keys(filled))('ends %s with its reason, and costs nothing that was saved', async (what) => {
    const { prepare, complete, expectKilled, expectComplete } = filled[what] as Killed
    const { path: prepared, other, tree } = await prepare()
    const disk = temporaryDirectory()
    mount('tmpfs', disk, 'tmpfs', 0, 'size=2m')
    onTestFinished(async () => {
      // Files that repositories had open are closed by and by.
      for (let attempt = 0; attempt < 100 && spawnSync('umount', [disk]).status !== 0; attempt++) await sleep(100)
      unmount(disk)
    })
    const path = `${disk}/repository`
    // More room each time, until it is enough.
    let failures = 0
    for (let freeBytes = 0, isDone = false; !isDone; freeBytes += 8192) {
      rmSync(path, { recursive: true, force: true })
      cpSync(prepared, path, { recursive: true })
      const repository = await reopen(path)
      const { bavail, bsize } = statfsSync(disk)
      writeFileSync(`${disk}/others`, Buffer.alloc(Math.max(0, bavail * bsize - freeBytes)))
      const outcome = await complete(repository, other).then(
        () => 'done',
        (error: unknown) => error,
      )
      rmSync(`${disk}/others`)
      isDone = outcome === 'done'
      if (!isDone) {
        failures++
        expect(outcome).toMatchObject({ code: 'ENOSPC' })
        // Who was told so has given the lock back.
        expect(readdirSync(`${path}/locks`)).toEqual([])
        await expectKilled(path, tree)
        await complete(await reopen(path), other)
      }
      await expectComplete(path, tree)
      expect(freeBytes).toBeLessThan(1_000_000)
    }
    expect(failures).toBeGreaterThan(0)
  })
})

describe.skipIf(!isRoot)('kill -9 of a process', () => {
  test.each(Object.keys(killed))(
    'that does %s leaves what it had, and a second one completes it',
    async (what) => {
      const { prepare, complete, expectKilled, expectComplete } = killed[what] as Killed
      const { path: prepared, other, tree } = await prepare()
      const rounds = runs(2).numRuns ?? 1
      // Nobody kills the first: it says how long one takes, and the others are killed at some part of that.
      let wholeMs = 0
      for (let round = 0; round <= rounds; round++) {
        const path = `${temporaryDirectory()}/repository`
        cpSync(prepared, path, { recursive: true })
        const killMs = round === 0 ? undefined : (wholeMs * (round - 0.5)) / rounds
        const takenMs = await runUntilKilled([path, PASSWORD, what, other], killMs)
        if (round === 0) wholeMs = takenMs
        await removeLocks(await reopen(path), { all: true })
        await expectKilled(path, tree)
        await complete(await reopen(path), other)
        await expectComplete(path, tree)
      }
    },
    timeLimit(60_000),
  )
})

/** Runs a process. Returns how long it was at work after it said that it begins. */
async function runUntilKilled(args: readonly string[], killMs: number | undefined): Promise<number> {
  const child = spawn(process.execPath, [CHILD, ...args], { stdio: ['ignore', 'pipe', 'inherit'] })
  onTestFinished(() => {
    child.kill('SIGKILL')
  })
  let beganMs = 0
  return new Promise((resolve, reject) => {
    child.stdout.once('data', () => {
      beganMs = performance.now()
      if (killMs !== undefined) setTimeout(() => child.kill('SIGKILL'), killMs)
    })
    child.once('exit', (code, signal) => {
      if (code === 0 || (signal === 'SIGKILL' && killMs !== undefined)) resolve(performance.now() - beganMs)
      else reject(new Error(`the process ended with ${code ?? signal}`))
    })
  })
}

describe.skipIf(!isRoot)('kill -9', () => {
  test.each(['create', 'prune'])('of %s at any time loses nothing that was reported as saved', async (what) => {
    const { path, repository } = await newRepository()
    const tree = `${temporaryDirectory()}/tree`
    buildTree(tree, dir({ a: folder('a', 40), b: folder('b', 40) }))
    await createSnapshot(repository, { targets: [{ path: hostPath(tree) }] })
    const reported = new Set((await listSnapshots(repository)).map(({ id }) => id))
    for (let round = 0; round < 4; round++) {
      // Something to store, or to remove.
      writeFileSync(`${tree}/a/f${round}`, `round ${round} `.repeat(500))
      if (what === 'prune') {
        const gone = await createSnapshot(await reopen(path), { targets: [{ path: hostPath(tree) }] })
        await createSnapshot(await reopen(path), { targets: [{ path: hostPath(tree) }], force: true })
        await forgetSnapshots(await reopen(path), { ids: [gone.snapshotId] })
      }
      const child = spawn(process.execPath, [CHILD, path, PASSWORD, what, tree], {
        stdio: ['ignore', 'pipe', 'inherit'],
      })
      onTestFinished(() => {
        child.kill('SIGKILL')
      })
      let said = ''
      await new Promise<void>((resolve) => {
        let timer: NodeJS.Timeout | undefined
        const killSoon = () => {
          timer ??= setTimeout(() => child.kill('SIGKILL'), 15 + round * 40)
        }
        child.stdout.on('data', (bytes) => {
          said += bytes
          killSoon()
        })
        child.once('exit', () => {
          clearTimeout(timer)
          resolve()
        })
      })
      for (const id of said.split('\n')) if (id.length === 64) reported.add(id)
      const after = await expectWhole(path, tree)
      const there = new Set((await listSnapshots(after)).map(({ id }) => id))
      expect([...reported].filter((id) => !there.has(id))).toEqual([])
    }
    await pruneRepository(await reopen(path), { maxUnused: 0 })
    expect(readdirSync(`${path}/data`, { recursive: true }).filter((name) => String(name).includes('.lsync-'))).toEqual(
      [],
    )
  })
})

test.skipIf(!isRoot)('what interrupted writes left is removed by prune', async () => {
  const { path, tree } = await history()
  const left = [
    `${path}/index/.lsync-0123456789abcdef`,
    `${path}/data/00/.lsync-0123456789abcdef`,
    `${path}/.lsync-0123456789abcdef`,
  ]
  for (const name of left) writeFileSync(name, 'half a pack')
  writeFileSync(`${path}/index/.lsync-mine`, 'not ours')
  await pruneRepository(await expectWhole(path, tree))
  expect(readdirSync(`${path}/index`).filter((name) => name.startsWith('.'))).toEqual(['.lsync-mine'])
  expect(readdirSync(`${path}/data/00`).filter((name) => name.startsWith('.'))).toEqual([])
})
