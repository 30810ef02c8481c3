import { execFileSync } from 'node:child_process'
import { createReadStream, mkdirSync, readFileSync } from 'node:fs'
import { exportLayer, type Namespace } from '@lsync/overlay-merge'
import { hostPath, type LsyncError } from '@lsync/posix'
import {
  checkRepository,
  createSnapshot,
  createSnapshotOfTar,
  findSnapshot,
  LocalBackend,
  Repository,
  removeLocks,
  restoreSnapshot,
} from '@lsync/snapshot'
import { describe, expect, onTestFinished, test } from 'vitest'
import { encodeHeader } from '../../packages/overlay-merge/src/encodings/tar-header.ts'
import { buildRichTree } from '../layers/rich-tree.ts'
import { buildTree, dir, file, linkTo, opaque, sparse, symlink, whiteout } from '../support/build.ts'
import { FailingBackend, GoneError } from '../support/failing-backend.ts'
import { needs } from '../support/needs.ts'
import { newRepository, PASSWORD, Restic, reopen, temporaryDirectory } from '../support/repository.ts'
import { isPresent } from '../support/system.ts'
import { diffTrees, readTree, type Tree } from '../support/tree.ts'

const isRoot = needs('root', process.geteuid?.() === 0)
const hasTar = needs('GNU tar', isPresent('tar'))
const hasRestic = needs('restic', isPresent('restic'))

const PAX = ['--format=posix', '--xattrs', '--xattrs-include=*', '--acls', '--numeric-owner']

function save(repository: Repository, archive: AsyncIterable<Uint8Array>, form: 'plain' | 'oci' | Namespace = 'plain') {
  return createSnapshotOfTar(repository, { archive, path: hostPath('/srv/root'), form })
}

/** What tar and a snapshot of a tar cannot have: sockets; restic makes no use of symlinks' times, and fills holes. */
function comparable(tree: Tree, isForRestic: boolean): Tree {
  return new Map(
    [...tree]
      .filter(([, { type }]) => type !== 'socket')
      .map(([path, node]) => [path, isForRestic && node.type === 'symlink' ? { ...node, mtimeNs: 0n } : node]),
  )
}

function problemOf(work: Promise<unknown>): Promise<string> {
  return work.then(
    () => 'nothing',
    (error: LsyncError) => error.code,
  )
}

async function* bytesOf(...parts: Buffer[]): AsyncGenerator<Buffer> {
  yield* parts
}

