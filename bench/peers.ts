import { existsSync, statSync } from 'node:fs'
import { basename, join } from 'node:path'
import { findProgram, versionOf } from './command.ts'
import type { Programs } from './program.ts'
import type { Fs, State } from './state.ts'

/** How one program does the job that a row measures. */
export type Peer = {
  name: string
  /** What the result is and where: for the check against the kernel's view. */
  result: (state: State) => string
  command: (state: State) => readonly string[]
  /** Reads the mounted view, which is mounted before the clock starts. */
  readsView: boolean
}

/** A peer that cannot run here, and why. */
export type MissingPeer = { name: string; reason: string }

/** What the peers of a row are chosen by. */
export type PeerRequest = {
  lsync: string
  /** From `--peer NAME=PATH`. */
  given: readonly { name: string; path: string }[]
  programs: Programs
  fs: Fs
  overlayOptions: readonly string[]
}

const namespaceOf = (overlayOptions: readonly string[]): 'trusted' | 'user' =>
  overlayOptions.includes('userxattr') ? 'user' : 'trusted'

/** Arguments of lsync that say how the upper was mounted. */
function mountArguments(request: PeerRequest, state: State): string[] {
  const args = ['--upper', state.upper, '--lower', state.lower]
  if (namespaceOf(request.overlayOptions) === 'user') args.push('--namespace', 'user')
  if (request.overlayOptions.includes('index=on')) args.push('--workdir', state.work)
  return args
}

