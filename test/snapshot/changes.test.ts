import { chmodSync, existsSync, mkdirSync, renameSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { type ByteString, hostPath, type SyscallHook, setSyscallHook } from '@lsync/posix'
import { createSnapshot, type Repository, type SourceChange } from '@lsync/snapshot'
import fc from 'fast-check'
import { describe, expect, onTestFinished, test } from 'vitest'
import { buildTree, dir, file } from '../support/build.ts'
import { needs } from '../support/needs.ts'
import { newRepository, reopen, temporaryDirectory } from '../support/repository.ts'
import { runs } from '../support/runs.ts'

const isRoot = needs('root', process.geteuid?.() === 0)

function save(repository: Repository, tree: string, changes?: readonly SourceChange[], more: object = {}) {
  const target = { path: hostPath(tree), ...(changes === undefined ? {} : { changes }) }
  return createSnapshot(repository, { targets: [target], ...more })
}

/** The tree of the saved directory and its own node: what lies above it is changed by other tests. */
async function savedDirectory(path: string, root: string): Promise<unknown> {
  const repository = await reopen(path)
  await repository.loadIndex()
  for (let id = root; ; ) {
    const [node] = await repository.readTree(id)
    if (node?.subtree === undefined) throw new Error('nothing was saved')
    if (node.name === 'tree') return node
    id = node.subtree
  }
}

const change = (path: string, scope: SourceChange['scope'] = 'entry'): SourceChange => ({
  path: path as ByteString,
  scope,
})

/** Places in a tree three deep, of two names each. */
const anyPath = fc.array(fc.constantFrom('a', 'b', 'c'), { minLength: 1, maxLength: 3 }).map((parts) => parts.join('/'))
type Step = {
  readonly what: 'write' | 'mkdir' | 'remove' | 'chmod' | 'symlink' | 'rename'
  readonly path: string
  readonly to: string
}
const anyStep: fc.Arbitrary<Step> = fc.record({
  what: fc.constantFrom('write', 'mkdir', 'remove', 'chmod', 'symlink', 'rename'),
  path: anyPath,
  to: anyPath,
})

/** Does a step where it makes sense, and says what a journal would: the names it touched and the directories they are in. */
function doStep(tree: string, { what, path, to }: Step, serial: number): SourceChange[] {
  const full = `${tree}/${path}`
  const above = (of: string) => change(of.includes('/') ? of.slice(0, of.lastIndexOf('/')) : '')
  try {
    if (what === 'write') writeFileSync(full, `content ${serial}`)
    else if (what === 'mkdir') mkdirSync(full)
    else if (what === 'chmod') chmodSync(full, serial % 2 === 0 ? 0o700 : 0o755)
    else if (what === 'symlink') symlinkSync(`to ${serial}`, full)
    else if (what === 'remove') {
      if (!existsSync(full)) return []
      rmSync(full, { recursive: true })
    } else {
      if (existsSync(`${tree}/${to}`)) return []
      renameSync(full, `${tree}/${to}`)
      return [change(path, 'tree'), above(path), change(to, 'tree'), above(to)]
    }
    return [change(path, what === 'remove' ? 'tree' : 'entry'), above(path)]
  } catch {
    return []
  }
}

describe.skipIf(!isRoot)('a snapshot from a list of changes', () => {
  test('is the one that looking at everything gives', async () => {
    const { path, repository } = await newRepository()
    const root = temporaryDirectory()
    const tree = `${root}/tree`
    await fc.assert(
      fc.asyncProperty(
        fc.array(anyStep, { maxLength: 12 }),
        fc.array(anyStep, { maxLength: 8 }),
        async (before, after) => {
          rmSync(tree, { recursive: true, force: true })
          mkdirSync(tree)
          for (const [serial, step] of before.entries()) doStep(tree, step, serial)
          const { snapshotId: parent } = await save(repository, tree)
          const changes = after.flatMap((step, serial) => doStep(tree, step, 100 + serial))
          const listed = await save(await reopen(path), tree, changes, { parent })
          const whole = await save(await reopen(path), tree, undefined, { parent: 'none' })
          expect(listed.problems).toEqual([])
          expect(await savedDirectory(path, listed.tree)).toEqual(await savedDirectory(path, whole.tree))
        },
      ),
      runs(25),
    )
  })

  async function large() {
    const { path, repository } = await newRepository()
    const tree = `${temporaryDirectory()}/tree`
    const folder = () => dir(Object.fromEntries(Array.from({ length: 20 }, (_, i) => [`f${i}`, file(`${i}`)])))
    buildTree(tree, dir(Object.fromEntries(Array.from({ length: 30 }, (_, i) => [`d${i}`, folder()]))))
    const { snapshotId: parent } = await save(repository, tree)
    return { path, repository: await reopen(path), tree, parent }
  }

  function countCalls(): Map<string, number> {
    const calls = new Map<string, number>()
    const count: SyscallHook = (syscall) => calls.set(syscall, (calls.get(syscall) ?? 0) + 1)
    setSyscallHook(count)
    onTestFinished(() => setSyscallHook(undefined))
    return calls
  }

  test('opens what changed, and nothing else', async () => {
    const { repository, tree, parent } = await large()
    writeFileSync(`${tree}/d3/f3`, 'changed')
    const calls = countCalls()
    const { counts } = await save(repository, tree, [change('d3/f3'), change('d3')], { parent })
    setSyscallHook(undefined)
    expect(counts).toMatchObject({ filesChanged: 1, filesNew: 0, readBytes: 7 })
    // The root, one directory, one file; and those above the tree, by their names.
    expect((calls.get('openat') ?? 0) + (calls.get('openat2') ?? 0)).toBeLessThan(12)
  })

  test('with other patterns than its parent looks at everything', async () => {
    const { path, repository, tree, parent } = await large()
    const report = await save(repository, tree, [], { excludes: ['f1?'], parent })
    const whole = await save(await reopen(path), tree, undefined, { excludes: ['f1?'], parent: 'none' })
    expect(await savedDirectory(path, report.tree)).toEqual(await savedDirectory(path, whole.tree))
  })

  test('without a parent looks at everything', async () => {
    const { tree } = await large()
    const { repository } = await newRepository()
    expect((await save(repository, tree, [change('d1')], { parent: 'none' })).counts.filesNew).toBe(600)
    await expect(save(repository, tree, [change('d1')])).rejects.toMatchObject({ code: 'SNAPSHOT_REQUEST_INVALID' })
  })

  test('a name that is listed and not there is gone', async () => {
    const { path, repository, tree, parent } = await large()
    rmSync(`${tree}/d4`, { recursive: true })
    const report = await save(repository, tree, [change('d4/f1'), change('d4'), change('')], { parent })
    const whole = await save(await reopen(path), tree, undefined, { parent: 'none' })
    expect(report.problems).toEqual([])
    expect(await savedDirectory(path, report.tree)).toEqual(await savedDirectory(path, whole.tree))
  })
})
