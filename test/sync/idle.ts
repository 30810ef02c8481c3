import { type ChildProcessWithoutNullStreams, spawn } from 'node:child_process'
import { once } from 'node:events'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'

/** A process that waits for something to happen. */
export interface Idle<Answer> {
  readonly child: ChildProcessWithoutNullStreams
  readonly ready: { readonly ready: string; readonly tookMs: number }
  ask(): Promise<Answer>
}

/** Runs idle-watcher.ts or idle-sync.ts, behind `prefix`, for as long as `use` takes. */
export async function withIdle<Answer>(
  prefix: readonly string[],
  what: 'watcher' | 'sync',
  args: readonly string[],
  use: (idle: Idle<Answer>) => Promise<void>,
): Promise<void> {
  const program = fileURLToPath(new URL(`./idle-${what}.ts`, import.meta.url))
  const [command = '', ...rest] = [...prefix, process.execPath, program, ...args]
  const child = spawn(command, rest)
  let complaint = ''
  child.stderr.on('data', (text) => {
    complaint += text
  })
  const lines = createInterface({ input: child.stdout })[Symbol.asyncIterator]()
  const line = async () => {
    const { value, done } = await lines.next()
    if (done) throw new Error(`the process ended: ${complaint}`)
    return JSON.parse(value)
  }
  const ended = once(child, 'exit')
  try {
    const ready = await line()
    await use({
      child,
      ready,
      ask: () => {
        child.stdin.write('?\n')
        return line()
      },
    })
  } finally {
    child.stdin.end()
    await ended
  }
}
