import type { Socket } from 'node:net'

/**
 * Has a connected socket hand over what is written within one turn of the event loop by one system call. ssh2 writes length,
 * content and tag of each packet by themselves, and without Nagle's delay each would be a segment of its own.
 */
export function gatherWrites(socket: Socket): void {
  const write = socket.write.bind(socket) as (...args: unknown[]) => boolean
  let isGathering = false
  socket.write = ((...args: unknown[]) => {
    if (!isGathering) {
      isGathering = true
      socket.cork()
      process.nextTick(() => {
        isGathering = false
        socket.uncork()
      })
    }
    return write(...args)
  }) as Socket['write']
}
