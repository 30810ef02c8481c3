import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { removeTree } from '../support/build.ts'
import { engine } from '../support/engine.ts'
import { useFileSystem } from '../support/image.ts'
import { expectNone } from '../support/matrix.ts'
import { describeError, describeLayers, viewOf } from '../support/merging.ts'
import { anyHistory, growStack } from '../support/operations.ts'
import { type OverlayOptions, optionMatrix } from '../support/overlay.ts'
import { canMountImages } from '../support/ready.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { diffTrees, type Node, readTree, type Tree } from '../support/tree.ts'

/**
 * A layer without what means nothing: owner, mode, time and attributes of whiteouts, and their form; and the redirects of
 * metacopies as the path in what lies below that they come to. One inode with several names has an absolute redirect for
 * the sake of all of them, where a single name needs none.
 */
function meaning(tree: Tree): Tree {
  const origins = new Map<string, string | undefined>()
  return new Map(
    [...tree].map(([path, node]): [string, Node] => {
      const origin = originOf(path, node, origins)
      if (node.type === 'directory') origins.set(path, origin)
      if (isWhiteout(node)) return [path, { ...node, ...emptyMeta }]
      const metacopy = [...node.xattrs.keys()].find((name) => METACOPIES.has(name))
      if (metacopy === undefined) return [path, node]
      const xattrs = new Map(node.xattrs)
      return [path, { ...node, xattrs: xattrs.set(metacopy.replace('metacopy', 'redirect'), String(origin)) }]
    }),
  )
}

const METACOPIES: ReadonlySet<string> = new Set(['trusted.overlay.metacopy', 'user.overlay.metacopy'])

/** With what of the layers below a name merges; directories come before what is in them. */
function originOf(
  path: string,
  { xattrs }: Node,
  origins: ReadonlyMap<string, string | undefined>,
): string | undefined {
  if (path === '') return ''
  const mark = (name: string) => {
    const value = xattrs.get(`trusted.overlay.${name}`) ?? xattrs.get(`user.overlay.${name}`)
    return value === undefined ? undefined : Buffer.from(value, 'hex').toString('latin1')
  }
  if (mark('opaque') === 'y') return undefined
  const slash = path.lastIndexOf('/')
  const redirect = mark('redirect') ?? path.slice(slash + 1)
  if (redirect.startsWith('/')) return redirect
  const above = origins.get(path.slice(0, Math.max(0, slash)))
  return above === undefined ? undefined : `${above}/${redirect}`
}

// The kernel emulates chattr flags for the upper of a mount alone, so whose flags count depends on what is the upper.
const diff = { flags: false }

const emptyMeta = { mode: 0, uid: 0, gid: 0, mtimeNs: 0n, xattrs: new Map(), links: [] }

function isWhiteout(node: Node): boolean {
  return node.type === 'character' && node.rdev === 0
}

