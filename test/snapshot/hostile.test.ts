import { createHash } from 'node:crypto'
import { existsSync, mkdirSync, readdirSync } from 'node:fs'
import { zstdCompressSync } from 'node:zlib'
import { allocate, type ByteString, hostPath } from '@lsync/posix'
import {
  checkRepository,
  createSnapshot,
  findSnapshot,
  type ObjectId,
  type Repository,
  repairIndex,
  restoreSnapshot,
} from '@lsync/snapshot'
import { describe, expect, test } from 'vitest'
import { buildTree, dir, file } from '../support/build.ts'
import { needs } from '../support/needs.ts'
import { newRepository, reopen, temporaryDirectory } from '../support/repository.ts'

const isRoot = needs('root', process.geteuid?.() === 0)
const SEAL_BYTES = 32

/** One object of a pack that somebody wrote who has the keys and means no good. */
interface Forged {
  readonly kind: 'data' | 'tree'
  readonly content: Buffer
  /** What lies in the pack instead of the content, and how long the index says the content is. */
  readonly frame?: Buffer
  readonly claimedLength?: number
  /** What the index says its id is, in the place of its content's hash. */
  readonly claimedId?: ObjectId
}

const idOf = (bytes: Uint8Array): ObjectId => createHash('sha256').update(bytes).digest('hex')

function seal(repository: Repository, plain: Buffer): Buffer {
  const source = allocate(Math.max(1, plain.length))
  plain.copy(source.buffer)
  const sealed = allocate(plain.length + SEAL_BYTES)
  repository.engine.seal(source, 0, plain.length, sealed, 0)
  return sealed.buffer
}

/** Writes a pack, its index and a snapshot whose tree is the last object. No check of ours stands in the way. */
async function plant(repository: Repository, objects: readonly Forged[]): Promise<void> {
  let offset = 0
  const parts = objects.map(({ kind, content, frame, claimedLength, claimedId }) => {
    const sealed = seal(repository, frame ?? content)
    const size = claimedLength === undefined ? {} : { uncompressed_length: claimedLength }
    const entry = { id: claimedId ?? idOf(content), type: kind, offset, length: sealed.length, ...size }
    offset += sealed.length
    return { sealed, entry }
  })
  const pack = Buffer.concat([...parts.map(({ sealed }) => sealed), Buffer.alloc(40)])
  await repository.backend.put({ kind: 'pack', name: idOf(pack) }, pack)
  const index = { packs: [{ id: idOf(pack), blobs: parts.map(({ entry }) => entry) }] }
  await repository.writeFile('index', Buffer.from(JSON.stringify(index)))
  const snapshot = { time: '2024-01-01T00:00:00Z', tree: idOf((objects.at(-1) as Forged).content), paths: ['/'] }
  await repository.writeFile('snapshot', Buffer.from(JSON.stringify(snapshot)))
}

const META = {
  mode: 0o644,
  mtime: '2024-01-01T00:00:00Z',
  atime: '2024-01-01T00:00:00Z',
  ctime: '2024-01-01T00:00:00Z',
  uid: 0,
  gid: 0,
}

function tree(...nodes: object[]): Forged {
  return {
    kind: 'tree',
    content: Buffer.from(`${JSON.stringify({ nodes: nodes.map((node) => ({ ...META, ...node })) })}\n`),
  }
}

async function restored(path: string) {
  const repository = await reopen(path)
  const directory = temporaryDirectory()
  const run = async () =>
    restoreSnapshot(repository, {
      snapshot: await findSnapshot(repository, 'latest'),
      path: '/' as ByteString,
      target: hostPath(`${directory}/target`),
    })
  return { directory, run, repository }
}

