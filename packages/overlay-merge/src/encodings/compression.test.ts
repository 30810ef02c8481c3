import zlib from 'node:zlib'
import { describe, expect, test } from 'vitest'
import { compress, decompress } from './compression.ts'

async function* inPieces(bytes: Uint8Array, size: number): AsyncGenerator<Uint8Array> {
  for (let at = 0; at < bytes.length; at += size) yield bytes.subarray(at, at + size)
}

async function unpack(bytes: Uint8Array, pieceBytes = 65536): Promise<{ compression: string; text: string }> {
  const { compression, chunks } = await decompress(inPieces(bytes, pieceBytes))
  return { compression, text: Buffer.concat(await Array.fromAsync(chunks)).toString('latin1') }
}

const zstd = (text: string) => zlib.zstdCompressSync(Buffer.from(text))
const gzip = (text: string) => zlib.gzipSync(Buffer.from(text))
const skippable = Buffer.concat([Buffer.from([0x5a, 0x2a, 0x4d, 0x18, 4, 0, 0, 0]), Buffer.from('skip')])

describe('what compresses an archive is told from its first bytes', () => {
  test.each([
    ['none', Buffer.from('plain text')],
    ['gzip', gzip('plain text')],
    ['zstd', zstd('plain text')],
    ['zstd', Buffer.concat([skippable, zstd('plain text')])],
  ])('%s', async (compression, bytes) => {
    expect(await unpack(bytes)).toEqual({ compression, text: 'plain text' })
  })

  test.each([
    ['xz', Buffer.from([0xfd, 0x37, 0x7a, 0x58, 0x5a, 0])],
    ['bzip2', Buffer.from('BZh91AY')],
  ])('%s is refused with a hint', async (_name, bytes) => {
    await expect(unpack(bytes)).rejects.toMatchObject({ code: 'ARCHIVE_BROKEN', hint: expect.stringContaining('un') })
  })
})

describe.each([1, 7, 65536])('in pieces of %i bytes', (pieceBytes) => {
  test('zstd frames one after the other are read to the end', async () => {
    // Node 24 alone stops after the first of them, without an error.
    const frames = ['one ', 'two ', 'x'.repeat(300_000), ' three'].map(zstd)
    const bytes = Buffer.concat([...frames.slice(0, 2), skippable, ...frames.slice(2), skippable])
    if (pieceBytes === 1 && bytes.length > 10_000) return
    expect((await unpack(bytes, pieceBytes)).text).toBe(`one two ${'x'.repeat(300_000)} three`)
  })

  test('gzip members one after the other are read to the end', async () => {
    expect((await unpack(Buffer.concat([gzip('one '), gzip('two')]), pieceBytes)).text).toBe('one two')
  })

  test.each([
    ['gzip', gzip('some text')],
    ['zstd', zstd('some text')],
    ['zstd in its second frame', Buffer.concat([zstd('a'), zstd('some text')])],
  ])('a cut %s stream is an error', async (_name, bytes) => {
    for (const cut of [1, 3, 8]) {
      await expect(unpack(bytes.subarray(0, bytes.length - cut), pieceBytes)).rejects.toMatchObject({
        code: 'ARCHIVE_BROKEN',
      })
    }
  })

  test('garbage after a frame is an error', async () => {
    const bytes = Buffer.concat([zstd('a'), Buffer.from('garbage')])
    await expect(unpack(bytes, pieceBytes)).rejects.toMatchObject({ code: 'ARCHIVE_BROKEN' })
  })
})

test('an error of the source stays what it is', async () => {
  const failing = (async function* () {
    yield gzip('text').subarray(0, 12)
    throw Object.assign(new Error('the disk is gone'), { code: 'EIO' })
  })()
  const { chunks } = await decompress(failing)
  await expect(Array.fromAsync(chunks)).rejects.toMatchObject({ code: 'EIO' })
})

test.each(['none', 'gzip', 'zstd'] as const)('%s gives back what it was given', async (compression) => {
  const bytes = Buffer.from('some text '.repeat(10_000))
  const packed = Buffer.concat(await Array.fromAsync(compress(inPieces(bytes, 1000), compression)))
  expect((await unpack(packed)).text).toBe(bytes.toString())
})
