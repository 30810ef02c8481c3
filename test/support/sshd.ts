import { type ChildProcess, spawn } from 'node:child_process'
import { appendFileSync, closeSync, existsSync, mkdirSync, openSync, readFileSync, writeFileSync } from 'node:fs'
import { createServer } from 'node:net'
import { setTimeout as delay } from 'node:timers/promises'
import { holdTestDirectory, testDirectory } from './image.ts'
import type { Namespace } from './network.ts'
import { type Shared, useShared } from './shared.ts'
import { isPresent, run } from './system.ts'

/** Whether OpenSSH's server and client are installed. `sshd` insists on being started by its full path. */
export const hasSshd = existsSync('/usr/sbin/sshd') && ['ssh', 'ssh-keygen'].every(isPresent)

export interface SshServerOptions {
  /** Lines for sshd_config, before those that every server has (sshd takes the first it finds). */
  readonly config?: readonly string[]
  /** Options before the client's key in authorized_keys: `restrict,command="…"`. */
  readonly keyOptions?: string
  /** The network namespace that it listens in, on that one's address; loopback without one. */
  readonly namespace?: Namespace
}

/** An sshd of the test's own, which lets this process's user in with `clientKey` and nobody else. */
export interface SshServer {
  readonly address: string
  readonly port: number
  readonly user: string
  /** Path of the client's private key (ed25519, no passphrase). */
  readonly clientKey: string
  /** Path of a known_hosts file that holds this server's key alone. */
  readonly knownHosts: string
  /** The host's public key as known_hosts has it: `ssh-ed25519 AAAA…`. */
  readonly hostKey: string
  /** What runs OpenSSH's client without any file of the user's: `[...ssh, host, command]`; `host` is `user@address`. */
  readonly ssh: readonly [string, ...string[]]
  readonly host: string
  /** What the server has logged so far. */
  log(): string
  /** Changes the options before the client's key; counts from the next connection on. */
  allow(keyOptions: string): void
  /** Gives the server another host key, as if another machine had taken its address. `knownHosts` is left as it is. */
  changeHostKey(): Promise<void>
  /** Kills every session with all that runs in it, so that the clients see their connections cut. How many there were. */
  cutConnections(): number
  stop(): Promise<void>
}

let servers = 0

