import { chmodSync, linkSync, mkdirSync, readFileSync, rmSync, unlinkSync, utimesSync, writeFileSync } from 'node:fs'
import { compareWithRecord, merge, recordView } from '@lsync/overlay-merge'
import type { HostPath } from '@lsync/posix'
import { describe, expect, test } from 'vitest'
import { buildTree, dir, fifo, file, linkTo, sparse, symlink } from '../support/build.ts'
import { useFileSystem } from '../support/image.ts'
import { plainOptions, withOverlay } from '../support/overlay.ts'
import { run } from '../support/system.ts'
import { jsonLines, lsync } from './lsync.ts'

const disk = useFileSystem('ext4')

const lowerSpec = dir({
  f: file('old', { xattrs: { 'user.a': '1' } }),
  gone: dir({ inner: file('1') }),
  one: file('linked'),
  two: linkTo('one'),
  d: dir({ kept: file('k'), 'd!': dir({ x: file('x') }), d: dir({ y: file('y') }) }),
  'd.e': file('sorts between d and d/…'),
  l: symlink('target'),
  p: fifo(),
  big: sparse(3_000_000, [[2_000_000, 'data']]),
})

/** Layers that the kernel made: a container changed, deleted, linked and renamed over `lowers` lowers. */
function grown(lowers: number) {
  const directory = disk.current.fresh()
  const paths = ['low', 'low2'].slice(0, lowers).map((name) => `${directory}/${name}` as HostPath)
  buildTree(paths[0] as string, lowerSpec)
  if (paths[1] !== undefined) buildTree(paths[1], dir({ deep: dir({ z: file('z') }), gone: dir({ more: file('m') }) }))
  const upper = `${directory}/up` as HostPath
  mkdirSync(upper)
  const options = { ...plainOptions, redirectDir: 'on', metacopy: true } as const
  withOverlay({ lowers: paths, upper, work: `${directory}/work` }, options, (merged) => {
    writeFileSync(`${merged}/f`, 'new content')
    rmSync(`${merged}/gone`, { recursive: true })
    chmodSync(`${merged}/one`, 0o600)
    run('mv', `${merged}/d`, `${merged}/moved`)
    mkdirSync(`${merged}/made`)
    writeFileSync(`${merged}/made/a`, 'a')
    linkSync(`${merged}/made/a`, `${merged}/made/b`)
    writeFileSync(`${merged}/log`, 'a')
    run('chattr', '+a', `${merged}/log`)
  })
  return { directory, upper, lowers: paths }
}

describe('merge --in-place --verify', () => {
  test.each([1, 2])('finds what a kernel mount of the stack showed, over %i lowers', (count) => {
    const { upper, lowers } = grown(count)
    const layers = ['--upper', upper, ...lowers.flatMap((lower) => ['--lower', lower])]
    const { stdout, stderr, code } = lsync(['merge', ...layers, '--in-place', '--yes', '--verify', '--json'])
    expect({ stderr, code }).toEqual({ stderr: '', code: 0 })
    expect(jsonLines(stdout)).toEqual([
      expect.objectContaining({ type: 'merge', mode: 'in-place', dryRun: false }),
      expect.objectContaining({ type: 'verify', equal: true, total: 0, by: 'mount' }),
    ])
    expect(readFileSync(`${lowers[0]}/f`, 'utf8')).toBe('new content')
  })

  test('with --dry-run compares nothing', () => {
    const { upper, lowers } = grown(1)
    const args = ['merge', '--upper', upper, '--lower', lowers[0] as string, '--in-place', '--verify', '--dry-run']
    expect(lsync(args).stdout).toMatch(/^would merge into .*\n$/)
  })
})

describe.each(['mount', 'resolver'] as const)('the record of a view, read by %s', (by) => {
  async function recorded(seed: (result: string) => void) {
    const { upper, lowers } = grown(1)
    const [against] = lowers as [HostPath]
    const record = await recordView({ layers: [upper, against], by })
    try {
      await merge({ mode: 'in-place', upper, lowers, workers: 0 })
      seed(against)
      return await compareWithRecord(record, { against })
    } finally {
      record.close()
    }
  }

  test('equals the result of a merge', async () => {
    const { equal, differences, total, entries, bytes, by: who } = await recorded(() => {})
    expect(differences).toEqual([])
    expect({ equal, total, entries, who }).toEqual({ equal: true, total: 0, entries: 18, who: by })
    expect(bytes).toBeGreaterThan(3_000_000)
  })

  const back = (path: string) => utimesSync(path, 1, 1)
  const seeds: [what: string, found: [path: string, what: string][], seed: (result: string) => void][] = [
    [
      'a mode',
      [
        ['made/a', 'mode'],
        ['made/b', 'mode'],
      ],
      (result) => chmodSync(`${result}/made/a`, 0o640),
    ],
    ['a time', [['moved/d/y', 'times']], (result) => back(`${result}/moved/d/y`)],
    [
      'a type',
      [['p', 'type']],
      (result) => {
        unlinkSync(`${result}/p`)
        writeFileSync(`${result}/p`, '')
      },
    ],
    [
      'an attribute',
      [['f', 'xattr user.a']],
      (result) => void run('setfattr', '-n', 'user.a', '-v', '2', `${result}/f`),
    ],
    ['a file that is gone', [['d.e', 'existence']], (result) => unlinkSync(`${result}/d.e`)],
    [
      'a directory that is gone',
      [['moved/d!', 'existence']],
      (result) => rmSync(`${result}/moved/d!`, { recursive: true }),
    ],
    [
      'a directory too many',
      [['moved/c', 'existence']],
      (result) => {
        mkdirSync(`${result}/moved/c`)
        writeFileSync(`${result}/moved/c/inner`, '')
      },
    ],
    [
      'a link that is broken',
      [['made/b', 'links']],
      (result) => {
        run('cp', '-a', `${result}/made/a`, `${result}/../copy`)
        run('mv', `${result}/../copy`, `${result}/made/b`)
      },
    ],
    [
      'a byte far into a sparse file',
      [['big', 'content']],
      (result) => {
        run('sh', '-c', 'printf X | dd of="$1" bs=1 seek=1000000 conv=notrunc status=none', 'sh', `${result}/big`)
      },
    ],
  ]
  test.each(seeds)('finds %s', async (_, found, seed) => {
    const { equal, differences } = await recorded(seed)
    // Whatever changes a name changes the times of it or of its directory, too.
    const others = differences.filter(({ what }) => what !== 'times' || found.some(([, word]) => word === 'times'))
    expect(others.map(({ path, what }) => [path, what])).toEqual(found)
    expect(equal).toBe(false)
  })
})

test('a record may be compared with what gives no more than so many differences', async () => {
  const { upper, lowers } = grown(1)
  const record = await recordView({ layers: [upper, ...lowers] })
  try {
    const { differences, total } = await compareWithRecord(record, { against: lowers[0] as HostPath, limit: 2 })
    expect(differences.length).toBe(2)
    expect(total).toBeGreaterThan(4)
  } finally {
    record.close()
  }
})
