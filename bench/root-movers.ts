import { existsSync, mkdirSync, readFileSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { runCommand, startCommand } from './command.ts'
import type { Programs } from './program.ts'
import type { Scratch } from './scratch.ts'
import type { Sshd } from './sshd.ts'

/** One way to bring a container's root from one of two nodes to the other, and back the next time. */
export type Mover = {
  name: string
  /** Where the container has its root now. */
  view: () => string
  /** Where the files go that are written at the last moment: most ways leave that to whoever stops the container. */
  changesAt: () => string
  /** Puts what the container needs in place again, not measured. */
  prepare: () => Promise<void>
  /** The move. It writes the time into `stopped` once the container is stopped, and into `started` when it starts again. */
  command: () => readonly string[]
  /** It ended well: the root is on the other node. */
  moved: () => void
  /** Ends what it has mounted. */
  close: () => void
}

/** The time files of a move. */
export type Stamps = { stopped: string; started: string }

/** A node: a disk of its own for what it writes, and its own mount of the store. */
export type Node = { disk: string; store: string }

export type MoverRequest = {
  scratch: Scratch
  programs: Programs
  lsync: string
  sshd: Sshd
  nodes: readonly [Node, Node]
  /** What the root begins as: a tree on the store, by its path beneath it. */
  base: string
  /** How the store clones a tree. */
  clone: (from: string, to: string) => readonly string[]
  stamps: Stamps
}

/** The two ways of lsync move one and the same root, which the first of them unmounts. */
const FIRST = 'lsync switch'

/** Quotes for /bin/sh. */
const quote = (word: string): string => `'${word.replaceAll("'", `'\\''`)}'`
const words = (...list: string[]): string => list.map(quote).join(' ')
const stamp = (path: string): string => `date +%s%N >${quote(path)}`

/** Milliseconds between the two stamps of a move; `undefined` where one is missing. */
export function standstillMs({ stopped, started }: Stamps): number | undefined {
  if (!existsSync(stopped) || !existsSync(started)) return undefined
  const [from, to] = [stopped, started].map((path) => BigInt(readFileSync(path, 'utf8').trim())) as [bigint, bigint]
  return Number(to - from) / 1e6
}

/**
 * `lsync switch` over ssh, twice with one root: the container has been idle since its last change when it is stopped, or it
 * writes all of its changes while it is being stopped, so that none of them can travel before.
 */
export async function lsyncMovers(request: MoverRequest): Promise<Mover[]> {
  const { lsync, nodes, sshd, stamps, scratch } = request
  const states = nodes.map(({ disk }) => join(disk, 'state')) as [string, string]
  const homes = nodes.map(({ store }) => join(store, 'home')) as [string, string]
  const late = scratch.folder('late')
  const stop = `[ ! -e ${quote(join(late, 'files'))} ] || cp -r ${quote(`${join(late, 'files')}/.`)} "$LSYNC_MERGED/"; ${stamp(stamps.stopped)}`
  const [first, second] = states
  runCommand([
    ...[lsync, 'root', 'init', 'lab', '--home', homes[0], '--base', join(nodes[0].store, request.base)],
    ...['--state', first],
  ])
  for (const [index, state] of [first, second].entries())
    runCommand([
      ...[lsync, 'hooks', 'lab', '--home', homes[index] ?? '', '--state', state],
      ...['--stop', stop, '--start', stamp(stamps.started)],
    ])
  runCommand([lsync, 'root', 'mount', 'lab', '--state', first])
  let at: 0 | 1 = 0
  const other = (): 0 | 1 => (at === 0 ? 1 : 0)
  const view = (): string => join(states[at], 'roots/lab/merged')
  const mover = (name: string, changesAt: () => string): Mover => ({
    name,
    view,
    changesAt,
    async prepare() {
      rmSync(join(late, 'files'), { recursive: true, force: true })
    },
    command: () => [
      ...['env', `HOME=${sshd.home}`, lsync, 'switch', 'lab', '--state', states[at]],
      ...['--to', `ssh://${sshd.user}@127.0.0.1:${sshd.port}${homes[other()]}`],
      // The goal is looked at afterwards: here nothing is refused.
      ...['--remote-state', states[other()], '--remote-lsync', lsync, '--max-downtime', '10m'],
    ],
    moved() {
      at = other()
    },
    close() {
      if (name === FIRST) runCommand(['umount', view()])
    },
  })
  return [mover(FIRST, view), mover('lsync switch, all written at the stop', () => join(late, 'files'))]
}

