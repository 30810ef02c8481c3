import type { ByteString } from '@lsync/posix'
import { ProtocolError } from '@lsync/ssh'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import type { Extent, Operation, RawMeta, TreePath } from '../model/operation.ts'
import { OperationTooBigError } from './errors.ts'
import {
  contentBytesOf,
  hasContent,
  limitExtents,
  MAX_BATCH_BYTES,
  MAX_BATCH_OPERATIONS,
  MAX_EXTENTS,
  OperationDecoder,
  OperationEncoder,
  type OperationReceiver,
  splitKeep,
} from './operation-codec.ts'

const bytes = (text: string) => text as ByteString
const path = (text: string) => text as TreePath

const plainMeta: RawMeta = { mode: 0o644, uid: 0, gid: 0, mtimeNs: 0n, xattrs: [], inodeFlags: 0 }

const anyName = () =>
  fc
    .array(fc.integer({ min: 1, max: 255 }), { minLength: 1, maxLength: 12 })
    .map((codes) => String.fromCharCode(...codes).replaceAll('/', '_'))
    .filter((name) => name !== '.' && name !== '..')
const anyPath = () => fc.array(anyName(), { minLength: 1, maxLength: 5 }).map((names) => path(names.join('/')))

const anyMeta = (): fc.Arbitrary<RawMeta> =>
  fc.record({
    mode: fc.nat(0o7777),
    uid: fc.integer({ min: 0, max: 0xffff_fffe }),
    gid: fc.integer({ min: 0, max: 0xffff_fffe }),
    mtimeNs: fc.bigInt({ min: -(2n ** 63n), max: 2n ** 63n - 1n }),
    xattrs: fc
      .uniqueArray(fc.tuple(anyName().map(bytes), fc.uint8Array({ maxLength: 40 })), {
        maxLength: 4,
        selector: ([name]) => name,
      })
      .map((list) => list.sort(([left], [right]) => (left < right ? -1 : 1))),
    inodeFlags: fc.constantFrom(0, 0x10, 0x20, 0x30),
  })

/** Lengths and gaps, some of them so large that only a sparse file has them. */
const anyExtents = (largest: number) =>
  fc
    .array(fc.tuple(fc.integer({ min: 1, max: 2 ** 40 }), fc.integer({ min: 1, max: largest })), { maxLength: 6 })
    .map((pairs) => {
      let end = 0
      return pairs.map(([gap, length]): Extent => {
        const offset = end + gap
        end = offset + length
        return [offset, length]
      })
    })

const endOf = (extents: readonly Extent[]) => {
  const last = extents.at(-1)
  return last === undefined ? 0 : last[0] + last[1]
}

const anyContentOperation = (): fc.Arbitrary<Operation> =>
  fc
    .tuple(anyPath(), anyMeta(), anyExtents(300), anyExtents(2 ** 40), fc.nat(1000), fc.boolean(), fc.boolean())
    .map(([name, meta, extents, holes, more, isPatch, shared]) => {
      const sizeBytes = Math.max(endOf(extents), isPatch ? endOf(holes) : 0) + more
      const file = { path: name, meta, sizeBytes, extents }
      return isPatch ? { do: 'patch', ...file, holes, shared } : { do: 'file', ...file }
    })

const anyOperation = (): fc.Arbitrary<Operation> => {
  const stage = fc.integer({ min: 0, max: Number.MAX_SAFE_INTEGER })
  const word = <T extends string>(name: T) => fc.constant(name)
  return fc.oneof(
    fc.record({ do: word('remove'), path: anyPath() }),
    fc.record({ do: word('out'), path: anyPath(), stage }),
    fc.record({ do: word('in'), path: anyPath(), stage }),
    fc.record({ do: word('rename'), from: anyPath(), to: anyPath() }),
    fc.record({ do: word('directory'), path: anyPath() }),
    fc.record({ do: word('keep'), path: anyPath(), names: fc.array(anyName().map(bytes), { maxLength: 4 }) }),
    fc.record({
      do: word('keep'),
      path: anyPath(),
      names: fc.constant([]),
      after: anyName().map(bytes),
      last: anyName().map(bytes),
    }),
    fc.record({ do: word('link'), path: anyPath(), to: anyPath() }),
    fc.record({ do: word('symlink'), path: anyPath(), meta: anyMeta(), target: anyName().map(bytes) }),
    fc.record({
      do: word('special'),
      path: anyPath(),
      meta: anyMeta(),
      type: fc.constantFrom(0o010000, 0o140000, 0o020000, 0o060000),
      rdev: stage,
    }),
    fc.record({
      do: word('meta'),
      path: fc.oneof(anyPath(), fc.constant(path(''))),
      kind: fc.constantFrom('file', 'directory', 'symlink', 'special'),
      meta: anyMeta(),
    }),
    anyContentOperation(),
  )
}

