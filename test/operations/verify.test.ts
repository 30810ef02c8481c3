import { spawnSync } from 'node:child_process'
import { chmodSync, linkSync, mkdirSync, readdirSync, rmSync, symlinkSync, unlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { merge, verify } from '@lsync/overlay-merge'
import { type ByteString, type HostPath, openRoot, setTimes, setXattr, withFd } from '@lsync/posix'
import { describe, expect, onTestFinished, test } from 'vitest'
import {
  buildTree,
  type DirectorySpec,
  dir,
  fifo,
  file,
  linkTo,
  metacopy,
  opaque,
  redirected,
  sparse,
  symlink,
  whiteout,
} from '../support/build.ts'
import { copyTree } from '../support/copy.ts'
import { useFileSystem } from '../support/image.ts'
import { mountOverlay, optionMatrix, plainOptions, withOverlay } from '../support/overlay.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { run, unmount } from '../support/system.ts'
import { anyHistory, fc, storyOf, withGrown } from './stacks.ts'

const disk = useFileSystem('ext4')

describe('verify accepts what a merge made, by the kernel and by the resolver alike', () => {
  const cells = optionMatrix().filter(({ excluded, options }) => excluded === undefined && !options.index)
  test.each(cells)(
    '$name',
    async ({ options }) => {
      await fc.assert(
        fc.asyncProperty(anyHistory(2), (history) =>
          withGrown(disk.current, history, options, async (grown) => {
            const { upper, lowers, namespace } = grown.request
            const output = `${grown.directory}/result` as HostPath
            await merge({
              upper,
              lowers,
              namespace,
              mode: 'output',
              output,
              plain: true,
              clone: 'copy',
              allowEmpty: true,
              workers: 0,
            })
            const layers = [upper, ...lowers]
            for (const by of ['mount', 'resolver'] as const) {
              const { differences, entries } = await verify({ layers, namespace, against: output, by })
              if (differences.length > 0) expect.fail(`${by}: ${JSON.stringify(differences)}\n${storyOf(grown)}`)
              expect(entries).toBe(grown.view().size)
            }
          }),
        ),
        runs(4),
      )
    },
    timeLimit(),
  )
})

const spec = dir({
  f: file('content', { xattrs: { 'user.a': '1' } }),
  one: file('linked'),
  two: linkTo('one'),
  alone: file('linked'),
  d: dir({ inner: file('1') }),
  l: symlink('target'),
  p: fifo(),
  big: sparse(3_000_000, [[2_000_000, 'data']]),
})

function pair() {
  const directory = disk.current.fresh()
  const [view, tree] = [`${directory}/view`, `${directory}/tree`] as [HostPath, HostPath]
  buildTree(view, spec)
  mkdirSync(tree)
  copyTree(view, tree)
  return { directory, view, tree }
}

describe('verify finds', () => {
  const at = (root: string, name: string, mtimeNs: bigint) =>
    withFd(openRoot(root as HostPath), (fd) => setTimes(fd, name as ByteString, mtimeNs, mtimeNs))
  const changes: [what: string, path: string, found: string[], change: (tree: string) => void][] = [
    ['a mode', 'f', ['mode'], (tree) => chmodSync(`${tree}/f`, 0o600)],
    ['an owner', 'f', ['owner'], (tree) => run('chown', '1:2', `${tree}/f`)],
    ['a nanosecond', 'd', ['times'], (tree) => at(tree, 'd', 1_600_000_000_000_000_001n)],
    [
      'a byte behind a hole',
      'big',
      ['content', 'times'],
      (tree) => {
        run('dd', 'if=/dev/zero', `of=${tree}/big`, 'bs=1', 'seek=2000001', 'count=1', 'conv=notrunc', 'status=none')
      },
    ],
    [
      'the loss of all holes',
      'big',
      ['holes'],
      (tree) => {
        run('cp', '-a', '--sparse=never', `${tree}/big`, `${tree}/dense`)
        run('mv', `${tree}/dense`, `${tree}/big`)
      },
    ],
    [
      'flags',
      'd',
      ['flags'],
      (tree) => {
        run('chattr', '+a', `${tree}/d`)
        onTestFinished(() => void run('chattr', '-a', `${tree}/d`))
      },
    ],
    ['a size', 'f', ['size', 'times'], (tree) => writeFileSync(`${tree}/f`, 'contents')],
    [
      'an attribute',
      'f',
      ['xattr user.b'],
      (tree) =>
        withFd(openRoot(tree as HostPath), (fd) =>
          setXattr(fd, 'f' as ByteString, 'user.b' as ByteString, Buffer.from('1')),
        ),
    ],
    ['an ACL', 'd', ['mode', 'xattr system.posix_acl_access'], (tree) => run('setfacl', '-m', 'u:9:rwx', `${tree}/d`)],
    ['a capability', 'f', ['xattr security.capability'], (tree) => run('setcap', 'cap_net_raw+ep', `${tree}/f`)],
    [
      'another target',
      'l',
      ['target', 'times'],
      (tree) => {
        rmSync(`${tree}/l`)
        symlinkSync('elsewhere', `${tree}/l`)
      },
    ],
    [
      'another type',
      'p',
      ['type'],
      (tree) => {
        unlinkSync(`${tree}/p`)
        writeFileSync(`${tree}/p`, '')
      },
    ],
    ['a name too few', 'd/inner', ['existence'], (tree) => unlinkSync(`${tree}/d/inner`)],
    ['a name too many', 'd/extra', ['existence'], (tree) => writeFileSync(`${tree}/d/extra`, '')],
    [
      'a link too few',
      'two',
      ['links'],
      (tree) => {
        rmSync(`${tree}/two`)
        run('cp', '-a', `${tree}/one`, `${tree}/two`)
      },
    ],
    [
      'a link too many',
      'one',
      ['links', 'times'],
      (tree) => {
        unlinkSync(`${tree}/one`)
        linkSync(`${tree}/alone`, `${tree}/one`)
      },
    ],
  ]
  test.each(changes)('%s', async (_what, path, found, change) => {
    const { view, tree } = pair()
    expect(await verify({ layers: [view], against: tree })).toMatchObject({
      equal: true,
      by: 'mount',
      total: 0,
      entries: 10,
    })
    change(tree)
    for (const by of ['mount', 'resolver'] as const) {
      const { equal, differences } = await verify({ layers: [view], against: tree, by })
      expect(equal).toBe(false)
      expect(
        differences
          .filter((one) => one.path === path)
          .map(({ what }) => what)
          .sort(),
      ).toEqual(found)
    }
  })

  test('all of many differences, and gives the first ones', async () => {
    const directory = disk.current.fresh()
    const many = Object.fromEntries(Array.from({ length: 50 }, (_, index) => [`f${index}`, file('1')]))
    buildTree(`${directory}/view`, dir(many))
    buildTree(`${directory}/tree`, dir({}))
    const request = { layers: [`${directory}/view` as HostPath], against: `${directory}/tree` as HostPath }
    const { total, differences } = await verify({ ...request, limit: 10 })
    expect(total).toBe(50)
    expect(differences).toHaveLength(10)
  })
})

describe('verify reads', () => {
  test('a result that is a layer as a mount shows it, on what lies beneath it', async () => {
    const directory = disk.current.fresh()
    const build = (name: string, tree: DirectorySpec) => {
      buildTree(`${directory}/${name}`, tree)
      return `${directory}/${name}` as HostPath
    }
    const upper = build('u', dir({ a: redirected('b', { x: file('1') }), b: whiteout(), m: metacopy(4) }))
    const middle = build('m', dir({ b: opaque({ y: file('2') }) }))
    const bottom = build('b', dir({ b: dir({ hidden: file('3') }), m: file('data') }))
    const delta = `${directory}/delta` as HostPath
    await merge({ upper, lowers: [middle], mode: 'delta', output: delta, workers: 0 })
    const request = { layers: [upper, middle, bottom], against: delta, againstLowers: [bottom] }
    expect((await verify(request)).differences).toEqual([])
    expect((await verify({ ...request, by: 'resolver' })).differences).toEqual([])
    const whole = await verify({ layers: [upper, middle, bottom], against: delta })
    expect(whole.differences.map(({ path }) => path)).toContain('b')
  })

  test('flags that an upper emulates, with its workdir or without', async () => {
    const directory = disk.current.fresh()
    const [upper, lower, workdir, output] = ['u', 'l', 'w', 'new'].map((name) => `${directory}/${name}`) as [
      HostPath,
      HostPath,
      HostPath,
      HostPath,
    ]
    buildTree(lower, dir({ f: file('f'), d: dir({ g: file('g', { flags: 'i' }) }) }))
    mkdirSync(upper)
    withOverlay({ lowers: [lower], upper, work: workdir }, plainOptions, (merged) => {
      run('chattr', '+i', `${merged}/f`)
      run('chattr', '+a', `${merged}/d`)
    })
    const stack = { layers: [upper, lower], against: output }
    await merge({
      upper,
      lowers: [lower],
      mode: 'output',
      output: stack.against,
      workers: 0,
    })
    const ways = [{ by: 'mount' }, { by: 'mount', workdir }, { by: 'resolver' }] as const
    for (const way of ways) expect((await verify({ ...stack, ...way })).differences).toEqual([])
    run('chattr', '-ia', `${output}/f`, `${output}/d`)
    const lost = (path: string, expected: string) => ({ path, what: 'flags', expected, actual: 'none' })
    for (const way of ways) {
      expect((await verify({ ...stack, ...way })).differences).toEqual([lost('d', 'a'), lost('f', 'i')])
    }
    run('chattr', '-i', `${output}/d/g`, `${lower}/d/g`)
  })

  test('data-only layers, and an upper with its workdir', async () => {
    const directory = disk.current.fresh()
    buildTree(`${directory}/l`, dir({ f: metacopy(4, { redirect: '/store/one' }) }))
    buildTree(`${directory}/d`, dir({ store: dir({ one: file('data') }) }))
    buildTree(`${directory}/tree`, dir({ f: file('data') }))
    const [lower, data, tree] = ['l', 'd', 'tree'].map((name) => `${directory}/${name}`) as [
      HostPath,
      HostPath,
      HostPath,
    ]
    const differences = (await verify({ layers: [lower], data: [data], against: tree })).differences
    expect(differences.filter(({ what }) => what !== 'times')).toEqual([])
    mkdirSync(`${directory}/u`)
    mkdirSync(`${directory}/w`)
    const asUpper = {
      layers: [`${directory}/u` as HostPath, lower],
      data: [data],
      workdir: `${directory}/w` as HostPath,
    }
    expect((await verify({ ...asUpper, against: tree })).by).toBe('mount')
  })

  test('without following a symlink, in either tree', async () => {
    const directory = disk.current.fresh()
    buildTree(`${directory}/secret`, dir({ f: file('secret') }))
    buildTree(`${directory}/view`, dir({ d: symlink('../secret') }))
    buildTree(`${directory}/tree`, dir({ d: dir({ f: file('x') }) }))
    const { differences } = await verify({
      layers: [`${directory}/view` as HostPath],
      against: `${directory}/tree` as HostPath,
    })
    expect(differences.filter(({ path }) => path.startsWith('d/'))).toEqual([])
  })

  test('a name that the kernel fails for as a difference, not as a failure of its own', async () => {
    const directory = disk.current.fresh()
    buildTree(`${directory}/u`, dir({ d: redirected('..') }))
    buildTree(`${directory}/l`, dir({}))
    buildTree(`${directory}/tree`, dir({ d: dir({}) }))
    const [u, l, against] = ['u', 'l', 'tree'].map((name) => `${directory}/${name}`) as [HostPath, HostPath, HostPath]
    for (const by of ['mount', 'resolver'] as const) {
      const { differences } = await verify({ layers: [u, l], against, by })
      expect(differences).toContainEqual({ path: 'd', what: 'existence', expected: 'EACCES', actual: 'directory' })
    }
  })

  test('layers that are mounted, and leaves no mount and no file behind', async () => {
    const { directory, view, tree } = pair()
    mkdirSync(`${directory}/upper`)
    mkdirSync(`${directory}/merged`)
    mountOverlay(
      { upper: `${directory}/upper`, lowers: [view], work: `${directory}/w` },
      plainOptions,
      `${directory}/merged`,
    )
    try {
      expect((await verify({ layers: [`${directory}/upper` as HostPath, view], against: tree })).total).toBeLessThan(2)
    } finally {
      unmount(`${directory}/merged`)
    }
    expect(readdirSync(tmpdir()).filter((name) => name.startsWith('.lsync-verify'))).toEqual([])
  })
})

test('verify without the right to mount resolves the layers itself, and says so', () => {
  const directory = disk.current.fresh()
  buildTree(`${directory}/u`, dir({ a: dir({ f: file('1') }) }), { namespace: 'user' })
  buildTree(`${directory}/l`, dir({ a: dir({ g: file('2') }) }), { namespace: 'user' })
  buildTree(`${directory}/tree`, dir({ a: dir({ f: file('1') }) }))
  chmodSync(directory, 0o755)
  const script = `
    import { verify } from ${JSON.stringify(new URL('../../packages/overlay-merge/src/index.ts', import.meta.url).href)}
    const report = await verify({ layers: ${JSON.stringify([`${directory}/u`, `${directory}/l`])}, namespace: 'user',
      against: ${JSON.stringify(`${directory}/tree`)} })
    console.log(JSON.stringify(report))`
  const child = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
    encoding: 'utf8',
    uid: 65534,
    gid: 65534,
  })
  expect(child.stderr).toBe('')
  const report = JSON.parse(child.stdout) as { by: string; why: string; differences: { path: string; what: string }[] }
  expect(report).toMatchObject({ by: 'resolver', why: 'mounting needs CAP_SYS_ADMIN' })
  expect(report.differences.filter(({ what }) => what === 'existence').map(({ path }) => path)).toEqual(['a/g'])
})
