import { execFileSync, spawnSync } from 'node:child_process'
import { chmodSync, existsSync, mkdirSync, readdirSync, truncateSync, writeFileSync } from 'node:fs'
import { describe, expect, onTestFinished, test } from 'vitest'
import {
  type Ability,
  type HostPath,
  hostPath,
  mountsBeneath,
  PosixError,
  type ProbeReport,
  probe,
  setSyscallHook,
} from '../../packages/posix/src/index.ts'
import { type FileSystemKind, mountImage, withFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { isPresent, mount, run, start, unmount } from '../support/system.ts'
import { hasBindfs, mayMount } from './privileges.ts'
import { temporary } from './temporary.ts'

const bindfs = hasBindfs()
const unprivileged = needs('setpriv', isPresent('setpriv'))

function lacks(report: ProbeReport): Ability[] {
  const names = Object.keys(report.abilities) as Ability[]
  return names.filter((name) => report.abilities[name].value !== true).sort()
}

// What a sound Linux file system does not do.
const NOT_WANTED: Ability[] = ['foldsCase', 'normalizesUnicode']
const ELSEWHERE: Ability[] = ['mooseSnapshot', ...NOT_WANTED]
const EXPECTED: Readonly<Record<FileSystemKind, readonly Ability[]>> = {
  ext4: ['reflink', 'subvolumeSnapshot', ...ELSEWHERE],
  'ext4-nodtype': ['dirEntryTypes', 'reflink', 'subvolumeSnapshot', ...ELSEWHERE],
  xfs: ['subvolumeSnapshot', ...ELSEWHERE],
  btrfs: [...ELSEWHERE],
  tmpfs: ['reflink', 'subvolumeSnapshot', ...ELSEWHERE],
}

describe.skipIf(!mayMount)('probe', () => {
  test.each(Object.keys(EXPECTED) as FileSystemKind[])('%s is seen as what it is', async (kind) => {
    await withFileSystem(kind, ({ root }) => {
      const report = probe(hostPath(root))
      expect(lacks(report)).toEqual([...EXPECTED[kind]].sort())
      expect(report.fileSystem.type).toBe(kind === 'ext4-nodtype' ? 'ext4' : kind)
      expect(report.isReadOnly).toBe(false)
      expect(report.privileges.trustedXattrs).toBe(true)
      expect(report.limits.nameBytes).toEqual({ value: 255 })
      expect(report.limits.timestampGranularityNs).toEqual({ value: 1 })
      expect(report.limits.userXattrBytes.value).toBeGreaterThan(2000)
      expect(report.canBeOverlayLower).toEqual({ ok: true, missing: [] })
      for (const verdict of [report.canBeOverlayUpper, report.canBeOverlayUpperByUserXattrs]) {
        if (kind !== 'ext4-nodtype') expect(verdict).toEqual({ ok: true, missing: [] })
        else expect(verdict).toMatchObject({ ok: false, missing: expect.arrayContaining(['dirEntryTypes']) })
      }
      expect(readdirSync(root).filter((name) => name !== 'lost+found')).toEqual([])
      if (kind === 'btrfs') expect(run('btrfs', 'subvolume', 'list', root)).toBe('')
    })
  })

  test('ext4 with 128-byte inodes has whole seconds until 2038', () => {
    const { path } = temporary('/dev/shm')
    const image = `${path}/image`
    writeFileSync(image, '')
    truncateSync(image, 16 << 20)
    run('mkfs.ext4', '-q', '-F', '-I', '128', image)
    mkdirSync(`${path}/m`)
    mountImage(image, `${path}/m`, 'ext4')
    try {
      const { abilities, limits } = probe(hostPath(`${path}/m`))
      expect(limits.timestampGranularityNs).toEqual({ value: 1_000_000_000 })
      expect(abilities.timesBefore1970).toEqual({ value: true })
      expect(abilities.timesAfter2038).toMatchObject({ value: false, reason: expect.stringContaining('came back as') })
      expect(abilities.timesAfter2106.value).toBe(false)
    } finally {
      unmount(`${path}/m`)
    }
  })

  // The kernel has these or has not: nothing that an installation could bring.
  if (existsSync('/sys/fs/ext4/features/casefold'))
    test('a directory that folds case and normalises is seen as such', () => {
      const { path } = temporary('/dev/shm')
      const image = `${path}/image`
      writeFileSync(image, '')
      truncateSync(image, 16 << 20)
      run('mkfs.ext4', '-q', '-F', '-O', 'casefold', image)
      mkdirSync(`${path}/m`)
      mountImage(image, `${path}/m`, 'ext4')
      try {
        mkdirSync(`${path}/m/folding`)
        run('chattr', '+F', `${path}/m/folding`)
        const { abilities } = probe(hostPath(`${path}/m/folding`))
        expect([abilities.foldsCase.value, abilities.normalizesUnicode.value]).toEqual([true, true])
        expect(probe(hostPath(`${path}/m`)).abilities.foldsCase.value).toBe(false)
      } finally {
        unmount(`${path}/m`)
      }
    })

  if (hasVfat())
    test('vfat can be neither layer', () => {
      const { path } = temporary('/dev/shm')
      const image = `${path}/image`
      writeFileSync(image, '')
      truncateSync(image, 16 << 20)
      run('mkfs.vfat', image)
      mkdirSync(`${path}/m`)
      mountImage(image, `${path}/m`, 'vfat')
      try {
        const report = probe(hostPath(`${path}/m`))
        expect(lacks(report)).toEqual(expect.arrayContaining(['hardLinks', 'symlinks', 'whiteouts', 'trustedXattrs']))
        expect(report.abilities.foldsCase.value).toBe(true)
        expect(report.canBeOverlayUpper.ok).toBe(false)
      } finally {
        unmount(`${path}/m`)
      }
    })

  test('ramfs, without attributes, is a lower and no upper', () => {
    const { path } = temporary()
    mount('ramfs', path, 'ramfs', 0, '')
    try {
      const report = probe(hostPath(path))
      expect(lacks(report)).toEqual(expect.arrayContaining(['acls', 'inodeFlags', 'trustedXattrs', 'userXattrs']))
      expect(report.limits.userXattrBytes.value).toBe(0)
      expect(report.canBeOverlayUpper.ok).toBe(false)
      expect(report.canBeOverlayUpper.missing).toEqual(expect.arrayContaining(['trustedXattrs']))
      expect(report.canBeOverlayLower.ok).toBe(true)
    } finally {
      unmount(path)
    }
  })

  test.skipIf(!bindfs)('bindfs, a FUSE file system, is a lower and no upper, for want of rename flags', async () => {
    const { path } = temporary()
    for (const name of ['source', 'm']) mkdirSync(`${path}/${name}`)
    const child = start(`${path}/log`, 'bindfs', '-f', `${path}/source`, `${path}/m`)
    try {
      execFileSync('sh', ['-c', `until mountpoint -q ${path}/m; do sleep 0.02; done`])
      const report = probe(hostPath(`${path}/m`))
      expect(report.fileSystem.type).toMatch(/^fuse/)
      expect(lacks(report)).toEqual(
        expect.arrayContaining(['renameNoReplace', 'renameExchange', 'renameWhiteout', 'tmpFiles', 'reflink']),
      )
      for (const able of ['whiteouts', 'trustedXattrs', 'dirEntryTypes', 'hardLinks', 'symlinks'] as const) {
        expect(report.abilities[able], able).toEqual({ value: true })
      }
      expect(report.canBeOverlayUpper).toMatchObject({ ok: false, missing: expect.arrayContaining(['renameWhiteout']) })
      expect(report.canBeOverlayLower.ok).toBe(true)
      expect(readdirSync(`${path}/source`)).toEqual([])
    } finally {
      unmount(`${path}/m`)
      await new Promise((resolve) => child.once('exit', resolve))
    }
  })

  test('an overlay is a lower, and no upper of another', () => {
    const { path } = temporary()
    for (const name of ['l', 'u', 'w', 'm']) mkdirSync(`${path}/${name}`)
    mount('overlay', `${path}/m`, 'overlay', 0, `lowerdir=${path}/l,upperdir=${path}/u,workdir=${path}/w`)
    try {
      const report = probe(hostPath(`${path}/m`))
      expect(report.fileSystem.type).toBe('overlay')
      expect(report.abilities.whiteouts.value).toBe(false)
      expect(report.canBeOverlayUpper.ok).toBe(false)
      expect(report.canBeOverlayLower.ok).toBe(true)
      expect(readdirSync(`${path}/u`).filter((name) => !name.startsWith('.lsync'))).toEqual([])
    } finally {
      unmount(`${path}/m`)
    }
  })

  test('on a read-only mount nothing is guessed, and the verdict on a lower still comes from a real mount', async () => {
    await withFileSystem('ext4', ({ root }) => {
      mkdirSync(`${root}/d`)
      run('mount', '-o', 'remount,ro', root)
      const report = probe(hostPath(root))
      expect(report.isReadOnly).toBe(true)
      expect(report.abilities.reflink).toEqual({ value: 'unknown', reason: 'the file system is read-only' })
      expect(report.abilities.dirEntryTypes).toEqual({ value: true })
      expect(report.abilities.fileHandles).toEqual({ value: true })
      expect(report.canBeOverlayUpper).toEqual({ ok: false, missing: [], unknown: 'the file system is read-only' })
      expect(report.canBeOverlayLower.ok).toBe(true)
      expect(probe(hostPath(`${root}/d`)).abilities.dirEntryTypes.value).toBe('unknown')
    })
  })

  test('on a full file system nothing is guessed either, and the scratch directory is gone', () => {
    const { path } = temporary()
    mount('tmpfs', path, 'tmpfs', 0, 'size=16k,nr_inodes=8')
    try {
      const report = probe(hostPath(path))
      expect(report.abilities.devices).toMatchObject({ value: 'unknown', reason: expect.stringContaining('ENOSPC') })
      expect(report.canBeOverlayUpper.ok).toBe(false)
      expect(readdirSync(path)).toEqual([])
    } finally {
      unmount(path)
    }
  })

  test('a failure half way leaves no directory and no mount behind', () => {
    const { path } = temporary()
    onTestFinished(() => setSyscallHook(undefined))
    setSyscallHook((syscall) => {
      if (syscall === 'fsopen') throw new Error('bug')
    })
    expect(() => probe(hostPath(path))).toThrow('bug')
    setSyscallHook(undefined)
    expect(readdirSync(path)).toEqual([])
    expect(mountsBeneath(hostPath(path))).toEqual([])
    expect(() => probe('/none' as HostPath)).toThrow(PosixError)
  })
})

describe.skipIf(!mayMount || !unprivileged)('probe without privileges', () => {
  const script = `
    import { hostPath, probe } from ${JSON.stringify(new URL('../../packages/posix/src/index.ts', import.meta.url).pathname)}
    console.log(JSON.stringify(probe(hostPath(process.argv[1]))))`

  function probeBy(command: string[], path: string): ProbeReport {
    const [program, ...args] = [...command, process.execPath, '--input-type=module', '-e', script, path]
    const { stdout, stderr, status } = spawnSync(program as string, args, { encoding: 'utf8' })
    expect(stderr).toBe('')
    expect(status).toBe(0)
    return JSON.parse(stdout)
  }

  test.each([
    ['an ordinary user', ['setpriv', '--reuid=1000', '--regid=1000', '--clear-groups']],
    ['root of a user namespace', ['unshare', '-U', '-r']],
  ])('%s learns what can be known, and why the rest cannot', (who, command) => {
    const { path } = temporary('/dev/shm')
    chmodSync(path, 0o777)
    const report = probeBy(command, path)
    expect(report.privileges.trustedXattrs).toBe(false)
    const unknown = (Object.keys(report.abilities) as Ability[]).filter(
      (name) => report.abilities[name].value === 'unknown',
    )
    expect(unknown.sort()).toEqual(
      who === 'an ordinary user'
        ? ['devices', 'fanotify', 'fileHandles', 'inodeFlags', 'keepsOwner', 'tmpFiles', 'trustedXattrs'].filter(
            (name) => unknown.includes(name as Ability),
          )
        : unknown,
    )
    for (const name of ['trustedXattrs', 'fanotify', 'devices', 'keepsOwner', 'inodeFlags'] as const) {
      expect(report.abilities[name], name).toMatchObject({
        value: 'unknown',
        reason: expect.stringContaining('needs CAP_'),
      })
    }
    expect(report.abilities.userXattrs.value).toBe(true)
    expect(report.abilities.hardLinks.value).toBe(true)
    expect(report.canBeOverlayUpper).toMatchObject({ ok: false, unknown: expect.any(String) })
    expect(readdirSync(path)).toEqual([])
  })

  test('a directory that may not be written gives unknown answers', () => {
    const { path } = temporary('/dev/shm')
    chmodSync(path, 0o755)
    const report = probeBy(['setpriv', '--reuid=1000', '--regid=1000', '--clear-groups'], path)
    expect(report.abilities.symlinks).toMatchObject({ value: 'unknown', reason: expect.stringContaining('EACCES') })
    expect(report.fileSystem.type).toBe('tmpfs')
  })
})

function hasVfat(): boolean {
  return isPresent('mkfs.vfat') && execFileSync('cat', ['/proc/filesystems']).toString().includes('\tvfat\n')
}
