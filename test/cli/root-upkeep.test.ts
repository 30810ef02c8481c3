import { mkdirSync, readdirSync, writeFileSync } from 'node:fs'
import { describe, expect, onTestFinished, test } from 'vitest'
import { hasEtcd, useEtcd } from '../support/etcd.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { canMountImages } from '../support/ready.ts'
import { isPresent } from '../support/system.ts'
import { jsonLines, lsync, startLsync } from './lsync.ts'

const ready = needs('root, mkfs.erofs and file-system tools', canMountImages() && isPresent('mkfs.erofs'))

describe.skipIf(!ready)('lsync root', () => {
  const disk = useFileSystem('ext4')

  interface Lab {
    readonly at: string
    readonly merged: string
    run(...args: string[]): ReturnType<typeof lsync>
    json(...args: string[]): Record<string, unknown>[]
  }

  /** A mounted root of two versions on the node `state`. */
  function setUp(...init: string[]): Lab {
    const at = disk.current.fresh()
    mkdirSync(`${at}/base/etc`, { recursive: true })
    writeFileSync(`${at}/base/etc/hostname`, 'base\n')
    const run = (...args: string[]) => lsync([...args, '--state', `${at}/state`])
    const merged = `${at}/state/roots/lab/merged`
    const made = run('root', 'init', 'lab', '--home', `${at}/home`, '--base', `${at}/base`, ...init)
    expect(made).toMatchObject({ code: 0 })
    expect(run('root', 'mount', 'lab')).toMatchObject({ code: 0 })
    onTestFinished(() => void run('root', 'unmount', 'lab'))
    writeFileSync(`${merged}/etc/new`, 'new\n')
    expect(run('solidify', 'lab')).toMatchObject({ code: 0 })
    const json = (...args: string[]) => {
      const { stdout, stderr, code } = run(...args, '--json')
      expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
      return jsonLines(stdout)
    }
    return { at, merged, run, json }
  }

  test('policy says, adds to and forgets what is done without being asked', () => {
    const { run, json } = setUp()
    for (const what of [
      ['root', 'policy', 'lab'],
      ['hooks', 'lab'],
    ]) {
      expect(run(...what)).toEqual({ stdout: '', stderr: '', code: 0 })
    }
    const set = run('root', 'policy', 'lab', '--max-layers', '4', '--keep', '3', '--solidify-every', '1h')
    expect(set).toEqual({
      stdout: 'solidify: {"everyMs":3600000}\ncompact: {"maxLayers":4}\ngc: {"keep":3}\n',
      stderr: '',
      code: 0,
    })
    expect(json('root', 'policy', 'lab', '--max-depth', '9', '--max-shadowed', '2K')).toEqual([
      {
        type: 'policies',
        name: 'lab',
        policies: {
          solidify: { everyMs: 3_600_000 },
          compact: { maxLayers: 4, maxDepth: 9, maxShadowedBytes: 2000 },
          gc: { keep: 3 },
        },
      },
    ])
    expect(json('root', 'policy', 'lab', '--clear', '--prefetch')).toMatchObject([{ policies: { prefetch: true } }])
    expect(run('root', 'policy', 'lab', '--backup', '/repository')).toEqual({
      stdout: '',
      stderr: 'lsync: nobody is there to say the password of a backup; name a --password-file (USAGE)\n',
      code: 2,
    })
  })

  test('agent does what is due once, or keeps at it until it is told to end', async () => {
    const { at, run, json, merged } = setUp()
    run('root', 'policy', 'lab', '--max-layers', '1', '--max-depth', '1', '--keep', '1')
    writeFileSync(`${merged}/etc/more`, 'more\n')
    run('solidify', 'lab')
    expect(json('root', 'agent', 'lab', '--once')).toMatchObject([
      { type: 'done', name: 'lab', policy: 'compact', report: { after: [expect.any(String)] } },
      { type: 'done', name: 'lab', policy: 'gc', report: { versions: [1, 2] } },
    ])
    // Nothing is due any more.
    expect(run('root', 'agent', '--once').code).toBe(0)
    run('root', 'policy', 'lab', '--clear', '--solidify-every', '1s')
    writeFileSync(`${merged}/etc/last`, 'last\n')
    const { child, ended } = startLsync(['root', 'agent', '--look', '200ms', '--state', `${at}/state`, '--json'])
    onTestFinished(() => void child.kill('SIGKILL'))
    await new Promise<void>((resolve, reject) => {
      child.stdout?.on('data', (text) => String(text).includes('"solidify"') && resolve())
      void ended.then(({ stderr }) => reject(new Error(stderr)))
    })
    child.kill('SIGTERM')
    const { stdout, code } = await ended
    // A service manager takes that for an end in good order.
    expect(code).toBe(0)
    expect(jsonLines(stdout)[0]).toMatchObject({ type: 'done', name: 'lab', policy: 'solidify' })
    expect(json('root', 'versions', 'lab').at(-1)).toMatchObject({ madeBy: 'live', message: 'by policy' })
    expect(run('root', 'agent', 'unknown', '--once')).toMatchObject({
      stderr: expect.stringContaining('(ROOT_UNKNOWN)'),
    })
  })

  test('backup saves a version once, and says which snapshot it is', () => {
    const { at, run, json } = setUp()
    writeFileSync(`${at}/password`, 'secret\n')
    const there = ['--repository', `${at}/repository`, '--password-file', `${at}/password`]
    expect(lsync(['snapshot', 'init', ...there])).toMatchObject({ code: 0 })
    const [first] = json('root', 'backup', 'lab', '--version-of', '1', ...there)
    expect(first).toMatchObject({ type: 'backup', version: 1, isNew: true, problems: 0 })
    expect(run('root', 'backup', 'lab', ...there).stdout).toMatch(/^version 2 is snapshot [0-9a-f]{8}\n$/)
    expect(run('root', 'backup', 'lab', ...there).stdout).toMatch(/^version 2 is snapshot [0-9a-f]{8}, as before\n$/)
    expect(run('root', 'backup', 'lab', '--version-of', '7', ...there)).toMatchObject({
      stderr: expect.stringContaining('(VERSION_UNKNOWN)'),
      code: 1,
    })
    expect(
      run('root', 'backup', 'lab', ...there.slice(0, 2), '--password-file', `${at}/base/etc/hostname`),
    ).toMatchObject({ code: 1 })
  })

  test('seal makes images of layers and trees of images, and prefetch brings them to another node', () => {
    const { at, run, json } = setUp()
    const forms = () =>
      (json('root', 'status', 'lab')[0] as { layers: { form: string }[] }).layers.map(({ form }) => form)
    expect(run('root', 'seal', 'lab')).toMatchObject({
      stdout: expect.stringMatching(/^sealed 2 layers in /),
      stderr: 'the next mount takes them; then: lsync root gc lab\n',
      code: 0,
    })
    expect(run('root', 'seal', 'lab').stdout).toMatch(/^sealed 0 layers/)
    const other = (...args: string[]) => lsync([...args, '--state', `${at}/other`])
    const prefetch = ['root', 'prefetch', 'lab', '--home', `${at}/home`, '--cache-limit', '1G']
    expect(other(...prefetch)).toEqual({ stdout: '2 of 2 layers of version 2 are on this node\n', stderr: '', code: 0 })
    expect(jsonLines(other(...prefetch, '--json').stdout)).toEqual([{ type: 'prefetch', version: 2, local: 2, of: 2 }])
    expect(readdirSync(`${at}/other/cache`).length).toBeGreaterThan(0)
    run('root', 'unmount', 'lab')
    expect(run('root', 'gc', 'lab', '--yes').code).toBe(0)
    expect(forms()).toEqual(['erofs', 'erofs'])
    expect(json('root', 'seal', 'lab', '--undo')).toMatchObject([{ type: 'seal', to: 'tree', made: [{}, {}] }])
    expect(run('root', 'seal', 'lab', '--version-of', 'none')).toMatchObject({
      stderr: expect.stringContaining('(VERSION_UNKNOWN)'),
      code: 1,
    })
  })

  test('init says how long a silent node keeps the root, and refuses what makes no sense', () => {
    const { at, json, run } = setUp('--lease-duration', '90s')
    expect(json('root', 'status', '--home', `${at}/home`)).toMatchObject([{ type: 'home', lease: { epoch: 1 } }])
    const claim = jsonLines(run('root', 'status', 'lab', '--json').stdout)[0]
    expect(claim).toMatchObject({ lease: { isOurs: true, isReleased: false } })
    const init = (...args: string[]) =>
      run('root', 'init', 'more', '--home', `${at}/more`, '--base', `${at}/base`, ...args)
    for (const [args, why] of [
      [['--lease-duration', '10ms'], 'a lease of less than a second is lost again and again'],
      [['--lease', 'http://here'], 'http://here is no etcd'],
      [['--lease', 'etcd://'], 'etcd:// is no etcd'],
      [['--lease', 'etcd://user@here:2379'], 'etcd://user@here:2379 is no etcd'],
    ] as const) {
      expect([args, init(...args)]).toMatchObject([args, { stderr: expect.stringContaining(why), code: 2 }])
    }
    expect(readdirSync(at)).not.toContain('more')
  })
})

