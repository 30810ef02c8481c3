import { styleText } from 'node:util'
import { type ProgressState, progressLine } from './progress-line.ts'

/** What one line of `--json` is made of. Paths in it are text (`textOf`). */
export type JsonLine = { readonly type: string } & Readonly<Record<string, unknown>>

type Style = 'red' | 'yellow' | 'green' | 'bold' | 'dim'

const BUFFER_CHARS = 1 << 16
const REDRAW_MS = 100

/** Data to stdout, everything else to stderr. */
export class Output {
  readonly isJson: boolean
  #buffered = ''
  #progress: ProgressState | undefined
  #drawnAt = 0
  #isDrawn = false

  constructor(isJson: boolean) {
    this.isJson = isJson
  }

  /** Data: the object for `--json`, else the text, if there is one. */
  data(json: () => JsonLine, text: () => string | undefined): void {
    const line = this.isJson ? toJson(json()) : text()
    if (line !== undefined) this.line(line)
  }

  /** Data that is already a line. */
  line(line: string): void {
    this.#buffered += `${line}\n`
    if (this.#buffered.length >= BUFFER_CHARS || process.stdout.isTTY) this.flush()
  }

  /** Writes what is held back. */
  flush(): void {
    if (this.#buffered === '') return
    this.#erase()
    process.stdout.write(this.#buffered)
    this.#buffered = ''
  }

  /** Something people should know and programs need not: nothing with `--json`. */
  note(text: string): void {
    if (!this.isJson) this.#tell(text)
  }

  /** Something that is wrong, though the operation goes on. */
  warning(code: string, message: string, fields: Readonly<Record<string, unknown>> = {}): void {
    if (this.isJson) this.#tell(toJson({ type: 'warning', code, message, ...fields }))
    else this.#tell(this.#style('yellow', `lsync: warning: ${message} (${code})`))
  }

  /** The last thing said: why it failed. */
  error(line: string, fields: Readonly<Record<string, unknown>>): void {
    if (this.isJson) {
      this.#tell(toJson({ type: 'error', ...fields }))
      return
    }
    const [first, ...others] = line.split('\n')
    this.#tell([this.#style('red', first as string), ...others].join('\n'))
  }

  /** Shows how far an operation is, on a terminal, at most ten times a second. */
  readonly progress = (progress: { phase: string; done: number; total?: number }): void => {
    if (this.isJson || !process.stderr.isTTY) return
    const now = performance.now()
    if (this.#progress?.phase !== progress.phase) this.#progress = { ...progress, startMs: now }
    if (now - this.#drawnAt < REDRAW_MS) return
    this.#drawnAt = now
    this.#isDrawn = true
    const line = progressLine({ ...progress, startMs: this.#progress.startMs }, now)
    process.stderr.write(`\r\x1b[K${line.slice(0, (process.stderr.columns ?? 80) - 1)}`)
  }

  /** As `progress`, for operations that have more to say than one count. */
  readonly progressText = (text: () => string): void => {
    if (this.isJson || !process.stderr.isTTY) return
    const now = performance.now()
    if (now - this.#drawnAt < REDRAW_MS) return
    this.#drawnAt = now
    this.#isDrawn = true
    process.stderr.write(`\r\x1b[K${text().slice(0, (process.stderr.columns ?? 80) - 1)}`)
  }

  /** Styles text for stdout: only on a terminal, and never with NO_COLOR. */
  styled(style: Style, text: string): string {
    return styleText(style, text, { stream: process.stdout })
  }

  #style(style: Style, text: string): string {
    return styleText(style, text, { stream: process.stderr })
  }

  #tell(text: string): void {
    // In the order in which it happened, where both streams go to one place.
    this.flush()
    this.#erase()
    process.stderr.write(`${text}\n`)
  }

  #erase(): void {
    if (!this.#isDrawn) return
    this.#isDrawn = false
    process.stderr.write('\r\x1b[K')
  }

  /** Takes the progress line away. The terminal is as it was. */
  close(): void {
    this.flush()
    this.#erase()
  }
}

function toJson(line: JsonLine): string {
  return JSON.stringify(line, (_, value) => (typeof value === 'bigint' ? String(value) : value))
}
