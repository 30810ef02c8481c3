import { setTimeout as delay } from 'node:timers/promises'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { useFileSystem } from '../support/image.ts'
import { anyOperations, applyOperations, type Operation } from '../support/operations.ts'
import type { OverlayOptions } from '../support/overlay.ts'
import { canMountImages } from '../support/ready.ts'
import { runs } from '../support/runs.ts'
import { differences, hidesWrites, keepWorkers, withFollowed, withSync } from '../support/syncing.ts'

const CELLS: readonly OverlayOptions[] = [
  { namespace: 'trusted', redirectDir: 'off', metacopy: false, index: false },
  { namespace: 'trusted', redirectDir: 'on', metacopy: true, index: true },
  { namespace: 'user', redirectDir: 'off', metacopy: false, index: false },
]

describe.skipIf(!canMountImages())('after a flush a target equals the upper', () => {
  const disk = useFileSystem('ext4')
  keepWorkers(disk)
  let count = 0

  test.each(CELLS)(
    'whatever is done through a mount while it is synced: $namespace redirects $redirectDir',
    async (options) => {
      await fc.assert(
        fc.asyncProperty(
          anyOperations(0, 20),
          fc.array(anyOperations(1, 12), { minLength: 1, maxLength: 5, size: 'max' }),
          async (bottom, bursts) => {
            const directory = disk.current.fresh()
            await withFollowed(directory, bottom, options, async ({ merged, upper, target, state }) => {
              const request = { source: upper, targets: [target], stateDir: state, namespace: options.namespace }
              const done: Operation[][] = []
              await withSync(request, async (sync) => {
                const failures: string[] = []
                sync.events.on('failure', ({ path, code }) => failures.push(`${path}: ${code}`))
                sync.events.on('problem', ({ error }) => failures.push(String(error)))
                for (const burst of bursts) {
                  done.push(applyOperations(merged, burst))
                  // Sometimes in the middle of a round, sometimes between two.
                  await delay(count++ % 3 === 0 ? 30 : 1)
                }
                const report = await sync.flush({ sweep: bursts.some(hidesWrites) })
                expect(differences(upper, target, options.namespace), JSON.stringify(done, show)).toEqual([])
                expect(failures).toEqual([])
                expect(report).toMatchObject({ isSettled: true, failures: [] })
              })
              // And what is done while nobody looks is found at the next start.
              applyOperations(merged, bursts.flat())
              await withSync(request, async (sync) => {
                await sync.flush()
                expect(differences(upper, target, options.namespace)).toEqual([])
              })
            })
          },
        ),
        runs(12),
      )
    },
  )
})

function show(_: string, value: unknown): unknown {
  return typeof value === 'bigint' ? String(value) : value
}
