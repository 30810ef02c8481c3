import { type ChildProcess, spawn } from 'node:child_process'
import { EventEmitter } from 'node:events'
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import {
  ContainerRoot,
  FileLeases,
  type Hooks,
  type LeaseClaim,
  LeaseUnreachableError,
  LocalPeer,
  RemotePeer,
  readSwitch,
  type SwitchEvents,
  type SwitchFailedError,
  SwitchSide,
  switchRoot,
  writeHooks,
} from '@lsync/container-root'
import { afterEach, describe, expect, test } from 'vitest'
import { dir, file } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { canMountImages } from '../support/ready.ts'
import { makeSite, type Site } from './roots.ts'

const CHILD = fileURLToPath(new URL('../support/switch-child.ts', import.meta.url))
const LEASE_MS = 4000
type NodeName = 'one' | 'two'

/** A site whose root has a container on each node: a process that writes a line again and again. */
interface Lab {
  readonly site: Site
  readonly at: string
  open(node: NodeName): Promise<ContainerRoot>
  runsOn(): NodeName[]
}

const cleanUps: (() => Promise<void>)[] = []
afterEach(async () => {
  for (const cleanUp of cleanUps.splice(0).reverse()) await cleanUp()
})

function hooksOf(at: string, node: NodeName): Hooks {
  const pid = `${at}/pid-${node}`
  const loop = 'cd "$LSYNC_MERGED" && n=0; while :; do n=$((n+1)); echo "$n" >> log; sleep 0.02; done'
  const alive = `[ -e ${pid} ] && kill -0 $(cat ${pid}) 2>/dev/null`
  return {
    start: { command: `${alive} && exit 0; nohup sh -c '${loop}' </dev/null >/dev/null 2>&1 & echo $! > ${pid}` },
    stop: { command: `${alive} || exit 0; kill $(cat ${pid}); while ${alive}; do sleep 0.02; done; rm ${pid}` },
    health: { command: alive, timeoutMs: 10_000 },
  }
}

