/** How what changes last travels in a switch: as all else does, as a sealed layer of its own, or as is quicker. */
export type LastDelta = 'auto' | 'tree' | 'sealed'

/** How quick a store is, and what else a switch does while the container stands still. In ms. */
export interface StoreRates {
  /** For one more small file, when many are carried over. */
  readonly fileMs: number
  readonly bytesPerMs: number
  /** What does not depend on how much has changed. */
  readonly fixedMs: number
}

/** How much has changed. */
export interface Changed {
  readonly names: number
  readonly bytes: number
}

/** For how long a container would stand still, and why. */
export interface Prediction extends Changed {
  readonly form: 'tree' | 'sealed'
  /** To carry over what changed last. */
  readonly deltaMs: number
  readonly fixedMs: number
}

/** One pass over changes, while the container ran. */
interface Round {
  readonly durationMs: number
  readonly files: number
  readonly bytes: number
}

/** Disks and networks that nothing was measured of. */
const BYTES_PER_MS = 100_000
// To start mkfs.erofs, to mount its image and to compare the two; measured with layers of a few files on ext4 and MooseFS.
const SEAL_MS = 150
/** Of each file: read twice, from the image once. */
const SEAL_FILE_MS = 0.2
const SEAL_BYTES_PER_MS = 50_000
// Unmounting, comparing a small upper, messages between the nodes, mounting.
const STEPS_MS = 200
/** Records that are made or replaced on the store from the stop to the start, each one a small file and a rename. */
const STORE_STEPS = 40
/** Fewer say nothing of one more. */
const TELLING_FILES = 50
const TELLING_BYTES = 16 << 20
// What sync writes has another name first, and gets its metadata: 1.2 ms on a MooseFS on which one small file takes 0.85 ms.
const SYNCED_FILE = 1.4

/** What the passes so far say of a store; `smallFileMs` is what one small file takes there by itself. */
export function ratesOf(rounds: readonly Round[], smallFileMs: number): StoreRates {
  const byFiles = rounds.filter(({ files }) => files >= TELLING_FILES).at(-1)
  const byBytes = rounds.filter(({ bytes }) => bytes >= TELLING_BYTES).at(-1)
  const bytesPerMs = byBytes === undefined ? BYTES_PER_MS : byBytes.bytes / byBytes.durationMs
  const fileMs =
    byFiles === undefined
      ? smallFileMs * SYNCED_FILE
      : Math.max(0, byFiles.durationMs - byFiles.bytes / BYTES_PER_MS) / byFiles.files
  return { fileMs, bytesPerMs, fixedMs: STEPS_MS + STORE_STEPS * smallFileMs }
}

/** How long changes would take, in the quickest form that is allowed. Pure. */
export function predict({ names, bytes }: Changed, rates: StoreRates, allowed: LastDelta): Prediction {
  const treeMs = names * rates.fileMs + bytes / rates.bytesPerMs
  const sealedMs = SEAL_MS + names * SEAL_FILE_MS + bytes / SEAL_BYTES_PER_MS + bytes / rates.bytesPerMs
  const isSealed = names > 0 && (allowed === 'sealed' || (allowed === 'auto' && sealedMs < treeMs))
  const form = isSealed ? 'sealed' : 'tree'
  return { form, names, bytes, deltaMs: isSealed ? sealedMs : treeMs, fixedMs: rates.fixedMs }
}
