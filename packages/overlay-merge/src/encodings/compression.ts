import { PassThrough, pipeline, Readable, type Transform } from 'node:stream'
import zlib from 'node:zlib'
import { ArchiveBrokenError } from './errors.ts'

export type Compression = 'none' | 'gzip' | 'zstd'
type Chunks = AsyncIterable<Uint8Array>

/** What the first bytes of a file say of its compression; `undefined` for one that lsync does not read. */
export function detectCompression(head: Uint8Array): Compression | undefined {
  if (startsWith(head, [0x1f, 0x8b])) return 'gzip'
  if (startsWith(head, [0x28, 0xb5, 0x2f, 0xfd]) || isSkippable(head)) return 'zstd'
  if (startsWith(head, [0x42, 0x5a, 0x68]) || startsWith(head, [0xfd, 0x37, 0x7a, 0x58, 0x5a])) return undefined
  return 'none'
}

function startsWith(bytes: Uint8Array, magic: readonly number[]): boolean {
  return magic.every((byte, i) => bytes[i] === byte)
}

function isSkippable(bytes: Uint8Array): boolean {
  return startsWith(bytes.subarray(1), [0x2a, 0x4d, 0x18]) && ((bytes[0] ?? 0) & 0xf0) === 0x50
}

/** The archive behind `source`, whatever compresses it, and how it was. Reads a few bytes at once, the rest on demand. */
export async function decompress(source: Chunks): Promise<{ compression: Compression; chunks: Chunks }> {
  const bytes = new ByteReader(source)
  const head = await bytes.peek(6)
  const compression = detectCompression(head)
  if (compression === undefined) {
    throw new ArchiveBrokenError('is compressed with bzip2 or xz', '', { hint: 'decompress it first (bunzip2, unxz)' })
  }
  if (compression === 'none') return { compression, chunks: bytes.rest() }
  const decoder = compression === 'gzip' ? zlib.createGunzip() : zlib.createZstdDecompress()
  // Node's stream stops for good, without an error, at the end of a zstd frame unless the next one starts a write.
  const input = compression === 'gzip' ? bytes.rest() : wholeFrames(bytes)
  return { compression, chunks: through(input, decoder) }
}

/** The bytes compressed. The same input gives the same output with the same Node version. */
export function compress(source: Chunks, compression: Compression, level?: number): Chunks {
  if (compression === 'none') return source
  if (compression === 'gzip') return through(source, zlib.createGzip(level === undefined ? {} : { level }))
  const params = level === undefined ? {} : { [zlib.constants.ZSTD_c_compressionLevel]: level }
  return through(source, zlib.createZstdCompress({ params: { ...params, [zlib.constants.ZSTD_c_checksumFlag]: 1 } }))
}

async function* through(source: Chunks, transform: Transform): AsyncGenerator<Buffer> {
  const output = new PassThrough()
  let failure: unknown
  pipeline(Readable.from(source, { objectMode: true }), transform, output, (error) => {
    failure = error ?? undefined
  })
  try {
    for await (const chunk of output) yield chunk as Buffer
  } catch (error) {
    throw brokenOf(failure ?? error)
  }
}

// zlib's own errors say that the data is bad; everything else comes from the source and keeps its meaning.
function brokenOf(error: unknown): unknown {
  const code = (error as { code?: unknown })?.code
  if (typeof code !== 'string' || !/^(Z_|ZSTD_|ERR_.*ZSTD)/.test(code)) return error
  const reason = code === 'Z_BUF_ERROR' ? 'ends too early' : 'is damaged: it cannot be decompressed'
  return new ArchiveBrokenError(reason, '', { cause: error })
}

/** Takes bytes from chunks as they are needed. */
export class ByteReader {
  readonly #iterator: AsyncIterator<Uint8Array>
  #head: Buffer = Buffer.alloc(0)
  /** Bytes handed out so far. */
  position = 0

  constructor(source: Chunks) {
    this.#iterator = source[Symbol.asyncIterator]()
  }