describe.skipIf(!canMountImages())('switching a root', () => {
  const disk = useFileSystem('ext4')

  async function setUp(): Promise<Lab> {
    const at = disk.current.fresh()
    const site = await makeSite(at, at, dir({ etc: dir({ hostname: file('lab') }), log: file('') }))
    const leases = ({ leaseDirectory }: { leaseDirectory: string }) =>
      new FileLeases(leaseDirectory, { durationMs: LEASE_MS })
    const open = (node: NodeName) => ContainerRoot.open(site.home, 'lab', { state: site.node(node), leases })
    for (const node of ['one', 'two'] as const) {
      const root = await open(node)
      writeHooks(root, hooksOf(at, node))
      await root.close()
    }
    const runsOn = () => (['one', 'two'] as const).filter((node) => isAlive(`${at}/pid-${node}`))
    cleanUps.push(async () => {
      for (const node of ['one', 'two'] as const) {
        const root = await open(node)
        await new SwitchSide(root).hook('stop', 'test')
        await root.unmount().catch(() => undefined)
        await root.close()
      }
    })
    const root = await open('one')
    await root.mount()
    await new SwitchSide(root).hook('start', 'test')
    await root.close()
    return { site, at, open, runsOn }
  }

  /** Both ends in this process. */
  async function between<T>(lab: Lab, from: NodeName, use: (source: LocalPeer, target: LocalPeer) => Promise<T>) {
    const [source, target] = [await lab.open(from), await lab.open(from === 'one' ? 'two' : 'one')]
    try {
      return await use(new LocalPeer(new SwitchSide(source)), new LocalPeer(new SwitchSide(target)))
    } finally {
      await source.close()
      await target.close()
    }
  }

  const linesOn = (lab: Lab, node: NodeName) => {
    const text = readFileSync(`${lab.at}/${node}/roots/lab/merged/log`, 'utf8')
    return text.split('\n').filter(Boolean).map(Number)
  }

  test('the container goes over with all that it wrote, and comes back', async () => {
    const lab = await setUp()
    writeFileSync(`${lab.at}/one/roots/lab/merged/made-on-one`, '1')
    const there = await between(lab, 'one', (source, target) => switchRoot({ name: 'lab', source, target }))
    expect(lab.runsOn()).toEqual(['two'])
    expect(there.phases.map(({ phase }) => phase)).toEqual([
      'check',
      'pre-copy',
      'stop',
      'pass',
      'mount',
      'start',
      'health',
      'commit',
    ])
    expect(there.downtimeMs).toBeGreaterThan(0)
    expect(readFileSync(`${lab.at}/two/roots/lab/merged/made-on-one`, 'utf8')).toBe('1')
    writeFileSync(`${lab.at}/two/roots/lab/merged/made-on-two`, '2')
    const back = await between(lab, 'two', (source, target) => switchRoot({ name: 'lab', source, target }))
    expect(lab.runsOn()).toEqual(['one'])
    expect(back.version).toBe((there.version ?? 0) + 1)
    expect(readFileSync(`${lab.at}/one/roots/lab/merged/made-on-two`, 'utf8')).toBe('2')
    // No line is missing: each run counts from 1, without a gap.
    for (const [index, line] of linesOn(lab, 'one').entries()) {
      expect(line === 1 || line === (linesOn(lab, 'one')[index - 1] ?? 0) + 1).toBe(true)
    }
  })

  test('a dry run looks and changes nothing; what cannot be done is refused before the container stops', async () => {
    const lab = await setUp()
    const report = await between(lab, 'one', (source, target) =>
      switchRoot({ name: 'lab', source, target, dryRun: true }),
    )
    expect(report).toMatchObject({ isDryRun: true })
    await between(lab, 'two', async (source, target) => {
      await expect(switchRoot({ name: 'lab', source, target })).rejects.toMatchObject({ code: 'SWITCH_REFUSED' })
      await expect(switchRoot({ name: 'lab', source, target: source })).rejects.toThrow(/the same node/)
      const slow = switchRoot({ name: 'lab', source: target, target: source, maxDowntimeMs: 0.001 })
      await expect(slow).rejects.toMatchObject({ code: 'SWITCH_TOO_SLOW' })
    })
    expect(lab.runsOn()).toEqual(['one'])
  })

  test.each(['start', 'health'] as const)(
    'when the %s hook of the target fails, it runs on the source again',
    async (name) => {
      const lab = await setUp()
      const target = await lab.open('two')
      writeHooks(target, { ...hooksOf(lab.at, 'two'), [name]: { command: 'echo no; exit 1', timeoutMs: 1000 } })
      await target.close()
      const error = await between(lab, 'one', (source, target) =>
        switchRoot({ name: 'lab', source, target }).catch((cause: SwitchFailedError) => cause),
      )
      expect(error).toMatchObject({ code: 'SWITCH_FAILED', runsOn: 'source' })
      expect(lab.runsOn()).toEqual(['one'])
      const before = linesOn(lab, 'one').length
      expect(before).toBeGreaterThan(0)
      // What was wrong is put right, and it goes over.
      const again = await lab.open('two')
      writeHooks(again, hooksOf(lab.at, 'two'))
      await again.close()
      await between(lab, 'one', (source, target) => switchRoot({ name: 'lab', source, target }))
      expect(lab.runsOn()).toEqual(['two'])
      expect(linesOn(lab, 'two').length).toBeGreaterThanOrEqual(before)
    },
  )

  test('when the stop hook fails, it goes on where it was', async () => {
    const lab = await setUp()
    const source = await lab.open('one')
    writeHooks(source, { ...hooksOf(lab.at, 'one'), stop: { command: 'exit 7' } })
    await source.close()
    const failed = between(lab, 'one', (source, target) => switchRoot({ name: 'lab', source, target }))
    await expect(failed).rejects.toMatchObject({ code: 'SWITCH_FAILED', runsOn: 'source' })
    expect(lab.runsOn()).toEqual(['one'])
    const again = await lab.open('one')
    writeHooks(again, hooksOf(lab.at, 'one'))
    await again.close()
  })

  /** A source whose store does not answer once, when `hiccup` was called. */
  async function withHiccup<T>(
    lab: Lab,
    use: (source: LocalPeer, target: LocalPeer, root: ContainerRoot, hiccup: () => void) => Promise<T>,
  ): Promise<T> {
    let isDue = false
    class ShakyLeases extends FileLeases {
      override async assertNewest(claim: LeaseClaim): Promise<void> {
        const fails = isDue
        isDue = false
        if (fails) throw new LeaseUnreachableError('the store', new Error('no answer'))
        await super.assertNewest(claim)
      }
    }
    // Heartbeats come so rarely that none takes the failure.
    const leases = ({ leaseDirectory }: { leaseDirectory: string }) => new ShakyLeases(leaseDirectory)
    const root = await ContainerRoot.open(lab.site.home, 'lab', { state: lab.site.node('one'), leases })
    const target = await lab.open('two')
    try {
      const hiccup = () => {
        isDue = true
      }
      return await use(new LocalPeer(new SwitchSide(root)), new LocalPeer(new SwitchSide(target)), root, hiccup)
    } finally {
      await root.close()
      await target.close()
    }
  }

  test('a store that fails once when the last changes are published already stops no container for good', async () => {
    const lab = await setUp()
    const failed = withHiccup(lab, (source, target, root, hiccup) => {
      root.events.on('step', ({ verb, step }) => (verb === 'solidify' && step === 'published' ? hiccup() : undefined))
      return switchRoot({ name: 'lab', source, target })
    })
    await expect(failed).rejects.toMatchObject({ code: 'SWITCH_FAILED', runsOn: 'source' })
    expect(lab.runsOn()).toEqual(['one'])
  })

  test('a store that fails once before the container is stopped leaves it where it is, and says so', async () => {
    const lab = await setUp()
    const failed = withHiccup(lab, (source, target, _root, hiccup) => {
      const events = new EventEmitter<SwitchEvents>()
      events.on('phase', ({ phase }) => (phase === 'pre-copy' ? hiccup() : undefined))
      return switchRoot({ name: 'lab', source, target, events })
    })
    await expect(failed).rejects.toMatchObject({ code: 'SWITCH_FAILED', runsOn: 'source' })
    expect(lab.runsOn()).toEqual(['one'])
  })

  // Where it is killed, and where the container runs once the killed node has settled what it had begun.
  test.each<[NodeName, string, NodeName]>([
    ['one', 'preCopy', 'one'],
    ['one', 'solidify:copied', 'one'],
    ['one', 'solidify:stopped', 'one'],
    ['one', 'solidify:synced', 'one'],
    ['one', 'solidify:published', 'one'],
    ['one', 'pass', 'one'],
    ['two', 'mount', 'one'],
    ['two', 'hook start', 'one'],
    ['two', 'hook health', 'one'],
    ['two', 'commit', 'two'],
  ])('SIGKILL of node %s at %s: one container, on node %s, with all that was published', async (victim, at, place) => {
    const lab = await setUp()
    for (let look = 0; linesOn(lab, 'one').length < 5 && look < 500; look++) await delay(20)
    const before = linesOn(lab, 'one').length
    const children: ChildProcess[] = []
    const end = (node: NodeName) => {
      const child = spawn(
        process.execPath,
        [CHILD, lab.site.home, `${lab.at}/${node}`, String(LEASE_MS), node === victim ? at : ''],
        { stdio: ['pipe', 'pipe', 'inherit'] },
      )
      children.push(child)
      return new RemotePeer({
        readable: child.stdout as NonNullable<typeof child.stdout>,
        writable: child.stdin as NonNullable<typeof child.stdin>,
        explain: async () => undefined,
        destroy: () => undefined,
      })
    }
    const [source, target] = [end('one'), end('two')]
    const ended = children.map((child) => new Promise((resolve) => child.once('exit', resolve)))
    const outcome = await switchRoot({ name: 'lab', source, target }).catch((cause: unknown) => cause)
    await Promise.all([source.close(), target.close()])
    await Promise.all(ended)
    expect(children.filter(({ signalCode }) => signalCode === 'SIGKILL')).toHaveLength(1)
    if (at === 'commit') expect(outcome).toMatchObject({ to: expect.any(String) as string })
    else expect(outcome).toBeInstanceOf(Error)
    // The killed node comes back, and then the other one looks, too.
    for (const node of [victim, victim === 'one' ? 'two' : 'one'] as const) {
      const root = await lab.open(node)
      if (readSwitch(root.home) !== undefined) await new SwitchSide(root).settle()
      await root.close()
    }
    expect(lab.runsOn()).toEqual([place])
    const root = await lab.open(place)
    const state = await root.leases.read()
    expect(state?.isReleased).toBe(false)
    expect(state?.claim.node).toContain(root.node.id.slice(0, 12))
    await root.close()
    expect(linesOn(lab, place).length).toBeGreaterThanOrEqual(before)
    expect(existsSync(`${lab.at}/${place}/roots/lab/merged/etc/hostname`)).toBe(true)
  })
})

function isAlive(pidFile: string): boolean {
  if (!existsSync(pidFile)) return false
  try {
    process.kill(Number(readFileSync(pidFile, 'utf8')), 0)
    return true
  } catch {
    return false
  }
}
