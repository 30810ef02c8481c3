import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, mkdirSync, openSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { hasWriters, statFd } from '../../packages/posix/src/index.ts'
import { useFileSystem } from '../support/image.ts'
import { mountOverlay, plainOptions } from '../support/overlay.ts'
import { mapShared, unmount } from '../support/system.ts'
import { mayMount } from './privileges.ts'

describe.skipIf(!mayMount).each(['ext4', 'xfs', 'btrfs', 'tmpfs'] as const)('who writes to a file on %s', (kind) => {
  const fs = useFileSystem(kind)

  function onUpper(use: (upper: string, merged: string) => void): void {
    const root = fs.current.fresh()
    for (const name of ['l', 'u', 'w', 'm']) mkdirSync(`${root}/${name}`)
    mountOverlay({ lowers: [`${root}/l`], upper: `${root}/u`, work: `${root}/w` }, plainOptions, `${root}/m`)
    try {
      use(`${root}/u`, `${root}/m`)
    } finally {
      unmount(`${root}/m`)
    }
  }

  test('is known on the upper of a writer in the merged mount, also of a mapping alone', () =>
    onUpper((upper, merged) => {
      writeFileSync(`${merged}/f`, 'before')
      const seen = openSync(`${upper}/f`, 'r')
      try {
        expect(hasWriters(seen)).toBe(false)
        const reader = openSync(`${merged}/f`, 'r')
        expect(hasWriters(seen)).toBe(false)
        closeSync(reader)
        const writer = openSync(`${merged}/f`, 'r+')
        expect(hasWriters(seen)).toBe(true)
        const mapping = mapShared(writer, 6)
        closeSync(writer)
        expect(hasWriters(seen)).toBe(true)
        mapping?.unmap()
        expect(hasWriters(seen)).toBe(false)
        // The lease was let go each time: a writer need not wait.
        closeSync(openSync(`${merged}/f`, 'r+'))
      } finally {
        closeSync(seen)
      }
    }))

  test('matters, since a mapping can write without changing a time', () =>
    onUpper((upper, merged) => {
      writeFileSync(`${merged}/f`, 'before')
      const seen = openSync(`${upper}/f`, 'r')
      const writer = openSync(`${merged}/f`, 'r+')
      const mapping = mapShared(writer, 6)
      closeSync(writer)
      try {
        mapping?.fill(0, 1, 0x42)
        const first = statFd(seen)
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 50)
        mapping?.fill(1, 1, 0x43)
        mapping?.unmap()
        const second = statFd(seen)
        expect([second.ctimeNs, second.mtimeNs]).toEqual([first.ctimeNs, first.mtimeNs])
      } finally {
        closeSync(seen)
      }
    }))
})

describe.skipIf(!mayMount)('asking who writes', () => {
  const fs = useFileSystem('tmpfs')

  test('does no harm while another process opens the file for writing again and again', async () => {
    const root = fs.current.fresh()
    writeFileSync(`${root}/f`, '')
    const loop = `const { openSync, closeSync } = require('node:fs'); console.log('on'); const end = Date.now() + 1500
      while (Date.now() < end) closeSync(openSync(process.argv[1], 'r+'))`
    const child = spawn(process.execPath, ['-e', loop, `${root}/f`], { stdio: ['ignore', 'pipe', 'inherit'] })
    await once(child.stdout, 'data')
    const ended = once(child, 'exit')
    let running = true
    ended.then(() => {
      running = false
    })
    const seen = openSync(`${root}/f`, 'r')
    const answers = new Set<boolean | undefined>()
    while (running) {
      for (let i = 0; i < 500; i++) answers.add(hasWriters(seen))
      await new Promise(setImmediate)
    }
    closeSync(seen)
    expect(answers).toEqual(new Set([true, false]))
    expect((await ended)[0]).toBe(0)
  })
})
