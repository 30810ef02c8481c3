import {
  chmodSync,
  chownSync,
  linkSync,
  mkdirSync,
  readFileSync,
  renameSync,
  symlinkSync,
  unlinkSync,
  writeFileSync,
} from 'node:fs'
import type { ByteString, HostPath } from '@lsync/posix'
import { openRoot, setTimes, setXattr, withFd } from '@lsync/posix'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  block,
  buildTree,
  character,
  type DirectorySpec,
  dir,
  fifo,
  file,
  linkTo,
  removeTree,
  socket,
  sparse,
  symlink,
} from '../support/build.ts'
import { copyTree } from '../support/copy.ts'
import { fileSystemKinds, useFileSystem } from '../support/image.ts'
import { aclOf, anyHistory, capabilityOf, growStack } from '../support/operations.ts'
import { isMountable, optionMatrix, withOverlay } from '../support/overlay.ts'
import { canMountImages } from '../support/ready.ts'
import { runs, timeLimit } from '../support/runs.ts'
import { run } from '../support/system.ts'
import { diffTrees, readTree, strayLinks } from '../support/tree.ts'

// The judge is judged first: a comparator that misses a kind of difference would pass every merge.

const everything: DirectorySpec = dir({
  f: file('content', { mode: 0o640, uid: 5, gid: 6, xattrs: { 'user.a': '1', 'trusted.t': 't' } }),
  big: file('x'.repeat(100)),
  holes: sparse(1_500_000, [
    [0, 'start'],
    [1_000_000, 'end'],
  ]),
  d: dir({ inner: file('1') }, { mode: 0o2755 }),
  one: file('linked'),
  two: linkTo('one'),
  three: file('linked'),
  l: symlink('target'),
  p: fifo(),
  s: socket(),
  c: character(1, 3),
  b: block(7, 200),
  'x\ny\xff': file('bytes'),
})

type Mutation = readonly [what: string, change: (root: string) => void, expected: readonly string[]]
const inRoot = (root: string, use: (fd: number) => void) => withFd(openRoot(root as HostPath), use)
const set = (name: string, attribute: string, value: Uint8Array) => (root: string) =>
  inRoot(root, (fd) => setXattr(fd, name as ByteString, attribute as ByteString, value))

const mutations: readonly Mutation[] = [
  ['a byte of content', (root) => keepTimes(root, 'f', () => writeFileSync(`${root}/f`, 'Content')), ['f: content']],
  [
    'a byte beyond what is shown',
    (root) => keepTimes(root, 'big', () => writeFileSync(`${root}/big`, `${'x'.repeat(99)}y`)),
    ['big: content'],
  ],
  [
    'the size',
    (root) => keepTimes(root, 'f', () => writeFileSync(`${root}/f`, 'content\0')),
    ['f: size', 'f: content'],
  ],
  ['the mode of a file', (root) => chmodSync(`${root}/f`, 0o641), ['f: mode']],
  ['the setgid bit of a directory', (root) => chmodSync(`${root}/d`, 0o755), ['d: mode']],
  ['the mode of the root', (root) => chmodSync(root, 0o700), ['(root): mode']],
  ['the owner', (root) => chownSync(`${root}/f`, 7, 6), ['f: uid']],
  ['the group', (root) => chownSync(`${root}/f`, 5, 7), ['f: gid']],
  ['the owner of a symlink', (root) => run('chown', '-h', '9', `${root}/l`), ['l: uid']],
  ['a nanosecond of the mtime', (root) => shiftTime(root, 'f', 1n), ['f: mtime']],
  ['a nanosecond of a directory', (root) => shiftTime(root, 'd', 1n), ['d: mtime']],
  ['a nanosecond of a symlink', (root) => shiftTime(root, 'l', 1n), ['l: mtime']],
  ['a value of a user attribute', set('f', 'user.a', Buffer.from('2')), ['f: xattr user.a']],
  ['a new trusted attribute on a symlink', set('l', 'trusted.new', Buffer.from('')), ['l: xattr trusted.new']],
  ['a leaked mark', set('d', 'trusted.overlay.opaque', Buffer.from('y')), ['d: xattr trusted.overlay.opaque']],
  ['a lost attribute', (root) => run('setfattr', '-x', 'trusted.t', `${root}/f`), ['f: xattr trusted.t']],
  ['a default ACL', set('d', 'system.posix_acl_default', aclOf(9, 7)), ['d: xattr system.posix_acl_default']],
  [
    'an access ACL',
    set('one', 'system.posix_acl_access', aclOf(9, 7)),
    ['one: mode', 'one: xattr system.posix_acl_access', 'two: mode', 'two: xattr system.posix_acl_access'],
  ],
  ['a capability', set('f', 'security.capability', capabilityOf(0x400)), ['f: xattr security.capability']],
  [
    'the target of a symlink',
    (root) =>
      keepTimes(root, 'l', () => {
        unlinkSync(`${root}/l`)
        symlinkSync('targeT', `${root}/l`)
      }),
    ['l: target'],
  ],
  [
    'the type',
    (root) =>
      keepTimes(root, 'p', () => {
        unlinkSync(`${root}/p`)
        writeFileSync(`${root}/p`, '')
      }),
    ['p: type'],
  ],
  [
    'the device number',
    (root) =>
      keepTimes(root, 'c', () => {
        unlinkSync(`${root}/c`)
        run('mknod', '-m', '644', `${root}/c`, 'c', '1', '5')
      }),
    ['c: rdev'],
  ],
  [
    'a block device that became a character device',
    (root) =>
      keepTimes(root, 'b', () => {
        unlinkSync(`${root}/b`)
        run('mknod', '-m', '644', `${root}/b`, 'c', '7', '200')
      }),
    ['b: type'],
  ],
  ['a missing name', (root) => keepTimes(root, '', () => unlinkSync(`${root}/s`)), ['s: missing']],
  ['a surplus name', (root) => keepTimes(root, '', () => mkdirSync(`${root}/new`)), ['new: should not exist']],
  [
    'a renamed name',
    (root) => keepTimes(root, '', () => renameSync(`${root}/f`, `${root}/g`)),
    ['f: missing', 'g: should not exist'],
  ],
  [
    'a whiteout that became a device',
    (root) => keepTimes(root, '', () => run('mknod', `${root}/w`, 'c', '0', '0')),
    ['w: should not exist'],
  ],
  [
    'a split hard link',
    (root) => keepTimes(root, '', () => run('sh', '-c', `cd ${root} && cp -a two t && mv t two`)),
    ['one: links', 'two: links'],
  ],
  [
    'a joined hard link',
    (root) =>
      keepTimes(root, '', () => {
        unlinkSync(`${root}/three`)
        linkSync(`${root}/one`, `${root}/three`)
      }),
    ['one: links', 'three: mtime', 'three: links', 'two: links'],
  ],
  [
    'a filled hole',
    (root) => keepTimes(root, 'holes', () => writeFileSync(`${root}/holes`, readFileSync(`${root}/holes`))),
    ['holes: holes were lost'],
  ],
  ['the append-only flag', (root) => run('chattr', '+a', `${root}/f`), ['f: flags']],
  ['the immutable flag of a directory', (root) => run('chattr', '+i', `${root}/d`), ['d: flags']],
]

