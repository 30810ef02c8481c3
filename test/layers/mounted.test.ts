import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { convertLayer, type LayerForm } from '../../packages/overlay-merge/src/encodings/convert.ts'
import { hostPath } from '../../packages/posix/src/index.ts'
import { needs } from '../support/needs.ts'
import { type OverlayOptions, plainOptions, withOverlay } from '../support/overlay.ts'
import { anyRawStack, buildLayers } from '../support/raw-layers.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { diffTrees, readTree, type Tree } from '../support/tree.ts'
import { makeScratch } from './scratch.ts'

const isRoot = needs('root', process.getuid?.() === 0)

/** Ways from a kernel layer back to a kernel layer, and what they can carry. */
const WAYS: { way: LayerForm[]; namespaces: ('trusted' | 'user')[]; follow: boolean }[] = [
  { way: ['kernel-trusted'], namespaces: ['trusted'], follow: true },
  { way: ['portable', 'kernel-trusted'], namespaces: ['trusted'], follow: true },
  { way: ['tar', 'kernel-trusted'], namespaces: ['trusted'], follow: true },
  { way: ['xattr-whiteouts'], namespaces: ['trusted', 'user'], follow: false },
  { way: ['oci', 'kernel-user'], namespaces: ['user'], follow: false },
  { way: ['aufs', 'oci', 'kernel-trusted'], namespaces: ['trusted'], follow: false },
]

/**
 * Names whose lookup fails are listed by the kernel or not as the hint `opaque=x` has it (the lookup fails either way),
 * and the hint goes with the xattr whiteouts that it is for.
 */
function withoutBroken(tree: Tree): Tree {
  return new Map([...tree].filter(([, node]) => node.error === undefined))
}

describe.skipIf(!isRoot)('the view through the kernel stays the same', () => {
  for (const { way, namespaces, follow } of WAYS) {
    test.each(namespaces)(
      `by way of ${way.join(', ')}, %s marks`,
      (namespace) => {
        const options: OverlayOptions = {
          ...plainOptions,
          namespace,
          ...(follow ? { redirectDir: 'on', metacopy: true } : {}),
        }
        const stacks = anyRawStack(3, { namespace, redirects: follow, metacopies: follow })
        return fc.assert(
          fc.asyncProperty(stacks, async (specs) => {
            const scratch = makeScratch()
            try {
              const layers = buildLayers(scratch.path, specs, namespace)
              const [upper, middle, bottom] = layers as [string, string, string]
              let from = middle
              let fromForm: LayerForm = `kernel-${namespace}`
              for (const [index, toForm] of way.entries()) {
                const to = `${scratch.path}/step${index}`
                await convertLayer({
                  from: hostPath(from),
                  fromForm,
                  to: hostPath(to),
                  toForm,
                  namespace,
                  durable: false,
                })
                from = to
                fromForm = toForm
              }
              const view = (lowers: string[]) => withoutBroken(withOverlay({ lowers }, options, readTree))
              expect(diffTrees(view([upper, middle, bottom]), view([upper, from, bottom]))).toEqual([])
            } finally {
              scratch.remove()
            }
          }),
          runs(25),
        )
      },
      timeLimit(60_000),
    )
  }
})
