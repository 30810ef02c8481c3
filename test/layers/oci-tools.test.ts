import { execFileSync } from 'node:child_process'
import { readFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { exportLayer, importLayer } from '../../packages/overlay-merge/src/encodings/convert.ts'
import { buildTree, dir, file, linkTo, opaque, symlink, whiteout } from '../support/build.ts'
import { needs } from '../support/needs.ts'
import { plainOptions, withOverlay } from '../support/overlay.ts'
import { isPresent } from '../support/system.ts'
import { diffTrees, readTree, type Tree } from '../support/tree.ts'
import { scratch } from './scratch.ts'

const isRoot = needs('root', process.getuid?.() === 0)
const hasUmoci = needs('umoci', isPresent('umoci'))
const hasSkopeo = needs('skopeo', isPresent('skopeo'))

const base = dir({
  kept: file('kept', { uid: 1000 }),
  gone: file('gone'),
  'gone dir': dir({ f: file('x') }),
  replaced: dir({ old: file('old') }),
  merged: dir({ low: file('low'), gone: file('gone'), changed: file('before') }, { mode: 0o755 }),
  'dir to link': dir({ f: file('x') }),
  'file to dir': file('x'),
})

const upper = dir({
  gone: whiteout(),
  'gone dir': whiteout(),
  replaced: opaque({ new: file('new', { mode: 0o4755 }) }),
  merged: dir(
    {
      gone: whiteout(),
      changed: file('after'),
      added: file('added', { xattrs: { 'user.a': '\0\xff' } }),
      same: linkTo('merged/added'),
    },
    { mode: 0o2770, gid: 7 },
  ),
  'dir to link': symlink('/etc'),
  'file to dir': dir({ f: file('y') }),
  'caf\xc3\xa9': file('utf-8'),
})

/** Link counts of directories and the like are the file system's; times of the root are the unpacker's. */
function comparable(tree: Tree): Tree {
  return new Map([...tree].filter(([path]) => path !== ''))
}

describe.skipIf(!isRoot || !hasUmoci)('an image of our layers', () => {
  async function image() {
    const made = scratch()
    buildTree(`${made.path}/base`, base)
    buildTree(`${made.path}/upper`, upper, { epoch: 1_650_000_000 })
    const run = (...args: string[]) => execFileSync('umoci', args, { stdio: 'pipe', cwd: made.path })
    run('init', '--layout', 'image')
    run('new', '--image', 'image:one')
    const reports = []
    for (const name of ['base', 'upper']) {
      const request = { from: made.host(name), form: 'oci', to: made.host(`${name}.tar`) } as const
      reports.push(await exportLayer(request))
      run('raw', 'add-layer', '--image', 'image:one', `${name}.tar`)
    }
    return { ...made, run, reports }
  }

  test('unpacked by umoci is what the kernel shows', async () => {
    const { path, run } = await image()
    run('unpack', '--image', 'image:one', 'bundle')
    const view = withOverlay({ lowers: [`${path}/upper`, `${path}/base`] }, plainOptions, readTree)
    expect(diffTrees(comparable(view), comparable(readTree(`${path}/bundle/rootfs`)))).toEqual([])
  })

  test('has the diff ids that we report', async () => {
    const { path, reports } = await image()
    const blob = (digest: string) => JSON.parse(readFileSync(`${path}/image/blobs/${digest.replace(':', '/')}`, 'utf8'))
    const index = JSON.parse(readFileSync(`${path}/image/index.json`, 'utf8'))
    const config = blob(blob(index.manifests[0].digest).config.digest)
    expect(config.rootfs.diff_ids).toEqual(reports.map((report) => report.archive?.diffId))
  })

  test.skipIf(!hasSkopeo)('copied by skopeo still imports to the same layers', async () => {
    const { path, host } = await image()
    execFileSync('skopeo', ['--insecure-policy', 'copy', 'oci:image:one', 'dir:copy'], { stdio: 'pipe', cwd: path })
    const manifest = JSON.parse(readFileSync(`${path}/copy/manifest.json`, 'utf8'))
    const names: string[] = []
    for (const [index, layer] of manifest.layers.entries()) {
      const to = `layer${index}`
      names.push(`${path}/${to}`)
      await importLayer({ from: host(`copy/${layer.digest.slice('sha256:'.length)}`), form: 'oci', to: host(to) })
    }
    const view = (lowers: string[]) => withOverlay({ lowers }, plainOptions, readTree)
    expect(diffTrees(view([`${path}/upper`, `${path}/base`]), view(names.reverse()))).toEqual([])
  })

  test('a layer that umoci made of changes imports to the same view', async () => {
    const { path, host, run } = await image()
    run('unpack', '--image', 'image:one', 'bundle')
    const root = `${path}/bundle/rootfs`
    execFileSync(
      'sh',
      ['-ec', 'rm -r replaced kept; mkdir replaced; echo 1 >replaced/x; ln -s x merged/l; mv merged/low merged/moved'],
      {
        cwd: root,
      },
    )
    run('repack', '--image', 'image:two', 'bundle')
    const blob = (digest: string) => `image/blobs/${digest.replace(':', '/')}`
    const index = JSON.parse(readFileSync(`${path}/image/index.json`, 'utf8'))
    const two = index.manifests.find(
      (manifest: { annotations: Record<string, string> }) =>
        manifest.annotations['org.opencontainers.image.ref.name'] === 'two',
    )
    const manifest = JSON.parse(readFileSync(`${path}/${blob(two.digest)}`, 'utf8'))
    const added = manifest.layers.at(-1).digest
    const lowers = [host('upper'), host('base')]
    await importLayer({ from: host(blob(added)), form: 'oci', to: host('added'), beneath: lowers })
    const view = withOverlay({ lowers: [`${path}/added`, ...lowers] }, plainOptions, readTree)
    // umoci rounds to whole seconds.
    const seconds = (tree: Tree): Tree =>
      new Map(
        [...comparable(tree)].map(([name, node]) => [
          name,
          { ...node, mtimeNs: (node.mtimeNs + 500_000_000n) / 1_000_000_000n },
        ]),
      )
    expect(diffTrees(seconds(readTree(root)), seconds(view))).toEqual([])
  })
})
