import { appendFileSync, mkdirSync, readFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { holdTestDirectory, testDirectory } from './image.ts'
import { type Shared, useShared } from './shared.ts'
import { isPresent, start, unmount } from './system.ts'

/** Whether `usePoorStore` can work here. */
export const hasPoorStore = isPresent('rclone') && isPresent('fusermount')

/** A mounted store that has files and directories and nothing else: no hard links, no nodes, no xattrs, no owners. */
export interface PoorStore {
  readonly root: string
  fresh(): string
}

let stores = 0

/** One such store (a directory, mounted by `rclone mount`) for all tests of the surrounding `describe`. */
export function usePoorStore(): Shared<PoorStore> {
  let stop: (() => Promise<void>) | undefined
  const begin = async (): Promise<PoorStore> => {
    const release = holdTestDirectory()
    const base = `${testDirectory()}/poor${++stores}`
    const root = `${base}/mount`
    for (const path of [base, `${base}/files`, root]) mkdirSync(path)
    // Nothing is kept in memory, so that every look is one at the files.
    const fresh = ['--dir-cache-time', '0s', '--attr-timeout', '0s', '--vfs-cache-mode', 'off']
    const child = start(`${base}/log`, 'rclone', '--config', '', 'mount', ...fresh, `${base}/files`, root)
    appendFileSync(
      `${testDirectory()}/stop.sh`,
      `umount -l ${root}\ngrep -qs ${base} /proc/${child.pid}/cmdline && kill ${child.pid}\n`,
    )
    const ended = new Promise((resolve) => child.once('exit', resolve))
    for (let attempt = 0; !readFileSync('/proc/self/mountinfo', 'utf8').includes(` ${root} `); attempt++) {
      if (attempt > 600 || child.exitCode !== null) throw new Error(readFileSync(`${base}/log`, 'utf8'))
      await delay(50)
    }
    stop = async () => {
      unmount(root)
      child.kill('SIGTERM')
      await ended
      release()
    }
    let roots = 0
    return {
      root,
      fresh() {
        const path = `${root}/t${++roots}`
        mkdirSync(path)
        return path
      },
    }
  }
  return useShared('the poor store', begin, () => stop?.())
}
