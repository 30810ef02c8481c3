import { spawn, spawnSync } from 'node:child_process'
import { closeSync, openSync } from 'node:fs'
import { createRequire } from 'node:module'

// The oracle mounts with calls of its own, so that a mistake in the product's mount code cannot hide from it. koffi is
// a dependency of @lsync/posix alone.
interface Koffi {
  load(path: null): { func(name: string, result: string, args: string[]): (...args: unknown[]) => number }
  errno(): number
}
const koffi: Koffi = createRequire(new URL('../../packages/posix/src/index.ts', import.meta.url))('koffi')
const libc = koffi.load(null)
const mountNative = libc.func('mount', 'int', ['str', 'str', 'str', 'ulong', 'str'])
const umountNative = libc.func('umount2', 'int', ['str', 'int'])
const mmapNative = libc.func('mmap', 'int64_t', ['int64_t', 'uint64_t', 'int', 'int', 'int', 'int64_t'])
const munmapNative = libc.func('munmap', 'int', ['int64_t', 'uint64_t'])
const setnsNative = libc.func('setns', 'int', ['int', 'int'])
const memsetNative = libc.func('memset', 'int64_t', ['int64_t', 'int', 'uint64_t'])

export const MS_RDONLY = 1
const MNT_DETACH = 2
const EINVAL = 22
const EBUSY = 16
// What a garbage collection between the call and the look at its errno leaves there.
const EAGAIN = 11

/** mount(2) failed; `errno` is its number. */
export class MountError extends Error {
  readonly errno: number
  constructor(type: string, options: string, errno: number) {
    super(`mount -t ${type} -o ${options} failed: errno ${errno}`)
    this.errno = errno
  }
}

/** mount(2). At most 4095 bytes of options: the kernel would silently cut the rest. */
export function mount(source: string, target: string, type: string, flags: number, options: string): void {
  if (options.length > 4000) throw new Error(`mount options too long: ${options.length} bytes`)
  if (mountNative(source, target, type, flags, options) < 0) throw new MountError(type, options, koffi.errno())
}

// Five seconds: an image that was mounted from a file is let go of by the kernel some time after its last descriptor.
const UNMOUNT_ATTEMPTS = 500

/** Unmounts, waiting a moment for a last user to let go; lazily when it does not. `false` when nothing was mounted. */
export function unmount(target: string): boolean {
  for (let attempt = 0; ; attempt++) {
    if (umountNative(target, attempt < UNMOUNT_ATTEMPTS ? 0 : MNT_DETACH) >= 0) {
      if (attempt >= UNMOUNT_ATTEMPTS)
        throw new Error(`${target} was busy and had to be unmounted lazily: an fd was left open`)
      return true
    }
    const code = koffi.errno()
    if (code === EINVAL || code === 2) return false
    if (code !== EBUSY && code !== EAGAIN) throw new Error(`umount ${target} failed: errno ${code}`)
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 10)
  }
}

/** A shared mapping of an open file's first bytes, which outlives the fd. */
export interface SharedMapping {
  fill(offset: number, length: number, byte: number): void
  unmap(): void
}

/** mmap(2), shared and writable. `undefined` where the file system cannot. */
export function mapShared(fd: number, length: number): SharedMapping | undefined {
  const PROT_READ_WRITE = 3
  const MAP_SHARED = 1
  const address = mmapNative(0, length, PROT_READ_WRITE, MAP_SHARED, fd, 0)
  if (Number(address) === -1) return undefined
  return {
    fill: (offset, count, byte) => void memsetNative(BigInt(address) + BigInt(offset), byte, count),
    unmap: () => void munmapNative(address, length),
  }
}

/** Fills `length` bytes at `offset` through a shared mapping, the way of writing that no write(2) sees. */
export function mapAndFill(fd: number, offset: number, length: number, byte: number): boolean {
  const mapping = mapShared(fd, offset + length)
  mapping?.fill(offset, length, byte)
  mapping?.unmap()
  return mapping !== undefined
}

/** Runs a command and gives its stdout; throws with its stderr when it fails. */
export function run(command: string, ...args: string[]): string {
  const { status, stdout, stderr, error } = spawnSync(command, args, { encoding: 'utf8' })
  if (error !== undefined) throw error
  if (status !== 0) throw new Error(`${command} ${args.join(' ')}: ${stderr || stdout} (exit ${status})`)
  return stdout
}

/** Whether a command is installed. */
export function isPresent(command: string): boolean {
  return spawnSync('sh', ['-c', `command -v ${command}`]).status === 0
}

/** Starts a process that writes its output to `log`; the caller stops it by its id. */
export function start(log: string, command: string, ...args: string[]): ReturnType<typeof spawn> {
  const fd = openSync(log, 'a')
  const child = spawn(command, args, { stdio: ['ignore', fd, fd] })
  closeSync(fd)
  return child
}

/**
 * Puts this thread, and with it the processes and threads it starts from now on, into a network namespace
 * (`/var/run/netns/…`). Returns the way back.
 */
export function enterNetworkNamespace(path: string): () => void {
  const CLONE_NEWNET = 0x4000_0000
  const home = openSync('/proc/thread-self/ns/net', 'r')
  const enter = (fd: number) => {
    if (setnsNative(fd, CLONE_NEWNET) < 0) throw new Error(`setns ${path} failed: errno ${koffi.errno()}`)
  }
  const fd = openSync(path, 'r')
  enter(fd)
  closeSync(fd)
  return () => {
    enter(home)
    closeSync(home)
  }
}
