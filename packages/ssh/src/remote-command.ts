import { spawn } from 'node:child_process'
import type { Readable } from 'node:stream'
import { setTimeout as delay } from 'node:timers/promises'
import { LsyncError, printable } from '@lsync/posix'
import type { RemoteAddress } from './address.ts'
import type { Connection } from './connection.ts'
import { ConnectError, RemoteCommandError, RemoteLsyncMissingError } from './ssh-errors.ts'

/** How a remote command ended, and the last that it said on its standard error. */
export interface CommandEnd {
  readonly code: number | undefined
  readonly signal: string | undefined
  readonly said: string
}

const SAID_BYTES = 2048
const NOT_FOUND = 127
const NOT_EXECUTABLE = 126
const SSH_FAILED = 255
// After the streams ended, the exit is told at once or never.
const EXIT_WAIT_MS = 5000

/** A command line for the other side's shell that starts lsync there. */
export function serveCommand(lsync: string): string {
  return remoteCommand([lsync, 'serve', '--stdio', '--root', '/'])
}

/** A command line for the other side's shell of these words, whatever is in them. */
export function remoteCommand(words: readonly string[]): string {
  return words.map(shellQuoted).join(' ')
}

function shellQuoted(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`
}

/**
 * Starts a program such as `ssh -J jump` with host and command added, as rsync's `-e` does. What it says on standard
 * error, ssh's questions excepted (they go to the terminal), is kept for the error.
 */
export function spawnRemote(
  rsh: string,
  address: RemoteAddress,
  wanted: { readonly command: string } | { readonly subsystem: string },
  signal: AbortSignal,
): Connection {
  const [program, ...args] = wordsOf(rsh)
  if (program === undefined) throw new RemoteCommandError(address.host, 'no program was named')
  const { user, host, port } = address
  if (port !== undefined) args.push('-p', String(port))
  if (user !== undefined) args.push('-l', user)
  if ('subsystem' in wanted) args.push('-s')
  args.push(host, 'command' in wanted ? wanted.command : wanted.subsystem)
  const child = spawn(program, args, { stdio: ['pipe', 'pipe', 'pipe'] })
  const said = lastOf(child.stderr)
  const end = new Promise<CommandEnd | Error>((resolve) => {
    child.once('error', resolve)
    child.once('close', (code, by) => resolve({ code: code ?? undefined, signal: by ?? undefined, said: said() }))
  })
  const abort = () => child.kill()
  signal.addEventListener('abort', abort, { once: true })
  void end.then(() => signal.removeEventListener('abort', abort))
  return {
    readable: child.stdout,
    writable: child.stdin,
    destroy: () => {
      child.stdin.destroy()
      child.stdout.destroy()
      child.kill()
    },
    explain: async () => {
      const ended = await within(end)
      if (ended instanceof Error) return new RemoteCommandError(host, ended.message)
      return errorOfExit(ended, host)
    },
  }
}

/** How the command behind an ssh2 channel ends. */
export function endOf(channel: Readable & { readonly stderr: Readable }): Promise<CommandEnd | undefined> {
  const said = lastOf(channel.stderr)
  let exit: { code: number | undefined; signal: string | undefined } | undefined
  channel.once('exit', (code: number | null, by?: string) => {
    exit = { code: code ?? undefined, signal: by }
  })
  return new Promise((resolve) => {
    channel.once('close', () => resolve(exit === undefined ? undefined : { ...exit, said: said() }))
    channel.once('end', () => setTimeout(() => resolve(exit && { ...exit, said: said() }), EXIT_WAIT_MS).unref())
  })
}

/** What it means that the command ended. `undefined` where that tells nothing. */
export function errorOfExit(end: CommandEnd | undefined, where: string): Error | undefined {
  if (end === undefined || end.code === 0) return undefined
  const { code, signal, said } = end
  if (code === NOT_FOUND || code === NOT_EXECUTABLE) return new RemoteLsyncMissingError(where, said)
  if (code === SSH_FAILED) return new ConnectError(where, said === '' ? 'ssh failed' : said)
  // Whoever was killed lost the connection, and did not refuse it.
  if (code === undefined) return undefined
  const lsync = /^lsync: (?<message>.*) \((?<code>[A-Z][A-Z0-9_]*)\)$/m.exec(said)?.groups
  // Of a bug there all is wanted that it says.
  if (lsync?.['code'] !== undefined && lsync['code'] !== 'BUG')
    return new LsyncError(lsync['code'], lsync['message'] ?? '')
  return new RemoteCommandError(where, said === '' ? `it ended with ${signal ?? code}` : said)
}

function within<T>(promise: Promise<T>): Promise<T | undefined> {
  return Promise.race([promise, delay(EXIT_WAIT_MS, undefined, { ref: false })])
}

/** Reads a stream to its end; the function gives the last of it, without anything that a terminal would obey. */
function lastOf(stream: Readable): () => string {
  let last = Buffer.alloc(0)
  stream.on('data', (chunk: Buffer) => {
    last = Buffer.concat([last, chunk]).subarray(-SAID_BYTES)
  })
  stream.on('error', () => undefined)
  return () =>
    last
      .toString('latin1')
      .trim()
      .split(/[\r\n]+/)
      .map((line) => printable(line))
      .join('\n')
}

/** A command line as words; quotes keep spaces together. */
function wordsOf(line: string): string[] {
  return [...line.matchAll(/(?:[^\s'"]+|'[^']*'|"[^"]*")+/g)].map(([word]) => unquoted(word))
}

function unquoted(word: string): string {
  return word.replace(/'([^']*)'|"([^"]*)"/g, (_, single?: string, double?: string) => single ?? double ?? '')
}
