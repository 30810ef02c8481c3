import { mkdirSync, readdirSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { OperationEncoder, parseTarget, remoteTarget, SshConnections, type Target } from '@lsync/sync'
import { describe, expect, test } from 'vitest'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { hasNetem, hasNetwork, useNetwork } from '../support/network.ts'
import { hasSshd, type SshServer, startSshServer } from '../support/sshd.ts'
import { batchOf, fileOf, meta, never, path } from './wire.ts'

const isRoot = process.geteuid?.() === 0
const lsync = fileURLToPath(new URL('../../packages/cli/bin/lsync', import.meta.url))
const mayRun = [needs('root', isRoot), needs('sshd', hasSshd), needs('network namespaces', hasNetwork)].every(Boolean)

describe.skipIf(!mayRun)('a target at the other end of a bad line', () => {
  const network = useNetwork()
  const disk = useFileSystem('ext4')

  async function across(
    timeoutMs: number,
    use: (target: Target, at: string, server: SshServer) => Promise<void>,
  ): Promise<void> {
    const { left, right } = network.current
    const server = await startSshServer({ namespace: right })
    const at = `${disk.current.fresh()}/t`
    mkdirSync(at)
    const address = parseTarget(`ssh://${server.user}@${server.address}${at}`)
    if (address.scheme === 'local') throw new Error('not remote')
    const target = remoteTarget(address, {
      connections: new SshConnections(),
      rsh: [...left.enter, ...server.ssh].join(' '),
      remoteLsync: lsync,
      timeoutMs,
    })
    try {
      await use(target, at, server)
    } finally {
      network.current.mend()
      network.current.disturb({})
      await target.close()
      await server.stop()
    }
  }

  test('gets everything over a line that loses packets, late and slow', async () => {
    await across(60_000, async (target, at) => {
      await target.open(never)
      network.current.disturb({ lossPercent: 2, bitsPerSecond: 50e6, ...(hasNetem ? { delayMs: 10 } : {}) })
      const content = 'a line that is said again and again\n'.repeat(1000)
      const results = await Promise.all(
        Array.from({ length: 100 }, (_, i) => target.deliver(i % 8, batchOf(fileOf(`f${i}`, content + i)))),
      )
      expect(results.flat()).toEqual([])
      await target.barrier({ root: 'r', sequence: 1 })
      for (let i = 0; i < 100; i++) expect(readFileSync(`${at}/f${i}`, 'latin1')).toBe(content + i)
    })
  })

  test('is given up when the line is cut in mid-file, and goes on after it is mended', async () => {
    await across(6000, async (target, at, server) => {
      await target.open(never)
      await target.deliver(0, batchOf(fileOf('f', 'old')))
      const encoder = new OperationEncoder()
      encoder.operation({ do: 'file', path: path('f'), meta: meta(), sizeBytes: 1 << 20, extents: [[0, 1 << 20]] })
      encoder.content(Buffer.alloc(1000, 'n'))
      await target.deliver(0, encoder.take())
      network.current.cut()
      await expect(target.barrier({ root: 'r', sequence: 9 })).rejects.toMatchObject({ code: 'CONNECTION_LOST' })
      await target.close()
      await expect(target.open(never)).rejects.toMatchObject({ code: expect.stringMatching(/^CONNECT/) })
      network.current.mend()
      // What stands at the other end does not know yet that its client is gone.
      server.cutConnections()
      const state = await target.open(never)
      expect(state.checkpoint).toBeUndefined()
      expect(readFileSync(`${at}/f`, 'latin1')).toBe('old')
      expect(readdirSync(`${at}/../.lsync.sync.t/stage`)).toEqual([])
      expect(await target.deliver(0, batchOf(fileOf('f', 'new')))).toEqual([])
      expect(readFileSync(`${at}/f`, 'latin1')).toBe('new')
    })
  })
})
