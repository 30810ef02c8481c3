import { spawn, spawnSync } from 'node:child_process'

/** A command that the harness needs for its set-up did not end well. */
export class CommandFailedError extends Error {
  constructor(command: readonly string[], detail: string) {
    // A copy that fails has a line to say about each of a million files.
    super(`${command.join(' ').slice(0, 300)}: ${detail.split('\n').slice(0, 3).join('; ')}`)
    this.name = 'CommandFailedError'
  }
}

/**
 * Runs a command of the set-up (never a measured one, see measure.ts) and returns its stdout.
 *
 * @throws {CommandFailedError} with the command's stderr, when it cannot be started or exits with anything but 0
 */
export function runCommand(command: readonly string[], options: { cwd?: string } = {}): string {
  const [program = '', ...rest] = command
  const result = spawnSync(program, rest, {
    encoding: 'utf8',
    maxBuffer: 1 << 30,
    stdio: ['ignore', 'pipe', 'pipe'],
    ...options,
  })
  if (result.error !== undefined) throw new CommandFailedError(command, result.error.message)
  if (result.status !== 0) throw new CommandFailedError(command, result.stderr.trim() || `exit code ${result.status}`)
  return result.stdout
}

const running = new Set<number>()

/** Ends what `startCommand` started and is still running, with everything that those commands started in turn. */
export function stopCommands(): void {
  for (const pid of running) {
    try {
      process.kill(-pid, 'SIGTERM')
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error
    }
  }
}

/**
 * Runs a command while the event loop goes on, so that a signal is seen in the middle of it, and returns its stdout.
 *
 * @throws {CommandFailedError} as `runCommand`
 */
export function startCommand(command: readonly string[], options: { cwd?: string } = {}): Promise<string> {
  const [program = '', ...rest] = command
  return new Promise((resolve, reject) => {
    // A session of its own: an interrupt at the terminal is for the harness to handle, which then cleans up.
    const child = spawn(program, rest, { stdio: ['ignore', 'pipe', 'pipe'], detached: true, ...options })
    const { pid } = child
    if (pid !== undefined) running.add(pid)
    let stdout = ''
    let stderr = ''
    child.stdout.setEncoding('utf8').on('data', (text: string) => {
      stdout += text
    })
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      stderr += text
    })
    child.on('error', (cause) => reject(new CommandFailedError(command, cause.message)))
    child.on('close', (code) => {
      if (pid !== undefined) running.delete(pid)
      if (code === 0) resolve(stdout)
      else reject(new CommandFailedError(command, stderr.trim() || `exit code ${code}`))
    })
  })
}

/** Where a program of that name is found: an absolute path, or `undefined` when it is not installed. */
export function findProgram(name: string): string | undefined {
  const found = spawnSync('/bin/sh', ['-c', 'command -v -- "$1"', 'sh', name], {
    encoding: 'utf8',
    env: { ...process.env, PATH: `${process.env.PATH ?? ''}:/usr/sbin:/sbin` },
  })
  const path = found.stdout.trim()
  return found.status === 0 && path.startsWith('/') ? path : undefined
}

/** First line that `program --version` (or the given arguments) prints, or `undefined` when it prints none. */
export function versionOf(program: string, args: readonly string[] = ['--version']): string | undefined {
  const result = spawnSync(program, args, { encoding: 'utf8', timeout: 10_000 })
  const text = `${result.stdout ?? ''}\n${result.stderr ?? ''}`.trim()
  return text.split('\n')[0]?.trim() || undefined
}
