import { createCipheriv, randomBytes } from 'node:crypto'
import { gzipSync } from 'node:zlib'
import { allocate } from '@lsync/posix'
import { expect, test } from 'vitest'
import { createEngine } from './crypto/engine.ts'
import { objectsOf, PackWriter } from './pack.ts'

const engine = createEngine({ encrypt: randomBytes(32), macK: randomBytes(16), macR: randomBytes(16) })

/** How each content lies in a pack, and how often a compressor was asked. */
function pack(contents: readonly Buffer[]) {
  let asked = 0
  const counting = Object.assign(Object.create(engine), {
    compress: (...args: Parameters<typeof engine.compress>) => {
      asked++
      return engine.compress(...args)
    },
    seal: (...args: Parameters<typeof engine.seal>) => engine.seal(...args),
    hash: (...args: Parameters<typeof engine.hash>) => engine.hash(...args),
  })
  const writer = new PackWriter('data', counting, { compresses: true })
  for (const content of contents) {
    const memory = allocate(content.length)
    content.copy(memory.buffer)
    writer.add(randomBytes(32).toString('hex'), memory, 0, content.length)
  }
  return { asked, objects: objectsOf(Buffer.from(writer.finish().header)) }
}

/** Always the same bytes, which nothing can tell from random ones. */
function noise(sizeBytes: number): Buffer {
  return createCipheriv('aes-256-ctr', Buffer.alloc(32), Buffer.alloc(16)).update(Buffer.alloc(sizeBytes))
}

const text = Buffer.from(Array.from({ length: 3000 }, (_, i) => `line ${i * 7919} of a text\n`).join(''))

test('content that looks random is stored as it is, without asking the compressor', () => {
  const sizes = [2000, 5600, 60_000]
  const random = sizes.map(noise)
  const { asked, objects } = pack([...random, gzipSync(noise(20_000))])
  expect(asked).toBe(0)
  expect(objects.slice(0, 3).map(({ uncompressedLength }) => uncompressedLength)).toEqual([
    undefined,
    undefined,
    undefined,
  ])
})

test('content that prefers some bytes is compressed, and so is what is small or long enough to repeat itself', () => {
  const once = noise(100_000)
  const contents = [
    text.subarray(0, 1500),
    text,
    Buffer.from(noise(6000).toString('base64')),
    Buffer.from(noise(6000).toString('hex')),
    Buffer.concat([once, once]),
    Buffer.alloc(5000),
  ]
  const { asked, objects } = pack(contents)
  expect(asked).toBe(contents.length)
  expect(objects.map(({ uncompressedLength }) => uncompressedLength)).toEqual(contents.map(({ length }) => length))
})
