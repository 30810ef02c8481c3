import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import {
  type ContainerRoot,
  keepRoot,
  type Policies,
  type PolicyDone,
  PolicyKeeper,
  writePolicies,
} from '@lsync/container-root'
import { listSnapshots } from '@lsync/snapshot'
import { describe, expect, test } from 'vitest'
import { dir, file } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { canMountImages } from '../support/ready.ts'
import { newRepository, Restic, temporaryDirectory } from '../support/repository.ts'
import { isPresent } from '../support/system.ts'
import { changesSince, makeSite, type Site, shown, withRoot } from './roots.ts'

/** Looks once at what is due by some policies, and gives what was done. */
async function look(root: ContainerRoot, policies: Policies, keeper?: PolicyKeeper): Promise<PolicyDone[]> {
  const done: PolicyDone[] = []
  writePolicies(root, policies)
  await (
    keeper ?? new PolicyKeeper(root, { signal: new AbortController().signal, onDone: (one) => done.push(one) })
  ).look()
  return done
}

describe.skipIf(!canMountImages())('policies of a root', () => {
  const disk = useFileSystem('ext4')
  const site = () => {
    const at = disk.current.fresh()
    return makeSite(at, at, dir({ etc: dir({ hostname: file('base\n') }), big: file('x'.repeat(100_000)) }))
  }

  async function versions(root: ContainerRoot, count: number): Promise<void> {
    for (let i = 0; i < count; i++) {
      writeFileSync(`${root.mergedPath}/etc/${i}`, `${i}`)
      await root.solidify()
    }
  }

  const layersOf = async (root: ContainerRoot) => (await root.status()).layers?.length

  test('layers are folded beyond a count, a depth, or what is in no view; nothing is done before', async () => {
    const made = await site()
    await withRoot(made, 'one', async (root) => {
      await root.mount()
      await versions(root, 3)
      const before = shown(root)
      expect(await look(root, { compact: { maxLayers: 4, maxDepth: 3, maxShadowedBytes: 1000 } })).toEqual([])
      expect(await look(root, { compact: { maxLayers: 3 } })).toMatchObject([{ policy: 'compact' }])
      expect(await layersOf(root)).toBe(2)
      expect(await look(root, { compact: { maxDepth: 3 } })).toEqual([])
      expect(await look(root, { compact: { maxDepth: 2 } })).toMatchObject([{ report: { after: { length: 1 } } }])
      expect(await look(root, { compact: { maxLayers: 1, maxDepth: 1, maxShadowedBytes: 1 } })).toEqual([])
      await root.unmount()
      await root.mount()
      expect(changesSince(before, root)).toEqual([])
      rmSync(`${root.mergedPath}/big`)
      await root.solidify()
      expect(await look(root, { compact: { maxShadowedBytes: 200_000 } })).toEqual([])
      expect(await look(root, { compact: { maxShadowedBytes: 50_000 } })).toMatchObject([{ policy: 'compact' }])
      expect((await root.status({ space: true })).space?.shadowedBytes).toBe(0)
    })
  })

  test('old versions go, the cache is filled, and only the node that has the lease does what changes the home', async () => {
    const made = await site()
    await made.node('two').openCache(10_000_000)
    await withRoot(made, 'one', async (root) => {
      await root.mount()
      await versions(root, 3)
      const policies: Policies = { gc: { keep: 2 }, compact: { maxLayers: 1 }, prefetch: true }
      await withRoot(made, 'two', async (other) => {
        expect(await look(other, policies)).toMatchObject([
          { policy: 'prefetch', report: { version: 4, local: 4, of: 4 } },
        ])
      })
      const done: PolicyDone[] = []
      const keeper = new PolicyKeeper(root, { signal: new AbortController().signal, onDone: (one) => done.push(one) })
      await look(root, policies, keeper)
      expect(done.map(({ policy }) => policy)).toEqual(['prefetch', 'compact', 'gc'])
      expect(root.versions().map(({ number }) => number)).toEqual([3, 4])
      // Not again before its time.
      await look(root, policies, keeper)
      expect(done).toHaveLength(3)
    })
  })

  test('what fails is told, and keeps the others from nothing', async () => {
    const made = await site()
    await withRoot(made, 'one', async (root) => {
      await root.mount()
      await versions(root, 1)
      const problems: string[] = []
      root.events.on('problem', ({ verb }) => problems.push(verb))
      const keeper = new PolicyKeeper(root, {
        signal: new AbortController().signal,
        connect: () => Promise.reject(new Error('no such repository')),
      })
      const policies: Policies = {
        backup: { repository: '/none', passwordFile: '/none', everyMs: 1 },
        solidify: { everyMs: 1, cgroup: '/sys/fs/cgroup/no such cgroup' },
        gc: { keep: 1 },
      }
      writeFileSync(`${root.mergedPath}/etc/more`, 'x')
      await look(root, policies, keeper)
      expect(problems).toEqual(['solidify', 'backup'])
      expect(root.versions()).toHaveLength(1)
      expect((await root.status()).lastErrors.map(({ verb }) => verb)).toEqual(expect.arrayContaining(['backup']))
    })
  })

  test('a root is followed from its mount on, gets live versions of what changed, and ends when told', async () => {
    const made = await site()
    await withRoot(made, 'one', async (user) => {
      await withRoot(made, 'one', async (root) => {
        writePolicies(root, { solidify: { everyMs: 1 } })
        const end = new AbortController()
        const kept = keepRoot(root, { signal: end.signal, lookMs: 50 })
        try {
          await delay(200)
          // Nothing was claimed for it.
          expect((await user.status()).lease).toBeUndefined()
          await user.mount()
          for (const [content, count] of [
            ['one', 2],
            ['two', 3],
          ] as const) {
            writeFileSync(`${user.mergedPath}/etc/hostname`, content)
            while (user.versions().length < count) await delay(20)
          }
          // An upper that has not changed makes no version, once what was under way is done.
          for (let count = 0; count !== user.versions().length; ) {
            count = user.versions().length
            await delay(2000)
          }
        } finally {
          end.abort()
          await kept
        }
      })
      await user.solidify()
      await user.unmount()
      await withRoot(made, 'two', async (other) => {
        await other.mount()
        expect(readFileSync(`${other.mergedPath}/etc/hostname`, 'utf8')).toBe('two')
      })
    })
  })
})

