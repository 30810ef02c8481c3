import { readdirSync } from 'node:fs'
import zlib from 'node:zlib'
import { type ByteString, makeDirectory } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { outlineOf, type Spec } from '../../../../test/layers/outline.ts'
import { scratch } from '../../../../test/layers/scratch.ts'
import { openDirectory } from './inode.ts'
import { DirectorySpool } from './spool.ts'
import { readTarLayer, type TarReadOptions } from './tar.ts'
import { encodeHeader, encodePax, paddingOf, type UstarFields } from './tar-header.ts'

const END = Buffer.alloc(1024)

function member(fields: Partial<UstarFields> & { name: string }, body: string | Buffer = ''): Buffer {
  const bytes = Buffer.from(body as string, 'latin1')
  const header = encodeHeader({ type: '0', sizeBytes: bytes.length, mode: 0o644, ...fields })
  return Buffer.concat([header, bytes, Buffer.alloc(paddingOf(bytes.length))])
}

function pax(...records: [string, string | Uint8Array][]): Buffer {
  return member({ name: 'pax', type: 'x' }, encodePax(records))
}

const directory = (name: string) => member({ name, type: '5', mode: 0o755 })
const symlink = (name: string, linkName: string) => member({ name, type: '2', linkName })
const hardLink = (name: string, linkName: string) => member({ name, type: '1', linkName })

async function* one(bytes: Buffer): AsyncGenerator<Buffer> {
  yield bytes
}

/** Reads an archive of these members. The result is an outline; `losses` are the lines that went to the report. */
async function read(parts: Buffer | Buffer[], options: Partial<TarReadOptions> = {}): Promise<Record<string, Spec>> {
  const place = scratch()
  makeDirectory(place.fd, 'spool' as ByteString, 0o700)
  const spoolFd = openDirectory(place.fd, 'spool' as ByteString)
  const bytes = Array.isArray(parts) ? Buffer.concat([...parts, END]) : parts
  try {
    const { index } = await readTarLayer(one(bytes), { form: 'oci', ...options, spool: new DirectorySpool(spoolFd) })
    return outlineOf(index.items())
  } finally {
    // Whatever the names say, nothing but numbered files in the spool may ever appear.
    expect(readdirSync(place.path)).toEqual(['spool'])
    for (const name of readdirSync(`${place.path}/spool`)) expect(name).toMatch(/^[0-9a-z]+$/)
  }
}

const refused = (path: string, code = 'ENTRY_REFUSED') => ({ code, path, hint: expect.any(String) })

describe('a member that would leave the layer is refused by name', () => {
  test.each(['../x', 'a/../../x', 'a/..', '..', '/../x', './../x', 'a/./../../b'])('dot-dot: %s', async (name) => {
    await expect(read([member({ name }, 'x')])).rejects.toMatchObject(refused(name))
  })

  test('dot-dot in a pax path behind a harmless header', async () => {
    const parts = [pax(['path', '../../etc/passwd']), member({ name: 'harmless' }, 'x')]
    await expect(read(parts)).rejects.toMatchObject(refused('../../etc/passwd'))
  })

  test('dot-dot in a GNU long name', async () => {
    const parts = [member({ name: '././@LongLink', type: 'L' }, '../evil\0'), member({ name: 'harmless' }, 'x')]
    await expect(read(parts)).rejects.toMatchObject(refused('../evil'))
  })

  test('dot-dot in the name of a sparse file', async () => {
    const parts = [
      pax(['GNU.sparse.size', '1'], ['GNU.sparse.map', '0,1'], ['GNU.sparse.name', '../evil']),
      member({ name: 'harmless' }, 'x'),
    ]
    await expect(read(parts)).rejects.toMatchObject(refused('../evil'))
  })

  test('a hard link that leaves', async () => {
    await expect(read([hardLink('a', '../../etc/shadow')])).rejects.toMatchObject(refused('../../etc/shadow'))
  })

  test('a name with a NUL in it', async () => {
    await expect(read([pax(['path', 'a\0b']), member({ name: 'x' })])).rejects.toMatchObject({ code: 'ENTRY_REFUSED' })
  })

  test('an absolute name means the layer root, and never the host', async () => {
    expect(
      await read([directory('/etc'), member({ name: '/etc/passwd' }, 'x'), member({ name: './/b' }, 'y')]),
    ).toEqual({ b: 'y', etc: 'dir', 'etc/passwd': 'x' })
  })
})

