import { errnoOf, PosixError } from './errors.ts'
import { allocate, fail, libcFunction } from './native.ts'
import { close, O_CLOEXEC, O_NONBLOCK } from './open.ts'

const pipeNative = libcFunction('pipe2', 'i', 'pi')
const dupNative = libcFunction('dup3', 'i', 'iii')

const ends = allocate(8)

/** What `watchReadable` gives back. `close` leaves the fd itself open. */
export interface ReadableWatch {
  /** Nothing is read until `resume`; what comes meanwhile waits in the kernel. */
  pause(): void
  resume(): void
  close(): void
}

/**
 * Reads an fd (non-blocking, with a working poll(2): fanotify, inotify, pipes) whenever the event loop finds something to
 * read, and hands each read's bytes to `take`, which may keep them only until it returns. Needs no thread and no timer: at
 * rest it costs nothing. `failed` gets the error that ended it.
 */
export function watchReadable(
  fd: number,
  bufferBytes: number,
  take: (bytes: Buffer) => void,
  failed: (error: PosixError) => void,
): ReadableWatch {
  // Not imported: loading it costs every command some milliseconds, and few watch.
  const { Socket } = process.getBuiltinModule('node:net')
  // Node's loop waits only for fds that it takes for a pipe, socket or terminal. So it is given a pipe, in whose place
  // the other file is put before the loop first looks at it; from then on it polls and reads that.
  if (pipeNative(ends.address, O_CLOEXEC | O_NONBLOCK) < 0) fail('pipe2', '')
  const [readEnd, writeEnd] = [ends.buffer.readInt32LE(0), ends.buffer.readInt32LE(4)]
  const buffer = Buffer.allocUnsafeSlow(bufferBytes)
  const onread = {
    buffer,
    callback(length: number) {
      take(buffer.subarray(0, length))
      return true
    },
  }
  // `manualStart` is what keeps it from reading at once; Node's own child processes use it, its types lack it.
  const options = { fd: readEnd, readable: true, writable: false, manualStart: true, onread }
  const socket = new Socket(options)
  const replaced = dupNative(fd, readEnd, O_CLOEXEC)
  close(writeEnd)
  if (replaced < 0) {
    socket.destroy()
    fail('dup3', '')
  }
  socket.on('error', (cause) => {
    failed(new PosixError(errnoOf(cause) ?? 'EIO', { syscall: 'read', path: 'a watched descriptor' }))
  })
  socket.resume()
  return {
    pause: () => void socket.pause(),
    resume: () => void socket.resume(),
    close: () => void socket.destroy(),
  }
}
