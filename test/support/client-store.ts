import { type ChildProcess, spawn } from 'node:child_process'
import { appendFileSync, mkdirSync, readFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { onTestFinished } from 'vitest'
import { testDirectory } from './image.ts'
import { isPresent, run } from './system.ts'

/** Whether `mountClient` can work here. */
export const hasClients = isPresent('bindfs')

/** One node's client of a store that several mount, by FUSE: a process, which can stand still or die like that of any network file system. */
export interface StoreClient {
  readonly root: string
  /** Nobody gets an answer until `thaw`. The calling process must not ask. */
  freeze(): void
  thaw(): void
  /** The client dies; what is open of it is dead, and its mount gone: only the empty directory is left. */
  die(): Promise<void>
  /** Another client takes its place. */
  mount(): Promise<void>
}

/** Mounts `files` on the new directory `root`; ended with the test. */
export async function mountClient(files: string, root: string): Promise<StoreClient> {
  mkdirSync(root)
  let child: ChildProcess
  let ended: Promise<unknown>
  const mount = async () => {
    // Without caches of its own, so that each look is one at the files.
    const options = 'attr_timeout=0,entry_timeout=0,negative_timeout=0,dev,suid'
    child = spawn('bindfs', ['-f', '-o', options, files, root], { stdio: 'ignore' })
    ended = new Promise((resolve) => child.once('exit', resolve))
    const { pid } = child
    appendFileSync(
      `${testDirectory()}/stop.sh`,
      `umount -l ${root}\ngrep -qs ${root} /proc/${pid}/cmdline && kill -KILL ${pid}\n`,
    )
    for (let attempt = 0; !readFileSync('/proc/self/mountinfo', 'utf8').includes(` ${root} `); attempt++) {
      if (attempt > 600 || child.exitCode !== null) throw new Error(`bindfs mounts nothing on ${root}`)
      await delay(20)
    }
  }
  const die = async () => {
    child.kill('SIGKILL')
    await ended
    run('umount', '-l', root)
  }
  await mount()
  onTestFinished(async () => {
    if (child.exitCode === null && child.signalCode === null) await die()
  })
  return {
    root,
    freeze: () => void child.kill('SIGSTOP'),
    thaw: () => void child.kill('SIGCONT'),
    die,
    mount,
  }
}
