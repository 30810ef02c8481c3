import manifest from '../package.json' with { type: 'json' }
import { useCodeCache } from './code-cache.ts'

const [first, ...others] = process.argv.slice(2)
if (others.length === 0 && (first === '--version' || first === '-V')) {
  // Before anything else is loaded: scripts ask this often.
  process.stdout.write(`lsync ${manifest.version}\n`)
} else {
  useCodeCache()
  const { runCli } = await import('./run.ts')
  process.exitCode = await runCli()
}
