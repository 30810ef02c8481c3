import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { lsync, startLsync } from '../cli/lsync.ts'
import { buildTree, dir, file } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { canMountImages } from '../support/ready.ts'
import { useShared } from '../support/shared.ts'
import { hasSshd, startSshServer, useSshServer } from '../support/sshd.ts'

const LSYNC = fileURLToPath(new URL('../../packages/cli/bin/lsync', import.meta.url))

/** The built command on two nodes that share a store: the second one is reached over ssh. */
describe.skipIf(!needs('root, sshd and file-system tools', canMountImages() && hasSshd))(
  'lsync switch over ssh',
  () => {
    const disk = useFileSystem('ext4')
    const server = useSshServer()
    let at: string

    const lsync = (...args: string[]) => {
      const { status, stdout, stderr } = spawnSync(LSYNC, args, { encoding: 'utf8' })
      return { status, stdout, stderr }
    }
    const done = (...args: string[]) => {
      const result = lsync(...args)
      if (result.status !== 0) throw new Error(`lsync ${args.join(' ')}: ${result.stderr}`)
      return result.stdout
    }
    const state = (node: string) => `${at}/${node}`
    const merged = (node: string) => `${state(node)}/roots/lab/merged`

    beforeAll(() => {
      at = disk.current.fresh()
      buildTree(`${at}/base`, dir({ etc: dir({ hostname: file('lab') }) }))
      for (const node of ['one', 'two']) mkdirSync(state(node), { mode: 0o700 })
      done('root', 'init', 'lab', '--home', `${at}/home`, '--base', `${at}/base`, '--state', state('one'))
      for (const node of ['one', 'two']) {
        const set = (name: string, command: string) => [`--${name}`, command]
        done(
          ...['hooks', 'lab', '--home', `${at}/home`, '--state', state(node)],
          ...set('start', `touch ${at}/runs-${node}`),
          ...set('stop', `rm -f ${at}/runs-${node}`),
          ...set('health', `[ -e ${at}/runs-${node} ] && [ -e "$LSYNC_MERGED/etc/hostname" ]`),
        )
      }
      done('root', 'mount', 'lab', '--home', `${at}/home`, '--state', state('one'))
      writeFileSync(`${at}/runs-one`, '')
    })
    afterAll(() => {
      for (const node of ['one', 'two']) lsync('root', 'unmount', 'lab', '--state', state(node))
    })

    const remote = (node: string) => {
      const { ssh, port, user, address } = server.current
      const url = `ssh://${user}@${address}:${port}`
      return { url, how: ['--rsh', ssh.join(' '), '--remote-lsync', LSYNC, '--remote-state', state(node)] }
    }

    test('goes there, driven from the source, and comes back, driven from the target', () => {
      writeFileSync(`${merged('one')}/made`, 'on one')
      const { url, how } = remote('two')
      const there = done('switch', 'lab', '--to', url, ...how, '--state', state('one'), '--json')
      const lines = there
        .trim()
        .split('\n')
        .map((line) => JSON.parse(line) as { type: string; downtimeMs?: number })
      expect(lines.at(-1)).toMatchObject({ type: 'switched', root: 'lab', version: 2 })
      expect(existsSync(`${at}/runs-one`)).toBe(false)
      expect(existsSync(`${at}/runs-two`)).toBe(true)
      expect(readFileSync(`${merged('two')}/made`, 'utf8')).toBe('on one')
      writeFileSync(`${merged('two')}/made`, 'on two')
      done('switch', 'lab', '--from', remote('two').url, '--to', 'here', ...how, '--state', state('one'))
      expect(existsSync(`${at}/runs-two`)).toBe(false)
      expect(readFileSync(`${merged('one')}/made`, 'utf8')).toBe('on two')
      expect(done('root', 'versions', 'lab', '--state', state('one'))).toContain('3')
    })

    test('a node that cannot be reached is an error, and the container was not stopped', () => {
      const { how } = remote('two')
      const { status, stderr } = lsync('switch', 'lab', '--to', 'ssh://127.0.0.2', ...how, '--state', state('one'))
      expect(status).toBe(1)
      expect(stderr).toContain('CONNECT_FAILED')
      expect(existsSync(`${at}/runs-one`)).toBe(true)
    })
  },
)