/** Starts an sshd on a free port. The caller stops it; a killed test run is cleared away by the next one. */
export async function startSshServer(options: SshServerOptions = {}): Promise<SshServer> {
  const release = holdTestDirectory()
  const base = `${testDirectory()}/sshd${++servers}`
  mkdirSync(base, { mode: 0o700 })
  const user = run('id', '-un').trim()
  const [config, clientKey, knownHosts] = [`${base}/sshd_config`, `${base}/client_key`, `${base}/known_hosts`]
  const makeKey = (path: string) => run('ssh-keygen', '-q', '-t', 'ed25519', '-N', '', '-C', 'test', '-f', path)
  makeKey(clientKey)
  makeKey(`${base}/host_key`)
  const allow = (keyOptions: string) =>
    writeFileSync(
      `${base}/authorized_keys`,
      `${keyOptions === '' ? '' : `${keyOptions} `}${readFileSync(`${clientKey}.pub`)}`,
    )
  allow(options.keyOptions ?? '')
  const address = options.namespace?.address ?? '127.0.0.1'
  // The one place that sshd insists on: an empty directory of root's.
  if (process.getuid?.() === 0) mkdirSync('/run/sshd', { recursive: true, mode: 0o755 })
  appendFileSync(
    `${testDirectory()}/stop.sh`,
    `for pid in $(cat ${base}/pids 2>/dev/null); do
  grep -qs ${config} /proc/$pid/cmdline && kill $pid
done
`,
  )

  let port = 0
  let child: ChildProcess
  const launch = async (): Promise<void> => {
    // Another process can take the port between its finding and sshd: then the next one.
    for (let attempt = 0; ; attempt++) {
      port = options.namespace === undefined ? await freePort() : 22
      writeFileSync(
        config,
        [
          ...(options.config ?? []),
          `ListenAddress ${address}:${port}`,
          `HostKey ${base}/host_key`,
          `AuthorizedKeysFile ${base}/authorized_keys`,
          'PidFile none',
          'UsePAM no',
          // bash reads the user's start-up files for a command of sshd, unless it is not the first shell. What they do must
          // not be cut in the middle, and is not what is tested.
          'SetEnv SHLVL=1',
          'PasswordAuthentication no',
          'KbdInteractiveAuthentication no',
          'PermitRootLogin prohibit-password',
          'StrictModes no',
          'LogLevel VERBOSE',
          'UseDNS no',
          'MaxStartups 100',
          'Subsystem sftp internal-sftp',
          '',
        ].join('\n'),
      )
      const started = await spawnServer(base, config, options.namespace)
      if (started !== undefined) {
        child = started
        return
      }
      if (attempt >= 10) throw new Error(`sshd does not start: ${readFileSync(`${base}/log`, 'utf8')}`)
    }
  }
  await launch()
  const hostKey = readFileSync(`${base}/host_key.pub`, 'utf8').split(' ').slice(0, 2).join(' ')
  writeFileSync(knownHosts, `${port === 22 ? address : `[${address}]:${port}`} ${hostKey}\n`)
  return {
    address,
    port,
    user,
    clientKey,
    knownHosts,
    hostKey,
    host: `${user}@${address}`,
    ssh: [
      'ssh',
      ...['-F', 'none', '-p', String(port), '-i', clientKey],
      ...['-o', `UserKnownHostsFile=${knownHosts}`, '-o', 'GlobalKnownHostsFile=none', '-o', 'IdentitiesOnly=yes'],
      ...['-o', 'StrictHostKeyChecking=yes', '-o', 'BatchMode=yes'],
    ],
    log: () => readFileSync(`${base}/log`, 'utf8'),
    allow,
    async changeHostKey() {
      run('rm', `${base}/host_key`, `${base}/host_key.pub`)
      makeKey(`${base}/host_key`)
      // SIGHUP makes it execute itself again with the same pid and port. Sessions go on.
      const before = listening(`${base}/log`)
      child.kill('SIGHUP')
      await until(() => listening(`${base}/log`) > before, 'sshd took no new host key')
    },
    cutConnections() {
      const sessions = childrenOf(child.pid as number)
      for (const pid of sessions) killTree(pid)
      return sessions.length
    },
    async stop() {
      if (child.exitCode === null && child.signalCode === null) {
        const ended = new Promise((resolve) => child.once('exit', resolve))
        for (const pid of childrenOf(child.pid as number)) killTree(pid)
        child.kill('SIGTERM')
        await ended
      }
      run('rm', '-rf', base)
      release()
    },
  }
}

/** One sshd for all tests of the surrounding `describe`. */
export function useSshServer(options: SshServerOptions = {}): Shared<SshServer> {
  return useShared(
    'sshd',
    () => startSshServer(options),
    (server) => server.stop(),
  )
}

async function spawnServer(base: string, config: string, at: Namespace | undefined): Promise<ChildProcess | undefined> {
  const log = openSync(`${base}/log`, 'a')
  const before = listening(`${base}/log`)
  const server = ['/usr/sbin/sshd', '-D', '-e', '-f', config] as const
  const [command, ...args] = at === undefined ? server : [...at.enter, ...server]
  const child = spawn(command, args, { stdio: ['ignore', log, log] })
  closeSync(log)
  appendFileSync(`${base}/pids`, `${child.pid}\n`)
  let ended = false
  child.once('exit', () => {
    ended = true
  })
  await until(() => ended || listening(`${base}/log`) > before, 'sshd neither listens nor ends')
  return ended ? undefined : child
}

/** How often the server has said that it listens. */
function listening(log: string): number {
  return readFileSync(log, 'utf8').split('Server listening on').length - 1
}

async function until(holds: () => boolean, failure: string): Promise<void> {
  for (let attempt = 0; !holds(); attempt++) {
    if (attempt > 600) throw new Error(failure)
    await delay(50)
  }
}

/** A port of loopback that nothing listens on at the moment. */
export function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer()
    server.once('error', reject)
    server.listen(0, '127.0.0.1', () => {
      const address = server.address()
      server.close(() => resolve(typeof address === 'object' && address !== null ? address.port : 0))
    })
  })
}

function childrenOf(pid: number): number[] {
  try {
    return readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8').split(' ').filter(Boolean).map(Number)
  } catch {
    return [] // it has ended
  }
}

/** SIGKILL for a process and what it started, from the top: none can start another meanwhile and escape. */
function killTree(pid: number): void {
  const children = childrenOf(pid)
  try {
    process.kill(pid, 'SIGKILL')
  } catch {
    // It ended by itself.
  }
  for (const child of children) killTree(child)
}
