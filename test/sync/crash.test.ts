import { spawn } from 'node:child_process'
import {
  appendFileSync,
  linkSync,
  mkdirSync,
  renameSync,
  rmSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import { fileURLToPath } from 'node:url'
import type { HostPath } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { useFileSystem } from '../support/image.ts'
import { canMountImages } from '../support/ready.ts'
import { differences, keepWorkers, withSync } from '../support/syncing.ts'

const child = fileURLToPath(new URL('../support/sync-child.ts', import.meta.url))
const killer = new URL('../support/kill-at.ts', import.meta.url).href

interface Ended {
  readonly wasKilled: boolean
  readonly durable: readonly { bytes: number; files: number }[]
}

/** Runs a sync in a process of its own, which dies at a system call of its main or worker threads. */
async function runSync(at: string, kill: { main?: number; worker?: number } = {}, checkpointMs = 5000): Promise<Ended> {
  const process_ = spawn(
    process.execPath,
    ['--import', killer, child, `${at}/u`, `${at}/t`, `${at}/state`, String(checkpointMs)],
    {
      stdio: ['ignore', 'pipe', 'inherit'],
      env: {
        ...process.env,
        LSYNC_TEST_KILL_MAIN: String(kill.main ?? -1),
        LSYNC_TEST_KILL_WORKER: String(kill.worker ?? -1),
      },
    },
  )
  let text = ''
  process_.stdout.on('data', (data) => {
    text += data
  })
  const [code, signal] = await new Promise<[number | null, string | null]>((resolve) =>
    process_.once('close', (...result) => resolve(result)),
  )
  if (signal !== 'SIGKILL') expect(code).toBe(0)
  const lines = text.split('\n').flatMap((line) => (line === '' ? [] : [JSON.parse(line)]))
  return {
    wasKilled: signal === 'SIGKILL',
    durable: lines.flatMap(({ durable }) => (durable === undefined ? [] : [durable])),
  }
}

/** Syncs to the end in this process. Gives the bytes that were sent. */
function finish(at: string): Promise<number> {
  const request = {
    source: `${at}/u` as HostPath,
    targets: [`${at}/t` as HostPath],
    stateDir: `${at}/state`,
    once: true,
  }
  return withSync(request, async (sync) => {
    const { isSettled, failures } = await sync.flush()
    expect({ isSettled, failures }).toEqual({ isSettled: true, failures: [] })
    return sync.status.targets[0]?.bytes ?? 0
  })
}

function write(path: string, content: string, more: { mode?: number } = {}): void {
  mkdirSync(path.slice(0, path.lastIndexOf('/')), { recursive: true })
  writeFileSync(path, content, more)
}

function build(upper: string): void {
  for (const directory of ['a', 'a/deep/er', 'b', 'c', 'swap1', 'swap2', 'gone/x', 'kept']) {
    for (let index = 0; index < 4; index++) write(`${upper}/${directory}/f${index}`, `${directory} ${index}`)
  }
  write(`${upper}/big`, 'x'.repeat(3 << 20))
  linkSync(`${upper}/a/f0`, `${upper}/b/linked`)
  symlinkSync('nowhere', `${upper}/b/symlink`)
}

/** Everything that needs an order: moves in the way of others, replaced types, new trees with moved things in them. */
function change(upper: string): void {
  renameSync(`${upper}/swap1`, `${upper}/aside`)
  renameSync(`${upper}/swap2`, `${upper}/swap1`)
  renameSync(`${upper}/aside`, `${upper}/swap2`)
  renameSync(`${upper}/a/deep`, `${upper}/deep`)
  write(`${upper}/new/inner/f`, 'new')
  renameSync(`${upper}/a`, `${upper}/new/inner/a`)
  write(`${upper}/a/f1`, 'another a')
  rmSync(`${upper}/gone`, { recursive: true })
  symlinkSync('c', `${upper}/gone`)
  renameSync(`${upper}/c/f0`, `${upper}/c/moved`)
  renameSync(`${upper}/c/f1`, `${upper}/c/f0`)
  unlinkSync(`${upper}/c/f2`)
  mkdirSync(`${upper}/c/f2`)
  write(`${upper}/c/f2/x`, 'x')
  appendFileSync(`${upper}/big`, 'more')
  appendFileSync(`${upper}/b/linked`, 'through another name')
  unlinkSync(`${upper}/b/f1`)
}

/** What may happen while no sync runs: what was under way is undone, removed, replaced. */
function changeAgain(upper: string): void {
  renameSync(`${upper}/new/inner/a`, `${upper}/back`)
  rmSync(`${upper}/new`, { recursive: true })
  rmSync(`${upper}/a`, { recursive: true })
  renameSync(`${upper}/c/f0`, `${upper}/c/f1`)
  rmSync(`${upper}/c/f2`, { recursive: true })
  write(`${upper}/c/f2`, 'a file again')
  unlinkSync(`${upper}/gone`)
  renameSync(`${upper}/swap2`, `${upper}/gone`)
}

describe.skipIf(!canMountImages())('a sync that is killed', () => {
  const disk = useFileSystem('ext4')
  keepWorkers(disk)

  // Points spread over a whole run; each is one more process, so not every call has its turn in each run of the tests.
  test('in the middle of a first pass starts again with a target that becomes equal', async () => {
    for (let point = 0, killed = true; killed && point < 400; point += 67) {
      const at = disk.current.fresh()
      build(`${at}/u`)
      killed = (await runSync(at, { worker: point })).wasKilled
      if (point % 2 === 1) changeAgainFirst(`${at}/u`)
      await finish(at)
      expect(differences(`${at}/u`, `${at}/t`)).toEqual([])
    }
  })

  test.each([
    ['worker', 17],
    ['main', 13],
  ] as const)('at a call of a %s thread while it carries changes over ends up equal', async (thread, step) => {
    let reached = 0
    for (let point = 0, killed = true; killed && point < 120; point += step) {
      const at = disk.current.fresh()
      build(`${at}/u`)
      await finish(at)
      change(`${at}/u`)
      killed = (await runSync(at, { [thread]: point })).wasKilled
      if (killed) reached++
      if (point % 2 === 1) changeAgain(`${at}/u`)
      await finish(at)
      expect(differences(`${at}/u`, `${at}/t`), `killed at ${point}`).toEqual([])
    }
    expect(reached).toBeGreaterThan(1)
  })

  test('sends again at most what lies after its last checkpoint', async () => {
    let at = ''
    let total = 0
    let safeBytes = 0
    // A quick machine may be there before the first checkpoint is: then the next one is killed later.
    for (const worker of [6000, 8500, 11_000]) {
      at = disk.current.fresh()
      total = 0
      for (let index = 0; index < 6000; index++) {
        const content = 'x'.repeat(index % 3000)
        total += content.length
        write(`${at}/u/${index % 30}/d${index % 300}/f${index}`, content)
      }
      const first = await runSync(at, { worker }, 1)
      expect(first.wasKilled).toBe(true)
      safeBytes = first.durable.at(-1)?.bytes ?? 0
      if (safeBytes > 0) break
    }
    expect(safeBytes).toBeGreaterThan(0)
    const sent = await finish(at)
    expect(differences(`${at}/u`, `${at}/t`)).toEqual([])
    expect(sent).toBeLessThanOrEqual(total - safeBytes)
  })
})

function changeAgainFirst(upper: string): void {
  rmSync(`${upper}/a/deep`, { recursive: true })
  renameSync(`${upper}/b`, `${upper}/kept/b`)
  unlinkSync(`${upper}/c/f0`)
}
