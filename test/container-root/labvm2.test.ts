import { spawnSync } from 'node:child_process'
import { appendFileSync, mkdirSync, readdirSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { downloadPackages, makeBundle, slimDebianTar } from '../real-root/container.ts'
import { testDirectory, useFileSystem } from '../support/image.ts'
import { hasMooseFs, useMooseFs } from '../support/moosefs.ts'
import { needs } from '../support/needs.ts'
import { hasNetwork, type Namespace, useNetwork } from '../support/network.ts'
import { canMountImages } from '../support/ready.ts'
import { useShared } from '../support/shared.ts'
import { hasSshd, type SshServer, startSshServer } from '../support/sshd.ts'
import { isPresent } from '../support/system.ts'

const LSYNC = fileURLToPath(new URL('../../packages/cli/bin/lsync', import.meta.url))
const EXAMPLE = fileURLToPath(new URL('../../examples/labvm2/run.sh', import.meta.url))
const hasTools = hasSshd && hasMooseFs && hasNetwork && ['bsdtar', 'debootstrap', 'runc', 'apt-get'].every(isPresent)

/** What the container does all day: a line on every round, with the node that it runs on. */
const WORK = 'trap "exit 0" TERM; while :; do echo "$(cat /node)" >> /var/log/rounds; sleep 0.1; done'

/**
 * A node with a network and a host name. Not with mounts of its own, as `ip netns exec` gives: the copies would keep the layers of all tests
 * that run beside this one in use.
 */
function nodeIn({ path, ...rest }: Namespace, hostName: string): Namespace {
  const named = ['sh', '-c', 'hostname "$0" && exec "$@"', hostName]
  return { ...rest, path, enter: ['nsenter', `--net=${path}`, 'unshare', '--uts', ...named] }
}

describe.skipIf(!needs('root, MooseFS, sshd, debootstrap and runc', canMountImages() && hasTools))(
  'a Debian container that goes from node to node over a MooseFS',
  () => {
    type Node = 'node1' | 'node2'
    let at: string
    let base: string

    const disk = useFileSystem('ext4')
    // Before this thread is in the network of the MooseFS, which has no way out.
    beforeAll(() => {
      at = disk.current.fresh()
      downloadPackages(`${at}/packages`, ['hello', 'bc', 'ed', 'libreadline8', 'readline-common'])
      base = slimDebianTar()
    }, 300_000)
    const moosefs = useMooseFs()
    const network = useNetwork()
    const nodes = useShared(
      'the nodes',
      async () => ({
        node1: await startSshServer({ namespace: nodeIn(network.current.left, 'node1') }),
        node2: await startSshServer({ namespace: nodeIn(network.current.right, 'node2') }),
      }),
      async ({ node1, node2 }) => {
        await node1.stop()
        await node2.stop()
      },
    )
    const store = (node: Node) => `${at}/store-${node}`
    const home = (node: Node) => `${store(node)}/home`
    const state = (node: Node) => `${at}/${node}`
    const merged = (node: Node) => `${state(node)}/roots/lab/merged`
    const runc = (node: Node) => `runc --root ${at}/runc-${node}`
    const sshTo = ({ ssh }: SshServer) => ssh.join(' ')

    /** Runs a command on a node, by ssh. */
    const tryOn = (node: Node, command: string) => {
      const { ssh, host } = nodes.current[node]
      const from = `--net=${network.current.left.path}`
      return spawnSync('nsenter', [from, ...ssh, host, command], { encoding: 'utf8', input: '' })
    }
    const on = (node: Node, command: string): string => {
      const { status, stdout, stderr } = tryOn(node, command)
      if (status !== 0) throw new Error(`${command} on ${node} ended with ${status}: ${stdout}${stderr}`)
      return stdout
    }
    const lsync = (node: Node, command: string) => on(node, `${LSYNC} ${command} --state ${state(node)}`)
    const inside = (node: Node, script: string) => on(node, `${runc(node)} exec lab sh -euc '${script}'`)
    const isRunning = (node: Node) => tryOn(node, `${runc(node)} state lab`).stdout.includes('"status": "running"')
    const start = (node: Node) =>
      on(node, `${runc(node)} run --detach --bundle ${at}/bundle-${node} lab >/dev/null 2>&1 </dev/null`)
    const stop = (node: Node) => on(node, `${runc(node)} delete --force lab`)
    const switchTo = (from: Node, to: Node) => {
      const server = nodes.current[to]
      const how = `--rsh '${sshTo(server)}' --remote-lsync ${LSYNC} --remote-state ${state(to)} --json`
      const lines = lsync(from, `switch lab --to ssh://${server.host}${home(to)} ${how}`)
        .trim()
        .split('\n')
      const report = JSON.parse(lines.at(-1) as string) as { type: string; version: number; downtimeMs: number }
      console.info(
        `from ${from} to ${to}: ${Math.round(report.downtimeMs)} ms from before the stop hook until it was healthy`,
      )
      return report
    }
    /** All that a root holds, as a digest. MooseFS keeps whole seconds, as this form of tar does. */
    const digest = (node: Node) =>
      on(
        node,
        `tar --sort=name --format=gnu --numeric-owner --exclude=./var/log/rounds -C ${merged(node)} -cf - . | sha256sum`,
      )

    beforeAll(() => {
      const { left, right } = network.current
      const mountCommands = { node1: moosefs.current.connect(left), node2: moosefs.current.connect(right) }
      appendFileSync(`${testDirectory()}/stop.sh`, `kill $(pgrep -f '^mfsmount ${at}/store-') 2>/dev/null\n`)
      for (const node of ['node1', 'node2'] as const) {
        mkdirSync(state(node), { mode: 0o700 })
        mkdirSync(store(node))
        on(node, `${mountCommands[node](store(node))} >/dev/null 2>&1`)
        // A container outlives a test that is killed.
        appendFileSync(`${testDirectory()}/stop.sh`, `${runc(node)} delete --force lab 2>/dev/null\n`)
        makeBundle(`${at}/bundle-${node}`, merged(node), WORK, `${at}/packages`)
      }
    })
    afterAll(() => {
      for (const node of ['node1', 'node2'] as const) {
        tryOn(
          node,
          `${runc(node)} delete --force lab; ${LSYNC} root unmount lab --state ${state(node)}; umount ${store(node)}`,
        )
      }
    })

    test('it is made of a debootstrap root, and people work in it on the first node', () => {
      lsync('node1', `root init lab --home ${home('node1')} --base ${base}`)
      for (const node of ['node1', 'node2'] as const) {
        const preset = `--preset runc --container lab --bundle ${at}/bundle-${node} --runc-root ${at}/runc-${node}`
        const health = `--health '${runc(node)} exec lab dpkg --status dpkg'`
        lsync(node, `hooks lab --home ${home(node)} ${preset} ${health}`)
      }
      lsync('node1', 'root mount lab')
      on('node1', `echo node1 > ${merged('node1')}/node`)
      start('node1')
      inside('node1', 'dpkg -i /packages/*.deb; dpkg --purge ed; mv /etc/motd /etc/welcome; rm -r /usr/share/doc/bash')
      expect(inside('node1', 'echo 6*7 | bc')).toBe('42\n')
    })

    test('on the second node it is healthy, with everything in it', () => {
      const before = digest('node1')
      expect(switchTo('node1', 'node2')).toMatchObject({ type: 'switched', version: 2 })
      expect(isRunning('node1')).toBe(false)
      expect(isRunning('node2')).toBe(true)
      expect(digest('node2')).toBe(before)
      expect(inside('node2', 'hello -g moved; dpkg --verify hello bc')).toBe('moved\n')
    })

    test('it comes back with what was changed there', () => {
      inside('node2', 'echo node2 > /node; dpkg --purge bc; dpkg -i /packages/ed*.deb; hello > /root/said; sleep 1')
      inside('node2', 'mkdir /root/many; for i in $(seq 1000); do echo $i > /root/many/$i; done')
      const before = digest('node2')
      expect(switchTo('node2', 'node1')).toMatchObject({ type: 'switched', version: 3 })
      expect(isRunning('node2')).toBe(false)
      expect(isRunning('node1')).toBe(true)
      expect(digest('node1')).toBe(before)
      expect(inside('node1', 'cat /root/said; dpkg --verify hello ed')).toBe('Hello, world!\n')
      expect(new Set(inside('node1', 'cat /var/log/rounds').trim().split('\n'))).toEqual(new Set(['node1', 'node2']))
    })

    test('both nodes list the same history, with who made what', () => {
      const versions = lsync('node1', 'root versions lab')
      expect(lsync('node2', 'root versions lab')).toBe(versions)
      expect(versions).toMatch(
        /1 .* init .*node1\n.*2 .* node1 .*from node1 to node2\n.*3 .* node2 .*from node2 to node1/,
      )
    })

    test.each([
      // `sh -e` does not end at a command behind `!`, so these are one list.
      [1, '! command -v hello && ! test -e /node && test -e /etc/motd'],
      [2, 'hello && bc --version && ! test -e /etc/motd && ! test -e /root/said'],
      [3, 'hello && ! command -v bc && ed --version && test -e /root/said'],
    ])('version %i runs again', (version, proof) => {
      stop('node1')
      lsync('node1', 'root unmount lab')
      lsync('node1', `root rollback lab --to ${version} --discard --yes`)
      lsync('node1', 'root mount lab')
      start('node1')
      inside('node1', proof)
    })
  },
)

describe.skipIf(!needs('root, sshd, debootstrap and runc', canMountImages() && hasTools))('examples/labvm2', () => {
  const disk = useFileSystem('ext4')

  test('plays its story to the end, and leaves nothing behind', () => {
    const at = disk.current.fresh()
    const { status, stdout, stderr } = spawnSync(EXAMPLE, {
      env: { ...process.env, BASE: slimDebianTar(), TMPDIR: at, STORE: at },
      encoding: 'utf8',
    })
    expect(stderr).not.toContain('lsync:')
    expect(status).toBe(0)
    expect(stdout).toMatch(
      /lab runs on node2 with version 2.*lab runs on node1 with version 3.*version 4 is version 2/s,
    )
    expect(stdout.trimEnd().split('\n').at(-1)).toBe('from-node1')
    expect(readdirSync(at)).toEqual([])
  })
})
