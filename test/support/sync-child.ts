// A sync in a process of its own, that a test may kill. Says what it has made durable.
import type { HostPath } from '@lsync/posix'
import { openSync } from '@lsync/sync'
import { commandTarget } from './command-target.ts'

// `rsh`: the target is served by another process, which that program starts.
const [source = '', target = '', stateDir = '', checkpointMs = '5000', rsh] = process.argv.slice(2)
const say = (line: object) => process.stdout.write(`${JSON.stringify(line)}\n`)
const sync = await openSync({
  source: source as HostPath,
  targets: [rsh === undefined ? (target as HostPath) : commandTarget(rsh, target)],
  stateDir,
  once: true,
  heedsPressure: false,
  checkpointMs: Number(checkpointMs),
})
sync.events.on('durable', ({ bytes, files }) => say({ durable: { bytes, files } }))
await sync.flush()
await sync.stop()
