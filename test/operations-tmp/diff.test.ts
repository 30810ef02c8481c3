import { type Difference, diff } from '@lsync/overlay-merge'
import { type HostPath, printable } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import {
  buildTree,
  type DirectorySpec,
  dir,
  file,
  linkTo,
  metacopy,
  opaque,
  redirected,
  symlink,
  whiteout,
} from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { describeLayers, viewOf } from '../support/merging.ts'
import { optionMatrix } from '../support/overlay.ts'
import { runs, timeLimit } from '../support/runs.ts'
import type { Node, Tree } from '../support/tree.ts'
import { anyHistory, copyUpEverything, fc, storyOf, withGrown } from './stacks.ts'

const disk = useFileSystem('btrfs')

describe('diff tells what two kernel views differ in, without and with the upper', () => {
  const cells = optionMatrix().filter(({ excluded, options }) => excluded === undefined && !options.index)
  describe.each(cells)('$name', ({ options }) => {
    test.each([1, 3])(
      'over %i lowers',
      async (lowers) => {
        await fc.assert(
          fc.asyncProperty(anyHistory(lowers), fc.boolean(), (history, copyUp) =>
            withGrown(disk.current, history, options, async (grown) => {
              if (copyUp) copyUpEverything(grown, options.namespace)
              const now = grown.view()
              const before = viewOf({ directory: grown.directory, layers: grown.lowers, options })
              const actual = await collect(diff({ ...grown.request, content: true }))
              const wanted = expected(before, now, actual)
              const told = actual.map(lineOf)
              if (JSON.stringify([...told].sort()) !== JSON.stringify(wanted.sort())) {
                const layers = describeLayers([grown.upper, ...grown.lowers])
                expect.fail(`expected ${wanted.join('\n')}\n\nactual ${told.join('\n')}\n${storyOf(grown)}\n${layers}`)
              }
              expect(isInOrder(actual)).toBe(true)
            }),
          ),
          runs(4),
        )
      },
      timeLimit(),
    )
  })
})

async function collect(differences: AsyncIterable<Difference>): Promise<Difference[]> {
  const all: Difference[] = []
  for await (const difference of differences) all.push(difference)
  return all
}

function lineOf({ path, change, from, what }: Pick<Difference, 'path' | 'change' | 'from' | 'what'>): string {
  const origin = from === undefined ? '' : ` from ${printable(from)}`
  return `${change} ${printable(path)}${origin}: ${[...what].sort().join(', ')}`
}

// A directory before its content, names by bytes: with the slash below every other byte, that is plain order. What a
// renamed directory took the place of goes first, with all that was in it.
function isInOrder(differences: readonly Difference[]): boolean {
  const present = differences.filter(({ change }) => change !== 'removed')
  const keys = present.map(({ path }) => path.replaceAll('/', '\0'))
  return keys.every((key, index) => index === 0 || (keys[index - 1] as string) <= key)
}

/** The differences of two views, given which names are old ones under a new name. */
function expected(before: Tree, now: Tree, actual: readonly Difference[]): string[] {
  const renames = actual.filter(({ change }) => change === 'renamed') as (Difference & { from: string })[]
  const isPrefix = (prefix: string, path: string) => path === prefix || path.startsWith(`${prefix}/`)
  const deepest = (paths: readonly string[], path: string) =>
    paths.filter((prefix) => isPrefix(prefix, path)).sort((left, right) => right.length - left.length)[0]
  const lines: string[] = []
  const was = new Map<string, Node>()
  const kindOf = (node: Node) =>
    node.type === 'character' || node.type === 'block' ? `${node.type} device` : node.type
  const gone = (path: string, node: Node) =>
    lines.push(lineOf({ path: path as never, change: 'removed', what: [kindOf(node)] }))
  const targets = renames.map(({ path }) => path as string)
  for (const [path, node] of before) {
    const from = deepest(
      renames.map((rename) => rename.from),
      path,
    )
    const homes =
      from === undefined
        ? [{ target: undefined, path }]
        : renames
            .filter((rename) => rename.from === from)
            .map((rename) => ({ target: rename.path as string, path: rename.path + path.slice(from.length) }))
    for (const home of homes) {
      if (deepest(targets, home.path) === home.target) was.set(home.path, node)
      else gone(home.path, node)
    }
  }
  for (const path of new Set([...was.keys(), ...now.keys()])) {
    const [old, current] = [was.get(path), now.get(path)]
    const rename = renames.find((candidate) => candidate.path === path)
    if (old === undefined) lines.push(lineOf({ path: path as never, change: 'added', what: [kindOf(current as Node)] }))
    else if (current === undefined) gone(path, old)
    else if (rename !== undefined) {
      lines.push(
        lineOf({ path: path as never, change: 'renamed', from: rename.from as never, what: metadata(old, current) }),
      )
    } else if (old.type !== current.type) {
      lines.push(lineOf({ path: path as never, change: 'type', what: [`${kindOf(old)} -> ${kindOf(current)}`] }))
    } else {
      const object: string[] = []
      if (old.target !== current.target) object.push('target')
      if (old.rdev !== current.rdev) object.push('device')
      if (old.sizeBytes !== current.sizeBytes) object.push('size')
      else if (old.content !== current.content) object.push('content')
      const what = [...metadata(old, current), ...object]
      const change = object.length > 0 ? 'modified' : 'metadata'
      if (what.length > 0) lines.push(lineOf({ path: path as never, change, what }))
    }
  }
  return lines
}

