import { existsSync, globSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import type { RootStatus } from '@lsync/container-root'
import { describe, expect, onTestFinished, test } from 'vitest'
import { lsync, startLsync } from '../cli/lsync.ts'
import { buildTree, dir, file } from '../support/build.ts'
import { hasClients, mountClient, type StoreClient } from '../support/client-store.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { canMountImages } from '../support/ready.ts'

type Node = 'one' | 'two'

/** Two nodes, each with a client of its own to one store, on which nothing but the built command works. */
interface Lab {
  readonly clients: Readonly<Record<Node, StoreClient>>
  run(node: Node, ...args: string[]): ReturnType<typeof lsync>
  start(node: Node, ...args: string[]): ReturnType<typeof startLsync>
  merged(node: Node): string
  upper(node: Node): string
}

describe.skipIf(!needs('root, bindfs and file-system tools', canMountImages() && hasClients))(
  'a store that does not answer',
  () => {
    const disk = useFileSystem('ext4')

    async function setUp(leaseDuration: string): Promise<Lab> {
      const at = disk.current.fresh()
      for (const path of ['files', 'one', 'two']) mkdirSync(`${at}/${path}`, { mode: 0o700 })
      buildTree(`${at}/base`, dir({ etc: dir({ hostname: file('lab') }) }))
      const clients = {
        one: await mountClient(`${at}/files`, `${at}/store-one`),
        two: await mountClient(`${at}/files`, `${at}/store-two`),
      }
      const of = (node: Node, args: readonly string[]) => [...args, '--state', `${at}/${node}`]
      const run = (node: Node, ...args: string[]) => lsync(of(node, args))
      const home = (node: Node) => `${clients[node].root}/home`
      const lease = ['--lease-duration', leaseDuration]
      expect(run('one', 'root', 'init', 'lab', '--home', home('one'), '--base', `${at}/base`, ...lease).code).toBe(0)
      expect(run('one', 'root', 'mount', 'lab').code).toBe(0)
      expect(run('two', 'root', 'compact', 'lab').code).toBe(1)
      expect(run('two', 'hooks', 'lab', '--home', home('two')).code).toBe(0)
      onTestFinished(() => {
        for (const node of ['one', 'two'] as const) run(node, 'root', 'unmount', 'lab')
      })
      return {
        clients,
        run,
        start: (node, ...args) => startLsync(of(node, args)),
        merged: (node) => `${at}/${node}/roots/lab/merged`,
        upper: (node) => `${at}/${node}/roots/lab/upper`,
      }
    }

    /** A `sync` of node one that follows its root. */
    async function follow({ start }: Lab): Promise<ReturnType<typeof startLsync>> {
      const follower = start('one', 'root', 'sync', 'lab', '--json')
      onTestFinished(() => void follower.child.kill('SIGKILL'))
      await new Promise<void>((resolve, reject) => {
        follower.child.stdout?.on('data', (text) => {
          if (String(text).includes('"following"')) resolve()
        })
        void follower.ended.then(({ stderr }) => reject(new Error(stderr)))
      })
      return follower
    }

    test('for a while keeps a solidify waiting, and nothing else happens to it', async () => {
      const { clients, start, run, merged } = await setUp('1m')
      writeFileSync(`${merged('one')}/etc/new`, 'new')
      clients.one.freeze()
      const { child, ended } = start('one', 'solidify', 'lab')
      await delay(2000)
      expect(child.exitCode).toBe(null)
      clients.one.thaw()
      expect(await ended).toMatchObject({ code: 0, stdout: expect.stringMatching(/^version 2 /) })
      expect(run('one', 'root', 'unmount', 'lab').code).toBe(0)
      expect(run('two', 'root', 'mount', 'lab').code).toBe(0)
      expect(readFileSync(`${merged('two')}/etc/new`, 'utf8')).toBe('new')
    })

    test('until another node has taken over leaves the old node nothing to write: all that it tries is refused', async () => {
      const lab = await setUp('2s')
      const { clients, start, run, merged, upper } = lab
      const follower = await follow(lab)
      writeFileSync(`${merged('one')}/etc/saved`, 'one')
      expect(run('one', 'solidify', 'lab')).toMatchObject({ code: 0, stdout: expect.stringMatching(/^version 2 /) })
      clients.one.freeze()
      // Its container goes on: what it writes lies on its own disk. The solidify waits for the store.
      writeFileSync(`${upper('one')}/late`, 'one')
      const waiting = start('one', 'solidify', 'lab')
      expect(run('two', 'root', 'mount', 'lab', '--takeover')).toMatchObject({ code: 0 })
      expect(readFileSync(`${merged('two')}/etc/saved`, 'utf8')).toBe('one')
      writeFileSync(`${merged('two')}/by-two`, 'two')
      expect(run('two', 'solidify', 'lab').stdout).toMatch(/^version \d+ /)
      const versions = run('two', 'root', 'versions', 'lab').stdout
      clients.one.thaw()
      expect(await waiting.ended).toMatchObject({
        code: 1,
        stderr: expect.stringMatching(/\(LEASE_(LOST|UNREACHABLE)\)/),
      })
      expect(await follower.ended).toMatchObject({ stderr: expect.stringContaining('LEASE_LOST') })
      for (const verb of [['solidify'], ['solidify', '--live'], ['root', 'sync'], ['root', 'mount']]) {
        const [command = '', ...rest] = verb
        const args = command === 'root' ? [command, ...rest, 'lab'] : [command, 'lab', ...rest]
        expect([verb, run('one', ...args)]).toEqual([
          verb,
          expect.objectContaining({ code: 1, stderr: expect.stringContaining('(LEASE_LOST)') }),
        ])
      }
      expect(run('two', 'root', 'versions', 'lab').stdout).toBe(versions)
      expect(run('two', 'solidify', 'lab', '--live').code).toBe(0)
      // What it had written is its own still.
      expect(readFileSync(`${upper('one')}/late`, 'utf8')).toBe('one')
      expect(run('two', 'root', 'unmount', 'lab').code).toBe(0)
    })

    test('since its client died is found again by the agent once it is mounted, and what was written meanwhile carried over', async () => {
      const { clients, start, run, upper } = await setUp('1m')
      const agent = start('one', 'root', 'agent', '--look', '200ms')
      onTestFinished(() => void agent.child.kill('SIGKILL'))
      const isCarriedOver = () => {
        const { stdout } = run('one', 'root', 'status', 'lab', '--json')
        const [target] = (JSON.parse(stdout || '{}') as RootStatus).sync?.targets ?? []
        return target?.lagMs === 0 && target.checkpoint !== undefined
      }
      await until(isCarriedOver)
      await clients.one.die()
      // What its container has open goes on; names that lie in dead layers cannot be looked up.
      writeFileSync(`${upper('one')}/meanwhile`, 'one')
      await delay(1000)
      await clients.one.mount()
      const [copy] = globSync(`${clients.two.root}/home/incoming/1/*/tree`)
      await until(() => existsSync(`${copy}/meanwhile`))
      agent.child.kill('SIGTERM')
      expect(await agent.ended).toMatchObject({ code: 0, stderr: expect.stringContaining('HOME_MISSING') })
    })

    test('since its client died is not taken for an empty one, and goes on when it is mounted again', async () => {
      const lab = await setUp('1m')
      const { clients, run, merged } = lab
      writeFileSync(`${merged('one')}/etc/new`, 'new')
      const follower = await follow(lab)
      const before = run('one', 'root', 'status', 'lab', '--json').stdout
      expect(before).toContain('"isMounted":true')
      await clients.one.die()
      const { root } = clients.one
      for (const args of [
        ['root', 'mount', 'lab'],
        ['root', 'sync', 'lab'],
        ['root', 'mount', 'lab', '--force'],
        ['root', 'compact', 'lab'],
        ['root', 'gc', 'lab', '--yes'],
        ['root', 'rollback', 'lab', '--to', '1', '--discard', '--yes'],
        ['root', 'versions', 'lab'],
        ['solidify', 'lab'],
        ['solidify', 'lab', '--live'],
        ['switch', 'lab', '--resume'],
      ]) {
        expect([args, run('one', ...args)]).toEqual([
          args,
          expect.objectContaining({ code: 1, stderr: expect.stringContaining('(HOME_MISSING)') }),
        ])
      }
      await delay(1000)
      // Nothing was written where the store was.
      expect(readdirSync(root)).toEqual([])
      follower.child.kill('SIGTERM')
      await follower.ended
      await clients.one.mount()
      // The layers below the container are dead with the client; what it wrote is not.
      expect(run('one', 'root', 'unmount', 'lab')).toMatchObject({ code: 0 })
      expect(run('one', 'root', 'mount', 'lab')).toMatchObject({ code: 0 })
      expect(readFileSync(`${merged('one')}/etc/new`, 'utf8')).toBe('new')
      expect(run('one', 'solidify', 'lab')).toMatchObject({ code: 0 })
      expect(run('one', 'root', 'unmount', 'lab').code).toBe(0)
      expect(run('two', 'root', 'mount', 'lab').code).toBe(0)
      expect(existsSync(`${merged('two')}/etc/new`)).toBe(true)
    })
  },
)

async function until(holds: () => boolean): Promise<void> {
  const endMs = performance.now() + 60_000
  while (!holds()) {
    if (performance.now() > endMs) throw new Error('it has not come to that within a minute')
    await delay(100)
  }
}