describe('a member never goes through what another one planted', () => {
  test('a symlink to a directory outside', async () => {
    const parts = [symlink('a', '/etc'), member({ name: 'a/passwd' }, 'x')]
    await expect(read(parts)).rejects.toMatchObject(refused('a/passwd'))
  })

  test('a symlink to a directory inside', async () => {
    const parts = [directory('real'), symlink('a', 'real'), member({ name: 'a/b' }, 'x')]
    await expect(read(parts)).rejects.toMatchObject(refused('a/b'))
  })

  test('a hard link through a symlink', async () => {
    const parts = [symlink('a', '/etc'), hardLink('b', 'a/passwd')]
    await expect(read(parts)).rejects.toMatchObject(refused('b'))
  })

  test('a hard link to a symlink is another name of the symlink, whatever that points to', async () => {
    const layer = await read([symlink('a', '/etc/passwd'), hardLink('b', 'a'), member({ name: 'b' }, 'x')])
    expect(layer).toEqual({ a: '-> /etc/passwd', b: 'x' })
    expect(await read([symlink('a', '/etc/passwd'), hardLink('b', 'a')])).toEqual({
      a: '-> /etc/passwd',
      b: '-> /etc/passwd = a',
    })
  })

  test('a directory that becomes a symlink takes its content with it', async () => {
    expect(await read([directory('a'), member({ name: 'a/b' }, 'x'), symlink('a', '/')])).toEqual({ a: '-> /' })
  })

  test('a file in the place of a directory', async () => {
    const parts = [member({ name: 'a' }, 'x'), member({ name: 'a/b' }, 'x')]
    await expect(read(parts)).rejects.toMatchObject(refused('a/b'))
  })

  test('a hard link to a directory, to nothing, or to itself before it exists', async () => {
    await expect(read([directory('a'), hardLink('b', 'a')])).rejects.toMatchObject(refused('b'))
    await expect(read([hardLink('b', 'a'), member({ name: 'a' })])).rejects.toMatchObject(refused('b'))
    await expect(read([hardLink('a', 'a')])).rejects.toMatchObject(refused('a'))
    expect(await read([member({ name: 'a' }, 'x'), hardLink('a', './a')])).toEqual({ a: 'x' })
  })

  test('a file that replaces the layer root', async () => {
    await expect(read([member({ name: './' }, 'x')])).rejects.toMatchObject(refused('./'))
    await expect(read([member({ name: '.' }, 'x')])).rejects.toMatchObject(refused('.'))
    await expect(read([symlink('.', '/')])).rejects.toMatchObject(refused('.'))
  })
})

describe('whiteouts that would delete what is not theirs are refused', () => {
  test.each(['.wh.', '.wh..', '.wh...', 'd/.wh..'])('%s', async (name) => {
    await expect(read([directory('d'), member({ name })])).rejects.toMatchObject(refused(name))
  })

  test('a whiteout marker with content, or that is a directory', async () => {
    await expect(read([member({ name: '.wh.a' }, 'x')])).rejects.toMatchObject(refused('.wh.a'))
    await expect(read([directory('.wh.a')])).rejects.toMatchObject(refused('.wh.a'))
  })

  test('a character device 0:0 in an OCI layer', async () => {
    await expect(read([member({ name: 'a', type: '3' })])).rejects.toMatchObject(refused('a'))
  })

  test('marks of overlayfs in an OCI layer do not come alive, and are named', async () => {
    const losses: string[] = []
    const parts = [
      pax(['SCHILY.xattr.trusted.overlay.opaque', 'y'], ['SCHILY.xattr.user.overlay.redirect', '/etc']),
      directory('d'),
      pax(['LIBARCHIVE.xattr.trusted.overlay.metacopy', ''], ['SCHILY.xattr.user.ok', '1']),
      member({ name: 'd/f' }, 'x'),
    ]
    const layer = await read(parts, { onLoss: ({ path, what }) => losses.push(`${path}: ${what}`) })
    expect(layer).toEqual({ d: 'dir', 'd/f': 'x user.ok=1' })
    expect(losses.filter((line) => line.includes('overlay.'))).toHaveLength(3)
  })
})

