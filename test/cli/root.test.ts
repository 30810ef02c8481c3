import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { describe, expect, test } from 'vitest'
import { useFileSystem } from '../support/image.ts'
import { canMountImages } from '../support/ready.ts'
import { jsonLines, lsync } from './lsync.ts'

describe.skipIf(!canMountImages())('lsync root and lsync solidify', () => {
  const disk = useFileSystem('ext4')

  test('a root is made, mounted, changed, solidified, listed, compared, rolled back, compacted and cleaned up', () => {
    const at = disk.current.fresh()
    mkdirSync(`${at}/base/etc`, { recursive: true })
    writeFileSync(`${at}/base/etc/hostname`, 'base\n')
    const run = (...args: string[]) => lsync([...args, '--state', `${at}/state`])
    const merged = `${at}/state/roots/lab/merged`
    expect(run('root', 'init', 'lab', '--home', `${at}/home`, '--base', `${at}/base`)).toMatchObject({
      stdout: `made ${at}/home, version 1\n`,
      stderr: 'next: lsync root mount lab\n',
      code: 0,
    })
    expect(run('root', 'mount', 'lab').stdout).toBe(`version 1 on ${merged}\n`)
    try {
      writeFileSync(`${merged}/etc/new`, 'new\n')
      const hooks = ['--stop', `echo stop >> ${at}/hooks`, '--start', `echo start >> ${at}/hooks`]
      const solidified = run('solidify', 'lab', '--message', 'with new', '--tag', 'good', ...hooks)
      expect(solidified).toMatchObject({ stdout: expect.stringMatching(/^version 2 in .*, at rest /), code: 0 })
      expect(readFileSync(`${at}/hooks`, 'utf8')).toBe('stop\nstart\n')
      writeFileSync(`${merged}/etc/hostname`, 'changed\n')
      expect(run('solidify', 'lab', '--live')).toMatchObject({ stdout: expect.stringMatching(/^version 3 /), code: 0 })
      expect(jsonLines(run('root', 'versions', 'lab', '--json').stdout)).toEqual([
        expect.objectContaining({ type: 'version', number: 1, madeBy: 'init' }),
        expect.objectContaining({ number: 2, madeBy: 'solidify', message: 'with new', tags: ['good'] }),
        expect.objectContaining({ number: 3, madeBy: 'live' }),
      ])
      expect(run('root', 'diff', 'lab', 'good').stdout).toBe('M etc/hostname  (times, size)\n')
      expect(run('root', 'rollback', 'lab', '--to', 'good')).toMatchObject({
        stderr: expect.stringContaining('it is mounted; wait for it to end (ROOT_BUSY)'),
        code: 4,
      })
    } finally {
      run('root', 'unmount', 'lab')
    }
    expect(run('root', 'rollback', 'lab', '--to', 'good')).toMatchObject({
      stderr: expect.stringContaining('(CHANGES_UNSAVED)'),
      code: 1,
    })
    expect(run('root', 'rollback', 'lab', '--to', 'good', '--discard', '--yes').stdout).toBe('version 4 is version 2\n')
    expect(run('root', 'compact', 'lab', '--max-layers', '1', '--into-bottom').stdout).toMatch(
      /^folded 2 layers in .*; 1 are left\n$/,
    )
    expect(run('root', 'gc', 'lab', '--keep', '1', '--yes').stdout).toBe('removed 2 versions and 3 layers\n')
    expect(jsonLines(run('root', 'status', 'lab', '--json').stdout)).toEqual([
      expect.objectContaining({
        type: 'status',
        isMounted: false,
        hasChanges: false,
        version: 4,
        head: 4,
        layers: [expect.objectContaining({ madeBy: 'compact', covers: 2, isBottom: true })],
        errors: [],
      }),
    ])
    run('root', 'mount', 'lab')
    try {
      expect(readFileSync(`${merged}/etc/hostname`, 'utf8')).toBe('base\n')
      expect(readFileSync(`${merged}/etc/new`, 'utf8')).toBe('new\n')
    } finally {
      expect(run('root', 'unmount', 'lab')).toEqual({ stdout: 'unmounted\n', stderr: '', code: 0 })
    }
  })

  test('what nobody knows, and what makes no sense, is said in one line', () => {
    const at = disk.current.fresh()
    expect(lsync(['root', 'mount', 'lab', '--state', `${at}/state`])).toMatchObject({
      stderr: `lsync: there is no root lab in ${at}/state; name its home with --home, or another state with --state (ROOT_UNKNOWN)\n`,
      code: 1,
    })
    expect(lsync(['root', 'mount', 'lab', '--home', `${at}/none`, '--state', `${at}/state`])).toMatchObject({
      stderr: expect.stringContaining('(HOME_MISSING)'),
      code: 1,
    })
    expect(lsync(['solidify', 'lab', '--cgroup', '/x', '--state', `${at}/state`])).toMatchObject({
      stderr: 'lsync: frozen processes hold the mount; use --stop and --start, or --live (USAGE)\n',
      code: 2,
    })
  })
})
