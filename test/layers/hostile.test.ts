import { execFileSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { convertLayer, exportLayer, importLayer } from '../../packages/overlay-merge/src/encodings/convert.ts'
import { readKernelLayer } from '../../packages/overlay-merge/src/encodings/kernel.ts'
import { encodeHeader, encodePax, paddingOf } from '../../packages/overlay-merge/src/encodings/tar-header.ts'
import {
  type ByteString,
  close,
  makeDirectory,
  O_DIRECTORY,
  O_RDONLY,
  openat,
  openRoot,
  rename,
  withFd,
} from '../../packages/posix/src/index.ts'
import {
  buildTree,
  character,
  dir,
  file,
  opaque,
  removeTree,
  symlink,
  whiteout,
  xattrWhiteout,
} from '../support/build.ts'
import { needs } from '../support/needs.ts'
import { mount, unmount } from '../support/system.ts'
import { diffTrees, readTree } from '../support/tree.ts'
import { outlineOf } from './outline.ts'
import { buildRichTree } from './rich-tree.ts'
import { scratch } from './scratch.ts'

const isRoot = needs('root', process.getuid?.() === 0)

function member(name: string, type: string, linkName = '', body = ''): Buffer {
  const bytes = Buffer.from(body)
  const header = encodeHeader({ name, type, linkName, sizeBytes: bytes.length, mode: 0o755 })
  return Buffer.concat([header, bytes, Buffer.alloc(paddingOf(bytes.length))])
}

const attributes = (...records: [string, string][]) => {
  const bytes = encodePax(records)
  return Buffer.concat([
    encodeHeader({ name: 'x', type: 'x', sizeBytes: bytes.length }),
    bytes,
    Buffer.alloc(paddingOf(bytes.length)),
  ])
}

const END = Buffer.alloc(1024)

describe.skipIf(!isRoot)('an archive that attacks the host', () => {
  test.each([
    ['dot-dot', [member('../victim', '0', '', 'evil')]],
    ['a planted symlink', [member('s', '2', '..'), member('s/victim', '0', '', 'evil')]],
    ['a planted symlink, then a directory of its name beneath', [member('s', '2', '../'), member('s/d', '5')]],
    ['a hard link to the host', [member('l', '1', '../victim'), member('l', '0', '', 'evil')]],
    ['a hard link through a planted symlink', [member('s', '2', '..'), member('l', '1', 's/victim')]],
    ['a whiteout of the root', [member('.wh..', '0')]],
    ['a device 0:0', [member('gone', '3')]],
  ])('by %s changes nothing outside, and leaves nothing behind', async (_attack, parts) => {
    const { path, host } = scratch()
    writeFileSync(`${path}/victim`, 'safe')
    writeFileSync(`${path}/l.tar`, Buffer.concat([...parts, END]))
    const request = { from: host('l.tar'), form: 'oci', to: host('in') } as const
    await expect(importLayer(request)).rejects.toMatchObject({ code: 'ENTRY_REFUSED', path: expect.any(String) })
    expect(readFileSync(`${path}/victim`, 'utf8')).toBe('safe')
    expect(readdirSync(path).sort()).toEqual(['l.tar', 'victim'])
  })

  test('by marks in attributes gets them dropped, in both namespaces', async () => {
    const { path, host } = scratch()
    const marks = attributes(
      ['SCHILY.xattr.trusted.overlay.redirect', '/etc'],
      ['SCHILY.xattr.user.overlay.opaque', 'y'],
    )
    writeFileSync(`${path}/l.tar`, Buffer.concat([marks, member('d', '5'), END]))
    const report = await importLayer({ from: host('l.tar'), form: 'oci', to: host('in') })
    expect(report.losses.map(({ path }) => path)).toEqual(['d', 'd', ''])
    expect(readTree(`${path}/in`).get('d')?.xattrs.size).toBe(0)
  })

  test.each(['skip', 'refuse'] as const)('by device nodes meets the policy "%s"', async (devices) => {
    const { path, host } = scratch()
    buildTree(`${path}/tree`, dir({ mem: character(1, 1), f: file('x') }))
    await exportLayer({ from: host('tree'), form: 'oci', to: host('l.tar') })
    const running = importLayer({ from: host('l.tar'), form: 'oci', to: host('in'), devices })
    if (devices === 'refuse') await expect(running).rejects.toMatchObject({ code: 'ENTRY_REFUSED', path: 'mem' })
    else expect((await running).losses).toEqual([{ path: 'mem', what: 'a device node' }])
    expect(existsSync(`${path}/in/mem`)).toBe(false)
    expect(existsSync(`${path}/in`)).toBe(devices === 'skip')
  })

  test('by file capabilities meets the policy', async () => {
    const { path, host } = scratch()
    buildRichTree(`${path}/tree`)
    const request = { from: host('tree'), fromForm: 'plain', toForm: 'plain', to: host('in'), setuid: 'clear' } as const
    const report = await convertLayer(request)
    expect(report.losses.map(({ path }) => path).sort()).toEqual(['a', 'b'])
    expect(readTree(`${path}/in`).get('a')).toMatchObject({ mode: 0o755, xattrs: new Map() })
  })
})

describe.skipIf(!isRoot)('a layer directory that attacks its reader', () => {
  test('by a directory swapped for a symlink while it is read', () => {
    const { path, fd } = scratch()
    buildTree(`${path}/up`, dir({ a: file('1'), d: dir({ f: file('x') }) }))
    const up = openRoot(`${path}/up` as never)
    const items = readKernelLayer(up, { namespace: 'trusted' })
    const seen: string[] = []
    expect(() => {
      for (const { entry } of items) {
        seen.push(entry.path)
        if (entry.path !== 'd') continue
        // Between the stat of the directory and the open of it.
        rename(up, 'd' as ByteString, fd, 'away' as ByteString)
        symlinkSync('/etc', `${path}/up/d`)
      }
    }).toThrow(expect.objectContaining({ code: expect.stringMatching(/ELOOP|ENOTDIR/) }))
    expect(seen).toEqual(['', 'a', 'd'])
    close(up)
  })

  test('by a file swapped for a fifo, a symlink or another size before it is opened', () => {
    for (const swap of ['fifo', 'symlink', 'longer'] as const) {
      const { path } = scratch()
      buildTree(`${path}/up`, dir({ f: file('x') }))
      const up = openRoot(`${path}/up` as never)
      const items = [...readKernelLayer(up, { namespace: 'trusted' })]
      const item = items[1]
      execFileSync('rm', [`${path}/up/f`])
      if (swap === 'fifo') execFileSync('mkfifo', [`${path}/up/f`])
      else if (swap === 'symlink') symlinkSync('/etc/passwd', `${path}/up/f`)
      else writeFileSync(`${path}/up/f`, 'longer')
      if (swap === 'longer') {
        const opened = item?.openContent?.()
        expect(opened?.stat.sizeBytes).toBe(6)
        close(opened?.fd as number)
      } else expect(() => item?.openContent?.()).toThrow(expect.objectContaining({ code: 'NOT_A_FILE' }))
      close(up)
    }
  })

  test('by a mount inside it', async () => {
    const { path, host } = scratch()
    buildTree(`${path}/up`, dir({ a: file('1'), mp: dir({ under: file('x') }) }))
    mount('none', `${path}/up/mp`, 'tmpfs', 0, '')
    try {
      const running = exportLayer({ from: host('up'), form: 'oci', to: host('l.tar') })
      await expect(running).rejects.toMatchObject({ code: 'SUBMOUNT_IN_LAYER', path: 'mp' })
    } finally {
      unmount(`${path}/up/mp`)
    }
  })

  test('by redirects that the kernel refuses', async () => {
    for (const [redirect, from] of Object.entries({ '..': 'up1', 'a/b': 'up2', '/a/../b': 'up3', '': 'up4' })) {
      const { path, host } = scratch()
      buildTree(`${path}/${from}`, dir({ d: dir({}, { marks: { redirect } }) }))
      const running = exportLayer({ from: host(from), form: 'tar', to: host('l.tar') })
      await expect(running).rejects.toMatchObject({ code: 'MARK_INVALID', path: 'd' })
    }
  })

  test('by a tree far deeper than PATH_MAX', async () => {
    const { path, host, fd } = scratch()
    makeDirectory(fd, 'deep' as ByteString, 0o755)
    let at = openat(fd, 'deep' as ByteString, O_RDONLY | O_DIRECTORY)
    const DEPTH = 400
    const name = 'n'.repeat(200) as ByteString
    for (let depth = 0; depth < DEPTH; depth++) {
      makeDirectory(at, name, 0o755)
      const next = openat(at, name, O_RDONLY | O_DIRECTORY)
      close(at)
      at = next
    }
    close(at)
    await convertLayer({
      from: host('deep'),
      fromForm: 'kernel-trusted',
      to: host('copy'),
      toForm: 'aufs',
      durable: false,
    })
    await exportLayer({ from: host('copy'), fromForm: 'aufs', form: 'oci', to: host('l.tar'), compression: 'zstd' })
    await importLayer({ from: host('l.tar'), form: 'oci', to: host('in'), durable: false })
    const depths = (tree: string) =>
      withFd(openRoot(host(tree)), (root) => {
        let deepest = 0
        for (const { entry } of readKernelLayer(root, { namespace: 'trusted' })) {
          deepest = Math.max(deepest, entry.path.length)
        }
        return deepest
      })
    expect(depths('in')).toBe(DEPTH * 201 - 1)
    for (const tree of ['deep', 'copy', 'in']) execFileSync('rm', ['-rf', `${path}/${tree}`])
  })
})

describe.skipIf(!isRoot)('what is lost is told', () => {
  test('sockets, flags and attributes that tar and OCI cannot hold', async () => {
    const { path, host } = scratch()
    buildTree(
      `${path}/up`,
      dir({
        sock: { kind: 'node', type: 0o140000, rdev: 0 },
        fixed: file('x', { flags: 'i' }),
        grows: dir({}, { flags: 'a' }),
        nested: dir({}, { marks: { 'overlay.opaque': 'y' } }),
        shown: file('y', { marks: { protattr: 'ia' } }),
      }),
    )
    try {
      const report = await exportLayer({ from: host('up'), form: 'oci', to: host('l.tar') })
      expect(report.losses.map(({ path, what }) => `${path}: ${what}`).sort()).toEqual([
        'fixed: flag immutable (chattr +i)',
        'grows: flag append-only (chattr +a)',
        'nested: attribute trusted.overlay.opaque',
        'shown: flags of the view (chattr +ia)',
        'sock: a socket',
      ])
    } finally {
      removeTree(`${path}/up`)
    }
  })

  test('what the target has no place for is an error first, and a line in the report with lossy', async () => {
    const { path, host } = scratch()
    buildTree(`${path}/up`, dir({ f: file('x', { xattrs: { 'user.big': 'v'.repeat(60_000) } }), d: opaque() }))
    mkdirSync(`${path}/small`)
    execFileSync('sh', [
      '-c',
      `truncate -s 16M ${path}/image && mkfs.ext4 -q -F ${path}/image && mount -o loop ${path}/image ${path}/small`,
    ])
    try {
      const request = {
        from: host('up'),
        fromForm: 'kernel-trusted',
        toForm: 'kernel-trusted',
        to: host('small/in'),
      } as const
      await expect(convertLayer(request)).rejects.toMatchObject({ code: 'TARGET_CANNOT_HOLD', path: 'f' })
      expect(readdirSync(`${path}/small`)).toEqual(['lost+found'])
      const report = await convertLayer({ ...request, lossy: true })
      expect(report.losses).toEqual([{ path: 'f', what: 'attribute user.big' }])
      expect(
        withFd(openRoot(host('small/in')), (fd) => outlineOf(readKernelLayer(fd, { namespace: 'trusted' }))),
      ).toEqual({
        d: 'dir opaque',
        f: 'x',
      })
    } finally {
      unmount(`${path}/small`)
    }
  })

  test('a full disk is an error that leaves nothing behind', async () => {
    const { path, host } = scratch()
    buildTree(`${path}/up`, dir({ a: file('x'.repeat(3_000_000)), b: file('y'.repeat(3_000_000)) }))
    mkdirSync(`${path}/small`)
    mount('none', `${path}/small`, 'tmpfs', 0, 'size=4m')
    try {
      for (const form of ['oci', 'portable', 'aufs'] as const) {
        const running = exportLayer({ from: host('up'), form, to: host('small/out') })
        await expect(running).rejects.toMatchObject({ code: 'ENOSPC' })
        expect(readdirSync(`${path}/small`)).toEqual([])
      }
    } finally {
      unmount(`${path}/small`)
    }
  })
})

test.skipIf(!isRoot)('a layer below a directory with default ACLs inherits nothing', async () => {
  const { path, host } = scratch()
  buildTree(`${path}/up`, dir({ d: dir({ f: file('x') }), s: symlink('x'), w: whiteout(), x: xattrWhiteout() }))
  mkdirSync(`${path}/parent`)
  execFileSync('setfacl', ['-m', 'd:u:9:rwx', `${path}/parent`])
  await importLayer({ from: host('up'), form: 'kernel-trusted', to: host('parent/in') })
  const expected = new Map(readTree(`${path}/up`))
  for (const name of ['w', 'x']) expected.delete(name)
  const actual = new Map(readTree(`${path}/parent/in`))
  for (const name of ['w', 'x']) expect(actual.get(name)).toMatchObject({ type: 'character', rdev: 0 })
  for (const name of ['w', 'x']) actual.delete(name)
  expect(diffTrees(expected, actual)).toEqual([])
})
