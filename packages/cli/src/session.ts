import { createInterface } from 'node:readline/promises'
import { EXIT, type ExitCode, InterruptedError, NotConfirmedError, ReaderGoneError, UsageError } from './failure.ts'
import { Output } from './output.ts'

/** One run of one command: where it writes, when it must stop, how it ends. */
export class Session {
  readonly output: Output
  exitCode: ExitCode = EXIT.done
  /** What to do when this command was interrupted. */
  afterInterrupt: string | undefined
  readonly #abort = new AbortController()
  #hasObeyed = false

  constructor(isJson: boolean) {
    this.output = new Output(isJson)
  }

  /** Aborted by SIGINT and SIGTERM, and when nobody reads the output. */
  get signal(): AbortSignal {
    return this.#abort.signal
  }

  /** From here on the first SIGINT or SIGTERM stops the operation in order, and the second one at once. */
  listen(): void {
    const stop = (name: string) => {
      if (this.signal.aborted) process.exit(EXIT.interrupted)
      this.#abort.abort(new InterruptedError(name, this.afterInterrupt))
    }
    process.on('SIGINT', stop)
    process.on('SIGTERM', stop)
    process.stdout.on('error', (error: NodeJS.ErrnoException) => {
      if (error.code !== 'EPIPE') throw error
      this.#abort.abort(new ReaderGoneError())
    })
    // A merge does not stop because nobody sees its progress any more.
    process.stderr.on('error', () => undefined)
  }

  /** It was told to end, and has. Ends with 0 where that came from a service manager (SIGTERM), not from a terminal. */
  obey(): void {
    const { reason } = this.signal
    this.#hasObeyed = reason instanceof InterruptedError && reason.signal === 'SIGTERM'
  }

  /** What the run ends with when nothing was thrown. */
  get finalCode(): ExitCode {
    // What was left unread was left out, too.
    const isCut = this.signal.aborted && !this.#hasObeyed
    return isCut && this.exitCode === EXIT.done ? EXIT.interrupted : this.exitCode
  }

  /** Tells an error that ends nothing, and what it is about. */
  warnOf(error: unknown, about?: string): void {
    const code = (error as { code?: unknown }).code
    const message = error instanceof Error ? error.message : String(error)
    this.output.warning(typeof code === 'string' ? code : 'BUG', about === undefined ? message : `${about}: ${message}`)
  }

  /** Ends with 3: done, but not everything is as it should be. */
  foundProblems(): void {
    this.exitCode = EXIT.problems
  }

  /**
   * Before something is destroyed: asks on a terminal, and elsewhere wants `--yes`.
   * @throws {UsageError} without a terminal and without `--yes`
   * @throws {NotConfirmedError} if the answer is not yes
   */
  async confirm(
    what: string,
    options: { yes?: boolean; dryRun?: boolean },
    lookFirst = 'look first with --dry-run',
  ): Promise<void> {
    if (options.yes === true || options.dryRun === true) return
    if (!process.stdin.isTTY || !process.stderr.isTTY) {
      throw new UsageError(`${what}, and there is no terminal to ask on`, `add --yes, or ${lookFirst}`)
    }
    const terminal = createInterface({ input: process.stdin, output: process.stderr })
    try {
      const answer = await terminal.question(`${what}. Go on? [y/N] `, { signal: this.signal })
      if (!/^y(es)?$/i.test(answer.trim())) throw new NotConfirmedError()
    } finally {
      terminal.close()
    }
  }
}
