import { mkdirSync, readdirSync } from 'node:fs'
import { verify } from '@lsync/overlay-merge'
import type { HostPath } from '@lsync/posix'
import fc from 'fast-check'
import { describe, expect, onTestFinished, test } from 'vitest'
import { buildTree, dir, file, linkTo, opaque, redirected, removeTree, symlink, whiteout } from '../support/build.ts'
import { engine, type MergeCase } from '../support/engine.ts'
import { useFileSystem } from '../support/image.ts'
import { expectNone } from '../support/matrix.ts'
import { describeLayers, describeTree, mergeEveryWay, shownAlone, viewOf } from '../support/merging.ts'
import { hasMooseFs, mooseFsLimits, useMooseFs } from '../support/moosefs.ts'
import { needs } from '../support/needs.ts'
import { aclOf, anyOperations, applyOperations } from '../support/operations.ts'
import { type OverlayOptions, plainOptions, withOverlay } from '../support/overlay.ts'
import { canMountImages } from '../support/ready.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { mount, run, unmount } from '../support/system.ts'
import { diffTrees, outline, readTree } from '../support/tree.ts'

// MooseFS has no chattr flags: a result that needs one is refused, which has tests of its own.
const anySession = anyOperations(5, 25).map((operations) => operations.filter((operation) => operation.do !== 'chattr'))

const withRedirects: OverlayOptions = { ...plainOptions, redirectDir: 'on', metacopy: true }

