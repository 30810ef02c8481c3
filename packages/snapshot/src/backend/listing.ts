import { type FileKind, isFileName, type ListedFile } from './backend.ts'
import { BackendAnswerError } from './errors.ts'
import type { RemoteOptions } from './retries.ts'

// Packs of the usual 16 MiB are then 64 TiB.
const MAX_LISTED_FILES = 4_000_000

/** Counts what a storage lists, since a hostile one may never end. */
export class ListingLimit {
  readonly #what: string
  readonly #location: string
  readonly #limit: number
  #count = 0

  constructor(what: string, location: string, { maxListedFiles = MAX_LISTED_FILES }: RemoteOptions) {
    this.#what = what
    this.#location = location
    this.#limit = maxListedFiles
  }

  /**
   * Names that no repository has count, too.
   * @throws {BackendAnswerError}
   */
  count(files: number): void {
    this.#count += files
    if (this.#count > this.#limit) {
      throw new BackendAnswerError(this.#what, this.#location, `its list has more than ${this.#limit} files`)
    }
  }
}

/**
 * The file that lies at a path beneath the directory of its kind, as restic lays them out: packs in folders of the
 * first two digits of their names, all others side by side. `undefined` for what is none.
 */
export function listedAt(kind: FileKind, path: string, sizeBytes: number): ListedFile | undefined {
  const name = kind === 'pack' && /^[0-9a-f]{2}\//.test(path) ? path.slice(3) : path
  const isInPlace = kind !== 'pack' || path === `${name.slice(0, 2)}/${name}`
  const isSize = Number.isSafeInteger(sizeBytes) && sizeBytes >= 0
  return isInPlace && isSize && isFileName(name) ? { name, sizeBytes } : undefined
}
