import { createHash } from 'node:crypto'
import {
  appendFileSync,
  chmodSync,
  existsSync,
  linkSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  truncateSync,
  writeFileSync,
} from 'node:fs'
import { AT_FDCWD, type ByteString, hostPath, PosixError, setSyscallHook, setTimes, statAt } from '@lsync/posix'
import { createSnapshot, findSnapshot, type Repository, type RestoreRequest, restoreSnapshot } from '@lsync/snapshot'
import { describe, expect, onTestFinished, test } from 'vitest'
import { buildRichTree } from '../layers/rich-tree.ts'
import { buildTree, character, dir, file, linkTo, opaque, socket, sparse, symlink, whiteout } from '../support/build.ts'
import { needs } from '../support/needs.ts'
import { aclOf } from '../support/operations.ts'
import { newRepository, Restic, reopen, temporaryDirectory } from '../support/repository.ts'
import { isPresent } from '../support/system.ts'
import { readTree } from '../support/tree.ts'

const isRoot = needs('root', process.geteuid?.() === 0)
const hasRestic = needs('restic', isPresent('restic'))

function save(repository: Repository, path: string) {
  return createSnapshot(repository, { targets: [{ path: hostPath(path) }] })
}

async function restore(repository: Repository, target: string, request: Partial<RestoreRequest> = {}) {
  const snapshot = request.snapshot ?? (await findSnapshot(repository, 'latest'))
  return restoreSnapshot(repository, { target: hostPath(target), ...request, snapshot })
}

/** Content that does not compress, the same on each run. */
function noise(lengthBytes: number, seed: string): string {
  return createHash('shake256', { outputLength: lengthBytes }).update(seed).digest().toString('latin1')
}

/** Two repositories' worth of what can go wrong: many sizes, whole chunks, links between directories. */
function largeTree() {
  return dir({
    big: file(noise(18_000_000, 'big')),
    'big too': file(noise(3_000_000, 'too')),
    zeros: sparse(40_000_000, [[17_000_001, 'middle']]),
    one: dir({ a: file('linked'), b: linkTo('one/a') }),
    two: dir({ c: linkTo('one/a'), d: file('') }),
    many: dir(
      Object.fromEntries(Array.from({ length: 1200 }, (_, i) => [`f${i}`, file(`content ${i % 100}`.repeat(40))])),
    ),
    nested: dir(
      Object.fromEntries(Array.from({ length: 20 }, (_, i) => [`d${i}`, dir({ x: dir({ y: file(`${i}`) }) })])),
    ),
  })
}

describe.skipIf(!isRoot)('a tree comes back as it was', () => {
  test.each([1, 2] as const)(
    'with everything that a file can have, from a repository of version %i',
    async (version) => {
      const { path, repository } = await newRepository(version)
      const directory = temporaryDirectory()
      const tree = buildRichTree(`${directory}/tree`)
      buildTree(`${tree}/more`, dir({ s: socket(), c: character(1, 5, { xattrs: { 'trusted.x': '\0' } }) }))
      await save(repository, tree)
      const report = await restore(await reopen(path), `${directory}/back`)
      expect(report.problems).toEqual([])
      expect(readTree(`${directory}/back`)).toEqual(readTree(tree))
    },
  )

  test.each([1, 3])(
    'with large files, thousands of small ones, and links between directories, by %i threads',
    async (workers) => {
      const { path, repository } = await newRepository()
      const directory = temporaryDirectory()
      buildTree(`${directory}/tree`, largeTree())
      await save(repository, `${directory}/tree`)
      const report = await restore(await reopen(path), `${directory}/back`, { workers })
      expect(report.problems).toEqual([])
      expect(readTree(`${directory}/back`)).toEqual(readTree(`${directory}/tree`))
    },
  )

  test('a layer comes back as the same layer', async () => {
    const { repository } = await newRepository()
    const directory = temporaryDirectory()
    buildTree(
      `${directory}/upper`,
      opaque({
        gone: whiteout(),
        d: opaque({ f: file('x'), gone: whiteout() }),
        r: dir({}, { marks: { redirect: '/a' } }),
      }),
    )
    await save(repository, `${directory}/upper`)
    await restore(repository, `${directory}/back`)
    expect(readTree(`${directory}/back`)).toEqual(readTree(`${directory}/upper`))
  })

  test.skipIf(!hasRestic).each(['1', '2'])('that restic saved in a repository of version %s', async (version) => {
    const directory = temporaryDirectory()
    const tree = buildRichTree(`${directory}/tree`)
    // restic 0.14 cannot keep the bytes of this one.
    rmSync(`${tree}/link bytes`)
    buildTree(`${tree}/more`, largeTree())
    const restic = new Restic(`${directory}/repository`)
    restic.run('init', '--repository-version', version)
    restic.run('backup', tree)
    const report = await restore(await reopen(restic.path), `${directory}/back`)
    expect(report.problems).toEqual([])
    expect(readTree(`${directory}/back`)).toEqual(readTree(tree))
  })
})

