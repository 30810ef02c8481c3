import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { close, hostPath, openRoot, PosixError, setSyscallHook } from './index.ts'
import { WriteBack } from './write-back.ts'

describe('writing back while more is written', () => {
  let path: string
  let rootFd: number
  let calls: string[]
  let writeBack: WriteBack

  beforeEach(() => {
    path = mkdtempSync(join(tmpdir(), 'lsync-write-back-'))
    rootFd = openRoot(hostPath(path))
    calls = []
    setSyscallHook((call) => calls.push(call))
    writeBack = new WriteBack(rootFd)
  })

  afterEach(async () => {
    setSyscallHook(undefined)
    await writeBack.end()
    close(rootFd)
    rmSync(path, { recursive: true })
  })

  const begun = () => calls.filter((call) => call === 'syncfs').length

  it('begins when enough has come together, by bytes or by files', async () => {
    writeBack.wrote(63 << 20, 0)
    expect(begun()).toBe(0)
    writeBack.wrote(1 << 20, 0)
    expect(begun()).toBe(1)
    await writeBack.end()
    writeBack.wrote(0, 16_384)
    expect(begun()).toBe(2)
  })

  it('does not begin again before it has ended', async () => {
    writeBack.wrote(64 << 20, 0)
    writeBack.wrote(64 << 20, 0)
    expect(begun()).toBe(1)
    await writeBack.end()
    writeBack.wrote(1, 0)
    expect(begun()).toBe(2)
  })

  it('leaves it to the barrier to fail', async () => {
    setSyscallHook((syscall) => {
      if (syscall === 'syncfs') throw new PosixError('EIO', { syscall, path })
    })
    writeBack.wrote(64 << 20, 0)
    await expect(writeBack.end()).resolves.toBeUndefined()
  })
})
