import { mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { ContainerRoot, EtcdLeases, initHome, NodeState } from '@lsync/container-root'
import type { HostPath } from '@lsync/posix'
import { beforeAll, describe, expect, test } from 'vitest'
import { lsync } from '../cli/lsync.ts'
import { describeLeases } from '../conformance/leases.ts'
import { hasEtcd, useEtcd } from '../support/etcd.ts'
import { needs } from '../support/needs.ts'

const encode = (text: string) => Buffer.from(text).toString('base64')

describe.skipIf(!needs('etcd', hasEtcd))('with a real etcd', () => {
  const etcd = useEtcd()
  let roots = 0
  const fresh = () => `${etcd.current.endpoint}/root${++roots}`
  const open = (where: string, durationMs?: number) => {
    const slash = where.lastIndexOf('/')
    return new EtcdLeases({ endpoints: [where.slice(0, slash)], root: where.slice(slash + 1), durationMs })
  }
  const ask = async (method: string, body: object) => {
    const response = await fetch(`${etcd.current.endpoint}/v3/kv/${method}`, {
      method: 'POST',
      body: JSON.stringify(body),
    })
    return (await response.json()) as { kvs?: { value: string }[] }
  }

  describeLeases('in etcd', {
    fresh,
    open,
    async keep(where) {
      const key = encode(`lsync/${where.slice(where.lastIndexOf('/') + 1)}/claim`)
      const value = (await ask('range', { key })).kvs?.[0]?.value
      return async () => {
        await ask('put', { key, value })
      }
    },
  })

  test('a member that does not answer is passed over', async () => {
    const leases = new EtcdLeases({ endpoints: ['http://127.0.0.1:1', etcd.current.endpoint], root: 'passed-over' })
    expect((await leases.acquire({ node: 'one' })).epoch).toBe(1)
  })

  test('a home that says so has its lease in etcd, for every node that opens it', async () => {
    const at = mkdtempSync(`${tmpdir()}/lsync-etcd-`)
    try {
      for (const name of ['base', 'one', 'two']) mkdirSync(`${at}/${name}`, { mode: 0o700 })
      const home = `${at}/home` as HostPath
      const [one, two] = ['one', 'two'].map((name) => NodeState.open(`${at}/${name}` as HostPath)) as [
        NodeState,
        NodeState,
      ]
      const lease = { etcd: [etcd.current.endpoint], durationMs: 60_000 }
      const made = await initHome({ home, bases: [`${at}/base` as HostPath], node: one.node, namespace: 'user', lease })
      made.close()
      const first = await ContainerRoot.open(home, 'lab', { state: one })
      const second = await ContainerRoot.open(home, 'lab', { state: two })
      const { epoch, claim } = await first.keepLease()
      expect([epoch, claim.durationMs]).toEqual([1, 60_000])
      await expect(second.keepLease()).rejects.toMatchObject({ code: 'LEASE_HELD' })
      expect(readdirSync(`${home}/lease`)).toEqual([])
      await first.close()
      await second.close()
    } finally {
      rmSync(at, { recursive: true })
    }
  })

  test('a damaged claim is refused, and force goes on after it', async () => {
    const where = fresh()
    const leases = open(where)
    await leases.acquire({ node: 'one' })
    await ask('put', { key: encode(`lsync/root${roots}/claim`), value: encode('{"epoch":7,') })
    await expect(leases.acquire({ node: 'two' })).rejects.toMatchObject({ code: 'LEASE_DAMAGED' })
    expect((await leases.takeover({ node: 'two', force: true })).epoch).toBe(8)
  })

  test('while it is away nobody can say who may write, and claims stand when it is back', async () => {
    const leases = open(fresh(), 60_000)
    const lease = await leases.acquire({ node: 'one' })
    await etcd.current.stop()
    try {
      await expect(lease.check()).rejects.toMatchObject({ code: 'LEASE_UNREACHABLE' })
      await expect(lease.heartbeat()).rejects.toMatchObject({ code: 'LEASE_UNREACHABLE' })
    } finally {
      await etcd.current.start()
    }
    await lease.check()
    await lease.heartbeat()
    await lease.release()
  })
})

describe.skipIf(!needs('etcd', hasEtcd))('with an etcd that asks for user and password', () => {
  const etcd = useEtcd()
  const user = { name: 'lsync', password: 'a secret' }
  const open = (root: string, who: { name: string; password: string } | undefined = user) =>
    new EtcdLeases({ endpoints: [etcd.current.endpoint], root, durationMs: 60_000, user: who })

  beforeAll(async () => {
    const ask = async (method: string, body: object) => {
      const response = await fetch(`${etcd.current.endpoint}/v3/auth/${method}`, {
        method: 'POST',
        body: JSON.stringify(body),
      })
      if (!response.ok) throw new Error(await response.text())
    }
    // What the operator does: a user that may write what lsync keeps, and nothing else.
    for (const name of ['root', 'lsync']) await ask('role/add', { name })
    const perm = { permType: 'READWRITE', key: encode('lsync/'), range_end: encode('lsync0') }
    await ask('role/grant', { name: 'lsync', perm })
    await ask('user/add', { name: 'root', password: 'another' })
    await ask('user/add', user)
    for (const name of ['root', 'lsync']) await ask('user/grant', { user: name, role: name })
    await ask('enable', {})
  })

  test('a lease is claimed, kept, handed over and taken over', async () => {
    const leases = open('claimed')
    const lease = await leases.acquire({ node: 'one' })
    await lease.heartbeat()
    await lease.check()
    await expect(leases.acquire({ node: 'two' })).rejects.toMatchObject({ code: 'LEASE_HELD' })
    const again = await open('claimed').resume(lease.claim)
    await again.release({ to: 'two' })
    const second = await open('claimed').acquire({ node: 'two' })
    expect(second.epoch).toBe(2)
    expect((await open('claimed').takeover({ node: 'three', force: true })).epoch).toBe(3)
    await expect(second.check()).rejects.toMatchObject({ code: 'LEASE_LOST' })
  })

  test('who is not known is told so, and nothing is claimed', async () => {
    for (const who of [undefined, { name: 'lsync', password: 'wrong' }]) {
      const leases = new EtcdLeases({ endpoints: [etcd.current.endpoint], root: 'unknown', user: who })
      await expect(leases.acquire({ node: 'one' })).rejects.toMatchObject({
        code: 'LEASE_UNREACHABLE',
        message: expect.stringMatching(/etcd says 4/),
      })
    }
    expect(await open('unknown').read()).toBeUndefined()
  })

  test('a token that is valid no more is asked for anew, within the same question', async () => {
    const leases = open('restarted')
    const lease = await leases.acquire({ node: 'one' })
    // Its simple tokens do not outlive it.
    await etcd.current.stop()
    await etcd.current.start()
    await lease.check()
    await lease.heartbeat()
    await lease.release()
  })

  test('the nodes of a home have them in their environment', () => {
    const at = mkdtempSync(`${tmpdir()}/lsync-etcd-`)
    try {
      for (const name of ['base', 'one', 'two']) mkdirSync(`${at}/${name}`, { mode: 0o700 })
      writeFileSync(`${at}/password`, 'a secret\n', { mode: 0o600 })
      const known = { LSYNC_ETCD_USER: 'lsync', LSYNC_ETCD_PASSWORD_FILE: `${at}/password` }
      const run = (node: string, env: Record<string, string>, ...args: string[]) =>
        lsync([...args, '--home', `${at}/home`, '--state', `${at}/${node}`], { env })
      const lease = ['--lease', etcd.current.endpoint.replace('http:', 'etcd:'), '--lease-duration', '1m']
      expect(run('one', known, 'root', 'init', 'lab', '--base', `${at}/base`, ...lease)).toMatchObject({ code: 0 })
      expect(run('one', {}, 'root', 'mount', 'lab')).toMatchObject({
        code: 1,
        stderr: expect.stringContaining('(LEASE_UNREACHABLE)'),
      })
      expect(run('one', known, 'root', 'mount', 'lab')).toMatchObject({ code: 0 })
      try {
        expect(run('two', known, 'root', 'mount', 'lab')).toMatchObject({
          code: 4,
          stderr: expect.stringContaining('(LEASE_HELD)'),
        })
        expect(run('one', { LSYNC_ETCD_USER: 'lsync' }, 'root', 'mount', 'lab')).toMatchObject({ code: 2 })
      } finally {
        lsync(['root', 'unmount', 'lab', '--state', `${at}/one`], { env: known })
      }
    } finally {
      rmSync(at, { recursive: true })
    }
  })
})
