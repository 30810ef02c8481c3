import { closeSync, existsSync, mkdirSync, openSync, rmSync, writeSync } from 'node:fs'
import { dirname } from 'node:path'
import { type Ability, bytesOf, type HostPath, probe, randomHex, textOf } from '@lsync/posix'

/** How the layers of a home are kept: as directories, or each as one image. */
export type LayerStorage = 'tree' | 'sealed'

/** What a store can hold, found out by trying. */
export interface StoreFindings {
  /** What new layers should be by default: `tree` wherever the store can hold one exactly. */
  readonly storage: LayerStorage
  /** What keeps trees out, by the names of `lsync probe`; empty for `tree`. */
  readonly lacking: readonly string[]
  /** What it takes to make one small file here, the median of some. On network file systems, milliseconds. */
  readonly smallFileMs: number
}

// What a layer may hold and a tree therefore needs. Times, holes and chattr flags are not among them: what is lost of those is named.
const NEEDED: readonly Ability[] = [
  'trustedXattrs',
  'userXattrs',
  'whiteouts',
  'devices',
  'fifos',
  'sockets',
  'hardLinks',
  'symlinks',
  'keepsOwner',
  'keepsSetuid',
  'byteNames',
]
const TRIES = 9
const CONTENT = Buffer.alloc(1024, 'lsync')

/** What a home that is to be made at `path` should keep its layers as: see `tryStore`. */
export function layerFormFor(path: HostPath): LayerStorage {
  const text = textOf(path)
  return tryStore(existsSync(text) ? path : (bytesOf(dirname(text)) as HostPath)).storage
}

/** Tries what the store that holds `directory` can keep. Everything that it makes there is gone afterwards. */
export function tryStore(directory: HostPath): StoreFindings {
  const { abilities, canBeOverlayLower } = probe(directory)
  const lacking: string[] = NEEDED.filter((name) => abilities[name].value !== true)
  if (abilities.foldsCase.value === true) lacking.push('foldsCase')
  if (!canBeOverlayLower.ok && lacking.length === 0) lacking.push('canBeOverlayLower')
  return { storage: lacking.length === 0 ? 'tree' : 'sealed', lacking, smallFileMs: smallFileMs(directory) }
}

/** What it takes to make one small file in a directory, the median of some; they are gone afterwards. */
export function smallFileMs(directory: HostPath): number {
  const scratch = `${textOf(directory)}/.lsync-try-${randomHex(8)}`
  mkdirSync(scratch, { mode: 0o700 })
  try {
    const times = Array.from({ length: TRIES }, (_, index) => {
      const startMs = performance.now()
      const fd = openSync(`${scratch}/${index}`, 'wx')
      try {
        writeSync(fd, CONTENT)
      } finally {
        closeSync(fd)
      }
      return performance.now() - startMs
    })
    return times.sort((left, right) => left - right)[TRIES >> 1] as number
  } finally {
    rmSync(scratch, { recursive: true, force: true })
  }
}
