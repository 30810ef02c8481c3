import { parentPort } from 'node:worker_threads'
import { LsyncError } from '@lsync/posix'
import {
  type CompareTreesOptions,
  compareDirectories,
  emptyComparisonPart,
  type FromCompareWorker,
  OpenTree,
  type ToCompareWorker,
} from './compare.ts'
import type { EntryPath } from './model/path.ts'

let trees: { expected: OpenTree; actual: OpenTree; options: CompareTreesOptions } | undefined

parentPort?.on('message', (message: ToCompareWorker) => {
  if ('end' in message) {
    parentPort?.close()
    return
  }
  if ('options' in message) {
    const { expectedFd, actualFd, emulated, options } = message
    trees = { expected: new OpenTree(expectedFd, emulated), actual: new OpenTree(actualFd), options }
    return
  }
  try {
    parentPort?.postMessage({ part: compareAll(message.paths, message.budgetMs) } satisfies FromCompareWorker)
  } catch (error) {
    const { message: text } = error instanceof Error ? error : new Error(String(error))
    const code = error instanceof LsyncError ? error.code : undefined
    parentPort?.postMessage({ error: { code, message: text } } satisfies FromCompareWorker)
  }
})

// Depth first within the budget; what is left goes back to be shared out.
function compareAll(paths: readonly EntryPath[], budgetMs: number) {
  const { expected, actual, options } = trees as NonNullable<typeof trees>
  const part = emptyComparisonPart<EntryPath, EntryPath>()
  const pending = [...paths]
  const start = performance.now()
  for (let path = pending.pop(); path !== undefined; path = pending.pop()) {
    compareDirectories(expected, actual, { path, expected: path, actual: path }, options, part)
    pending.push(...part.next.map((pair) => pair.path))
    part.next.length = 0
    if (performance.now() - start > budgetMs) break
  }
  part.next.push(...pending.map((path) => ({ path, expected: path, actual: path })))
  return part
}
