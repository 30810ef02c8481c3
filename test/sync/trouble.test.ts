import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import type { HostPath } from '@lsync/posix'
import { openSync, type Sync, type SyncRequest } from '@lsync/sync'
import { describe, expect, test, vi } from 'vitest'
import { mayMount } from '../posix/privileges.ts'
import { temporary } from '../posix/temporary.ts'
import { commandTarget, writeRsh } from '../support/command-target.ts'
import { useFileSystem } from '../support/image.ts'
import { canMountImages } from '../support/ready.ts'
import { differences, keepWorkers, withSync } from '../support/syncing.ts'
import { mount, run, unmount } from '../support/system.ts'

const WAIT = { timeout: 60_000, interval: 20 }
const child = fileURLToPath(new URL('../support/sync-child.ts', import.meta.url))
const QUEUE = '/proc/sys/fs/fanotify/max_queued_events'

function build(upper: string, files = 200): number {
  let bytes = 0
  for (let index = 0; index < files; index++) {
    const content = `${index} `.repeat(index % 400)
    bytes += content.length
    mkdirSync(`${upper}/${index % 20}/d${index % 7}`, { recursive: true })
    writeFileSync(`${upper}/${index % 20}/d${index % 7}/${index}`, content)
  }
  return bytes
}

/** What is told to be wrong, by its codes. */
function codesOf(sync: Sync): Set<string> {
  const codes = new Set<string>()
  sync.events.on('problem', ({ error }) => codes.add((error as { code?: string }).code ?? String(error)))
  sync.events.on('failure', ({ code }) => codes.add(code))
  return codes
}

const bytesOf = (sync: Sync): number => sync.status.targets[0]?.bytes ?? 0

/** In what the store differs from the upper, but for lsync's own state in it. */
function inStore(at: string): string[] {
  return differences(`${at}/u`, `${at}/store`).filter((line) => !line.startsWith('.lsync-'))
}

/** A flush that may find the target not back yet. */
async function flushed(sync: Sync): Promise<void> {
  await vi.waitFor(async () => expect(await sync.flush()).toMatchObject({ isSettled: true, failures: [] }), WAIT)
}

describe.skipIf(!mayMount)('a target on a mount', () => {
  /** An upper, a place to mount at with the mount made by `prepare`, and a request. */
  async function within(use: (at: string, request: SyncRequest) => Promise<void>): Promise<void> {
    const { path: at } = temporary()
    for (const name of ['u', 'store', 'disk']) mkdirSync(`${at}/${name}`)
    mount('tmpfs', `${at}/disk`, 'tmpfs', 0, 'size=64m')
    mkdirSync(`${at}/disk/t`)
    run('mount', '--bind', `${at}/disk/t`, `${at}/store`)
    build(`${at}/u`)
    try {
      await use(at, {
        source: `${at}/u` as HostPath,
        targets: [`${at}/store` as HostPath],
        stateDir: `${at}/state`,
        tickMs: 20,
        sweepMs: 0,
      })
    } finally {
      while (unmount(`${at}/store`));
      unmount(`${at}/disk`)
    }
  }

  test('that is read-only for a while gets all that happened meanwhile, and nothing twice', async () => {
    await within(async (at, request) => {
      await withSync(request, async (sync) => {
        const codes = codesOf(sync)
        await flushed(sync)
        const before = bytesOf(sync)
        run('mount', '-o', 'remount,ro,bind', `${at}/store`)
        run('mount', '-o', 'remount,ro', `${at}/disk`)
        writeFileSync(`${at}/u/1/new`, 'new')
        renameSync(`${at}/u/2`, `${at}/u/moved`)
        rmSync(`${at}/u/3`, { recursive: true })
        await vi.waitFor(() => expect([...codes].some((code) => /BATCH_FAILED|EROFS/.test(code))).toBe(true), WAIT)
        writeFileSync(`${at}/u/1/later`, 'later')
        run('mount', '-o', 'remount,rw', `${at}/disk`)
        run('mount', '-o', 'remount,rw,bind', `${at}/store`)
        await flushed(sync)
        expect(inStore(at)).toEqual([])
        expect(bytesOf(sync) - before).toBeLessThanOrEqual(2 * 'newlater'.length)
      })
    })
  })

  test('that is unmounted and mounted again is not missed, and nothing is written to the bare directory', async () => {
    await within(async (at, request) => {
      await withSync(request, async (sync) => {
        const codes = codesOf(sync)
        await flushed(sync)
        const before = bytesOf(sync)
        const { sequence } = sync.status.targets[0]?.checkpoint ?? { sequence: -1 }
        run('umount', '-l', `${at}/store`)
        writeFileSync(`${at}/u/1/new`, 'new')
        await vi.waitFor(() => expect([...codes]).toContain('TARGET_GONE'), WAIT)
        await expect(sync.flush()).rejects.toMatchObject({ code: 'TARGET_GONE' })
        expect(sync.status.targets[0]?.checkpoint?.sequence).toBe(sequence)
        expect(readdirSync(`${at}/store`)).toEqual([])
        run('mount', '--bind', `${at}/disk/t`, `${at}/store`)
        await flushed(sync)
        expect(inStore(at)).toEqual([])
        expect(bytesOf(sync) - before).toBeLessThanOrEqual(2 * 'new'.length)
      })
    })
  })

  test('over which something else is mounted leaves that alone', async () => {
    await within(async (at, request) => {
      await withSync(request, async (sync) => {
        const codes = codesOf(sync)
        await flushed(sync)
        mount('tmpfs', `${at}/store`, 'tmpfs', 0, 'size=1m')
        writeFileSync(`${at}/u/1/new`, 'new')
        await vi.waitFor(() => expect([...codes]).toContain('TARGET_GONE'), WAIT)
        expect(readdirSync(`${at}/store`)).toEqual([])
        unmount(`${at}/store`)
        await flushed(sync)
        expect(inStore(at)).toEqual([])
      })
    })
  })

  test('that is not mounted at the start is refused, and taken as it is when it is there', async () => {
    await within(async (at, request) => {
      await withSync({ ...request, once: true }, flushed)
      unmount(`${at}/store`)
      await expect(openSync({ ...request, once: true })).rejects.toMatchObject({ code: 'TARGET_GONE' })
      rmSync(`${at}/store`, { recursive: true })
      await expect(openSync({ ...request, once: true })).rejects.toMatchObject({ code: 'TARGET_GONE' })
      expect(existsSync(`${at}/store`)).toBe(false)
      mkdirSync(`${at}/store`)
      run('mount', '--bind', `${at}/disk/t`, `${at}/store`)
      await withSync({ ...request, once: true }, async (sync) => {
        await flushed(sync)
        expect(bytesOf(sync)).toBe(0)
      })
      // Whoever means it may say so.
      unmount(`${at}/store`)
      await withSync({ ...request, once: true, adopt: true }, flushed)
      expect(inStore(at)).toEqual([])
    })
  })

  test('of a server that is not mounted there is refused as well', async () => {
    await within(async (at, request) => {
      const rsh = writeRsh(at)
      const served = { ...request, once: true, targets: [commandTarget(rsh, `${at}/store/x`)] }
      await withSync(served, flushed)
      unmount(`${at}/store`)
      const again = { ...served, targets: [commandTarget(rsh, `${at}/store/x`)] }
      await expect(openSync(again)).rejects.toMatchObject({ code: 'TARGET_GONE' })
      mkdirSync(`${at}/store/x`)
      await expect(openSync(again)).rejects.toMatchObject({ code: 'TARGET_GONE' })
      expect(readdirSync(`${at}/store`)).toEqual(['x'])
    })
  })
})

