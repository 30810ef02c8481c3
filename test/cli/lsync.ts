import { type ChildProcess, spawn, spawnSync } from 'node:child_process'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { onTestFinished } from 'vitest'

/** The command as users have it. */
export const lsyncPath = fileURLToPath(new URL('../../packages/cli/bin/lsync', import.meta.url))

/** What a finished command left. */
export interface Outcome {
  readonly stdout: string
  readonly stderr: string
  readonly code: number | null
}

export interface RunOptions {
  readonly cwd?: string
  readonly env?: Readonly<Record<string, string>>
  readonly input?: string
}

/** Runs lsync without a terminal. */
export function lsync(args: readonly string[], options: RunOptions = {}): Outcome {
  return runCommand(lsyncPath, args, options)
}

/** Runs a line of bash in which `lsync` is the command, for arguments that are not UTF-8. */
export function bash(line: string, options: RunOptions = {}): Outcome {
  return runCommand('bash', ['-c', `lsync() { ${lsyncPath} "$@"; }\n${line}`], options)
}

/** Runs lsync on a terminal of its own, and types `input`. What both streams said is in stdout. */
export function lsyncOnTerminal(args: readonly string[], options: RunOptions = {}): Outcome {
  const line = [lsyncPath, ...args].map((word) => `'${word}'`).join(' ')
  // The answer waits until it is asked for: what is typed into nothing is lost.
  const typed = options.input === undefined ? '' : `sleep 1; printf '${options.input}'; `
  return runCommand('bash', ['-c', `{ ${typed}sleep 0.2; } | script -qec "$1" /dev/null`, 'bash', line], options)
}

function runCommand(command: string, args: readonly string[], { cwd, env, input = '' }: RunOptions): Outcome {
  const { stdout, stderr, status, error } = spawnSync(command, args, {
    cwd,
    env: { ...cleanEnvironment(), ...env },
    input,
    encoding: 'latin1',
  })
  if (error !== undefined) throw error
  return { stdout: decoded(stdout), stderr: decoded(stderr), code: status }
}

function decoded(latin1: string): string {
  return Buffer.from(latin1, 'latin1').toString('utf8')
}

/** Starts lsync, for tests that interrupt it. */
export function startLsync(
  args: readonly string[],
  { env }: Pick<RunOptions, 'env'> = {},
): { child: ChildProcess; ended: Promise<Outcome> } {
  const child = spawn(lsyncPath, args, { env: { ...cleanEnvironment(), ...env }, stdio: ['ignore', 'pipe', 'pipe'] })
  const said = { stdout: '', stderr: '' }
  child.stdout?.on('data', (bytes) => {
    said.stdout += bytes
  })
  child.stderr?.on('data', (bytes) => {
    said.stderr += bytes
  })
  return { child, ended: new Promise((resolve) => child.on('close', (code) => resolve({ ...said, code }))) }
}

// Without what the test runner says of colours and of Node.
function cleanEnvironment(): NodeJS.ProcessEnv {
  const { PATH, HOME, TMPDIR } = process.env
  return { PATH, HOME, TERM: 'xterm', LANG: 'C.UTF-8', ...(TMPDIR === undefined ? {} : { TMPDIR }) }
}

/** A directory of this test's own, in memory where that is there; gone with the test. */
export function freshDirectory(): string {
  const directory = mkdtempSync(join(existsSync('/dev/shm') ? '/dev/shm' : tmpdir(), 'lsync-cli-'))
  onTestFinished(() => rmSync(directory, { recursive: true, force: true }))
  return directory
}

/** Each line of `--json` output. */
export function jsonLines(text: string): Record<string, unknown>[] {
  return text
    .split('\n')
    .filter((line) => line !== '')
    .map((line) => JSON.parse(line))
}

/** Output with what differs from run to run replaced: `<T>` for the directory, `<time>` for durations. */
export function stable(text: string, directory: string): string {
  return text.replaceAll(directory, '<T>').replace(/\d+\.\d+ s\b/g, '<time>')
}