type Event = { operation: Operation } | { content: string } | 'finish' | 'abort'

/** Writes everything that a receiver is told. Neighbouring content is one event, however it was cut. */
class Record implements OperationReceiver {
  readonly events: Event[] = []

  operation(operation: Operation): void {
    this.events.push({ operation })
  }

  content(piece: Uint8Array): void {
    const text = Buffer.from(piece).toString('latin1')
    const last = this.events.at(-1)
    if (typeof last === 'object' && 'content' in last) last.content += text
    else this.events.push({ content: text })
  }

  finish(): void {
    this.events.push('finish')
  }

  abort(): void {
    this.events.push('abort')
  }
}

/** Encodes operations with content; `cut` decides after which records a batch ends. */
function encodeAll(operations: readonly Operation[], cut: (index: number) => boolean): [Uint8Array[], Event[]] {
  const encoder = new OperationEncoder(64)
  const batches: Uint8Array[] = []
  const expected = new Record()
  let index = 0
  const mayCut = () => {
    if (cut(index++)) batches.push(encoder.take())
  }
  for (const operation of operations) {
    encoder.operation(operation)
    expected.operation(operation)
    mayCut()
    if (!hasContent(operation)) continue
    let left = contentBytesOf(operation)
    while (left > 0) {
      const piece = Buffer.alloc(Math.min(left, 100), String(index))
      encoder.content(piece)
      expected.content(piece)
      left -= piece.length
      mayCut()
    }
    if (operation.sizeBytes % 3 === 1) {
      encoder.abort()
      expected.abort()
    } else {
      encoder.finish()
      expected.finish()
    }
    mayCut()
  }
  batches.push(encoder.take())
  return [batches, expected.events]
}

function decodeAll(batches: readonly Uint8Array[]): Event[] {
  const decoder = new OperationDecoder()
  const record = new Record()
  for (const batch of batches) decoder.decode(batch, record)
  return record.events
}

/** Decodes what may be anything: the events of what was whole, or only a `ProtocolError`. */
function decodeHostile(batch: Uint8Array): void {
  const told: OperationReceiver = {
    operation(operation) {
      const paths = 'path' in operation ? [operation.path] : [operation.from, operation.to]
      if (operation.do === 'link') paths.push(operation.to)
      for (const name of paths) {
        for (const part of name === '' ? [] : name.split('/')) {
          expect(['', '.', '..']).not.toContain(part)
          expect(part.length).toBeLessThanOrEqual(255)
          expect(part).not.toContain('\0')
        }
      }
      if (hasContent(operation)) {
        expect(endOf(operation.extents)).toBeLessThanOrEqual(operation.sizeBytes)
      }
    },
    content: (piece) => expect(piece.length).toBeLessThanOrEqual(batch.length),
    finish: () => undefined,
    abort: () => undefined,
  }
  try {
    new OperationDecoder().decode(batch, told)
  } catch (error) {
    expect(error).toBeInstanceOf(ProtocolError)
  }
}

