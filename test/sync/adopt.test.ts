import {
  chmodSync,
  cpSync,
  existsSync,
  mkdirSync,
  renameSync,
  rmSync,
  truncateSync,
  utimesSync,
  writeFileSync,
} from 'node:fs'
import { dirname } from 'node:path'
import type { ByteString, HostPath } from '@lsync/posix'
import { RemoteTarget, type SyncRequest, type Target } from '@lsync/sync'
import { describe, expect, test } from 'vitest'
import { useFileSystem } from '../support/image.ts'
import { canMountImages } from '../support/ready.ts'
import { differences, keepWorkers, withSync } from '../support/syncing.ts'
import { run } from '../support/system.ts'
import { serveHere } from './wire.ts'

const BLOCK = 128 << 10

/** 3,000 files in one directory, which no answer of a server holds at once, and some elsewhere; 8 MB. */
function build(upper: string): void {
  mkdirSync(`${upper}/many`, { recursive: true })
  for (let index = 0; index < 3000; index++)
    writeFileSync(`${upper}/many/${index}`, `content of ${index} `.repeat(index % 50))
  for (let index = 0; index < 100; index++) {
    mkdirSync(`${upper}/d${index % 10}/deep/${index}`, { recursive: true })
    writeFileSync(`${upper}/d${index % 10}/deep/${index}/f`, `f${index}`)
  }
  writeFileSync(`${upper}/big`, Buffer.alloc(40 * BLOCK, 'big'))
  run('setfattr', '-n', 'user.kept', '-v', 'value', `${upper}/d3/deep/3/f`)
}

/** Changes of which 31 bytes and one block have to travel. */
function change(upper: string): number {
  writeFileSync(`${upper}/many/1234`, 'another content')
  writeFileSync(
    `${upper}/many/1235`,
    'content of 1235 '
      .repeat(1235 % 50)
      .toUpperCase()
      .slice(0, 16),
    { flag: 'r+' },
  )
  chmodSync(`${upper}/d1/deep/1/f`, 0o600)
  utimesSync(`${upper}/d2/deep/2/f`, 1000, 1000)
  rmSync(`${upper}/many/7`)
  rmSync(`${upper}/d4`, { recursive: true })
  const big = Buffer.alloc(40 * BLOCK, 'big')
  big.fill('x', 7 * BLOCK + 5, 7 * BLOCK + 9)
  writeFileSync(`${upper}/big`, big)
  return 'another content'.length + 'content of 1235 '.repeat(1235 % 50).length + BLOCK
}

/** Carries everything over; gives how many bytes of content were sent. */
function carry(at: string, target: HostPath | Target, more: Partial<SyncRequest> = {}): Promise<number> {
  const request = {
    source: `${at}/u` as HostPath,
    targets: [target],
    stateDir: `${at}/state`,
    once: true,
    ...more,
  }
  return withSync(request, async (sync) => {
    expect(await sync.flush()).toMatchObject({ isSettled: true, failures: [] })
    return sync.status.targets[0]?.bytes ?? 0
  })
}

describe.skipIf(!canMountImages())('a target that the index does not know', () => {
  const disk = useFileSystem('ext4')
  keepWorkers(disk)

  /** A target in `at`, and how many bytes its server has received since. */
  function targetIn(
    at: string,
    kind: 'local' | 'served',
  ): { readonly target: HostPath | Target; readonly received: () => Promise<number> } {
    if (kind === 'local') return { target: `${at}/t` as HostPath, received: async () => 0 }
    const served = serveHere({ root: at as HostPath, access: 'full' })
    const target = new RemoteTarget({
      description: 'served',
      path: 't' as ByteString,
      connect: async () => served.connection,
      compress: false,
      timeoutMs: 60_000,
      answerTimeoutMs: 60_000,
    })
    return { target, received: async () => (await served.report).receivedBytes }
  }

  test.each(['local', 'served'] as const)('%s: only what differs travels when the index is lost', async (kind) => {
    const at = disk.current.fresh()
    build(`${at}/u`)
    expect(await carry(at, targetIn(at, kind).target)).toBeGreaterThan(6 << 20)
    rmSync(`${at}/state`, { recursive: true })
    const toSend = change(`${at}/u`)
    const { target, received } = targetIn(at, kind)
    await expect(carry(at, target)).rejects.toMatchObject({ code: 'TARGET_NOT_OURS' })
    const again = targetIn(at, kind)
    expect(await carry(at, again.target, { adopt: true })).toBe(toSend)
    // Metadata of directories, names to keep, and questions.
    expect(await again.received()).toBeLessThan(toSend + (200 << 10))
    await received()
    expect(differences(`${at}/u`, `${at}/t`)).toEqual([])
    // And the index knows it all again.
    expect(await carry(at, targetIn(at, kind).target)).toBe(0)
  })

  test.each(['local', 'served'] as const)('%s: a copy that something else has made is not sent again', async (kind) => {
    const at = disk.current.fresh()
    build(`${at}/u`)
    run('cp', '-a', `${at}/u`, `${at}/t`)
    mkdirSync(`${at}/t/only/there`, { recursive: true })
    writeFileSync(`${at}/t/many/only there`, 'x')
    const { target } = targetIn(at, kind)
    expect(await carry(at, target, { adopt: true })).toBe(0)
    expect(differences(`${at}/u`, `${at}/t`)).toEqual([])
  })

  test('is written to where a name has another type, other names, or another inode behind it', async () => {
    const at = disk.current.fresh()
    build(`${at}/u`)
    cpSync(`${at}/u`, `${at}/t`, { recursive: true })
    rmSync(`${at}/t/many/1`)
    mkdirSync(`${at}/t/many/1/x`, { recursive: true })
    rmSync(`${at}/t/many/2`)
    run('ln', '-s', '3', `${at}/t/many/2`)
    run('ln', '-f', `${at}/t/many/4`, `${at}/t/many/5`)
    rmSync(`${at}/t/d1`, { recursive: true })
    writeFileSync(`${at}/t/d1`, 'a file')
    rmSync(`${at}/t/d2`, { recursive: true })
    run('ln', '-s', '../u/d3', `${at}/t/d2`)
    run('mkfifo', `${at}/t/d3/deep/3/g`)
    renameSync(`${at}/t/d3/deep/3/g`, `${at}/t/d3/deep/3/f`)
    truncateSync(`${at}/t/big`, 3 * BLOCK)
    await carry(at, `${at}/t` as HostPath, { adopt: true })
    expect(differences(`${at}/u`, `${at}/t`)).toEqual([])
    expect(existsSync(`${at}/u/d3/deep/3/f`)).toBe(true)
  })

  test('an index that is damaged is told of, and what differs is sent when it is removed', async () => {
    const at = disk.current.fresh()
    build(`${at}/u`)
    await carry(at, `${at}/t` as HostPath)
    const [data] = run('find', `${at}/state`, '-name', 'data.mdb').trim().split('\n')
    for (const damage of [
      () => truncateSync(data as string, 5000),
      () => truncateSync(data as string, 8192),
      () => writeFileSync(data as string, Buffer.alloc(100_000, 'no database')),
    ]) {
      damage()
      await expect(carry(at, `${at}/t` as HostPath)).rejects.toMatchObject({ code: 'INDEX_DAMAGED' })
    }
    rmSync(dirname(data as string), { recursive: true })
    const toSend = change(`${at}/u`)
    expect(await carry(at, `${at}/t` as HostPath, { adopt: true })).toBe(toSend)
    expect(differences(`${at}/u`, `${at}/t`)).toEqual([])
  })
})
