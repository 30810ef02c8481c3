import { closeSync, mkdirSync, openSync, readFileSync, writeFileSync } from 'node:fs'
import { describe, expect, test, vi } from 'vitest'
import { hostPath } from '../../packages/posix/src/index.ts'
import { openSync as startSync } from '../../packages/sync/src/index.ts'
import { mayMount } from '../posix/privileges.ts'
import { temporary } from '../posix/temporary.ts'
import { useFileSystem } from '../support/image.ts'
import { mountOverlay, plainOptions } from '../support/overlay.ts'
import { mapShared, unmount } from '../support/system.ts'

describe.skipIf(!mayMount).each(['ext4', 'tmpfs'] as const)('a mapping of a file on %s', (kind) => {
  const fs = useFileSystem(kind)

  test('may write after the file was carried over, and go, without changing any time: nothing is missed', async () => {
    const root = fs.current.fresh()
    // Another file system than the upper's: a barrier there writes back nothing here.
    const elsewhere = temporary()
    for (const name of ['l', 'u', 'w', 'm']) mkdirSync(`${root}/${name}`)
    mountOverlay({ lowers: [`${root}/l`], upper: `${root}/u`, work: `${root}/w` }, plainOptions, `${root}/m`)
    try {
      const request = {
        source: hostPath(`${root}/u`),
        targets: [hostPath(`${elsewhere.path}/t`)],
        stateDir: `${elsewhere.path}/state`,
      }
      const sync = await startSync({ ...request, tickMs: 20, sweepMs: 0, heedsPressure: false })
      try {
        await sync.flush()
        writeFileSync(`${root}/m/f`, 'before')
        const fd = openSync(`${root}/m/f`, 'r+')
        const mapping = mapShared(fd, 6)
        if (mapping === undefined) throw new Error('no shared mapping')
        closeSync(fd)
        mapping.fill(0, 1, 0x42)
        // Old enough for its times to count.
        await new Promise((resolve) => setTimeout(resolve, 300))
        await sync.flush()
        await vi.waitFor(() => expect(readFileSync(`${elsewhere.path}/t/f`, 'latin1')).toBe('Before'), 20_000)
        mapping.fill(5, 1, 0x45)
        mapping.unmap()
        await sync.flush()
        expect(readFileSync(`${elsewhere.path}/t/f`, 'latin1')).toBe('BeforE')
      } finally {
        await sync.stop()
      }
    } finally {
      unmount(`${root}/m`)
    }
  })
})
