import { mkdirSync, readdirSync, unlinkSync, utimesSync, writeFileSync } from 'node:fs'
import { applyPortablePlan, makePortablePlan, PreconditionFailedError, recover } from '@lsync/overlay-merge'
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
  symlink,
  whiteout,
} from '../support/build.ts'
import { copyTree } from '../support/copy.ts'
import { useFileSystem } from '../support/image.ts'
import { describeLayers, shownAlone, viewOf } from '../support/merging.ts'
import { optionMatrix, plainOptions } from '../support/overlay.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { diffTrees, readTree, type Tree } from '../support/tree.ts'
import { anyHistory, fc, storyOf, withGrown } from './stacks.ts'

const disk = useFileSystem('btrfs')
const other = useFileSystem('ext4')
afterEach(() => setSyscallHook(undefined))
const following = { ...plainOptions, redirectDir: 'on', metacopy: true } as const

async function collect(lines: AsyncIterable<string>): Promise<string[]> {
  const all: string[] = []
  for await (const line of lines) all.push(line)
  return all
}

// Reading directories changes their access times.
function withoutAccess(lines: readonly string[]): string[] {
  return lines.slice(0, -1).map((line) => line.replaceAll(/"atimeNs":"\d+"/g, ''))
}

/** The same layers at another place, as another machine has them. */
function move(layers: readonly string[], to: string): HostPath[] {
  mkdirSync(to)
  return layers.map((layer, index) => {
    const path = `${to}/${index === 0 ? 'upper' : `lower${index}`}`
    mkdirSync(path)
    copyTree(layer, path)
    return path as HostPath
  })
}

function resultOf(layers: readonly string[], options: typeof following, directory: string): Tree {
  return layers.length === 1
    ? shownAlone(readTree(layers[0] as string), options.namespace)
    : viewOf({ directory, layers, options })
}

describe('a plan made here and applied there gives what the kernel showed here', () => {
  const cells = optionMatrix().filter(({ excluded, options }) => excluded === undefined && !options.index)
  describe.each(cells)('$name', ({ options }) => {
    test.each([
      [1, true],
      [2, true],
      [1, false],
      [3, false],
    ])(
      'over %i lowers, renaming %s',
      async (lowers, rename) => {
        await fc.assert(
          fc.asyncProperty(anyHistory(lowers), (history) =>
            withGrown(disk.current, history, options, async (grown) => {
              const view = grown.view()
              const layers = [grown.upper, ...grown.lowers]
              const story = `${storyOf(grown)}\n${describeLayers(layers)}`
              const lines = await collect(makePortablePlan({ ...grown.request, rename, allowEmpty: true, workers: 0 }))
              const again = await collect(makePortablePlan({ ...grown.request, rename, allowEmpty: true, workers: 0 }))
              expect(withoutAccess(again)).toEqual(withoutAccess(lines))
              const there = rename ? `${grown.directory}/there` : other.current.fresh().concat('/there')
              const [upper, target, ...rest] = move(layers, there) as [HostPath, HostPath, ...HostPath[]]
              // Another file system for the upper alone would need a copy; two trees of one may be copied too.
              await applyPortablePlan(lines, { upper, target, allowEmpty: true, workers: 0 })
              const differences = diffTrees(view, resultOf([target, ...rest], options as typeof following, there))
              if (differences.length > 0) expect.fail(`${differences.join('\n')}\n${story}\n${lines.join('\n')}`)
              expect(readdirSync(upper)).toEqual([])
              removeTree(there)
            }),
          ),
          runs(2),
        )
      },
      timeLimit(),
    )
  })
})

const upperSpec = dir({
  a: dir({ f: file('new', { mtimeNs: 3n }), gone: whiteout(), link: symlink('x') }),
  new: redirected('old', { added: file('1') }),
  old: whiteout(),
  m: metacopy(4, { mode: 0o600 }),
  one: file('1'),
  two: linkTo('one'),
  tree: opaque({ d: dir({ deep: file('deep') }), w: whiteout() }),
})
const lowerSpec = dir({
  a: dir({ f: file('old', { mtimeNs: 2n }), gone: file('g'), stays: file('s') }),
  old: dir({ kept: file('k') }),
  m: file('data'),
  tree: dir({ lost: file('l') }),
})

