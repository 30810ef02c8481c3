import { existsSync } from 'node:fs'
import { enableCompileCache } from 'node:module'

/**
 * Takes compiled code from the bundle's own place, where `scripts/build.ts` has made one, and leaves there what is new.
 * Nowhere else: whoever could write to it would have code of theirs run. For this thread alone; ask before loading.
 */
export function useCodeCache(): void {
  const cache = `${import.meta.dirname}/cache`
  if (existsSync(cache)) enableCompileCache(cache)
}
