import { spawn } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { cgroupsOf, freezeCgroup, thawCgroup } from '@lsync/container-root'
import { afterEach, describe, expect, test } from 'vitest'
import { needs } from '../support/needs.ts'

// Where this process is, of each kind that can be frozen here.
const homes = cgroupsOf(process.pid).filter(isWritable)

function isWritable(cgroup: string): boolean {
  const probe = `${cgroup}/lsync-try-${process.pid}`
  try {
    mkdirSync(probe)
    rmdirSync(probe)
    return true
  } catch {
    return false
  }
}

describe.skipIf(!needs('a cgroup that can be frozen', homes.length > 0))('freezing', () => {
  let stop: (() => Promise<void>) | undefined
  afterEach(async () => {
    await stop?.()
    stop = undefined
  })

  test.each(homes)('processes below %s stand still until they are thawed', async (home) => {
    const cgroup = `${home}/lsync-test-${process.pid}`
    mkdirSync(cgroup)
    const child = spawn('sh', ['-c', 'while :; do echo; sleep 0.01; done'], { stdio: ['ignore', 'pipe', 'ignore'] })
    stop = async () => {
      thawCgroup(cgroup)
      const ended = new Promise((resolve) => child.once('close', resolve))
      child.kill('SIGKILL')
      await ended
      for (let attempt = 0; existsSync(cgroup); attempt++) {
        try {
          rmdirSync(cgroup)
        } catch (error) {
          if (attempt > 100) throw error
          await delay(50)
        }
      }
    }
    writeFileSync(`${cgroup}/cgroup.procs`, String(child.pid))
    let lines = 0
    child.stdout.on('data', (chunk: Buffer) => {
      lines += chunk.length
    })
    const grows = async () => {
      const before = lines
      for (let look = 0; lines === before && look < 200; look++) await delay(50)
      return lines > before
    }
    expect(await grows()).toBe(true)
    const thaw = await freezeCgroup(cgroup)
    await delay(200) // what was in the pipe
    const frozen = lines
    await delay(500)
    expect(lines).toBe(frozen)
    thaw()
    expect(await grows()).toBe(true)
    // After a crash somebody else thaws it.
    await freezeCgroup(cgroup)
    thawCgroup(cgroup)
    expect(await grows()).toBe(true)
  })

  test('the cgroup of this very process is refused, and what is none', async () => {
    await expect(freezeCgroup(homes[0] as string)).rejects.toMatchObject({ code: 'FREEZE_FAILED' })
    await expect(freezeCgroup('/tmp')).rejects.toMatchObject({ code: 'FREEZE_FAILED' })
    thawCgroup('/nowhere/at/all')
    expect(readFileSync('/proc/self/status', 'utf8')).toContain('State:')
  })
})
