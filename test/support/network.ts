import { appendFileSync } from 'node:fs'
import { afterAll, beforeAll } from 'vitest'
import { holdTestDirectory, testDirectory } from './image.ts'
import { enterNetworkNamespace, isPresent, run } from './system.ts'

/** A network namespace of the test's own. */
export interface Namespace {
  readonly name: string
  /** For `enterNetworkNamespace`. */
  readonly path: string
  /** Its address on the line to the other. */
  readonly address: string
  /** What a command is put behind to run inside, under the same process id. */
  readonly enter: readonly [string, ...string[]]
}

/** What a line does to the packets of both directions. Without a field that is perfect. */
export interface Disturbance {
  /** One way; needs netem in the kernel (`hasNetem`). */
  readonly delayMs?: number
  /** Of a hundred packets. By netem, or by a random drop of iptables where the kernel lacks it. */
  readonly lossPercent?: number
  readonly bitsPerSecond?: number
}

/** Two nodes joined by one line. */
export interface Network {
  readonly left: Namespace
  readonly right: Namespace
  disturb(how: Disturbance): void
  /** Pulls the plug: packets of both directions vanish, no connection is told. */
  cut(): void
  mend(): void
  stop(): void
}

let networks = 0

/** Whether network namespaces can be made and joined here. */
export const hasNetwork = ['ip', 'tc', 'iptables'].every(isPresent) && tries(() => {})

/** Whether the kernel has netem, which alone can delay packets. */
export const hasNetem =
  hasNetwork && tries((name) => run('ip', 'netns', 'exec', name, 'tc', 'qdisc', 'add', 'dev', 'lo', 'root', 'netem'))

function tries(use: (name: string) => void): boolean {
  const name = `lsync-try-${process.pid}`
  try {
    run('ip', 'netns', 'add', name)
  } catch {
    return false
  }
  try {
    use(name)
    return true
  } catch {
    return false
  } finally {
    run('ip', 'netns', 'delete', name)
  }
}

/** Makes two namespaces with a veth pair between them. What listens in them is the caller's to stop, before `stop`. */
export function startNetwork(): Network {
  const release = holdTestDirectory()
  const id = `${process.pid}-${++networks}`
  const [left, right] = (['left', 'right'] as const).map((side, index): Namespace => {
    const name = `lsync-${side}-${id}`
    appendFileSync(`${testDirectory()}/stop.sh`, `ip netns delete ${name} 2>/dev/null\n`)
    run('ip', 'netns', 'add', name)
    const address = `10.98.0.${index + 1}`
    return { name, path: `/var/run/netns/${name}`, address, enter: ['ip', 'netns', 'exec', name] }
  }) as [Namespace, Namespace]
  const ends = [left, right]
  const inside = ({ enter }: Namespace, ...command: string[]) => run(...enter, ...command)
  run('ip', 'link', 'add', 'line', 'netns', left.name, 'type', 'veth', 'peer', 'name', 'line', 'netns', right.name)
  for (const end of ends) {
    inside(end, 'ip', 'address', 'add', `${end.address}/24`, 'dev', 'line')
    for (const link of ['lo', 'line']) inside(end, 'ip', 'link', 'set', link, 'up')
  }
  return {
    left,
    right,
    disturb(how) {
      for (const end of ends) disturb((...command) => inside(end, ...command), how)
    },
    cut: () => void inside(left, 'ip', 'link', 'set', 'line', 'down'),
    mend: () => void inside(left, 'ip', 'link', 'set', 'line', 'up'),
    stop() {
      for (const { name } of ends) run('ip', 'netns', 'delete', name)
      release()
    },
  }
}

function disturb(inside: (...command: string[]) => string, how: Disturbance): void {
  const { delayMs = 0, lossPercent = 0, bitsPerSecond } = how
  inside('iptables', '-F', 'INPUT')
  try {
    inside('tc', 'qdisc', 'delete', 'dev', 'line', 'root')
  } catch {
    // There was none.
  }
  if (hasNetem && (delayMs > 0 || lossPercent > 0)) {
    const rate = bitsPerSecond === undefined ? [] : ['rate', `${bitsPerSecond}bit`]
    const netem = ['netem', 'delay', `${delayMs}ms`, 'loss', `${lossPercent}%`, ...rate]
    inside('tc', 'qdisc', 'add', 'dev', 'line', 'root', ...netem)
    return
  }
  if (delayMs > 0) throw new Error('this kernel has no netem, so nothing here can delay packets')
  if (lossPercent > 0) {
    const random = ['-m', 'statistic', '--mode', 'random', '--probability', String(lossPercent / 100)]
    inside('iptables', '-A', 'INPUT', '-i', 'line', ...random, '-j', 'DROP')
  }
  if (bitsPerSecond !== undefined) {
    const bucket = ['tbf', 'rate', `${bitsPerSecond}bit`, 'burst', '64kbit', 'latency', '400ms']
    inside('tc', 'qdisc', 'add', 'dev', 'line', 'root', ...bucket)
  }
}

/** One network for all tests of the surrounding `describe`. With `inside`, this thread is in its left node meanwhile. */
export function useNetwork({ inside = false } = {}): { readonly current: Network } {
  let network: Network | undefined
  let leave: (() => void) | undefined
  beforeAll(() => {
    network = startNetwork()
    if (inside) leave = enterNetworkNamespace(network.left.path)
  })
  afterAll(() => {
    leave?.()
    network?.stop()
  })
  return {
    get current() {
      if (network === undefined) throw new Error('the network exists only while tests run')
      return network
    },
  }
}
