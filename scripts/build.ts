import { spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
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
  fillCache(cli)
}

/**
 * A merge leaves the code that it compiled in dist/cache, where the next one finds it; so does a diff for the commands that
 * bin/lsync starts with other options, which V8 keeps apart.
 */
function fillCache(cli: string): void {
  mkdirSync(`${cli}/dist/cache`, { mode: 0o755 })
  const layers = mkdtempSync(join(tmpdir(), 'lsync-build-'))
  try {
    const [upper, lower] = ['upper', 'lower'].map((name) => join(layers, name)) as [string, string]
    for (const path of [upper, lower, join(upper, 'new'), join(upper, 'both'), join(lower, 'both')]) mkdirSync(path)
    for (const path of [upper, lower, join(upper, 'new'), join(upper, 'both')]) writeFileSync(join(path, 'file'), path)
    const layerOptions = ['--upper', upper, '--lower', lower, '--namespace', 'user']
    for (const command of [
      ['diff', ...layerOptions],
      ['merge', ...layerOptions, '--in-place', '--yes'],
    ]) {
      // Without a cache everything works, only later.
      spawnSync(`${cli}/bin/lsync`, command, { stdio: 'ignore' })
    }
  } finally {
    rmSync(layers, { recursive: true })
  }
}

if (import.meta.main) buildCli()