describe.skipIf(!canMountImages() || !needs('MooseFS', hasMooseFs))(
  'lower and result on a real MooseFS, the upper on ext4',
  () => {
    const store = useMooseFs()
    const disk = useFileSystem('ext4')

    test.each([
      ['trusted marks', plainOptions],
      ['redirects and metacopies', withRedirects],
      ['user marks', { ...plainOptions, namespace: 'user' } as const],
    ] as const)(
      'random histories, %s: in place across file systems, new versions, deltas',
      (_name, options) =>
        fc.assert(
          fc.asyncProperty(anySession, anySession, anySession, async (filling, first, second) => {
            const [near, far] = [disk.current.fresh(), store.current.fresh()]
            try {
              const bottom = `${far}/bottom`
              mkdirSync(bottom)
              applyOperations(bottom, filling, options.namespace)
              const middle = `${near}/middle`
              const upper = `${near}/u`
              for (const path of [middle, upper]) mkdirSync(path)
              // A local middle layer, so that the result of a delta lands on the store as well.
              withOverlay({ lowers: [bottom], upper: middle, work: `${middle}.work` }, options, (merged) =>
                applyOperations(merged, first),
              )
              removeTree(`${middle}.work`)
              withOverlay({ lowers: [middle, bottom], upper, work: `${upper}.work` }, options, (merged) =>
                applyOperations(merged, second),
              )
              const whole = {
                directory: far,
                layers: [upper, middle, bottom],
                work: `${upper}.work`,
                options,
                diff: mooseFsLimits,
                clones: ['copy', 'hardlink'] as const,
              }
              const story = `${describeLayers(whole.layers)}\nview\n${describeTree(viewOf(whole))}`
              await expectNone(mergeEveryWay(whole, ['output', 'delta']), story)
              // The local upper folded into the local middle, and that into the store.
              const view = viewOf(whole)
              const inPlace = { mode: 'in-place', namespace: options.namespace, workers: 2, allowEmpty: true } as const
              await engine.merge({ ...inPlace, upper, lowers: [middle, bottom] })
              await engine.merge({ ...inPlace, upper: middle, lowers: [bottom] })
              const result = shownAlone(readTree(bottom), options.namespace)
              await expectNone(Promise.resolve(diffTrees(view, result, mooseFsLimits)), story)
            } finally {
              removeTree(near)
              removeTree(far)
            }
          }),
          runs(3),
        ),
      timeLimit(),
    )

    test('a version by mfsmakesnapshot shares what did not change, and is what the kernel shows', async () => {
      const [near, far] = [disk.current.fresh(), store.current.fresh()]
      const layers = [`${near}/u`, `${far}/l`]
      buildTree(
        layers[0] as string,
        dir({
          new: file('new'),
          gone: whiteout(),
          closed: opaque({ in: file('in') }),
          moved: redirected('was'),
          was: whiteout(),
          d: dir({ added: file('added') }, { uid: 5 }),
        }),
      )
      buildTree(
        layers[1] as string,
        dir({
          gone: dir({ f: file('f') }),
          closed: dir({ out: file('out') }),
          was: dir({ g: file('g'), h: linkTo('was/g') }),
          d: dir({ kept: file('kept'), s: symlink('kept') }),
          same: file('same'),
        }),
      )
      const request = {
        upper: `${near}/u`,
        lowers: [`${far}/l`],
        mode: 'output',
        output: `${far}/new`,
        namespace: 'trusted',
        clone: 'moosefs',
        workers: 2,
      } as const
      const before = layers.map(readTree)
      await engine.merge(request)
      const view = viewOf({ directory: far, layers, options: withRedirects })
      expect(diffTrees(view, readTree(`${far}/new`), mooseFsLimits)).toEqual([])
      expect(layers.map(readTree)).toEqual(before)
    })

    describe.each(['MooseFS', 'ramfs'] as const)('chattr flags, which %s lacks, are refused', (kind) => {
      /** A directory on it, and one on ext4. */
      const places = () => {
        const near = disk.current.fresh()
        if (kind === 'MooseFS') return { near, far: store.current.fresh() }
        const far = `${near}/ramfs`
        mkdirSync(far)
        mount('ramfs', far, 'ramfs', 0, '')
        onTestFinished(() => void unmount(far))
        return { near, far }
      }
      const expectRefused = async (request: MergeCase, path: string, target: string) => {
        const layers = [request.upper, ...request.lowers]
        const before = layers.map(readTree)
        await expect(engine.merge(request)).rejects.toMatchObject({
          code: 'TARGET_CANNOT_HOLD',
          message: expect.stringContaining(`inodeFlags (${path})`),
          path: target,
        })
        expect(layers.map(readTree)).toEqual(before)
        expect(
          readdirSync(target.slice(0, target.lastIndexOf('/'))).filter((name) => name.startsWith('.lsync')),
        ).toEqual([])
      }
      const flagged = { marks: { protattr: 'i' } }

      test.each([
        ['of a file', dir({ d: dir({ f: file('f', flagged) }) }), 'd/f'],
        ['of a directory', dir({ d: dir({ f: file('f') }, flagged) }), 'd'],
        ['of a directory whose layer is the only one that has it', dir({ n: dir({}, flagged) }), 'n'],
      ] as const)('%s that the upper emulates', async (_name, upper, path) => {
        const { near, far } = places()
        buildTree(`${near}/u`, upper)
        const plain = kind === 'MooseFS' ? dir({ d: dir({ g: file('g') }) }) : dir({ d: dir({}) })
        buildTree(`${far}/l`, plain)
        buildTree(`${near}/l`, plain)
        const request = { upper: `${near}/u`, namespace: 'trusted', workers: 0 } as const
        await expectRefused({ ...request, lowers: [`${far}/l`], mode: 'in-place' }, path, `${far}/l`)
        const output = `${far}/new`
        await expectRefused({ ...request, lowers: [`${near}/l`], mode: 'output', output }, path, output)
        await expectRefused({ ...request, lowers: [`${near}/l`], mode: 'delta', output }, path, output)
        expect(readdirSync(far)).toEqual(['l'])
      })

      test.each([
        ['file', dir({ d: dir({ f: file('f', { flags: 'i' }) }) }), 'd/f'],
        ['hard-linked file', dir({ d: dir({ f: file('f', { flags: 'a' }), g: linkTo('d/f') }) }), 'd/f'],
        ['directory', dir({ d: dir({ f: file('f') }, { flags: 'a' }) }), 'd'],
      ] as const)('of a %s of a lower on another file system', async (_name, lower, path) => {
        const { near, far } = places()
        buildTree(`${near}/u`, dir({ new: file('new') }))
        buildTree(`${near}/l`, lower)
        const output = `${far}/new`
        const request = { upper: `${near}/u`, lowers: [`${near}/l`], namespace: 'trusted', workers: 0 } as const
        await expectRefused({ ...request, mode: 'output', output }, path, output)
        expect(readdirSync(far)).toEqual([])
      })
    })

    test('emulated chattr flags are refused also where the whole merge is renaming', async () => {
      const far = store.current.fresh()
      buildTree(`${far}/u`, dir({ f: file('f', { marks: { protattr: 'a' } }) }))
      buildTree(`${far}/l`, dir({ f: file('old') }))
      const request = { upper: `${far}/u`, lowers: [`${far}/l`], mode: 'in-place', namespace: 'trusted' } as const
      await expect(engine.merge(request)).rejects.toMatchObject({ code: 'TARGET_CANNOT_HOLD' })
      expect(outline(readTree(`${far}/l`))).toEqual({ f: 'old' })
      expect(readdirSync(far)).toEqual(['l', 'u'])
    })

    describe('ACLs, which it has and does not list', () => {
      const access = 'system.posix_acl_access'
      const inherited = 'system.posix_acl_default'
      const withAcl = { xattrs: { [access]: aclOf(9, 5).toString('latin1') } }
      const bottom = dir({
        kept: file('kept', withAcl),
        'kept too': dir({}, { xattrs: { [inherited]: aclOf(9, 7).toString('latin1') } }),
        'loses it': dir({ f: file('f') }, withAcl),
        changed: file('old', withAcl),
      })
      const upper = dir({
        'loses it': dir({ g: file('g', withAcl) }),
        changed: file('new'),
        'kept too': dir({ h: file('h') }, { xattrs: { [inherited]: aclOf(9, 5).toString('latin1') } }),
      })

      test('they are kept, taken off and not inherited, in every mode', async () => {
        const [near, far] = [disk.current.fresh(), store.current.fresh()]
        buildTree(`${near}/u`, upper)
        buildTree(`${far}/l`, bottom)
        const layers = [`${near}/u`, `${far}/l`]
        const whole = { layers, options: withRedirects, diff: mooseFsLimits }
        const view = viewOf({ ...whole, directory: far })
        expect(view.get('kept')?.xattrs.has(access)).toBe(true)
        expect(view.get('loses it')?.xattrs.has(access)).toBe(false)
        await expectNone(mergeEveryWay({ ...whole, directory: near, clones: ['copy'] }, ['output', 'delta']), '')
        const request = { upper: `${near}/u`, lowers: [`${far}/l`], namespace: 'trusted', workers: 2 } as const
        await engine.merge({ ...request, mode: 'output', output: `${far}/snapshot`, clone: 'moosefs' })
        expect(diffTrees(view, readTree(`${far}/snapshot`), mooseFsLimits)).toEqual([])
        await expectNone(mergeEveryWay({ ...whole, directory: far, clones: ['copy', 'hardlink'] }), describeTree(view))
      })

      test('verify sees one that is missing, and one that says no more than the mode is none', async () => {
        const far = store.current.fresh()
        buildTree(`${far}/l`, bottom)
        buildTree(`${far}/copy`, bottom)
        const compare = async () =>
          (await verify({ layers: [`${far}/l` as HostPath], against: `${far}/copy` as HostPath })).differences.map(
            ({ path, what }) => `${path}: ${what}`,
          )
        expect(await compare()).toEqual([])
        run('setfacl', '-b', `${far}/copy/kept`, `${far}/l/loses it`, `${far}/copy/loses it`)
        run('chmod', '755', `${far}/copy/kept`, `${far}/l/kept`)
        expect(await compare()).toEqual([`kept: xattr ${access}`])
      })

      test('a target without ACLs is refused', async () => {
        const [near, far] = [disk.current.fresh(), store.current.fresh()]
        buildTree(`${far}/u`, dir({ f: file('f', withAcl) }))
        buildTree(`${near}/l`, dir({ z: file('z') }))
        const target = `${near}/ramfs`
        mkdirSync(target)
        mount('ramfs', target, 'ramfs', 0, '')
        try {
          const request = { upper: `${far}/u`, lowers: [`${near}/l`], namespace: 'trusted', workers: 0 } as const
          await expect(engine.merge({ ...request, mode: 'output', output: `${target}/new` })).rejects.toMatchObject({
            code: 'TARGET_CANNOT_HOLD',
            message: expect.stringContaining('acls (f)'),
          })
          expect(readdirSync(target)).toEqual([])
        } finally {
          unmount(target)
        }
      })
    })
  },
)
