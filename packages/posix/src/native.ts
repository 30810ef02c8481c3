import koffi from 'koffi'
import type { ByteString } from './bytes.ts'
import { errnoName, PosixError } from './errors.ts'

const libc = koffi.load(null)

/** A block of memory that the kernel may fill: a Node buffer and the address to hand to a system call. */
export interface Memory {
  readonly buffer: Buffer
  readonly address: number
}

/** Allocates memory whose address stays valid as long as the returned object is referenced. */
export function allocate(sizeBytes: number): Memory {
  // Not from Node's shared pool: the address must be that of this buffer for good.
  const buffer = Buffer.from(new ArrayBuffer(sizeBytes))
  return { buffer, address: addressOf(buffer) }
}

/** Memory that something else allocated, such as a WebAssembly instance's. It must never grow: growing may move it. */
export function memoryOver(memory: ArrayBufferLike): Memory {
  const buffer = Buffer.from(memory)
  return { buffer, address: addressOf(buffer) }
}

/** The address of a buffer's first byte. The caller keeps the buffer alive while the kernel may use it. */
function addressOf(buffer: Uint8Array): number {
  return Number(koffi.address(buffer))
}

type Native = (...args: (number | bigint)[]) => number

// This thread's own errno, where libc keeps it.
const errnoCell = new Int32Array(koffi.view(libc.func('__errno_location', 'uint64_t', [])(), 4))
let lastErrno = 0

/**
 * One libc function. Arguments are numbers: `i` int, `u` unsigned int, `l` 64-bit signed, `p` an address or any
 * 64-bit unsigned value. Results are `i` or `l`; `l` results arrive as number where they fit.
 */
export function libcFunction(name: string, result: 'i' | 'l', args: string): Native {
  const native = rawFunction(name, result, args)
  // The errno is read before anything else runs: V8 stops at the next function or allocation for whatever waits, and a
  // collection that waits for its helpers leaves EAGAIN (futex(2)) where the call had left ENOENT. No rest parameters:
  // these are called a million times.
  if (args.length <= 4) {
    return ((a: number, b: number, c: number, d: number) => {
      const value = native(a, b, c, d)
      if (value < 0) lastErrno = errnoCell[0] as number
      return value
    }) as Native
  }
  if (args.length > 7) throw new RangeError(`${name} has more than 7 arguments`)
  return ((a: number, b: number, c: number, d: number, e: number, f: number, g: number) => {
    const value = native(a, b, c, d, e, f, g)
    if (value < 0) lastErrno = errnoCell[0] as number
    return value
  }) as Native
}

function rawFunction(name: string, result: 'i' | 'l', args: string): Native {
  const types = { i: 'int', u: 'uint', l: 'int64_t', p: 'uint64_t' } as const
  return libc.func(
    name,
    types[result],
    [...args].map((letter) => types[letter as keyof typeof types]),
  ) as unknown as Native
}

/** As `libcFunction`, but called on a thread of libuv's pool, for calls that wait. The errno is lost. */
export function libcFunctionAsync(
  name: string,
  result: 'i' | 'l',
  args: string,
): (...args: (number | bigint)[]) => Promise<number> {
  const native = rawFunction(name, result, args) as unknown as {
    async(...args: unknown[]): void
  }
  return (...values) =>
    new Promise((resolve, reject) => {
      native.async(...values, (error: unknown, value: number) => (error ? reject(error) : resolve(value)))
    })
}

/** The errno that the last failed call of this thread left, whatever the thread has done since. */
export function errno(): number {
  return lastErrno
}

// Deep directories are opened in steps (open.ts), so no path that reaches the kernel is longer than this.
const PATH_MAX = 4096
const scratch = [allocate(PATH_MAX), allocate(PATH_MAX)] as const

/** Writes a name as a C string into one of two scratch areas and returns its address; valid until the next use. */
export function cString(bytes: string, slot: 0 | 1 = 0): number {
  const { buffer, address } = scratch[slot]
  const { length } = bytes
  if (length >= PATH_MAX) throw new PosixError('ENAMETOOLONG', { syscall: 'path', path: bytes })
  // Names are short: for those a loop is quicker than the way into Buffer.write.
  for (let i = 0; i < length; i++) {
    const byte = bytes.charCodeAt(i)
    if (byte === 0) throw new PosixError('EINVAL', { syscall: 'path', path: bytes })
    buffer[i] = byte
  }
  buffer[length] = 0
  return address
}

/** Throws the `PosixError` of the call that has just failed. */
export function fail(syscall: string, path: string): never {
  throw new PosixError(errnoName(errno()), { syscall, path })
}

/** What a fault hook is told: the system call about to be made, and the path or name it is about. */
export type SyscallHook = (syscall: string, path: string) => void

let hook: SyscallHook | undefined

/**
 * Installs a function that runs before every system call that changes something or can fail for want of resources;
 * it may throw a `PosixError`, or kill the process. For tests. `undefined` removes it.
 */
export function setSyscallHook(next: SyscallHook | undefined): void {
  hook = next
}

/** Runs the hook, if there is one. Every changing call starts with it. */
export function entering(syscall: string, path: ByteString | string): void {
  if (hook !== undefined) hook(syscall, path)
}
