import { cpSync, existsSync, mkdirSync, readdirSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { FileLeases } from '@lsync/container-root'
import { describe, expect, test } from 'vitest'
import { describeLeases, type LeaseSubject } from '../conformance/leases.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { hasPoorStore, usePoorStore } from '../support/poor-store.ts'
import { canMountImages } from '../support/ready.ts'
import { run } from '../support/system.ts'

function onDirectory(fresh: () => string): LeaseSubject {
  return {
    fresh: () => {
      const where = `${fresh()}/lease`
      mkdirSync(where)
      return where
    },
    open: (where, durationMs) => new FileLeases(where, { durationMs }),
    async keep(where) {
      cpSync(where, `${where}.kept`, { recursive: true, preserveTimestamps: true })
      return async () => {
        rmSync(where, { recursive: true })
        cpSync(`${where}.kept`, where, { recursive: true, preserveTimestamps: true })
      }
    },
  }
}

describe.skipIf(!canMountImages())('on ext4', () => {
  const disk = useFileSystem('ext4')
  test('a directory that is not there belongs to a store that is away: it is not made, and nobody gets the root', async () => {
    const where = `${disk.current.fresh()}/store/lease`
    const leases = new FileLeases(where)
    const unreachable = { code: 'LEASE_UNREACHABLE' }
    await expect(leases.read()).rejects.toMatchObject(unreachable)
    await expect(leases.acquire({ node: 'one' })).rejects.toMatchObject(unreachable)
    await expect(leases.takeover({ node: 'one', force: true })).rejects.toMatchObject(unreachable)
    expect(existsSync(where)).toBe(false)
  })

  describeLeases(
    'in files on ext4',
    onDirectory(() => disk.current.fresh()),
  )

  test('a damaged claim, and one of a newer lsync, are refused, and force goes on after them', async () => {
    const where = disk.current.fresh()
    const leases = new FileLeases(where)
    await leases.acquire({ node: 'one' })
    truncateSync(`${where}/1.json`, 30)
    await expect(leases.acquire({ node: 'two' })).rejects.toMatchObject({ code: 'LEASE_DAMAGED' })
    await expect(leases.takeover({ node: 'two' })).rejects.toMatchObject({ code: 'LEASE_DAMAGED' })
    const second = await leases.takeover({ node: 'two', force: true })
    expect(second.epoch).toBe(2)
    writeFileSync(`${where}/3.json`, JSON.stringify({ ...second.claim, format: 2, epoch: 3 }))
    await expect(leases.read()).rejects.toMatchObject({
      code: 'LEASE_DAMAGED',
      message: expect.stringContaining('newer'),
    })
    await expect(second.check()).rejects.toMatchObject({ code: 'LEASE_LOST' })
  })

  test('the last claims are kept for people, and nothing else stays behind', async () => {
    const where = disk.current.fresh()
    const leases = new FileLeases(where)
    for (let round = 0; round < 12; round++) await (await leases.acquire({ node: `n${round}` })).release()
    const claims = readdirSync(where).filter((name) => name.endsWith('.json'))
    expect(claims.map((name) => Number.parseInt(name, 10)).sort((left, right) => left - right)).toEqual([
      5, 6, 7, 8, 9, 10, 11, 12,
    ])
    expect(readdirSync(where).filter((name) => name.startsWith('.'))).toEqual([])
  })

  test('a store that is gone says so, and the claim stands when it is back', async () => {
    const where = disk.current.fresh()
    const lease = await new FileLeases(where).acquire({ node: 'one' })
    run('mv', where, `${where}.away`)
    writeFileSync(where, 'no directory')
    await expect(lease.heartbeat()).rejects.toMatchObject({ code: 'LEASE_UNREACHABLE' })
    rmSync(where)
    run('mv', `${where}.away`, where)
    await lease.check()
  })
})

describe.skipIf(!needs('root, rclone and fusermount', canMountImages() && hasPoorStore))('on a poor store', () => {
  const store = usePoorStore()
  // No hard links, and no rename that replaces nothing: what remains is exclusive creation.
  describeLeases(
    'in files on a store without links',
    onDirectory(() => store.current.fresh()),
  )
})
