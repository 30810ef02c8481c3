import { check, LAYER_PROBLEMS } from '@lsync/overlay-merge'
import { type ByteString, type HostPath, openRoot, PosixError, setSyscallHook, setXattr, withFd } from '@lsync/posix'
import { afterEach, describe, expect, test } from 'vitest'
import {
  buildTree,
  type DirectorySpec,
  dir,
  fifo,
  file,
  metacopy,
  opaque,
  redirected,
  symlink,
  whiteout,
  xattrWhiteout,
} from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { describeLayers, viewOf } from '../support/merging.ts'
import { optionMatrix, plainOptions, withOverlay } from '../support/overlay.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { run } from '../support/system.ts'
import { diffTrees, readTree } from '../support/tree.ts'
import { anyHistory, fc, storyOf, withGrown } from './stacks.ts'

const disk = useFileSystem('btrfs')
afterEach(() => setSyscallHook(undefined))
const following = { ...plainOptions, redirectDir: 'on', metacopy: true } as const

function build(layers: readonly DirectorySpec[], namespace: 'trusted' | 'user' = 'trusted') {
  const directory = disk.current.fresh()
  const [upper, ...lowers] = layers.map((spec, index) => {
    const path = `${directory}/l${index}`
    buildTree(path, spec, { namespace })
    return path as HostPath
  }) as [HostPath, ...HostPath[]]
  return { directory, request: { upper, lowers, namespace } }
}

async function codes(request: Parameters<typeof check>[0]): Promise<string[]> {
  const { problems } = await check(request)
  return problems.map(({ layer, code, path, repaired }) => `${layer} ${code} ${path}${repaired ? ' (repaired)' : ''}`)
}

const marked = (marks: Record<string, string>) => ({ marks })

