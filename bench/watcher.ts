import { hostPath, openRoot } from '@lsync/posix'
import { openSource, type SourceRequest } from '@lsync/sync'

// Watches a directory and does nothing else, for the row `rest`: prints `ready KIND`, and ends with its input.
const [root = '', choice = 'auto'] = process.argv.slice(2)
const source = openSource({
  root: hostPath(root),
  rootFd: openRoot(hostPath(root)),
  choice: choice as SourceRequest['choice'],
  pollIntervalMs: 30_000,
})
await source.start(() => undefined)
process.stdout.write(`ready ${source.kind}\n`)
process.stdin.on('end', () => process.exit()).resume()
