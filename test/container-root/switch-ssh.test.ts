import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { buildTree, dir, file } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { canMountImages } from '../support/ready.ts'
import { hasSshd, useSshServer } from '../support/sshd.ts'

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