describe('an archive that is not whole is refused', () => {
  const whole = Buffer.concat([member({ name: 'a' }, 'x'.repeat(2000)), member({ name: 'b' }, 'y'), END])

  test('cut at any block, also between two members', async () => {
    for (let size = 512; size < whole.length - 512; size += 512) {
      await expect(read(whole.subarray(0, size)), `${size}`).rejects.toMatchObject({ code: 'ARCHIVE_BROKEN' })
    }
    await expect(read(Buffer.alloc(0))).rejects.toMatchObject({ code: 'ARCHIVE_BROKEN' })
  })

  test('the error names the member that was cut', async () => {
    await expect(read(whole.subarray(0, 1024))).rejects.toMatchObject({ code: 'ARCHIVE_BROKEN', path: 'a' })
  })

  test('one block of zeros is enough of an end, and padding after it is fine', async () => {
    const layer = { a: expect.any(String), b: 'y' }
    expect(await read(whole.subarray(0, whole.length - 512))).toEqual(layer)
    expect(await read(Buffer.concat([whole, Buffer.alloc(8192)]))).toEqual(layer)
  })

  test('a header with a wrong checksum', async () => {
    const bytes = Buffer.from(whole)
    bytes[3] = 0x41
    await expect(read(bytes)).rejects.toMatchObject({ code: 'ARCHIVE_BROKEN' })
  })

  test('a size that makes the next header start inside data', async () => {
    const bytes = Buffer.concat([member({ name: 'a', sizeBytes: 512 }), member({ name: 'b' }, 'B'.repeat(600)), END])
    await expect(read(bytes)).rejects.toMatchObject({ code: 'ARCHIVE_BROKEN' })
  })

  test.each([-1, 2 ** 53, 8 * 2 ** 50])('a size of %d', async (sizeBytes) => {
    await expect(read([member({ name: 'a', sizeBytes })])).rejects.toMatchObject({
      code: expect.stringMatching(/ARCHIVE_BROKEN|LIMIT_EXCEEDED/),
    })
  })

  test('a pax size that disagrees with the data', async () => {
    const parts = [pax(['size', '99999']), member({ name: 'a' }, 'x')]
    await expect(read(parts)).rejects.toMatchObject({ code: 'ARCHIVE_BROKEN', path: 'a' })
    await expect(read([pax(['size', '-5']), member({ name: 'a' }, 'x')])).rejects.toMatchObject({
      code: 'ARCHIVE_BROKEN',
    })
  })

  test('a second archive hidden behind the end mark is noticed or ignored, never half read', async () => {
    const hidden = [member({ name: 'a' }, 'x'), Buffer.alloc(512), member({ name: 'hidden' })]
    await expect(read(hidden)).rejects.toMatchObject({ code: 'ARCHIVE_BROKEN' })
    expect(await read([member({ name: 'a' }, 'x'), END, member({ name: 'hidden' })])).toEqual({ a: 'x' })
  })

  test('an extended header at the end', async () => {
    await expect(read([pax(['path', 'a'])])).rejects.toMatchObject({ code: 'ARCHIVE_BROKEN' })
  })
})

describe('a bomb is stopped by a limit, and the error names the member', () => {
  test('too many members', async () => {
    const parts = ['a', 'b', 'c'].map((name) => member({ name }))
    await expect(read(parts, { limits: { maxEntries: 2 } })).rejects.toMatchObject(refused('c', 'LIMIT_EXCEEDED'))
  })

  test('too many bytes', async () => {
    const parts = [member({ name: 'a' }, 'x'.repeat(600)), member({ name: 'b' }, 'x'.repeat(600))]
    await expect(read(parts, { limits: { maxBytes: 1000 } })).rejects.toMatchObject(refused('b', 'LIMIT_EXCEEDED'))
  })

  test('a sparse file whose holes are too large', async () => {
    const parts = [pax(['GNU.sparse.size', String(2 ** 45)], ['GNU.sparse.map', '0,1']), member({ name: 'a' }, 'x')]
    await expect(read(parts)).rejects.toMatchObject(refused('a', 'LIMIT_EXCEEDED'))
  })

  test.each(['gzip', 'zstd'] as const)('a %s stream that expands without measure', async (compression) => {
    const body = Buffer.alloc(8 * 2 ** 20)
    const bytes = Buffer.concat([member({ name: 'bomb' }, body), END])
    const packed = compression === 'gzip' ? zlib.gzipSync(bytes) : zlib.zstdCompressSync(bytes)
    const limits = { ratioFromBytes: 2 ** 20, maxRatio: 500 }
    await expect(read(packed, { limits })).rejects.toMatchObject(refused('bomb', 'LIMIT_EXCEEDED'))
    expect(await read(packed)).toMatchObject({ bomb: expect.any(String) })
  })

  test('an extended header of 4 GiB is refused before it is read', async () => {
    const parts = [member({ name: 'pax', type: 'x', sizeBytes: 2 ** 32 })]
    await expect(read(parts)).rejects.toMatchObject(refused('pax', 'LIMIT_EXCEEDED'))
  })

  test('extended headers without end for one member', async () => {
    const parts = Array.from({ length: 60 }, () => pax(['comment', 'x'.repeat(100_000)]))
    await expect(read([...parts, member({ name: 'a' })])).rejects.toMatchObject({ code: 'LIMIT_EXCEEDED' })
  })

  test('a sparse map without end', async () => {
    const endless = [pax(['GNU.sparse.major', '1'], ['GNU.sparse.minor', '0'], ['GNU.sparse.realsize', '9'])]
    const body = `999999999\n${'0\n0\n'.repeat(1000)}`
    await expect(read([...endless, member({ name: 'a' }, body)])).rejects.toMatchObject({ code: 'ARCHIVE_BROKEN' })
  })
})

