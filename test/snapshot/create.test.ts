import { randomBytes } from 'node:crypto'
import { appendFileSync, chmodSync, mkdirSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { type HostPath, hostPath, PosixError, setSyscallHook } from '@lsync/posix'
import { type CreateRequest, checkRepository, createSnapshot, LocalBackend, Repository } from '@lsync/snapshot'
import { describe, expect, onTestFinished, test } from 'vitest'
import { buildRichTree } from '../layers/rich-tree.ts'
import { buildTree, dir, file, socket, sparse, symlink } from '../support/build.ts'
import { needs } from '../support/needs.ts'
import { newRepository, Restic, reopen, temporaryDirectory } from '../support/repository.ts'
import { isPresent } from '../support/system.ts'
import { readTree, type Tree } from '../support/tree.ts'

const isRoot = needs('root', process.geteuid?.() === 0)
const hasRestic = needs('restic', isPresent('restic'))

function save(repository: Repository, path: string, request: Partial<CreateRequest> = {}) {
  return createSnapshot(repository, { targets: [{ path: hostPath(path) }], ...request })
}

/** Directories above a saved one, whose times change whenever any test writes beside it: /, /dev, /dev/shm, the test's. */
const ABOVE = 4

/** The tree of the saved directory itself. */
async function savedTree(path: string, root: string): Promise<string> {
  const repository = await reopen(path)
  await repository.loadIndex()
  for (let id = root; ; ) {
    const [node] = await repository.readTree(id)
    if (node?.subtree === undefined) throw new Error('nothing was saved')
    if (node.name === 'tree') return node.subtree
    id = node.subtree
  }
}

/** What a snapshot shows, as names and types, by restic's own eyes. */
function listed(restic: Restic, snapshot: string): string[] {
  return restic
    .json<{ struct_type: string; path: string; type: string }>('ls', snapshot)
    .filter(({ struct_type }) => struct_type === 'node')
    .map(({ path, type }) => `${type} ${path}`)
}

/** A tree as far as restic 0.14 restores it: it makes no sockets, gives symlinks no times and fills holes. */
function asResticRestores(tree: Tree): Tree {
  return new Map(
    [...tree].map(([path, { dataBytes: _, allocatedBytes: __, ...node }]) => [
      path,
      node.type === 'symlink' ? { ...node, mtimeNs: 0n } : node,
    ]),
  )
}

describe.skipIf(!isRoot || !hasRestic)('a snapshot of ours', () => {
  test.each([1, 2] as const)(
    'in a repository of version %i is whole to restic, and restores to the same tree',
    async (version) => {
      const { path, repository } = await newRepository(version)
      const directory = temporaryDirectory()
      const tree = buildRichTree(`${directory}/tree`)
      rmSync(`${directory}/tree/link bytes`)
      const { problems, snapshotId } = await save(repository, tree)
      expect(problems).toEqual([])
      const restic = new Restic(path)
      expect(restic.run('check', '--read-data')).toContain('no errors were found')
      restic.run('restore', snapshotId, '--target', `${directory}/restored`)
      expect(asResticRestores(readTree(`${directory}/restored${tree}`))).toEqual(asResticRestores(readTree(tree)))
    },
  )

  test('has the very trees that restic makes of the same directory', async () => {
    const { path, repository } = await newRepository()
    const tree = buildRichTree(`${temporaryDirectory()}/tree`)
    rmSync(`${tree}/link bytes`)
    const { tree: id } = await save(repository, tree)
    const restic = new Restic(path)
    restic.run('backup', '--force', tree)
    const snapshots = JSON.parse(restic.run('snapshots', '--json')) as { tree: string }[]
    const ids = await Promise.all(
      [id, ...snapshots.map((snapshot) => snapshot.tree)].map((root) => savedTree(path, root)),
    )
    expect(ids).toEqual([ids[0], ids[0], ids[0]])
  })

  test('has of a large file, which all threads store, the very chunks that restic makes', async () => {
    const { path, repository } = await newRepository()
    const tree = `${temporaryDirectory()}/tree`
    mkdirSync(tree)
    // Text that repeats within a chunk only, behind it what has no cut, and an end that fills no chunk.
    const piece = randomBytes(3_000_000)
    writeFileSync(`${tree}/big`, Buffer.concat([...Array(30).fill(piece), Buffer.alloc(20_000_000), piece.subarray(7)]))
    const ours = await save(repository, tree, { workers: 2 })
    expect(ours.problems).toEqual([])
    expect(ours.counts).toMatchObject({ filesNew: 1, totalBytes: 112_999_993, readBytes: 112_999_993 })
    const restic = new Restic(path)
    restic.run('backup', '--force', tree)
    const [latest] = restic.json<{ tree: string }[]>('snapshots', 'latest').flat() as { tree: string }[]
    expect(await savedTree(path, String(latest?.tree))).toBe(await savedTree(path, ours.tree))
    restic.run('check', '--read-data')
    // As a target of its own, too.
    const alone = await save(repository, `${tree}/big`, { parent: 'none' })
    expect(alone.counts).toMatchObject({ filesNew: 1, totalBytes: 112_999_993 })
  })

  test('is what restic calls unchanged, file by file', async () => {
    const { path, repository } = await newRepository()
    const tree = buildRichTree(`${temporaryDirectory()}/tree`)
    await save(repository, tree)
    const [summary] = new Restic(path)
      .json<{ message_type: string; files_new: number; files_changed: number; data_blobs: number }>('backup', tree)
      .filter(({ message_type }) => message_type === 'summary')
    expect(summary).toMatchObject({ files_new: 0, files_changed: 0, data_blobs: 0 })
  })

  test('of several paths shows each where it lies', async () => {
    const { path, repository } = await newRepository()
    const root = temporaryDirectory()
    buildTree(`${root}/tree`, dir({ a: dir({ f: file('1') }), b: dir({ c: dir({ g: file('2') }) }), d: file('3') }))
    const targets = [`${root}/tree/b/c`, `${root}/tree/a`].map((target) => ({ path: hostPath(target) }))
    const { snapshotId } = await createSnapshot(repository, { targets })
    const restic = new Restic(path)
    expect(listed(restic, snapshotId).filter((line) => line.includes('/tree'))).toEqual([
      `dir ${root}/tree`,
      `dir ${root}/tree/a`,
      `file ${root}/tree/a/f`,
      `dir ${root}/tree/b`,
      `dir ${root}/tree/b/c`,
      `file ${root}/tree/b/c/g`,
    ])
    expect(restic.run('check')).toContain('no errors were found')
  })

  test('may be of single files and symlinks, as restic saves them', async () => {
    const { path, repository } = await newRepository()
    const root = temporaryDirectory()
    buildTree(`${root}/tree`, dir({ f: file('1'), other: file(''), d: dir({ g: file('2') }), l: symlink('nowhere') }))
    const paths = ['f', 'd', 'l'].map((name) => `${root}/tree/${name}`)
    const targets = paths.map((target) => ({ path: hostPath(target) }))
    const ours = await createSnapshot(repository, { targets })
    expect(ours.counts).toMatchObject({ filesNew: 2, others: 1 })
    const again = await createSnapshot(await reopen(path), { targets })
    expect(again.counts).toMatchObject({ filesNew: 0, filesUnmodified: 2, readBytes: 0 })
    const restic = new Restic(path)
    restic.run('backup', '--force', ...paths)
    const all = (JSON.parse(restic.run('snapshots', '--json')) as { id: string }[]).map(({ id }) => listed(restic, id))
    expect(all).toEqual([all[0], all[0], all[0]])
    expect(all[0]).toContain(`file ${root}/tree/f`)
    expect(restic.run('check', '--read-data')).toContain('no errors were found')
  })

  test('has the host, time and tags that it is given', async () => {
    const { path, repository } = await newRepository()
    const tree = buildRichTree(`${temporaryDirectory()}/tree`)
    await save(repository, tree, { hostname: 'other', timeNs: 1_500_000_000_123_000_000n, tags: ['x', 'y'] })
    const [snapshot] = JSON.parse(new Restic(path).run('snapshots', '--json')) as Record<string, unknown>[]
    expect(snapshot).toMatchObject({ hostname: 'other', tags: ['x', 'y'], paths: [tree] })
    expect(new Date(String(snapshot?.['time'])).getTime()).toBe(1_500_000_000_123)
  })

  test('leaves out what patterns exclude, as restic does', async () => {
    const { path, repository } = await newRepository()
    const tree = `${temporaryDirectory()}/tree`
    buildTree(
      tree,
      dir({
        'a.o': file(''),
        src: dir({ 'a.c': file(''), 'a.o': file(''), 'keep.o': file('') }),
        cache: dir({ x: dir({ y: file('') }) }),
        deep: dir({ one: dir({ cache: dir({ z: file('') }), two: dir({ f: file('') }) }) }),
        é1: file(''),
        é22: file(''),
      }),
    )
    const excludes = ['*.o', '!keep.o', `${tree}/cache`, 'deep/**/f', 'é?', 'one/cache/*']
    const ours = await save(repository, tree, { excludes })
    const restic = new Restic(path)
    restic.run('backup', '--force', ...excludes.flatMap((pattern) => ['--exclude', pattern]), tree)
    const theirs = (JSON.parse(restic.run('snapshots', '--json')) as { id: string }[]).find(
      ({ id }) => id !== ours.snapshotId,
    )
    expect(listed(restic, ours.snapshotId)).toEqual(listed(restic, theirs?.id as string))
  })
})

describe.skipIf(!isRoot)('saving again', () => {
  test('reads nothing that did not change, and stores nothing twice', async () => {
    const { path, repository } = await newRepository()
    const tree = buildRichTree(`${temporaryDirectory()}/tree`)
    const first = await save(repository, tree)
    writeFileSync(`${tree}/new`, 'content')
    chmodSync(`${tree}/dots/-rf`, 0o600)
    const second = await save(await reopen(path), tree)
    expect(second.parent).toBe(first.snapshotId)
    expect(second.counts).toMatchObject({ filesNew: 1, filesChanged: 1, readBytes: 8 })
    const third = await save(await reopen(path), tree)
    expect(third.counts).toMatchObject({ filesNew: 0, filesChanged: 0, readBytes: 0 })
    expect(third.counts.objectsAdded).toBeLessThanOrEqual(ABOVE)
    expect(await savedTree(path, third.tree)).toBe(await savedTree(path, second.tree))
  })

  test('takes the latest snapshot of the same host and path for the parent', async () => {
    const { repository } = await newRepository()
    const root = temporaryDirectory()
    for (const name of ['a', 'b']) buildTree(`${root}/${name}`, dir({ f: file(name) }))
    const first = await save(repository, `${root}/a`, { timeNs: 2_000_000_000_000_000_000n })
    await save(repository, `${root}/a`, { timeNs: 1_000_000_000_000_000_000n, parent: 'none' })
    await save(repository, `${root}/b`)
    await save(repository, `${root}/a`, { hostname: 'elsewhere' })
    expect((await save(repository, `${root}/a`)).parent).toBe(first.snapshotId)
  })

  test('a file that moved is read, and its content is not stored again', async () => {
    const { repository } = await newRepository()
    const tree = `${temporaryDirectory()}/tree`
    buildTree(tree, dir({ a: file('some content') }))
    await save(repository, tree)
    renameSync(`${tree}/a`, `${tree}/b`)
    const { counts } = await save(repository, tree)
    expect(counts).toMatchObject({ filesNew: 1, readBytes: 12 })
  })

  test('with force reads all files', async () => {
    const { repository } = await newRepository()
    const tree = buildRichTree(`${temporaryDirectory()}/tree`)
    await save(repository, tree)
    const { counts } = await save(repository, tree, { force: true })
    expect(counts.filesUnmodified).toBe(0)
    expect(counts.objectsAdded).toBeLessThanOrEqual(ABOVE)
  })

  test('a parent that is damaged costs time and nothing else', async () => {
    const { path, repository } = await newRepository()
    const tree = buildRichTree(`${temporaryDirectory()}/tree`)
    const first = await save(repository, tree)
    for await (const { name } of repository.backend.list('pack')) {
      const objects = await repository.readPack(
        name,
        (await repository.backend.stat({ kind: 'pack', name }))?.sizeBytes ?? 0,
      )
      if (objects[0]?.kind === 'tree') await repository.backend.put({ kind: 'pack', name }, Buffer.alloc(5000))
    }
    const second = await save(await reopen(path), tree)
    expect(second.problems).toEqual([])
    expect(second.counts.filesUnmodified).toBe(0)
    expect(second.parent).toBe(first.snapshotId)
  })
})

describe.skipIf(!isRoot)('what cannot be saved', () => {
  function failOn(name: string, code: string, syscall = 'openat') {
    setSyscallHook((call, path) => {
      if (call === syscall && path === name) throw new PosixError(code, { syscall: call, path })
    })
    onTestFinished(() => setSyscallHook(undefined))
  }

  test('an unreadable file is a problem, and the rest is saved', async () => {
    const { path, repository } = await newRepository()
    const tree = `${temporaryDirectory()}/tree`
    buildTree(tree, dir({ bad: file('1'), good: file('2'), d: dir({ bad: file('3'), e: file('4') }) }))
    failOn('bad', 'EIO')
    const report = await save(repository, tree)
    setSyscallHook(undefined)
    expect(report.problems).toEqual([
      expect.objectContaining({ path: `${tree}/bad`, code: 'EIO' }),
      expect.objectContaining({ path: `${tree}/d/bad`, code: 'EIO' }),
    ])
    expect(report.counts.filesNew).toBe(2)
    if (hasRestic) expect(new Restic(path).run('check', '--read-data')).toContain('no errors were found')
  })

  test('a large file that grows all the time is saved as it was, with a problem', async () => {
    const { path, repository } = await newRepository()
    const tree = `${temporaryDirectory()}/tree`
    buildTree(tree, dir({ small: file('s') }))
    writeFileSync(`${tree}/big`, randomBytes(70_000_000))
    let opened = 0
    setSyscallHook((syscall, name) => {
      if (syscall === 'openat' && name === 'big') appendFileSync(`${tree}/big`, String(opened++))
    })
    onTestFinished(() => setSyscallHook(undefined))
    const { problems, counts } = await save(repository, tree, { workers: 1 })
    setSyscallHook(undefined)
    expect(problems.map(({ path: at, code }) => [at, code])).toEqual([[`${tree}/big`, 'FILE_CHANGING']])
    expect(counts.filesNew).toBe(2)
    const { problems: found } = await checkRepository(await reopen(path), { readData: true })
    expect(found).toEqual([])
  })

  test('an unreadable directory is a problem, and is left out', async () => {
    const { repository } = await newRepository()
    const tree = `${temporaryDirectory()}/tree`
    buildTree(tree, dir({ a: dir({ f: file('') }), b: dir({ c: dir({ f: file('') }) }) }))
    failOn('b/c', 'EACCES', 'openat2')
    const { problems, counts } = await save(repository, tree)
    expect(problems).toEqual([expect.objectContaining({ path: `${tree}/b/c`, code: 'EACCES' })])
    expect(counts.directories).toBe(3)
  })

  test('nothing is saved of a tree that cannot be read at all', async () => {
    const { repository } = await newRepository()
    await expect(save(repository, '/dev/shm/not there')).rejects.toMatchObject({ code: 'ENOENT' })
    await expect(createSnapshot(repository, { targets: [] })).rejects.toMatchObject({
      code: 'SNAPSHOT_REQUEST_INVALID',
    })
    await expect(save(repository, 'relative' as HostPath)).rejects.toMatchObject({ code: 'SNAPSHOT_REQUEST_INVALID' })
    expect(await repository.listIds('snapshot')).toEqual([])
    expect(await repository.listIds('lock')).toEqual([])
  })

  test('a symlink in place of a directory is not followed', async () => {
    const { repository } = await newRepository()
    const root = temporaryDirectory()
    buildTree(`${root}/tree`, dir({ l: symlink('../outside') }))
    mkdirSync(`${root}/outside`)
    writeFileSync(`${root}/outside/secret`, 'x')
    const { counts } = await save(repository, `${root}/tree`)
    expect(counts).toMatchObject({ filesNew: 0, others: 1 })
  })
})

test.skipIf(!isRoot)('sockets are kept, and holes cost nothing', async () => {
  const { repository } = await newRepository()
  const tree = `${temporaryDirectory()}/tree`
  buildTree(tree, dir({ s: socket(), hole: sparse(100_000_000) }))
  const { counts } = await save(repository, tree)
  expect(counts.others).toBe(1)
  expect(counts.addedBytes).toBeLessThan(10_000)
})

test.skipIf(!isRoot)('a tree of many directories comes out the same, however many threads save it', async () => {
  const { path, repository } = await newRepository()
  const tree = `${temporaryDirectory()}/tree`
  const folder = (seed: number) =>
    dir(Object.fromEntries(Array.from({ length: 30 }, (_, i) => [`f${i}`, file(`${seed} ${i} `.repeat(50))])))
  const many = Object.fromEntries(Array.from({ length: 3000 }, (_, i) => [`x${i}`, file(String(i))]))
  buildTree(
    tree,
    dir({
      ...Object.fromEntries(
        Array.from({ length: 60 }, (_, i) => [`d${i}`, dir({ sub: folder(i), ...folder(i % 7).children })]),
      ),
      large: dir(many),
    }),
  )
  const alone = await save(repository, tree, { workers: 1, parent: 'none' })
  const { path: otherPath, repository: other } = await newRepository()
  const many4 = await save(other, tree, { workers: 4, parent: 'none' })
  expect(await savedTree(otherPath, many4.tree)).toBe(await savedTree(path, alone.tree))
  expect(many4.counts.filesNew).toBe(60 * 60 + 3000)
  // Two threads may store the same content at the same moment, but hardly ever do.
  expect(Math.abs(many4.counts.objectsAdded - alone.counts.objectsAdded)).toBeLessThan(50)
  expect((await other.listIds('pack')).length).toBe(2)
})

test('a wrong password opens nothing', async () => {
  const { path } = await newRepository()
  await expect(Repository.open(new LocalBackend(hostPath(path)), { password: 'wrong' })).rejects.toMatchObject({
    code: 'PASSWORD_WRONG',
  })
})
