import { type FileHandle as File, open } from 'node:fs/promises'
import { LsyncError } from '@lsync/posix'
import createXxhash from 'xxhash-wasm'
import type { IndexChange } from './model/index-change.ts'
import type { Operation, TreePath } from './model/operation.ts'
import { Row } from './model/row.ts'

const { h64 } = await createXxhash()

/** A journal that was written whole and is not whole any more. */
export class SyncJournalDamagedError extends LsyncError {
  constructor(path: string) {
    super('SYNC_JOURNAL_DAMAGED', `the journal ${path} is damaged`, {
      path,
      hint: 'check the disk; removing the directory it lies in makes the next sync compare the whole tree',
    })
  }
}

/** What was about to be done at a target, without content. */
export interface Batch {
  readonly first: readonly Operation[]
  readonly second: readonly Operation[]
  readonly changes: readonly IndexChange[]
  /** Names of the new tree that are not to be believed before the next checkpoint. */
  readonly touched: readonly TreePath[]
}

/** A batch that no checkpoint has followed, and how far it came. */
export interface UnfinishedBatch extends Batch {
  /** All of `first` is durable at the target. */
  readonly isHalfDone: boolean
  /** `first` and `second` are durable, and the index knows it. */
  readonly isStructured: boolean
}

type Line = { readonly batch: Batch } | { readonly mark: 'half' | 'structured' }

/**
 * The batches of operations since the last checkpoint, in a file of their own: JSON lines, each after the xxh64 of its
 * text. A batch is durable before the first of its operations is carried out. docs/format.md, "Journal of a sync".
 */
export class SyncJournal {
  readonly #path: string
  readonly #file: File
  #length: number

  private constructor(path: string, file: File, length: number) {
    this.#path = path
    this.#file = file
    this.#length = length
  }

  /**
   * Opens the journal, or makes an empty one; gives what is in it.
   * @throws {SyncJournalDamagedError} when anything but its last line, which a crash may have cut, is not whole
   */
  static async open(path: string): Promise<{ journal: SyncJournal; unfinished: readonly UnfinishedBatch[] }> {
    const file = await open(path, 'a+', 0o600)
    try {
      return await SyncJournal.#read(path, file)
    } catch (error) {
      await file.close()
      throw error
    }
  }

  static async #read(path: string, file: File): Promise<{ journal: SyncJournal; unfinished: UnfinishedBatch[] }> {
    const text = await file.readFile('latin1')
    const batches: UnfinishedBatch[] = []
    let length = 0
    for (let end = text.indexOf('\n'); end >= 0; end = text.indexOf('\n', length)) {
      const line = parseLine(text.slice(length, end))
      if (line === undefined) {
        // Nothing was done after a line that never became durable.
        if (end === text.length - 1) break
        throw new SyncJournalDamagedError(path)
      }
      length = end + 1
      if ('batch' in line) batches.push({ ...line.batch, isHalfDone: false, isStructured: false })
      else {
        const last = batches.pop()
        if (last === undefined) throw new SyncJournalDamagedError(path)
        batches.push({ ...last, isHalfDone: true, isStructured: last.isStructured || line.mark === 'structured' })
      }
    }
    if (length < text.length) await file.truncate(length)
    return { journal: new SyncJournal(path, file, length), unfinished: batches }
  }

  /** Stores a batch durably. */
  async begin(batch: Batch): Promise<void> {
    await this.#append({ batch })
  }

  /** Stores durably how far the last batch came. */
  async mark(mark: 'half' | 'structured'): Promise<void> {
    await this.#append({ mark })
  }

  /** Forgets everything: a checkpoint has followed. */
  async clear(): Promise<void> {
    if (this.#length === 0) return
    await this.#file.truncate(0)
    await this.#file.datasync()
    this.#length = 0
  }

  async close(): Promise<void> {
    await this.#file.close()
  }

  async #append(line: Line): Promise<void> {
    const text = `${formatLine(line)}\n`
    await this.#file.write(text, null, 'latin1')
    await this.#file.datasync()
    this.#length += text.length
  }

  get path(): string {
    return this.#path
  }
}

function formatLine(line: Line): string {
  const text = JSON.stringify(line, (_, value) => {
    if (value instanceof Row) return { row: Buffer.from(value.image).toString('base64'), name: value.name }
    if (typeof value === 'object' && value !== null && value.type === 'Buffer') {
      return { bytes: Buffer.from(value.data).toString('base64') }
    }
    return typeof value === 'bigint' ? { big: String(value) } : value
  })
  return `${checksum(text)} ${text}`
}

function parseLine(line: string): Line | undefined {
  const text = line.slice(17)
  if (line.slice(0, 17) !== `${checksum(text)} `) return undefined
  return JSON.parse(text, (_, value) => {
    if (typeof value !== 'object' || value === null) return value
    if (typeof value.row === 'string') return new Row(value.name, Buffer.from(value.row, 'base64'))
    if (typeof value.bytes === 'string') return Buffer.from(value.bytes, 'base64')
    return typeof value.big === 'string' ? BigInt(value.big) : value
  }) as Line
}

function checksum(text: string): string {
  return h64(text).toString(16).padStart(16, '0')
}
