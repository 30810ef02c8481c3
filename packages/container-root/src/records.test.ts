import type { HostPath } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { LayerRecord, NodeRootRecord, parseRecord, RootRecord, VersionRecord } from './records.ts'

const id = 'a'.repeat(32)
const where = '/home/record.json' as HostPath
const version = {
  format: 1,
  number: 1,
  epoch: 0,
  layers: [id],
  madeBy: 'init',
  createdAtMs: 0,
  nodeId: id,
  nodeName: 'one',
} as const

describe('records', () => {
  test('a record comes back as it was written', () => {
    expect(parseRecord(VersionRecord, JSON.stringify(version), where)).toEqual(version)
  })

  test('a later format is refused by its number, whatever else is in it', () => {
    expect(() => parseRecord(RootRecord, '{"format":2,"news":[]}', where)).toThrow(
      expect.objectContaining({ code: 'RECORD_NEWER', path: where }),
    )
  })

  test.each([
    ['no JSON', '{"format":1'],
    ['null', 'null'],
    ['a list', '[1]'],
    ['a format that is no number', '{"format":"1"}'],
    ['a field that nobody knows', JSON.stringify({ ...version, more: 1 })],
    ['a field that is missing', JSON.stringify({ ...version, layers: undefined })],
    ['a number that is none', JSON.stringify({ ...version, number: 1.5 })],
    ['a message of two lines', JSON.stringify({ ...version, message: 'one\ntwo' })],
  ])('%s is refused', (_, text) => {
    expect(() => parseRecord(VersionRecord, text, where)).toThrow(expect.objectContaining({ code: 'RECORD_DAMAGED' }))
  })

  test.each(['..', '../../etc', `${id}/`, id.toUpperCase(), '', '.'])('%j is no name of a layer', (bad) => {
    const layer = { format: 1, id: bad, form: 'tree', isBottom: true, covers: [id], madeBy: 'init', createdAtMs: 0 }
    expect(LayerRecord.safeParse(layer).success).toBe(false)
    expect(VersionRecord.safeParse({ ...version, layers: [bad] }).success).toBe(false)
  })

  test.each(['..', '.hidden', 'a/b', '', 'a\n'])('%j is no name of a root', (name) => {
    const root = {
      format: 1,
      name,
      home: '/home',
      rootId: id,
      base: { version: 1, layers: [id] },
      upperId: id,
      incomingEpoch: 0,
      seenEpoch: 0,
    }
    expect(NodeRootRecord.safeParse(root).success).toBe(false)
    expect(NodeRootRecord.safeParse({ ...root, name: 'lab-1' }).success).toBe(true)
  })
})
