import { mkdirSync } from 'node:fs'
import { close, type FileHandle, handleAt, handleKey, hostPath, mountedHandleAt, openRoot, withFd } from '@lsync/posix'
import { describe, expect, onTestFinished, test } from 'vitest'
import { mayMount } from '../../../../test/posix/privileges.ts'
import { temporary } from '../../../../test/posix/temporary.ts'
import { Ancestry, type AncestryLimits } from './ancestry.ts'

const handleOf = (path: string): FileHandle => withFd(openRoot(hostPath(path)), (fd) => handleAt(fd, '') as FileHandle)

function ancestryOf(path: string, limits: AncestryLimits): Ancestry<string> {
  const fd = openRoot(hostPath(path))
  onTestFinished(() => close(fd))
  return new Ancestry<string>(fd, mountedHandleAt(fd, '')?.mountId as number, limits)
}

const deep = (levels: number) => Array(levels).fill('d').join('/')

describe.skipIf(!mayMount)('beneath which root a directory lies', () => {
  test('is found at any depth within the limit, and is everybody beyond it', () => {
    const { path } = temporary('/dev/shm')
    mkdirSync(`${path}/in/${deep(20)}`, { recursive: true })
    mkdirSync(`${path}/out/${deep(20)}`, { recursive: true })
    const ancestry = ancestryOf(path, { directories: 1000, depth: 10 })
    ancestry.add(handleKey(handleOf(`${path}/in`)), 'root')
    expect(ancestry.ownersOf(handleOf(`${path}/in/${deep(6)}`))).toEqual(['root'])
    expect(ancestry.ownersOf(handleOf(`${path}/out/${deep(2)}`))).toEqual([])
    // Too deep to be told apart at once: too many hints are harmless, a missing one is not.
    expect(ancestry.ownersOf(handleOf(`${path}/out/${deep(20)}`))).toEqual(['root'])
    expect(ancestry.ownersOf(handleOf(`${path}/in/${deep(20)}`))).toEqual(['root'])
    // That spreads to nothing that is less deep.
    expect(ancestry.ownersOf(handleOf(`${path}/out/${deep(5)}`))).toEqual([])
  })

  test('is right again after more directories than are remembered', () => {
    const { path } = temporary('/dev/shm')
    mkdirSync(`${path}/in`)
    mkdirSync(`${path}/out`)
    const ancestry = ancestryOf(path, { directories: 8, depth: 100 })
    ancestry.add(handleKey(handleOf(`${path}/in`)), 'root')
    for (let i = 0; i < 30; i++) {
      for (const side of ['in', 'out']) mkdirSync(`${path}/${side}/${i}`)
      expect(ancestry.ownersOf(handleOf(`${path}/in/${i}`))).toEqual(['root'])
      expect(ancestry.ownersOf(handleOf(`${path}/out/${i}`))).toEqual([])
    }
  })

  test('is nobody for a directory that is gone, and for all once the root is no longer watched', () => {
    const { path } = temporary('/dev/shm')
    mkdirSync(`${path}/in/d`, { recursive: true })
    const ancestry = ancestryOf(path, { directories: 100, depth: 100 })
    const [root, inside] = [handleOf(`${path}/in`), handleOf(`${path}/in/d`)]
    for (const name of ['one', 'two']) ancestry.add(handleKey(root), name)
    expect(ancestry.ownersOf(inside)).toEqual(['one', 'two'])
    ancestry.remove(handleKey(root), 'one')
    expect(ancestry.ownersOf(inside)).toEqual(['two'])
    ancestry.remove(handleKey(root), 'two')
    expect(ancestry.ownersOf(inside)).toEqual([])
    const stale: FileHandle = { type: inside.type, bytes: Buffer.from(inside.bytes.map((byte) => byte ^ 0xff)) }
    expect(ancestry.ownersOf(stale)).toEqual([])
  })
})
