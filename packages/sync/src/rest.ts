import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
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

let collect: ((how: object) => void) | undefined

/** Garbage of this thread. */
export function collectGarbage(): void {
  collect ??= findCollector()
  collect({ type: 'major', execution: 'sync', flavor: 'last-resort' })
}

// A context that is made while the flag is set has the function. With the flag set from the start on, Node's own modules
// take three times as long to load (node:worker_threads 9 ms instead of 3), in each thread again. It is the flag of all
// threads, and stays: one that took it back would do so while another makes its context.
function findCollector(): (how: object) => void {
  setFlagsFromString('--expose-gc')
  return runInNewContext('gc')
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