function build(upper: DirectorySpec = upperSpec, lower: DirectorySpec = lowerSpec) {
  const directory = disk.current.fresh()
  buildTree(`${directory}/u`, upper)
  buildTree(`${directory}/l`, lower)
  const request = { upper: `${directory}/u` as HostPath, lowers: [`${directory}/l` as HostPath], workers: 0 }
  const view = () => viewOf({ directory, layers: [request.upper, ...request.lowers], options: following })
  const there = () => move([request.upper, ...request.lowers], `${directory}/there`) as [HostPath, HostPath]
  return { directory, request, view, there }
}

describe('a plan is applied only to the trees that it was made for', () => {
  const changes: [
    what: string,
    path: string,
    where: 'upper' | 'target',
    change: (upper: string, target: string) => void,
  ][] = [
    ['a file of the upper changed its size', 'a/f', 'upper', (upper) => writeFileSync(`${upper}/a/f`, 'longer')],
    ['a file of the upper was touched', 'a/f', 'upper', (upper) => utimesSync(`${upper}/a/f`, 1, 1)],
    ['a file of the upper is gone', 'one', 'upper', (upper) => unlinkSync(`${upper}/one`)],
    ['a file came to the upper', 'a/more', 'upper', (upper) => writeFileSync(`${upper}/a/more`, '')],
    ['a directory came to the upper', 'more', 'upper', (upper) => mkdirSync(`${upper}/more`)],
    [
      'a whiteout became a file',
      'a/gone',
      'upper',
      (upper) => {
        unlinkSync(`${upper}/a/gone`)
        writeFileSync(`${upper}/a/gone`, '')
      },
    ],
    ['a replaced file of the target changed', 'a/f', 'target', (_, target) => utimesSync(`${target}/a/f`, 1, 1)],
    [
      'a removed file of the target changed',
      'a/gone',
      'target',
      (_, target) => writeFileSync(`${target}/a/gone`, 'gg'),
    ],
    ['a removed file of the target is gone', 'a/gone', 'target', (_, target) => unlinkSync(`${target}/a/gone`)],
    ['a new name is taken in the target', 'two', 'target', (_, target) => writeFileSync(`${target}/two`, '')],
    ['a renamed directory is gone', 'old', 'target', (_, target) => removeTree(`${target}/old`)],
    ['the data of a metacopy is gone', 'm', 'target', (_, target) => unlinkSync(`${target}/m`)],
    [
      'a whiteout came into a tree',
      'tree/d/deep',
      'upper',
      (upper) => {
        removeTree(`${upper}/tree/d`)
        buildTree(`${upper}/tree/d`, dir({ deep: whiteout() }))
      },
    ],
    [
      'a directory became opaque',
      'a',
      'upper',
      (upper) => {
        removeTree(`${upper}/a`)
        buildTree(
          `${upper}/a`,
          opaque(upperSpec.children['a']?.kind === 'directory' ? upperSpec.children['a'].children : {}),
        )
      },
    ],
  ]
  test.each(changes)('%s', async (_what, path, where, change) => {
    const { directory, request, there } = build()
    const lines = await collect(makePortablePlan(request))
    const [upper, target] = there()
    change(upper, target)
    const before = [readTree(upper), readTree(target)]
    const failure = await applyPortablePlan(lines, { upper, target, workers: 0 }).catch((error: unknown) => error)
    expect(failure).toBeInstanceOf(PreconditionFailedError)
    expect((failure as PreconditionFailedError).failed.map((failed) => `${failed.in} ${failed.path}`)).toContain(
      `${where} ${path}`,
    )
    expect([
      ...diffTrees(before[0] as Tree, readTree(upper)),
      ...diffTrees(before[1] as Tree, readTree(target)),
    ]).toEqual([])
    expect(readdirSync(`${directory}/there`).sort()).toEqual(['lower1', 'upper'])
  })

  test('and says so beforehand with dryRun', async () => {
    const { request, there } = build()
    const lines = await collect(makePortablePlan(request))
    const [upper, target] = there()
    const before = readTree(target)
    expect(await applyPortablePlan(lines, { upper, target, dryRun: true })).toMatchObject({
      dryRun: true,
      recovered: false,
    })
    expect(diffTrees(before, readTree(target))).toEqual([])
    writeFileSync(`${upper}/one`, 'changed')
    await expect(applyPortablePlan(lines, { upper, target, dryRun: true })).rejects.toMatchObject({
      code: 'PRECONDITION_FAILED',
    })
  })

  test('a second time it finds that nothing is left to do', async () => {
    const { request, there, view } = build()
    const before = view()
    const lines = await collect(makePortablePlan(request))
    const [upper, target] = there()
    await applyPortablePlan(lines, { upper, target, workers: 0 })
    await expect(applyPortablePlan(lines, { upper, target })).rejects.toMatchObject({ code: 'PRECONDITION_FAILED' })
    expect(diffTrees(before, shownAlone(readTree(target), 'trusted'))).toEqual([])
  })
})