describe.skipIf(!isRoot)('restoring into a directory that is there', () => {
  async function saved() {
    const { repository } = await newRepository()
    const directory = temporaryDirectory()
    const tree = buildRichTree(`${directory}/tree`)
    await save(repository, tree)
    const target = `${directory}/back`
    await restore(repository, target)
    return { repository, directory, tree, target }
  }

  test('changes nothing where everything is right', async () => {
    const { repository, tree, target } = await saved()
    const before = statSync(`${target}/binary`, { bigint: true })
    const report = await restore(repository, target, { delete: true })
    expect(report.counts).toEqual({ create: 0, replace: 0, metadata: 0, remove: 0 })
    expect(statSync(`${target}/binary`, { bigint: true }).ctimeNs).toBe(before.ctimeNs)
    expect(readTree(target)).toEqual(readTree(tree))
  })

  test('mends what differs, and with delete removes what is too much', async () => {
    const { repository, tree, target } = await saved()
    appendFileSync(`${target}/binary`, 'more')
    chmodSync(`${target}/acl`, 0o777)
    rmSync(`${target}/dots`, { recursive: true })
    rmSync(`${target}/link`)
    symlinkSync('elsewhere', `${target}/link`)
    mkdirSync(`${target}/extra/deep`, { recursive: true })
    writeFileSync(`${target}/extra/deep/f`, '')
    rmSync(`${target}/old`)
    mkdirSync(`${target}/old/was/a/file`, { recursive: true })
    const report = await restore(repository, target, { delete: true })
    expect(report.problems).toEqual([])
    expect(report.counts.remove).toBe(1)
    expect(readTree(target)).toEqual(readTree(tree))
  })

  test('without delete keeps what is too much, and a directory that stands in the way', async () => {
    const { repository, target } = await saved()
    writeFileSync(`${target}/extra`, 'x')
    rmSync(`${target}/old`)
    mkdirSync(`${target}/old/dir`, { recursive: true })
    const report = await restore(repository, target)
    expect(report.problems).toEqual([expect.objectContaining({ path: 'old', code: 'TARGET_IN_THE_WAY' })])
    expect(readFileSync(`${target}/extra`, 'utf8')).toBe('x')
    expect(existsSync(`${target}/old/dir`)).toBe(true)
  })

  test('a file whose content changed under the same size and time is found out, unless times are trusted', async () => {
    const { repository, target } = await saved()
    const before = statAt(AT_FDCWD, `${target}/late` as ByteString)
    writeFileSync(`${target}/late`, 'AFTER 2242')
    setTimes(AT_FDCWD, `${target}/late` as ByteString, before.atimeNs, before.mtimeNs)
    await restore(repository, target, { trustTimes: true })
    expect(readFileSync(`${target}/late`, 'utf8')).toBe('AFTER 2242')
    await restore(repository, target)
    expect(readFileSync(`${target}/late`, 'utf8')).toBe('after 2242')
  })

  test('another name of a file that is replaced keeps its content', async () => {
    const { repository, directory, target } = await saved()
    rmSync(`${target}/old`)
    writeFileSync(`${directory}/outside`, 'not yours')
    linkSync(`${directory}/outside`, `${target}/old`)
    await restore(repository, target)
    expect(readFileSync(`${directory}/outside`, 'utf8')).toBe('not yours')
    expect(readFileSync(`${target}/old`, 'utf8')).toBe('before the epoch')
  })

  test('with dry-run changes nothing and says what would happen', async () => {
    const { repository, target } = await saved()
    rmSync(`${target}/dots`, { recursive: true })
    writeFileSync(`${target}/extra`, 'x')
    appendFileSync(`${target}/binary`, 'more')
    const before = readTree(target)
    const actions: string[] = []
    await restore(repository, target, {
      delete: true,
      dryRun: true,
      onAction: (...action) => actions.push(action.join(' ')),
    })
    expect(readTree(target)).toEqual(before)
    expect(actions.sort()).toEqual(
      ['create dots', 'create dots/-rf', 'create dots/ ', 'create dots/...', 'remove extra', 'replace binary'].sort(),
    )
    await restore(repository, `${target}-new`, { dryRun: true })
    expect(existsSync(`${target}-new`)).toBe(false)
  })

  test('gives nothing the attributes that a directory passes on', async () => {
    const { repository } = await newRepository()
    const directory = temporaryDirectory()
    buildTree(
      `${directory}/tree`,
      dir({ f: file('x'), d: dir({ g: file('y'), e: dir({}) }), l: symlink('f'), there: file('z') }),
    )
    await save(repository, `${directory}/tree`)
    const generous = { 'system.posix_acl_default': aclOf(9, 7).toString('latin1') }
    buildTree(
      `${directory}/parent`,
      dir({ back: dir({ there: file('old') }, { xattrs: generous }) }, { xattrs: generous }),
    )
    for (const target of ['parent/back', 'parent/new']) {
      await restore(repository, `${directory}/${target}`)
      expect(readTree(`${directory}/${target}`)).toEqual(readTree(`${directory}/tree`))
    }
  })

  test('goes on where an interrupted run stopped, and leaves nothing of it behind', async () => {
    const { repository } = await newRepository()
    const directory = temporaryDirectory()
    buildTree(`${directory}/tree`, largeTree())
    await save(repository, `${directory}/tree`)
    const abort = new AbortController()
    const run = restore(repository, `${directory}/back`, {
      signal: abort.signal,
      onProgress: ({ done }) => {
        if (done > 200) abort.abort(new Error('enough'))
      },
    })
    await expect(run).rejects.toThrow('enough')
    writeFileSync(`${directory}/back/.lsync-restore-0123456789abcdef`, 'left behind')
    await restore(repository, `${directory}/back`)
    expect(readTree(`${directory}/back`)).toEqual(readTree(`${directory}/tree`))
  })
})