function metadata(old: Node, current: Node): string[] {
  const what: string[] = []
  if (old.mode !== current.mode) what.push('mode')
  if (old.uid !== current.uid || old.gid !== current.gid) what.push('owner')
  if (old.mtimeNs !== current.mtimeNs) what.push('times')
  for (const name of new Set([...old.xattrs.keys(), ...current.xattrs.keys()])) {
    if (old.xattrs.get(name) !== current.xattrs.get(name)) what.push(`xattr ${name}`)
  }
  return what
}

async function differences(content: boolean, ...layers: DirectorySpec[]): Promise<string[]> {
  const directory = disk.current.fresh()
  const [upper, ...lowers] = layers.map((spec, index) => {
    const path = `${directory}/l${index}`
    buildTree(path, spec)
    return path as HostPath
  }) as [HostPath, ...HostPath[]]
  return (await collect(diff({ upper, lowers, content }))).map(lineOf)
}

describe('diff', () => {
  test('judges by size and time without content, and by bytes with it', async () => {
    const upper = dir({
      same: file('same'),
      touched: file('same', { mtimeNs: 5n }),
      sneaky: file('new', { mtimeNs: 5n }),
      longer: file('longer', { mtimeNs: 5n }),
    })
    const lower = dir({
      same: file('same'),
      touched: file('same', { mtimeNs: 6n }),
      sneaky: file('old', { mtimeNs: 5n }),
      longer: file('short', { mtimeNs: 5n }),
    })
    expect(await differences(false, upper, lower)).toEqual(['modified longer: size', 'modified touched: times'])
    expect(await differences(true, upper, lower)).toEqual([
      'modified longer: size',
      'modified sneaky: content',
      'metadata touched: times',
    ])
  })

  test('tells a renamed directory from what stood in its place, and follows it to its content', async () => {
    expect(
      await differences(
        true,
        dir({
          new: redirected('old', { f: file('2', { mtimeNs: 1n }), g: whiteout() }),
          old: file('x', { mtimeNs: 1n }),
        }),
        dir({
          new: dir({ victim: file('v') }),
          old: dir({ f: file('1', { mtimeNs: 1n }), g: file('g'), h: file('h') }),
        }),
      ),
    ).toEqual([
      'removed new: directory',
      'removed new/victim: file',
      'renamed new from old: times',
      'modified new/f: content',
      'removed new/g: file',
      'added old: file',
    ])
  })

  test('tells a swap as two renames, and a file that moved with its metacopy as renamed', async () => {
    expect(
      await differences(
        false,
        dir({
          a: redirected('b'),
          b: redirected('a'),
          d: dir({ moved: metacopy(4, { redirect: '/f', mode: 0o600 }), linked: metacopy(4, { redirect: '/g' }) }),
          f: whiteout(),
        }),
        dir({ a: dir({ fa: file('a') }), b: dir({ fb: file('b') }), f: file('data'), g: file('keep') }),
      ),
    ).toEqual([
      'renamed a from b: times',
      'renamed b from a: times',
      'added d: directory',
      'added d/linked: file',
      'renamed d/moved from f: mode, times',
    ])
  })

  test('goes into an opaque directory from both sides, and through a change of type', async () => {
    expect(
      await differences(
        true,
        dir({ o: opaque({ kept: file('1'), new: file('2') }), was: file('f'), is: opaque({ f: file('1') }) }),
        dir({ o: dir({ kept: file('1'), lost: file('3') }), was: dir({ d: dir({ x: symlink('y') }) }), is: file('1') }),
      ),
    ).toEqual([
      'type is: file -> directory',
      'added is/f: file',
      'removed o/lost: file',
      'added o/new: file',
      'type was: directory -> file',
      'removed was/d: directory',
      'removed was/d/x: symlink',
    ])
  })

  test('says what the kernel cannot show either', async () => {
    expect(await differences(false, dir({ d: redirected('..'), m: metacopy(3) }), dir({}))).toEqual([
      'unreadable d: EACCES: a redirect whose value the kernel refuses',
      'unreadable m: EIO: a metacopy whose data is nowhere below',
    ])
  })

  test('tells of nothing where nothing was changed, hard links and whiteouts over nothing included', async () => {
    const same = dir({ a: file('1'), b: linkTo('a'), d: dir({ f: file('2') }) })
    expect(await differences(true, dir({ ...same.children, w: whiteout() }), same)).toEqual([])
  })
})
