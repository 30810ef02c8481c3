import { linkSync, lstatSync, mkdirSync, renameSync, rmSync, unlinkSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import type { HostPath } from '@lsync/posix'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { useFileSystem } from '../support/image.ts'
import { hasMooseFs, mooseFsLimits, useMooseFs } from '../support/moosefs.ts'
import { needs } from '../support/needs.ts'
import { anyOperations, applyOperations } from '../support/operations.ts'
import { plainOptions } from '../support/overlay.ts'
import { canMountImages } from '../support/ready.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { differences, hidesWrites, keepWorkers, withFollowed, withSync } from '../support/syncing.ts'
import { run } from '../support/system.ts'

describe.skipIf(!canMountImages() || !needs('MooseFS', hasMooseFs))('a target on a real MooseFS', () => {
  const store = useMooseFs()
  const disk = useFileSystem('ext4')
  keepWorkers(disk)

  test('keeps whiteouts, marks of overlayfs, attributes, owners and hard links; what it cannot is named', async () => {
    const near = disk.current.fresh()
    const target = `${store.current.fresh()}/t` as HostPath
    await withFollowed(
      near,
      [
        { do: 'mkdir', path: 'a', mode: 0o755 },
        { do: 'mkdir', path: 'b', mode: 0o755 },
      ],
      { ...plainOptions, redirectDir: 'on' },
      async ({ merged, upper, state }) => {
        await withSync({ source: upper, targets: [target], stateDir: state }, async (sync) => {
          rmSync(`${merged}/a`, { recursive: true })
          rmSync(`${merged}/b`, { recursive: true })
          mkdirSync(`${merged}/b`)
          writeFileSync(`${merged}/b/f`, 'one inode')
          linkSync(`${merged}/b/f`, `${merged}/g`)
          run('setfattr', '-n', 'user.kept', '-v', 'value', `${merged}/g`)
          run('chown', '12345:54321', `${merged}/g`)
          mkdirSync(`${merged}/d/e`, { recursive: true })
          renameSync(`${merged}/b`, `${merged}/d/e/moved`)
          expect(await sync.flush()).toMatchObject({ isSettled: true, failures: [] })
          expect(differences(upper, target, 'trusted', mooseFsLimits)).toEqual([])
          const { losses, bytes } = sync.status.targets[0] ?? { losses: [], bytes: 0 }
          expect(losses.map(({ what }) => what).sort()).toEqual(['flags', 'time'])
          expect(lstatSync(`${target}/a`)).toMatchObject({ rdev: 0, nlink: expect.any(Number) })
          expect(lstatSync(`${target}/a`).isCharacterDevice()).toBe(true)
          expect(run('getfattr', '-h', '-n', 'trusted.overlay.opaque', '--only-values', `${target}/d`)).toBe('y')
          expect(lstatSync(`${target}/g`)).toMatchObject({ nlink: 2, uid: 12345, gid: 54321 })
          expect(lstatSync(`${target}/g`).ino).toBe(lstatSync(`${target}/d/e/moved/f`).ino)
          // Through one name, and seen under the other; and the group comes apart.
          writeFileSync(`${merged}/g`, 'still one inode')
          await sync.flush()
          unlinkSync(`${merged}/g`)
          writeFileSync(`${merged}/g`, 'another')
          await sync.flush()
          expect(differences(upper, target, 'trusted', mooseFsLimits)).toEqual([])
          const sent = (sync.status.targets[0]?.bytes ?? 0) - bytes
          expect(sent).toBe('still one inode'.length + 'another'.length)
        })
      },
    )
  })

  test(
    'equals the upper after a flush, whatever is done through a mount while it is synced',
    () =>
      fc.assert(
        fc.asyncProperty(
          anyOperations(0, 15),
          fc.array(anyOperations(1, 10), { minLength: 1, maxLength: 4, size: 'max' }),
          async (bottom, bursts) => {
            const near = disk.current.fresh()
            const target = `${store.current.fresh()}/t` as HostPath
            const options = { ...plainOptions, redirectDir: 'on', metacopy: true } as const
            await withFollowed(near, bottom, options, async ({ merged, upper, state }) => {
              await withSync({ source: upper, targets: [target], stateDir: state }, async (sync) => {
                for (const burst of bursts) {
                  applyOperations(merged, burst)
                  await delay(20)
                }
                const report = await sync.flush({ sweep: bursts.some(hidesWrites) })
                expect(differences(upper, target, 'trusted', mooseFsLimits)).toEqual([])
                expect(report).toMatchObject({ isSettled: true, failures: [] })
              })
            })
          },
        ),
        runs(5),
      ),
    timeLimit(),
  )
})
