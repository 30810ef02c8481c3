import { existsSync, readdirSync } from 'node:fs'
import { deref, recover } from '@lsync/overlay-merge'
import { type HostPath, PosixError, setSyscallHook } from '@lsync/posix'
import { afterEach, describe, expect, test } from 'vitest'
import {
  buildTree,
  type DirectorySpec,
  dir,
  file,
  linkTo,
  metacopy,
  opaque,
  redirected,
  removeTree,
  whiteout,
  xattrWhiteout,
} from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { describeLayers, viewOf } from '../support/merging.ts'
import { optionMatrix, plainOptions } from '../support/overlay.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { diffTrees, outline, readTree, type Tree } from '../support/tree.ts'
import { anyHistory, fc, storyOf, withGrown } from './stacks.ts'

const disk = useFileSystem('ext4')
afterEach(() => setSyscallHook(undefined))
const following = { ...plainOptions, redirectDir: 'on', metacopy: true } as const

function marksIn(tree: Tree, ...words: string[]): string[] {
  return [...tree].flatMap(([path, node]) =>
    [...node.xattrs.keys()]
      .filter((name) => words.some((word) => /^(trusted|user)$/.test(name.replace(`.overlay.${word}`, ''))))
      .map(() => path),
  )
}

describe('an upper without redirects and metacopies shows the same view', () => {
  const cells = optionMatrix().filter(({ excluded, options }) => excluded === undefined && !options.index)
  describe.each(cells)('$name', ({ options }) => {
    test.each([1, 3])(
      'over %i lowers',
      async (lowers) => {
        await fc.assert(
          fc.asyncProperty(anyHistory(lowers), (history) =>
            withGrown(disk.current, history, options, async (grown) => {
              const output = `${grown.directory}/out`
              const before = grown.view()
              const layers = [grown.upper, ...grown.lowers].map(readTree)
              const { inexact } = await deref({ ...grown.request, output: output as HostPath })
              // Before a mount has written marks of its own into it.
              const marks = ['redirect', 'metacopy', 'origin', 'nlink', 'impure', 'uuid']
              expect(marksIn(readTree(output), ...marks)).toEqual([])
              const after = viewOf({
                directory: grown.directory,
                layers: [output, ...grown.lowers],
                work: `${output}.work`,
                // Nothing in it needs to be followed any more.
                options: {
                  ...options,
                  redirectDir: grown.lowers.length > 1 ? options.redirectDir : 'off',
                  metacopy: grown.lowers.length > 1 && options.metacopy,
                },
              })
              const split = new Set(inexact.map(({ path }) => path))
              const lines = diffTrees(before, after).filter(
                (line) => !(split.size > 0 && / links should be /.test(line)),
              )
              if (lines.length > 0) {
                expect.fail(
                  `${lines.join('\n')}\n${storyOf(grown)}\n${describeLayers([grown.upper, output, ...grown.lowers])}`,
                )
              }
              for (const [index, path] of [grown.upper, ...grown.lowers].entries()) {
                expect(diffTrees(layers[index] as Tree, readTree(path))).toEqual([])
              }
            }),
          ),
          runs(4),
        )
      },
      timeLimit(),
    )
  })
})

function build(...layers: DirectorySpec[]) {
  const directory = disk.current.fresh()
  const [upper, ...lowers] = layers.map((spec, index) => {
    const path = `${directory}/${index === 0 ? 'u' : `l${index}`}`
    buildTree(path, spec)
    return path as HostPath
  }) as [HostPath, ...HostPath[]]
  const output = `${directory}/out` as HostPath
  const view = (top: string) =>
    viewOf({
      directory,
      layers: [top, ...lowers],
      work: `${directory}/w-${top === output ? 'o' : 'u'}`,
      options: following,
    })
  return { directory, request: { upper, lowers, output }, view }
}

