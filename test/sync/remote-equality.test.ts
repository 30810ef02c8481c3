import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { parseTarget, remoteTarget, SshConnections, type Target } from '@lsync/sync'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { anyOperations, applyOperations, type Operation } from '../support/operations.ts'
import { canMountImages } from '../support/ready.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { hasSshd, useSshServer } from '../support/sshd.ts'
import { differences, keepWorkers, withFollowed, withSync } from '../support/syncing.ts'

const lsync = fileURLToPath(new URL('../../packages/cli/bin/lsync', import.meta.url))

// What an SFTP target names in its losses, as the comparison words it.
const LOST_BY_SFTP = /: (?:xattr .*|missing, should be a (?:character|block|fifo|socket))/
const SECOND_NS = 1_000_000_000n

describe.skipIf(!canMountImages || !needs('sshd', hasSshd))('after a flush a target elsewhere equals the upper', () => {
  const disk = useFileSystem('ext4')
  const sshd = useSshServer()
  keepWorkers(disk)

  function targetAt(kind: 'ssh2' | 'ssh' | 'sftp', path: string, connections: SshConnections): Target {
    const { user, address, port, ssh } = sshd.current
    const url = parseTarget(`${kind === 'sftp' ? 'sftp' : 'ssh'}://${user}@${address}:${port}${path}`)
    if (url.scheme === 'local') throw new Error('not remote')
    const [program, ...words] = ssh
    const rsh = [program, ...words.filter((_, i) => words[i] !== '-p' && words[i - 1] !== '-p')].join(' ')
    return remoteTarget(url, { connections, remoteLsync: lsync, timeoutMs: 60_000, ...(kind === 'ssh' ? { rsh } : {}) })
  }

  test.each([
    ['ssh2', { namespace: 'trusted', redirectDir: 'on', metacopy: true, index: true }, 5],
    ['ssh', { namespace: 'trusted', redirectDir: 'off', metacopy: false, index: false }, 3],
    ['sftp', { namespace: 'trusted', redirectDir: 'off', metacopy: false, index: false }, 5],
  ] as const)(
    'over %s, whatever is done through a mount while it is synced',
    async (kind, options, count) => {
      const { clientKey, knownHosts } = sshd.current
      const connections = new SshConnections({ identities: [clientKey], knownHosts: [knownHosts] })
      await fc.assert(
        fc.asyncProperty(
          anyOperations(0, 20),
          fc.array(anyOperations(1, 12), { minLength: 1, maxLength: 5, size: 'max' }),
          async (bottom, bursts) => {
            const directory = disk.current.fresh()
            await withFollowed(directory, bottom, options, async ({ merged, upper, target, state }) => {
              const request = { source: upper, stateDir: state, namespace: options.namespace }
              const differing = () =>
                kind === 'sftp'
                  ? differences(upper, target, options.namespace, {
                      timeGranularityNs: SECOND_NS,
                      flags: false,
                    }).filter((line) => !LOST_BY_SFTP.test(line))
                  : differences(upper, target, options.namespace)
              const done: Operation[][] = []
              const open = () => ({ ...request, targets: [targetAt(kind, target, connections)] })
              await withSync(open(), async (sync) => {
                const failures: string[] = []
                sync.events.on('failure', ({ path, code }) => failures.push(`${path}: ${code}`))
                sync.events.on('problem', ({ error }) => failures.push(String(error)))
                for (const burst of bursts) {
                  done.push(applyOperations(merged, burst))
                  await delay(10)
                }
                const report = await sync.flush()
                expect(differing(), JSON.stringify(done, show)).toEqual([])
                expect(failures).toEqual([])
                expect(report.failures).toEqual([])
              })
              applyOperations(merged, bursts.flat())
              await withSync(open(), async (sync) => {
                await sync.flush()
                expect(differing()).toEqual([])
              })
            })
          },
        ),
        runs(count),
      )
    },
    timeLimit(),
  )
})

function show(_: string, value: unknown): unknown {
  return typeof value === 'bigint' ? String(value) : value
}
