import { spawn } from 'node:child_process'

/** What the private namespaces of a run allow. */
export type Isolation = { privileged: boolean }

const marker = 'LSYNC_BENCH_ISOLATED'

/** Whether this process already runs in namespaces of its own, and what it may do there; `undefined` when not. */
export function isolation(): Isolation | undefined {
  const value = process.env[marker]
  return value === undefined ? undefined : { privileged: value === 'root' }
}

/**
 * Runs the same command line again in a mount namespace of its own, and a network namespace where asked, so that no
 * mount of a run outlives it even if it is killed. Without root, a user namespace gives the right to mount overlays
 * (with `userxattr`), but no file-system images.
 *
 * @returns the exit code of the inner run
 */
export function runIsolated(options: { network: boolean }): Promise<number> {
  const privileged = process.getuid?.() === 0
  const namespaces = ['--mount', '--propagation', 'private']
  if (!privileged) namespaces.push('--user', '--map-root-user')
  if (options.network) namespaces.push('--net')
  // Without --fork, unshare becomes the inner run, so a signal passed to the child reaches it.
  const child = spawn(
    'unshare',
    [...namespaces, '--', process.execPath, ...process.execArgv, ...process.argv.slice(1)],
    {
      stdio: 'inherit',
      env: { ...process.env, [marker]: privileged ? 'root' : 'user' },
    },
  )
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, () => child.kill(signal))
  return new Promise((resolve, reject) => {
    child.on('error', reject)
    child.on('close', (code, signal) => resolve(code ?? (signal === 'SIGINT' ? 130 : 1)))
  })
}
