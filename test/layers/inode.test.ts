import { execFileSync } from 'node:child_process'
import { mkdirSync, symlinkSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import {
  copyFile,
  createInode,
  finishDirectory,
  inheritsAcls,
  openDirectory,
  readMeta,
  writeMeta,
} from '../../packages/overlay-merge/src/encodings/inode.ts'
import type { Meta } from '../../packages/overlay-merge/src/model/entry.ts'
import {
  type ByteString,
  close,
  getXattr,
  makeNode,
  S_IFIFO,
  setXattr,
  statAt,
} from '../../packages/posix/src/index.ts'
import { needs } from '../support/needs.ts'
import { aclOf, capabilityOf } from '../support/operations.ts'
import { isPresent } from '../support/system.ts'
import { diffTrees, readTree } from '../support/tree.ts'
import { buildRichTree } from './rich-tree.ts'
import { scratch } from './scratch.ts'

const isRoot = needs('root', process.getuid?.() === 0)
const hasStrace = needs('strace', isPresent('strace'))
const name = (text: string) => text as ByteString
const meta = (more: Partial<Meta> = {}): Meta => ({
  mode: 0o644,
  uid: 0,
  gid: 0,
  atimeNs: 1n,
  mtimeNs: 2_000_000_003n,
  xattrs: [],
  ...more,
})
const CAPABILITY = name('security.capability')

describe.skipIf(!isRoot)('metadata of a new inode', () => {
  test('keeps setuid, capabilities, owner and times together', () => {
    const { fd } = scratch()
    const value = capabilityOf(0x2000)
    const wanted = meta({ mode: 0o6755, uid: 5, gid: 6, xattrs: [{ name: CAPABILITY, value }] })
    createInode(fd, name('f'), { kind: 'file', meta: wanted })
    expect(readMeta(fd, name('f'), statAt(fd, name('f')))).toEqual(wanted)
  })

  test('is exact although the parent hands down ACLs and its group', () => {
    const { fd } = scratch()
    mkdirSync(`/proc/self/fd/${fd}/parent`)
    const parent = openDirectory(fd, name('parent'))
    const acl = name('system.posix_acl_default')
    finishDirectory(parent, meta({ mode: 0o2777, gid: 77, xattrs: [{ name: acl, value: aclOf(9, 7) }] }))
    expect(inheritsAcls(parent)).toBe(true)
    const options = { dropInheritedAcls: true }
    const wanted = meta({ mode: 0o600 })
    createInode(parent, name('f'), { kind: 'file', meta: wanted }, options)
    createInode(parent, name('p'), { kind: 'special', type: 'fifo', rdev: 0, meta: wanted }, options)
    createInode(parent, name('d'), { kind: 'directory' })
    writeMeta(parent, name('d'), 'directory', meta({ mode: 0o755 }), options)
    expect(readMeta(parent, name('f'), statAt(parent, name('f')))).toEqual(wanted)
    expect(readMeta(parent, name('p'), statAt(parent, name('p')))).toEqual(wanted)
    expect(readMeta(parent, name('d'), statAt(parent, name('d')))).toEqual(meta({ mode: 0o755 }))
    close(parent)
  })

  test('ACLs and the mode that goes with them both arrive', () => {
    const { fd } = scratch()
    const wanted = meta({ mode: 0o771, xattrs: [{ name: name('system.posix_acl_access'), value: aclOf(5, 6) }] })
    createInode(fd, name('f'), { kind: 'file', meta: wanted })
    expect(readMeta(fd, name('f'), statAt(fd, name('f')))).toEqual(wanted)
  })

  test('of an old inode is replaced, and attributes that the new one lacks go', () => {
    const { fd } = scratch()
    createInode(fd, name('f'), { kind: 'file', meta: meta() })
    setXattr(fd, name('f'), name('user.old'), Buffer.from('1'))
    setXattr(fd, name('f'), name('trusted.kept'), Buffer.from('1'))
    const xattrs = [{ name: name('user.new'), value: Buffer.from('2') }]
    writeMeta(fd, name('f'), 'file', meta({ xattrs }), { removeOthers: (attribute) => attribute.startsWith('user.') })
    expect(getXattr(fd, name('f'), name('user.old'))).toBeUndefined()
    expect(getXattr(fd, name('f'), name('user.new'))?.toString()).toBe('2')
    expect(getXattr(fd, name('f'), name('trusted.kept'))).toBeDefined()
  })
})

describe('copying a file', () => {
  test('refuses a fifo, and does not wait for its writer', () => {
    const { fd } = scratch()
    makeNode(fd, name('p'), S_IFIFO | 0o600, 0)
    expect(() => copyFile(fd, name('p'), fd, name('q'), { meta: meta() })).toThrow(
      expect.objectContaining({ code: 'NOT_A_FILE' }),
    )
  })

  test('refuses a symlink planted in the place of the source', () => {
    const { path, fd } = scratch()
    symlinkSync('/etc/passwd', `${path}/s`)
    expect(() => copyFile(fd, name('s'), fd, name('q'), { meta: meta() })).toThrow(
      expect.objectContaining({ code: 'NOT_A_FILE' }),
    )
  })

  test('does not write through a symlink planted in the place of the target', () => {
    const { path, fd } = scratch()
    writeFileSync(`${path}/f`, 'new')
    writeFileSync(`${path}/victim`, 'old')
    symlinkSync('victim', `${path}/t`)
    expect(() => copyFile(fd, name('f'), fd, name('t'), { meta: meta() })).toThrow(
      expect.objectContaining({ code: 'EEXIST' }),
    )
    expect(statAt(fd, name('victim')).sizeBytes).toBe(3)
  })

  test.skipIf(!hasStrace || !isRoot)('costs ten system calls when it is small and has no attributes', () => {
    const { path } = scratch()
    for (let i = 0; i < 200; i++) writeFileSync(`${path}/f${i}`, 'x'.repeat(100))
    const script = `
      import { copyFile } from ${JSON.stringify(new URL('../../packages/overlay-merge/src/encodings/inode.ts', import.meta.url).href)}
      import { hostPath, openRoot } from ${JSON.stringify(new URL('../../packages/posix/src/index.ts', import.meta.url).href)}
      const fd = openRoot(hostPath(${JSON.stringify(path)}))
      const meta = { mode: 0o644, uid: 0, gid: 0, atimeNs: 1n, mtimeNs: 2n, xattrs: [] }
      for (let i = 0; i < 200; i++) copyFile(fd, 'f' + i, fd, 't' + i, { meta })
    `
    writeFileSync(`${path}/run.ts`, script)
    execFileSync('strace', ['-f', '-o', `${path}/trace`, process.execPath, `${path}/run.ts`], { stdio: 'pipe' })
    const lines = execFileSync('grep', ['-c', '', `${path}/trace`]).toString()
    expect(Number(lines)).toBeGreaterThan(2000)
    const between = execFileSync('awk', ['/"f100"/{on=1} /"f150"/{on=0} on', `${path}/trace`]).toString()
    const calls = between
      .split('\n')
      .filter((line) =>
        /^[0-9]+ +(openat|statx|pread64|pwrite64|fchown|fchmod|utimensat|close|ioctl|lseek|.*xattr)/.test(line),
      )
    expect(calls.length / 50).toBeLessThanOrEqual(10)
  })
})

test.skipIf(!isRoot)('a rich tree built with these functions compares equal to itself', () => {
  const { path } = scratch()
  const tree = readTree(buildRichTree(`${path}/tree`))
  expect(diffTrees(tree, tree)).toEqual([])
})
