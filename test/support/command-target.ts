import { writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { parseTarget, remoteTarget, SshConnections, type Target } from '@lsync/sync'

const lsync = fileURLToPath(new URL('../../packages/cli/bin/lsync', import.meta.url))

/** A program that is called as ssh is, and runs the command on this machine. Its path. */
export function writeRsh(directory: string): string {
  const path = `${directory}/rsh`
  writeFileSync(path, '#!/bin/sh\nexec sh -c "$2"\n', { mode: 0o755 })
  return path
}

/** A target that `lsync serve` holds in a process of its own, reached through such a program. */
export function commandTarget(rsh: string, path: string): Target {
  const address = parseTarget(`ssh://here${path}`)
  if (address.scheme === 'local') throw new Error('not remote')
  return remoteTarget(address, { connections: new SshConnections(), rsh, remoteLsync: lsync, timeoutMs: 60_000 })
}
