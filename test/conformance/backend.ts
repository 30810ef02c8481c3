import { createHash, randomBytes } from 'node:crypto'
import { type Backend, FILE_KINDS, type FileKind, type FileRef } from '@lsync/snapshot'
import { describe, expect, onTestFinished, test } from 'vitest'

/** How a suite gets an empty place for a repository, and gives it back. */
export interface BackendFixture {
  /** A backend on a fresh place. */
  open(): Promise<Backend>
  /** A second backend on the place of the last `open`: what it sees has left the first one's memory. */
  reopen(): Promise<Backend>
  /** Gives everything back; runs after each test. */
  cleanUp(): Promise<void>
}

const NAMED = FILE_KINDS.filter((kind) => kind !== 'config')

/** The name of a file with this content. */
function nameOf(content: Uint8Array): string {
  return createHash('sha256').update(content).digest('hex')
}

async function listed(backend: Backend, kind: FileKind): Promise<[string, number][]> {
  const files: [string, number][] = []
  for await (const { name, sizeBytes } of backend.list(kind)) files.push([name, sizeBytes])
  return files.sort(([left], [right]) => (left < right ? -1 : 1))
}

async function put(backend: Backend, kind: FileKind, content: Uint8Array): Promise<FileRef> {
  const file = { kind, name: kind === 'config' ? '' : nameOf(content) }
  await backend.put(file, content)
  return file
}

/** What every backend has to keep, as tests. `fixture` is called once for each test. */
export function describeBackend(title: string, fixture: () => BackendFixture): void {
  const fresh = async () => {
    const place = fixture()
    const backend = await place.open()
    onTestFinished(async () => {
      await backend.close()
      await place.cleanUp()
    })
    await backend.create()
    return {
      backend,
      again: async () => {
        const other = await place.reopen()
        onTestFinished(() => other.close())
        return other
      },
    }
  }

  describe(title, () => {
    test.each(FILE_KINDS)('a %s that was put is there, whole and by range, for others too', async (kind) => {
      const { backend, again } = await fresh()
      const content = randomBytes(1000)
      const file = await put(backend, kind, content)
      for (const side of [backend, await again()]) {
        expect(await side.stat(file)).toEqual({ sizeBytes: 1000 })
        expect((await side.get(file)).equals(content)).toBe(true)
        expect((await side.get(file, { offset: 10, length: 20 })).equals(content.subarray(10, 30))).toBe(true)
        expect((await side.get(file, { offset: 990, length: 20 })).equals(content.subarray(990))).toBe(true)
        expect(await listed(side, kind)).toEqual([[file.name, 1000]])
      }
    })

    test('creating a second time changes nothing', async () => {
      const { backend } = await fresh()
      const file = await put(backend, 'index', randomBytes(10))
      await backend.create()
      expect(await listed(backend, 'index')).toEqual([[file.name, 10]])
    })

    test('an empty place lists nothing', async () => {
      const { backend } = await fresh()
      for (const kind of FILE_KINDS) expect(await listed(backend, kind)).toEqual([])
    })

    test('a listing shows the files of its kind alone, each once', async () => {
      const { backend } = await fresh()
      const files = await Promise.all(
        NAMED.flatMap((kind) => [1, 2, 3].map((size) => put(backend, kind, randomBytes(size)))),
      )
      for (const kind of NAMED) {
        const names = files.filter((file) => file.kind === kind).map(({ name }) => name)
        expect((await listed(backend, kind)).map(([name]) => name)).toEqual(names.sort())
      }
    })

    test('what is not there is an answer of stat and delete, and an error of get', async () => {
      const { backend } = await fresh()
      for (const kind of FILE_KINDS) {
        const file = { kind, name: kind === 'config' ? '' : nameOf(Buffer.from('absent')) }
        expect(await backend.stat(file)).toBeUndefined()
        expect(await backend.delete(file)).toBe(false)
        await expect(backend.get(file)).rejects.toMatchObject({ code: 'REPOSITORY_FILE_MISSING' })
        await expect(backend.get(file, { offset: 1, length: 1 })).rejects.toMatchObject({
          code: 'REPOSITORY_FILE_MISSING',
        })
      }
    })

    test('a deleted file is gone', async () => {
      const { backend, again } = await fresh()
      const file = await put(backend, 'pack', randomBytes(100))
      expect(await backend.delete(file)).toBe(true)
      const other = await again()
      expect(await other.stat(file)).toBeUndefined()
      expect(await listed(other, 'pack')).toEqual([])
    })

    test('putting the same file twice, at once too, is the same as once', async () => {
      const { backend } = await fresh()
      const content = randomBytes(100_000)
      await Promise.all([put(backend, 'pack', content), put(backend, 'pack', content)])
      const file = await put(backend, 'pack', content)
      expect(await listed(backend, 'pack')).toEqual([[file.name, 100_000]])
      expect((await backend.get(file)).equals(content)).toBe(true)
    })

    test('an exclusive put leaves alone what is there', async () => {
      const { backend } = await fresh()
      const config = { kind: 'config', name: '' } as const
      expect(await backend.put(config, Buffer.from('first'), { exclusive: true })).toBe(true)
      expect(await backend.put(config, Buffer.from('second'), { exclusive: true })).toBe(false)
      expect((await backend.get(config)).toString()).toBe('first')
      expect(await backend.put(config, Buffer.from('third'))).toBe(true)
      expect((await backend.get(config)).toString()).toBe('third')
    })

    test('empty files and files of 20 MB go through', async () => {
      const { backend } = await fresh()
      const large = randomBytes(20_000_000)
      const files = [await put(backend, 'index', Buffer.alloc(0)), await put(backend, 'pack', large)] as const
      expect((await backend.get(files[0])).length).toBe(0)
      expect((await backend.get(files[1])).equals(large)).toBe(true)
      expect((await backend.get(files[1], { offset: 19_999_990, length: 5 })).equals(large.subarray(-10, -5))).toBe(
        true,
      )
    })

    test('as many calls as are worth it run at once, and each gives its own answer', async () => {
      const { backend } = await fresh()
      const contents = Array.from({ length: backend.concurrency * 3 }, (_, i) => randomBytes(2000 + i))
      const files = await Promise.all(contents.map((content) => put(backend, 'pack', content)))
      const back = await Promise.all(files.map((file) => backend.get(file)))
      for (const [i, content] of contents.entries()) expect(back[i]?.equals(content)).toBe(true)
    })

    test('an aborted signal stops every call with its reason', async () => {
      const { backend } = await fresh()
      const file = await put(backend, 'index', randomBytes(10))
      const reason = new Error('enough')
      const call = { signal: AbortSignal.abort(reason) }
      await expect(backend.get(file, undefined, call)).rejects.toBe(reason)
      await expect(backend.stat(file, call)).rejects.toBe(reason)
      await expect(backend.put({ kind: 'index', name: nameOf(Buffer.from('x')) }, Buffer.from('x'), call)).rejects.toBe(
        reason,
      )
      await expect(backend.delete(file, call)).rejects.toBe(reason)
      await expect(backend.list('index', call)[Symbol.asyncIterator]().next()).rejects.toBe(reason)
      expect(await backend.stat(file)).toEqual({ sizeBytes: 10 })
    })
  })
}
