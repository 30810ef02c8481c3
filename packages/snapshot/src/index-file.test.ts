import fc from 'fast-check'
import { expect, test } from 'vitest'
import { decodeIndex, encodeIndex, type IndexedPack, type IndexRows, scanIndex } from './index-file.ts'
import { ObjectTable } from './object-table.ts'

const id = () => fc.uint8Array({ minLength: 32, maxLength: 32 }).map((bytes) => Buffer.from(bytes).toString('hex'))
const size = (min: number) => fc.integer({ min, max: 60_000_000 })

const packs = (): fc.Arbitrary<IndexedPack[]> =>
  fc.array(
    fc.record({
      id: id(),
      objects: fc.array(
        fc.record({
          kind: fc.constantFrom('data', 'tree'),
          id: id(),
          offset: size(0),
          length: size(32),
          uncompressedLength: fc.option(size(1), { nil: undefined }),
        }),
        { minLength: 1, maxLength: 5 },
      ),
    }),
    { minLength: 1, maxLength: 4 },
  )

/** What a table knows of the objects that an index names, whichever way it was read. */
function placesIn(table: ObjectTable, indexed: readonly IndexedPack[]) {
  return indexed.flatMap(({ objects }) => objects.map(({ kind, id }) => table.locate(kind, id)))
}

function tableOf(indexed: readonly IndexedPack[]): ObjectTable {
  const table = new ObjectTable()
  for (const pack of indexed) {
    const number = table.addPack(pack.id)
    for (const object of pack.objects) table.add(number, object)
  }
  return table
}

test('scanning an index makes every object known as decoding it does', () =>
  fc.assert(
    fc.property(packs(), (indexed) => {
      const content = encodeIndex(indexed)
      const scanned = new ObjectTable()
      scanned.addRows(scanIndex(content) as IndexRows)
      expect(placesIn(scanned, indexed)).toEqual(placesIn(tableOf(decodeIndex('', content)), indexed))
      expect(placesIn(scanned, indexed)).not.toContain(undefined)
    }),
  ))

test('an index with any byte changed or missing is left to the decoder, or scans to what that says', () =>
  fc.assert(
    fc.property(packs(), fc.nat(), fc.integer({ min: 0, max: 255 }), fc.boolean(), (indexed, place, byte, isCut) => {
      const content = encodeIndex(indexed)
      const at = place % content.length
      const damaged = isCut ? content.subarray(0, at) : Buffer.from(content)
      if (!isCut) damaged[at] = byte
      const rows = scanIndex(damaged)
      if (rows === undefined) return
      const scanned = new ObjectTable()
      scanned.addRows(rows)
      const decoded = decodeIndex('', damaged)
      expect(placesIn(scanned, decoded)).toEqual(placesIn(tableOf(decoded), decoded))
      expect(rows.packs).toEqual(decoded.map(({ id, objects }) => ({ id, objects: objects.length })))
    }),
  ))

test('room made in advance holds objects as room that grows', () => {
  const indexed = fc.sample(packs(), { numRuns: 1, seed: 1 }).flat()
  const table = new ObjectTable()
  table.reserve(100_000)
  table.addRows(scanIndex(encodeIndex(indexed)) as IndexRows)
  expect(placesIn(table, indexed)).toEqual(placesIn(tableOf(indexed), indexed))
  expect(table.segments.length).toBe(1)
})
