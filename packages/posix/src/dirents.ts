import type { ByteString } from './bytes.ts'
import { allocate, fail, libcFunction, type Memory } from './native.ts'

const getdentsNative = libcFunction('syscall', 'l', 'lipp')
const lseekNative = libcFunction('lseek', 'l', 'ili')
const SYS_getdents64 = process.arch === 'arm64' ? 61 : 217

export const DT_UNKNOWN = 0
export const DT_FIFO = 1
export const DT_CHR = 2
export const DT_DIR = 4
export const DT_BLK = 6
export const DT_REG = 8
export const DT_LNK = 10
export const DT_SOCK = 12

const BUFFER_BYTES = 32 * 1024
const spare: Memory[] = []

/**
 * Calls `visit` for every name in an open directory except `.` and `..`, in the file system's own order. `type` is a
 * DT_* constant, DT_UNKNOWN where the file system does not tell (then `statAt` does). Reads from the start each time.
 * A callback may read other directories; when it gives back `false`, that was enough.
 */
export function readDirents(fd: number, visit: (name: ByteString, type: number) => unknown): void {
  const memory = spare.pop() ?? allocate(BUFFER_BYTES)
  const { buffer, address } = memory
  try {
    lseekNative(fd, 0, 0)
    for (;;) {
      const end = getdentsNative(SYS_getdents64, fd, address, BUFFER_BYTES)
      if (end < 0) fail('getdents64', '')
      if (end === 0) return
      for (let at = 0; at < end; ) {
        const length = buffer.readUInt16LE(at + 16)
        let stop = at + 19
        while (buffer[stop] !== 0) stop++
        const name = buffer.toString('latin1', at + 19, stop)
        const type = buffer[at + 18] as number
        at += length
        if (name !== '.' && name !== '..' && visit(name as ByteString, type) === false) return
      }
    }
  } finally {
    spare.push(memory)
  }
}