describe.skipIf(!canMountImages() || !needs('restic', isPresent('restic')))(
  'versions of a root in a repository',
  () => {
    const disk = useFileSystem('ext4')

    async function saved(made: Site): Promise<void> {
      const { path, repository } = await newRepository()
      await withRoot(made, 'one', async (root) => {
        await root.mount()
        writeFileSync(`${root.mergedPath}/etc/hostname`, 'changed\n')
        rmSync(`${root.mergedPath}/old`)
        await root.solidify({ tags: ['good'] })
        expect(await root.backup(repository, { version: 1 })).toMatchObject({ version: 1, isNew: true, problems: 0 })
        const done: PolicyDone[] = []
        const keeper = new PolicyKeeper(root, {
          signal: new AbortController().signal,
          connect: async () => ({ repository, close: async () => undefined }),
          onDone: (one) => done.push(one),
        })
        writePolicies(root, { backup: { repository: path, passwordFile: '/none', everyMs: 1 } })
        await keeper.look()
        await delay(5)
        // It is there now.
        await keeper.look()
        expect(done).toMatchObject([{ policy: 'backup', report: { version: 2 } }])
        const snapshots = await listSnapshots(repository)
        expect(snapshots.map(({ tags = [] }) => tags.filter((tag) => !tag.startsWith('root-')))).toEqual([
          ['version-1'],
          ['version-2', 'good'],
        ])
        const target = `${temporaryDirectory()}/restored`
        mkdirSync(target)
        new Restic(path).run('restore', 'latest', '--host', 'lab', '--target', target)
        expect(readFileSync(`${target}/etc/hostname`, 'utf8')).toBe('changed\n')
      })
    }

    test.each(['tree', 'sealed'] as const)('are what restic restores (%s)', async (layerForm) => {
      const at = disk.current.fresh()
      await saved(await makeSite(at, at, dir({ etc: dir({ hostname: file('base\n') }), old: file('x') }), layerForm))
    })
  },
)
