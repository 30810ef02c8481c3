import { spawn } from 'node:child_process'
import { chmodSync, closeSync, existsSync, mkdirSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { userInfo } from 'node:os'
import { join } from 'node:path'
import { findProgram, runCommand } from './command.ts'
import type { Scratch } from './scratch.ts'

/** Where sshd is: it insists on being started by its full path. */
const program = '/usr/sbin/sshd'

/** An sshd of the harness's own on loopback, and how to reach it without any file of the user's. */
export type Sshd = {
  user: string
  port: number
  /** A home directory whose .ssh has the client's key and a known_hosts with the server's. */
  home: string
  /** OpenSSH's client with all of its options, up to the host. */
  client: readonly string[]
  host: string
  stop: () => void
}

/** Why there can be no sshd here; `undefined` when there can. */
export function whyNoSshd(): string | undefined {
  if (!existsSync(program)) return 'openssh-server is not installed'
  return findProgram('ssh') === undefined ? 'openssh-client is not installed' : undefined
}

/** Starts an sshd with keys of its own on a free port; it stops with the run. */
export async function startSshd(scratch: Scratch): Promise<Sshd> {
  // In a network namespace of the run's own, loopback is down at first.
  if (process.getuid?.() === 0) runCommand(['ip', 'link', 'set', 'lo', 'up'])
  const folder = scratch.folder('sshd')
  chmodSync(folder, 0o700)
  const removeFolder = scratch.onCleanup(() => rmSync(folder, { recursive: true, force: true }))
  const at = (name: string): string => join(folder, name)
  mkdirSync(at('home/.ssh'), { recursive: true, mode: 0o700 })
  const [clientKey, knownHosts] = [at('home/.ssh/id_ed25519'), at('home/.ssh/known_hosts')]
  for (const key of [clientKey, at('host_key')])
    runCommand(['ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', 'bench', '-f', key])
  writeFileSync(at('authorized_keys'), readFileSync(`${clientKey}.pub`))
  const port = await freePort()
  const lines = [
    `ListenAddress 127.0.0.1:${port}`,
    `HostKey ${at('host_key')}`,
    `AuthorizedKeysFile ${at('authorized_keys')}`,
    'PidFile none',
    'UsePAM no',
    'PasswordAuthentication no',
    'KbdInteractiveAuthentication no',
    'PermitRootLogin prohibit-password',
    'StrictModes no',
    'Subsystem sftp internal-sftp',
  ]
  writeFileSync(at('sshd_config'), `${lines.join('\n')}\n`)
  if (process.getuid?.() === 0) mkdirSync('/run/sshd', { recursive: true, mode: 0o755 })
  const log = openSync(at('log'), 'a')
  const child = spawn(program, ['-D', '-e', '-f', at('sshd_config')], { stdio: ['ignore', log, log], detached: true })
  closeSync(log)
  const kill = scratch.onCleanup(() => void child.kill('SIGTERM'))
  const stop = (): void => {
    kill()
    removeFolder()
  }
  for (let attempt = 0; !readFileSync(at('log'), 'utf8').includes('Server listening'); attempt++) {
    await scratch.checkInterrupted()
    if (attempt > 200) throw new Error(`sshd does not start: ${readFileSync(at('log'), 'utf8')}`)
    await new Promise((resolve) => setTimeout(resolve, 50))
  }
  const hostKey = readFileSync(at('host_key.pub'), 'utf8').split(' ').slice(0, 2).join(' ')
  writeFileSync(knownHosts, `[127.0.0.1]:${port} ${hostKey}\n`)
  const { username } = userInfo()
  return {
    user: username,
    port,
    home: at('home'),
    client: [
      'ssh',
      ...['-F', 'none', '-p', String(port), '-i', clientKey, '-o', `UserKnownHostsFile=${knownHosts}`],
      ...['-o', 'GlobalKnownHostsFile=none', '-o', 'StrictHostKeyChecking=yes', '-o', 'BatchMode=yes'],
    ],
    host: `${username}@127.0.0.1`,
    stop,
  }
}

function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer()
    server.once('error', reject)
    server.listen(0, '127.0.0.1', () => {
      const address = server.address()
      server.close(() => resolve(typeof address === 'object' && address !== null ? address.port : 0))
    })
  })
}
