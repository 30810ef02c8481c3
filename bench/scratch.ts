import { mkdirSync, readdirSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { runCommand, stopCommands } from './command.ts'

/** Undoes one thing that the harness made: unmounts, stops a server, removes a folder. */
type Undo = () => void

/** Raised in the middle of a run when the user interrupts it, so that every `finally` on the way out runs. */
export class InterruptedError extends Error {
  readonly signal: NodeJS.Signals

  constructor(signal: NodeJS.Signals) {
    super(`interrupted by ${signal}`)
    this.name = 'InterruptedError'
    this.signal = signal
  }
}

/**
 * The folder of one run and what has to be undone when it ends, newest first, however it ends.
 * Folders are named after the process, and those of processes that were killed are removed by the next run.
 */
export class Scratch {
  readonly path: string
  #undos: Undo[] = []
  #interruptedBy: NodeJS.Signals | undefined

  constructor(parent: string) {
    removeLeftovers(parent)
    this.path = join(parent, `bench-lsync-${process.pid}`)
    mkdirSync(this.path, { recursive: true })
    this.#undos.push(() => rmSync(this.path, { recursive: true, force: true }))
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const)
      process.on(signal, () => {
        this.#interruptedBy ??= signal
        stopCommands()
      })
  }

  /** Makes a folder beneath the scratch folder and returns its path. */
  folder(name: string): string {
    const path = join(this.path, name)
    mkdirSync(path, { recursive: true })
    return path
  }

  /** Registers what undoes a step just taken. Returns a function that undoes it now, once. */
  onCleanup(undo: Undo): Undo {
    this.#undos.push(undo)
    return () => {
      const index = this.#undos.indexOf(undo)
      if (index < 0) return
      this.#undos.splice(index, 1)
      undo()
    }
  }

  /** The signal by which the user asked to stop, if any. */
  get interruptedBy(): NodeJS.Signals | undefined {
    return this.#interruptedBy
  }

  /**
   * Lets signals in and stops if one has come. Generators and waits call it between steps, since everything that
   * takes long here either blocks or is another process.
   *
   * @throws {InterruptedError}
   */
  async checkInterrupted(): Promise<void> {
    await new Promise((resolve) => setImmediate(resolve))
    if (this.#interruptedBy !== undefined) throw new InterruptedError(this.#interruptedBy)
  }

  /** Undoes everything that is left, newest first. Goes on after a failure, and prints it. */
  cleanup(): void {
    for (let undo = this.#undos.pop(); undo !== undefined; undo = this.#undos.pop()) {
      try {
        undo()
      } catch (error) {
        process.stderr.write(`bench: cleaning up: ${error instanceof Error ? error.message : String(error)}\n`)
      }
    }
  }
}

function removeLeftovers(parent: string): void {
  for (const name of readdirSync(parent)) {
    const pid = /^bench-lsync-(\d+)$/.exec(name)?.[1]
    if (pid === undefined || isRunning(Number(pid))) continue
    // Mounts of a dead run vanished with its mount namespace.
    rmSync(join(parent, name), { recursive: true, force: true })
  }
}

function isRunning(pid: number): boolean {
  try {
    process.kill(pid, 0)
    return true
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM'
  }
}

/** Mounts and registers the unmounting. Returns a function that unmounts now. */
export function mount(scratch: Scratch, args: readonly string[], mountpoint: string): () => void {
  runCommand(['mount', ...args, mountpoint])
  return scratch.onCleanup(() => {
    try {
      runCommand(['umount', mountpoint])
    } catch {
      // A measured program that was killed can leave a child with an open file there; detach and let it end.
      runCommand(['umount', '--lazy', mountpoint])
    }
  })
}