describe.skipIf(!canMountImages())('when both ends', () => {
  const disk = useFileSystem('ext4')
  keepWorkers(disk)

  test('are killed at once, the next start sends at most what lies after the checkpoint', async () => {
    let reached = 0
    for (const after of [1, 3]) {
      const at = disk.current.fresh()
      const total = build(`${at}/u`, 2500)
      const rsh = writeRsh(at)
      const client = spawn(process.execPath, [child, `${at}/u`, `${at}/t`, `${at}/state`, '1', rsh], {
        stdio: ['ignore', 'pipe', 'inherit'],
        detached: true,
      })
      const closed = once(client, 'close')
      let durable = 0
      let told = 0
      for await (const line of createInterface({ input: client.stdout })) {
        durable = JSON.parse(line).durable.bytes
        // The server is in the process group of its client.
        if (++told === after) process.kill(-(client.pid as number), 'SIGKILL')
      }
      const [, signal] = await closed
      if (signal === 'SIGKILL') reached++
      const request = {
        source: `${at}/u` as HostPath,
        targets: [commandTarget(rsh, `${at}/t`)],
        stateDir: `${at}/state`,
        once: true,
      }
      await withSync(request, async (sync) => {
        await flushed(sync)
        expect(bytesOf(sync)).toBeLessThanOrEqual(total - durable)
      })
      expect(differences(`${at}/u`, `${at}/t`)).toEqual([])
    }
    expect(reached).toBeGreaterThan(0)
  })
})

describe.skipIf(!canMountImages())('with a queue of 16 events', () => {
  const disk = useFileSystem('ext4')
  keepWorkers(disk)

  test('a burst that it cannot hold is found by comparing, and nothing is sent that did not change', async () => {
    const at = disk.current.fresh()
    build(`${at}/u`)
    const request = {
      source: `${at}/u` as HostPath,
      targets: [`${at}/t` as HostPath],
      stateDir: `${at}/state`,
      sourceChoice: 'fanotify',
      boundedQueue: true,
    } as const
    const before = readFileSync(QUEUE, 'utf8')
    let sync: Sync
    // The kernel looks at it when a group is made.
    writeFileSync(QUEUE, '16')
    try {
      sync = await openSync({ tickMs: 20, sweepMs: 0, heedsPressure: false, ...request })
    } finally {
      writeFileSync(QUEUE, before)
    }
    try {
      await flushed(sync)
      const sent = bytesOf(sync)
      let changed = 0
      // Nobody takes events out of the queue while this thread is busy.
      for (let round = 0; round < 4; round++) {
        for (let index = 0; index < 100; index++) {
          const content = `round ${round}`
          mkdirSync(`${at}/u/${index % 20}/d${index % 7}`, { recursive: true })
          writeFileSync(`${at}/u/${index % 20}/d${index % 7}/${index}`, content)
          changed += content.length
        }
        mkdirSync(`${at}/u/new${round}/deep`, { recursive: true })
        for (let index = 0; index < 50; index++) writeFileSync(`${at}/u/new${round}/deep/${index}`, '')
        renameSync(`${at}/u/${round}`, `${at}/u/new${round}/moved`)
        mkdirSync(`${at}/u/${round}`)
        build(`${at}/u`, 20)
        await flushed(sync)
        expect(differences(`${at}/u`, `${at}/t`)).toEqual([])
      }
      expect(bytesOf(sync) - sent).toBeLessThan(2 * changed + 20_000)
    } finally {
      await sync.stop()
    }
  })
})
