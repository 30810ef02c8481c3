import {
  appendFileSync,
  chmodSync,
  chownSync,
  linkSync,
  mkdirSync,
  readdirSync,
  renameSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { tmpdir } from 'node:os'
import { describe, expect, test, vi } from 'vitest'
import { ChokidarSource } from '../../packages/sync/src/source/chokidar.ts'
import { PollSource } from '../../packages/sync/src/source/poll.ts'
import { temporary } from '../posix/temporary.ts'
import { type Watching, watching } from './hints.ts'

const sources = { chokidar: ChokidarSource, poll: PollSource } as const
const ODD = Buffer.from([0xff, 0x0a])

/** Poll says a change of a young directory or file more than once; this is about what is said at all. */
async function saidOf(watched: Watching, act: () => void): Promise<Set<string>> {
  await watched.said()
  act()
  return new Set(await watched.said())
}

describe.each(['chokidar', 'poll'] as const)('a %s source', (kind) => {
  const start = (root: string) => watching(root, (request) => new sources[kind](request))

  test('hints at every kind of change, at any depth', async () => {
    const { path } = temporary()
    mkdirSync(`${path}/d/deep`, { recursive: true })
    for (const name of ['f', 'd/deep/g', 'd/old']) writeFileSync(`${path}/${name}`, '')
    const watched = await start(path)
    expect(watched.source.kind).toBe(kind)
    const said = (act: () => void) => saidOf(watched, act)
    expect(await said(() => appendFileSync(`${path}/d/deep/g`, 'x'))).toContain('d/deep/g')
    expect(await said(() => chmodSync(`${path}/f`, 0o600))).toContain('f')
    expect(await said(() => chmodSync(`${path}/d/deep`, 0o700))).toContain('d/deep')
    expect(await said(() => linkSync(`${path}/f`, `${path}/d/linked`))).toContain('d/linked')
    const moved = await said(() => renameSync(`${path}/d/old`, `${path}/new`))
    expect([...moved]).toEqual(expect.arrayContaining(['d/old', 'new']))
    expect(await said(() => rmSync(`${path}/new`))).toContain('new')
    expect(await said(() => chmodSync(path, 0o750))).toContain('.')
  })

  test('a directory that appears is a tree, and what happens in it later is seen', async () => {
    const { path } = temporary()
    const watched = await start(path)
    const made = await saidOf(watched, () => {
      mkdirSync(`${path}/a/b/c`, { recursive: true })
      writeFileSync(`${path}/a/b/c/f`, '')
    })
    expect([...made]).toEqual(expect.arrayContaining(['a', 'tree a']))
    // Chokidar goes down into it by and by; until then, each drain names the tree again.
    await vi.waitFor(async () => {
      const later = await saidOf(watched, () => appendFileSync(`${path}/a/b/c/f`, 'x'))
      expect([...later]).toContain('a/b/c/f')
    }, 20_000)
  })

  test('a directory that comes in from outside is a tree', async () => {
    const { path } = temporary()
    mkdirSync(`${path}/root`)
    mkdirSync(`${path}/d/deep`, { recursive: true })
    const watched = await start(`${path}/root`)
    const came = await saidOf(watched, () => renameSync(`${path}/d`, `${path}/root/d`))
    expect([...came]).toContain('tree d')
    const left = await saidOf(watched, () => renameSync(`${path}/root/d`, `${path}/d`))
    expect([...left]).toContain('d')
  })

  test('a name that is not UTF-8 is not missed', async () => {
    const { path } = temporary()
    mkdirSync(`${path}/d`)
    const watched = await start(path)
    const odd = Buffer.concat([Buffer.from(`${path}/d/`), ODD])
    const made = await saidOf(watched, () => writeFileSync(odd, ''))
    expect([...made]).toContain(kind === 'poll' ? 'd/\udcff\n' : 'tree d')
    expect([...made]).not.toContain('d/\ufffd\n')
  })

  test('a backslash in a name is part of it', async () => {
    const { path } = temporary()
    mkdirSync(`${path}/a`)
    const watched = await start(path)
    expect(await saidOf(watched, () => writeFileSync(`${path}/a\\b`, ''))).toContain('a\\b')
  })

  test('hints come by themselves, without a drain', async () => {
    const { path } = temporary()
    const watched = await watching(path, (request) => new sources[kind](request), { pollIntervalMs: 20 })
    for (const name of ['one', 'two']) {
      writeFileSync(`${path}/${name}`, '')
      await vi.waitFor(() => expect(watched.hints).toContainEqual(expect.objectContaining({ name })), 20_000)
    }
  })

  test('several roots are watched at once and stopped one by one', async () => {
    const { path } = temporary()
    for (const name of ['x', 'y']) mkdirSync(`${path}/${name}`)
    const [x, y] = [await start(`${path}/x`), await start(`${path}/y`)]
    for (const name of ['x/f', 'y/g']) writeFileSync(`${path}/${name}`, '')
    expect(await x.said()).toEqual(expect.arrayContaining(['f']))
    expect(await y.said()).toEqual(expect.arrayContaining(['g']))
    await x.stop()
    writeFileSync(`${path}/x/h`, '')
    const later = await saidOf(y, () => writeFileSync(`${path}/y/i`, ''))
    expect([...later]).toContain('i')
    expect(x.hints.some((hint) => hint.kind === 'name' && hint.name === 'h')).toBe(false)
  })
})

describe('polling', () => {
  const start = (root: string) => watching(root, (request) => new PollSource(request))

  test('says nothing of files in which nothing changes, once they are some seconds old', async () => {
    const { path } = temporary()
    for (let i = 0; i < 30; i++) {
      mkdirSync(`${path}/d${i}`)
      writeFileSync(`${path}/d${i}/f`, '')
    }
    await new Promise((resolve) => setTimeout(resolve, 3500))
    const watched = await start(path)
    expect(await watched.said()).toEqual([])
    chownSync(`${path}/d7/f`, process.getuid?.() ?? 0, process.getgid?.() ?? 0)
    expect(new Set(await watched.said())).toEqual(new Set(['d7/f']))
  })

  test('a directory that another one has replaced is a tree', async () => {
    const { path } = temporary()
    mkdirSync(`${path}/d`)
    mkdirSync(`${path}/other`)
    const watched = await start(path)
    const said = await saidOf(watched, () => {
      rmSync(`${path}/d`, { recursive: true })
      renameSync(`${path}/other`, `${path}/d`)
    })
    expect([...said]).toContain('tree d')
  })
})

describe('chokidar', () => {
  test('leaves nothing behind when it is stopped', async () => {
    const markers = () => readdirSync(tmpdir()).filter((name) => name.startsWith('lsync-marker-')).length
    const before = markers()
    const { path } = temporary()
    const watched = await watching(path, (request) => new ChokidarSource(request))
    expect(markers()).toBe(before + 1)
    await watched.stop()
    expect(markers()).toBe(before)
  })
})