describe.skipIf(!isRoot)('whoever has the keys, and means no good,', () => {
  test.each(['..', '.', 'a/b', '/etc', 'a\\x00b', ''])(
    'cannot lead out of the target with the name %j',
    async (name) => {
      const { path, repository } = await newRepository()
      const inner = { kind: 'data', content: Buffer.from('evil') } as const
      await plant(repository, [inner, tree({ name, type: 'file', size: 4, content: [idOf(inner.content)] })])
      const { directory, run } = await restored(path)
      const report = await run()
      expect(report.problems).toEqual([expect.objectContaining({ code: 'TREE_INVALID' })])
      expect(readdirSync(directory)).toEqual(['target'])
      expect(readdirSync(`${directory}/target`)).toEqual([])
    },
  )

  test('cannot write through a symlink of their own', async () => {
    const { path, repository } = await newRepository()
    const outside = `${temporaryDirectory()}/outside`
    mkdirSync(outside)
    const inner = { kind: 'data', content: Buffer.from('evil') } as const
    const sub = tree({ name: 'f', type: 'file', size: 4, content: [idOf(inner.content)] })
    // The name twice, as a symlink and as a directory; then under two names of which one could be the other.
    const twice = tree(
      { name: 'd', type: 'symlink', linktarget: outside },
      { name: 'd', type: 'dir', mode: 2 ** 31 + 0o755, subtree: idOf(sub.content) },
    )
    await plant(repository, [inner, sub, twice])
    const { run } = await restored(path)
    expect((await run()).problems).toEqual([expect.objectContaining({ code: 'TREE_INVALID' })])
    expect(readdirSync(outside)).toEqual([])
  })

  test('cannot fill the memory with a frame that grows', async () => {
    const { path, repository } = await newRepository()
    const bomb = {
      kind: 'data',
      content: Buffer.from('small'),
      frame: zstdCompressSync(Buffer.alloc(300_000_000)),
      claimedLength: 5,
    } as const
    await plant(repository, [bomb, tree({ name: 'f', type: 'file', size: 5, content: [idOf(bomb.content)] })])
    const { directory, run } = await restored(path)
    expect((await run()).problems).toEqual([expect.objectContaining({ path: 'f', code: 'OBJECT_DAMAGED' })])
    expect(existsSync(`${directory}/target/f`)).toBe(false)
  })

  test('cannot have memory reserved by lengths that nothing has', async () => {
    const { path, repository } = await newRepository()
    const content = Buffer.from('x')
    await plant(repository, [
      { kind: 'data', content, claimedLength: 4_000_000_000 },
      tree({ name: 'f', type: 'file', size: 1, content: [idOf(content)] }),
    ])
    const { run, repository: again } = await restored(path)
    await expect(run()).rejects.toMatchObject({ code: 'INDEX_INVALID' })
    const { problems } = await checkRepository(again)
    expect(problems.map(({ code }) => code)).toContain('INDEX_INVALID')
  })

  test('cannot pass one content off as another', async () => {
    const { path, repository } = await newRepository()
    const claimed = {
      kind: 'data',
      content: Buffer.from('what was saved'),
      frame: Buffer.from('something else'),
    } as const
    await plant(repository, [claimed, tree({ name: 'f', type: 'file', size: 14, content: [idOf(claimed.content)] })])
    const { run } = await restored(path)
    expect((await run()).problems).toEqual([expect.objectContaining({ path: 'f', code: 'OBJECT_DAMAGED' })])
  })

  test('cannot make a run endless with a directory that is in itself', async () => {
    const { path, repository } = await newRepository()
    const claimedId = idOf(Buffer.from('any'))
    const loop = { ...tree({ name: 'd', type: 'dir', mode: 2 ** 31 + 0o755, subtree: claimedId }), claimedId }
    const above = tree({ name: 'top', type: 'dir', mode: 2 ** 31 + 0o755, subtree: claimedId })
    await plant(repository, [loop, above])
    const { directory, run, repository: again } = await restored(path)
    expect((await run()).problems).toEqual([expect.objectContaining({ path: 'top', code: 'OBJECT_DAMAGED' })])
    expect(readdirSync(`${directory}/target/top`)).toEqual([])
    const { problems } = await checkRepository(again)
    expect(problems.map(({ code }) => code)).toContain('OBJECT_DAMAGED')
  })

  test('cannot make a run endless with directories nested beyond all bounds', async () => {
    const { path, repository } = await newRepository()
    const objects = [tree()]
    for (let depth = 0; depth < 4200; depth++) {
      const inner = objects.at(-1) as Forged
      objects.push(tree({ name: 'd', type: 'dir', mode: 2 ** 31 + 0o755, subtree: idOf(inner.content) }))
    }
    await plant(repository, objects)
    const { run } = await restored(path)
    await expect(run()).rejects.toMatchObject({ code: 'TREE_TOO_DEEP' })
  })

  test.each([0xffff_ffff, 3, 0])('cannot mislead with %i for the length of a header', async (length) => {
    const { path, repository } = await newRepository()
    const directory = `${temporaryDirectory()}/tree`
    buildTree(directory, dir({ f: file('x') }))
    await createSnapshot(repository, { targets: [{ path: hostPath(directory) }] })
    const pack = Buffer.alloc(200, 7)
    pack.writeUInt32LE(length, 196)
    await repository.backend.put({ kind: 'pack', name: idOf(pack) }, pack)
    const report = await repairIndex(await reopen(path))
    expect(report.unreadable).toEqual([expect.objectContaining({ id: idOf(pack) })])
  })

  test('cannot ask for absurd work before the password is known', async () => {
    const { path, repository } = await newRepository()
    const [id] = await repository.listIds('key')
    const key = JSON.parse((await repository.backend.get({ kind: 'key', name: id as string })).toString())
    const expensive = Buffer.from(JSON.stringify({ ...key, N: 2 ** 30, r: 64 }))
    await repository.backend.delete({ kind: 'key', name: id as string })
    await repository.backend.put({ kind: 'key', name: idOf(expensive) }, expensive)
    await expect(reopen(path)).rejects.toMatchObject({ code: 'KEY_INVALID' })
  })

  test('cannot change a config without being noticed', async () => {
    const { path, repository } = await newRepository()
    const config = await repository.backend.get({ kind: 'config', name: '' })
    config[20] = (config[20] as number) ^ 1
    await repository.backend.put({ kind: 'config', name: '' }, config)
    await expect(reopen(path)).rejects.toMatchObject({ code: 'REPOSITORY_FILE_DAMAGED' })
  })
})
