import { mkdirSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { createConnection } from 'node:net'
import { tmpdir } from 'node:os'
import { close, hostPath, LsyncError, openRoot } from '@lsync/posix'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { type LineClient, LineConnection, LineSocket } from './line-socket.ts'

const NAME = 'test.sock'

describe('LineSocket', () => {
  let directory: string
  let fd: number
  let socket: LineSocket | undefined

  beforeEach(() => {
    // Longer than a path to a socket may be.
    directory = `${tmpdir()}/lsync-line-socket-${process.pid}/${'d'.repeat(200)}`
    mkdirSync(directory, { recursive: true })
    fd = openRoot(hostPath(directory))
  })

  afterEach(async () => {
    await socket?.close()
    socket = undefined
    close(fd)
    rmSync(`${directory}/..`, { recursive: true })
  })

  async function connectTo(client: LineClient): Promise<LineConnection> {
    socket = await LineSocket.listen(fd, NAME, () => client)
    const connection = await LineConnection.open(fd, NAME)
    if (connection === undefined) throw new Error('nobody listens')
    return connection
  }

  it('answers each request, is for its owner alone, and is gone when it is closed', async () => {
    const connection = await connectTo({ answer: async ({ of }) => ({ square: Number(of) ** 2 }) })
    expect(await connection.ask({ of: 3 })).toEqual({ result: { square: 9 } })
    expect(await connection.ask({ of: 4 })).toEqual({ result: { square: 16 } })
    expect(statSync(`${directory}/${NAME}`).mode & 0o777).toBe(0o600)
    connection.close()
    await socket?.close()
    expect(await LineConnection.open(fd, NAME)).toBeUndefined()
  })

  it('takes the place of what a killed process left', async () => {
    writeFileSync(`${directory}/${NAME}`, '')
    writeFileSync(`${directory}/${NAME}.new`, '')
    const connection = await connectTo({ answer: async () => 'here' })
    expect(await connection.ask({})).toEqual({ result: 'here' })
    connection.close()
  })

  it('hands on what an answer throws', async () => {
    const connection = await connectTo({
      answer: async () => {
        throw new LsyncError('SOME_CODE', 'it failed', { hint: 'do this' })
      },
    })
    await expect(connection.ask({})).rejects.toMatchObject({ code: 'SOME_CODE', message: 'it failed', hint: 'do this' })
    connection.close()
  })

  it('says so where the other process ends before it answers, and stops waiting when told to', async () => {
    const connection = await connectTo({ answer: () => new Promise(() => undefined) })
    const stop = new AbortController()
    const asked = connection.ask({}, stop.signal)
    stop.abort(new Error('enough'))
    await expect(asked).rejects.toThrow('enough')
    const second = connection.ask({})
    await socket?.close()
    expect(await second).toBeUndefined()
  })

  it('goes on where a client is gone before it read its answers', async () => {
    const connection = await connectTo({ answer: async () => 'x'.repeat(1_000_000) })
    for (let round = 0; round < 3; round++) {
      const raw = createConnection(`/proc/self/fd/${fd}/${NAME}`)
      await new Promise<void>((resolve) => raw.once('connect', () => resolve()))
      raw.write('{}\n{}\n{}\n')
      // Some of it has come, the rest is lost with the connection.
      await new Promise<void>((resolve) => raw.once('readable', () => resolve()))
      raw.destroy()
    }
    expect(await connection.ask({})).toEqual({ result: 'x'.repeat(1_000_000) })
    connection.close()
  })

  it('refuses what is no request, and keeps no line without an end', async () => {
    const closed = Promise.withResolvers<void>()
    const connection = await connectTo({ answer: async () => 'here', onClose: () => closed.resolve() })
    connection.close()
    await closed.promise
    const raw = createConnection(`/proc/self/fd/${fd}/${NAME}`)
    raw.write('no JSON\n')
    const answer = await new Promise<Buffer>((resolve) => raw.once('data', resolve))
    expect(JSON.parse(answer.toString())).toMatchObject({ error: { code: 'SYNC_REQUEST_INVALID' } })
    const ended = new Promise<void>((resolve) => raw.once('close', () => resolve()))
    raw.on('error', () => undefined)
    raw.write('x'.repeat(100_000))
    await ended
  })
})
