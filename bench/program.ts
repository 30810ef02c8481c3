import { join } from 'node:path'
import { runCommand } from './command.ts'
import type { Scratch } from './scratch.ts'

/** The C programs of the harness, compiled for this run: absolute paths. */
export type Programs = { floor: string; measure: string; fingerprint: string }

/**
 * Compiles the C programs beside this file with `cc -O2`.
 *
 * @throws {CommandFailedError} when there is no C compiler, or it refuses
 */
export function compilePrograms(scratch: Scratch): Programs {
  const folder = scratch.folder('programs')
  const compile = (name: string): string => {
    const program = join(folder, name)
    runCommand(['cc', '-O2', '-o', program, join(import.meta.dirname, `${name}.c`)])
    return program
  }
  return { floor: compile('floor'), measure: compile('measure'), fingerprint: compile('fingerprint') }
}
