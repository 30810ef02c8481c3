import { once } from 'node:events'
import { type AddressInfo, createServer, Socket } from 'node:net'
import { buffer } from 'node:stream/consumers'
import { expect, test } from 'vitest'
import { gatherWrites } from './gather-writes.ts'

/** What arrived, and of how many pieces each call of the system was. */
async function send(use: (socket: Socket) => void | Promise<void>) {
  const server = createServer({ allowHalfOpen: false })
  server.listen(0, '127.0.0.1')
  await once(server, 'listening')
  const received = once(server, 'connection').then(([peer]) => buffer(peer as Socket))
  const socket = new Socket()
  const calls: number[] = []
  socket._writev = function (chunks, done) {
    calls.push(chunks.length)
    Socket.prototype._writev?.call(this, chunks, done)
  }
  socket.connect((server.address() as AddressInfo).port, '127.0.0.1')
  await once(socket, 'connect')
  gatherWrites(socket)
  await use(socket)
  const bytes = await received
  server.close()
  return { text: bytes.toString(), calls }
}

test('what is written within one turn goes out together, in its order', async () => {
  const { text, calls } = await send(async (socket) => {
    for (const part of ['a', 'b', 'c']) socket.write(part)
    await new Promise(setImmediate)
    for (const part of ['d', 'e']) socket.write(part)
    await new Promise(setImmediate)
    socket.end()
  })
  expect(text).toBe('abcde')
  expect(calls).toEqual([3, 2])
})

test('nothing is left behind when the socket ends in the turn in which it was written to', async () => {
  const { text } = await send((socket) => {
    socket.write('a')
    socket.write('b')
    socket.end('c')
  })
  expect(text).toBe('abc')
})

test('a writer is told that its bytes are gone', async () => {
  await send(async (socket) => {
    await new Promise<void>((resolve) => socket.write('a', () => resolve()))
    socket.end()
  })
})