describe('check names what is wrong with', () => {
  test('whiteouts', async () => {
    const { request } = build([
      dir({
        fine: whiteout(),
        none: whiteout(),
        closed: opaque({ w: whiteout() }),
        made: xattrWhiteout(),
        full: file('x', marked({ whiteout: 'y' })),
        pipe: fifo(marked({ whiteout: 'y' })),
      }),
      dir({
        made: file('1'),
        hinted: dir({ w: xattrWhiteout() }, marked({ opaque: 'x' })),
        bare: dir({ w: xattrWhiteout() }),
      }),
      dir({ fine: file('1'), hinted: dir({ w: file('1') }), bare: dir({ w: file('1') }), last: whiteout() }),
    ])
    expect(await codes(request)).toEqual([
      '0 MARK_DEAD full',
      '0 WHITEOUT_XATTR_IN_UPPER made',
      '0 WHITEOUT_ORPHAN none',
      '0 MARK_DEAD pipe',
      '0 WHITEOUT_PHANTOM closed/w',
      '1 WHITEOUT_UNHINTED bare/w',
      '2 WHITEOUT_AT_BOTTOM last',
    ])
  })

  test('opaque marks', async () => {
    const { request } = build([
      dir(
        { a: dir({}, marked({ opaque: 'Y' })), b: opaque({}), c: symlink('x', marked({ opaque: 'y' })) },
        marked({ opaque: 'y' }),
      ),
      dir({ a: opaque({}), d: dir({}, marked({ origin: 'x' })) }, marked({ impure: 'y' })),
    ])
    expect(await codes(request)).toEqual([
      '0 OPAQUE_ON_ROOT ',
      '0 OPAQUE_VALUE a',
      '0 MARK_DEAD c',
      '1 MARK_AT_BOTTOM a',
      '1 MARK_LEAKED ',
    ])
  })

  test('redirects, hostile ones included', async () => {
    const long = Array.from({ length: 90 }, () => 'abc').join('/')
    const { request } = build([
      dir(
        {
          up: redirected('..'),
          dots: redirected('/a/../b'),
          slash: redirected('//a'),
          relative: redirected('a/b'),
          empty: redirected(''),
          nowhere: redirected('/nowhere', { w: whiteout() }),
          atFile: redirected('/f'),
          atLink: redirected('/link'),
          one: redirected('/t'),
          two: redirected('t'),
          ofMine: redirected('/mine'),
          mine: dir({}),
          closed: dir({}, marked({ opaque: 'y', redirect: 't' })),
          full: file('x', marked({ redirect: '/f' })),
          far: redirected(`/${long}`),
          self: redirected('self'),
        },
        marked({ redirect: '/t' }),
      ),
      dir({ t: dir({}), f: file('1'), link: symlink('t'), mine: dir({}), stray: redirected('t'), self: dir({}) }),
    ])
    expect(await codes(request)).toEqual([
      '0 REDIRECT_DEAD ',
      '0 REDIRECT_DANGLING atFile',
      '0 REDIRECT_DANGLING atLink',
      '0 REDIRECT_DEAD closed',
      '0 REDIRECT_ESCAPES dots',
      '0 REDIRECT_INVALID empty',
      '0 REDIRECT_LONG far',
      '0 REDIRECT_DANGLING far',
      '0 REDIRECT_DEAD full',
      '0 REDIRECT_DANGLING nowhere',
      '0 REDIRECT_INVALID relative',
      '0 REDIRECT_INVALID slash',
      '0 REDIRECT_ESCAPES up',
      '0 WHITEOUT_PHANTOM nowhere/w',
      '0 REDIRECT_DUPLICATE ofMine',
      '0 REDIRECT_DUPLICATE two',
      '1 MARK_AT_BOTTOM stray',
    ])
    // A whiteout below a redirect that only lacks its lower is not certain to be useless.
    expect(
      (await check({ ...request, repair: true })).problems.find(({ path }) => path === 'nowhere/w')?.repaired,
    ).toBe(false)
  })

  test('metacopies', async () => {
    const { directory, request } = build([
      dir({
        fine: metacopy(4),
        moved: metacopy(4, { redirect: '/fine' }),
        none: metacopy(4),
        atDirectory: metacopy(4, { redirect: '/d' }),
        size: metacopy(9),
        out: metacopy(4, { redirect: '../fine' }),
        short: file('', marked({ metacopy: '\0' })),
        d: dir({}, marked({ metacopy: '' })),
      }),
      dir({ fine: file('data'), size: file('data'), d: dir({}), bottom: metacopy(4), short: file('1') }),
    ])
    expect(await codes(request)).toEqual([
      '0 METACOPY_NO_DATA atDirectory',
      '0 MARK_DEAD d',
      '0 METACOPY_NO_DATA none',
      '0 REDIRECT_INVALID out',
      '0 METACOPY_VALUE short',
      '0 METACOPY_SIZE size',
      '1 METACOPY_AT_BOTTOM bottom',
    ])
    buildTree(`${directory}/data`, dir({ store: dir({ one: file('data') }) }))
    buildTree(`${directory}/index`, dir({ f: metacopy(4, { redirect: '/store/one' }) }))
    const withData = { upper: `${directory}/index` as HostPath, lowers: [], data: [`${directory}/data` as HostPath] }
    expect(await codes(withData)).toEqual([])
  })

  test('marks of the other namespace, marks nobody knows, and names that other tools understand', async () => {
    const odd = { 'user.overlay.opaque': 'y' }
    const { request } = build([
      dir({
        a: dir({}, { xattrs: odd }),
        b: dir({}, { xattrs: odd }),
        c: file('', marked({ strange: '1' })),
        d: dir({ '.wh.x': file('') }),
      }),
      dir({ old: file('1', marked({ protattr: 'i' })) }),
      dir({}),
    ])
    const { problems } = await check(request)
    expect(problems.map(({ code, path, why }) => `${code} ${path}: ${why}`)).toEqual([
      'WRONG_NAMESPACE a: here and in 1 more places: user.overlay.opaque',
      'MARK_UNKNOWN c: here: trusted.overlay.strange',
      'AUFS_MARKER d/.wh.x: here',
      'PROTATTR_LOST old: here',
    ])
  })

  test('layers of a userxattr mount that ask to be followed', async () => {
    const { request } = build(
      [dir({ r: redirected('t'), m: metacopy(4) }), dir({ t: dir({}), m: file('data') })],
      'user',
    )
    expect(await codes(request)).toEqual(['0 METACOPY_NOT_FOLLOWED m', '0 REDIRECT_NOT_FOLLOWED r'])
  })

  test('copies made inside an upper, of which the kernel shows only one', async () => {
    const { directory, request } = build([dir({}), dir({ f: file('1'), g: file('2') })])
    const stack = { upper: request.upper, lowers: request.lowers, work: `${directory}/w` }
    withOverlay(stack, plainOptions, (merged) => {
      run('chmod', '600', `${merged}/f`)
      run('touch', `${merged}/new`)
    })
    run('cp', '-a', `${request.upper}/f`, `${request.upper}/copy`)
    const view = () =>
      viewOf({ directory, layers: [request.upper, ...request.lowers], work: stack.work, options: plainOptions })
    // The one that is looked up second fails (ESTALE), and then the kernel does not list it either.
    const shown = view()
    expect(['copy', 'f'].filter((name) => shown.get(name)?.type === 'file')).toHaveLength(1)
    expect(await codes(request)).toEqual(['0 ORIGIN_DUPLICATE copy'])
    expect(await codes({ ...request, repair: true })).toEqual(['0 ORIGIN_DUPLICATE copy (repaired)'])
    expect(await codes(request)).toEqual([])
    expect([...view()].filter(([, { error }]) => error !== undefined)).toEqual([])
    expect(view().get('copy')?.content).toBe('1')
  })
})

