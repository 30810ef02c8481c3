import { readFileSync } from 'node:fs'
import { libcFunction } from './native.ts'

const trimNative = optional('malloc_trim')
const madviseNative = libcFunction('madvise', 'i', 'pli')

const MADV_DONTNEED = 4

function optional(name: string): ((pad: bigint) => number) | undefined {
  try {
    return libcFunction(name, 'i', 'l')
  } catch {
    return undefined // musl has none, and gives back what is freed by itself
  }
}

/** Gives memory that was freed back to the kernel: glibc keeps it, for each thread, as it was at its highest. */
export function trimFreedMemory(): void {
  trimNative?.(0n)
}

/**
 * Takes the pages of shared read-only mappings of some files out of this process; they stay in the page cache, and come
 * back when they are read. Nobody may map or unmap these files meanwhile. Returns how many bytes were mapped.
 */
export function leaveMappings(files: ReadonlySet<string>): number {
  let bytes = 0
  for (const line of readFileSync('/proc/self/maps', 'latin1').split('\n')) {
    // 7f00-7f10 r--s 00000000 08:01 42   /path
    const [, start, end, path] = /^([0-9a-f]+)-([0-9a-f]+) r--s \S+ \S+ \d+ +(.*)$/.exec(line) ?? []
    if (start === undefined || end === undefined || path === undefined || !files.has(path)) continue
    const [from, to] = [BigInt(`0x${start}`), BigInt(`0x${end}`)]
    // Of a shared mapping it drops nothing but this process's way to the pages.
    if (madviseNative(from, to - from, MADV_DONTNEED) === 0) bytes += Number(to - from)
  }
  return bytes
}
