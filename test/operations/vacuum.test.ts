import { mkdirSync, readdirSync, utimesSync } from 'node:fs'
import { vacuum } from '@lsync/overlay-merge'
import { type HostPath, PosixError, setSyscallHook } from '@lsync/posix'
import { afterEach, describe, expect, test } from 'vitest'
import {
  buildTree,
  type DirectorySpec,
  dir,
  file,
  linkTo,
  opaque,
  redirected,
  removeTree,
  symlink,
  whiteout,
  xattrWhiteout,
} from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { describeLayers, viewOf } from '../support/merging.ts'
import { optionMatrix, plainOptions, withOverlay } from '../support/overlay.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { diffTrees, outline, readTree, type Tree } from '../support/tree.ts'
import { anyHistory, copyUpEverything, fc, storyOf, withGrown } from './stacks.ts'

const disk = useFileSystem('ext4')
afterEach(() => setSyscallHook(undefined))

describe('vacuum leaves the view as it is', () => {
  const cells = optionMatrix().filter((cell) => cell.excluded === undefined)
  describe.each(cells)('$name', ({ options }) => {
    test.each([1, 3])(
      'after a history over %i lowers, and drops nothing the second time',
      async (lowers) => {
        await fc.assert(
          fc.asyncProperty(anyHistory(lowers), fc.boolean(), (history, copyUp) =>
            withGrown(disk.current, history, options, async (grown) => {
              if (copyUp) copyUpEverything(grown, options.namespace)
              const before = grown.view()
              const layers = describeLayers([grown.upper, ...grown.lowers])
              const planned = await vacuum({ ...grown.request, dryRun: true })
              const { dropped } = await vacuum(grown.request)
              expect(planned.dropped).toEqual(dropped)
              const lines = diffTrees(before, grown.view())
              if (lines.length > 0) expect.fail(`${lines.join('\n')}\n${storyOf(grown)}\n${layers}`)
              expect((await vacuum(grown.request)).dropped).toEqual([])
            }),
          ),
          runs(4),
        )
      },
      timeLimit(),
    )
  })
})

const names = (dropped: readonly { path: string; why: string }[]) =>
  Object.fromEntries(dropped.map(({ path, why }) => [path, why]))

interface Built {
  readonly directory: string
  readonly request: { upper: HostPath; lowers: HostPath[] }
  view(): Tree
}

/** An upper over one lower, both as they are written down. Equal entries of both get equal times. */
function build(upper: DirectorySpec, lower: DirectorySpec): Built {
  const directory = disk.current.fresh()
  buildTree(`${directory}/l`, lower)
  buildTree(`${directory}/u`, upper)
  const request = { upper: `${directory}/u` as HostPath, lowers: [`${directory}/l` as HostPath] }
  const options = { ...plainOptions, redirectDir: 'on', metacopy: true } as const
  const work = `${directory}/w`
  return {
    directory,
    request,
    view: () => viewOf({ directory, layers: [`${directory}/u`, `${directory}/l`], work, options }),
  }
}

describe('vacuum drops', () => {
  test('copy-ups that equal what lies below, and keeps all that differs in anything', async () => {
    const same = { mode: 0o640, uid: 3, gid: 4, xattrs: { 'user.a': '1' } }
    const { request, view } = build(
      dir({
        same: file('same', same),
        bytes: file('same2', same),
        mode: file('same', { ...same, mode: 0o600 }),
        owner: file('same', { ...same, uid: 9 }),
        time: file('same', { ...same, mtimeNs: 1n }),
        attribute: file('same', { ...same, xattrs: { 'user.a': '2' } }),
        more: file('same', { ...same, xattrs: { 'user.a': '1', 'user.b': '' } }),
        link: symlink('to'),
        otherLink: symlink('to1'),
        kind: symlink('same'),
        flags: file('same', { ...same, marks: { protattr: 'i' } }),
        new: file('new'),
      }),
      dir({
        same: file('same', same),
        bytes: file('same1', same),
        mode: file('same', same),
        owner: file('same', same),
        time: file('same', same),
        attribute: file('same', same),
        more: file('same', same),
        link: symlink('to'),
        otherLink: symlink('to2'),
        kind: file('same', same),
        flags: file('same', same),
      }),
    )
    const before = view()
    const { dropped, bytes } = await vacuum(request)
    expect(names(dropped)).toEqual({ same: 'same-as-below', link: 'same-as-below' })
    expect(bytes).toBeGreaterThan(0)
    expect(diffTrees(before, view())).toEqual([])
  })

  test('whiteouts over nothing, wherever they stand', async () => {
    const { request, view } = build(
      dir({
        hides: whiteout(),
        nothing: whiteout(),
        attribute: xattrWhiteout(),
        closed: opaque({ w: whiteout(), f: file('1') }),
        d: dir({ below: whiteout(), none: whiteout(), f: file('1') }),
        renamed: redirected('old', { x: whiteout(), none: whiteout() }),
        dangling: redirected('/nowhere', { w: whiteout() }),
        old: whiteout(),
      }),
      dir({
        hides: file('1'),
        closed: dir({ w: file('1') }),
        d: dir({ below: file('1') }),
        old: dir({ x: file('1') }),
      }),
    )
    const before = view()
    const { dropped } = await vacuum(request)
    expect(Object.keys(names(dropped)).sort()).toEqual(['attribute', 'closed/w', 'd/none', 'nothing', 'renamed/none'])
    expect(diffTrees(before, view())).toEqual([])
    expect((await vacuum(request)).dropped).toEqual([])
  })

  test('directories that are then empty and equal, with all above them, and keeps the times of those that stay', async () => {
    const { request, view, directory } = build(
      dir({
        a: dir({ b: dir({ f: file('1') }) }),
        mode: dir({ f: file('1') }, { mode: 0o700 }),
        closedOverEmpty: opaque({}),
        closedOverFull: opaque({}),
      }),
      dir({
        a: dir({ b: dir({ f: file('1'), g: file('2') }) }),
        mode: dir({ f: file('1') }),
        closedOverEmpty: dir({}),
        closedOverFull: dir({ f: file('1') }),
      }),
    )
    const before = view()
    const { dropped } = await vacuum(request)
    expect(Object.keys(names(dropped))).toEqual(['a/b/f', 'a/b', 'a', 'closedOverEmpty', 'mode/f'])
    expect(outline(readTree(`${directory}/u`))).toEqual({ mode: 'dir', closedOverFull: 'dir' })
    expect(diffTrees(before, view())).toEqual([])
  })

  test('link groups only as a whole, and only when they are the same group below', async () => {
    const { request, view } = build(
      dir({
        a1: file('a'),
        a2: linkTo('a1'),
        b1: file('b'),
        b2: linkTo('b1'),
        c1: file('c'),
        c2: file('c'),
        d1: file('d'),
        d2: linkTo('d1'),
        e1: file('e'),
      }),
      dir({
        a1: file('a'),
        a2: linkTo('a1'),
        b1: file('b'),
        b2: linkTo('b1'),
        b3: linkTo('b1'),
        c1: file('c'),
        c2: linkTo('c1'),
        d1: file('d'),
        d2: file('d', { mtimeNs: 1n }),
        e1: file('e'),
        e2: linkTo('e1'),
      }),
    )
    const before = view()
    const { dropped } = await vacuum(request)
    expect(Object.keys(names(dropped))).toEqual(['a1', 'a2'])
    expect(diffTrees(before, view())).toEqual([])
  })

  test('no directory whose lower would then list whiteouts that it does not find', async () => {
    const directory = disk.current.fresh()
    buildTree(`${directory}/l2`, dir({ f: file('1') }))
    buildTree(`${directory}/l1`, dir({ d: dir({ w: whiteout() }) }))
    buildTree(`${directory}/u`, dir({ d: dir({}) }))
    const request = {
      upper: `${directory}/u` as HostPath,
      lowers: [`${directory}/l1`, `${directory}/l2`] as HostPath[],
    }
    expect((await vacuum(request)).dropped).toEqual([])
  })
})