describe('check --repair', () => {
  const messy = () =>
    build([
      dir(
        {
          none: whiteout(),
          made: xattrWhiteout(),
          madeOfNone: xattrWhiteout(),
          d: dir({ w: whiteout(), f: file('1') }, { ...marked({ opaque: 'yes' }), mtimeNs: 7n }),
          closed: dir({ w: whiteout() }, marked({ opaque: 'y', redirect: '/d' })),
          full: file('x', marked({ redirect: '/f', whiteout: '', opaque: 'y' })),
          link: symlink('x', marked({ metacopy: '' })),
          impure: dir({ f: file('1') }, marked({ impure: 'y' })),
        },
        marked({ opaque: 'y', redirect: '/d' }),
      ),
      dir({ made: file('1'), d: dir({ g: file('g') }), closed: dir({ w: file('1') }), full: file('y') }),
    ])

  test('mends what is certain, keeps the view, and finds nothing more', async () => {
    const { directory, request } = messy()
    const view = () => viewOf({ directory, layers: [request.upper, ...request.lowers], options: following })
    const before = view()
    const first = await check({ ...request, repair: true })
    expect(first.problems.filter(({ repaired }) => !repaired)).toEqual([])
    expect(first.remaining).toBe(0)
    expect(first.problems.every(({ code }) => LAYER_PROBLEMS[code].repairable)).toBe(true)
    expect(diffTrees(before, view())).toEqual([])
    expect(readTree(request.upper).get('made')?.type).toBe('character')
    expect((await check(request)).problems).toEqual([])
  })

  test('killed before any system call keeps the view, and can be run again', async () => {
    for (let stop = 1; ; stop++) {
      const { directory, request } = messy()
      const view = () => viewOf({ directory, layers: [request.upper, ...request.lowers], options: following })
      const before = view()
      let calls = 0
      setSyscallHook((syscall, path) => {
        if (++calls >= stop) throw new PosixError('EIO', { syscall, path })
      })
      const result = await check({ ...request, repair: true }).catch((error: unknown) => error)
      setSyscallHook(undefined)
      expect(diffTrees(before, view()).filter((line) => !/mtime/.test(line))).toEqual([])
      await check({ ...request, repair: true })
      expect(diffTrees(before, view())).toEqual([])
      expect((await check(request)).problems).toEqual([])
      if (!(result instanceof Error)) break
    }
  })

  test('refuses a live upper, and never touches a lower', async () => {
    const { directory, request } = messy()
    withFd(openRoot(request.lowers[0] as HostPath), (fd) =>
      setXattr(fd, '', 'trusted.overlay.opaque' as ByteString, Buffer.from('y')),
    )
    const lower = readTree(request.lowers[0] as string)
    const stack = { upper: request.upper, lowers: request.lowers, work: `${directory}/w` }
    const { result } = withOverlay(stack, following, () => ({ result: check({ ...request, repair: true }) }))
    await expect(result).rejects.toMatchObject({ code: 'LAYER_BUSY' })
    await check({ ...request, repair: true })
    expect(diffTrees(lower, readTree(request.lowers[0] as string))).toEqual([])
  })
})

describe('layers that the kernel itself wrote have no errors', () => {
  const cells = optionMatrix().filter((cell) => cell.excluded === undefined)
  test.each(cells)(
    '$name',
    async ({ options }) => {
      await fc.assert(
        fc.asyncProperty(anyHistory(2), (history) =>
          withGrown(disk.current, history, options, async (grown) => {
            const before = grown.view()
            const found = await check(grown.request)
            const wrong = found.problems.filter(({ severity, code }) => severity === 'error' || !SELF_MADE.has(code))
            if (wrong.length > 0) {
              expect.fail(
                `${JSON.stringify(wrong, undefined, 1)}\n${storyOf(grown)}\n${describeLayers([grown.upper, ...grown.lowers])}`,
              )
            }
            await check({ ...grown.request, repair: true })
            expect(diffTrees(before, grown.view())).toEqual([])
            const after = await check(grown.request)
            expect(after.problems.filter(({ layer, code }) => layer === 0 && LAYER_PROBLEMS[code].repairable)).toEqual(
              [],
            )
          }),
        ),
        runs(4),
      )
    },
    timeLimit(),
  )
})

/** What an ordinary history leaves behind, or the generator writes as a user would. */
const SELF_MADE = new Set([
  'WHITEOUT_ORPHAN',
  'WHITEOUT_PHANTOM',
  'REDIRECT_DEAD',
  'REDIRECT_LONG',
  'IMPURE_STALE',
  'INDEX_NEEDED',
  'AUFS_MARKER',
  'PROTATTR_LOST',
  'WRONG_NAMESPACE',
  'WHITEOUT_XATTR_IN_UPPER',
])
