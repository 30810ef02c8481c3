import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import type { Cost } from './measure.ts'
import type { Scratch } from './scratch.ts'

/** A program that goes on until it is stopped, with its output line by line. */
export type Daemon = {
  pid: number
  /** From fork to the line that `isReady` took. */
  readyMs: number
  /** Sends a line and resolves with the next that comes back. */
  ask: (line: string) => Promise<string>
  /** SIGTERM, or SIGKILL; resolves when it has ended. */
  stop: (signal?: 'SIGTERM' | 'SIGKILL') => Promise<void>
}

/**
 * Starts a program and waits for the line of its output that says it is ready.
 *
 * @throws when it ends before
 */
export async function startDaemon(
  scratch: Scratch,
  command: readonly string[],
  isReady: (line: string) => boolean,
): Promise<Daemon> {
  const startedAt = performance.now()
  const [program = '', ...args] = command
  const child = spawn(program, args, { stdio: ['pipe', 'pipe', 'pipe'], detached: true })
  const lines: string[] = []
  const waiting: ((line: string) => void)[] = []
  let last = ''
  const take = (line: string): void => {
    last = line
    const next = waiting.shift()
    if (next === undefined) lines.push(line)
    else next(line)
  }
  createInterface({ input: child.stdout }).on('line', take)
  createInterface({ input: child.stderr }).on('line', take)
  const ended = once(child, 'exit')
  const kill = scratch.onCleanup(() => void child.kill('SIGKILL'))
  const nextLine = (): Promise<string> => {
    const line = lines.shift()
    if (line !== undefined) return Promise.resolve(line)
    return new Promise((resolve, reject) => {
      waiting.push(resolve)
      ended.then(() => reject(new Error(`${program} ended: ${last}`)), reject)
    })
  }
  for (;;) {
    await scratch.checkInterrupted()
    if (isReady(await nextLine())) break
  }
  return {
    pid: child.pid ?? 0,
    readyMs: performance.now() - startedAt,
    ask(line) {
      child.stdin.write(`${line}\n`)
      return nextLine()
    },
    async stop(signal = 'SIGTERM') {
      if (signal === 'SIGKILL') kill()
      else child.kill(signal)
      await ended
      kill()
    },
  }
}

const ticksPerSecond = 100

/** Processor time that a process and its threads have used so far, in milliseconds. */
function processorMs(pid: number): { userMs: number; systemMs: number } {
  const stat = readFileSync(`/proc/${pid}/stat`, 'utf8')
  // The name, in parentheses, may hold anything.
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ')
  const ms = (field: number): number => (Number(fields[field]) * 1000) / ticksPerSecond
  return { userMs: ms(11), systemMs: ms(12) }
}

function residentMiB(pid: number): number {
  return Number(/^VmRSS:\s*(\d+)/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1]) / 1024
}

/** What a daemon costs while nothing happens: its memory, and the processor time of so many seconds. */
export async function measureRest(daemon: Daemon, seconds: number): Promise<Cost> {
  const before = processorMs(daemon.pid)
  await new Promise((resolve) => setTimeout(resolve, seconds * 1000))
  const after = processorMs(daemon.pid)
  return {
    wallMs: daemon.readyMs,
    syncMs: 0,
    userMs: after.userMs - before.userMs,
    systemMs: after.systemMs - before.systemMs,
    maxRssMiB: residentMiB(daemon.pid),
    exitCode: 0,
    complaint: '',
  }
}