describe.skipIf(!ready || !needs('etcd', hasEtcd))('lsync root with its lease in etcd', () => {
  const disk = useFileSystem('ext4')
  const etcd = useEtcd()

  test('is mounted by one node at a time, and by nobody who cannot ask', async () => {
    const at = disk.current.fresh()
    mkdirSync(`${at}/base`)
    const run = (node: string, ...args: string[]) =>
      lsync([...args, '--home', `${at}/home`, '--state', `${at}/${node}`])
    const lease = ['--lease', `${etcd.current.endpoint.replace('http:', 'etcd:')}`, '--lease-duration', '1m']
    expect(run('one', 'root', 'init', 'lab', '--base', `${at}/base`, ...lease)).toMatchObject({ code: 0 })
    expect(run('one', 'root', 'mount', 'lab')).toMatchObject({ code: 0 })
    try {
      expect(run('two', 'root', 'mount', 'lab')).toMatchObject({
        stderr: expect.stringContaining('(LEASE_HELD)'),
        code: 4,
      })
      writeFileSync(`${at}/one/roots/lab/merged/new`, 'new')
      await etcd.current.stop()
      expect(lsync(['solidify', 'lab', '--state', `${at}/one`])).toMatchObject({
        stderr: expect.stringContaining('(LEASE_UNREACHABLE)'),
        code: 1,
      })
      await etcd.current.start()
      expect(lsync(['solidify', 'lab', '--state', `${at}/one`])).toMatchObject({ code: 0 })
    } finally {
      lsync(['root', 'unmount', 'lab', '--state', `${at}/one`])
    }
    expect(run('two', 'root', 'mount', 'lab')).toMatchObject({ stdout: expect.stringMatching(/^version 2 /), code: 0 })
    expect(lsync(['root', 'unmount', 'lab', '--state', `${at}/two`])).toMatchObject({ code: 0 })
  })
})
