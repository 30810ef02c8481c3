import { errnoOf, LsyncError, textOf } from '@lsync/posix'
import { CommanderError } from 'commander'

/** What lsync ends with. */
export const EXIT = { done: 0, failed: 1, usage: 2, problems: 3, busy: 4, interrupted: 130 } as const
export type ExitCode = (typeof EXIT)[keyof typeof EXIT]

/** The command line asks for something that makes no sense. */
export class UsageError extends LsyncError {
  constructor(message: string, hint: string) {
    super('USAGE', message, { hint })
  }
}

/** SIGINT or SIGTERM came. The reason of the signal that every operation gets. */
export class InterruptedError extends LsyncError {
  readonly signal: string

  /** `hint`: what to do about what had begun, if anything. */
  constructor(signal: string, hint?: string) {
    super('INTERRUPTED', `stopped by ${signal}`, hint === undefined ? {} : { hint })
    this.signal = signal
  }
}

/** Whoever reads standard output has gone (`lsync diff … | head`). Nobody is told. */
export class ReaderGoneError extends LsyncError {
  constructor() {
    super('READER_GONE', 'nobody reads standard output any more')
  }
}

/** Somebody was asked and did not say yes. */
export class NotConfirmedError extends LsyncError {
  constructor() {
    super('NOT_CONFIRMED', 'not confirmed; nothing was changed')
  }
}

/** One error as it leaves lsync: a line for people, an object for programs, an exit code for scripts. */
export interface Failure {
  readonly exitCode: ExitCode
  /** `undefined`: nothing is to be said. */
  readonly line: string | undefined
  readonly fields: Readonly<Record<string, unknown>>
}

const BUSY = new Set([
  'TARGET_BUSY',
  'LAYER_BUSY',
  'LAYOUT_BUSY',
  'SYNC_RUNNING',
  'REPOSITORY_LOCKED',
  'ROOT_BUSY',
  'LEASE_HELD',
])
const USAGE = new Set([
  'USAGE',
  'REQUEST_INVALID',
  'SYNC_REQUEST_INVALID',
  'SYNC_PATTERN_INVALID',
  'SNAPSHOT_REQUEST_INVALID',
  'EXCLUDE_INVALID',
  'DURATION_INVALID',
  'PASSWORD_UNKNOWN',
])

/** Renders whatever was thrown. A bug keeps its stack, so that it can be reported. */
export function failureOf(error: unknown, command: string): Failure {
  if (error instanceof CommanderError) return failureOf(usageErrorOf(error, command), command)
  if (!(error instanceof LsyncError)) {
    const code = errnoOf(error)
    if (code === 'EPIPE') return failureOf(new ReaderGoneError(), command)
    if (code !== undefined) return failureOf(new LsyncError(code, (error as Error).message), command)
    const { message, stack } = error instanceof Error ? error : new Error(String(error))
    return {
      exitCode: EXIT.failed,
      line: `lsync: this is a bug in lsync, please report it (BUG)\n${stack}`,
      fields: { code: 'BUG', message, stack },
    }
  }
  const { code, message, hint, path, syscall } = error
  return {
    exitCode: exitCodeOf(code),
    line: code === 'READER_GONE' ? undefined : `lsync: ${message}${hint === undefined ? '' : `; ${hint}`} (${code})`,
    fields: {
      code,
      message,
      ...(path === undefined ? {} : { path: textOf(path) }),
      ...(syscall === undefined ? {} : { syscall }),
      ...(hint === undefined ? {} : { hint }),
    },
  }
}

function usageErrorOf(error: CommanderError, command: string): UsageError {
  // Commander shows help where a command of several is not named.
  const isIncomplete = error.code === 'commander.help'
  const message = isIncomplete
    ? 'a command is missing'
    : error.message
        .replace(/^error: /, '')
        .replaceAll('\n', ' ')
        .replace(/\.$/, '')
  return new UsageError(message, `see \`${command} --help\``)
}

function exitCodeOf(code: string): ExitCode {
  if (BUSY.has(code)) return EXIT.busy
  if (USAGE.has(code)) return EXIT.usage
  return code === 'INTERRUPTED' || code === 'READER_GONE' ? EXIT.interrupted : EXIT.failed
}
