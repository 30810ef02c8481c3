import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import { startCommand } from './command.ts'

/** What one run of one command cost. */
export type Cost = {
  /** From fork to exit. */
  wallMs: number
  /** What the file system then needed to write back everything the command left dirty. */
  syncMs: number
  userMs: number
  systemMs: number
  /** Highest resident memory of the command or of any one of its children. */
  maxRssMiB: number
  exitCode: number
  /** Last line the command wrote when it failed; empty otherwise. */
  complaint: string
}

/** A command to measure. `folder` is for the harness's own files; `cwd` is where the command runs. */
export type MeasuredCommand = {
  command: readonly string[]
  cwd: string
  folder: string
  measureProgram: string
  /** A directory of the file system that is written back afterwards, and timed apart. */
  syncDirectory: string
}

/** Runs one command to its end and returns what it cost, also when it fails. */
export async function measureCommand(request: MeasuredCommand): Promise<Cost> {
  const resultFile = join(request.folder, 'cost.json')
  const logFile = join(request.folder, 'output.log')
  await startCommand(
    [request.measureProgram, '-o', resultFile, '-l', logFile, '-s', request.syncDirectory, ...request.command],
    { cwd: request.cwd },
  )
  const raw = JSON.parse(readFileSync(resultFile, 'utf8')) as Record<string, number>
  const read = (name: string): number => raw[name] ?? 0
  const exitCode = read('signal') === 0 ? read('exitCode') : 128 + read('signal')
  return {
    wallMs: read('wallNs') / 1e6,
    syncMs: read('syncNs') / 1e6,
    userMs: read('userUs') / 1e3,
    systemMs: read('systemUs') / 1e3,
    maxRssMiB: read('maxRssKiB') / 1024,
    exitCode,
    complaint: exitCode === 0 ? '' : lastLine(logFile),
  }
}

function lastLine(file: string): string {
  return readFileSync(file, 'utf8').trim().split('\n').at(-1)?.slice(0, 200) ?? ''
}