describe('operations on the wire', () => {
  test('arrive as they were, wherever batches are cut', () => {
    fc.assert(
      fc.property(fc.array(anyOperation(), { maxLength: 12 }), fc.func(fc.boolean()), (operations, cut) => {
        const [batches, expected] = encodeAll(operations, cut)
        expect(decodeAll(batches)).toEqual(expected)
      }),
      { numRuns: 500 },
    )
  })

  test('a batch is alone in its ArrayBuffer, so that it can be transferred', () => {
    const encoder = new OperationEncoder()
    encoder.operation({ do: 'remove', path: path('a') })
    const batch = encoder.take()
    const moved = structuredClone(batch, { transfer: [batch.buffer] })
    expect(decodeAll([moved])).toEqual([{ operation: { do: 'remove', path: 'a' } }])
  })

  test('the largest operation and a full encoder fit into one batch', () => {
    const encoder = new OperationEncoder()
    while (!encoder.isFull) encoder.operation({ do: 'remove', path: path('x'.repeat(200)) })
    const step = 2 ** 35
    const extents = Array.from({ length: MAX_EXTENTS }, (_, i): Extent => [i * 2 * step, step])
    const holes = extents.map(([offset, length]): Extent => [offset + length, length])
    const name = path(`${'n'.repeat(255)}/`.repeat(1023) + 'n'.repeat(255))
    const values = Array.from({ length: 15 }, (_, i): [ByteString, Uint8Array] => [
      bytes(`user.${String(i).padStart(2, '0')}`),
      new Uint8Array(65536),
    ])
    const operation: Operation = {
      do: 'patch',
      path: name,
      meta: { ...plainMeta, xattrs: values },
      sizeBytes: Number.MAX_SAFE_INTEGER,
      extents,
      holes,
      shared: false,
    }
    encoder.operation(operation)
    const batch = encoder.take()
    expect(batch.length).toBeLessThan(MAX_BATCH_BYTES)
    const record = new Record()
    new OperationDecoder().decode(batch, record)
    expect(record.events.at(-1)).toEqual({ operation })
  })

  test('a batch holds as many operations as an encoder takes before it is full, and no more', () => {
    const encoder = new OperationEncoder()
    while (!encoder.isFull) encoder.operation({ do: 'remove', path: path('a') })
    const batch = encoder.take()
    expect(decodeAll([batch])).toHaveLength(MAX_BATCH_OPERATIONS)
    expect(() => decodeAll([Buffer.concat([batch, batch.subarray(0, 3)])])).toThrow(ProtocolError)
  })

  test('an operation that is too big is refused by the encoder and leaves nothing behind', () => {
    const encoder = new OperationEncoder()
    encoder.operation({ do: 'remove', path: path('a') })
    const before = encoder.sizeBytes
    const xattrs = Array.from({ length: 20 }, (_, i): [ByteString, Uint8Array] => [
      bytes(`user.${i + 10}`),
      new Uint8Array(65536),
    ])
    expect(() =>
      encoder.operation({ do: 'meta', path: path('b'), kind: 'file', meta: { ...plainMeta, xattrs } }),
    ).toThrow(OperationTooBigError)
    expect(() => encoder.operation({ do: 'remove', path: path('n'.repeat(1 << 20)) })).toThrow(OperationTooBigError)
    expect(encoder.sizeBytes).toBe(before)
  })

  test('a directory of any number of names is kept by parts that are each small enough, and leave nothing out', () => {
    const names = Array.from({ length: 120_000 }, (_, i) => bytes(`name ${(i * 7919) % 120_000}`))
    const parts = splitKeep({ do: 'keep', path: path('d'), names })
    expect(parts.length).toBeGreaterThan(1)
    const encoder = new OperationEncoder()
    for (const part of parts) {
      encoder.operation(part)
      expect(decodeAll([encoder.take()])).toEqual([{ operation: part }])
    }
    expect(parts.flatMap((part) => part.names)).toEqual([...names].sort())
    expect(parts[0]).not.toHaveProperty('after')
    expect(parts.at(-1)).not.toHaveProperty('last')
    for (const [i, part] of parts.slice(1).entries()) expect(part.after).toBe(parts[i]?.last)
    for (const { names: kept, after = '', last = '\xff' } of parts) {
      expect(kept.every((name) => name > after && name <= last)).toBe(true)
    }
    const few = { do: 'keep', path: path('d'), names: names.slice(0, 10) } as const
    expect(splitKeep(few)).toEqual([few])
  })

  test('extents beyond the limit are joined over the smallest holes, and cover the same data', () => {
    fc.assert(
      fc.property(anyExtents(1000), fc.integer({ min: 1, max: 5 }), (extents, limit) => {
        const joined = limitExtents(extents, limit)
        expect(joined.length).toBeLessThanOrEqual(limit)
        expect(joined.length).toBe(Math.min(limit, extents.length))
        for (const [offset, length] of extents) {
          expect(joined.some(([start, size]) => start <= offset && offset + length <= start + size)).toBe(true)
        }
        const gapsOf = (list: readonly Extent[]) =>
          list.slice(1).map(([offset], i) => offset - endOf(list.slice(0, i + 1)))
        const kept = gapsOf(joined).sort((left, right) => right - left)
        expect(kept).toEqual(
          gapsOf(extents)
            .sort((left, right) => right - left)
            .slice(0, kept.length),
        )
      }),
    )
  })
})