/**
 * labVm2's procedure: stop the container, rsync its upper to the store, make the next version there by hard links and fold
 * the upper into it, mount that on the other node. Nothing of it is told to another machine here, which costs it nothing.
 */
export async function handMover(request: MoverRequest): Promise<Mover> {
  const { nodes, stamps, programs, clone, base } = request
  const at = (node: Node, name: string): string => join(node.disk, 'hand', name)
  for (const node of nodes)
    for (const name of ['upper', 'work', 'merged']) mkdirSync(at(node, name), { recursive: true })
  mkdirSync(join(nodes[0].store, 'hand'))
  runCommand(clone(join(nodes[0].store, base), join(nodes[0].store, 'hand/0')))
  let version = 0
  let [here, there] = nodes
  const mountOn = (node: Node, number: number): string =>
    words(
      ...['mount', '-t', 'overlay', 'overlay', '-o'],
      `lowerdir=${join(node.store, 'hand', String(number))},upperdir=${at(node, 'upper')},workdir=${at(node, 'work')}`,
      at(node, 'merged'),
    )
  runCommand(['/bin/sh', '-c', mountOn(here, 0)])
  return {
    name: 'stop, rsync the upper, hard-link merge, remount',
    view: () => at(here, 'merged'),
    changesAt: () => at(here, 'merged'),
    async prepare() {
      for (const name of ['upper', 'work']) {
        await startCommand(['rm', '-rf', at(there, name)])
        mkdirSync(at(there, name))
      }
    },
    command() {
      const [from, to] = [version, version + 1].map((number) => join(here.store, 'hand', String(number))) as [
        string,
        string,
      ]
      const synced = join(here.store, 'hand', 'upper')
      const steps = [
        stamp(stamps.stopped),
        words('umount', at(here, 'merged')),
        words('rsync', '-aHAX', '--delete', `${at(here, 'upper')}/`, `${synced}/`),
        words('cp', '-al', from, to),
        words(programs.floor, '-n', 'trusted', '-r', synced, to),
        mountOn(there, version + 1),
        stamp(stamps.started),
      ]
      return ['/bin/sh', '-ec', steps.join('\n')]
    },
    moved() {
      version++
      const before = here
      here = there
      there = before
    },
    close: () => void runCommand(['umount', at(here, 'merged')]),
  }
}

/** What is done without a store and without layers: stop the container, and carry its whole root to the other node's empty disk. */
export async function wholeMover(request: MoverRequest): Promise<Mover> {
  const { nodes, stamps, sshd, base } = request
  let [here, there] = nodes
  const root = (node: Node): string => join(node.disk, 'whole')
  runCommand(['cp', '-a', join(here.store, base), root(here)])
  return {
    name: 'stop, rsync -aHAX of the whole root over ssh',
    view: () => root(here),
    changesAt: () => root(here),
    async prepare() {
      await startCommand(['rm', '-rf', root(there)])
    },
    command() {
      const rsync = words(
        'rsync',
        '-aHAX',
        '-e',
        words(...sshd.client),
        `${root(here)}/`,
        `${sshd.host}:${root(there)}/`,
      )
      return ['/bin/sh', '-ec', [stamp(stamps.stopped), rsync, stamp(stamps.started)].join('\n')]
    },
    moved() {
      const before = here
      here = there
      there = before
    },
    close: () => undefined,
  }
}
