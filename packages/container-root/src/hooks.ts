import { spawn } from 'node:child_process'
import { closeSync, openSync, readSync, unlinkSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { setTimeout as delay } from 'node:timers/promises'
import { errnoOf, LsyncError, printable, randomHex } from '@lsync/posix'
import { z } from 'zod'

/** When a command of the user's runs. */
export const HookName = z.enum(['before', 'stop', 'start', 'health', 'after'])
export type HookName = z.infer<typeof HookName>

/** A command line for `sh -c`, and how long it may take. */
export const Hook = z.strictObject({
  command: z.string().min(1).max(10_000),
  timeoutMs: z.int().positive().max(86_400_000).exactOptional(),
})
export type Hook = z.infer<typeof Hook>

/**
 * What to do to a root's container. `before` runs before anything is stopped and may forbid it; `stop` ends the container and returns
 * when it has ended; `start` starts it on the mounted root; `health` is asked again and again until it succeeds; `after` runs when
 * all is done. What is absent is not run.
 */
export const Hooks = z.partialRecord(HookName, Hook)
export type Hooks = z.infer<typeof Hooks>

/** What a hook is told, as environment variables. */
export interface HookContext {
  /** LSYNC_ROOT: the root's name on the node. */
  readonly root: string
  /** LSYNC_MERGED: where the root is mounted. */
  readonly merged: string
  /** LSYNC_NODE: the node that the hook runs on. */
  readonly node: string
  /** LSYNC_REASON: `switch`, `rollback`, `solidify`. */
  readonly reason: string
}

export interface HookReport {
  readonly hook: HookName
  readonly durationMs: number
  /** How often it ran: `health` is repeated. */
  readonly runs: number
  /** The last that it wrote to its standard output and error, at most 64 KiB. */
  readonly output: string
}

/** A hook ended with another code than 0, or by a signal. */
export class HookFailedError extends LsyncError {
  readonly hook: HookName
  readonly output: string

  constructor(hook: HookName, how: string, output: string) {
    super('HOOK_FAILED', `the ${hook} hook ${how}${saidLast(output)}`, {
      hint: `run the ${hook} hook by hand to see why`,
    })
    this.hook = hook
    this.output = output
  }
}

/** A hook took too long; it and all that it had started were killed. For `health`: it did not succeed in time. */
export class HookTimeoutError extends LsyncError {
  readonly hook: HookName
  readonly output: string

  constructor(hook: HookName, timeoutMs: number, output: string) {
    super('HOOK_TIMEOUT', `the ${hook} hook was not done within ${timeoutMs} ms${saidLast(output)}`, {
      hint: `give it more time (timeoutMs), or see what it waits for`,
    })
    this.hook = hook
    this.output = output
  }
}

const DEFAULT_TIMEOUT_MS: Readonly<Record<HookName, number>> = {
  before: 30_000,
  stop: 60_000,
  start: 60_000,
  health: 60_000,
  after: 30_000,
}
const OUTPUT_BYTES = 64 * 1024
const HEALTH_PAUSE_MS = 200
/** Between the request to end and the kill. */
const GRACE_MS = 2000

/**
 * Runs one hook; `undefined` when there is none. `health` is repeated until it succeeds or its time is over.
 * @throws {HookFailedError}, {HookTimeoutError}
 */
export async function runHook(
  hooks: Hooks,
  name: HookName,
  context: HookContext,
  signal?: AbortSignal,
): Promise<HookReport | undefined> {
  const hook = hooks[name]
  if (hook === undefined) return undefined
  const startMs = performance.now()
  const timeoutMs = hook.timeoutMs ?? DEFAULT_TIMEOUT_MS[name]
  for (let runs = 1; ; runs++) {
    const leftMs = timeoutMs - (performance.now() - startMs)
    const { how, output } = await runOnce(hook.command, name, context, leftMs, signal)
    signal?.throwIfAborted()
    if (how === undefined) return { hook: name, durationMs: performance.now() - startMs, runs, output }
    const isOver = how === 'timeout' || performance.now() - startMs + HEALTH_PAUSE_MS > timeoutMs
    if (isOver && (how === 'timeout' || name === 'health')) throw new HookTimeoutError(name, timeoutMs, output)
    if (name !== 'health') throw new HookFailedError(name, how, output)
    await delay(HEALTH_PAUSE_MS, undefined, { ...(signal && { signal }) })
  }
}

/** Runs a command in a process group of its own. `how` it failed: `timeout`, or words. */
async function runOnce(
  command: string,
  name: HookName,
  context: HookContext,
  leftMs: number,
  signal: AbortSignal | undefined,
): Promise<{ readonly how: string | undefined; readonly output: string }> {
  signal?.throwIfAborted()
  // Not a pipe: what a start hook leaves running keeps its standard output, and would keep a reader waiting or get SIGPIPE.
  const log = openLog()
  try {
    const child = spawn('/bin/sh', ['-c', command], {
      detached: true,
      stdio: ['ignore', log, log],
      env: {
        ...process.env,
        LSYNC_HOOK: name,
        LSYNC_ROOT: context.root,
        LSYNC_MERGED: context.merged,
        LSYNC_NODE: context.node,
        LSYNC_REASON: context.reason,
      },
    })
    const ended = new Promise<string | undefined>((resolve) => {
      child.once('error', (error) => resolve(`could not be started: ${error.message}`))
      child.once('exit', (code, by) =>
        resolve(code === 0 ? undefined : `ended ${by === null ? `with ${code}` : `by ${by}`}`),
      )
    })
    const timer = new AbortController()
    const late = delay(Math.max(1, leftMs), 'timeout', { signal: timer.signal }).catch(() => 'timeout')
    const aborted = new Promise<string>((resolve) => {
      signal?.addEventListener('abort', () => resolve('aborted'), { once: true, signal: timer.signal })
    })
    const how = await Promise.race([ended, late, aborted])
    timer.abort()
    if ((how === 'timeout' || how === 'aborted') && child.pid !== undefined) await endGroup(child.pid, ended)
    return { how, output: lastOf(log) }
  } finally {
    closeSync(log)
  }
}

/** Asks a process group to end, then kills what is left of it. */
async function endGroup(group: number, ended: Promise<unknown>): Promise<void> {
  signalGroup(group, 'SIGTERM')
  await Promise.race([ended, delay(GRACE_MS)])
  signalGroup(group, 'SIGKILL')
  await ended
}

function signalGroup(group: number, signal: 'SIGTERM' | 'SIGKILL'): void {
  try {
    process.kill(-group, signal)
  } catch (error) {
    if (errnoOf(error) !== 'ESRCH') throw error
  }
}

/** A file that has no name any more. */
function openLog(): number {
  const path = `${tmpdir()}/.lsync-hook-${randomHex(8)}`
  const log = openSync(path, 'ax+', 0o600)
  unlinkSync(path)
  return log
}

function lastOf(log: number): string {
  const buffer = Buffer.alloc(OUTPUT_BYTES)
  let [end, kept] = [0, Buffer.alloc(0)]
  for (;;) {
    const length = readSync(log, buffer, 0, OUTPUT_BYTES, end)
    if (length === 0) return kept.toString('utf8')
    end += length
    kept = Buffer.concat([kept, buffer.subarray(0, length)]).subarray(-OUTPUT_BYTES)
  }
}

function saidLast(output: string): string {
  const line = output.trimEnd().split('\n').at(-1) ?? ''
  return line === '' ? '' : `; it said last: ${printable(line.slice(0, 200))}`
}

/** Runtimes that there are ready-made hooks for. */
export const RUNTIMES = ['runc', 'docker', 'podman'] as const
export type Runtime = (typeof RUNTIMES)[number]

export interface PresetOptions {
  /** The container's name or id. */
  readonly container: string
  /** runc: the bundle, whose `config.json` has the mounted root as `root.path`. */
  readonly bundle?: string | undefined
  /** runc: its state directory, where it is not the default. */
  readonly runcRoot?: string | undefined
  /** How long the container may take to end by itself. Default 10 s. */
  readonly stopSeconds?: number | undefined
}

/**
 * Hooks for a container of a runtime. They may be run again: to stop what does not run, and to start what runs, succeeds. docker and podman
 * start a container that was created with the mounted root as (a part of) its file system.
 */
export function presetHooks(runtime: Runtime, options: PresetOptions): Hooks {
  const id = quoted(options.container)
  const seconds = options.stopSeconds ?? 10
  if (runtime === 'runc') {
    const runc = options.runcRoot === undefined ? 'runc' : `runc --root ${quoted(options.runcRoot)}`
    const status = `${runc} state ${id} 2>/dev/null | grep -o '"status": *"[a-z]*"'`
    const waits = `n=0; while ${status} | grep -q running && [ $n -lt ${seconds * 10} ]; do sleep 0.1; n=$((n+1)); done`
    return {
      stop: hook(
        `${runc} state ${id} >/dev/null 2>&1 || exit 0; ${runc} kill ${id} TERM 2>/dev/null; ${waits}; ${runc} delete --force ${id}`,
        seconds + 30,
      ),
      start: hook(
        `${status} | grep -q running && exit 0; ${runc} delete --force ${id} 2>/dev/null; exec ${runc} run --detach --bundle ${quoted(options.bundle ?? '.')} ${id} </dev/null`,
      ),
      health: hook(`${status} | grep -q running`),
    }
  }
  const running = `${runtime} inspect --format '{{.State.Status}}{{if .State.Health}} {{.State.Health.Status}}{{end}}' ${id}`
  return {
    stop: hook(`${runtime} stop --time ${seconds} ${id}`, seconds + 30),
    start: hook(`${runtime} start ${id}`),
    // A container without a health check of its own is well when it runs; podman says its health all the same, as nothing.
    health: hook(`case "$(${running})" in running|'running '|'running healthy') ;; *) exit 1 ;; esac`),
  }
}

function hook(command: string, seconds?: number): Hook {
  return seconds === undefined ? { command } : { command, timeoutMs: seconds * 1000 }
}

function quoted(word: string): string {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`
}
