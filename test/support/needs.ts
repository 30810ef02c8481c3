import { test } from 'vitest'

const told = new Set<string>()

/**
 * Whether a test that needs `what` may run, for `test.skipIf(!needs('root', isRoot))`. Where it may not, the report
 * shows one skipped test that names what is missing; in CI, where everything is installed, that test fails instead.
 * Call it while tests are collected.
 */
export function needs(what: string, present: boolean): boolean {
  if (present || told.has(what)) return present
  told.add(what)
  if (process.env['CI'] === 'true') {
    test(`needs ${what}`, () => {
      throw new Error(`${what} is missing, and in CI nothing may be skipped`)
    })
  } else test.skip(`needs ${what}`, () => {})
  return false
}