describe('vacuum refuses', () => {
  test('an upper in a live mount, in whatever role', async () => {
    const { directory, request } = build(dir({ f: file('1') }), dir({ f: file('1') }))
    const [upper, lower] = [`${directory}/u`, `${directory}/l`]
    for (const stack of [{ upper, lowers: [lower], work: `${directory}/w` }, { lowers: [upper, lower] }]) {
      const refusal = withOverlay(stack, plainOptions, () => vacuumNow(request))
      await expect(refusal.result).rejects.toMatchObject({ code: 'LAYER_BUSY' })
    }
    expect((await vacuum(request)).dropped).toHaveLength(1)
  })

  test('layers that an interrupted merge has half changed', async () => {
    const { directory, request } = build(dir({ f: file('1') }), dir({ f: file('1') }))
    mkdirSync(`${directory}/.lsync.l`, { mode: 0o700 })
    await expect(vacuum(request)).rejects.toMatchObject({ code: 'MERGE_UNFINISHED' })
  })
})

// The refusal comes before the first await, while the mount is there; a promise cannot leave withOverlay bare.
function vacuumNow(request: { upper: HostPath; lowers: HostPath[] }): { result: Promise<unknown> } {
  return { result: vacuum(request) }
}

describe('vacuum killed before any system call', () => {
  const upper = dir({
    a: dir({ b: dir({ f: file('1'), w: whiteout() }), keep: file('k') }),
    w1: whiteout(),
    w2: whiteout(),
    d: dir({ x: file('1'), new: file('2') }, { mtimeNs: 5n }),
  })
  const lower = dir({ a: dir({ b: dir({ f: file('1') }) }), d: dir({ x: file('1') }) })

  test('leaves a view in which nothing but directory times can differ, and the next one puts those right', async () => {
    let left = 0
    for (let stop = 1; ; stop++) {
      const { directory, request, view } = build(upper, lower)
      const before = view()
      let calls = 0
      setSyscallHook((syscall, path) => {
        if (++calls >= stop) throw new PosixError('EIO', { syscall, path })
      })
      const result = await vacuum(request).catch((error: unknown) => error)
      setSyscallHook(undefined)
      const isDone = !(result instanceof Error)
      const lines = diffTrees(before, view())
      expect(lines.filter((line) => !/mtime/.test(line))).toEqual([])
      left += lines.length
      const { recovered } = await vacuum(request)
      expect(diffTrees(before, view())).toEqual([])
      expect(recovered).toBe(lines.length)
      expect(readdirSync(directory).filter((name) => name.startsWith('.lsync'))).toEqual([])
      removeTree(directory)
      if (isDone) break
    }
    // Otherwise the journal would never have been needed.
    expect(left).toBeGreaterThan(0)
  })

  test('does not undo what somebody did to a directory afterwards', async () => {
    const { directory, request, view } = build(upper, lower)
    let unlinked = 0
    setSyscallHook((syscall, path) => {
      if (unlinked > 0) throw new PosixError('EIO', { syscall, path })
      if (syscall === 'unlinkat' && path === 'w1') unlinked++
    })
    await expect(vacuum(request)).rejects.toThrow('EIO')
    setSyscallHook(undefined)
    utimesSync(`${directory}/u`, 9_000_000_000, 9_000_000_000)
    utimesSync(`${directory}/u/d`, 8, 8)
    const before = view()
    await vacuum(request)
    expect(diffTrees(before, view())).toEqual([])
  })
})
