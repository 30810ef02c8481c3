import { mkdirSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { importLayer } from '@lsync/overlay-merge'
import { type HostPath, printable } from '@lsync/posix'
import { parseTarget, remoteTarget, SshConnections, type Target } from '@lsync/sync'
import fc from 'fast-check'
import { describe, expect, test, vi } from 'vitest'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { anyOperations, applyOperations, type Operation } from '../support/operations.ts'
import { canMountImages } from '../support/ready.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { hasSshd, useSshServer } from '../support/sshd.ts'
import { differences, keepWorkers, withFollowed, withSync } from '../support/syncing.ts'
import { readTree } from '../support/tree.ts'

const lsync = fileURLToPath(new URL('../../packages/cli/bin/lsync', import.meta.url))

// What an SFTP target names in its losses, as the comparison words it.
const LOST_BY_SFTP = /: (?:xattr .*|missing, should be a (?:character|block|fifo|socket))/
// A directory's default ACL is a whiteout's as well.
const WHITEOUT = ['mtime', 'mode', 'uid', 'gid', 'xattr system.posix_acl_access']
type Kind = 'ssh2' | 'ssh' | 'sftp' | 'portable layer'
const SECOND_NS = 1_000_000_000n

describe.skipIf(!canMountImages() || !needs('sshd', hasSshd))(
  'after a flush a target elsewhere equals the upper',
  () => {
    const disk = useFileSystem('ext4')
    const sshd = useSshServer()
    keepWorkers(disk)

    function targetAt(kind: Kind, path: string, connections: SshConnections): Target {
      const { user, address, port, ssh } = sshd.current
      const url = parseTarget(
        `${kind === 'ssh2' || kind === 'ssh' ? 'ssh' : 'sftp'}://${user}@${address}:${port}${path}`,
      )
      if (url.scheme === 'local') throw new Error('not remote')
      const [program, ...words] = ssh
      const rsh = [program, ...words.filter((_, i) => words[i] !== '-p' && words[i - 1] !== '-p')].join(' ')
      const sftpForm = kind === 'portable layer' ? 'portable' : 'tree'
      const common = { connections, remoteLsync: lsync, timeoutMs: 60_000, sftpForm } as const
      return remoteTarget(url, kind === 'ssh' ? { ...common, rsh } : common)
    }

    test.each([
      ['ssh2', { namespace: 'trusted', redirectDir: 'on', metacopy: true, index: true }, 5],
      ['ssh', { namespace: 'trusted', redirectDir: 'off', metacopy: false, index: false }, 3],
      ['sftp', { namespace: 'trusted', redirectDir: 'off', metacopy: false, index: false }, 5],
      ['portable layer', { namespace: 'trusted', redirectDir: 'on', metacopy: true, index: true }, 5],
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
                let imports = 0
                const differing = async () => {
                  if (kind === 'sftp') {
                    const limits = { timeGranularityNs: SECOND_NS, flags: false, holes: false }
                    const lines = differences(upper, target, options.namespace, limits)
                    return lines.filter((line) => !LOST_BY_SFTP.test(line))
                  }
                  if (kind !== 'portable layer') return differences(upper, target, options.namespace)
                  const layer = `${directory}/imported${++imports}` as HostPath
                  await importLayer({ form: 'portable', from: target, to: layer, namespace: options.namespace })
                  // What has no meaning is not in that form: all but the name of a whiteout, and the redirect that a copy-up
                  // leaves on a file with data.
                  const silent = new Set<string>()
                  for (const [path, { type, rdev, xattrs }] of readTree(upper)) {
                    const label = printable(path)
                    if (type === 'character' && rdev === 0) for (const what of WHITEOUT) silent.add(`${label}: ${what}`)
                    if (type !== 'file' || xattrs.has('trusted.overlay.metacopy')) continue
                    silent.add(`${label}: xattr trusted.overlay.redirect`)
                  }
                  const lines = differences(upper, layer, options.namespace, { flags: false, holes: false })
                  return lines.filter((line) => !silent.has(line.replace(/ should be .*$/s, '')))
                }
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
                  expect(failures).toEqual([])
                  expect(await differing(), JSON.stringify(done, show)).toEqual([])
                  expect(report.failures).toEqual([])
                })
                applyOperations(merged, bursts.flat())
                await withSync(open(), async (sync) => {
                  await sync.flush()
                  expect(await differing()).toEqual([])
                })
              })
            },
          ),
          runs(count),
        )
      },
      timeLimit(),
    )

    test.each(['ssh2', 'ssh', 'sftp', 'portable layer'] as const)(
      'over %s, however often the connection is cut meanwhile',
      async (kind) => {
        const { clientKey, knownHosts } = sshd.current
        const connections = new SshConnections({ identities: [clientKey], knownHosts: [knownHosts] })
        const directory = disk.current.fresh()
        const [upper, target] = [`${directory}/u`, `${directory}/t`] as [HostPath, HostPath]
        mkdirSync(upper)
        const write = (round: number) => {
          for (let i = 0; i < 40; i++) {
            mkdirSync(`${upper}/d${i % 7}`, { recursive: true })
            writeFileSync(`${upper}/d${i % 7}/f${i}`, `round ${round} of ${i}\n`.repeat(1 + i * 50))
          }
          writeFileSync(`${upper}/large`, Buffer.alloc(3_000_000, round))
        }
        write(0)
        const request = {
          source: upper,
          stateDir: `${directory}/state`,
          targets: [targetAt(kind, target, connections)],
        }
        await withSync(request, async (sync) => {
          let cuts = 0
          for (let round = 1; round <= 4; round++) {
            write(round)
            const flushed = sync.flush().catch((error: { code?: string }) => error.code)
            await delay(20 * round)
            cuts += sshd.current.cutConnections()
            expect([undefined, 'CONNECTION_LOST', 'CONNECT_FAILED']).toContain(
              await flushed.then((result) => (typeof result === 'string' ? result : undefined)),
            )
          }
          expect(cuts).toBeGreaterThan(0)
          await vi.waitUntil(
            () =>
              sync.flush().then(
                () => true,
                () => false,
              ),
            { timeout: 90_000, interval: 200 },
          )
          const layer = kind === 'portable layer' ? (`${directory}/imported` as HostPath) : target
          if (layer !== target) await importLayer({ form: 'portable', from: target, to: layer, namespace: 'trusted' })
          const options = kind === 'sftp' ? { timeGranularityNs: SECOND_NS } : {}
          expect(differences(upper, layer, 'trusted', options)).toEqual([])
        })
      },
      timeLimit(),
    )
  },
)

function show(_: string, value: unknown): unknown {
  return typeof value === 'bigint' ? String(value) : value
}
