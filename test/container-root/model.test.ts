import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import {
  ContainerRoot,
  type LayerStorage,
  LocalPeer,
  leaseNameOf,
  NodeState,
  type RootStatus,
  readSwitch,
  SwitchSide,
  switchRoot,
} from '@lsync/container-root'
import type { HostPath } from '@lsync/posix'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { dir, file } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { withPowerCut } from '../support/power-cut.ts'
import { canMountImages } from '../support/ready.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { isPresent, unmount } from '../support/system.ts'
import { makeSite, type Site } from './roots.ts'
import { type Point, struck } from './struck.ts'

// One or two roots, three nodes, commands and faults in any order. The model knows what each node's container has written, what each
// version holds, and nothing of how lsync keeps it. After each command what the kernel shows and what the store lists is compared.

const canRun = needs('root, mkfs.erofs and strace', canMountImages() && ['mkfs.erofs', 'strace'].every(isPresent))
const disk = useFileSystem('ext4')
const NODES = ['one', 'two', 'three'] as const
type NodeName = (typeof NODES)[number]
const FILES = ['a', 'b', 'd/e', 'd/f'] as const
/** What the files hold; those that are not there are absent. */
type Content = Partial<Record<(typeof FILES)[number], string>>
/** So many sequences of commands, in half a minute. */
const RUNS = 8
/** So short that a takeover by expiry costs no more than the rest. */
const LEASE_MS = 1000
const BASE: Content = { a: 'base', 'd/e': 'base' }

/** What a node's container sees of a root, mounted or as it will be mounted next. */
interface View {
  content: Content
  isMounted: boolean
  /** The version under the upper, and the last one that was made of the upper while it stayed. */
  base: number
  live: number | undefined
}

interface RootModel {
  readonly versions: Map<number, Content>
  readonly views: Map<NodeName, View>
}

/** Why something may be refused, each checked against what was so before. */
type Refusal = 'LEASE_HELD' | 'LEASE_LOST' | 'UPPER_STALE' | 'CHANGES_UNSAVED' | 'ROOT_BUSY' | 'SWITCH_REFUSED'

class World {
  readonly #sites: readonly Site[]
  readonly #open = new Map<string, ContainerRoot>()
  #forks = 0

  constructor(sites: readonly Site[]) {
    this.#sites = sites
  }

