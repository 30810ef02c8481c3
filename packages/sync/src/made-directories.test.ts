import { expect, test } from 'vitest'
import { MadeDirectories } from './made-directories.ts'
import type { TreePath } from './model/operation.ts'

const path = (text: string) => text as TreePath

test('what one thread has made is new for another one until either finishes it', () => {
  const [one, other] = [new MadeDirectories(), new MadeDirectories()]
  one.add(path('a'), '1')
  one.add(path('b'), '2')
  other.learn(one.takeNews())
  expect(other.identityOf(path('a'))).toBe('1')
  other.finish(path('a'))
  other.finish(path('unknown'))
  const news = other.takeNews()
  expect(news).toEqual([['a', undefined]])
  one.learn(news)
  expect(one.identityOf(path('a'))).toBeUndefined()
  expect(one.identityOf(path('b'))).toBe('2')
  // What was learned is not told again.
  expect(one.takeNews()).toEqual([])
  one.clear()
  expect(one.identityOf(path('b'))).toBeUndefined()
})

test('any number of directories takes a bounded number of entries', () => {
  const made = new MadeDirectories()
  for (let index = 0; index < 20_000; index++) made.add(path(`d${index}`), 'x')
  const known = Array.from({ length: 20_000 }, (_, index) => made.identityOf(path(`d${index}`))).filter(Boolean)
  expect(known.length).toBeLessThanOrEqual(1 << 14)
  expect(made.identityOf(path('d19999'))).toBe('x')
})
