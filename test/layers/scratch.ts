import { mkdtempSync, rmSync } from 'node:fs'
import { onTestFinished } from 'vitest'
import { close, hostPath, openRoot } from '../../packages/posix/src/index.ts'

/** A new directory in RAM, and an fd of it, both gone when the test ends. */
export function scratch(): { path: string; fd: number; host: (name: string) => ReturnType<typeof hostPath> } {
  const made = makeScratch()
  onTestFinished(made.remove)
  return made
}

/** As `scratch`, for the runs of a property, each of which cleans up after itself. */
export function makeScratch() {
  const path = mkdtempSync('/dev/shm/lsync-layers-')
  const fd = openRoot(hostPath(path))
  return {
    path,
    fd,
    host: (name: string) => hostPath(`${path}/${name}`),
    remove: () => {
      close(fd)
      rmSync(path, { recursive: true, force: true })
    },
  }
}