function keepTimes(root: string, name: string, change: () => void): void {
  const before = readTree(root)
  change()
  inRoot(root, (fd) => {
    for (const path of new Set([name, ''])) {
      const { mtimeNs } = before.get(path) ?? { mtimeNs: 0n }
      setTimes(fd, path as ByteString, mtimeNs, mtimeNs)
    }
  })
}

function shiftTime(root: string, name: string, byNs: bigint): void {
  const { mtimeNs } = readTree(root).get(name) as { mtimeNs: bigint }
  inRoot(root, (fd) => setTimes(fd, name as ByteString, mtimeNs + byNs, mtimeNs + byNs))
}

describe.skipIf(!canMountImages()).each(fileSystemKinds)('the oracle on %s', (kind) => {
  const disk = useFileSystem(kind)

  test('a tree equals itself and its copy, and a literal tree holds what was written', () => {
    const at = disk.current.fresh()
    buildTree(`${at}/one`, everything)
    mkdirSync(`${at}/two`)
    copyTree(`${at}/one`, `${at}/two`)
    const tree = readTree(`${at}/one`)
    expect(diffTrees(tree, readTree(`${at}/one`))).toEqual([])
    expect(diffTrees(tree, readTree(`${at}/two`))).toEqual([])
    expect(tree.get('f')).toMatchObject({ mode: 0o640, uid: 5, gid: 6, content: 'content' })
    expect(tree.get('one')?.links).toEqual(['one', 'two'])
    expect(tree.get('holes')?.dataBytes).toBeLessThan(300_000)
    expect(strayLinks(tree)).toEqual([])
    removeTree(at)
  })

  test.each(mutations)('the comparator sees %s', (_what, change, expected) => {
    const at = disk.current.fresh()
    buildTree(`${at}/one`, everything)
    const before = readTree(`${at}/one`)
    change(`${at}/one`)
    const lines = diffTrees(before, readTree(`${at}/one`))
    expect(lines.map((line) => expected.find((start) => line.startsWith(start)) ?? line).sort()).toEqual(
      [...expected].sort(),
    )
    removeTree(at)
  })

  test.each(optionMatrix().filter((cell) => cell.excluded === undefined))(
    'a copied view equals the mounted view: $name',
    ({ options }) => {
      fc.assert(
        fc.property(fc.integer({ min: 1, max: 4 }).chain(anyHistory), (history) => {
          const at = disk.current.fresh()
          try {
            const stack = growStack(at, history, options)
            mkdirSync(`${at}/copy`)
            if (!isMountable(stack, options)) return
            const view = withOverlay(stack, options, (merged) => {
              const tree = readTree(merged)
              copyTree(merged, `${at}/copy`)
              expect(diffTrees(tree, readTree(merged))).toEqual([])
              return tree
            })
            expect([...view].filter(([, node]) => node.error !== undefined)).toEqual([])
            // This copier is not the product; what it makes of holes depends on what the disk has written out by then.
            expect(diffTrees(view, readTree(`${at}/copy`), { holes: false })).toEqual([])
          } finally {
            removeTree(at)
          }
        }),
        runs(3),
      )
    },
    timeLimit(),
  )
})

describe.skipIf(!canMountImages())('the matrix', () => {
  const disk = useFileSystem('tmpfs')

  test.each(optionMatrix())('the kernel takes the options unless they are excluded: $name ($excluded)', (cell) => {
    const at = disk.current.fresh()
    buildTree(`${at}/l`, dir())
    buildTree(`${at}/u`, dir())
    const mounts = () => withOverlay({ lowers: [`${at}/l`], upper: `${at}/u` }, cell.options, () => 'mounted')
    if (cell.excluded === undefined) expect(mounts()).toBe('mounted')
    else expect(mounts).toThrow('errno 22')
  })
})
