import { spawnSync } from 'node:child_process'
import { fileURLToPath } from 'node:url'

/** Bundles the command into packages/cli/dist, which packages/cli/bin/lsync prefers as long as no source is newer. */
export function buildCli(): void {
  const cli = fileURLToPath(new URL('../packages/cli', import.meta.url))
  const rolldown = `${cli}/node_modules/rolldown/bin/cli.mjs`
  const { status } = spawnSync(process.execPath, [rolldown, '-c', 'rolldown.config.ts', '--log-level', 'warn'], {
    cwd: cli,
    stdio: ['ignore', 'ignore', 'inherit'],
  })
  if (status !== 0) throw new Error(`rolldown ended with ${status}`)
}

if (import.meta.main) buildCli()
