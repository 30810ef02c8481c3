// Loaded before everything else (node --import), in each thread of a process: kills the process at the n-th system call
// of a thread that changes something.
import { isMainThread } from 'node:worker_threads'
import { setSyscallHook } from '@lsync/posix'

const LOOKS_ONLY: ReadonlySet<string> = new Set([
  'openat',
  'openat2',
  'fsync',
  'fdatasync',
  'flock',
  'open_by_handle_at',
])
const wanted = Number(process.env[isMainThread ? 'LSYNC_TEST_KILL_MAIN' : 'LSYNC_TEST_KILL_WORKER'] ?? -1)
let calls = 0
setSyscallHook((syscall) => {
  if (LOOKS_ONLY.has(syscall) || calls++ !== wanted) return
  process.kill(process.pid, 'SIGKILL')
  // The signal is on its way; nothing may happen before it arrives.
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 10_000)
})
