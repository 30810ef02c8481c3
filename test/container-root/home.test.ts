import { existsSync, mkdirSync, readdirSync, renameSync, rmSync, utimesSync, writeFileSync } from 'node:fs'
import { ContainerRoot, initHome } from '@lsync/container-root'
import type { HostPath } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { dir, file } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { canMountImages } from '../support/ready.ts'
import { makeSite, withRoot } from './roots.ts'

const base = () => dir({ etc: dir({ hostname: file('base\n') }) })

describe.skipIf(!canMountImages())('a home', () => {
  const disk = useFileSystem('ext4')

  test('that has lost its root.json is not made anew, and comes back with it', async () => {
    const at = disk.current.fresh()
    const { home, base: bases, node } = await makeSite(at, at, base())
    renameSync(`${home}/root.json`, `${at}/root.json`)
    const again = initHome({ home, bases: [bases], node: node('one').node })
    await expect(again).rejects.toMatchObject({ code: 'HOME_DAMAGED' })
    renameSync(`${at}/root.json`, `${home}/root.json`)
    const root = await ContainerRoot.open(home, 'lab', { state: node('one') })
    await root.mount()
    await root.unmount()
    await root.close()
  })

  test('that an init left half made is made anew, and so is an empty directory', async () => {
    const at = disk.current.fresh()
    const { base: bases, node } = await makeSite(at, at, base())
    const home = `${at}/other` as HostPath
    mkdirSync(home, { mode: 0o700 })
    const request = { home, bases: [bases], node: node('one').node }
    const missing = `${at}/missing.tar` as HostPath
    writeFileSync(missing, 'no tar at all')
    // The base above cannot be read, and the one below is there then.
    await expect(initHome({ ...request, bases: [missing, bases] })).rejects.toThrow()
    expect(existsSync(`${home}/init.json`)).toBe(true)
    expect(readdirSync(`${home}/layers`)).toHaveLength(1)
    ;(await initHome(request)).close()
    expect(existsSync(`${home}/init.json`)).toBe(false)
    expect(readdirSync(`${home}/layers`)).toHaveLength(1)
    await expect(initHome(request)).rejects.toMatchObject({ code: 'HOME_EXISTS' })
  })

  test('keeps no copies of uppers that nobody may publish, and nothing that killed processes left', async () => {
    const at = disk.current.fresh()
    const site = await makeSite(at, at, base())
    const incoming = (epoch: number) => `${site.home}/incoming/${epoch}`
    await withRoot(site, 'one', async (root) => {
      await root.mount()
      writeFileSync(`${root.mergedPath}/one`, 'x')
      const sync = await root.startSync()
      await sync.flush()
      expect(readdirSync(incoming(1))).toHaveLength(1)
      await withRoot(site, 'two', async (other) => {
        await other.mount({ takeover: 'force' })
        await (await other.startSync()).flush()
        const left = [`.clone-${'a'.repeat(32)}`, `.clone-${'b'.repeat(32)}`] as const
        for (const name of left) mkdirSync(`${incoming(0)}/${name}/tree`, { recursive: true })
        utimesSync(`${incoming(0)}/${left[0]}`, 1, 1)
        // The dead node's copy can be saved for a while.
        expect(await other.gc()).toMatchObject({ incoming: [`0/${left[0]}`] })
        expect(readdirSync(incoming(1))).toHaveLength(1)
        const [copy] = readdirSync(incoming(1))
        expect(await other.gc({ graceMs: -1, dryRun: true })).toMatchObject({ incoming: [`0/${left[1]}`, `1/${copy}`] })
        expect(await other.gc({ graceMs: -60_000 })).toMatchObject({ incoming: [`0/${left[1]}`, `1/${copy}`] })
        expect([0, 1].map((epoch) => readdirSync(incoming(epoch)))).toEqual([[], []])
        expect(readdirSync(incoming(2))).toHaveLength(1)
        writeFileSync(`${other.mergedPath}/two`, 'x')
        await other.solidify()
        await other.unmount()
      })
      // What was in no version is on the node that has it.
      await expect(root.solidify()).rejects.toMatchObject({ code: 'LEASE_LOST' })
      expect(existsSync(`${root.mergedPath}/one`)).toBe(true)
      rmSync(`${root.mergedPath}/one`)
      await root.mount({ discard: true })
      expect(existsSync(`${root.mergedPath}/two`)).toBe(true)
    })
  })
})