describe('deref', () => {
  test('unfolds a renamed directory with all its content, and keeps the whiteout at its old name', async () => {
    const { request, view } = build(
      dir({ new: redirected('old', { added: file('1'), gone: whiteout() }), old: whiteout() }),
      dir({ old: dir({ kept: file('k'), gone: file('g'), d: dir({ deep: file('d') }) }) }),
    )
    const before = view(request.upper)
    const report = await deref(request)
    const tree = readTree(request.output)
    expect(outline(tree)).toEqual({
      new: 'dir',
      'new/added': '1',
      'new/d': 'dir',
      'new/d/deep': 'd',
      'new/kept': 'k',
      old: 'character',
    })
    expect(marksIn(tree, 'opaque')).toEqual(['new'])
    expect(report).toMatchObject({ unfoldedDirectories: 1, whiteouts: 1, objects: 3, inexact: [] })
    expect(diffTrees(before, view(request.output))).toEqual([])
  })

  test('unfolds a swap, a chain through a middle layer, and an absolute redirect below an opaque directory', async () => {
    const { request, view } = build(
      dir({
        a: redirected('b'),
        b: redirected('a'),
        c: redirected('m'),
        m: whiteout(),
        x: whiteout(),
        op: opaque({ in: redirected('/x', { w: whiteout() }) }),
        self: redirected('/self', { extra: file('1') }),
      }),
      dir({ m: redirected('orig'), orig: whiteout() }),
      dir({
        a: dir({ fa: file('a') }),
        b: dir({ fb: file('b') }),
        orig: dir({ f: file('o') }),
        x: dir({ fx: file('x'), w: file('w') }),
        self: dir({ f: file('s') }),
      }),
    )
    const before = view(request.upper)
    await deref(request)
    expect(diffTrees(before, view(request.output))).toEqual([])
    const tree = readTree(request.output)
    expect(marksIn(tree, 'opaque').sort()).toEqual(['a', 'b', 'c', 'op'])
    expect(tree.has('self/f')).toBe(false)
  })

  test('fills metacopies, with their links, and makes device whiteouts of all whiteouts', async () => {
    const { request, view } = build(
      dir({
        f: metacopy(4, { mode: 0o600 }),
        one: metacopy(5, { redirect: '/g' }),
        two: linkTo('one'),
        g: whiteout(),
        w: xattrWhiteout(),
      }),
      dir({ f: file('data'), g: file('other'), w: file('1') }),
    )
    const before = view(request.upper)
    const report = await deref(request)
    expect(report.unfoldedFiles).toBe(3)
    const tree = readTree(request.output)
    expect(tree.get('one')?.links).toEqual(['one', 'two'])
    expect(outline(tree)).toEqual({ f: 'data', one: 'other', two: 'other', g: 'character', w: 'character' })
    expect(diffTrees(before, view(request.output))).toEqual([])
  })

  test('names what it cannot hold exactly: hard links into a renamed directory from outside', async () => {
    const { request } = build(
      dir({ new: redirected('old'), old: whiteout() }),
      dir({ old: dir({ f: file('1') }), outside: linkTo('old/f') }),
    )
    expect((await deref(request)).inexact).toEqual([
      { path: 'new/f', why: 'it shares its inode with names outside the renamed directory' },
    ])
  })

  test('makes flags of a lower into the mark by which an upper shows them', async () => {
    const { directory, request, view } = build(
      dir({ new: redirected('old'), old: whiteout() }),
      dir({ old: dir({ f: file('1', { flags: 'i' }) }) }),
    )
    const before = view(request.upper)
    await deref(request)
    expect(diffTrees(before, view(request.output))).toEqual([])
    removeTree(directory)
  })

  test('a dry run gives the same figures and makes nothing', async () => {
    const { directory, request } = build(
      dir({
        new: redirected('old', { w: whiteout() }),
        old: whiteout(),
        m: metacopy(9),
        one: file('1'),
        two: linkTo('one'),
        gone: whiteout(),
      }),
      dir({ old: dir({ f: file('1'), w: file('w'), outside: file('x') }), m: file('data'), y: linkTo('old/f') }),
    )
    const before = readdirSync(directory)
    const { elapsedMs: _, ...planned } = await deref({ ...request, dryRun: true })
    expect(readdirSync(directory)).toEqual(before)
    const { elapsedMs: __, ...made } = await deref(request)
    expect(planned).toEqual({ ...made, dryRun: true })
    expect(made.inexact).toHaveLength(2)
  })

  test('makes real flags of the upper into that mark as well, and names those of the root', async () => {
    const { directory, request, view } = build(
      dir({ f: file('1', { flags: 'i', marks: { protattr: 'a' } }), d: dir({}, { flags: 'a' }) }, { flags: 'a' }),
      dir({ g: file('g') }),
    )
    const { inexact } = await deref(request)
    expect(inexact.map(({ path }) => path)).toEqual([''])
    const tree = view(request.output)
    expect([tree.get('f')?.flags, tree.get('d')?.flags, tree.get('')?.flags]).toEqual(['ia', 'a', ''])
    removeTree(directory)
  })

  test('refuses an output that exists, one inside a layer, and an upper that the kernel fails on', async () => {
    const { directory, request } = build(dir({ d: redirected('..') }), dir({ d: dir({}) }))
    await expect(deref(request)).rejects.toMatchObject({ code: 'LAYER_INVALID' })
    expect(existsSync(request.output)).toBe(false)
    buildTree(request.output, dir({}))
    await expect(deref(request)).rejects.toMatchObject({ code: 'OUTPUT_EXISTS' })
    const inside = `${directory}/l1/new` as HostPath
    await expect(deref({ ...request, output: inside })).rejects.toMatchObject({ code: 'ROOTS_NESTED' })
    expect(readdirSync(directory).filter((name) => name.startsWith('.lsync'))).toEqual([])
  })

  test('killed before any system call leaves the whole new upper or none, and recover takes the rest away', async () => {
    const upper = dir({ new: redirected('old', { added: file('1') }), old: whiteout(), m: metacopy(4) })
    const lower = dir({ old: dir({ kept: file('k') }), m: file('data') })
    for (let stop = 1; ; stop++) {
      const { directory, request, view } = build(upper, lower)
      const before = view(request.upper)
      let calls = 0
      setSyscallHook((syscall, path) => {
        if (++calls >= stop) throw new PosixError('EIO', { syscall, path })
      })
      const result = await deref(request).catch((error: unknown) => error)
      setSyscallHook(undefined)
      await recover(request.output)
      expect(readdirSync(directory).filter((name) => name.startsWith('.lsync'))).toEqual([])
      if (existsSync(request.output)) expect(diffTrees(before, view(request.output))).toEqual([])
      expect(diffTrees(before, view(request.upper))).toEqual([])
      if (!existsSync(request.output)) await deref(request)
      expect(diffTrees(before, view(request.output))).toEqual([])
      removeTree(directory)
      if (!(result instanceof Error)) break
    }
  })
})
