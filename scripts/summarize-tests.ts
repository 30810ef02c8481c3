import { readFileSync } from 'node:fs'

/** The part of Vitest's JSON report that counts. */
interface Report {
  readonly numPassedTests: number
  readonly numFailedTests: number
  readonly numPendingTests: number
  readonly numTodoTests: number
  readonly testResults: readonly { readonly status: string; readonly assertionResults: readonly unknown[] }[]
}

const [path = '', vitestStatus = '1', ...failedChecks] = process.argv.slice(2)
const text = readFileSync(path, 'utf8')
const report: Report | undefined = text === '' ? undefined : JSON.parse(text)

const passed = report?.numPassedTests ?? 0
const skipped = (report?.numPendingTests ?? 0) + (report?.numTodoTests ?? 0)
// A file that did not even load has no tests that could fail.
const brokenFiles = report?.testResults.filter(
  ({ status, assertionResults }) => status === 'failed' && assertionResults.length === 0,
)
let failed = (report?.numFailedTests ?? 0) + (brokenFiles?.length ?? 0)
if (failed === 0 && vitestStatus !== '0') failed = 1
failed += failedChecks.length

if (failedChecks.length > 0) console.log(`failed besides the tests: ${failedChecks.join(', ')}`)
console.log(`${passed} passed, ${failed} failed, ${skipped} skipped`)
process.exitCode = failed === 0 ? 0 : 1