/** Quotes for /bin/sh. */
const quote = (word: string): string => `'${word.replaceAll("'", `'\\''`)}'`

const script = (...lines: string[]): string[] => ['/bin/sh', '-c', lines.join(' && ')]

const words = (...list: string[]): string => list.map(quote).join(' ')

const inPlace = (name: string, command: Peer['command']): Peer => ({
  name,
  command,
  result: (state) => state.lower,
  readsView: false,
})

/** Programs that bring the view into a new tree of its own: the way without a merge. */
function copiesOfView(): { peers: Peer[]; missing: MissingPeer[] } {
  const commands: Record<string, (state: State) => string[]> = {
    rsync: (state) => ['rsync', '-aHAX', `${state.view}/`, `${state.output}/`],
    cp: (state) => ['cp', '-a', state.view, state.output],
  }
  const titles: Record<string, string> = { rsync: 'mount + rsync -aHAX', cp: 'mount + cp -a' }
  const peers: Peer[] = []
  const missing: MissingPeer[] = []
  for (const [program, command] of Object.entries(commands)) {
    const name = titles[program] ?? program
    if (findProgram(program) === undefined) missing.push({ name, reason: `${program} is not installed` })
    else peers.push({ name, command, result: (state) => state.output, readsView: true })
  }
  return { peers, missing }
}

function lsyncPeer(request: PeerRequest, peer: Peer): { peers: Peer[]; missing: MissingPeer[] } {
  if (existsSync(request.lsync)) return { peers: [peer], missing: [] }
  return { peers: [], missing: [{ name: 'lsync', reason: `${request.lsync} does not exist` }] }
}

/** The floor's command line on a state. */
function floorCommand(request: PeerRequest, upper: string, lower: string, ...options: string[]): string[] {
  return [request.programs.floor, '-n', namespaceOf(request.overlayOptions), ...options, upper, lower]
}

/** Peers that merge the upper into the lower itself, then those that copy the view. */
export function inPlacePeers(request: PeerRequest): { peers: Peer[]; missing: MissingPeer[] } {
  const lsync = lsyncPeer(
    request,
    inPlace('lsync', (state) => [request.lsync, 'merge', ...mountArguments(request, state), '--in-place', '--yes']),
  )
  const floor = inPlace('floor', (state) => floorCommand(request, state.upper, state.lower))
  const given = request.given.map(({ name, path }) =>
    inPlace(name, (state) => {
      if (name !== 'overlayfs-tools') return [path, state.upper, state.lower]
      // It writes a shell script into the current directory, and -f runs and removes that. A version
      // that only writes it gets it run here, for the script is the merge.
      const run = 'for merge in overlay-tools-*.sh; do if [ -e "$merge" ]; then sh "$merge" && rm "$merge"; fi; done'
      return script(words(path, 'merge', '-f', '-l', state.lower, '-u', state.upper), run)
    }),
  )
  const missing = [...lsync.missing]
  if (!request.given.some(({ name }) => name === 'overlayfs-tools'))
    missing.push({ name: 'overlayfs-tools', reason: 'not given: --peer overlayfs-tools=PATH' })
  for (const { name, path } of request.given)
    if (!existsSync(path)) missing.push({ name, reason: `${path} does not exist` })
  const copies = copiesOfView()
  return {
    peers: [
      ...lsync.peers,
      floor,
      ...given.filter((_, index) => existsSync(request.given[index]?.path ?? '')),
      ...copies.peers,
    ],
    missing: [...missing, ...copies.missing],
  }
}

/** The cheapest clone of a whole tree that a file system's own tools make, and its name. */
export function cloneCommand(fs: Fs): { name: string; command: (from: string, to: string) => string[] } {
  if (fs === 'btrfs')
    return { name: 'btrfs snapshot', command: (from, to) => ['btrfs', 'subvolume', 'snapshot', from, to] }
  if (fs === 'moosefs') return { name: 'mfsmakesnapshot', command: (from, to) => ['mfsmakesnapshot', from, to] }
  if (fs === 'xfs')
    return { name: 'cp -a --reflink', command: (from, to) => ['cp', '-a', '--reflink=always', from, to] }
  return { name: 'cp -al', command: (from, to) => ['cp', '-al', from, to] }
}

/**
 * Peers that make a new tree and leave the lower alone. The first rival is the file system's own clone of the lower with
 * the floor upon it; where renames cannot cross over (btrfs subvolumes, MooseFS) it copies the upper there first. With
 * `copiesUpper` there is one that always does, and so leaves the upper as it is, too.
 */
export function outputPeers(
  request: PeerRequest,
  options: { clone: ReturnType<typeof cloneCommand>; copiesView: boolean; copiesUpper: boolean },
): { peers: Peer[]; missing: MissingPeer[] } {
  const { clone } = options
  const result = (state: State): string => state.output
  const lsync = lsyncPeer(request, {
    name: 'lsync',
    command: (state) => [request.lsync, 'merge', ...mountArguments(request, state), '--output', state.output],
    result,
    readsView: false,
  })
  const cloned: Peer = {
    name: `${clone.name} + floor`,
    command: (state) => {
      // Subvolumes of one btrfs count as devices of their own here, and refuse renames between them just so.
      const crosses = statSync(state.upper).dev !== statSync(state.lower).dev
      const copied = join(state.output, `.${basename(state.upper)}`)
      const steps = [words(...clone.command(state.lower, state.output))]
      if (crosses) steps.push(words('cp', '-a', state.upper, copied))
      steps.push(
        words(...floorCommand(request, crosses ? copied : state.upper, state.output, ...(crosses ? ['-r'] : []))),
      )
      return script(...steps)
    },
    result,
    readsView: false,
  }
  const copied: Peer = {
    name: `${clone.name} + cp -a of the upper + floor`,
    command: (state) => {
      const upper = join(state.output, `.${basename(state.upper)}`)
      return script(
        words(...clone.command(state.lower, state.output)),
        words('cp', '-a', state.upper, upper),
        words(...floorCommand(request, upper, state.output, '-r')),
      )
    },
    result,
    readsView: false,
  }
  const copies = options.copiesView ? copiesOfView() : { peers: [], missing: [] }
  return {
    peers: [...lsync.peers, cloned, ...(options.copiesUpper ? [copied] : []), ...copies.peers],
    missing: [...lsync.missing, ...copies.missing],
  }
}

/** Versions of the programs that run here, for the record. */
export function peerVersions(request: Pick<PeerRequest, 'lsync' | 'given'>): Record<string, string> {
  const versions: Record<string, string> = {}
  const add = (name: string, version: string | undefined): void => {
    if (version !== undefined) versions[name] = version
  }
  if (existsSync(request.lsync)) add('lsync', versionOf(request.lsync))
  for (const program of ['rsync', 'cp', 'cc']) if (findProgram(program) !== undefined) add(program, versionOf(program))
  for (const { name, path } of request.given) if (existsSync(path)) add(name, versionOf(path))
  return versions
}
