import { spawnSync } from 'node:child_process'
import { readFileSync, rmSync } from 'node:fs'
import { lsyncPath } from '../cli/lsync.ts'

/** What gives a root another state: each is a phase that a node can die in. */
const CHANGING = 'rename,renameat,renameat2,link,linkat,umount2,move_mount'
/** A call by its name, and the how manieth of that name it is in its thread, which is how strace counts. */
export interface Point {
  readonly call: string
  readonly nth: number
}

/** What became of a command that was to be killed. */
export interface Struck {
  readonly isKilled: boolean
  readonly status: number | null
  readonly stderr: string
  /** Such calls as there were, of the thread that made most of them. */
  readonly calls: readonly Point[]
}

/** Runs lsync on the node of that state, and kills it as it begins that call; without one, or with one that does not come, it ends by itself. */
export function struck(state: string, args: readonly string[], at?: Point): Struck {
  const trace = `${state}/trace`
  const inject = at === undefined ? [] : ['-e', `inject=${at.call}:signal=SIGKILL:when=${at.nth}`]
  const command = ['-f', '-qq', '-o', trace, '-e', `trace=${CHANGING}`, ...inject, lsyncPath, ...args, '--state', state]
  const { signal, status, stderr } = spawnSync('strace', command, { encoding: 'utf8' })
  const calls = callsIn(readFileSync(trace, 'utf8').split('\n'))
  rmSync(trace)
  return { isKilled: signal === 'SIGKILL', status, stderr, calls }
}

/** The calls of the thread that made most of them, in order. */
function callsIn(trace: readonly string[]): Point[] {
  const threads = new Map<string, Point[]>()
  for (const line of trace) {
    const [, thread, call] = /^(\d+) +(\w+)\(/.exec(line) ?? []
    if (thread === undefined || call === undefined || !CHANGING.split(',').includes(call)) continue
    const calls = threads.get(thread) ?? []
    threads.set(thread, [...calls, { call, nth: calls.filter((one) => one.call === call).length + 1 }])
  }
  return [...threads.values()].sort((left, right) => right.length - left.length)[0] ?? []
}
