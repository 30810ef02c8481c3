import { mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { type HostPath, LsyncError } from '@lsync/posix'
import fc from 'fast-check'
import { afterEach, describe, expect, test } from 'vitest'
import xxhash from 'xxhash-wasm'
import { applyPortablePlan, makePortablePlan } from './portable-plan.ts'

const { h64ToString } = await xxhash()
const made: string[] = []
afterEach(() => {
  for (const path of made.splice(0)) rmSync(path, { recursive: true, force: true })
})

/** An upper with one new and one changed file, over a lower; marks of the user namespace, so that anybody may. */
function build(): { root: string; upper: HostPath; target: HostPath } {
  const root = mkdtempSync(`${tmpdir()}/lsync-plan-`)
  made.push(root)
  const [upper, target] = [`${root}/u`, `${root}/l`] as [HostPath, HostPath]
  for (const path of [upper, target, `${upper}/d`, `${target}/d`]) mkdirSync(path)
  writeFileSync(`${upper}/d/new`, 'new')
  writeFileSync(`${upper}/f`, 'changed')
  writeFileSync(`${target}/f`, 'f')
  return { root, upper, target }
}

async function planOf(upper: HostPath, lower: HostPath): Promise<string[]> {
  const lines: string[] = []
  const request = { upper, lowers: [lower], namespace: 'user' as const, workers: 0 }
  for await (const line of makePortablePlan(request)) lines.push(line)
  return lines
}

/** The same plan with a right digest, as an enemy would send it. */
function sealed(lines: readonly string[]): string[] {
  const digest = h64ToString(lines.map((line) => `${line}\n`).join(''))
  return [...lines, JSON.stringify({ type: 'end', records: lines.length - 1, digest })]
}

function listing(root: string): string[] {
  return (readdirSync(root, { recursive: true }) as string[])
    .sort()
    .map((path) => `${path} ${statSync(`${root}/${path}`).isFile() ? readFileSync(`${root}/${path}`, 'utf8') : ''}`)
}

type Json = Record<string, unknown>
type Change = (records: Json[]) => void

const root = (records: Json[]) =>
  records.find((record) => record['type'] === 'directory' && record['path'] === '') as Json
const inner = (records: Json[]) => records.find((record) => record['path'] === 'd') as Json
const step = (record: Json, name: string) => (record['steps'] as Json[]).find((one) => one['name'] === name) as Json
const placed = (records: Json[]) => step(root(records), 'f')

describe('a plan is refused before anything is touched when', () => {
  const attacks: [what: string, change: Change][] = [
    ['a name leads out of its directory', (r) => Object.assign(placed(r), { name: '..' })],
    ['a name is the directory itself', (r) => Object.assign(placed(r), { name: '.' })],
    ['a name is empty', (r) => Object.assign(placed(r), { name: '' })],
    ['a name is a path', (r) => Object.assign(placed(r), { name: '../l/f' })],
    ['a name holds a NUL', (r) => Object.assign(placed(r), { name: 'f\0' })],
    ['a name is too long', (r) => Object.assign(placed(r), { name: 'n'.repeat(256) })],
    ['a name is text for other bytes', (r) => Object.assign(placed(r), { name: '\udcc3\udca9' })],
    ['a name is no text', (r) => Object.assign(placed(r), { name: 7 })],
    ['a directory is absolute', (r) => Object.assign(inner(r), { path: '/etc', upper: '/etc' })],
    ['a directory leads out', (r) => Object.assign(inner(r), { path: 'd/../../x', upper: 'd/../../x' })],
    ['a directory comes from another one', (r) => Object.assign(inner(r), { upper: '' })],
    ['a directory has no parent', (r) => Object.assign(inner(r), { path: 'x/d', upper: 'x/d' })],
    ['a directory comes twice', (r) => r.push({ ...inner(r) })],
    ['a name comes twice', (r) => (root(r)['steps'] as Json[]).push({ ...placed(r) })],
    ['the root is missing', (r) => r.splice(r.indexOf(root(r)), 1)],
    ['a step is of another kind', (r) => Object.assign(placed(r), { do: 'exec' })],
    ['a step links from an index', (r) => Object.assign(placed(r), { do: 'alias', from: '../../etc/shadow' })],
    ['a step takes from another layer', (r) => Object.assign(placed(r), { from: [1, 'f'] })],
    ['data is in no layer', (r) => Object.assign(placed(r), { data: [9, 'f'] })],
    ['data is in the target', (r) => Object.assign(placed(r), { data: [1, 'f'] })],
    ['a step expects nothing', (r) => Object.assign(placed(r), { expect: undefined })],
    ['the target is not told', (r) => Object.assign(placed(r), { expectTarget: undefined })],
    ['an attribute is dropped that is no mark', (r) => Object.assign(placed(r), { drop: ['security.capability'] })],
    [
      'an attribute is set that is no mark',
      (r) => Object.assign(placed(r), { set: [['security.capability', 'AQ==']] }),
    ],
    [
      'a mark is set where nothing lies below',
      (r) => Object.assign(placed(r), { set: [['user.overlay.opaque', 'eQ==']] }),
    ],
    ['flags are others than i and a', (r) => Object.assign(placed(r), { flags: 0x80 })],
    ['a mode has a type', (r) => Object.assign(root(r)['meta'] as Json, { mode: 0o100755 })],
    ['an owner is nobody at all', (r) => Object.assign(root(r)['meta'] as Json, { uid: 0xffff_ffff })],
    ['a time is none', (r) => Object.assign(root(r)['meta'] as Json, { mtimeNs: '1e9' })],
    ['a time is too big', (r) => Object.assign(root(r)['meta'] as Json, { mtimeNs: '9'.repeat(29) })],
    [
      'a mark is smuggled in as metadata',
      (r) => Object.assign(root(r)['meta'] as Json, { xattrs: [['user.overlay.opaque', 'eQ==']] }),
    ],
    ['an attribute has no namespace', (r) => Object.assign(root(r)['meta'] as Json, { xattrs: [['opaque', 'eQ==']] })],
    ['a value is no base64', (r) => Object.assign(root(r)['meta'] as Json, { xattrs: [['user.a', 'e!']] })],
    ['a whiteout stands where nothing lies below', (r) => Object.assign(placed(r), { do: 'whiteout' })],
    ['a graft has no stage', (r) => Object.assign(placed(r), { do: 'graft', from: 'f' })],
    [
      'a stage has no step',
      (r) => r.splice(1, 0, { type: 'stage', id: 0, from: 'f', to: 'g', kind: 'directory', how: 'move' }),
    ],
    [
      'a stage leads out',
      (r) => r.splice(1, 0, { type: 'stage', id: 0, from: '../x', to: 'g', kind: 'directory', how: 'move' }),
    ],
    ['it cleans what stays', (r) => r.push({ type: 'clean', upper: 'd', whiteouts: ['new'] })],
    ['its format is of the future', (r) => Object.assign(r[0] as Json, { format: 2 })],
    ['it is no portable one', (r) => Object.assign(r[0] as Json, { portable: false })],
    ['it publishes', (r) => Object.assign(r[0] as Json, { publish: '/etc' })],
    ['it makes a new tree', (r) => Object.assign(r[0] as Json, { mode: 'output' })],
    ['it has a header twice', (r) => r.push({ ...(r[0] as Json) })],
    ['a record is no object', (r) => r.push([] as unknown as Json)],
    ['a prototype is given', (r) => r.push(JSON.parse('{"__proto__":{"type":"directory"},"path":"d"}') as Json)],
  ]
  test.each(attacks)('%s', async (_what, change) => {
    const { root: directory, upper, target } = build()
    const records = (await planOf(upper, target)).slice(0, -1).map((line) => JSON.parse(line) as Json)
    change(records)
    const before = listing(directory)
    const lines = sealed(records.map((record) => JSON.stringify(record)))
    await expect(applyPortablePlan(lines, { upper, target, workers: 0 })).rejects.toMatchObject({
      code: 'PLAN_INVALID',
    })
    expect(listing(directory)).toEqual(before)
  })

  test('it was cut off, changed on the way, or something follows it', async () => {
    const { root: directory, upper, target } = build()
    const lines = await planOf(upper, target)
    const before = listing(directory)
    const broken = [
      [],
      lines.slice(0, -1),
      lines.slice(0, 1),
      lines.map((line) => line.replace('"mode":', '"mode": ')),
      [...lines, lines[1] as string],
      [...lines.slice(0, 1), ...lines.slice(2)],
      ['not json'],
      lines.map((line) => line.slice(0, -1)),
    ]
    for (const wrong of broken) {
      await expect(applyPortablePlan(wrong, { upper, target })).rejects.toMatchObject({ code: 'PLAN_INVALID' })
    }
    expect(listing(directory)).toEqual(before)
  })
})

test('a plan with any one value changed is refused, or touches nothing beyond the two trees', async () => {
  const { upper, target } = build()
  const plan = (await planOf(upper, target)).slice(0, -1)
  const places = plan.flatMap((line, index) => pathsOf(JSON.parse(line)).map((path) => ({ index, path })))
  const anyValue = fc.oneof(
    fc.constantFrom<unknown>('..', '/', '', 'd', 'f', null, [], {}, true, -1, 1e300, 'remove', 'mkdir', 'directory', [
      ['a'],
    ]),
    fc.jsonValue(),
  )
  await fc.assert(
    fc.asyncProperty(fc.constantFrom(...places), anyValue, async ({ index, path }, value) => {
      const { root: directory, upper: ours, target: theirs } = build()
      const records = plan.map((line) => JSON.parse(line) as Json)
      set(records[index] as Json, path, value)
      writeFileSync(`${directory}/witness`, 'untouched')
      const lines = sealed(records.map((record) => JSON.stringify(record)))
      const failure = await applyPortablePlan(lines, { upper: ours, target: theirs, workers: 0 }).catch(
        (error: unknown) => error,
      )
      if (failure instanceof Error && !(failure instanceof LsyncError)) throw failure
      expect(readdirSync(directory).sort()).toEqual(['l', 'u', 'witness'])
      expect(readFileSync(`${directory}/witness`, 'utf8')).toBe('untouched')
      rmSync(directory, { recursive: true })
    }),
    { numRuns: 300 },
  )
}, 60_000)

function pathsOf(value: unknown, at: readonly (string | number)[] = []): (string | number)[][] {
  if (typeof value !== 'object' || value === null) return [[...at]]
  const children = Object.entries(value).flatMap(([key, child]) => pathsOf(child, [...at, key]))
  return at.length === 0 ? children : [[...at], ...children]
}

function set(record: Json, path: readonly (string | number)[], value: unknown): void {
  let at: Record<string | number, unknown> = record
  for (const key of path.slice(0, -1)) at = at[key] as Record<string | number, unknown>
  at[path.at(-1) as string] = value
}