describe('applying a plan', () => {
  test('killed before any system call leaves the old view or the new one, and recover finishes', async () => {
    const { view, request } = build()
    const expected = view()
    const lines = await collect(makePortablePlan(request))
    for (let stop = 1; ; stop++) {
      const directory = disk.current.fresh()
      const [upper, target] = move([request.upper, ...request.lowers], `${directory}/there`) as [HostPath, HostPath]
      let calls = 0
      setSyscallHook((syscall, path) => {
        if (++calls >= stop) throw new PosixError('EIO', { syscall, path })
      })
      const result = await applyPortablePlan(lines, { upper, target, workers: 0 }).catch((error: unknown) => error)
      setSyscallHook(undefined)
      await recover(target, { workers: 0 })
      if (readdirSync(upper).length > 0) await applyPortablePlan(lines, { upper, target, workers: 0 })
      expect(diffTrees(expected, shownAlone(readTree(target), 'trusted'))).toEqual([])
      removeTree(directory)
      if (!(result instanceof Error)) break
    }
  }, 120_000)

  test('takes the data of metacopies out of data-only layers', async () => {
    const directory = disk.current.fresh()
    buildTree(`${directory}/u`, dir({ f: metacopy(4, { redirect: '/store/one' }) }))
    buildTree(`${directory}/l`, dir({}))
    buildTree(`${directory}/d`, dir({ store: dir({ one: file('data') }) }))
    const [u, l, d] = ['u', 'l', 'd'].map((name) => `${directory}/${name}`) as [HostPath, HostPath, HostPath]
    const lines = await collect(makePortablePlan({ upper: u, lowers: [l], data: [d] }))
    await expect(applyPortablePlan(lines, { upper: u, target: l })).rejects.toMatchObject({ code: 'PLAN_INVALID' })
    await applyPortablePlan(lines, { upper: u, target: l, data: [d], workers: 0 })
    expect(readTree(l).get('f')?.content).toBe('data')
  })

  test('refuses to rename where upper and target are two file systems', async () => {
    const { request } = build()
    const lines = await collect(makePortablePlan({ ...request, rename: true }))
    const elsewhere = `${other.current.fresh()}/l`
    mkdirSync(elsewhere)
    copyTree(request.lowers[0] as string, elsewhere)
    const asked = { upper: request.upper, target: elsewhere as HostPath }
    await expect(applyPortablePlan(lines, asked)).rejects.toMatchObject({ code: 'PLAN_INVALID' })
    const copying = await collect(makePortablePlan({ ...request, rename: false }))
    await applyPortablePlan(copying, { ...asked, workers: 0 })
  })
})
