import { closeSync } from 'node:fs'
import { deref, makePortablePlan, merge, recover } from '@lsync/overlay-merge'
import type { HostPath } from '@lsync/posix'
import { expect, test } from 'vitest'
import { buildTree, dir, file, redirected, whiteout } from '../support/build.ts'
import { countCalls, killAt } from '../support/faults.ts'
import { descriptorsBelow, useFileSystem } from '../support/image.ts'
import { outline, readTree } from '../support/tree.ts'

const disk = useFileSystem('tmpfs')

/** A stack whose in-place merge was killed in its middle: its lower is neither old nor new. */
async function interrupted() {
  const build = () => {
    const directory = disk.current.fresh()
    const [upper, lower] = [`${directory}/u`, `${directory}/l`] as [HostPath, HostPath]
    buildTree(upper, dir({ new: redirected('old', { f: file('2') }), old: whiteout(), a: file('a'), b: file('b') }))
    buildTree(lower, dir({ old: dir({ f: file('1'), g: file('g') }), a: file('0') }))
    return { directory, upper, lowers: [lower], workers: 0 }
  }
  const first = build()
  const calls = await countCalls('kill', () => merge({ ...first, mode: 'in-place' }))
  const { directory, ...request } = build()
  expect(await killAt(Math.floor(calls / 2), () => merge({ ...request, mode: 'in-place' }))).toBe(true)
  for (const { fd } of descriptorsBelow(directory)) closeSync(fd)
  return { directory, request, lower: request.lowers[0] as HostPath }
}

const collect = async (lines: AsyncIterable<string>) => {
  const all: string[] = []
  for await (const line of lines) all.push(line)
  return all
}

test('what an interrupted merge has half changed is not planned over, nor read as a layer', async () => {
  const { directory, request, lower } = await interrupted()
  const half = outline(readTree(lower))
  const refused = { code: 'MERGE_UNFINISHED', path: lower, hint: expect.stringContaining('lsync recover') }
  const output = `${directory}/new` as HostPath
  await expect(merge({ ...request, mode: 'in-place', dryRun: true })).rejects.toMatchObject(refused)
  await expect(merge({ ...request, mode: 'output', output, dryRun: true })).rejects.toMatchObject(refused)
  await expect(merge({ ...request, mode: 'output', output })).rejects.toMatchObject(refused)
  await expect(collect(makePortablePlan(request))).rejects.toMatchObject(refused)
  await expect(deref({ ...request, output })).rejects.toMatchObject(refused)
  await expect(deref({ ...request, output, dryRun: true })).rejects.toMatchObject(refused)
  expect(outline(readTree(lower))).toEqual(half)

  await recover(lower, { workers: 0 })
  expect(outline(readTree(lower))).toEqual({ a: 'a', b: 'b', new: 'dir', 'new/f': '2', 'new/g': 'g' })
})

test('a dry run names what an interrupted new version has left at its target', async () => {
  const directory = disk.current.fresh()
  const [upper, lower, output] = ['u', 'l', 'new'].map((name) => `${directory}/${name}`) as HostPath[]
  buildTree(upper as string, dir({ a: file('a') }))
  buildTree(lower as string, dir({ b: file('b') }))
  const request = { upper, lowers: [lower], output, mode: 'output', workers: 0 } as Parameters<typeof merge>[0]
  expect(await killAt(20, () => merge(request))).toBe(true)
  for (const { fd } of descriptorsBelow(directory)) closeSync(fd)
  await expect(merge({ ...request, dryRun: true })).rejects.toMatchObject({ code: 'MERGE_UNFINISHED', path: output })
  await merge(request)
  expect(outline(readTree(output as string))).toEqual({ a: 'a', b: 'b' })
})
