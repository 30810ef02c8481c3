import { leaveMappings, trimFreedMemory } from '@lsync/posix'

/** What changes the memory of the process while it goes on: commits, and the opening and closing of indexes. */
let busy = 0
const mapped = new Set<string>()

/** Runs something during which the mappings of indexes may change. */
export async function whileMapping<T>(work: () => Promise<T>): Promise<T> {
  busy++
  try {
    return await work()
  } finally {
    busy--
  }
}

/** An index is open: pages of this file need not stay in the process when nothing happens. */
export function addMapped(file: string): void {
  mapped.add(file)
}

export function removeMapped(file: string): void {
  mapped.delete(file)
}

/** Garbage of this thread, where the process may collect it at will (`node --expose-gc`, as `lsync sync` runs). */
export function collectGarbage(): void {
  const { gc } = globalThis as { gc?: (how: object) => void }
  gc?.({ type: 'major', execution: 'sync', flavor: 'last-resort' })
}

/**
 * Gives back what a first pass or a comparison has left: garbage, freed memory, and pages of the indexes, which the kernel
 * keeps. Returns whether it could: not while an index is written to.
 */
export function giveBackMemory(): boolean {
  if (busy > 0) return false
  collectGarbage()
  trimFreedMemory()
  leaveMappings(mapped)
  return true
}
