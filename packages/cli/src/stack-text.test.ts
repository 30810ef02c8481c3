import fc from 'fast-check'
import { expect, test } from 'vitest'
import { splitStack, stackPart } from './stack-text.ts'

test('a stack splits at its colons, with data-only layers after double ones', () => {
  expect(splitStack('U:L1:L2')).toEqual({ layers: ['U', 'L1', 'L2'], data: [] })
  expect(splitStack('U:L1::D1::D2')).toEqual({ layers: ['U', 'L1'], data: ['D1', 'D2'] })
  expect(splitStack('a\\:b:c\\\\d')).toEqual({ layers: ['a:b', 'c\\d'], data: [] })
})

test.each(['', ':', 'a:', ':a', '::d', 'a::', 'a:::b', 'a::d:b'])('%j is no stack', (text) => {
  expect(() => splitStack(text)).toThrow(/Expected UPPER/)
})

test('splitting undoes joining', () => {
  const names = fc.array(fc.string({ minLength: 1, unit: fc.constantFrom('a', ':', '\\', '/', '\n') }), {
    minLength: 1,
  })
  fc.assert(
    fc.property(names, fc.array(fc.string({ minLength: 1, unit: fc.constantFrom('b', ':', '\\') })), (layers, data) => {
      const text = [layers.map(stackPart).join(':'), ...data.map(stackPart)].join('::')
      expect(splitStack(text)).toEqual({ layers, data })
    }),
  )
})
