import { spawn, spawnSync } from 'node:child_process'
import { randomBytes } from 'node:crypto'
import {
  chmodSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  renameSync,
  rmSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { hostname } from 'node:os'
import { type ByteString, hostPath } from '@lsync/posix'
import {
  type CheckRequest,
  checkRepository,
  copySnapshots,
  createSnapshot,
  diffSnapshots,
  dumpFile,
  findInSnapshots,
  findSnapshot,
  forgetSnapshots,
  type KeepRules,
  listContent,
  listSnapshots,
  locatePath,
  measureSnapshots,
  parseDuration,
  pruneRepository,
  type Repository,
  RepositoryLock,
  removeLocks,
  repairIndex,
  repairPacks,
  repairSnapshots,
  restoreSnapshot,
  type Snapshot,
  tagSnapshots,
} from '@lsync/snapshot'
import fc from 'fast-check'
import { describe, expect, onTestFinished, test } from 'vitest'
import { buildRichTree } from '../layers/rich-tree.ts'
import { buildTree, dir, file, linkTo, symlink } from '../support/build.ts'
import { needs } from '../support/needs.ts'
import { CHEAP, newRepository, PASSWORD, Restic, reopen, temporaryDirectory } from '../support/repository.ts'
import { runs } from '../support/runs.ts'
import { isPresent, run, unmount } from '../support/system.ts'
import { readTree } from '../support/tree.ts'

const isRoot = needs('root', process.geteuid?.() === 0)
const hasRestic = needs('restic', isPresent('restic'))
const canAll = isRoot && hasRestic

function save(repository: Repository, path: string, more: object = {}) {
  return createSnapshot(repository, { targets: [{ path: hostPath(path) }], ...more })
}

/** Files of different content and size, so that packs fill. */
function folder(name: string, files: number) {
  return dir(
    Object.fromEntries(Array.from({ length: files }, (_, i) => [`f${i}`, file(`${name} ${i} `.repeat(i + 1))])),
  )
}

async function errorsOf(repository: Repository, request: CheckRequest = {}): Promise<string[]> {
  const { problems } = await checkRepository(repository, request)
  return problems.filter(({ severity }) => severity === 'error').map(({ code, id }) => `${code} ${id}`)
}

describe.skipIf(!canAll)('forget', () => {
  test('keeps and removes what restic does, whatever the rules', async () => {
    const { path, repository } = await newRepository()
    const tree = `${temporaryDirectory()}/tree`
    buildTree(tree, dir({ f: file('') }))
    const { snapshotId } = await save(repository, tree)
    const { id: _, ...first } = await repository.readSnapshot(snapshotId)
    await repository.backend.delete({ kind: 'snapshot', name: snapshotId })
    const zones = ['Z', '+05:30', '-08:00']
    for (let i = 0; i < 60; i++) {
      // Gaps of hours up to months, so that every rule has something to decide.
      const time = new Date(Date.UTC(2015, 0, 1) + Math.round(1.22 ** i * 3_600_000 * 17)).toISOString().slice(0, 19)
      const tags = [...(i % 5 === 0 ? ['five'] : []), ...(i % 7 === 0 ? ['seven'] : [])]
      await repository.writeSnapshot({ ...first, time: `${time}${zones[i % 3]}`, hostname: `host${i % 2}`, tags })
    }
    const restic = new Restic(path)
    const span = fc.constantFrom('1h', '5d', '2m', '1y', '3y2m1d5h').map((text) => [text, parseDuration(text)] as const)
    const number = fc.integer({ min: 1, max: 12 })
    const names = ['Hourly', 'Daily', 'Weekly', 'Monthly', 'Yearly'] as const
    const anyRules = fc.record(
      {
        last: number,
        ...Object.fromEntries(names.map((name) => [name.toLowerCase(), number])),
        within: span,
        ...Object.fromEntries(names.map((name) => [`within${name}`, span])),
      },
      { requiredKeys: [] },
    ) as fc.Arbitrary<Record<string, number | readonly [string, object]>>
    await fc.assert(
      fc.asyncProperty(
        anyRules.filter((rules) => Object.keys(rules).length > 0),
        fc.constantFrom([], ['host'], ['host', 'paths']),
        fc.constantFrom(undefined, ['five'], ['five', 'seven']),
        async (rules, groupBy, tags) => {
          const options = Object.entries(rules).flatMap(([name, rule]) => [
            `--keep-${name.replace(/[A-Z]/, (letter) => `-${letter.toLowerCase()}`)}`,
            typeof rule === 'number' ? String(rule) : rule[0],
          ])
          if (tags !== undefined) options.push('--keep-tag', tags.join(','))
          const [theirs] = restic.json<{ remove: { id: string }[] | null }[]>(
            'forget',
            '--dry-run',
            '--group-by',
            groupBy.join(','),
            ...options,
          ) as [{ remove: { id: string }[] | null }[]]
          const keep = Object.fromEntries(
            Object.entries(rules).map(([name, rule]) => [name, typeof rule === 'number' ? rule : rule[1]]),
          ) as KeepRules
          const ours = await forgetSnapshots(repository, {
            keep: { ...keep, ...(tags === undefined ? {} : { tags: [tags] }) },
            groupBy: groupBy as never,
            dryRun: true,
          })
          expect([...ours.removed].sort()).toEqual(
            theirs
              .flatMap(({ remove }) => remove ?? [])
              .map(({ id }) => id)
              .sort(),
          )
        },
      ),
      runs(12),
    )
  })

  test('refuses without a rule, and removes nothing with dry-run', async () => {
    const { repository } = await newRepository()
    const tree = buildRichTree(`${temporaryDirectory()}/tree`)
    for (let i = 0; i < 3; i++) await save(repository, tree)
    await expect(forgetSnapshots(repository, {})).rejects.toMatchObject({ code: 'FORGET_REFUSED' })
    expect((await forgetSnapshots(repository, { keep: { last: 1 }, dryRun: true })).removed).toHaveLength(2)
    expect(await listSnapshots(repository)).toHaveLength(3)
    const [oldest] = await listSnapshots(repository)
    expect((await forgetSnapshots(repository, { ids: [oldest?.id as string] })).removed).toEqual([oldest?.id])
    expect(await listSnapshots(repository)).toHaveLength(2)
  })
})

describe.skipIf(!canAll)('prune', () => {
  async function grown() {
    const { path, repository } = await newRepository()
    const root = temporaryDirectory()
    const tree = `${root}/tree`
    buildTree(tree, dir({ old: folder('old', 60), kept: folder('kept', 60) }))
    await save(repository, tree)
    rmSync(`${tree}/old`, { recursive: true })
    buildTree(`${tree}/new`, folder('new', 60))
    await save(repository, tree)
    return { path, repository, tree, root }
  }

  test('removes what no snapshot needs, and nothing else', async () => {
    const { path, repository, tree, root } = await grown()
    await forgetSnapshots(repository, { keep: { last: 1 } })
    const before = await pruneRepository(await reopen(path), { dryRun: true, maxUnused: 0 })
    const report = await pruneRepository(await reopen(path), { maxUnused: 0 })
    expect(report.freedBytes).toBe(before.freedBytes)
    expect(report.freedBytes).toBeGreaterThan(1000)
    expect(report.unusedBytes).toBe(0)
    const again = await reopen(path)
    expect(await errorsOf(again, { readData: true })).toEqual([])
    await restoreSnapshot(again, { snapshot: await findSnapshot(again, 'latest'), target: hostPath(`${root}/back`) })
    expect(readTree(`${root}/back`)).toEqual(readTree(tree))
    expect(new Restic(path).run('check', '--read-data')).toContain('no errors were found')
    const second = await pruneRepository(await reopen(path), { maxUnused: 0 })
    expect(second.packs).toMatchObject({ removed: 0, rewritten: 0 })
  })

  test('leaves what is below its limits for another time', async () => {
    const { path, repository } = await grown()
    await forgetSnapshots(repository, { keep: { last: 1 } })
    const lazy = await pruneRepository(await reopen(path), { maxUnused: 100 })
    expect(lazy.packs.rewritten).toBe(0)
    expect(lazy.unusedBytes).toBeGreaterThan(0)
    const slow = await pruneRepository(await reopen(path), { maxUnused: 0, budgetMs: 0 })
    expect(slow.packs.rewritten).toBe(0)
    expect(slow.unusedBytes).toBe(lazy.unusedBytes)
    expect(await errorsOf(await reopen(path))).toEqual([])
  })

  test('puts many small packs together', async () => {
    const { path, repository } = await newRepository()
    const tree = `${temporaryDirectory()}/tree`
    buildTree(tree, dir({}))
    for (let i = 0; i < 10; i++) {
      writeFileSync(`${tree}/f${i}`, `content ${i}`)
      await save(repository, tree)
    }
    expect((await repository.listIds('pack')).length).toBe(20)
    await pruneRepository(await reopen(path))
    expect((await repository.listIds('pack')).length).toBe(2)
    expect((await repository.listIds('index')).length).toBe(1)
    expect(await errorsOf(await reopen(path), { readData: true })).toEqual([])
  })

  test('removes nothing when something that is needed is not there', async () => {
    const { path, repository } = await grown()
    const packs = await repository.listIds('pack')
    const [victim] = packs
    rmSync(`${path}/data/${victim?.slice(0, 2)}/${victim}`)
    await expect(pruneRepository(await reopen(path), { maxUnused: 0 })).rejects.toMatchObject({
      code: expect.stringMatching(/^(PACK_MISSING|OBJECT_MISSING|REPOSITORY_FILE_MISSING)$/),
    })
    expect(await repository.listIds('pack')).toEqual(packs.filter((id) => id !== victim))
    expect(await repository.listIds('lock')).toEqual([])
  })

  test('waits for nobody: both tools save into one repository at once, and all of it is whole', async () => {
    const { path } = await newRepository()
    const root = temporaryDirectory()
    const [ours, theirs] = [`${root}/ours`, `${root}/theirs`]
    for (const tree of [ours, theirs]) buildTree(tree, dir({ same: folder('same', 60), own: folder(tree, 40) }))
    const restic = new Restic(path)
    const both = async (round: number) => {
      for (const tree of [ours, theirs]) writeFileSync(`${tree}/round`, `${tree} ${round}`.repeat(2000))
      const env = { ...process.env, RESTIC_PASSWORD: PASSWORD, RESTIC_REPOSITORY: path }
      const child = spawn('restic', ['--no-cache', 'backup', theirs], { env, stdio: 'ignore' })
      const ended = new Promise<number | null>((resolve) => child.once('exit', resolve))
      // As many as fit while restic is at work, and one at least.
      let saved = 0
      for (let isOver = false; !isOver || saved === 0; saved++) {
        expect((await save(await reopen(path), ours, { force: true })).problems).toEqual([])
        isOver = child.exitCode !== null
      }
      expect(await ended).toBe(0)
      return saved
    }
    let saved = 0
    for (let round = 0; round < 3; round++) saved += await both(round)
    expect(await listSnapshots(await reopen(path))).toHaveLength(saved + 3)
    expect(restic.run('check', '--read-data')).toContain('no errors were found')
    expect(await errorsOf(await reopen(path), { readData: true })).toEqual([])
    await pruneRepository(await reopen(path), { maxUnused: 0 })
    const again = await reopen(path)
    for (const tree of [ours, theirs]) {
      const snapshot = (await listSnapshots(again, { paths: [hostPath(tree)] })).at(-1) as Snapshot
      const target = hostPath(`${tree} back`)
      await restoreSnapshot(again, { snapshot, target })
      expect(readTree(target)).toEqual(readTree(tree))
    }
  })

  test('of both tools in turn leaves the repository whole', async () => {
    const { path, repository, tree, root } = await grown()
    const restic = new Restic(path)
    for (let i = 0; i < 3; i++) {
      writeFileSync(`${tree}/turn`, `${i}`.repeat(3000))
      await save(await reopen(path), tree)
      restic.run('forget', '--keep-last', '2', '--prune', '--max-unused', '0', '--repack-small')
      buildTree(`${tree}/by restic ${i}`, folder(`restic ${i}`, 20))
      restic.run('backup', tree)
      await forgetSnapshots(await reopen(path), { keep: { last: 2 } })
      await pruneRepository(await reopen(path), { maxUnused: 0 })
    }
    expect(restic.run('check', '--read-data')).toContain('no errors were found')
    expect(await errorsOf(await reopen(path), { readData: true })).toEqual([])
    const again = await reopen(path)
    await restoreSnapshot(again, { snapshot: await findSnapshot(again, 'latest'), target: hostPath(`${root}/back`) })
    expect(readTree(`${root}/back`)).toEqual(readTree(tree))
    expect(repository.config.version).toBe(2)
  })
})

describe.skipIf(!canAll)('check and repair', () => {
  async function saved() {
    const { path, repository } = await newRepository()
    const tree = buildRichTree(`${temporaryDirectory()}/tree`)
    await save(repository, tree)
    const find = async (kind: 'data' | 'tree') => {
      for await (const { name, sizeBytes } of repository.backend.list('pack')) {
        if ((await repository.readPack(name, sizeBytes))[0]?.kind === kind) return name
      }
      throw new Error('no such pack')
    }
    const [data, trees] = [await find('data'), await find('tree')]
    const fileOf = (id: string) => {
      chmodSync(`${path}/data/${id.slice(0, 2)}/${id}`, 0o600)
      return `${path}/data/${id.slice(0, 2)}/${id}`
    }
    return { path, repository, tree, data, trees, fileOf }
  }

  test('a whole repository has no problems', async () => {
    const { path } = await saved()
    const report = await checkRepository(await reopen(path), { readData: true })
    expect(report).toMatchObject({ problems: [], snapshots: 1, packs: 2, packsRead: 2 })
  })

  test('a missing pack is named, with the files that it costs', async () => {
    const { path, data, fileOf } = await saved()
    rmSync(fileOf(data))
    const { problems } = await checkRepository(await reopen(path))
    expect(problems.map(({ code, id }) => `${code} ${id}`)).toContain(`PACK_MISSING ${data}`)
    expect(problems.some(({ code, path }) => code === 'OBJECT_MISSING' && path?.endsWith('/old') === true)).toBe(true)
  })

  test('a pack that is too short is named without reading data, and flipped bits with it', async () => {
    const { path, data, fileOf } = await saved()
    const bytes = readFileSync(fileOf(data))
    truncateSync(fileOf(data), bytes.length - 1)
    expect(await errorsOf(await reopen(path))).toContain(`PACK_DAMAGED ${data}`)
    bytes[10] = (bytes[10] as number) ^ 4
    writeFileSync(fileOf(data), bytes)
    expect(await errorsOf(await reopen(path))).toEqual([])
    const { problems } = await checkRepository(await reopen(path), { readData: true })
    expect(problems.map(({ message }) => message).join('\n')).toMatch(/1 of its \d+ objects are damaged/)
  })

  test('the parts of a subset together are everything', async () => {
    const { path, repository, data, fileOf } = await saved()
    const bytes = readFileSync(fileOf(data))
    bytes[10] = (bytes[10] as number) ^ 4
    writeFileSync(fileOf(data), bytes)
    const found = await Promise.all(
      [1, 2, 3].map(async (part) => errorsOf(await reopen(path), { readData: { part, of: 3 } })),
    )
    const [first] = (await repository.readPack(data, bytes.length)).filter(({ offset }) => offset === 0)
    // The pack, and each file that needs the piece.
    expect(new Set(found.flat())).toEqual(new Set([`PACK_DAMAGED ${data}`, `OBJECT_DAMAGED ${first?.id}`]))
  })

  test('damaged snapshots and indexes are named', async () => {
    const { path, repository } = await saved()
    for (const [kind, folder_, code] of [
      ['snapshot', 'snapshots', 'REPOSITORY_FILE_DAMAGED'],
      ['index', 'index', 'REPOSITORY_FILE_DAMAGED'],
    ] as const) {
      const [id] = await repository.listIds(kind)
      chmodSync(`${path}/${folder_}/${id}`, 0o600)
      writeFileSync(`${path}/${folder_}/${id}`, 'nonsense')
      expect(await errorsOf(await reopen(path))).toContain(`${code} ${id}`)
    }
  })

  test('what an interrupted run left is a note, and prune removes it', async () => {
    const { path, repository } = await saved()
    const [index] = await repository.listIds('index')
    renameSync(`${path}/index/${index}`, `${path}/held`)
    const extra = `${temporaryDirectory()}/extra`
    buildTree(extra, dir({ x: file('unindexed content') }))
    const { snapshotId } = await save(await reopen(path), extra)
    for (const id of await repository.listIds('index')) rmSync(`${path}/index/${id}`, { force: true })
    renameSync(`${path}/held`, `${path}/index/${index}`)
    await repository.backend.delete({ kind: 'snapshot', name: snapshotId })
    const { problems } = await checkRepository(await reopen(path))
    expect(problems.map(({ severity, code }) => `${severity} ${code}`)).toEqual([
      'note PACK_UNINDEXED',
      'note PACK_UNINDEXED',
    ])
    expect((await pruneRepository(await reopen(path))).packs.removed).toBe(2)
    expect((await checkRepository(await reopen(path), { readData: true })).problems).toEqual([])
  })

  test('a lost index is made again from the packs', async () => {
    const { path, repository } = await saved()
    for (const name of readdirSync(`${path}/index`)) rmSync(`${path}/index/${name}`)
    expect(await errorsOf(await reopen(path))).not.toEqual([])
    const report = await repairIndex(repository)
    expect(report).toMatchObject({ packs: 2, packsRead: 2, unreadable: [], missing: [] })
    expect(await errorsOf(await reopen(path), { readData: true })).toEqual([])
    expect(new Restic(path).run('check')).toContain('no errors were found')
  })

  test('what is whole in a damaged pack is saved', async () => {
    const { path, repository, data, fileOf } = await saved()
    const bytes = readFileSync(fileOf(data))
    bytes[10] = (bytes[10] as number) ^ 4
    writeFileSync(fileOf(data), bytes)
    const report = await repairPacks(repository, [data])
    expect(report.removed).toEqual([data])
    expect(report.lost).toHaveLength(1)
    expect(report.saved).toBeGreaterThan(10)
    // A linked file is missed under each of its names.
    expect(new Set(await errorsOf(await reopen(path), { readData: true }))).toEqual(
      new Set([`OBJECT_MISSING ${report.lost[0]}`]),
    )
    // What is lost is stored again when it is still there to be saved.
    const snapshot = await findSnapshot(await reopen(path), 'latest')
    await save(await reopen(path), snapshot.paths[0] as string, { force: true })
    expect(await errorsOf(await reopen(path), { readData: true })).toEqual([])
  })
})

describe.skipIf(!canAll)('a snapshot that lacks something', () => {
  /** Two versions of a tree with a large file; the largest pack of the first one is gone. */
  async function damaged(kind: 'data' | 'tree') {
    const { path, repository } = await newRepository()
    const root = temporaryDirectory()
    mkdirSync(`${root}/tree/sub/deep`, { recursive: true })
    mkdirSync(`${root}/tree/kept/inner`, { recursive: true })
    const large = randomBytes(20_000_000)
    writeFileSync(`${root}/tree/large`, large)
    writeFileSync(`${root}/tree/kept/inner/f`, 'kept')
    writeFileSync(`${root}/tree/sub/small`, 'small')
    const first = await save(repository, `${root}/tree`)
    const packs: { id: string; size: number }[] = []
    for await (const { name, sizeBytes } of repository.backend.list('pack')) {
      if ((await repository.readPack(name, sizeBytes))[0]?.kind === kind) packs.push({ id: name, size: sizeBytes })
    }
    writeFileSync(`${root}/tree/sub/deep/later`, 'later')
    writeFileSync(`${root}/tree/sub/small`, 'changed')
    const second = await save(repository, `${root}/tree`)
    const [largest] = packs.sort((left, right) => right.size - left.size)
    const { id } = largest as { id: string }
    rmSync(`${path}/data/${id.slice(0, 2)}/${id}`)
    await repairIndex(await reopen(path))
    return { path, root, large, first, second }
  }

  test('is repaired as restic does it: what is left of a file stays, and the rest is whole', async () => {
    const { path, root, large, first, second } = await damaged('data')
    expect(await errorsOf(await reopen(path))).not.toEqual([])
    const repository = await reopen(path)
    const request = { snapshots: await listSnapshots(repository) }
    const dry = await repairSnapshots(repository, { ...request, dryRun: true })
    const repaired = await repairSnapshots(repository, { ...request, forget: true })
    expect(dry).toEqual(repaired.map((one) => ({ ...one, to: undefined })))
    expect(repaired).toEqual(
      [first, second].map(({ snapshotId }) => ({
        from: snapshotId,
        to: expect.stringMatching(/^[0-9a-f]{64}$/),
        losses: [{ path: `${root}/tree/large`, lost: 'content' }],
      })),
    )
    expect(await errorsOf(await reopen(path), { readData: true })).toEqual([])
    expect(new Restic(path).run('check', '--read-data')).toContain('no errors were found')
    const again = await reopen(path)
    const snapshots = await listSnapshots(again)
    expect(snapshots.map(({ tags, original }) => [tags, original])).toEqual([
      [['repaired'], first.snapshotId],
      [['repaired'], second.snapshotId],
    ])
    const snapshot = snapshots.at(-1) as Snapshot
    const { problems } = await restoreSnapshot(again, { snapshot, target: hostPath(`${root}/back`) })
    expect(problems).toEqual([])
    expect(readFileSync(`${root}/back/sub/small`, 'utf8')).toBe('changed')
    const left = readFileSync(`${root}/back/large`)
    expect(left.length).toBeGreaterThan(0)
    expect(left.length).toBeLessThan(large.length)
    // The pieces that are left follow each other.
    expect(large.includes(left.subarray(0, 4096))).toBe(true)
    expect(await repairSnapshots(again, { snapshots: await listSnapshots(again) })).toEqual([])
  })

  test('has empty directories where they cannot be read, and goes when nothing of it is left', async () => {
    const { path, root, first, second } = await damaged('tree')
    const repository = await reopen(path)
    const repaired = await repairSnapshots(repository, { snapshots: await listSnapshots(repository), forget: true })
    expect(repaired).toEqual([
      { from: first.snapshotId, to: undefined, losses: [{ path: '/', lost: 'directory' }] },
      {
        from: second.snapshotId,
        to: expect.stringMatching(/^[0-9a-f]{64}$/),
        losses: [{ path: `${root}/tree/kept`, lost: 'directory' }],
      },
    ])
    expect(await errorsOf(await reopen(path), { readData: true })).toEqual([])
    expect(new Restic(path).run('check', '--read-data')).toContain('no errors were found')
    const again = await reopen(path)
    const [snapshot] = await listSnapshots(again)
    await restoreSnapshot(again, { snapshot: snapshot as Snapshot, target: hostPath(`${root}/back`) })
    expect(readdirSync(`${root}/back/kept`)).toEqual([])
    expect(readFileSync(`${root}/back/sub/deep/later`, 'utf8')).toBe('later')
  })
})

describe.skipIf(!canAll)('locks', () => {
  test('of restic are honoured, and restic honours ours', async () => {
    const { path, repository } = await newRepository()
    const restic = new Restic(path)
    const exclusive = await RepositoryLock.acquire(repository, { exclusive: true })
    expect(restic.try('backup', '/etc/hostname').output).toContain('already locked')
    await exclusive.release()
    const shared = await RepositoryLock.acquire(repository, { exclusive: false })
    expect(restic.try('backup', '/etc/hostname').status).toBe(0)
    expect(restic.try('prune').output).toContain('already locked')
    await expect(RepositoryLock.acquire(await reopen(path), { exclusive: true })).rejects.toMatchObject({
      code: 'REPOSITORY_LOCKED',
    })
    await shared.release()
    const theirs = { time: new Date().toISOString(), exclusive: true, hostname: 'elsewhere', username: 'u', pid: 1 }
    const id = await repository.writeFile('lock', Buffer.from(JSON.stringify(theirs)))
    await expect(save(repository, '/etc')).rejects.toMatchObject({ code: 'REPOSITORY_LOCKED' })
    await repository.backend.delete({ kind: 'lock', name: id })
    expect(await repository.listIds('lock')).toEqual([])
  })

  test('that nobody holds any more do not count, and unlock removes them', async () => {
    const { repository } = await newRepository()
    const old = { exclusive: true, username: 'u', uid: 0, gid: 0 }
    const dead = { ...old, time: new Date().toISOString(), hostname: hostname(), pid: 4_100_000 }
    const ancient = { ...old, time: '2020-01-01T00:00:00Z', hostname: 'elsewhere', pid: 1 }
    const alive = { ...old, time: new Date().toISOString(), hostname: 'elsewhere', pid: 1, exclusive: false }
    for (const lock of [dead, ancient, alive]) await repository.writeFile('lock', Buffer.from(JSON.stringify(lock)))
    await (await RepositoryLock.acquire(repository, { exclusive: false })).release()
    await expect(RepositoryLock.acquire(repository, { exclusive: true })).rejects.toMatchObject({
      code: 'REPOSITORY_LOCKED',
    })
    expect(await removeLocks(repository, { all: false })).toBe(2)
    expect(await removeLocks(repository, { all: true })).toBe(1)
  })

  test('are not needed to read what cannot be written to', async () => {
    const { path, repository } = await newRepository()
    const directory = temporaryDirectory()
    buildTree(`${directory}/tree`, dir({ f: file('x') }))
    await save(repository, `${directory}/tree`)
    const mounted = `${directory}/mounted`
    mkdirSync(mounted)
    run('mount', '--bind', '-o', 'ro', path, mounted)
    const again = await reopen(mounted)
    onTestFinished(async () => {
      await again.backend.close()
      unmount(mounted)
    })
    const snapshot = await findSnapshot(again, 'latest')
    const target = hostPath(`${directory}/back`)
    await expect(restoreSnapshot(again, { snapshot, target })).rejects.toMatchObject({ code: 'EROFS' })
    expect((await restoreSnapshot(again, { snapshot, target, noLock: true })).problems).toEqual([])
    expect(await errorsOf(again, { readData: true, noLock: true })).toEqual([])
  })

  test('one that was taken away is noticed before anything counts', async () => {
    const { repository } = await newRepository()
    const lock = await RepositoryLock.acquire(repository, { exclusive: false })
    await removeLocks(repository, { all: true })
    await expect(lock.settled()).rejects.toMatchObject({ code: 'LOCK_LOST' })
    await lock.release()
  })
})

describe.skipIf(!canAll)('looking into snapshots', () => {
  async function two() {
    const { path, repository } = await newRepository()
    const root = temporaryDirectory()
    const tree = `${root}/tree`
    buildTree(
      tree,
      dir({
        same: dir({ f: file('x') }),
        changed: file('1'),
        gone: dir({ g: file('') }),
        mode: file('', { mode: 0o600 }),
        t: file(''),
      }),
    )
    const first = await save(repository, tree)
    writeFileSync(`${tree}/changed`, '2')
    rmSync(`${tree}/gone`, { recursive: true })
    chmodSync(`${tree}/mode`, 0o644)
    rmSync(`${tree}/t`)
    buildTree(`${tree}/come`, dir({ h: file('') }))
    symlinkSync('x', `${tree}/t`)
    const second = await save(repository, tree)
    const again = await reopen(path)
    await again.loadIndex()
    const snapshots = (await Promise.all([first, second].map(({ snapshotId }) => again.readSnapshot(snapshotId)))) as [
      Snapshot,
      Snapshot,
    ]
    return { path, repository: again, snapshots, tree, root }
  }

  test('diff shows what changed, as restic does', async () => {
    const { path, repository, snapshots, tree } = await two()
    const [before, after] = await Promise.all(snapshots.map((snapshot) => locatePath(repository, snapshot, undefined)))
    const changes: string[] = []
    if (before === undefined || after === undefined) throw new Error('nothing there')
    for await (const { change, path } of diffSnapshots(repository, before, after)) changes.push(`${change} ${path}`)
    expect(changes).toEqual([
      'content /changed',
      'added /come',
      'added /come/h',
      'removed /gone',
      'removed /gone/g',
      'metadata /mode',
      'type /t',
    ])
    const lines = new Restic(path).run('diff', '--metadata', snapshots[0].id, snapshots[1].id)
    const theirs = [...lines.matchAll(/^([+\-MUT]+)\s+(.*?)\/?$/gm)]
      .filter(([, , path = '']) => path.startsWith(`${tree}/`))
      .map(([, , path = '']) => path.slice(tree.length))
    expect([...new Set(theirs)].sort()).toEqual(changes.map((line) => line.split(' ')[1]).sort())
  })

  test('find, show, dump and stats tell what is there', async () => {
    const { repository, snapshots, tree } = await two()
    const found: string[] = []
    for await (const { snapshot, path } of findInSnapshots(repository, { snapshots, patterns: ['g*'] })) {
      found.push(`${snapshots.indexOf(snapshot)} ${path}`)
    }
    expect(found).toEqual([`0 ${tree}/gone`])
    const shown: string[] = []
    const located = await locatePath(repository, snapshots[1], undefined)
    for await (const { path } of listContent(repository, located)) shown.push(path.slice(tree.length))
    expect(shown).toEqual(['', '/changed', '/come', '/come/h', '/mode', '/same', '/same/f', '/t'])
    const file_ = await locatePath(repository, snapshots[0], `${tree}/changed` as ByteString)
    const parts: Buffer[] = []
    for await (const part of dumpFile(repository, file_)) parts.push(part)
    expect(Buffer.concat(parts).toString()).toBe('1')
    await expect(dumpFile(repository, located).next()).rejects.toMatchObject({ code: 'CONTENT_NONE' })
    const stats = await measureSnapshots(repository, snapshots)
    expect(stats).toMatchObject({ snapshots: 2, restoreBytes: 4 })
    expect(stats.files).toBe(9)
  })

  test('tags are added, removed and set, and restic sees them', async () => {
    const { path, repository, snapshots } = await two()
    const [change] = await tagSnapshots(repository, { ids: [snapshots[0].id], add: ['x', 'y'] })
    const [next] = await tagSnapshots(repository, { ids: [change?.to as string], add: ['z'], remove: ['x'] })
    expect(await tagSnapshots(repository, { ids: [next?.to as string], add: ['z'] })).toEqual([])
    const listed = JSON.parse(new Restic(path).run('snapshots', '--json', '--tag', 'y,z')) as { original: string }[]
    expect(listed).toEqual([expect.objectContaining({ tags: ['y', 'z'], original: snapshots[0].id })])
    expect(await listSnapshots(repository, { tags: [['y', 'z']] })).toHaveLength(1)
    expect(await listSnapshots(repository, { tags: [['y', 'x']] })).toHaveLength(0)
  })

  test('copies are whole, and are not made twice', async () => {
    const { path, repository, tree, root } = await two()
    const { path: otherPath, repository: other } = await newRepository()
    const all = await listSnapshots(repository)
    const report = await copySnapshots(repository, other, { snapshots: all })
    expect(report.copied).toHaveLength(2)
    expect(await errorsOf(await reopen(otherPath), { readData: true })).toEqual([])
    expect(new Restic(otherPath).run('check', '--read-data')).toContain('no errors were found')
    const again = await reopen(otherPath)
    await restoreSnapshot(again, { snapshot: await findSnapshot(again, 'latest'), target: hostPath(`${root}/back`) })
    expect(readTree(`${root}/back`)).toEqual(readTree(tree))
    const second = await copySnapshots(await reopen(path), await reopen(otherPath), { snapshots: all })
    expect(second).toMatchObject({ copied: [], objects: 0 })
    expect(second.present).toHaveLength(2)
  })
})

test.skipIf(!canAll)('both tools write to one repository at the same time', async () => {
  const { path } = await newRepository()
  const root = temporaryDirectory()
  for (const name of ['ours', 'theirs']) {
    buildTree(
      `${root}/${name}`,
      dir({ shared: folder('shared', 80), own: folder(name, 80), l: linkTo('own/f1'), s: symlink('x') }),
    )
  }
  const env = { ...process.env, RESTIC_PASSWORD: PASSWORD }
  const child = spawn('restic', ['--no-cache', '-r', path, 'backup', `${root}/theirs`], { env, stdio: 'ignore' })
  const ended = new Promise<number | null>((resolve) => child.once('exit', resolve))
  for (let i = 0; i < 3; i++) await save(await reopen(path), `${root}/ours`, { parent: 'none' })
  expect(await ended).toBe(0)
  expect(new Restic(path).run('check', '--read-data')).toContain('no errors were found')
  expect(await errorsOf(await reopen(path), { readData: true })).toEqual([])
  expect(await listSnapshots(await reopen(path))).toHaveLength(4)
})

test.skipIf(!hasRestic)(
  'a password that is added opens the repository, for restic too, until it is removed',
  async () => {
    const { path, repository } = await newRepository()
    const id = await repository.addKey('second', undefined, CHEAP)
    expect((await repository.listKeys()).filter(({ isCurrent }) => isCurrent)).toHaveLength(1)
    const list = () =>
      spawnSync('restic', ['--no-cache', '-r', path, 'snapshots'], {
        env: { ...process.env, RESTIC_PASSWORD: 'second' },
      })
    expect(list().status).toBe(0)
    await expect(repository.removeKey(repository.keyId)).rejects.toMatchObject({ code: 'KEY_IN_USE' })
    expect(await repository.removeKey(id)).toBe(true)
    expect(list().status).not.toBe(0)
  },
)