describe('a hostile stream', () => {
  const one = (operation: Operation) => {
    const encoder = new OperationEncoder()
    encoder.operation(operation)
    return encoder.take()
  }

  test.each(['..', 'a/../b', '../x', 'a/..', '.', 'a/./b', '/etc', 'a//b', 'a/', 'a\0b', 'n'.repeat(256)])(
    'the path %j is refused',
    (name) => {
      expect(() => decodeAll([one({ do: 'remove', path: path(name) })])).toThrow(ProtocolError)
      expect(() => decodeAll([one({ do: 'link', path: path('ok'), to: path(name) })])).toThrow(ProtocolError)
    },
  )

  test.each(['', '.', '..', 'a/b', 'a\0', 'n'.repeat(256)])('the name %j to keep is refused', (name) => {
    expect(() => decodeAll([one({ do: 'keep', path: path('d'), names: [bytes(name)] })])).toThrow(ProtocolError)
  })

  test('the root is no name to remove, to rename or to replace', () => {
    for (const operation of ['remove', 'directory'] as const) {
      const decode = () => decodeAll([one({ do: operation, path: path('') })])
      if (operation === 'remove') expect(decode).toThrow(ProtocolError)
      else expect(decode()).toHaveLength(1)
    }
  })

  test.each([
    [
      'touch',
      [
        [0, 5],
        [5, 5],
      ],
    ],
    [
      'overlap',
      [
        [0, 5],
        [3, 5],
      ],
    ],
    [
      'descend',
      [
        [10, 5],
        [0, 5],
      ],
    ],
    ['are empty', [[0, 0]]],
    ['leave the file', [[98, 5]]],
  ] as [string, Extent[]][])('extents that %s are refused', (_, extents) => {
    const batch = () => one({ do: 'file', path: path('f'), meta: plainMeta, sizeBytes: 100, extents })
    // An offset below the last end has no encoding at all.
    expect(() => decodeAll([batch()])).toThrow()
    try {
      decodeAll([batch()])
    } catch (error) {
      expect(error).toBeInstanceOf(ProtocolError)
    }
  })

  test('content beyond the extents, a finish before their end and a second file within one are refused', () => {
    const file: Operation = { do: 'file', path: path('f'), meta: plainMeta, sizeBytes: 10, extents: [[0, 10]] }
    const FINISH = 33
    for (const tail of [
      [32, 11, ...Buffer.alloc(11)],
      [FINISH],
      [32, 5, 0, 0, 0, 0, 0, FINISH],
      [...one(file)],
      [32, 0],
    ]) {
      expect(() => decodeAll([Buffer.concat([one(file), Buffer.from(tail)])])).toThrow(ProtocolError)
    }
    expect(() => decodeAll([Buffer.from([FINISH])])).toThrow(ProtocolError)
  })

  test('names of attributes come once and in order', () => {
    const meta = (...names: string[]): RawMeta => ({
      ...plainMeta,
      xattrs: names.map((name) => [bytes(name), new Uint8Array(1)]),
    })
    const decode = (...names: string[]) =>
      decodeAll([one({ do: 'meta', path: path('f'), kind: 'file', meta: meta(...names) })])
    expect(decode('user.a', 'user.b')).toHaveLength(1)
    for (const names of [['user.b', 'user.a'], ['user.a', 'user.a'], [''], ['user.\0'], ['n'.repeat(256)]]) {
      expect(() => decode(...names)).toThrow(ProtocolError)
    }
  })

  test('random bytes are refused with a protocol error alone', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 400 }), (batch) => decodeHostile(batch)),
      { numRuns: 5000 },
    )
  })

  test('a valid stream with changed, inserted and missing bytes never gives a path outside or an impossible file', () => {
    const anyDamage = () => fc.tuple(fc.constantFrom('set', 'insert', 'delete'), fc.nat(5000), fc.nat(255))
    fc.assert(
      fc.property(fc.array(anyOperation(), { maxLength: 5 }), fc.array(anyDamage(), { maxLength: 6 }), (list, hits) => {
        const [batches] = encodeAll(list, () => false)
        const stream = [...Buffer.concat(batches)]
        for (const [how, position, value] of hits) {
          const at = position % (stream.length + 1)
          if (how === 'set') stream[at] = value
          else if (how === 'insert') stream.splice(at, 0, value)
          else stream.splice(at, 1)
        }
        decodeHostile(Uint8Array.from(stream))
      }),
      { numRuns: 2000 },
    )
  })

  test('counts and lengths that promise more than there is take no memory', () => {
    const before = process.memoryUsage().rss
    const huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x0f]
    for (let i = 0; i < 10_000; i++) {
      expect(() => decodeAll([Buffer.from([1, ...huge])])).toThrow(ProtocolError)
      expect(() => decodeAll([Buffer.from([6, 1, 97, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, ...huge])])).toThrow(
        ProtocolError,
      )
    }
    expect(process.memoryUsage().rss - before).toBeLessThan(150 << 20)
  })
})
