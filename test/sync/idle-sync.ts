import { hostPath } from '../../packages/posix/src/index.ts'
import { openSync } from '../../packages/sync/src/index.ts'

// Follows an upper without a sweep, and answers each line of input, once all is durable, with what it holds in memory.
const [source = '', target = '', stateDir = ''] = process.argv.slice(2)
const sync = await openSync({ source: hostPath(source), targets: [hostPath(target)], stateDir, sweepMs: 0 })
await sync.flush()
const say = (line: object) => console.log(JSON.stringify(line))
say({ ready: sync.status.watch })
process.stdin.on('data', async () => {
  const { failures } = await sync.flush()
  say({ failures: failures.length, residentBytes: process.memoryUsage.rss() })
})
process.stdin.on('end', () => process.exit())
