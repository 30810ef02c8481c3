import { appendFileSync, existsSync, rmSync, writeFileSync } from 'node:fs'
import { request } from 'node:http'
import { setTimeout as delay } from 'node:timers/promises'
import {
  type ContainerRoot,
  Home,
  leasesOf,
  type MetricsAddress,
  metricsText,
  parseMetricsAddress,
  serveMetrics,
  statusOfHome,
} from '@lsync/container-root'
import { describe, expect, test } from 'vitest'
import { dir, file } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { canMountImages } from '../support/ready.ts'
import { makeSite, withRoot } from './roots.ts'

async function get(address: MetricsAddress, path: string): Promise<{ status: number; text: string }> {
  const where = 'path' in address ? { socketPath: address.path } : address
  return new Promise((resolve, reject) => {
    request({ ...where, path }, (response) => {
      let text = ''
      response.setEncoding('utf8').on('data', (piece) => {
        text += piece
      })
      response.on('end', () => resolve({ status: response.statusCode ?? 0, text }))
    })
      .on('error', reject)
      .end()
  })
}

/** The value of each metric of one root, by its name and labels. */
function valuesIn(text: string): Map<string, number> {
  const lines = text.split('\n').filter((line) => line !== '' && !line.startsWith('#'))
  return new Map(
    lines.map((line) => [line.slice(0, line.lastIndexOf(' ')), Number(line.slice(line.lastIndexOf(' ') + 1))]),
  )
}

describe('an address of metrics', () => {
  test.each([
    ['unix:/run/l.sock', { path: '/run/l.sock' }],
    ['127.0.0.1:9110', { host: '127.0.0.1', port: 9110 }],
    ['[::1]:1', { host: '::1', port: 1 }],
  ])('%s', (text, address) => expect(parseMetricsAddress(text)).toEqual(address))

  test.each(['0.0.0.0:1', '10.0.0.1:1', '127.0.0.1:70000', '127.0.0.1', 'unix:', 'unix:relative', ''])(
    '%s is none that only this machine reaches',
    (text) => expect(() => parseMetricsAddress(text)).toThrow(expect.objectContaining({ code: 'METRICS_ADDRESS' })),
  )
})

describe.skipIf(!canMountImages())('the status of a root', () => {
  const disk = useFileSystem('ext4')
  const site = () => {
    const at = disk.current.fresh()
    return makeSite(at, at, dir({ big: file('x'.repeat(100_000)), same: file('y'.repeat(10_000)) }))
  }

  test('says what it takes: what is shared with a fork, and what no view shows any more', async () => {
    const made = await site()
    await withRoot(made, 'one', async (root) => {
      await root.mount()
      writeFileSync(`${root.mergedPath}/big`, 'z'.repeat(3000))
      await root.solidify()
      rmSync(`${root.mergedPath}/same`)
      await root.solidify()
      writeFileSync(`${root.mergedPath}/upper`, 'u'.repeat(500))
      const space = { upperBytes: 500, replicaBytes: 3000, layerBytes: 113_000, shadowedBytes: 110_000 }
      expect((await root.status({ space: true })).space).toEqual({ ...space, sharedBytes: 0 })
      expect((await root.status()).space).toBeUndefined()
      await root.convert({ to: 'sealed' })
      await root.gc({ keep: 1 })
      expect((await root.status({ space: true })).space).toMatchObject({ ...space, replicaBytes: expect.any(Number) })
    })
  })

  test('says what failed last, and of the sync how far it is behind', async () => {
    const made = await site()
    await withRoot(made, 'one', async (root) => {
      await root.mount()
      expect((await root.status()).lastErrors).toEqual([])
      await withRoot(made, 'two', async (other) => {
        for (let i = 0; i < 2; i++) await expect(other.mount()).rejects.toMatchObject({ code: 'LEASE_HELD' })
        expect((await other.status()).lastErrors).toMatchObject([{ verb: 'mount', code: 'LEASE_HELD' }])
      })
      const sync = await root.startSync()
      appendFileSync(`${root.mergedPath}/new`, 'x')
      await sync.flush()
      expect((await root.status()).sync?.targets).toMatchObject([{ lagMs: 0, failures: [] }])
      const home = Home.open(made.home)
      expect(await statusOfHome(home, leasesOf(home))).toMatchObject({
        head: 1,
        versions: 1,
        layers: 1,
        layerForm: 'tree',
        lease: { epoch: 1, isReleased: false },
        nodes: [{ version: 1 }],
      })
      home.close()
    })
  })

  test('is served in the form of Prometheus, to this machine only', async () => {
    const made = await site()
    await withRoot(made, 'one', async (root: ContainerRoot) => {
      await root.mount()
      const path = `${made.node('one').path}/metrics.sock`
      const collect = async () => [await root.status({ space: true })]
      const [local, loopback] = [
        await serveMetrics({ path }, collect),
        await serveMetrics({ host: '127.0.0.1', port: 0 }, collect),
      ]
      try {
        for (const address of [{ path }, { host: '127.0.0.1', port: loopback.port ?? 0 }]) {
          const { status, text } = await get(address, '/metrics')
          expect(status).toBe(200)
          const values = valuesIn(text)
          expect(values.get('lsync_root_mounted{root="lab"}')).toBe(1)
          expect(values.get('lsync_root_newest_version{root="lab"}')).toBe(1)
          expect(values.get('lsync_root_lease_is_ours{root="lab"}')).toBe(1)
          expect(values.get('lsync_root_space_bytes{root="lab",kind="layer"}')).toBe(110_000)
          expect((await get(address, '/')).status).toBe(404)
        }
        await root.startSync()
        await delay(10)
        const status = await root.status()
        const odd = { ...status, name: 'a"b\\c' }
        expect(metricsText([odd])).toMatch(/lsync_root_sync_lag_seconds\{root="a\\"b\\\\c",target="[^"]+"\} [\d.]+\n/)
        // Each metric is described once, whatever number of roots has it.
        const described = metricsText([status, odd]).match(/^# TYPE .*$/gm) ?? []
        expect(new Set(described).size).toBe(described.length)
      } finally {
        await local.close()
        await loopback.close()
      }
      expect(existsSync(path)).toBe(false)
    })
  })
})
