import fc from 'fast-check'
import { expect, test } from 'vitest'
import { chooseLayers } from './layer-choice.ts'
import type { LayerRecord } from './records.ts'

function layer(id: string, covers: readonly string[] = [id], isBottom = false): LayerRecord {
  return { format: 1, id, form: 'tree', isBottom, covers: [...covers], madeBy: 'solidify', createdAtMs: 0 }
}

const chosen = (...args: Parameters<typeof chooseLayers>) => chooseLayers(...args)?.map(({ id }) => id)

test('without compaction each layer stands for itself', () => {
  expect(chosen(['b', 'a'], [layer('a', ['a'], true), layer('b')])).toEqual(['b', 'a'])
})

test('a compacted layer takes the place of those that it stands for, also when they are gone', () => {
  const layers = [layer('a', ['a'], true), layer('m', ['c', 'b']), layer('d')]
  expect(chosen(['d', 'c', 'b', 'a'], layers)).toEqual(['d', 'm', 'a'])
})

test('a layer that is there in no form leaves no choice', () => {
  expect(chosen(['c', 'b', 'a'], [layer('a'), layer('c')])).toBeUndefined()
})

test('a compacted layer that begins or ends in the middle of another one does not fit', () => {
  const layers = [layer('a'), layer('b'), layer('c'), layer('d'), layer('m', ['d', 'b'])]
  expect(chosen(['d', 'c', 'b', 'a'], layers)).toEqual(['d', 'c', 'b', 'a'])
})

test('a bottom is taken only at the end', () => {
  const bottom = layer('m', ['b', 'a'], true)
  expect(chosen(['b', 'a'], [layer('a', ['a'], true), layer('b'), bottom])).toEqual(['m'])
  expect(chosen(['b', 'a', 'z'], [layer('a'), layer('b'), layer('z'), bottom])).toEqual(['b', 'a', 'z'])
})

test('several cheap layers can be better than one that is far away', () => {
  const layers = [layer('a', ['a'], true), layer('b'), layer('c'), layer('far', ['c', 'b'])]
  expect(chosen(['c', 'b', 'a'], layers, ({ id }) => (id === 'far' ? 10 : 1))).toEqual(['c', 'b', 'a'])
})

test('what is chosen stands for exactly the list, with as few layers as any choice has', () => {
  const names = ['a', 'b', 'c', 'd', 'e']
  const run = fc.tuple(fc.nat(4), fc.nat(4)).map(([x, y]) => names.slice(Math.min(x, y), Math.max(x, y) + 1))
  fc.assert(
    fc.property(fc.array(run, { maxLength: 8 }), fc.subarray(names), (runs, singles) => {
      const layers = [...singles.map((name) => layer(name)), ...runs.map((covers, i) => layer(`m${i}`, covers))]
      const choice = chooseLayers(names, layers)
      const fewest = fewestBySearch(names, layers)
      expect(choice?.length).toBe(fewest)
      if (choice !== undefined) expect(choice.flatMap(({ covers }) => covers)).toEqual(names)
    }),
  )
})

function fewestBySearch(list: readonly string[], layers: readonly LayerRecord[]): number | undefined {
  if (list.length === 0) return 0
  const counts = layers
    .filter(({ covers }) => covers.every((id, i) => list[i] === id))
    .flatMap(({ covers }) => fewestBySearch(list.slice(covers.length), layers) ?? [])
  return counts.length === 0 ? undefined : 1 + Math.min(...counts)
}