describe('sparse maps that do not fit are refused', () => {
  test.each([
    ['overlapping', '4', '0,2,1,2'],
    ['descending', '9', '5,1,0,1'],
    ['beyond the end', '1', '5,1'],
    ['of another size than the data', '9', '0,5'],
    ['odd', '9', '0,1,2'],
    ['not numbers', '9', 'a,b'],
    ['negative', '9', '-1,1'],
    ['huge', '9', '0,9007199254740993'],
  ])('%s', async (_what, size, map) => {
    const parts = [pax(['GNU.sparse.size', size], ['GNU.sparse.map', map]), member({ name: 'a' }, 'x')]
    await expect(read(parts)).rejects.toMatchObject({ code: 'ARCHIVE_BROKEN' })
  })
})

describe('what an honest archive may do', () => {
  test('a later member replaces an earlier one; two directories merge, with the later attributes', async () => {
    const parts = [
      directory('d'),
      member({ name: 'd/f' }, '1'),
      member({ name: 'd/f' }, '2'),
      member({ name: 'd/', type: '5', mode: 0o700 }),
      member({ name: 'x' }, 'file'),
      directory('x'),
    ]
    expect(await read(parts)).toEqual({ d: 'dir 700', 'd/f': '2', x: 'dir' })
  })

  test('a replaced file leaves its other names alone', async () => {
    const parts = [member({ name: 'a' }, '1'), hardLink('b', 'a'), member({ name: 'a' }, '2')]
    expect(await read(parts)).toEqual({ a: '2', b: '1' })
  })

  test.each(['before', 'after'])('a whiteout %s its own name loses; a directory there is opaque', async (when) => {
    const whiteouts = [member({ name: '.wh.f' }), member({ name: '.wh.d' }), member({ name: '.wh.gone' })]
    const names = [member({ name: 'f' }, 'x'), directory('d')]
    const parts = when === 'before' ? [...whiteouts, ...names] : [...names, ...whiteouts]
    expect(await read(parts)).toEqual({ d: 'dir opaque', f: 'x', gone: 'whiteout' })
  })

  test.each(['before', 'after'])('an opaque marker %s the content hides only what is below', async (when) => {
    const content = [member({ name: 'd/f' }, 'x')]
    const marker = [member({ name: 'd/.wh..wh..opq' })]
    const parts = [directory('d'), ...(when === 'before' ? [...marker, ...content] : [...content, ...marker])]
    expect(await read(parts)).toEqual({ d: 'dir opaque', 'd/f': 'x' })
  })

  test('files under .wh..wh.plnk are only there to be linked to', async () => {
    const parts = [member({ name: '.wh..wh.plnk/12.34' }, 'data'), hardLink('a', '.wh..wh.plnk/12.34')]
    expect(await read([...parts, member({ name: '.wh..wh.aufs' })])).toEqual({ a: 'data' })
  })

  test('a directory that is only implied is named in the report, and taken from below where that is known', async () => {
    const losses: string[] = []
    const meta = { mode: 0o711, uid: 7, gid: 7, atimeNs: 0n, mtimeNs: 0n, xattrs: [] }
    const options = {
      onLoss: ({ path }: { path: string }) => losses.push(path),
      impliedMeta: (path: string) => (path === 'a' ? meta : undefined),
    }
    expect(await read([member({ name: 'a/b/c' }, 'x')], options)).toEqual({ a: 'dir 711', 'a/b': 'dir', 'a/b/c': 'x' })
    expect(losses).toEqual(['', 'a/b'])
  })

  test('the tar of a raw upper means what the upper meant', async () => {
    const parts = [
      member({ name: 'gone', type: '3' }),
      pax(['SCHILY.xattr.trusted.overlay.opaque', 'y']),
      directory('d'),
      pax(['SCHILY.xattr.user.overlay.opaque', 'y']),
      directory('e'),
      member({ name: '.wh.x' }, 'plain'),
    ]
    expect(await read(parts, { form: 'trusted' })).toEqual({
      gone: 'whiteout',
      d: 'dir opaque',
      e: 'dir user.overlay.opaque=y',
      '.wh.x': 'plain',
    })
  })

  test('a v7 directory is one by its slash', async () => {
    expect(await read([member({ name: 'old/', type: '\0' })])).toEqual({ old: 'dir 644' })
  })
})
