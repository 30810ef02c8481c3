import { setSyscallHook } from '@lsync/posix'

const LOOKS_ONLY: ReadonlySet<string> = new Set([
  'openat',
  'openat2',
  'fsync',
  'fdatasync',
  'flock',
  'open_by_handle_at',
  'fsopen',
])

/** The process as it is for its disks after a SIGKILL: nothing it asks for happens any more. */
export class PowerCut extends Error {}

/**
 * Runs `use`, in which from the n-th changing system call of this thread after `arm` was called on nothing is done any more, as
 * after a kill. Returns how many calls there were, or `undefined` where the cut came.
 */
export async function withPowerCut(
  at: number,
  use: (arm: () => void) => Promise<unknown>,
): Promise<number | undefined> {
  let calls = 0
  const arm = () =>
    setSyscallHook((syscall, path) => {
      if (LOOKS_ONLY.has(syscall)) return
      if (calls++ >= at) throw new PowerCut(`${syscall} ${path}`)
    })
  try {
    await use(arm)
    return calls
  } catch (error) {
    if (calls <= at) throw error
    return undefined
  } finally {
    setSyscallHook(undefined)
  }
}