/** What a third machine has: a way to both nodes, and nothing of the root. */
describe.skipIf(!needs('root, sshd and file-system tools', canMountImages() && hasSshd))(
  'a switch that a third machine drives',
  () => {
    type Node = 'one' | 'two'
    const NODES = ['one', 'two'] as const
    const disk = useFileSystem('ext4')
    const servers = useShared(
      'the nodes',
      async () => {
        const at = disk.current.fresh()
        const serve = (node: Node) =>
          startSshServer({ config: [`SetEnv SHLVL=1 LSYNC_STATE=${at}/${node} PATH=${process.env['PATH']}`] })
        return { at, one: await serve('one'), two: await serve('two') }
      },
      async ({ one, two }) => {
        await one.stop()
        await two.stop()
      },
    )
    const on = (node: Node, ...args: string[]) => lsync([...args, '--state', `${servers.current.at}/${node}`])
    const merged = (node: Node) => `${servers.current.at}/${node}/roots/lab/merged`
    const runsOn = () => NODES.filter((node) => existsSync(`${servers.current.at}/runs-${node}`))

    /** Hooks of both nodes, of which one is in the middle of its work from `begun` until `goes-on` is there. */
    function setHooks(middle?: 'stop' | 'start'): void {
      const { at } = servers.current
      for (const node of NODES) {
        const isMiddle = (middle === 'stop' && node === 'one') || (middle === 'start' && node === 'two')
        const waits = `; touch ${at}/begun; while [ ! -e ${at}/goes-on ]; do sleep 0.05; done`
        const set = (name: string, command: string) => [
          `--${name}`,
          `${command}${isMiddle && middle === name ? waits : ''}`,
        ]
        const hooks = [
          ...set('stop', `rm -f ${at}/runs-${node}`),
          ...set('start', `touch ${at}/runs-${node}`),
          ...set('health', `[ -e ${at}/runs-${node} ]`),
        ]
        expect(on(node, 'hooks', 'lab', '--home', `${at}/home`, ...hooks)).toMatchObject({ code: 0 })
      }
    }

    /** Reaches both nodes by their ports, and says which process is the line to each. */
    function writeRsh(): string {
      const { at, one, two } = servers.current
      const lines = [one, two].map(
        ({ port, ssh }) => `${port}) echo $$ > ${at}/line-${port}; exec ${ssh.join(' ')} "$@";;`,
      )
      writeFileSync(`${at}/rsh`, `#!/bin/sh\ncase $2 in\n${lines.join('\n')}\nesac\n`, { mode: 0o755 })
      return `${at}/rsh`
    }

    beforeAll(() => {
      const { at } = servers.current
      buildTree(`${at}/base`, dir({ etc: dir({ hostname: file('lab') }) }))
      for (const node of NODES) mkdirSync(`${at}/${node}`, { mode: 0o700 })
      const init = ['root', 'init', 'lab', '--home', `${at}/home`, '--base', `${at}/base`]
      expect(on('one', ...init)).toMatchObject({ code: 0 })
      expect(on('one', 'root', 'mount', 'lab')).toMatchObject({ code: 0 })
      writeFileSync(`${at}/runs-one`, '')
    })
    afterAll(() => {
      for (const node of NODES) on(node, 'root', 'unmount', 'lab')
    })

    // In which hook it is when that happens, and where it runs once each end has found out by itself what is left to do.
    test.each<[victim: 'the driver' | `the line to ${Node}`, hook: 'stop' | 'start', place: Node]>([
      ['the driver', 'stop', 'one'],
      ['the line to one', 'stop', 'one'],
      ['the driver', 'start', 'two'],
      ['the line to two', 'start', 'two'],
    ])(
      'ends with %s in the middle of the %s hook: one container, on node %s, with all that it wrote',
      async (victim, hook, place) => {
        const { at } = servers.current
        const urlOf = (node: Node) =>
          `ssh://${servers.current[node].user}@127.0.0.1:${servers.current[node].port}${at}/home`
        const drive = (from: Node, to: Node) =>
          startLsync([
            ...['switch', 'lab', '--from', urlOf(from), '--to', urlOf(to)],
            ...['--rsh', writeRsh(), '--remote-lsync', LSYNC],
          ])
        if (runsOn()[0] === 'two') {
          setHooks()
          expect(await drive('two', 'one').ended).toMatchObject({ code: 0 })
        }
        for (const name of ['begun', 'goes-on']) rmSync(`${at}/${name}`, { force: true })
        setHooks(hook)
        writeFileSync(`${merged('one')}/made`, `${victim} ${hook}`)
        const { child, ended } = drive('one', 'two')
        await until(() => existsSync(`${at}/begun`))
        if (victim === 'the driver') child.kill('SIGKILL')
        else
          process.kill(
            Number(
              readFileSync(`${at}/line-${servers.current[victim === 'the line to one' ? 'one' : 'two'].port}`, 'utf8'),
            ),
            'SIGKILL',
          )
        writeFileSync(`${at}/goes-on`, '')
        const { code, stderr } = await ended
        if (victim === 'the driver') expect(code).toBe(null)
        else expect({ code, stderr }).toMatchObject({ code: 1, stderr: expect.stringContaining('SWITCH_FAILED') })
        const isOver = () => /"phase":"(?:undone|committed)"/.test(readFileSync(`${at}/home/switch.json`, 'utf8'))
        await until(() => isOver() && runsOn().join() === place)
        const mounted = NODES.filter((node) =>
          on(node, 'root', 'status', 'lab', '--json').stdout.includes('"isMounted":true'),
        )
        expect(mounted).toEqual([place])
        expect(readFileSync(`${merged(place)}/made`, 'utf8')).toBe(`${victim} ${hook}`)
        // That node may write, and the other one may not.
        expect(on(place, 'solidify', 'lab', '--live')).toMatchObject({ code: 0 })
        expect(on(place === 'one' ? 'two' : 'one', 'root', 'mount', 'lab')).toMatchObject({
          code: 4,
          stderr: expect.stringContaining('(LEASE_HELD)'),
        })
      },
    )
  },
)

async function until(holds: () => boolean): Promise<void> {
  const endMs = performance.now() + 60_000
  while (!holds()) {
    if (performance.now() > endMs) throw new Error('it has not come to that within a minute')
    await delay(50)
  }
}
