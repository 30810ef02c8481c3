import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  type DirectorySpec,
  dir,
  file,
  opaque,
  redirected,
  removeTree,
  type Spec,
  whiteout,
  xattrWhiteout,
} from '../support/build.ts'
import { engine } from '../support/engine.ts'
import { useFileSystem } from '../support/image.ts'
import { expectNone } from '../support/matrix.ts'
import { describeLayers, describeTree, emptyDirectory, mergeEveryWay, viewOf } from '../support/merging.ts'
import { type OverlayOptions, plainOptions } from '../support/overlay.ts'
import { anyRawStack, buildLayers, withoutMetacopies } from '../support/raw-layers.ts'
import { canMountImages } from '../support/ready.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { diffTrees, readTree } from '../support/tree.ts'

// Layers made by hand are mounted as lowers only: with an upper the kernel would write its own marks into them.
const trusted: OverlayOptions = { ...plainOptions, redirectDir: 'on', metacopy: true }
const user: OverlayOptions = { ...plainOptions, namespace: 'user' }

const kinds = [
  {
    name: 'trusted marks, redirects and metacopies',
    options: trusted,
    raw: { namespace: 'trusted', redirects: true, metacopies: true },
  },
  {
    name: 'trusted marks, redirects',
    options: trusted,
    raw: { namespace: 'trusted', redirects: true, metacopies: false },
  },
  { name: 'user marks', options: user, raw: { namespace: 'user', redirects: false, metacopies: false } },
] as const

describe.skipIf(!canMountImages())('raw layers are merged as the kernel reads them', () => {
  const disk = useFileSystem('ext4')

  async function check(specs: readonly DirectorySpec[], options: OverlayOptions): Promise<void> {
    const directory = disk.current.fresh()
    try {
      let layers = buildLayers(directory, specs, options.namespace)
      // Two directories that lead to one place show the same inodes twice, which is no hard link that anyone made.
      const diff = { links: options.namespace === 'user' }
      let subject = { directory, layers, options, diff, rawBottom: true, clones: ['copy', 'hardlink'] as const }
      if ([...viewOf(subject).values()].some((node) => node.error !== undefined)) {
        // A metacopy without its data, which nothing but a broken layer has.
        const repaired = `${directory}/repaired`
        layers = buildLayers(repaired, specs.map(withoutMetacopies), options.namespace)
        subject = { ...subject, directory: repaired, layers }
        expect([...viewOf(subject)].filter(([, node]) => node.error !== undefined)).toEqual([])
      }
      const story = `${describeLayers(layers)}\nview\n${describeTree(viewOf(subject))}`
      await expectNone(mergeEveryWay(subject), story)
    } finally {
      removeTree(directory)
    }
  }

  describe.each(kinds)('$name', ({ options, raw }) => {
    test.each([2, 3, 4])(
      'random stacks of %i layers',
      (count) =>
        fc.assert(
          fc.asyncProperty(anyRawStack(count, raw), (specs) => check(specs, options)),
          runs(12),
        ),
      timeLimit(),
    )
  })

  // Every state of one name in each of three layers. Each case has a directory of its own, with a sibling `t` for the
  // redirect to lead to, which is gone from its own place as after a rename.
  type State = { letter: string; at: (layer: number) => Record<string, Spec> }
  const states: readonly State[] = [
    { letter: 'absent', at: () => ({}) },
    { letter: 'whiteout', at: () => ({ n: whiteout() }) },
    { letter: 'xattr-whiteout', at: () => ({ n: xattrWhiteout() }) },
    { letter: 'file', at: (layer) => ({ n: file(`file ${layer}`) }) },
    { letter: 'directory', at: (layer) => ({ n: inner(layer, dir) }) },
    { letter: 'opaque', at: (layer) => ({ n: inner(layer, opaque) }) },
    { letter: 'redirected', at: (layer) => ({ n: inner(layer, (c) => redirected('t', c)), t: whiteout() }) },
  ]

  function inner(layer: number, make: (children: Record<string, Spec>) => Spec): Spec {
    // One name of its own, one that it hides below, one that all layers have.
    return make({ [`own${layer}`]: file(`${layer}`), [`own${layer + 1}`]: whiteout(), all: file(`all ${layer}`) })
  }

  function everyCase(options: OverlayOptions): DirectorySpec[] {
    const usable = states.filter(({ letter }) => options.namespace === 'trusted' || letter !== 'redirected')
    return [0, 1, 2].map((layer) => {
      const cases: Record<string, Spec> = {}
      for (const top of usable) {
        for (const middle of usable) {
          for (const bottom of usable) {
            const state = [top, middle, bottom][layer] as State
            const target = dir({ [`t${layer}`]: file(`t${layer}`), own1: file('t') })
            cases[`${top.letter} ${middle.letter} ${bottom.letter}`] = dir({
              ...(layer > 0 ? { t: target } : {}),
              ...state.at(layer),
            })
          }
        }
      }
      return dir(cases)
    })
  }

  test.each([
    ['trusted', trusted],
    ['user', user],
  ] as const)(
    'every state of a name in each of three layers, %s marks',
    (_name, options) => check(everyCase(options), options),
    timeLimit(),
  )

  test('in place, what the merge does not touch stays as it is, and shows the same as a layer', async () => {
    const directory = disk.current.fresh()
    const layers = buildLayers(
      directory,
      [
        dir({ f: file('new') }),
        dir({ d: dir({ w: whiteout(), o: opaque({ x: xattrWhiteout(), f: file('kept') }) }), f: file('old') }),
      ],
      'trusted',
    )
    const [upper, lower] = layers as [string, string]
    const view = viewOf({ directory, layers, options: trusted })
    await engine.merge({ upper, lowers: [lower], mode: 'in-place', namespace: 'trusted' })
    expect(
      diffTrees(view, viewOf({ directory, layers: [lower, emptyDirectory(`${directory}/empty`)], options: trusted })),
    ).toEqual([])
    expect(readTree(lower).get('d/w')?.type).toBe('character')
    removeTree(directory)
  })
})
