import { appendFileSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { ContainerRoot, collectGarbage, Home, initHome, NodeState } from '@lsync/container-root'
import type { HostPath } from '@lsync/posix'
import { expect, test } from 'vitest'
import { dir, file } from '../support/build.ts'
import { descriptorsBelow, useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { canMountImages } from '../support/ready.ts'
import { changesSince, makeSite, shown, withRoot } from './roots.ts'

const canRun = needs('a mount', canMountImages())
const disk = useFileSystem('tmpfs')

test.skipIf(!canRun)(
  'one process has a hundred roots mounted, makes versions of all, ten at once, and keeps nothing of them',
  async () => {
    const at = disk.current.fresh()
    mkdirSync(`${at}/base`)
    writeFileSync(`${at}/base/file`, 'base')
    const state = NodeState.open(`${at}/state` as HostPath)
    const names = Array.from({ length: 100 }, (_, i) => `lab-${i}`)
    const roots = await Promise.all(
      names.map(async (name) => {
        const home = `${at}/${name}` as HostPath
        ;(await initHome({ home, bases: [`${at}/base` as HostPath], node: state.node })).close()
        return ContainerRoot.open(home, name, { state })
      }),
    )
    try {
      await Promise.all(roots.map((root) => root.mount()))
      for (const [i, { mergedPath }] of roots.entries()) appendFileSync(`${mergedPath}/file`, ` ${i}`)
      for (let i = 0; i < 100; i += 10) await Promise.all(roots.slice(i, i + 10).map((root) => root.solidify()))
      expect(state.rootNames()).toHaveLength(100)
      for (const [i, root] of roots.entries()) {
        expect(root.versions()).toHaveLength(2)
        expect(readFileSync(`${root.mergedPath}/file`, 'utf8')).toBe(`base ${i}`)
        expect(await root.status()).toMatchObject({ isMounted: true, hasChanges: false, head: 2, errors: [] })
      }
    } finally {
      for (const root of roots) {
        await root.unmount()
        await root.close()
      }
    }
    expect(descriptorsBelow(at)).toEqual([])
  },
  300_000,
)

test.skipIf(!canRun)(
  'solidify, compact, gc, status and mounts of two nodes at once',
  async () => {
    const at = disk.current.fresh()
    const site = await makeSite(at, at, dir({ d: dir({ a: file('a') }), b: file('b') }))
    let isDone = false
    const around = async (work: () => Promise<unknown>): Promise<number> => {
      let rounds = 0
      for (; !isDone; rounds++) {
        await work()
        await delay(5)
      }
      return rounds
    }
    const failures: unknown[] = []
    await withRoot(site, 'one', async (root) => {
      await root.mount()
      await withRoot(site, 'two', async (other) => {
        // Two nodes compact and clean up what the first one makes.
        const beside = Promise.all([
          around(() => other.compact({ maxLayers: 2 })),
          around(() => other.compact({ maxLayers: 3, intoBottom: true })),
          around(() => collectGarbage(other.home, { keep: 2 })),
          around(() => collectGarbage(root.home, { keep: 3 })),
          around(async () => failures.push(...(await other.status()).errors)),
        ])
        let before = shown(root)
        try {
          for (let i = 0; i < 12; i++) {
            appendFileSync(`${root.mergedPath}/d/a`, `${i}`)
            writeFileSync(`${root.mergedPath}/d/new-${i}`, `${i}`)
            before = shown(root)
            await root.solidify({ live: i % 3 === 1 })
            expect(changesSince(before, root)).toEqual([])
          }
        } finally {
          isDone = true
        }
        const rounds = await beside
        expect(Math.min(...rounds)).toBeGreaterThan(0)
        await root.solidify()
        await root.unmount()
        await other.gc({ keep: 1, graceMs: 0 })
        await other.mount()
        expect(changesSince(before, other)).toEqual([])
        await other.unmount()
      })
      expect(failures).toEqual([])
      // After the last clean-up no layer is left that the newest version does not need.
      const home = Home.open(site.home)
      expect(
        home
          .requireLayers(home.head().layers)
          .map(({ id }) => id)
          .sort(),
      ).toEqual(
        home
          .layers()
          .map(({ id }) => id)
          .sort(),
      )
      home.close()
    })
  },
  300_000,
)