describe.skipIf(!isRoot)('a part of a snapshot', () => {
  async function saved() {
    const { repository } = await newRepository()
    const directory = temporaryDirectory()
    const tree = `${directory}/tree`
    buildTree(
      tree,
      dir({ a: dir({ b: dir({ f: file('1', { mode: 0o600 }) }), 'x.o': file('') }), g: file('2'), l: symlink('g') }),
    )
    await save(repository, tree)
    return { repository, tree, target: `${directory}/back` }
  }

  test('is named by its path', async () => {
    const { repository, tree, target } = await saved()
    await restore(repository, target, { path: `${tree}/a/b` as ByteString })
    expect(readTree(target)).toEqual(readTree(`${tree}/a/b`))
  })

  test('may be one file', async () => {
    const { repository, tree, target } = await saved()
    await restore(repository, target, { path: `${tree}/a/b/f` as ByteString })
    expect(readTree(target).get('f')).toEqual(readTree(tree).get('a/b/f'))
  })

  test('is chosen by patterns, with the directories above', async () => {
    const { repository, target } = await saved()
    await restore(repository, target, { includes: ['b/f'], excludes: ['*.o'] })
    expect([...readTree(target).keys()]).toEqual(['', 'a', 'a/b', 'a/b/f'])
  })

  test('the whole lies under its own paths when the root is asked for', async () => {
    const { repository, tree, target } = await saved()
    await restore(repository, target, { path: '/' as ByteString })
    expect(readTree(`${target}${tree}`)).toEqual(readTree(tree))
  })

  test('that is not there is an error', async () => {
    const { repository, target } = await saved()
    await expect(restore(repository, target, { path: '/not/there' as ByteString })).rejects.toMatchObject({
      code: 'PATH_NOT_FOUND',
    })
  })
})