  /** Whether at least `count` bytes are buffered afterwards. */
  async #fill(count: number): Promise<boolean> {
    if (this.#head.length >= count) return true
    const parts = [this.#head]
    let have = this.#head.length
    while (have < count) {
      const next = await this.#iterator.next()
      if (next.done === true) break
      parts.push(toBuffer(next.value))
      have += next.value.length
    }
    this.#head = Buffer.concat(parts)
    return have >= count
  }

  /** The next bytes without taking them; fewer at the end. */
  async peek(count: number): Promise<Buffer> {
    await this.#fill(count)
    return this.#head.subarray(0, count)
  }

  /** Exactly `count` bytes, or fewer at the end of the source. */
  async take(count: number): Promise<Buffer> {
    if (this.#head.length < count) await this.#fill(count)
    const taken = this.#head.subarray(0, count)
    this.#head = this.#head.subarray(taken.length)
    this.position += taken.length
    return taken
  }

  /** The next bytes, at most `count` and at least one; empty at the end. */
  async some(count: number): Promise<Buffer> {
    if (this.#head.length === 0) await this.#fill(1)
    return this.take(Math.min(count, this.#head.length))
  }

  /** Everything that is left, chunk by chunk. */
  async *rest(): AsyncGenerator<Buffer> {
    for (;;) {
      const chunk = await this.some(Number.MAX_SAFE_INTEGER)
      if (chunk.length === 0) return
      yield chunk
    }
  }

  /** Lets the source go. */
  async close(): Promise<void> {
    await this.#iterator.return?.()
  }
}

function toBuffer(bytes: Uint8Array): Buffer {
  return Buffer.isBuffer(bytes) ? bytes : Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
}

/** zstd data in pieces of which none goes beyond the end of its frame; skippable frames are left out. */
async function* wholeFrames(bytes: ByteReader): AsyncGenerator<Buffer> {
  for (;;) {
    const magic = await bytes.peek(4)
    if (magic.length === 0) return
    if (isSkippable(magic)) {
      await bytes.take(4)
      const length = (await exactly(bytes, 4)).readUInt32LE(0)
      for (let left = length; left > 0; ) left -= (await someOf(bytes, left)).length
      continue
    }
    if (!startsWith(magic, [0x28, 0xb5, 0x2f, 0xfd])) {
      throw new ArchiveBrokenError('is damaged: something else follows a zstd frame')
    }
    yield* oneFrame(bytes)
  }
}

/** Source: RFC 8878, "Zstandard Frames", "Blocks". */
async function* oneFrame(bytes: ByteReader): AsyncGenerator<Buffer> {
  const start = await exactly(bytes, 5)
  const descriptor = start[4] as number
  const isSingle = (descriptor & 0x20) !== 0
  const sizeBytes = [isSingle ? 1 : 0, 2, 4, 8][descriptor >> 6] as number
  const dictionaryBytes = [0, 1, 2, 4][descriptor & 3] as number
  yield Buffer.concat([start, await exactly(bytes, (isSingle ? 0 : 1) + dictionaryBytes + sizeBytes)])
  for (let isLast = false; !isLast; ) {
    const header = await exactly(bytes, 3)
    const block = header.readUIntLE(0, 3)
    isLast = (block & 1) !== 0
    const isRepeat = ((block >> 1) & 3) === 1
    yield header
    for (let left = isRepeat ? 1 : block >> 3; left > 0; ) {
      const piece = await someOf(bytes, left)
      left -= piece.length
      yield piece
    }
  }
  if ((descriptor & 4) !== 0) yield await exactly(bytes, 4)
}

async function exactly(bytes: ByteReader, count: number): Promise<Buffer> {
  const taken = await bytes.take(count)
  if (taken.length < count) throw new ArchiveBrokenError('ends too early')
  return taken
}

async function someOf(bytes: ByteReader, count: number): Promise<Buffer> {
  const piece = await bytes.some(count)
  if (piece.length === 0) throw new ArchiveBrokenError('ends too early')
  return piece
}
