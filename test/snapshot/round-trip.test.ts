import { spawn, spawnSync } from 'node:child_process'
import { closeSync, mkdirSync, openSync, readSync, rmSync, statSync } from 'node:fs'
import { setTimeout as sleep } from 'node:timers/promises'
import { hostPath } from '@lsync/posix'
import { createSnapshot, findSnapshot, restoreSnapshot } from '@lsync/snapshot'
import fc from 'fast-check'
import { describe, expect, onTestFinished, test } from 'vitest'
import { buildRichTree } from '../layers/rich-tree.ts'
import { buildTree, dir, file, sparse } from '../support/build.ts'
import { needs } from '../support/needs.ts'
import { anyRawLayer } from '../support/raw-layers.ts'
import { newRepository, PASSWORD, reopen, temporaryDirectory } from '../support/repository.ts'
import { runs } from '../support/runs.ts'
import { isPresent, unmount } from '../support/system.ts'
import { readTree } from '../support/tree.ts'

const isRoot = needs('root', process.geteuid?.() === 0)

describe.skipIf(!isRoot).each(['trusted', 'user'] as const)('any layer with %s.overlay marks', (namespace) => {
  test('comes back as the same layer, also over any other one', async () => {
    const { path, repository } = await newRepository()
    const root = temporaryDirectory()
    const anyLayer = anyRawLayer({ namespace, redirects: true, metacopies: true })
    await fc.assert(
      fc.asyncProperty(anyLayer, anyLayer, async (spec, other) => {
        for (const name of ['upper', 'back']) rmSync(`${root}/${name}`, { recursive: true, force: true })
        buildTree(`${root}/upper`, spec, { namespace })
        const { snapshotId, problems } = await createSnapshot(repository, {
          targets: [{ path: hostPath(`${root}/upper`) }],
        })
        expect(problems).toEqual([])
        const again = await reopen(path)
        const snapshot = await findSnapshot(again, snapshotId)
        const target = hostPath(`${root}/back`)
        expect((await restoreSnapshot(again, { snapshot, target })).problems).toEqual([])
        expect(readTree(target)).toEqual(readTree(`${root}/upper`))
        rmSync(target, { recursive: true })
        buildTree(target, other, { namespace })
        expect((await restoreSnapshot(again, { snapshot, target, delete: true })).problems).toEqual([])
        expect(readTree(target)).toEqual(readTree(`${root}/upper`))
      }),
      runs(8),
    )
  })
})

test.skipIf(!isRoot)('files of nothing and of more than 3 GB come back, with data beyond 2 GiB and holes', async () => {
  const { path, repository } = await newRepository()
  const root = temporaryDirectory()
  const sizeBytes = 3_000_000_007
  const pieces = [
    [0, 'start'],
    [2 ** 31 - 3, 'across two GiB'],
    [2_999_999_999, 'end'],
  ] as const
  buildTree(
    `${root}/tree`,
    dir({ empty: file(''), large: sparse(sizeBytes, pieces), 'only a hole': sparse(sizeBytes) }),
  )
  const { counts, problems } = await createSnapshot(repository, { targets: [{ path: hostPath(`${root}/tree`) }] })
  expect(problems).toEqual([])
  expect(counts).toMatchObject({ filesNew: 3, totalBytes: 2 * sizeBytes })
  const again = await reopen(path)
  const target = hostPath(`${root}/back`)
  await restoreSnapshot(again, { snapshot: await findSnapshot(again, 'latest'), target })
  // Comparing 6 GB of zeros byte by byte takes longer than saving them: their sizes, their holes and the data do.
  const blocks = (name: string) => statSync(`${target}/${name}`)
  expect(['empty', 'large', 'only a hole'].map((name) => blocks(name).size)).toEqual([0, sizeBytes, sizeBytes])
  expect(blocks('large').blocks * 512).toBeLessThan(1_000_000)
  expect(blocks('only a hole').blocks * 512).toBeLessThan(1_000_000)
  const fd = openSync(`${target}/large`, 'r')
  try {
    for (const [at, text] of pieces) {
      const bytes = Buffer.alloc(text.length)
      readSync(fd, bytes, 0, text.length, at)
      expect(bytes.toString()).toBe(text)
    }
  } finally {
    closeSync(fd)
  }
})

const canMount = needs('restic', isPresent('restic')) && needs('fusermount', isPresent('fusermount'))

test.skipIf(!isRoot || !canMount)('restic mounts what we saved, and shows the same content', async () => {
  const { path, repository } = await newRepository()
  const root = temporaryDirectory()
  const tree = buildRichTree(`${root}/tree`)
  await createSnapshot(repository, { targets: [{ path: tree }] })
  const mountPoint = `${root}/mounted`
  mkdirSync(mountPoint)
  const env = { ...process.env, RESTIC_PASSWORD: PASSWORD }
  const child = spawn('restic', ['--no-cache', '-r', path, 'mount', mountPoint], { env, stdio: 'ignore' })
  const ended = new Promise((resolve) => child.once('exit', resolve))
  onTestFinished(async () => {
    unmount(mountPoint)
    child.kill('SIGINT')
    await ended
  })
  const latest = `${mountPoint}/snapshots/latest${tree}`
  const isThere = () => spawnSync('test', ['-d', latest]).status === 0
  for (let attempt = 0; attempt < 600 && !isThere(); attempt++) await sleep(100)
  // FUSE shows no holes, and not all attributes; what files hold is what counts here.
  const contents = (path: string) => [...readTree(path)].map(([name, { type, content }]) => [name, type, content])
  expect(contents(latest)).toEqual(contents(tree))
})
