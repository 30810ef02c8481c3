import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import type { ByteString } from '@lsync/posix'
import { expect, test } from 'vitest'
import { IndexStore, ROOT_ID } from './index-store.ts'
import { ROW_BYTES, Row } from './model/row.ts'
import { giveBackMemory, whileMapping } from './rest.ts'

/** Kilobytes of an index that are in this process. */
function residentKb(path: string): number {
  const [, after = ''] = readFileSync('/proc/self/smaps', 'latin1').split(`${path}/data.mdb\n`)
  return Number(/^Rss: +(\d+) kB/m.exec(after)?.[1])
}

test('pages of an index leave the process when nothing happens, not while it is written to, and nothing is lost', async () => {
  const path = mkdtempSync(`${tmpdir()}/lsync-rest-`)
  const index = await IndexStore.open(path, 'upper')
  try {
    const names = Array.from({ length: 20_000 }, (_, i) => `name-${i}` as ByteString)
    const root = { id: ROOT_ID, parent: 0, name: '' as ByteString, bits: 0, isPending: false, handle: undefined }
    const rows = names.map((name) => ({
      set: 'row' as const,
      directory: ROOT_ID,
      row: new Row(name, Buffer.alloc(ROW_BYTES, name)).with({ name }),
    }))
    await index.commit([{ set: 'directory', record: root }, ...rows])
    expect(index.rows(ROOT_ID)).toHaveLength(names.length)
    const before = residentKb(path)
    expect(before).toBeGreaterThan(1000)
    await whileMapping(async () => expect(giveBackMemory()).toBe(false))
    expect(residentKb(path)).toBeGreaterThan(1000)
    expect(giveBackMemory()).toBe(true)
    expect(residentKb(path)).toBeLessThan(before / 2)
    expect(
      index
        .rows(ROOT_ID)
        .map(({ name }) => name)
        .sort(),
    ).toEqual(names.sort())
  } finally {
    await index.close()
    rmSync(path, { recursive: true })
  }
})
