import { readdirSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { hostPath } from '@lsync/posix'
import { openSync, type SyncRequest } from '@lsync/sync'

// A sync that goes on until its input ends, for the rows that need one. Arguments: a JSON object. Each line of input is
// answered by one line of output: `flush` with what it took, `latencies` with those since the last time.
const { source, target, stateDir, sourceChoice, arrivals } = JSON.parse(process.argv[2] ?? '{}') as {
  source: string
  target: string
  stateDir: string
  sourceChoice?: Exclude<SyncRequest['sourceChoice'], undefined>
  /** A directory of the target in which files arrive that are named after the microsecond in which they were made. */
  arrivals?: string
}

const say = (line: object): void => void process.stdout.write(`${JSON.stringify(line)}\n`)
const now = (): number => performance.timeOrigin + performance.now()

const sync = await openSync({
  source: hostPath(source),
  targets: [hostPath(target)],
  stateDir,
  sweepMs: 0,
  heedsPressure: false,
  ...(sourceChoice === undefined ? {} : { sourceChoice }),
})
say({ ready: sync.status.watch })

const known = new Set<string>()
let latenciesMs: number[] = []
if (arrivals !== undefined) {
  sync.events.on('checkpoint', () => {
    // What is there now was carried over by the round that has just become durable.
    for (const name of readdirSync(arrivals)) {
      if (known.has(name)) continue
      known.add(name)
      latenciesMs.push(now() - Number(name) / 1000)
    }
  })
}

createInterface({ input: process.stdin })
  .on('line', async (line) => {
    if (line === 'flush') {
      const from = performance.now()
      const { isSettled, failures } = await sync.flush()
      say({ tookMs: performance.now() - from, isSettled, failures: failures.length })
    } else if (line === 'latencies') {
      say({ latenciesMs })
      latenciesMs = []
    }
  })
  .on('close', () => process.exit())
