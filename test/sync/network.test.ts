import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { describe, expect, test } from 'vitest'
import { needs } from '../support/needs.ts'
import { hasNetem, hasNetwork, useNetwork } from '../support/network.ts'
import { hasSshd, startSshServer, useSshServer } from '../support/sshd.ts'

const mayServe = needs('openssh-server', hasSshd)
const mayJoin = needs('network namespaces, tc and iptables', hasNetwork)

function ssh([program, ...args]: readonly [string, ...string[]]): {
  status: number | null
  stdout: string
  stderr: string
} {
  return spawnSync(program, args, { encoding: 'utf8' })
}

describe.skipIf(!mayServe)('the sshd that tests connect to', () => {
  const server = useSshServer()

  test('lets in who has the key, and runs what was asked for', () => {
    const { ssh: client, host } = server.current
    expect(ssh([...client, host, 'echo', '$((6 * 7))'])).toMatchObject({ status: 0, stdout: '42\n' })
  })

  test('runs the forced command of its key whatever was asked for', () => {
    const { ssh: client, host, allow } = server.current
    allow('restrict,command="echo forced: $SSH_ORIGINAL_COMMAND"')
    expect(ssh([...client, host, 'id']).stdout).toBe('forced: id\n')
    allow('')
    expect(ssh([...client, host, 'echo', 'free']).stdout).toBe('free\n')
  })

  test('a cut connection ends the client', async () => {
    const { ssh: client, host, cutConnections, log } = server.current
    const [program, ...args] = [...client, host, 'echo here; sleep 600']
    const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'ignore'] })
    await once(child.stdout, 'data')
    const ended = once(child, 'exit')
    expect(cutConnections()).toBe(1)
    expect((await ended)[0]).toBe(255)
    expect(log()).toContain('Accepted publickey')
  })

  test('a server with another key than the known one is refused', async () => {
    const other = await startSshServer()
    try {
      await other.changeHostKey()
      expect(ssh([...other.ssh, other.host, 'true'])).toMatchObject({ status: 255 })
    } finally {
      await other.stop()
    }
  })
})

describe.skipIf(!mayServe || !mayJoin)('two nodes joined by a line', () => {
  const network = useNetwork()

  test('one reaches the sshd of the other, but not while the line is cut, nor beyond what it carries', async () => {
    const { left, right, cut, mend, disturb } = network.current
    const server = await startSshServer({ namespace: right })
    try {
      const client = [...left.enter, ...server.ssh, '-o', 'ConnectTimeout=1', server.host] as const
      expect(ssh([...client, 'echo', 'reached'])).toMatchObject({ stdout: 'reached\n' })
      cut()
      expect(ssh([...client, 'true'])).toMatchObject({ status: 255 })
      mend()
      disturb({ lossPercent: 100 })
      expect(ssh([...client, 'true'])).toMatchObject({ status: 255 })
      disturb({ bitsPerSecond: 4_000_000, ...(hasNetem ? { delayMs: 5 } : {}) })
      const startedAt = performance.now()
      expect(ssh([...client, 'head -c 500000 /dev/urandom']).status).toBe(0)
      expect(performance.now() - startedAt).toBeGreaterThan(800)
      disturb({})
      expect(ssh([...client, 'echo', 'again'])).toMatchObject({ stdout: 'again\n' })
    } finally {
      await server.stop()
    }
  })
})