describe.skipIf(!isRoot)('damage and malice', () => {
  async function packOf(repository: Repository, kind: 'data' | 'tree'): Promise<string> {
    for await (const { name, sizeBytes } of repository.backend.list('pack')) {
      if ((await repository.readPack(name, sizeBytes))[0]?.kind === kind) return name
    }
    throw new Error('no such pack')
  }

  test.each([
    [
      'bits are flipped in',
      (path: string) =>
        writeFileSync(
          path,
          Buffer.from(readFileSync(path)).map((b, i) => (i === 20 ? b ^ 1 : b)),
        ),
    ],
    ['the end is missing of', (path: string) => truncateSync(path, 40)],
    ['there is no', (path: string) => rmSync(path)],
  ])('what is lost when %s a pack is named, and the rest is restored', async (_, damage) => {
    const { path, repository } = await newRepository()
    const directory = temporaryDirectory()
    buildTree(`${directory}/tree`, dir({ a: file('first'), d: dir({ b: file('second') }) }))
    await save(repository, `${directory}/tree`)
    const first = await packOf(repository, 'data')
    writeFileSync(`${directory}/tree/good`, 'in another pack')
    await save(repository, `${directory}/tree`)
    const file_ = `${path}/data/${first.slice(0, 2)}/${first}`
    chmodSync(file_, 0o600)
    damage(file_)
    const report = await restore(await reopen(path), `${directory}/back`)
    const lost = report.problems.map(({ path }) => path)
    expect(lost.length).toBeGreaterThan(0)
    expect(['a', 'd/b']).toEqual(expect.arrayContaining(lost))
    expect(report.problems.every(({ code }) => /^(OBJECT_DAMAGED|REPOSITORY_FILE_MISSING)$/.test(code))).toBe(true)
    expect(readFileSync(`${directory}/back/good`, 'utf8')).toBe('in another pack')
    for (const name of ['a', 'd/b']) expect(existsSync(`${directory}/back/${name}`)).toBe(!lost.includes(name as never))
    expect(readdirSync(`${directory}/back`).filter((name) => name.startsWith('.lsync'))).toEqual([])
  })

  test('a symlink that is put in the place of a directory leads nowhere', async () => {
    const { repository } = await newRepository()
    const directory = temporaryDirectory()
    buildTree(`${directory}/tree`, dir({ d: dir({ f: file('mine') }) }))
    await save(repository, `${directory}/tree`)
    mkdirSync(`${directory}/outside`)
    mkdirSync(`${directory}/back`)
    symlinkSync('../outside', `${directory}/back/d`)
    await restore(repository, `${directory}/back`)
    expect(readdirSync(`${directory}/outside`)).toEqual([])
    expect(readFileSync(`${directory}/back/d/f`, 'utf8')).toBe('mine')
  })

  test('a full disk ends the run with its reason', async () => {
    const { repository } = await newRepository()
    const directory = temporaryDirectory()
    buildTree(`${directory}/tree`, dir({ f: file('content') }))
    await save(repository, `${directory}/tree`)
    setSyscallHook((syscall, path) => {
      if (syscall === 'pwrite') throw new PosixError('ENOSPC', { syscall, path })
    })
    onTestFinished(() => setSyscallHook(undefined))
    await expect(restore(repository, `${directory}/back`)).rejects.toMatchObject({ code: 'ENOSPC' })
    expect(existsSync(`${directory}/back/f`)).toBe(false)
  })

  test('a large one is written back while it goes on, and is not reported when the disk fails at its end', async () => {
    const { repository } = await newRepository()
    const directory = temporaryDirectory()
    buildTree(`${directory}/tree`, dir({ zeros: sparse(70_000_000, []) }))
    await save(repository, `${directory}/tree`)
    let calls = 0
    setSyscallHook((syscall) => {
      if (syscall === 'syncfs') calls++
    })
    onTestFinished(() => setSyscallHook(undefined))
    await restore(repository, `${directory}/back`)
    expect(calls).toBe(2)
    setSyscallHook((syscall, path) => {
      if (syscall === 'syncfs') throw new PosixError('EIO', { syscall, path })
    })
    await expect(restore(repository, `${directory}/again`)).rejects.toMatchObject({ code: 'EIO' })
  })
})
