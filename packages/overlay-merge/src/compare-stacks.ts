import { type CompareTreesOptions, type Comparison, compareTrees, ResolvedTree } from './compare.ts'
import { closeStack, openStack, type StackRequest } from './stack.ts'

/**
 * Compares what two stacks show, unmounted, whether or not they have layers in common. Reads both views; file content only with
 * `content`.
 */
export async function compareStacks(
  expected: StackRequest,
  actual: StackRequest,
  options: CompareTreesOptions = {},
): Promise<Comparison> {
  const one = openStack(expected, false)
  try {
    const other = openStack(actual, false)
    try {
      return await compareTrees(new ResolvedTree(one), new ResolvedTree(other), options)
    } finally {
      closeStack(other)
    }
  } finally {
    closeStack(one)
  }
}
