import { readFileSync } from 'node:fs'

/**
 * The arguments of this process as text in which each byte that is not UTF-8 is a lone surrogate, as `textOf` has it,
 * so that `hostPath` gives the very bytes that were typed.
 */
export async function commandLine(): Promise<string[]> {
  const args = process.argv.slice(2)
  if (!args.some((argument) => argument.includes('\ufffd'))) return args
  // Node has put U+FFFD in place of what is not UTF-8; the kernel still has the bytes.
  const { textOf } = await import('@lsync/posix')
  const raw = readFileSync('/proc/self/cmdline', 'latin1').split('\0').slice(0, -1)
  return raw.slice(raw.length - args.length).map(textOf)
}