  async root(index: number, node: NodeName): Promise<ContainerRoot> {
    const key = `${index} ${node}`
    const known = this.#open.get(key)
    if (known !== undefined) return known
    const { home } = this.#sites[index] as Site
    const root = await ContainerRoot.open(home, `lab-${index}`, { state: this.#state(node) })
    this.#open.set(key, root)
    return root
  }

  // One state holds all roots of a node.
  #state(node: NodeName): NodeState {
    return (this.#sites[0] as Site).node(node)
  }

  merged(index: number, node: NodeName): string {
    return `${this.statePath(node)}/roots/lab-${index}/merged`
  }

  statePath(node: NodeName): HostPath {
    return this.#state(node).path
  }

  /** A home that is not there yet. */
  freshHome(): HostPath {
    return `${this.#sites[0]?.home}.fork-${++this.#forks}` as HostPath
  }

  /** The process that had the root is gone; with `isPowerCut` the machine with it. */
  async drop(index: number, node: NodeName, isPowerCut: boolean): Promise<void> {
    const key = `${index} ${node}`
    const root = this.#open.get(key)
    this.#open.delete(key)
    await root?.close()
    if (isPowerCut) unmount(this.merged(index, node))
  }

  async close(): Promise<void> {
    for (const root of this.#open.values()) {
      await root.unmount().catch(() => undefined)
      await root.close()
    }
    for (const index of this.#sites.keys()) for (const node of NODES) unmount(this.merged(index, node))
  }
}

interface Model {
  readonly roots: readonly RootModel[]
}

function read(path: string): Content {
  return Object.fromEntries(
    FILES.flatMap((name) => (existsSync(`${path}/${name}`) ? [[name, readFileSync(`${path}/${name}`, 'utf8')]] : [])),
  )
}

const headOf = ({ versions }: RootModel) => Math.max(...versions.keys())
const viewOf = (root: RootModel, node: NodeName) => root.views.get(node) as View
const contentOf = (root: RootModel, version: number) => root.versions.get(version) as Content

/** What is known before a command, so that a refusal or a success can be judged by it. */
interface Before {
  readonly status: RootStatus
  readonly head: number
  readonly view: View
  readonly isStale: boolean
  /** Another node has the right to write, and has not given it back. */
  readonly isHeld: boolean
}

async function look(model: RootModel, root: ContainerRoot, node: NodeName): Promise<Before> {
  await root.recover()
  const status = await root.status()
  const view = viewOf(model, node)
  const head = headOf(model)
  const { lease } = status
  const isHeld = lease !== undefined && !lease.isReleased && lease.node !== leaseNameOf(root.node)
  return { status, head, view, isStale: view.base !== head && view.live !== head, isHeld }
}

function assertJustified(code: string | undefined, before: Before): asserts code is Refusal {
  const { status, isStale, isHeld, view } = before
  const reasons: Record<Refusal, boolean> = {
    LEASE_HELD: isHeld,
    LEASE_LOST: status.lease?.isOurs !== true || status.lease.isReleased,
    UPPER_STALE: isStale,
    CHANGES_UNSAVED: status.hasChanges,
    ROOT_BUSY: view.isMounted,
    SWITCH_REFUSED: true,
  }
  expect(Object.keys(reasons)).toContain(code)
  expect([code, reasons[code as Refusal]]).toEqual([code, true])
}

/** Runs a command that may be refused; gives what it gave, or `undefined` if it was refused for a good reason. */
async function attempt<T>(before: Before, work: () => Promise<T>): Promise<T | undefined> {
  try {
    return await work()
  } catch (error) {
    const { code, cause } = error as { code?: string; cause?: { code?: string } }
    assertJustified(code === 'SWITCH_FAILED' ? cause?.code : code, before)
    return undefined
  }
}

/** After each command: versions, mounts and contents are those of the model, and at most one node may write. */
async function assertAsModelled(model: Model, world: World): Promise<void> {
  for (const [index, root] of model.roots.entries()) {
    let writers = 0
    for (const node of NODES) {
      const real = await world.root(index, node)
      const status = await real.status()
      const view = viewOf(root, node)
      expect(status.errors).toEqual([])
      expect([node, status.isMounted, status.version, status.liveVersion]).toEqual([
        node,
        view.isMounted,
        view.base,
        view.live,
      ])
      if (view.isMounted) expect([node, read(world.merged(index, node))]).toEqual([node, view.content])
      if (status.lease?.isOurs === true && !status.lease.isReleased) writers++
      if (node === NODES[0]) expect(real.versions().map(({ number }) => number)).toEqual([...root.versions.keys()])
    }
    expect(writers).toBeLessThanOrEqual(1)
  }
}

interface Real {
  readonly world: World
}
type Command = fc.AsyncCommand<Model, Real>

/** A command on one root of one node, followed by all checks. */
function command(
  name: string,
  index: number,
  node: NodeName,
  run: (root: RootModel, real: ContainerRoot, world: World) => Promise<void>,
  may: (root: RootModel) => boolean = () => true,
): Command {
  return {
    check: (model) => index < model.roots.length && may(model.roots[index] as RootModel),
    async run(model, { world }) {
      await run(model.roots[index] as RootModel, await world.root(index, node), world)
      await assertAsModelled(model, world)
    },
    toString: () => `${name}(${index}, ${node})`,
  }
}

/** What a mount does to a view: it stays, or begins anew with the newest version. */
function mounted(root: RootModel, node: NodeName, discard: boolean): void {
  const view = viewOf(root, node)
  const head = headOf(root)
  const isStale = view.base !== head && view.live !== head
  if (isStale || (discard && !view.isMounted)) {
    root.views.set(node, { content: contentOf(root, head), isMounted: true, base: head, live: undefined })
  } else view.isMounted = true
}

type Takeover = 'force' | 'expired' | undefined

// A node that follows its root shows that it lives; of one that does not, or was killed, the lease expires.
const mount = (index: number, node: NodeName, takeover: Takeover, discard: boolean): Command =>
  command(
    `mount${takeover ? ` (${takeover})` : ''}${discard ? ' with discard' : ''}`,
    index,
    node,
    async (root, real) => {
      const before = await look(root, real, node)
      const done = await attempt(before, () => real.mount({ discard, ...(takeover && { takeover }) }))
      if (done === undefined) return
      if (takeover === undefined) expect(before.isHeld).toBe(false)
      if (before.isStale && before.status.hasChanges) expect(discard).toBe(true)
      mounted(root, node, discard)
    },
  )

const write = (index: number, node: NodeName, name: (typeof FILES)[number], text: string | undefined): Command =>
  command(
    `${text === undefined ? 'remove' : 'write'} ${name} ${text ?? ''}`,
    index,
    node,
    async (root, _, world) => {
      const path = `${world.merged(index, node)}/${name}`
      const view = viewOf(root, node)
      const { [name]: _old, ...content } = view.content
      if (text === undefined) rmSync(path, { force: true })
      else {
        mkdirSync(dirname(path), { recursive: true })
        writeFileSync(path, text)
      }
      view.content = text === undefined ? content : { ...content, [name]: text }
    },
    (root) => viewOf(root, node).isMounted,
  )

const barrier = (index: number, node: NodeName): Command =>
  command('barrier', index, node, async (root, real) => {
    const before = await look(root, real, node)
    await attempt(before, async () => {
      const sync = await real.startSync()
      const { failures } = await sync.flush()
      expect(failures).toEqual([])
      expect(before.isHeld).toBe(false)
    })
  })

function published(root: RootModel, node: NodeName, isLive: boolean, number: number): void {
  const view = viewOf(root, node)
  root.versions.set(number, view.content)
  if (isLive) view.live = number
  else root.views.set(node, { ...view, base: number, live: undefined })
}

const solidify = (index: number, node: NodeName, live: boolean): Command =>
  command(live ? 'solidify live' : 'solidify', index, node, async (root, real) => {
    const before = await look(root, real, node)
    const report = await attempt(before, () => real.solidify({ live }))
    if (report === undefined) return
    const { number } = report.version
    expect([before.isStale, before.isHeld, number > before.head]).toEqual([false, false, true])
    published(root, node, live, number)
  })

const unmountCommand = (index: number, node: NodeName): Command =>
  command('unmount', index, node, async (root, real) => {
    await real.unmount()
    viewOf(root, node).isMounted = false
  })

const compact = (index: number, node: NodeName, intoBottom: boolean): Command =>
  command(intoBottom ? 'compact all' : 'compact', index, node, async (_, real) => {
    await real.compact({ maxLayers: intoBottom ? 1 : 2, intoBottom })
  })

const convert = (index: number, node: NodeName, to: LayerStorage): Command =>
  command(`convert to ${to}`, index, node, async (_, real) => void (await real.convert({ to })))

/** A second root that begins as a version shows what that one held. */
const fork = (index: number, node: NodeName, which: number): Command =>
  command(`fork of ${which}`, index, node, async (root, real, world) => {
    const numbers = [...root.versions.keys()]
    const version = numbers[which % numbers.length] as number
    const home = world.freshHome()
    ;(await real.fork({ home, version })).close()
    const path = `${home}.state` as HostPath
    mkdirSync(path, { mode: 0o700 })
    const forked = await ContainerRoot.open(home, 'fork', { state: NodeState.open(path) })
    try {
      await forked.mount()
      expect(read(forked.mergedPath)).toEqual(contentOf(root, version))
    } finally {
      await forked.unmount()
      await forked.close()
    }
  })

const gc = (index: number, node: NodeName, keep: number): Command =>
  command(`gc keeping ${keep}`, index, node, async (root, real) => {
    const { versions } = await real.gc({ keep, graceMs: 0 })
    expect(versions).not.toContain(headOf(root))
    expect(root.versions.size - versions.length).toBeGreaterThanOrEqual(Math.min(keep, root.versions.size))
    for (const number of versions) root.versions.delete(number)
  })

function rolledBack(root: RootModel, node: NodeName, to: number, number: number): void {
  root.versions.set(number, contentOf(root, to))
  root.views.set(node, { content: contentOf(root, to), isMounted: false, base: number, live: undefined })
}

const rollback = (index: number, node: NodeName, which: number, discard: boolean): Command =>
  command(`rollback to ${which}`, index, node, async (root, real) => {
    const before = await look(root, real, node)
    const numbers = [...root.versions.keys()]
    const to = numbers[which % numbers.length] as number
    const version = await attempt(before, () => real.rollback({ to, discard }))
    if (version === undefined) return
    expect([before.isHeld, version.number > before.head]).toEqual([false, true])
    if (before.status.hasChanges) expect(discard).toBe(true)
    rolledBack(root, node, to, version.number)
  })

const change = (index: number, from: NodeName, to: NodeName): Command =>
  command(`switch to ${to}`, index, from, async (root, real, world) => {
    const before = await look(root, real, from)
    const other = await world.root(index, to)
    const [source, target] = [new LocalPeer(new SwitchSide(real)), new LocalPeer(new SwitchSide(other))]
    const report = await attempt(before, () => switchRoot({ name: 'lab', source, target }))
    if (report === undefined) return
    const number = report.version as number
    expect([before.isStale, before.isHeld, number > before.head]).toEqual([false, false, true])
    published(root, from, false, number)
    viewOf(root, from).isMounted = false
    root.views.set(to, { content: contentOf(root, number), isMounted: true, base: number, live: undefined })
  })

/** The process ends in the middle of nothing; with a power cut the mount goes, too, and nothing else. */
const crash = (index: number, node: NodeName, isPowerCut: boolean): Command =>
  command(isPowerCut ? 'power cut' : 'kill', index, node, async (root, _, world) => {
    await world.drop(index, node, isPowerCut)
    if (isPowerCut) viewOf(root, node).isMounted = false
  })

type Verb = 'mount' | 'unmount' | 'solidify' | 'solidify live' | 'compact' | 'gc' | 'rollback' | 'switch'

/** A command that is cut off at its n-th call that changes something; then the node comes back and looks what it left. */
const cut = (index: number, node: NodeName, verb: Verb, at: number, isPowerCut: boolean, to: NodeName): Command =>
  command(
    `${verb} cut at ${at}${isPowerCut ? ' with the power' : ''}`,
    index,
    node,
    async (root, real, world) => {
      const before = await look(root, real, node)
      const oldVersions = [...root.versions.keys()]
      const first = oldVersions[0] as number
      const work: Record<Verb, () => Promise<unknown>> = {
        mount: () => real.mount(),
        unmount: () => real.unmount(),
        solidify: () => real.solidify(),
        'solidify live': () => real.solidify({ live: true }),
        compact: () => real.compact({ maxLayers: 2 }),
        gc: () => real.gc({ keep: 1, graceMs: 0 }),
        rollback: () => real.rollback({ to: first }),
        switch: async () => {
          const target = new LocalPeer(new SwitchSide(await world.root(index, to)))
          await switchRoot({ name: 'lab', source: new LocalPeer(new SwitchSide(real)), target })
        },
      }
      await withPowerCut(at, (arm) => {
        arm()
        return work[verb]()
      }).catch((error: { code?: string; cause?: { code?: string } }) =>
        assertJustified(error.code === 'SWITCH_FAILED' ? error.cause?.code : error.code, before),
      )
      const victims = verb === 'switch' ? [node, to] : [node]
      for (const victim of victims) await world.drop(index, victim, isPowerCut)
      for (const victim of victims) {
        const again = await world.root(index, victim)
        await again.recover()
        if (verb !== 'switch') continue
        const left = readSwitch(again.home)
        const me = leaseNameOf(again.node)
        if (left !== undefined && (left.from.lease === me || left.to.lease === me)) {
          await attempt(await look(root, again, victim), () => new SwitchSide(again).settle())
        }
      }
      await adopt(root, victims, verb, before, world, index)
    },
    (root) => verb !== 'switch' || (node !== to && viewOf(root, node).isMounted && !viewOf(root, to).isMounted),
  )

/** What the built command is called with for a verb. */
const WORDS: Readonly<Record<Exclude<Verb, 'switch'>, (name: string, first: number) => readonly string[]>> = {
  mount: (name) => ['root', 'mount', name],
  unmount: (name) => ['root', 'unmount', name],
  solidify: (name) => ['solidify', name],
  'solidify live': (name) => ['solidify', name, '--live'],
  compact: (name) => ['root', 'compact', name, '--max-layers', '2'],
  gc: (name) => ['root', 'gc', name, '--keep', '1', '--yes'],
  rollback: (name, first) => ['root', 'rollback', name, '--to', String(first)],
}

/** A command in a process of its own, which gets SIGKILL at one of its calls, or comes to its end where there are not so many. */
const strike = (index: number, node: NodeName, verb: keyof typeof WORDS, at: Point): Command =>
  command(`${verb} killed at ${at.call} ${at.nth}`, index, node, async (root, real, world) => {
    const before = await look(root, real, node)
    const first = [...root.versions.keys()][0] as number
    // Two processes that follow one upper at once would refuse each other.
    await world.drop(index, node, false)
    const { isKilled, status, stderr } = struck(world.statePath(node), WORDS[verb](`lab-${index}`, first), at)
    if (!isKilled && status !== 0) assertJustified(/\((\w+)\)\n$/.exec(stderr)?.[1], before)
    await (await world.root(index, node)).recover()
    await adopt(root, [node], verb, before, world, index)
  })

/** Takes over what a cut left, if it is one of the states that it may leave. */
async function adopt(
  root: RootModel,
  victims: readonly NodeName[],
  verb: Verb,
  before: Before,
  world: World,
  index: number,
): Promise<void> {
  const [node] = victims as [NodeName]
  const real = await world.root(index, node)
  const numbers = real.versions().map(({ number }) => number)
  const old = { ...before.view }
  const first = contentOf(root, Math.min(...root.versions.keys()))
  const made = numbers.filter((number) => number > before.head)
  expect(made.length).toBeLessThanOrEqual(1)
  if (made.length > 0) expect(['solidify', 'solidify live', 'rollback', 'switch']).toContain(verb)
  // A version that was made under the wrong lease, or on the wrong base, would be a second writer's.
  if (made.length > 0) expect([before.isHeld, verb !== 'rollback' && before.isStale]).toEqual([false, false])
  for (const number of made) root.versions.set(number, verb === 'rollback' ? first : old.content)
  for (const number of root.versions.keys()) {
    if (numbers.includes(number)) continue
    expect([verb, number < before.head]).toEqual(['gc', true])
    root.versions.delete(number)
  }
  for (const victim of victims) {
    const status = await (await world.root(index, victim)).status()
    const view = viewOf(root, victim)
    const isAnew = status.version !== view.base
    const content = isAnew ? contentOf(root, status.version) : view.content
    if (isAnew && status.version !== headOf(root)) expect(status.version).toBe(before.head)
    // What was written and is in no version must be there still, unless the upper stands on a version that has it.
    if (isAnew && victim === node && before.status.hasChanges) expect(content).toEqual(old.content)
    root.views.set(victim, {
      content,
      isMounted: status.isMounted,
      base: status.version,
      live: status.liveVersion,
    })
  }
}

const anyIndex = fc.nat(1)
/** One or two roots, of layers of either form. */
const anyForms = fc.array(fc.constantFrom<LayerStorage>('tree', 'tree', 'sealed'), { minLength: 1, maxLength: 2 })
const anyNode = fc.constantFrom(...NODES)
const anyVerb = fc.constantFrom<Verb>(
  'mount',
  'unmount',
  'solidify',
  'solidify live',
  'compact',
  'gc',
  'rollback',
  'switch',
)
const anyText = fc.option(fc.string({ maxLength: 5 }), { nil: undefined, freq: 4 })
const rarely = fc.nat(3).map((number) => number === 0)
// Nearly always without; whoever takes over waits for the holder's silence or does not.
const anyTakeover = fc.nat(9).map((number): Takeover => (number < 2 ? 'force' : number < 4 ? 'expired' : undefined))
const anyPoint = fc.oneof(
  fc.record({ call: fc.constant('renameat'), nth: fc.integer({ min: 1, max: 14 }) }),
  fc.record({ call: fc.constantFrom('linkat', 'umount2', 'move_mount'), nth: fc.integer({ min: 1, max: 3 }) }),
)
const mounts = fc.tuple(anyIndex, anyNode, anyTakeover, rarely).map((args) => mount(...args))
const writes = fc.tuple(anyIndex, anyNode, fc.constantFrom(...FILES), anyText).map((args) => write(...args))
const solidifies = fc.tuple(anyIndex, anyNode, fc.boolean()).map((args) => solidify(...args))
const commands = fc.commands(
  [
    // Twice what makes the others worth while.
    ...[mounts, mounts, writes, writes, writes, solidifies, solidifies],
    fc.tuple(anyIndex, anyNode).map((args) => barrier(...args)),
    fc.tuple(anyIndex, anyNode).map((args) => unmountCommand(...args)),
    fc.tuple(anyIndex, anyNode, fc.boolean()).map((args) => compact(...args)),
    fc.tuple(anyIndex, anyNode, fc.constantFrom<LayerStorage>('tree', 'sealed')).map((args) => convert(...args)),
    fc.tuple(anyIndex, anyNode, fc.nat(5)).map((args) => fork(...args)),
    fc.tuple(anyIndex, anyNode, fc.integer({ min: 1, max: 3 })).map((args) => gc(...args)),
    fc.tuple(anyIndex, anyNode, fc.nat(5), fc.boolean()).map((args) => rollback(...args)),
    fc.tuple(anyIndex, anyNode, anyNode).map((args) => change(...args)),
    fc.tuple(anyIndex, anyNode, fc.boolean()).map((args) => crash(...args)),
    fc
      .tuple(anyIndex, anyNode, anyVerb, anyPoint)
      .map(([index, node, verb, at]) => strike(index, node, verb === 'switch' ? 'solidify' : verb, at)),
    ...Array.from({ length: 3 }, () =>
      fc.tuple(anyIndex, anyNode, anyVerb, fc.nat(45), fc.boolean(), anyNode).map((args) => cut(...args)),
    ),
  ],
  { size: 'max', maxCommands: 25 },
)

test.skipIf(!canRun)(
  'whatever nodes do and suffer, nothing is lost and one may write at most',
  async () => {
    let running: Promise<void> = Promise.resolve()
    const property = fc.asyncProperty(commands, anyForms, (list, forms) => {
      running = runOnce(list, forms)
      return running
    })
    try {
      await fc.assert(property, { ...runs(RUNS), verbose: 1 })
    } finally {
      // When its time is over the last run is still under way, and has mounts.
      await running.catch(() => undefined)
    }
  },
  timeLimit(),
)

async function runOnce(list: Iterable<Command>, layerForms: readonly LayerStorage[]): Promise<void> {
  const at = disk.current.fresh()
  const sites: Site[] = []
  for (const index of layerForms.keys()) {
    const local = `${at}/${index}`
    mkdirSync(local)
    sites.push(
      await makeSite(local, local, dir({ a: file('base'), d: dir({ e: file('base') }) }), layerForms[index], LEASE_MS),
    )
  }
  const world = new World(sites)
  const roots = sites.map(
    (): RootModel => ({
      versions: new Map([[1, BASE]]),
      views: new Map(NODES.map((node) => [node, { content: BASE, isMounted: false, base: 1, live: undefined }])),
    }),
  )
  try {
    // A node begins with the version that is the newest when it first hears of the root.
    for (const index of sites.keys()) for (const node of NODES) await world.root(index, node)
    await fc.asyncModelRun(() => ({ model: { roots }, real: { world } }), list)
    await assertRecoverable(roots, world)
  } finally {
    await world.close()
  }
}

/** In the end a node that takes over has all of the newest version, and may write. */
async function assertRecoverable(roots: readonly RootModel[], world: World): Promise<void> {
  for (const [index, root] of roots.entries()) {
    const last = await world.root(index, 'three')
    await last.mount({ takeover: 'force', discard: true })
    const before = viewOf(root, 'three')
    mounted(root, 'three', true)
    const expected = before.isMounted ? viewOf(root, 'three').content : contentOf(root, headOf(root))
    expect(read(world.merged(index, 'three'))).toEqual(expected)
    writeFileSync(`${world.merged(index, 'three')}/last`, 'last')
    expect((await last.solidify()).version.number).toBeGreaterThan(headOf(root))
  }
}
