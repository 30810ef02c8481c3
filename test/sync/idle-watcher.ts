import { hostPath, openRoot } from '../../packages/posix/src/index.ts'
import { openSource } from '../../packages/sync/src/source/choose.ts'
import type { Source } from '../../packages/sync/src/source/source.ts'

// Watches a root and says as JSON lines when it is ready and how many hints came, until its input ends.
const [root = '', choice = 'auto'] = process.argv.slice(2)
const startedAt = performance.now()
const source = openSource({
  root: hostPath(root),
  rootFd: openRoot(hostPath(root)),
  choice: choice as Source['kind'] | 'auto',
  pollIntervalMs: 3_600_000,
})
let hints = 0
await source.start(() => {
  hints += 1
})
const say = (line: object) => console.log(JSON.stringify(line))
say({ ready: source.kind, tookMs: performance.now() - startedAt })
process.stdin.on('data', async () => {
  await source.drain()
  say({ hints, residentBytes: process.memoryUsage.rss() })
})
process.stdin.on('end', () => process.exit())
