import { PosixError, setSyscallHook } from '@lsync/posix'

/** Thrown in place of a system call once the process is taken for dead. */
export class Killed extends Error {
  constructor() {
    super('killed by the test')
  }
}

// Without these nothing on disk differs before and after: a kill at one of them is the kill at the next that does.
const LOOKS_ONLY: ReadonlySet<string> = new Set(['openat', 'openat2', 'fsync', 'fdatasync', 'syncfs', 'flock'])

/** Runs `work` and gives the system calls at which it could fail, in order. */
export async function recordCalls(work: () => Promise<unknown>): Promise<string[]> {
  const calls: string[] = []
  setSyscallHook((syscall) => calls.push(syscall))
  try {
    await work()
  } finally {
    setSyscallHook(undefined)
  }
  return calls
}

/** Runs `work` and counts the calls at which it could be killed, or fail. */
export async function countCalls(kind: 'kill' | 'fail', work: () => Promise<unknown>): Promise<number> {
  const calls = await recordCalls(work)
  return kind === 'fail' ? calls.length : calls.filter((syscall) => !LOOKS_ONLY.has(syscall)).length
}

/**
 * Runs `work` and stops it before its n-th changing call (from 0). Everything after that fails too, since a dead
 * process does not tidy up. `onKill` runs at that moment. Returns whether it came so far.
 */
export async function killAt(n: number, work: () => Promise<unknown>, onKill?: () => void): Promise<boolean> {
  let calls = 0
  let isDead = false
  setSyscallHook((syscall) => {
    if (isDead) throw new Killed()
    if (LOOKS_ONLY.has(syscall) || calls++ < n) return
    isDead = true
    onKill?.()
    throw new Killed()
  })
  try {
    await work()
  } catch (cause) {
    if (!isDead) throw cause
  } finally {
    setSyscallHook(undefined)
  }
  return isDead
}

/** What one injected error led to. */
export interface Outcome {
  readonly wasInjected: boolean
  readonly syscall: string
  readonly path: string
  /** What `work` rejected with; `undefined` when it came to its end nonetheless. */
  readonly error: unknown
}

/** Runs `work` with its n-th call (from 0) failing with `code`, once. */
export async function failAt(n: number, code: string, work: () => Promise<unknown>): Promise<Outcome> {
  let calls = 0
  let wasInjected = false
  let at = { syscall: '', path: '' }
  setSyscallHook((syscall, path) => {
    if (calls++ !== n) return
    wasInjected = true
    at = { syscall, path }
    throw new PosixError(code, { syscall, path })
  })
  try {
    await work()
    return { wasInjected, ...at, error: undefined }
  } catch (error) {
    return { wasInjected, ...at, error }
  } finally {
    setSyscallHook(undefined)
  }
}