describe.skipIf(!canMountImages())('the algebra of merging', () => {
  const disk = useFileSystem('ext4')
  // An index ties its entries to one stack as a whole, so layers with one have no algebra.
  const cells = optionMatrix().filter(({ excluded, options }) => excluded === undefined && !options.index)

  /** Grows top : middle : bottom : below, and gives `make` two helpers that merge into a new tree each. */
  function withLayers(options: OverlayOptions, use: (layers: Layers, make: Make) => Promise<string[]>) {
    return fc.assert(
      fc.asyncProperty(anyHistory(3), async (history) => {
        const directory = disk.current.fresh()
        try {
          const { upper, lowers } = growStack(directory, history, options)
          let made = 0
          const merge = async (mode: 'delta' | 'output', upperLayer: string, ...lowerLayers: string[]) => {
            const output = `${directory}/made${++made}`
            await engine.merge({
              upper: upperLayer,
              lowers: lowerLayers,
              mode,
              output,
              namespace: options.namespace,
              clone: 'copy',
              workers: 0,
              allowEmpty: true,
            })
            return output
          }
          const layers = {
            top: upper,
            middle: lowers[0] as string,
            bottom: lowers[1] as string,
            below: lowers[2] as string,
            directory,
          }
          const story = describeLayers([upper, ...lowers])
          const helpers: Make = {
            delta: (...stack) => merge('delta', ...stack),
            plain: (...stack) => merge('output', ...stack),
          }
          await expectNone(
            use(layers, helpers).catch((cause) => [describeError(cause)]),
            story,
          )
        } finally {
          removeTree(directory)
        }
      }),
      runs(8),
    )
  }
  interface Layers {
    readonly top: string
    readonly middle: string
    readonly bottom: string
    readonly below: string
    readonly directory: string
  }
  type Merge = (upper: string, ...lowers: string[]) => Promise<string>
  interface Make {
    readonly delta: Merge
    readonly plain: Merge
  }
  const compare = (what: string, expected: string, actual: string) =>
    diffTrees(meaning(readTree(expected)), meaning(readTree(actual)), diff).map((line) => `${what}: ${line}`)

  describe.each(cells)('$name', ({ options }) => {
    test(
      'merging deltas is associative',
      () =>
        withLayers(options, async ({ top, middle, bottom, below, directory }, { delta }) => {
          const left = await delta(await delta(top, middle), bottom)
          const right = await delta(top, await delta(middle, bottom))
          const whole = await delta(top, middle, bottom)
          const view = (...layers: string[]) => viewOf({ directory, layers, options })
          const seen = view(top, middle, bottom, below)
          return [
            ...diffTrees(seen, view(left, below), diff).map((line) => `(top+middle)+bottom shown over below: ${line}`),
            ...diffTrees(seen, view(right, below), diff).map((line) => `top+(middle+bottom) shown over below: ${line}`),
            ...compare('(t+m)+b and t+(m+b) as layers', left, right),
            ...compare('(t+m)+b and t+m+b as layers', left, whole),
          ]
        }),
      timeLimit(),
    )

    test(
      'a delta folded into the bottom equals folding layer by layer',
      () =>
        withLayers(options, async ({ top, middle, bottom, below }, { delta, plain }) => {
          const byDelta = await plain(await delta(top, middle), bottom, below)
          const byBottom = await plain(top, await plain(middle, bottom, below))
          const whole = await plain(top, middle, bottom, below)
          return [
            ...compare('by delta and by bottom', byBottom, byDelta),
            ...compare('at once and by bottom', byBottom, whole),
          ]
        }),
      timeLimit(),
    )

    test(
      'folding in place from above or from below gives the tree that a new version has',
      () =>
        withLayers(options, async ({ top, middle, bottom, below }, { plain }) => {
          const whole = await plain(top, middle, bottom, below)
          const inPlace = (upper: string, ...lowers: string[]) =>
            engine.merge({
              upper,
              lowers,
              mode: 'in-place',
              namespace: options.namespace,
              workers: 0,
              allowEmpty: true,
            })
          await inPlace(top, middle, bottom, below)
          await inPlace(bottom, below)
          await inPlace(middle, below)
          return compare('in place and new version', whole, below)
        }),
      timeLimit(),
    )

    test(
      'merging the same layers twice gives the same tree',
      () =>
        withLayers(options, async ({ top, middle, bottom, below }, { delta, plain }) => [
          ...compare('two deltas', await delta(top, middle), await delta(top, middle)),
          ...compare('two versions', await plain(top, middle, bottom, below), await plain(top, middle, bottom, below)),
        ]),
      timeLimit(),
    )
  })

  test('the comparison of layers takes whiteouts for equal and nothing else', () => {
    const node = {
      type: 'character',
      rdev: 0,
      mode: 0,
      uid: 0,
      gid: 0,
      mtimeNs: 1n,
      xattrs: new Map(),
      nlink: 1,
      flags: '',
    } as const
    const one: Tree = new Map([['w', node]])
    expect(diffTrees(meaning(one), meaning(new Map([['w', { ...node, mode: 0o600, mtimeNs: 2n }]])))).toEqual([])
    expect(diffTrees(meaning(one), meaning(new Map([['w', { ...node, rdev: 1 }]])))).not.toEqual([])
  })

  test('a redundant redirect of a metacopy is no difference, and one to another place is', () => {
    const hex = (text: string) => Buffer.from(text, 'latin1').toString('hex')
    const layer = (redirect?: string): Tree => {
      const common = { mode: 0, uid: 0, gid: 0, mtimeNs: 1n, nlink: 1, flags: '' }
      const marks = redirect === undefined ? [] : [['trusted.overlay.redirect', hex(redirect)] as const]
      return new Map([
        ['', { ...common, type: 'directory', xattrs: new Map() }],
        ['g', { ...common, type: 'directory', xattrs: new Map([['trusted.overlay.redirect', hex('a')]]) }],
        ['g/f', { ...common, type: 'file', xattrs: new Map([['trusted.overlay.metacopy', ''], ...marks]) }],
      ])
    }
    expect(diffTrees(meaning(layer()), meaning(layer('/a/f')))).toEqual([])
    expect(diffTrees(meaning(layer('f')), meaning(layer('/a/f')))).toEqual([])
    expect(diffTrees(meaning(layer()), meaning(layer('/g/f')))).not.toEqual([])
    expect(diffTrees(meaning(layer()), meaning(layer('h')))).not.toEqual([])
  })
})
