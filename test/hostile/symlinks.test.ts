import { type ChildProcess, fork } from 'node:child_process'
import { mkdirSync, readdirSync, readFileSync, readlinkSync, symlinkSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { merge, recover } from '@lsync/overlay-merge'
import { type ByteString, type HostPath, LsyncError, makeSymlink, openRoot, withFd } from '@lsync/posix'
import { afterEach, describe, expect, test } from 'vitest'
import { buildTree, dir, file, opaque, whiteout } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { readTree } from '../support/tree.ts'

const isRoot = process.geteuid?.() === 0
const swapper = fileURLToPath(new URL('./swapper.ts', import.meta.url))

function many(count: number, prefix = 'f') {
  return Object.fromEntries(Array.from({ length: count }, (_, index) => [`${prefix}${index}`, file(`${index}`)]))
}

describe.skipIf(!needs('root', isRoot))('nothing outside the roots is touched', () => {
  const disk = useFileSystem('tmpfs')
  const children: ChildProcess[] = []
  afterEach(() => {
    for (const child of children.splice(0)) child.kill('SIGKILL')
  })

  function site() {
    const at = disk.current.fresh()
    const outside = `${at}/outside`
    mkdirSync(outside)
    for (const name of ['f1', 'f2', 'gone1', 'keep']) writeFileSync(`${outside}/${name}`, 'precious')
    const before = readTree(outside)
    return { at, outside, before, upper: `${at}/u` as HostPath, lower: `${at}/l` as HostPath }
  }

  test('a symlink planted at any component of the lower is replaced or kept, never followed', async () => {
    const { at, outside, before, upper, lower } = site()
    const content = dir({ ...many(5), gone1: whiteout() })
    buildTree(upper, dir({ a: content, b: opaque(many(5)), c: dir({ d: content }) }))
    buildTree(lower, dir({ c: dir() }))
    symlinkSync(outside, `${lower}/a`)
    symlinkSync(outside, `${lower}/b`)
    symlinkSync(outside, `${lower}/c/d`)
    await merge({ upper, lowers: [lower], mode: 'output', output: `${at}/new` as HostPath })
    await merge({ upper, lowers: [lower], mode: 'in-place' })
    for (const tree of [lower, `${at}/new`]) {
      expect(readdirSync(`${tree}/a`).sort()).toEqual(['f0', 'f1', 'f2', 'f3', 'f4'])
      expect(readFileSync(`${tree}/c/d/f1`, 'utf8')).toBe('1')
    }
    expect(readTree(outside)).toEqual(before)
  })

  test.each(['upper', 'lower'] as const)(
    'a directory of the %s swapped for a symlink while it runs leads nowhere',
    async (side) => {
      for (let round = 0; round < 6; round++) {
        const { at, outside, before, upper, lower } = site()
        const gone = Object.fromEntries(Array.from({ length: 300 }, (_, index) => [`gone${index}`, whiteout()]))
        buildTree(upper, dir({ a: dir({ ...many(300), ...gone }), z: dir(many(300)) }))
        buildTree(lower, dir({ a: dir({ ...many(300), ...many(300, 'gone') }), z: dir(many(300)) }))
        const child = fork(swapper, [side === 'upper' ? upper : lower, 'a', outside])
        children.push(child)
        await new Promise((resolve) => child.once('message', resolve))
        const mode = round % 2 === 0 ? 'in-place' : 'output'
        const request = {
          upper,
          lowers: [lower],
          mode,
          ...(mode === 'output' ? { output: `${at}/new` as HostPath } : {}),
        } as const
        // Whatever becomes of the merge, it must end, with an error that says what is the matter or with none.
        const error: unknown = await merge({ ...request, workers: 0 }).catch((cause: unknown) => cause)
        if (error instanceof Error) expect(error).toBeInstanceOf(LsyncError)
        child.kill('SIGKILL')
        await new Promise((resolve) => child.once('exit', resolve))
        await recover(mode === 'output' ? (`${at}/new` as HostPath) : lower, { workers: 0 }).catch((cause: unknown) => {
          expect(cause).toBeInstanceOf(LsyncError)
        })
        expect(readTree(outside)).toEqual(before)
      }
    },
    60_000,
  )

  test('a plan planted inside a lower is not carried out by recover', async () => {
    const { at, outside, before, upper, lower } = site()
    buildTree(upper, dir(many(3)))
    buildTree(lower, dir({ '.lsync.evil': dir({ plan: file('{"type":"header","format":1}\n') }) }))
    expect(await recover(lower)).toEqual({ outcome: 'nothing' })
    expect(readdirSync(`${lower}/.lsync.evil`)).toEqual(['plan'])
    expect(readTree(outside)).toEqual(before)
    expect(readdirSync(at).sort()).toEqual(['l', 'outside', 'u'])
  })

  test('a hundred thousand names in one directory are merged', async () => {
    const { upper, lower } = site()
    const count = 100_000
    buildTree(upper, dir({ d: dir() }))
    buildTree(lower, dir({ d: dir({ kept: file('k'), n7: file('old') }) }))
    withFd(openRoot(`${upper}/d` as HostPath), (fd) => {
      for (let i = 0; i < count; i++) makeSymlink('x' as ByteString, fd, `n${i}` as ByteString)
    })
    await merge({ upper, lowers: [lower], mode: 'in-place' })
    expect(readdirSync(`${lower}/d`).length).toBe(count + 1)
    expect(readdirSync(upper)).toEqual([])
  }, 120_000)
  // More than are held at a time, of the base's names and of the plan's steps.
  test('a new version of a directory with a hundred thousand names has each of them once', async () => {
    const { at, upper, lower } = site()
    const count = 100_000
    buildTree(upper, dir({ d: dir() }))
    buildTree(lower, dir({ d: dir() }))
    const fill = (layer: string, target: string, wanted: (i: number) => boolean) =>
      withFd(openRoot(`${layer}/d` as HostPath), (fd) => {
        for (let i = 0; i < count; i++) if (wanted(i)) makeSymlink(target as ByteString, fd, `n${i}` as ByteString)
      })
    fill(upper, 'new', (i) => i % 4 !== 0)
    fill(lower, 'old', (i) => i % 10 !== 1)
    const output = `${at}/new` as HostPath
    await merge({ upper, lowers: [lower], mode: 'output', output, clone: 'hardlink' })
    const targets = Array.from({ length: count }, (_, i) => readlinkSync(`${output}/d/n${i}`))
    expect(targets.findIndex((target, i) => target !== (i % 4 === 0 ? 'old' : 'new'))).toBe(-1)
    expect(readdirSync(`${output}/d`).length).toBe(count)
  }, 120_000)
})
