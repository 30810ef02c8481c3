import { type ByteString, LsyncError } from '@lsync/posix'
import { ProtocolError } from '@lsync/ssh'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import type { DescribedFile } from '../describe.ts'
import type { TreePath } from '../model/operation.ts'
import { ROW_BYTES } from '../model/row.ts'
import {
  decodeCheckpoint,
  decodeDescribe,
  decodeDescription,
  decodeError,
  decodeFailures,
  decodePath,
  decodeState,
  encodeCheckpoint,
  encodeDescribe,
  encodeDescription,
  encodeError,
  encodeFailures,
  encodePath,
  encodeState,
} from './message.ts'

function described(name: string, blocksBytes = 0) {
  const image = Buffer.alloc(ROW_BYTES)
  image.writeUInt16LE(0o100_644, 12)
  const blocks = blocksBytes === 0 ? undefined : Buffer.alloc(blocksBytes, 1)
  return { name: name as ByteString, image, blocks }
}

describe('messages', () => {
  test('arrive as they were', () => {
    const state = {
      checkpoint: { root: 'a-0', sequence: 7 },
      isEmpty: false,
      nextStage: 3,
      losses: [{ what: 'owner', message: 'owners are not kept' }],
    } as const
    expect(decodeState(encodeState(state))).toEqual(state)
    expect(decodeState(encodeState({ ...state, checkpoint: undefined, losses: [] })).checkpoint).toBeUndefined()
    expect(decodeCheckpoint(encodeCheckpoint(state.checkpoint))).toEqual(state.checkpoint)
    expect(decodeCheckpoint(encodeCheckpoint(undefined))).toBeUndefined()
    expect(decodePath(encodePath('a/\xff' as ByteString))).toBe('a/\xff')
    const failures = [
      { index: 0, code: 'EIO', path: 'a/\xff' as TreePath, message: 'wörds' },
      { index: 9, code: 'ENOSPC', path: '' as TreePath, message: '' },
    ]
    expect(decodeFailures(encodeFailures(failures))).toEqual(failures)
    const question = { path: 'a/\xff' as TreePath, after: 'n' as ByteString }
    expect(decodeDescribe(encodeDescribe(question.path, question.after))).toEqual(question)
    const description = { files: [described('a'), described('b', 16)], isWhole: false }
    expect(decodeDescription(encodeDescription(description), '')).toEqual(description)
  })

  test('a description that is out of order, does not go on, or is of something else than files is refused', () => {
    const answer = (files: readonly DescribedFile[], isWhole = true) => encodeDescription({ files, isWhole })
    const socket = described('a')
    socket.image.writeUInt16LE(0o140_644, 12)
    for (const [bytes, after] of [
      [answer([described('b'), described('a')]), ''],
      [answer([described('b'), described('b')]), ''],
      [answer([described('b')]), 'c'],
      [answer([], false), ''],
      [answer([socket]), ''],
      [answer([{ ...described('a'), image: Buffer.alloc(10) }]), ''],
      [answer([described('a', 7)]), ''],
      [answer([described('a', 256 << 10)]), ''],
    ] as const) {
      expect(() => decodeDescription(bytes, after as ByteString)).toThrow(ProtocolError)
    }
  })

  test('an error keeps its code and hint, and loses what a terminal would obey', () => {
    const error = decodeError(encodeError(new LsyncError('TARGET_BUSY', 'it is \x1b[2J\nbusy', { hint: 'wait' })))
    expect(error).toMatchObject({ code: 'TARGET_BUSY', message: 'it is \\x1b[2J\\nbusy', hint: 'wait' })
    expect(decodeError(encodeError(new TypeError('x is undefined'))).code).toBe('REMOTE_FAILED')
  })

  test('long texts are cut', () => {
    const path = 'p' as TreePath
    const [failure] = decodeFailures(encodeFailures([{ index: 0, code: 'EIO', path, message: 'ä'.repeat(5000) }]))
    expect(Buffer.byteLength(failure?.message ?? '')).toBeLessThanOrEqual(256)
  })

  test('failures out of order, unknown losses, impossible codes and paths are refused', () => {
    const failure = (index: number, code = 'EIO', path = 'p') => ({ index, code, path: path as TreePath, message: '' })
    for (const failures of [
      [failure(1), failure(0)],
      [failure(0), failure(0)],
      [failure(0, 'lower')],
      [failure(0, 'EIO', '../x')],
      [failure(1e9)],
    ]) {
      expect(() => decodeFailures(encodeFailures(failures))).toThrow(ProtocolError)
    }
  })

  test('random bytes, and valid ones with damage, give a message or a protocol error', () => {
    const valid = encodeFailures([{ index: 0, code: 'EIO', path: 'a/b' as TreePath, message: 'm' }])
    const anyBytes = fc.oneof(
      fc.uint8Array({ maxLength: 100 }),
      fc.array(fc.tuple(fc.nat(valid.length - 1), fc.nat(255)), { maxLength: 4 }).map((hits) => {
        const bytes = Uint8Array.from(valid)
        for (const [at, value] of hits) bytes[at] = value
        return bytes
      }),
    )
    fc.assert(
      fc.property(anyBytes, (bytes) => {
        const decodeFiles = (bytes: Uint8Array) => decodeDescription(bytes, '')
        for (const decode of [
          decodeFiles,
          decodeDescribe,
          decodeState,
          decodeFailures,
          decodeError,
          decodePath,
          decodeCheckpoint,
        ]) {
          try {
            decode(bytes)
          } catch (error) {
            expect(error).toBeInstanceOf(ProtocolError)
          }
        }
      }),
      { numRuns: 2000 },
    )
  })
})