describe.skipIf(!isRoot || !hasTar)('a snapshot of a tar', () => {
  test.each([
    ['as it is', []],
    ['with holes, through gzip', ['--sparse', '--gzip']],
  ])('restores to the tree that was packed (%s), by us and by restic', async (_name, args) => {
    const { path, repository } = await newRepository()
    const root = temporaryDirectory()
    const tree = buildRichTree(`${root}/tree`)
    execFileSync('tar', [...PAX, ...args, '-cf', `${root}/t.tar`, '-C', tree, '.'], { stdio: 'pipe' })
    const { problems, snapshotId } = await save(repository, createReadStream(`${root}/t.tar`))
    expect(problems).toEqual([])
    const target = hostPath(`${root}/ours`)
    await restoreSnapshot(repository, { snapshot: await findSnapshot(repository, snapshotId), target })
    expect(diffTrees(comparable(readTree(tree), false), comparable(readTree(target), false), { holes: false })).toEqual(
      [],
    )
    if (!hasRestic) return
    const restic = new Restic(path)
    expect(restic.run('check', '--read-data')).toContain('no errors were found')
    restic.run('restore', snapshotId, '--target', `${root}/theirs`)
    // restic 0.14 takes a symlink's target for UTF-8.
    const seen = (path: string) =>
      new Map([...comparable(readTree(path), true)].filter(([name]) => name !== 'link bytes'))
    expect(diffTrees(seen(tree), seen(`${root}/theirs/srv/root`), { holes: false })).toEqual([])
  })

  test('of 20 MB in a few files has the chunks that a directory of them has', async () => {
    const { repository } = await newRepository()
    const root = temporaryDirectory()
    mkdirSync(`${root}/tree`)
    for (const name of ['a', 'b']) execFileSync('sh', ['-c', `head -c 10000000 /dev/urandom > ${root}/tree/${name}`])
    execFileSync('tar', ['-cf', `${root}/t.tar`, '-C', `${root}/tree`, '.'])
    const first = await save(repository, createReadStream(`${root}/t.tar`))
    expect(first.counts).toMatchObject({ filesNew: 2, directories: 1, readBytes: 20_000_000 })
    const target = hostPath(`${root}/back`)
    const snapshot = await findSnapshot(repository, first.snapshotId)
    await restoreSnapshot(repository, { snapshot, target })
    const isSame = (name: string) => readFileSync(`${target}/${name}`).equals(readFileSync(`${root}/tree/${name}`))
    expect(['a', 'b'].map(isSame)).toEqual([true, true])
    const second = await createSnapshot(repository, { targets: [{ path: hostPath(`${root}/tree`) }] })
    expect(second.counts.addedBytes).toBeLessThan(10_000)
  })

  test('of a large file, which all threads store, has the chunks that a directory of it has', async () => {
    const { path, repository } = await newRepository()
    const root = temporaryDirectory()
    mkdirSync(`${root}/tree`)
    execFileSync('sh', ['-c', `seq 1 20000000 | head -c 150000000 >${root}/tree/large; echo small >${root}/tree/small`])
    execFileSync('tar', ['-cf', `${root}/t.tar`, '-C', `${root}/tree`, '.'])
    const first = await save(repository, createReadStream(`${root}/t.tar`))
    expect(first.counts.readBytes).toBe(150_000_006)
    const again = await reopen(path)
    expect((await checkRepository(again, { readData: true })).problems).toEqual([])
    const second = await createSnapshot(again, { targets: [{ path: hostPath(`${root}/tree`) }] })
    // Nothing of the content: a few trees.
    expect(second.counts.addedBytes).toBeLessThan(10_000)
    expect(first.counts.objectsAdded).toBeGreaterThan(30)
  })

  test('of a large file into a repository that fails meanwhile ends with its reason', async () => {
    const { path } = await newRepository()
    const root = temporaryDirectory()
    execFileSync('sh', ['-c', `head -c 150000000 /dev/urandom >${root}/large`])
    execFileSync('tar', ['-cf', `${root}/t.tar`, '-C', root, 'large'])
    // The lock and a pack of what one thread stores; then it is gone.
    const backend = new FailingBackend(new LocalBackend(hostPath(path)), 7, 'before')
    const failing = await Repository.open(backend, { password: PASSWORD })
    onTestFinished(() => failing.close())
    await expect(save(failing, createReadStream(`${root}/t.tar`))).rejects.toThrow(GoneError)
    const whole = await reopen(path)
    await removeLocks(whole, { all: true })
    expect((await save(whole, createReadStream(`${root}/t.tar`))).counts.filesNew).toBe(1)
    const { problems } = await checkRepository(whole, { readData: true })
    expect(problems.filter(({ severity }) => severity === 'error')).toEqual([])
  })

  test('is the same tree whenever it is made, and stores nothing the second time', async () => {
    const { repository } = await newRepository()
    const root = temporaryDirectory()
    buildTree(`${root}/tree`, dir({ d: dir({ f: file('1'), g: linkTo('d/f') }), s: sparse(1 << 20, [[70_000, 'x']]) }))
    execFileSync('tar', [...PAX, '-cf', `${root}/t.tar`, '-C', `${root}/tree`, '.'])
    const first = await save(repository, createReadStream(`${root}/t.tar`))
    const second = await save(repository, createReadStream(`${root}/t.tar`))
    expect(second.tree).toBe(first.tree)
    expect(second.counts.objectsAdded).toBe(0)
  })

  test('a layer of an image is saved as the kernel layer that it stands for, and so is the tar of one', async () => {
    const { repository } = await newRepository()
    const root = temporaryDirectory()
    const spec = dir({ gone: whiteout(), d: opaque({ f: file('x') }), e: dir({ w: whiteout(), l: symlink('f') }) })
    buildTree(`${root}/upper`, spec)
    const from = hostPath(`${root}/upper`)
    for (const [form, exported] of [
      ['oci', 'oci'],
      ['trusted', 'tar'],
    ] as const) {
      await exportLayer({ from, form: exported, to: hostPath(`${root}/${form}.tar`) })
      const { snapshotId, problems } = await save(repository, createReadStream(`${root}/${form}.tar`), form)
      expect(problems).toEqual([])
      const target = hostPath(`${root}/${form}`)
      await restoreSnapshot(repository, { snapshot: await findSnapshot(repository, snapshotId), target })
      // An image does not tell when a name was deleted.
      const timeless = (path: string) =>
        [...readTree(path)].map(([name, node]) =>
          node.rdev === 0 ? [name, { ...node, mtimeNs: 0n, mode: 0 }] : [name, node],
        )
      expect(timeless(target)).toEqual(timeless(from))
    }
  })
})

describe('an archive that is', () => {
  const member = (name: string, type = '0', linkName = '') =>
    encodeHeader({ name, type, sizeBytes: 0, linkName, mode: 0o644 })
  const end = Buffer.alloc(1024)
  test.each<readonly [string, string, readonly Buffer[]]>([
    ['cut', 'ARCHIVE_BROKEN', [member('a')]],
    ['leading out of its root', 'ENTRY_REFUSED', [member('../a'), end]],
    ['writing through a symlink of its own', 'ENTRY_REFUSED', [member('a', '2', '/etc'), member('a/b'), end]],
    ['linking out of its root', 'ENTRY_REFUSED', [member('a', '1', '../etc/passwd'), end]],
    ['hiding a whiteout in a plain tree', 'ENTRY_REFUSED', [member('a', '3'), end]],
    ['larger than was allowed', 'LIMIT_EXCEEDED', [member('a'), member('b'), member('c'), end]],
  ])('%s leaves no snapshot (%s)', async (_what, code, parts) => {
    const { repository } = await newRepository()
    const request = { archive: bytesOf(...parts), path: hostPath('/'), limits: { maxEntries: 2 } }
    expect(await problemOf(createSnapshotOfTar(repository, request))).toBe(code)
    expect(await repository.listIds('snapshot')).toEqual([])
    expect(await repository.listIds('lock')).toEqual([])
  })
})
