import { execFileSync } from 'node:child_process'
import { type ByteString, hostPath } from '@lsync/posix'
import { createSnapshot, exportSnapshot, type Snapshot } from '@lsync/snapshot'
import { describe, expect, test } from 'vitest'
import { buildTree, dir, file, linkTo, symlink } from '../support/build.ts'
import { needs } from '../support/needs.ts'
import { newRepository, temporaryDirectory } from '../support/repository.ts'
import { isPresent } from '../support/system.ts'
import { diffTrees, readTree, type Tree } from '../support/tree.ts'

const isRoot = process.geteuid?.() === 0

const before = dir({
  kept: file('kept', { uid: 1000 }),
  gone: file('gone'),
  'gone dir': dir({ below: dir({ f: file('x') }) }),
  'file to dir': file('x'),
  'dir to file': dir({ f: file('x') }),
  'only mode': dir({ inside: file('same') }),
  deep: dir({ deeper: dir({ changed: file('before'), same: file('same'), gone: file('x') }) }),
  one: file('linked'),
  other: linkTo('one'),
  many: dir(Object.fromEntries(Array.from({ length: 50 }, (_, i) => [`f${i}`, file(`${i}`)]))),
})

const after = dir({
  kept: file('kept', { uid: 1000 }),
  'file to dir': dir({ new: file('y') }),
  'dir to file': file('y'),
  'only mode': dir({ inside: file('same') }, { mode: 0o700 }),
  deep: dir({ deeper: dir({ changed: file('after', { xattrs: { 'user.a': 'b' } }), same: file('same') }) }),
  one: file('linked'),
  other: linkTo('one'),
  another: linkTo('one'),
  link: symlink('kept'),
  many: dir(Object.fromEntries(Array.from({ length: 50 }, (_, i) => [`f${i}`, file(`${i}`)]))),
})

/** The root's own times are the unpacker's. */
function comparable(tree: Tree): Tree {
  return new Map([...tree].filter(([path]) => path !== ''))
}

async function versions() {
  const path = temporaryDirectory()
  const { repository } = await newRepository()
  const saved: { snapshot: Snapshot; path: ByteString }[] = []
  for (const [name, tree] of [
    ['before', before],
    ['after', after],
  ] as const) {
    buildTree(`${path}/${name}`, tree)
    const { snapshotId } = await createSnapshot(repository, { targets: [{ path: hostPath(`${path}/${name}`) }] })
    saved.push({ snapshot: await repository.readSnapshot(snapshotId), path: hostPath(`${path}/${name}`) })
  }
  const [first, second] = saved as [(typeof saved)[0], (typeof saved)[0]]
  const unpacked = (ref: string) => {
    execFileSync('umoci', ['unpack', '--image', `image:${ref}`, ref], { cwd: path, stdio: 'pipe' })
    return readTree(`${path}/${ref}/rootfs`)
  }
  return { path, layout: hostPath(`${path}/image`), repository, first, second, unpacked }
}

describe.skipIf(!needs('root and umoci', isRoot && isPresent('umoci')))('versions as images', () => {
  test('a snapshot is one layer, and what changed since another is one on that one’s image', async () => {
    const { path, layout, repository, first, second, unpacked } = await versions()
    const whole = await exportSnapshot({ repository, layout, version: first, ref: 'first' })
    expect(diffTrees(comparable(readTree(`${path}/before`)), comparable(unpacked('first')))).toEqual([])
    const request = { repository, layout, version: second, since: first, base: { ref: 'first' } }
    const report = await exportSnapshot({ ...request, ref: 'second' })
    expect(report.layers).toBe(2)
    expect(diffTrees(comparable(readTree(`${path}/after`)), comparable(unpacked('second')))).toEqual([])
    expect(whole.layer.entries).toBeGreaterThan(60)
    // The 50 files and their directory did not change, and neither did `kept`.
    expect(report.layer.entries).toBeLessThan(20)
    const again = await exportSnapshot({ ...request, ref: 'third' })
    expect(again.digest).toBe(report.digest)
  })
})
