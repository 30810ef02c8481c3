import { execFileSync } from 'node:child_process'
import { mkdirSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { exportLayer, importLayer } from '../../packages/overlay-merge/src/encodings/convert.ts'
import { buildTree, dir, file, opaque, whiteout } from '../support/build.ts'
import { needs } from '../support/needs.ts'
import { isPresent, run } from '../support/system.ts'
import { diffTrees, readTree, type Tree } from '../support/tree.ts'
import { buildRichTree } from './rich-tree.ts'
import { scratch } from './scratch.ts'

const isRoot = needs('root', process.getuid?.() === 0)
const hasTar = needs('GNU tar', isPresent('tar') && run('tar', '--version').includes('GNU tar'))
const hasBsdtar = needs('bsdtar (libarchive-tools)', isPresent('bsdtar'))

/** The tree without what a test says its archive cannot hold. */
function without(tree: Tree, drop: { paths?: RegExp; xattrs?: RegExp; seconds?: boolean }): Tree {
  const kept = new Map<string, typeof tree extends ReadonlyMap<string, infer N> ? N : never>()
  for (const [path, node] of tree) {
    if (drop.paths?.test(path)) continue
    const xattrs = new Map([...node.xattrs].filter(([name]) => !drop.xattrs?.test(name)))
    const mtimeNs = drop.seconds === true ? (node.mtimeNs + 10n ** 18n) / 1_000_000_000n : node.mtimeNs
    kept.set(path, { ...node, xattrs, mtimeNs })
  }
  return kept
}

const unpack = ['-x', '--xattrs', '--xattrs-include=*', '--numeric-owner', '-p', '--same-owner']

describe.skipIf(!isRoot || !hasTar)('GNU tar', () => {
  test.each([
    [true, ['--acls']],
    [false, ['--acls']],
    [true, []],
  ])('unpacks our archive of a plain tree to the same tree (sparse: %s, %s)', async (isSparse, acls) => {
    const { path, host } = scratch()
    const from = buildRichTree(`${path}/tree`)
    const request = { from, fromForm: 'plain', form: 'plain-tar', to: host('t.tar'), sparse: isSparse } as const
    expect((await exportLayer(request)).losses).toEqual([])
    mkdirSync(`${path}/out`)
    execFileSync('tar', [...unpack, ...acls, '-f', `${path}/t.tar`, '-C', `${path}/out`], { stdio: 'pipe' })
    expect(diffTrees(readTree(from), readTree(`${path}/out`), { holes: isSparse })).toEqual([])
  })

  const posix = ['--format=posix', '--xattrs', '--xattrs-include=*', '--acls']
  test.each([
    ['posix', posix],
    ['posix, sparse 1.0', [...posix, '--sparse', '--sparse-version=1.0']],
    ['posix, sparse 0.1', [...posix, '--sparse', '--sparse-version=0.1']],
    ['posix, sparse 0.0', [...posix, '--sparse', '--sparse-version=0.0']],
    ['posix, gzip', [...posix, '--gzip']],
    ['posix, zstd', [...posix, '--zstd']],
    ['gnu', ['--format=gnu']],
    ['gnu, sparse', ['--format=gnu', '--sparse']],
    ['oldgnu, sparse', ['--format=oldgnu', '--sparse']],
  ])('archives (%s) are read as what was packed', async (_name, args) => {
    const { path, host } = scratch()
    const from = buildRichTree(`${path}/tree`)
    const bare = args[0] !== '--format=posix'
    execFileSync('tar', [...args, '--numeric-owner', '-cf', `${path}/t.tar`, '-C', from, '.'], { stdio: 'pipe' })
    await importLayer({ from: host('t.tar'), form: 'plain-tar', to: host('out'), toForm: 'plain' })
    // The older formats know neither attributes (which ACLs and setuid bits of the mask depend on) nor fractions.
    const drop = bare ? { xattrs: /./, seconds: true } : {}
    const holes = args.includes('--sparse')
    expect(diffTrees(without(readTree(from), drop), without(readTree(`${path}/out`), drop), { holes })).toEqual([])
  })

  test.each(['ustar', 'v7'])('archives in the format %s are read', async (format) => {
    const { path, host } = scratch()
    buildTree(`${path}/tree`, dir({ d: dir({ f: file('1', { uid: 7 }) }), 'e\xff': file('2') }))
    execFileSync('tar', [`--format=${format}`, '-cf', `${path}/t.tar`, '-C', `${path}/tree`, '.'], { stdio: 'pipe' })
    await importLayer({ from: host('t.tar'), form: 'plain-tar', to: host('out'), toForm: 'plain' })
    const seconds = (tree: Tree) => without(tree, { seconds: true })
    expect(diffTrees(seconds(readTree(`${path}/tree`)), seconds(readTree(`${path}/out`)))).toEqual([])
  })

  test('the tar of a raw upper and our export of it give the same upper', async () => {
    const { path, host } = scratch()
    const spec = dir({ gone: whiteout(), d: opaque({ f: file('x') }), e: dir({ w: whiteout() }), f: file('.wh.') })
    buildTree(`${path}/up`, spec)
    execFileSync('tar', [
      '--format=posix',
      '--xattrs',
      '--xattrs-include=*',
      '-cf',
      `${path}/theirs.tar`,
      '-C',
      `${path}/up`,
      '.',
    ])
    await exportLayer({ from: host('up'), form: 'tar', to: host('ours.tar'), compression: 'zstd' })
    const upper = without(readTree(`${path}/up`), { paths: /gone|w$/ })
    for (const name of ['theirs', 'ours']) {
      await importLayer({ from: host(`${name}.tar`), form: 'tar', to: host(name) })
      const result = readTree(`${path}/${name}`)
      expect(diffTrees(upper, without(result, { paths: /gone|w$/ }))).toEqual([])
      for (const gone of ['gone', 'e/w']) expect(result.get(gone)).toMatchObject({ type: 'character', rdev: 0 })
    }
  })
})

describe.skipIf(!isRoot || !hasBsdtar)('bsdtar', () => {
  test('unpacks our sparse archive to the same tree', async () => {
    const { path, host } = scratch()
    const from = buildRichTree(`${path}/tree`)
    await exportLayer({ from, fromForm: 'plain', form: 'plain-tar', to: host('t.tar'), sparse: true })
    mkdirSync(`${path}/out`)
    execFileSync('bsdtar', ['-xpf', `${path}/t.tar`, '-C', `${path}/out`, '--numeric-owner', '--xattrs'], {
      stdio: 'pipe',
    })
    // bsdtar leaves the directory that it unpacks into alone, and reads and writes -1.5 s as -1 s and half a second more.
    const drop = { xattrs: /^security\.|^trusted\./, paths: /^$|^old$/ }
    expect(diffTrees(without(readTree(from), drop), without(readTree(`${path}/out`), drop), { holes: false })).toEqual(
      [],
    )
  })

  test('archives are read as what was packed', async () => {
    const { path, host } = scratch()
    const from = buildRichTree(`${path}/tree`)
    execFileSync('bsdtar', ['--format=pax', '-cf', `${path}/t.tar`, '--xattrs', '--acls', '-C', from, '.'], {
      stdio: 'pipe',
    })
    await importLayer({ from: host('t.tar'), form: 'plain-tar', to: host('out'), toForm: 'plain' })
    const drop = { paths: /^old$/ }
    expect(diffTrees(without(readTree(from), drop), without(readTree(`${path}/out`), drop), { holes: false })).toEqual(
      [],
    )
  })
})
