import { execFileSync, spawnSync } from 'node:child_process'
import { mkdtempSync, rmSync } from 'node:fs'
import { hostPath } from '@lsync/posix'
import { LocalBackend, Repository } from '@lsync/snapshot'
import { onTestFinished } from 'vitest'

export const PASSWORD = 'correct horse'
/** Passwords of tests protect nothing, so trying one costs nothing. */
export const CHEAP = { N: 1024, r: 8, p: 1 } as const

/** A directory in RAM that is gone when the test ends. */
export function temporaryDirectory(): string {
  const path = mkdtempSync('/dev/shm/lsync-snapshot-')
  onTestFinished(() => rmSync(path, { recursive: true, force: true }))
  return path
}

/** A new repository of ours, open, in a directory that is gone when the test ends. */
export async function newRepository(version: 1 | 2 = 2): Promise<{ path: string; repository: Repository }> {
  const path = `${temporaryDirectory()}/repository`
  const backend = new LocalBackend(hostPath(path))
  const repository = await Repository.init(backend, { password: PASSWORD, passwordCost: CHEAP, version })
  onTestFinished(() => repository.close())
  return { path, repository }
}

/** Opens what lies there as if by another process: nothing is remembered. */
export async function reopen(path: string): Promise<Repository> {
  const repository = await Repository.open(new LocalBackend(hostPath(path)), { password: PASSWORD })
  onTestFinished(() => repository.close())
  return repository
}

/** restic itself on one repository. */
export class Restic {
  readonly path: string

  constructor(path: string) {
    this.path = path
  }

  /** Runs it, and gives its standard output; throws with what it said when it fails. */
  run(...args: string[]): string {
    return execFileSync('restic', ['--no-cache', ...args], {
      env: this.#environment,
      encoding: 'utf8',
      stdio: ['ignore', 'pipe', 'pipe'],
      maxBuffer: 1 << 28,
    })
  }

  /** Runs it although it may fail. */
  try(...args: string[]): { status: number | null; output: string } {
    const { status, stdout, stderr } = spawnSync('restic', ['--no-cache', ...args], {
      env: this.#environment,
      encoding: 'utf8',
    })
    return { status, output: stdout + stderr }
  }

  /** The answers of a command with `--json`: one value a line. */
  json<T>(...args: string[]): T[] {
    return this.run(...args, '--json')
      .split('\n')
      .filter((line) => line.trim() !== '')
      .map((line) => JSON.parse(line) as T)
  }

  get #environment(): NodeJS.ProcessEnv {
    return { ...process.env, RESTIC_PASSWORD: PASSWORD, RESTIC_REPOSITORY: this.path, RESTIC_PROGRESS_FPS: '0.001' }
  }
}
