import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { cpSync, existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { ContainerRoot, collectGarbage, FileLeases, type LeaseClaim, leaseNameOf } from '@lsync/container-root'
import { setSyscallHook } from '@lsync/posix'
import { describe, expect, onTestFinished, test } from 'vitest'
import { dir, file } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { canMountImages } from '../support/ready.ts'
import { makeSite, type Site, withRoot } from './roots.ts'

describe.skipIf(!canMountImages())('two nodes that want to write one root', () => {
  const disk = useFileSystem('ext4')

  const setUp = (): Promise<Site> => {
    const at = disk.current.fresh()
    return makeSite(at, at, dir({ etc: dir({ hostname: file('lab') }) }))
  }

  /** Another node takes the root away from the first, publishes a version with a file in it, and leaves. */
  const takeAway = (site: Site, name: string) =>
    withRoot(site, 'two', async (other) => {
      await other.mount({ takeover: 'force' })
      writeFileSync(`${other.mergedPath}/${name}`, 'two')
      await other.solidify()
      await other.unmount()
    })

  const restore = (site: Site, from: string) => {
    rmSync(site.home, { recursive: true })
    cpSync(from, site.home, { recursive: true, preserveTimestamps: true })
  }

  /** A root that is mounted on node one without changes, and that another node has taken away meanwhile. */
  const setUpOvertaken = async (): Promise<Site> => {
    const site = await setUp()
    const first = await ContainerRoot.open(site.home, 'lab', { state: site.node('one') })
    await first.mount()
    await first.close()
    await takeAway(site, 'by-two')
    return site
  }

  test('a root that stayed mounted on an old version is no ground for the next one', async () => {
    const site = await setUpOvertaken()
    // Nothing was written here, so that the lease may be claimed anew; what lies under the upper is old all the same.
    await withRoot(site, 'one', async (root) => {
      await expect(root.solidify()).rejects.toMatchObject({ code: 'UPPER_STALE' })
      await expect(root.solidify({ live: true })).rejects.toMatchObject({ code: 'UPPER_STALE' })
      expect(root.versions()).toHaveLength(2)
      await root.mount()
      expect(readFileSync(`${root.mergedPath}/by-two`, 'utf8')).toBe('two')
      await root.solidify()
      expect(existsSync(`${root.mergedPath}/by-two`)).toBe(true)
    })
  })

  test('a root without changes that was taken over meanwhile is unmounted without complaint', async () => {
    const site = await setUpOvertaken()
    await withRoot(site, 'one', async (root) => {
      expect(await root.unmount()).toEqual({ hasChanges: false })
      expect(await root.unmount()).toEqual({ hasChanges: false })
      await root.mount()
      expect(existsSync(`${root.mergedPath}/by-two`)).toBe(true)
    })
  })

  test('a process that still holds a lease which another node took needs no other rule than one that starts anew', async () => {
    const site = await setUp()
    await withRoot(site, 'one', async (root) => {
      await root.mount()
      await root.solidify()
      await takeAway(site, 'by-two')
      // It learns of it here, by its own heartbeat; nothing was written, so nothing is lost with the old claim.
      await root.mount()
      expect(existsSync(`${root.mergedPath}/by-two`)).toBe(true)
      writeFileSync(`${root.mergedPath}/by-one`, 'one')
      await takeAway(site, 'by-two-again')
      await expect(root.mount()).rejects.toMatchObject({ code: 'LEASE_LOST' })
    })
  })

  test('an upper that lies on an old version is not followed, and nothing is claimed for it', async () => {
    const site = await setUp()
    await withRoot(site, 'one', async (root) => {
      await takeAway(site, 'by-two')
      await withRoot(site, 'two', async (other) => {
        // Nobody needs the layers any more that the first node would begin with.
        await other.compact({ maxLayers: 1, intoBottom: true })
        await other.gc({ keep: 1 })
      })
      await expect(root.startSync()).rejects.toMatchObject({ code: 'UPPER_STALE' })
      expect((await root.leases.read())?.claim.epoch).toBe(1)
      await root.mount()
      await root.startSync()
      expect(readFileSync(`${root.mergedPath}/by-two`, 'utf8')).toBe('two')
    })
  })

  test('a node whose changes were overtaken is refused, and may give them up', async () => {
    const site = await setUp()
    await withRoot(site, 'one', async (root) => {
      await root.mount()
      writeFileSync(`${root.mergedPath}/by-one`, 'one')
      await takeAway(site, 'by-two')
      await expect(root.solidify()).rejects.toMatchObject({ code: 'LEASE_LOST' })
      await expect(root.mount()).rejects.toMatchObject({ code: 'LEASE_LOST' })
      expect(readFileSync(`${root.mergedPath}/by-one`, 'utf8')).toBe('one')
      await root.mount({ discard: true })
      expect(readFileSync(`${root.mergedPath}/by-two`, 'utf8')).toBe('two')
      expect(existsSync(`${root.mergedPath}/by-one`)).toBe(false)
      await root.solidify()
    })
  })

  test('a sync that follows goes on when a solidify is refused, and the refusal is what is told', async () => {
    const site = await setUp()
    await withRoot(site, 'one', async (root) => {
      await root.mount()
      await root.startSync()
      writeFileSync(`${root.mergedPath}/by-one`, 'one')
      await takeAway(site, 'by-two')
      await expect(root.solidify()).rejects.toMatchObject({ code: 'LEASE_LOST' })
      await root.mount({ discard: true })
      await root.startSync()
      await root.solidify()
    })
  })

  test('a gc in the middle of a rollback takes none of the layers that it goes back to', async () => {
    const site = await setUp()
    let atCheck: (() => Promise<unknown>) | undefined
    class WatchedLeases extends FileLeases {
      override async assertNewest(claim: LeaseClaim): Promise<void> {
        await super.assertNewest(claim)
        await atCheck?.()
      }
    }
    const root = await ContainerRoot.open(site.home, 'lab', {
      state: site.node('one'),
      leases: ({ leaseDirectory }) => new WatchedLeases(leaseDirectory),
    })
    try {
      await root.mount()
      // Each live version replaces the layer of the one before, so nothing but version 2 has this one.
      for (const text of ['then', 'now']) {
        writeFileSync(`${root.mergedPath}/text`, text)
        await root.solidify({ live: true })
      }
      await root.unmount()
      atCheck = () => collectGarbage(root.home, { keep: 1 })
      const { number } = await root.rollback({ to: 2, discard: true })
      atCheck = undefined
      expect(root.home.head().number).toBe(number)
      await root.mount()
      expect(readFileSync(`${root.mergedPath}/text`, 'utf8')).toBe('then')
    } finally {
      await root.unmount().catch(() => undefined)
      await root.close()
    }
  })

  test('a version that is published after another node took over by force does not count', async () => {
    const site = await setUp()
    let looksUntilSleep = 0
    let whileItSleeps: () => Promise<unknown> = async () => undefined
    class SleepyLeases extends FileLeases {
      override async assertNewest(claim: LeaseClaim): Promise<void> {
        await super.assertNewest(claim)
        if (--looksUntilSleep === 0) await whileItSleeps()
      }
    }
    const root = await ContainerRoot.open(site.home, 'lab', {
      state: site.node('one'),
      leases: ({ leaseDirectory }) => new SleepyLeases(leaseDirectory),
    })
    try {
      await root.mount()
      writeFileSync(`${root.mergedPath}/by-one`, 'one')
      await withRoot(site, 'two', async (other) => {
        whileItSleeps = () => other.mount({ takeover: 'force' })
        root.events.on('step', ({ step }) => {
          // The first look comes before the layer gets its place, the second one right before the publication.
          if (step === 'synced') looksUntilSleep = 2
        })
        await expect(root.solidify()).rejects.toMatchObject({ code: 'LEASE_LOST' })
        writeFileSync(`${other.mergedPath}/by-two`, 'two')
        await other.solidify()
        expect(other.versions().map(({ layers }) => layers.length)).toEqual([1, 2])
        expect(existsSync(`${other.mergedPath}/by-one`)).toBe(false)
        // What it wrote is in its upper still.
        await expect(root.mount()).rejects.toMatchObject({ code: 'LEASE_LOST' })
        expect(readFileSync(`${root.statePath}/upper/by-one`, 'utf8')).toBe('one')
        await other.gc({ keep: 1, graceMs: 0 })
        // The first one lies under both mounts; the fence and what came after it too late are gone.
        expect(readdirSync(`${site.home}/versions`).sort()).toEqual(['1.json', '4.json'])
      })
    } finally {
      await root.unmount().catch(() => undefined)
      await root.close()
    }
  })

  test('a node that was killed right after it had claimed the root goes on with its own claim', async () => {
    const site = await setUp()
    await withRoot(site, 'one', async (root) => {
      await new FileLeases(root.home.leaseDirectory).acquire({ node: leaseNameOf(root.node) })
      await withRoot(site, 'two', (other) => expect(other.mount()).rejects.toMatchObject({ code: 'LEASE_HELD' }))
      await root.mount()
      writeFileSync(`${root.mergedPath}/by-one`, 'one')
      expect((await root.solidify()).version.layers).toHaveLength(2)
    })
  })

  test('a store that was restored from an older copy is refused, whoever asks first', async () => {
    const site = await setUp()
    const backup = `${site.home}.backup`
    await withRoot(site, 'one', async (root) => {
      await root.mount()
      cpSync(site.home, backup, { recursive: true, preserveTimestamps: true })
      await root.unmount()
      // Two more claims, and a version, that the copy knows nothing of.
      await root.mount()
      writeFileSync(`${root.mergedPath}/by-one`, 'one')
      await root.solidify()
      await root.unmount()
      await root.mount()
      await root.unmount()
    })
    rmSync(site.home, { recursive: true })
    renameSync(backup, site.home)
    await withRoot(site, 'one', async (root) => {
      await expect(root.mount()).rejects.toMatchObject({ code: 'STORE_WENT_BACK' })
      await expect(root.mount({ takeover: 'expired' })).rejects.toMatchObject({ code: 'STORE_WENT_BACK' })
      // On purpose it goes on from what the copy has.
      await root.mount({ takeover: 'force' })
      expect(existsSync(`${root.mergedPath}/by-one`)).toBe(false)
    })
  })

  test('a store that was restored from a copy made under the same lease is refused, mounted or not', async () => {
    const site = await setUp()
    const wentBack = { code: 'STORE_WENT_BACK' }
    const state = site.node('one')
    const first = await ContainerRoot.open(site.home, 'lab', { state })
    await first.mount()
    cpSync(site.home, `${site.home}.old`, { recursive: true, preserveTimestamps: true })
    writeFileSync(`${first.mergedPath}/by-one`, 'one')
    await first.solidify()
    writeFileSync(`${first.mergedPath}/later`, 'one')
    await first.close()
    restore(site, `${site.home}.old`)
    await withRoot(site, 'one', async (root) => {
      for (const verb of [() => root.solidify(), () => root.solidify({ live: true }), () => root.mount()]) {
        await expect(verb()).rejects.toMatchObject(wentBack)
      }
      await root.unmount()
      await expect(root.mount()).rejects.toMatchObject(wentBack)
      await expect(root.rollback({ to: 1, discard: true })).rejects.toMatchObject(wentBack)
      expect(root.versions()).toHaveLength(1)
      // What it wrote last, and the layer of the version that is gone, are here.
      expect(readFileSync(`${root.statePath}/upper/later`, 'utf8')).toBe('one')
      const [replica] = readdirSync(`${root.statePath}/replicas`)
      expect(readFileSync(`${root.statePath}/replicas/${replica}/by-one`, 'utf8')).toBe('one')
      await root.mount({ takeover: 'force', discard: true })
      expect(existsSync(`${root.mergedPath}/by-one`)).toBe(false)
      await root.solidify()
    })
  })

  test('a store that was restored from an older copy and written since by another node is refused', async () => {
    const site = await setUp()
    const write = (node: string, name: string) =>
      withRoot(site, node, async (root) => {
        await root.mount()
        writeFileSync(`${root.mergedPath}/${name}`, node)
        await root.solidify()
        await root.unmount()
      })
    await write('one', 'first')
    cpSync(site.home, `${site.home}.old`, { recursive: true, preserveTimestamps: true })
    await write('one', 'lost')
    restore(site, `${site.home}.old`)
    // It claims the epoch that node one had, and makes a version of the number that was lost.
    await write('two', 'by-two')
    await withRoot(site, 'one', async (root) => {
      await expect(root.mount()).rejects.toMatchObject({ code: 'STORE_WENT_BACK' })
      expect((await root.leases.read())?.isReleased).toBe(true)
      const replicas = readdirSync(`${root.statePath}/replicas`)
      expect(replicas.some((id) => existsSync(`${root.statePath}/replicas/${id}/lost`))).toBe(true)
      await root.mount({ takeover: 'force' })
      expect(readFileSync(`${root.mergedPath}/by-two`, 'utf8')).toBe('two')
      expect(existsSync(`${root.mergedPath}/lost`)).toBe(false)
    })
  })

  test('claims of numbers that a killed node left behind are collected', async () => {
    const site = await setUp()
    await withRoot(site, 'one', async (root) => {
      mkdirSync(`${site.home}/versions/2.claim`)
      await root.mount()
      writeFileSync(`${root.mergedPath}/by-one`, 'one')
      expect((await root.solidify()).version.number).toBe(3)
      await root.gc()
      expect(readdirSync(`${site.home}/versions`).sort()).toEqual(['1.json', '3.json'])
    })
  })

  test('a version that came too late to count never does, whatever gc removes', async () => {
    const site = await setUp()
    await withRoot(site, 'one', async ({ home, node }) => {
      const { layers } = home.head()
      const draft = { layers, madeBy: 'rollback', nodeId: node.id, nodeName: node.name } as const
      const publish = (epoch: number) => home.publishVersion(draft, { epoch, check: async () => undefined })
      await publish(2)
      await expect(publish(1)).rejects.toMatchObject({ code: 'LEASE_LOST' })
      await publish(2)
      expect(home.versions().map(({ number }) => number)).toEqual([1, 2, 4])
      await collectGarbage(home, { keep: 1 })
      expect(home.versions().map(({ number }) => number)).toEqual([4])
    })
  })

  test('what two take away at once is taken away once', async () => {
    const site = await setUp()
    await withRoot(site, 'one', async ({ home }) => {
      const { number, layers } = home.head()
      home.trashVersion(number)
      home.trashVersion(number)
      home.trashLayer(layers[0] as string)
      home.trashLayer(layers[0] as string)
      expect(home.trashNames()).toHaveLength(2)
    })
  })

  test('two processes that open a root for the first time at once both have it', async () => {
    const site = await setUp()
    const state = site.node('one')
    onTestFinished(() => setSyscallHook(undefined))
    setSyscallHook((syscall, path) => {
      if (syscall === 'mkdirat' && path === 'replicas') mkdirSync(`${state.path}/roots/lab/replicas`, { mode: 0o700 })
    })
    const root = state.openRoot('lab', { create: true })
    expect(root.replicas()).toEqual([])
    root.close()
  })

  test('processes in namespaces of their own that come and go keep nobody from unmounting', async () => {
    const site = await setUp()
    // Each has a copy of the mount, and ends while it is looked at.
    const loops = 'for i in 1 2 3 4; do while :; do unshare --mount sleep 0.01; done & done; wait'
    const passing = spawn('sh', ['-c', loops], { stdio: 'ignore', detached: true })
    try {
      await withRoot(site, 'one', async (root) => {
        for (let i = 0; i < 10; i++) {
          await root.mount()
          await root.unmount()
        }
      })
    } finally {
      const ended = once(passing, 'exit')
      process.kill(-(passing.pid as number), 'SIGKILL')
      await ended
    }
  })
})
