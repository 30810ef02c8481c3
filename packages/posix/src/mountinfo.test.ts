import { execFileSync } from 'node:child_process'
import { describe, expect, test } from 'vitest'
import type { ByteString } from './bytes.ts'
import { mountOf, mountsBeneath, overlayLayers, parseMountInfo, readMountInfo, realPath } from './mountinfo.ts'
import { AT_FDCWD, O_PATH, openat, withFd } from './open.ts'

const bytes = (text: string) => text as ByteString

function overlay(options: string) {
  const [mount] = parseMountInfo(bytes(`50 27 0:42 / /m rw - overlay none rw,${options}\n`))
  return overlayLayers(mount as NonNullable<typeof mount>)
}

describe('parseMountInfo', () => {
  test('every field is decoded, with any number of tags before the dash', () => {
    const line =
      '36 35 98:7 /mnt1 /mnt\\0402\\134\xff rw,noatime shared:1 master:2 - ext3 /dev/\\043r rw,errors=continue'
    expect(parseMountInfo(bytes(`${line}\n1 0 0:1 / / rw - tmpfs  rw\n`))).toEqual([
      {
        mountId: 36,
        parentId: 35,
        device: 98 * 2 ** 32 + 7,
        root: '/mnt1',
        target: '/mnt 2\\\xff',
        options: ['rw', 'noatime'],
        tags: ['shared:1', 'master:2'],
        type: 'ext3',
        source: '/dev/#r',
        superOptions: [{ name: 'rw' }, { name: 'errors', value: 'continue' }],
      },
      expect.objectContaining({ tags: [], source: '', type: 'tmpfs' }),
    ])
  })

  test('what findmnt sees of this machine is what is parsed', () => {
    const theirs = execFileSync('findmnt', ['-n', '-r', '-a', '-o', 'ID,FSTYPE,MAJ:MIN,TARGET']).toString()
    const ours = readMountInfo().map(({ mountId, type, device, target }) => {
      const escaped = target.replace(/[ \\]/g, (found) => `\\x${found.charCodeAt(0).toString(16)}`)
      return `${mountId} ${type} ${Math.floor(device / 2 ** 32)}:${device % 2 ** 32} ${escaped}`
    })
    expect(ours.sort()).toEqual(theirs.trim().split('\n').sort())
  })

  test('damaged lines are left out', () => {
    expect(parseMountInfo(bytes('\n1 2\n1 2 0:1 / / rw shared:1 ext4\n'))).toEqual([])
  })
})

describe('overlayLayers', () => {
  test('lowerdir is split at bare colons, a double colon begins the data-only layers', () => {
    expect(overlay('lowerdir=/a:/b\\134:c:/d::/e::/f')).toEqual([
      { role: 'lower', paths: ['/a'] },
      { role: 'lower', paths: ['/b:c'] },
      { role: 'lower', paths: ['/d'] },
      { role: 'data', paths: ['/e'] },
      { role: 'data', paths: ['/f'] },
    ])
    expect(overlay('lowerdir=a\\134\\134\\134::b')).toEqual([
      { role: 'lower', paths: ['a\\:'] },
      { role: 'lower', paths: ['b'] },
    ])
  })

  test('lowerdir+ and datadir+ are literal, one layer each', () => {
    expect(overlay('lowerdir+=/a:b\\134\\054,lowerdir+=/c,datadir+=/d\\012\xff')).toEqual([
      { role: 'lower', paths: ['/a:b\\,'] },
      { role: 'lower', paths: ['/c'] },
      { role: 'data', paths: ['/d\n\xff'] },
    ])
  })

  test('upper and work have a second reading only where a backslash could be an escape', () => {
    expect(overlay('lowerdir=/l,upperdir=/u\\134\\054,workdir=/w:x,index=off')).toEqual([
      { role: 'lower', paths: ['/l'] },
      { role: 'upper', paths: ['/u,', '/u\\,'] },
      { role: 'work', paths: ['/w:x'] },
    ])
  })
})

test('mountsBeneath gives the mounts below a directory and not one on it', () => {
  const beneath = mountsBeneath('/' as never).map(({ target }) => target)
  expect(beneath).toContain('/proc')
  expect(beneath).not.toContain('/')
  expect(mountsBeneath('/proc/../proc' as never).map(({ target }) => target)).not.toContain('/proc')
})

test('an fd knows its mount and its path', () => {
  withFd(openat(AT_FDCWD, bytes('/proc/version'), O_PATH), (fd) => {
    expect(mountOf(fd)).toMatchObject({ type: 'proc', target: '/proc' })
  })
  expect(realPath('/proc/self/../version' as never)).toBe('/proc/version')
})
