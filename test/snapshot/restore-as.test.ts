import { execFileSync } from 'node:child_process'
import { createWriteStream, mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { importLayer } from '@lsync/overlay-merge'
import { hostPath, type LsyncError } from '@lsync/posix'
import { createSnapshot, type Repository, restoreSnapshotAs, type Snapshot, type SnapshotForm } from '@lsync/snapshot'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { buildRichTree } from '../layers/rich-tree.ts'
import { buildTree, dir, file, linkTo, opaque, socket, sparse, whiteout } from '../support/build.ts'
import { needs } from '../support/needs.ts'
import { anyRawLayer } from '../support/raw-layers.ts'
import { newRepository, temporaryDirectory } from '../support/repository.ts'
import { runs } from '../support/runs.ts'
import { isPresent } from '../support/system.ts'
import { diffTrees, readTree, type Tree } from '../support/tree.ts'

const isRoot = needs('root', process.geteuid?.() === 0)
const hasTar = needs('GNU tar', isPresent('tar'))

async function saved(repository: Repository, path: string): Promise<Snapshot> {
  const { snapshotId, problems } = await createSnapshot(repository, { targets: [{ path: hostPath(path) }] })
  expect(problems).toEqual([])
  return repository.readSnapshot(snapshotId)
}

/** No form but the kernel's own tells when a name was deleted; holes do not count either. */
function timeless(path: string): Tree {
  return new Map(
    [...readTree(path)].map(([name, { dataBytes: _, allocatedBytes: __, ...node }]) => [
      name,
      node.type === 'character' && node.rdev === 0 ? { ...node, mtimeNs: 0n, mode: 0 } : node,
    ]),
  )
}

function without(tree: Tree, type: string): Tree {
  return new Map([...tree].filter(([, node]) => node.type !== type))
}

describe.skipIf(!isRoot)('a snapshot restored in another form', () => {
  test.skipIf(!hasTar)('is a tar that GNU tar unpacks to the tree that was saved, holes included', async () => {
    const { repository } = await newRepository()
    const root = temporaryDirectory()
    const tree = buildRichTree(`${root}/tree`)
    buildTree(`${root}/tree/more`, dir({ s: socket() }))
    const snapshot = await saved(repository, tree)
    const to = createWriteStream(`${root}/t.tar`)
    const report = await restoreSnapshotAs(repository, { snapshot, as: 'plain-tar', form: 'plain', to, sparse: true })
    expect(report.losses).toEqual([expect.objectContaining({ what: 'a socket' })])
    mkdirSync(`${root}/out`)
    const options = ['--xattrs', '--xattrs-include=*', '--acls', '--numeric-owner', '-p', '--same-owner']
    execFileSync('tar', ['-x', ...options, '-f', `${root}/t.tar`, '-C', `${root}/out`], { stdio: 'pipe' })
    expect(diffTrees(without(readTree(tree), 'socket'), readTree(`${root}/out`), { holes: false })).toEqual([])
    const holes = readTree(`${root}/out`).get('holes')
    expect(Number(holes?.allocatedBytes ?? 0)).toBeLessThan(holes?.sizeBytes ?? 1)
  })

  test.each<readonly [SnapshotForm, 'trusted' | 'user']>([
    ['trusted', 'user'],
    ['user', 'trusted'],
  ])('is the same layer with the marks of the other namespace (%s to %s), and back', async (from, namespace) => {
    const { repository } = await newRepository()
    const root = temporaryDirectory()
    const own = from as 'trusted' | 'user'
    await fc.assert(
      fc.asyncProperty(anyRawLayer({ namespace: own, redirects: false, metacopies: false }), async (spec) => {
        for (const name of ['upper', 'as', 'back']) rmSync(`${root}/${name}`, { recursive: true, force: true })
        buildTree(`${root}/upper`, spec, { namespace: own })
        const snapshot = await saved(repository, `${root}/upper`)
        const request = { as: `kernel-${namespace}`, form: from } as const
        await restoreSnapshotAs(repository, { snapshot, to: hostPath(`${root}/as`), ...request })
        const again = await saved(repository, `${root}/as`)
        const back = { as: `kernel-${own}`, form: namespace } as const
        await restoreSnapshotAs(repository, { snapshot: again, to: hostPath(`${root}/back`), ...back })
        const straight = { from: hostPath(`${root}/upper`), form: `kernel-${own}`, toForm: `kernel-${own}` } as const
        rmSync(`${root}/straight`, { recursive: true, force: true })
        await importLayer({ ...straight, to: hostPath(`${root}/straight`) })
        expect(timeless(`${root}/back`)).toEqual(timeless(`${root}/straight`))
      }),
      runs(5),
    )
  })

  test('is an OCI layer, from which the same upper comes back', async () => {
    const { repository } = await newRepository()
    const root = temporaryDirectory()
    const spec = dir({
      gone: whiteout(),
      d: opaque({ f: file('x'), big: file('y'.repeat(100_000)) }),
      e: dir({ one: file('linked'), two: linkTo('e/one') }),
      s: sparse(3_000_000, [[2_000_000, 'z']]),
    })
    buildTree(`${root}/upper`, spec)
    const snapshot = await saved(repository, `${root}/upper`)
    const to = createWriteStream(`${root}/l.tar.gz`)
    const report = await restoreSnapshotAs(repository, { snapshot, as: 'oci', to, compression: 'gzip' })
    expect(report).toMatchObject({ entries: 9, losses: [] })
    await importLayer({ from: hostPath(`${root}/l.tar.gz`), form: 'oci', to: hostPath(`${root}/back`) })
    expect(timeless(`${root}/back`)).toEqual(timeless(`${root}/upper`))
    const again = createWriteStream(`${root}/again.tar.gz`)
    await restoreSnapshotAs(repository, { snapshot, as: 'oci', to: again, compression: 'gzip' })
    expect(readFileSync(`${root}/again.tar.gz`).equals(readFileSync(`${root}/l.tar.gz`))).toBe(true)
  })

  test('names the file whose content is lost, and leaves nothing under its name', async () => {
    const { path, repository } = await newRepository()
    const root = temporaryDirectory()
    buildTree(`${root}/tree`, dir({ a: file('fine'), b: file('lost') }))
    const snapshot = await saved(repository, `${root}/tree`)
    for (const id of await repository.listIds('pack')) {
      const pack = `${path}/data/${id.slice(0, 2)}/${id}`
      const objects = await repository.readPack(id, readFileSync(pack).length)
      if (objects.some(({ kind }) => kind === 'data')) writeFileSync(pack, Buffer.alloc(2000))
    }
    const request = { snapshot, as: 'plain', to: hostPath(`${root}/back`) } as const
    const failure = (await restoreSnapshotAs(repository, request).catch((error) => error)) as LsyncError
    expect(failure.code).toBe('OBJECT_DAMAGED')
    expect(failure.message).toMatch(/^a: /)
    expect(readTree(root).has('back')).toBe(false)
  })
})
