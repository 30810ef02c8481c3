import { ProtocolError } from '@lsync/ssh'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { ProtocolVersionError } from './errors.ts'
import {
  agreeOnVersion,
  encodeHeader,
  encodeHello,
  FRAME,
  type FrameHeader,
  FrameReader,
  type FrameType,
  HEADER_BYTES,
  type Hello,
  MAX_PAYLOAD_BYTES,
} from './frame.ts'

const hello: Hello = { lowest: 1, highest: 3, capabilities: 1, windowBytes: 1 << 24, lanes: 64 }

interface Sent {
  readonly type: FrameType
  readonly isCompressed: boolean
  readonly lane: number
  readonly id: number
  readonly payload: Uint8Array
}

const anyFrame = (): fc.Arbitrary<Sent> =>
  fc.record({
    type: fc.constantFrom(...Object.values(FRAME)),
    isCompressed: fc.boolean(),
    lane: fc.nat(63),
    id: fc.nat(0xffff_ffff),
    payload: fc.uint8Array({ maxLength: 300 }),
  })

function streamOf(frames: readonly Sent[]): Buffer {
  const parts = frames.flatMap(({ payload, ...header }) => [encodeHeader(header, payload), payload])
  return Buffer.concat([encodeHello(hello), ...parts])
}

function read(stream: Uint8Array, cuts: readonly number[]) {
  const hellos: Hello[] = []
  const frames: Sent[] = []
  const reader = new FrameReader({
    hello: (said) => hellos.push(said),
    admit: () => undefined,
    frame: ({ payloadBytes, ...header }: FrameHeader, payload) => {
      expect(payload).toHaveLength(payloadBytes)
      frames.push({ ...header, payload: Uint8Array.from(payload) })
    },
  })
  let at = 0
  for (const size of cuts) {
    reader.push(stream.subarray(at, at + size))
    at += size
  }
  reader.push(stream.subarray(at))
  return { hellos, frames, reader }
}

describe('frames', () => {
  test('arrive as they were, wherever the stream is cut', () => {
    fc.assert(
      fc.property(fc.array(anyFrame(), { maxLength: 6 }), fc.array(fc.nat(60), { maxLength: 30 }), (sent, cuts) => {
        const { hellos, frames, reader } = read(streamOf(sent), cuts)
        expect(hellos).toEqual([hello])
        expect(frames).toEqual(sent)
        expect(reader.isBetweenFrames).toBe(true)
      }),
    )
  })

  test('any changed byte is noticed', () => {
    fc.assert(
      fc.property(anyFrame(), fc.nat(1000), fc.integer({ min: 1, max: 255 }), (sent, position, change) => {
        const stream = streamOf([sent])
        const at = position % stream.length
        stream[at] = (stream[at] as number) ^ change
        // A length that grew waits for more than there is.
        let isNoticed = true
        try {
          isNoticed = !read(stream, []).reader.isBetweenFrames
        } catch (error) {
          expect(error).toBeInstanceOf(ProtocolError)
        }
        expect(isNoticed).toBe(true)
      }),
      { numRuns: 1000 },
    )
  })

  test('random bytes are refused within the first eight', () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 8, maxLength: 100 }), (bytes) => {
        expect(() => read(bytes, [])).toThrow(ProtocolError)
      }),
    )
  })

  test('what a login script prints is shown', () => {
    expect(() => read(Buffer.from('Welcome to node7!\n'), [])).toThrow(/Welcome to node7!/)
  })

  test('a payload beyond the limit is refused before memory is taken for it', () => {
    const header = Buffer.alloc(HEADER_BYTES)
    header.writeUInt32LE(MAX_PAYLOAD_BYTES + 1, 0)
    header[4] = FRAME.deliver
    expect(() => read(Buffer.concat([encodeHello(hello), header]), [])).toThrow(/bytes/)
  })

  test('the receiver may refuse a frame by its header', () => {
    const reader = new FrameReader({
      hello: () => undefined,
      admit: () => {
        throw new ProtocolError('not now')
      },
      frame: () => expect.unreachable(),
    })
    const payload = Buffer.alloc(10)
    const header = encodeHeader({ type: FRAME.open, isCompressed: false, lane: 0, id: 1 }, payload)
    expect(() => reader.push(Buffer.concat([encodeHello(hello), header]))).toThrow('not now')
  })
})

describe('versions', () => {
  test('the highest that both speak is taken', () => {
    expect(agreeOnVersion(hello, 1, 2)).toBe(2)
    expect(agreeOnVersion(hello, 2, 9)).toBe(3)
  })

  test('without a common one there is a clear error', () => {
    expect(() => agreeOnVersion(hello, 4, 9)).toThrow(ProtocolVersionError)
    expect(() => agreeOnVersion({ ...hello, lowest: 3 }, 1, 2)).toThrow(ProtocolVersionError)
  })
})
