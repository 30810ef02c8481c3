import { execFileSync, spawnSync } from 'node:child_process'
import { copyFileSync, cpSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { exportImage, importImage } from '@lsync/snapshot'
import { describe, expect, test } from 'vitest'
import { scratch } from '../layers/scratch.ts'
import { buildTree, dir, file, linkTo, opaque, symlink, whiteout } from '../support/build.ts'
import { needs } from '../support/needs.ts'
import { plainOptions, withOverlay } from '../support/overlay.ts'
import { isPresent, run } from '../support/system.ts'
import { diffTrees, readTree, type Tree } from '../support/tree.ts'

const isRoot = process.geteuid?.() === 0
const hasTools = ['umoci', 'skopeo', 'runc'].every(isPresent)

const base = dir({
  kept: file('kept', { uid: 1000 }),
  gone: file('gone'),
  replaced: dir({ old: file('old') }),
  merged: dir({ low: file('low'), gone: file('gone'), changed: file('before') }, { mode: 0o755 }),
  'dir to link': dir({ f: file('x') }),
})

const upper = dir({
  gone: whiteout(),
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
  'caf\xc3\xa9': file('utf-8'),
})

/** The root's own times are the unpacker's. */
function comparable(tree: Tree): Tree {
  return new Map([...tree].filter(([path]) => path !== ''))
}

function viewOf(lowers: readonly string[]): Tree {
  return withOverlay({ lowers: [...lowers] }, plainOptions, readTree)
}

function layers() {
  const made = scratch()
  buildTree(`${made.path}/base`, base)
  buildTree(`${made.path}/upper`, upper, { epoch: 1_650_000_000 })
  const tool = (command: string, ...args: string[]) => execFileSync(command, args, { stdio: 'pipe', cwd: made.path })
  const view = () => viewOf([`${made.path}/upper`, `${made.path}/base`])
  const unpacked = (image: string) => {
    tool('umoci', 'unpack', '--image', image, `bundle-${image}`)
    return readTree(`${made.path}/bundle-${image}/rootfs`)
  }
  return { ...made, tool, view, unpacked }
}

describe.skipIf(!needs('root, umoci, skopeo and runc', isRoot && hasTools))('images', () => {
  test('a layer and one that lies on it are what umoci unpacks', async () => {
    const { host, unpacked, view } = layers()
    await exportImage({ layers: [host('base')], layout: host('image'), ref: 'one' })
    const report = await exportImage({
      layers: [host('upper')],
      layout: host('image'),
      base: { ref: 'one' },
      ref: 'two',
      compression: 'none',
    })
    expect(report).toMatchObject({ ref: 'two', layers: 2, losses: [] })
    expect(diffTrees(comparable(view()), comparable(unpacked('image:two')))).toEqual([])
  })

  test('several layers become one, on a base and without', async () => {
    const { path, host, unpacked, tool, view } = layers()
    mkdirSync(`${path}/ground`)
    writeFileSync(`${path}/ground/gone`, 'below')
    writeFileSync(`${path}/ground/beside`, 'below')
    await exportImage({ layers: [host('upper'), host('base')], layout: host('alone') })
    expect(diffTrees(comparable(view()), comparable(unpacked('alone:latest')))).toEqual([])
    await exportImage({ layers: [host('ground')], layout: host('grounds'), ref: 'ground' })
    const request = { layers: [host('upper'), host('base')], layout: host('on') }
    const report = await exportImage({ ...request, base: { layout: host('grounds'), ref: 'ground' } })
    expect(report.layers).toBe(2)
    const whole = viewOf(['upper', 'base', 'ground'].map((name) => `${path}/${name}`))
    expect(whole.has('gone')).toBe(false)
    expect(diffTrees(comparable(whole), comparable(unpacked('on:latest')))).toEqual([])
    tool('skopeo', 'inspect', 'oci:on:latest')
  })

  test('the same layers make the same image', async () => {
    const { path, host } = layers()
    const digests: string[] = []
    for (const name of ['first', 'second']) {
      cpSync(`${path}/base`, `${path}/${name}-layer`, { recursive: true, preserveTimestamps: true })
      const { digest } = await exportImage({ layers: [host('upper')], layout: host(name), run: { Cmd: ['/bin/sh'] } })
      digests.push(digest)
    }
    expect(digests[0]).toBe(digests[1])
    const again = await exportImage({ layers: [host('upper')], layout: host('first'), run: { Cmd: ['/bin/sh'] } })
    expect(again.digest).toBe(digests[0])
    expect(readdirSync(`${path}/first/blobs/sha256`)).toHaveLength(3)
    expect(JSON.parse(readFileSync(`${path}/first/index.json`, 'utf8')).manifests).toHaveLength(1)
  })

  test.each(['gzip', 'zstd'] as const)(
    'skopeo copies it with its digests, and its %s copy is imported as it was',
    async (format) => {
      const { path, host, tool, view } = layers()
      await exportImage({ layers: [host('base')], layout: host('image'), ref: 'one' })
      await exportImage({ layers: [host('upper')], layout: host('image'), base: { ref: 'one' }, ref: 'two' })
      const compress = ['--dest-compress', '--dest-compress-format', format]
      const copy = format === 'gzip' ? [] : compress
      tool('skopeo', '--insecure-policy', 'copy', ...copy, 'oci:image:two', 'oci:copied:two')
      const report = await importImage({ layout: host('copied'), to: host('root') })
      expect(readdirSync(path).filter((name) => name.startsWith('.'))).toEqual([])
      const imported = report.layers.map((layer) => layer.path as string).reverse()
      expect(imported).toEqual([`${path}/root/layers/2`, `${path}/root/layers/1`])
      expect(diffTrees(view(), viewOf(imported))).toEqual([])
      const record = JSON.parse(readFileSync(`${path}/root/image.json`, 'utf8'))
      expect(record).toMatchObject({ version: 1, manifestDigest: report.digest, config: { os: 'linux' } })
    },
  )

  test('an image that umoci made and changed is imported, and its config and history are kept on export', async () => {
    const { path, host, tool, view } = layers()
    tool('umoci', 'init', '--layout', 'image')
    tool('umoci', 'new', '--image', 'image:one')
    for (const name of ['base', 'upper']) {
      await exportImage({ layers: [host(name)], layout: host(`${name}-layout`) })
      const index = JSON.parse(readFileSync(`${path}/${name}-layout/index.json`, 'utf8'))
      const at = (digest: string) => `${path}/${name}-layout/blobs/${digest.replace(':', '/')}`
      const manifest = JSON.parse(readFileSync(at(index.manifests[0].digest), 'utf8'))
      writeFileSync(
        `${path}/${name}.tar`,
        execFileSync('zcat', [at(manifest.layers[0].digest)], { maxBuffer: 1 << 28 }),
      )
      tool('umoci', 'raw', 'add-layer', '--image', 'image:one', `${name}.tar`)
    }
    tool(
      'umoci',
      'config',
      '--image',
      'image:one',
      '--config.env',
      'A=1',
      '--config.env',
      'B=2',
      '--author',
      'somebody',
    )
    const imported = await importImage({ layout: host('image'), ref: 'one', to: host('root') })
    expect(diffTrees(view(), viewOf(imported.layers.map((layer) => layer.path as string).reverse()))).toEqual([])
    mkdirSync(`${path}/more`)
    writeFileSync(`${path}/more/new`, 'new')
    await exportImage({
      layers: [host('more')],
      layout: host('image'),
      base: { ref: 'one' },
      ref: 'two',
      run: { Env: ['B=3'], Entrypoint: ['/new'], Labels: { who: 'me' } },
      comment: 'more',
    })
    const inspected = JSON.parse(String(tool('skopeo', 'inspect', '--config', 'oci:image:two')))
    expect(inspected.author).toBe('somebody')
    expect(inspected.config).toMatchObject({ Env: ['A=1', 'B=3'], Entrypoint: ['/new'], Labels: { who: 'me' } })
    expect(inspected.rootfs.diff_ids).toHaveLength(3)
    expect(inspected.history.at(-1)).toEqual({ created_by: 'lsync image export', comment: 'more' })
    const stat = JSON.parse(String(tool('umoci', 'stat', '--image', 'image:two', '--json')))
    expect(stat.history.filter((entry: { empty_layer?: boolean }) => entry.empty_layer !== true)).toHaveLength(3)
  })

  test('an exported image runs under runc', async () => {
    const { path, host, tool } = layers()
    mkdirSync(`${path}/system/bin`, { recursive: true })
    copyFileSync('/bin/sh', `${path}/system/bin/sh`)
    // What /bin/sh is linked to, in the same places.
    for (const [, library = ''] of run('ldd', '/bin/sh').matchAll(/(\/\S+) \(0x/g)) {
      mkdirSync(`${path}/system${library.replace(/\/[^/]*$/, '')}`, { recursive: true })
      copyFileSync(library, `${path}/system${library}`)
    }
    mkdirSync(`${path}/work/srv`, { recursive: true })
    writeFileSync(`${path}/work/srv/greeting`, 'hello\n')
    await exportImage({ layers: [host('system')], layout: host('image'), ref: 'system' })
    await exportImage({
      layers: [host('work')],
      layout: host('image'),
      base: { ref: 'system' },
      ref: 'greeter',
      run: {
        Cmd: ['/bin/sh', '-c', 'read line <greeting; echo "$line $NAME"'],
        Env: ['NAME=world', 'PATH=/bin'],
        WorkingDir: '/srv',
      },
    })
    tool('umoci', 'unpack', '--image', 'image:greeter', 'bundle')
    const spec = JSON.parse(readFileSync(`${path}/bundle/config.json`, 'utf8'))
    spec.process.terminal = false
    delete spec.process.rlimits
    delete spec.linux.resources
    spec.linux.namespaces = spec.linux.namespaces.filter(({ type }: { type: string }) => type !== 'cgroup')
    spec.mounts = spec.mounts.filter(({ type }: { type: string }) => type !== 'cgroup')
    writeFileSync(`${path}/bundle/config.json`, JSON.stringify(spec))
    const args = ['--root', `${path}/runc`, 'run', '--bundle', `${path}/bundle`, `lsync-test-${process.pid}-image`]
    const { status, stdout, stderr } = spawnSync('runc', args, { encoding: 'utf8', input: '' })
    expect({ status, stdout, stderr }).toEqual({ status: 0, stdout: 'hello world\n', stderr: '' })
  })
})
