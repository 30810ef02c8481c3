import { createHash, randomBytes } from 'node:crypto'
import { mkdirSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { hostPath } from '@lsync/posix'
import {
  type Backend,
  type BackendCall,
  type ByteRange,
  CachingBackend,
  createSnapshot,
  type FileRef,
  LocalBackend,
  listContent,
  listSnapshots,
  locatePath,
  Repository,
} from '@lsync/snapshot'
import { expect, test } from 'vitest'
import { describeBackend } from '../conformance/backend.ts'
import { newRepository, PASSWORD, temporaryDirectory } from '../support/repository.ts'

describeBackend('a repository behind a cache', () => {
  const directory = temporaryDirectory()
  const open = async () =>
    new CachingBackend(new LocalBackend(hostPath(`${directory}/repository`)), { directory: `${directory}/cache` })
  return { open, reopen: open, cleanUp: async () => rmSync(directory, { recursive: true, force: true }) }
})

/** A backend on another machine, as far as anybody can tell; it writes down what is read. */
class RemoteBackend implements Backend {
  readonly location: string
  readonly concurrency = 4
  readonly settleMs = 0
  readonly reads: string[] = []
  readonly #inner: LocalBackend

  constructor(path: string) {
    this.#inner = new LocalBackend(hostPath(path))
    this.location = `remote ${path}`
  }

  create(call?: BackendCall) {
    return this.#inner.create(call)
  }

  list(kind: FileRef['kind'], call?: BackendCall) {
    return this.#inner.list(kind, call)
  }

  stat(file: FileRef, call?: BackendCall) {
    return this.#inner.stat(file, call)
  }

  get(file: FileRef, range?: ByteRange, call?: BackendCall) {
    this.reads.push(file.kind)
    return this.#inner.get(file, range, call)
  }

  put(file: FileRef, content: Uint8Array, call?: BackendCall & { readonly exclusive?: boolean }) {
    return this.#inner.put(file, content, call)
  }

  delete(file: FileRef, call?: BackendCall) {
    return this.#inner.delete(file, call)
  }

  close() {
    return this.#inner.close()
  }
}

const BIG = ['snapshot', 'index', 'pack']

/** A repository with a snapshot, and what reading its list of files takes. */
async function prepared() {
  const { path, repository } = await newRepository()
  const root = temporaryDirectory()
  mkdirSync(`${root}/tree/d`, { recursive: true })
  writeFileSync(`${root}/tree/d/f`, 'content')
  await createSnapshot(repository, { targets: [{ path: hostPath(`${root}/tree`) }] })
  const cache = `${root}/cache`
  const directory = `${cache}/${repository.config.id}`
  const walk = async () => {
    const backend = new RemoteBackend(path)
    const again = await Repository.open(backend, { password: PASSWORD, cacheDirectory: cache })
    const snapshot = (await listSnapshots(again)).at(-1)
    if (snapshot === undefined) throw new Error('no snapshot')
    await again.loadIndex()
    const names: string[] = []
    const at = await locatePath(again, snapshot, hostPath(`${root}/tree`))
    for await (const { node } of listContent(again, at)) names.push(node.name)
    expect(names).toEqual(['tree', 'd', 'f'])
    again.close()
    return backend.reads.filter((kind) => BIG.includes(kind))
  }
  const cached = () =>
    ['snapshots', 'index', 'data'].flatMap((kind) =>
      readdirSync(`${directory}/${kind}`).map((name) => `${directory}/${kind}/${name}`),
    )
  return { path, root, repository, directory, walk, cached }
}

test('what describes a repository travels once, and no content of files is kept', async () => {
  const { directory, walk, cached } = await prepared()
  expect((await walk()).sort()).toEqual(['index', 'pack', 'snapshot'])
  expect(await walk()).toEqual([])
  expect(cached()).toHaveLength(3)
  expect(statSync(directory).mode & 0o777).toBe(0o700)
  expect(readFileSync(`${directory}/CACHEDIR.TAG`, 'utf8')).toMatch(/^Signature: 8a477f597d28d172789f06886806bc55/)
})

test('what was changed in the cache is fetched anew', async () => {
  const { walk, cached } = await prepared()
  await walk()
  for (const path of cached()) {
    const bytes = readFileSync(path)
    bytes[5] = (bytes[5] as number) ^ 1
    writeFileSync(path, bytes)
  }
  expect((await walk()).sort()).toEqual(['index', 'pack', 'snapshot'])
  for (const path of cached()) writeFileSync(path, '')
  expect((await walk()).sort()).toEqual(['index', 'pack', 'snapshot'])
  expect(await walk()).toEqual([])
})

test('what the repository has no more goes from the cache, and a cache that cannot be made costs nothing', async () => {
  const { path, root, repository, directory, walk } = await prepared()
  await walk()
  const [first] = readdirSync(`${directory}/snapshots`)
  await createSnapshot(repository, { targets: [{ path: hostPath(`${root}/tree`) }] })
  await repository.backend.delete({ kind: 'snapshot', name: String(first) })
  await walk()
  expect(readdirSync(`${directory}/snapshots`)).toEqual(readdirSync(`${path}/snapshots`))
  rmSync(`${root}/cache`, { recursive: true })
  writeFileSync(`${root}/cache`, 'a file')
  // Then each tree is read by itself, and not the whole pack for it.
  expect((await walk()).filter((kind) => kind === 'pack').length).toBeGreaterThan(1)
})

test('no more is kept than was allowed, and what was used longest ago goes first', async () => {
  const place = temporaryDirectory()
  const inner = new LocalBackend(hostPath(`${place}/repository`))
  await inner.create()
  const cache = new CachingBackend(inner, { directory: `${place}/cache`, maxBytes: 2500 })
  const names: string[] = []
  for (let i = 0; i < 3; i++) {
    const content = randomBytes(1000)
    const name = createHash('sha256').update(content).digest('hex')
    names.push(name)
    await cache.put({ kind: 'index', name }, content)
    await new Promise((resolve) => setTimeout(resolve, 5))
  }
  expect(readdirSync(`${place}/cache/index`).sort()).toEqual(names.slice(1).sort())
})
