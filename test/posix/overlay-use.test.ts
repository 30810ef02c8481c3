import { type ChildProcess, execFileSync, spawn } from 'node:child_process'
import { mkdirSync, readdirSync, renameSync, writeFileSync } from 'node:fs'
import { afterEach, describe, expect, onTestFinished, test } from 'vitest'
import {
  areUppersFree,
  bindMount,
  createFileSystem,
  createOverlay,
  hostPath,
  isUpperInUse,
  type MountWay,
  mountOverlay,
  overlayUsers,
  overlayUsersOf,
  readMountInfo,
  unmount,
  upperUse,
  useMountWay,
  withFd,
} from '../../packages/posix/src/index.ts'
import { mayMount } from './privileges.ts'
import { temporary } from './temporary.ts'

afterEach(() => useMountWay(undefined))

function stage() {
  const { path } = temporary('/dev/shm')
  for (const name of ['lower/in', 'data', 'base/upper/in', 'work', 'merged', 'free', 'alias']) {
    mkdirSync(`${path}/${name}`, { recursive: true })
  }
  const at = (name: string) => hostPath(`${path}/${name}`)
  const stack = {
    lowers: [at('lower'), at('free')],
    upper: at('base/upper'),
    work: at('work'),
  }
  const mount = () => {
    mountOverlay(stack, at('merged'))
    onTestFinished(() => {
      if (readMountInfo().some(({ target }) => target === at('merged'))) unmount(at('merged'), { lazy: true })
    })
  }
  const relations = (name: string) => overlayUsers(at(name)).uses.map(({ role, relation }) => `${role}: it ${relation}`)
  return { path, at, stack, mount, relations }
}

/** A shell in a mount namespace of its own, which is ready once it has printed a line. */
async function inNamespace(script: string): Promise<ChildProcess> {
  const child = spawn(
    'unshare',
    ['-m', '--propagation', 'private', 'sh', '-c', `${script}; echo ready; exec sleep 60`],
    {
      stdio: ['ignore', 'pipe', 'inherit'],
    },
  )
  onTestFinished(async () => {
    const gone = new Promise((resolve) => child.once('exit', resolve))
    child.kill('SIGKILL')
    await gone
  })
  await new Promise((resolve, reject) => {
    child.stdout?.once('data', resolve)
    child.once('exit', () => reject(new Error('the namespace ended')))
  })
  return child
}

describe.skipIf(!mayMount)('overlayUsers', () => {
  test('each role is found, for the layer, what is inside it and what contains it', () => {
    const { relations, mount, at } = stage()
    expect(relations('base/upper')).toEqual([])
    mount()
    expect(relations('base/upper')).toEqual(['upper: it is the layer'])
    expect(relations('base/upper/in')).toEqual(['upper: it is inside the layer'])
    expect(relations('base')).toEqual(['upper: it contains the layer'])
    expect(relations('work')).toEqual(['work: it is the layer'])
    expect(relations('lower')).toEqual(['lower: it is the layer'])
    expect(relations('data')).toEqual([])
    expect(overlayUsers(at('lower')).uses[0]).toMatchObject({ target: at('merged'), layer: at('lower') })
    unmount(at('merged'))
    expect(relations('base/upper')).toEqual([])
  })

  test('a directory is known by its inode: also through bind mounts of it or of what is in it', () => {
    const { relations, mount, at } = stage()
    mount()
    bindMount(at('base/upper'), at('alias'))
    try {
      expect(relations('alias')).toEqual(['upper: it is the layer'])
      expect(relations('alias/in')).toEqual(['upper: it is inside the layer'])
    } finally {
      unmount(at('alias'))
    }
    bindMount(at('base/upper/in'), at('alias'))
    try {
      expect(relations('alias')).toEqual(['upper: it is inside the layer'])
    } finally {
      unmount(at('alias'))
    }
  })

  test('a layer that was renamed since is unresolved, never another directory of the old name', () => {
    const { relations, mount, at, path } = stage()
    mount()
    renameSync(`${path}/base`, `${path}/renamed`)
    expect(overlayUsers(at('renamed/upper'))).toMatchObject({ uses: [], unresolved: [{ layer: at('base/upper') }] })
    mkdirSync(`${path}/base/upper`, { recursive: true })
    expect(relations('renamed/upper')).toEqual([])
    // The kernel is not deceived.
    expect(isUpperInUse(at('renamed/upper'))).toBe(true)
    expect(isUpperInUse(at('base/upper'))).toBe(false)
  })

  test('a layer that is mounted nowhere is not taken for the root directory, as which the kernel shows it', () => {
    const { stack, at } = stage()
    withFd(createFileSystem('tmpfs', undefined), (fd) => mountOverlay({ ...stack, lowers: [fd] }, at('merged')))
    try {
      const { uses, unresolved } = overlayUsers(hostPath('/'))
      expect(uses.filter(({ role, target }) => role === 'lower' && target === at('merged'))).toEqual([])
      expect(unresolved.filter(({ target }) => target === at('merged'))).toMatchObject([{ layer: '/' }])
    } finally {
      unmount(at('merged'))
    }
  })

  test.each<MountWay>(['fd', 'string', 'mount(2)'])('hostile names mounted by %s are resolved', (way) => {
    const { path } = temporary('/dev/shm')
    for (const odd of ['a b', ',', ':', '\\:', 'x\\', '\n', '\xff', '\\054']) {
      const base = Buffer.from(`${path}/${odd}`, 'latin1').toString('latin1')
      const at = (name: string) => `${base}/${name}` as ReturnType<typeof hostPath>
      for (const name of ['l', 'u', 'w', 'm']) mkdirSync(Buffer.from(at(name), 'latin1'), { recursive: true })
      useMountWay(way)
      mountOverlay({ lowers: [at('l')], upper: at('u'), work: at('w') }, at('m'))
      try {
        const roles = ['l', 'u', 'w'].map((name) => overlayUsers(at(name)).uses.map(({ role }) => role))
        expect(roles, odd).toEqual([['lower'], ['upper'], ['work']])
      } finally {
        unmount(at('m'))
      }
    }
  })

  test('an overlay in another mount namespace is found, with the process that sees it', async () => {
    const { relations, at, path } = stage()
    const options = `lowerdir=${path}/lower:${path}/free,upperdir=${path}/base/upper,workdir=${path}/work`
    const child = await inNamespace(`mount -t overlay overlay -o ${options} ${path}/merged`)
    expect(readdirSync(`${path}/merged`)).toEqual([])
    expect(relations('base/upper')).toEqual(['upper: it is the layer'])
    expect(relations('free')).toEqual(['lower: it is the layer'])
    expect(overlayUsers(at('free')).uses[0]?.pid).toBe(child.pid)
    expect(isUpperInUse(at('base/upper'))).toBe(true)
  })

  test('paths of another root are resolved in that root, its absolute symlinks included', async () => {
    const { relations, path } = stage()
    execFileSync('sh', ['-c', `cd ${path} && mkdir -p root/old root/link && ln -s /l root/s`])
    // In the new root the layers are /l, by way of the symlink /s, and /u; neither name means that on the host.
    await inNamespace(
      `cd ${path} && mount --bind root root && cd root && mkdir -p l u w m usr bin lib lib64 && for d in usr bin lib lib64; do mount --rbind /$d $d; done && pivot_root . old && cd / && mount -t overlay overlay -o lowerdir=/s,upperdir=/u,workdir=/w /m`,
    )
    expect(relations('root/u')).toEqual(['upper: it is the layer'])
    expect(relations('root/l')).toEqual(['lower: it is the layer'])
    expect(relations('root')).toHaveLength(3)
  })
})

describe.skipIf(!mayMount)('isUpperInUse', () => {
  test.each<MountWay>(['fd', 'string', 'mount(2)'])('by %s it leaves nothing behind, mounted or written', (way) => {
    const { at, mount, path } = stage()
    useMountWay(way)
    expect(isUpperInUse(at('base/upper'))).toBe(false)
    mount()
    expect(isUpperInUse(at('base/upper'))).toBe(true)
    expect(isUpperInUse(at('base/upper/in'))).toBe(true)
    expect(isUpperInUse(at('work'))).toBe(true)
    unmount(at('merged'))
    expect(isUpperInUse(at('base/upper'))).toBe(false)
    // Other test runs mount meanwhile, so only what is ours counts.
    const ours = readMountInfo().filter(({ target }) => target.includes('.lsync-scratch') || target.startsWith(path))
    expect(ours).toEqual([])
    expect(execFileSync('find', [`${path}/base`, '-printf', '%P\\n']).toString()).toBe('\nupper\nupper/in\n')
    expect(readdirSync('/tmp').filter((name) => name.startsWith('.lsync-scratch'))).toEqual([])
  })

  test('one question about several directories says no where one of them is in use, wherever it stands', () => {
    const { at, mount } = stage()
    const [used, free] = [at('base/upper'), at('lower')]
    expect(areUppersFree([used, free])).toBe(true)
    mount()
    expect(areUppersFree([used, free])).toBe(false)
    expect(areUppersFree([free, used])).toBe(false)
    const alone = [used, free].map((dir) => overlayUsers(dir))
    expect(overlayUsersOf([used, free])).toEqual(alone)
  })

  test('a lower and what contains an upper are free: those are for overlayUsers', () => {
    const { at, mount } = stage()
    mount()
    expect(isUpperInUse(at('lower'))).toBe(false)
    expect(isUpperInUse(at('base'))).toBe(false)
  })

  test('after a lazy unmount the upper is in use until the last file is closed', () => {
    const { at, mount, path, relations } = stage()
    mount()
    writeFileSync(`${path}/merged/f`, '')
    const child = spawn('sleep', ['60'], { cwd: `${path}/merged`, stdio: 'ignore' })
    try {
      execFileSync('sh', [
        '-c',
        `until [ "$(readlink /proc/${child.pid}/exe)" = "$(readlink -f "$(command -v sleep)")" ]; do sleep 0.01; done`,
      ])
      unmount(at('merged'), { lazy: true })
      expect(relations('base/upper')).toEqual([])
      expect(isUpperInUse(at('base/upper'))).toBe(true)
    } finally {
      child.kill('SIGKILL')
    }
    execFileSync('sh', ['-c', `while [ -e /proc/${child.pid}/cwd ]; do sleep 0.01; done`])
    expect(isUpperInUse(at('base/upper'))).toBe(false)
  })

  test('an overlay that is mounted nowhere holds its upper too', () => {
    const { at, stack } = stage()
    withFd(createOverlay(stack), () => expect(isUpperInUse(at('base/upper'))).toBe(true))
    expect(isUpperInUse(at('base/upper'))).toBe(false)
  })

  test('a directory that does not exist is an error, not free', () => {
    expect(() => isUpperInUse(hostPath('/none'))).toThrowError(expect.objectContaining({ code: 'ENOENT' }))
  })

  test('where the file system has no file handles, the answer is unknown and never no', () => {
    const sysfs = hostPath('/sys/kernel')
    expect(upperUse(sysfs)).toEqual({ unknown: 'the file system has no file handles' })
    expect(areUppersFree([sysfs])).toBe(false)
    expect(() => isUpperInUse(sysfs)).toThrowError(
      expect.objectContaining({ code: 'ENOTSUP', hint: expect.stringContaining('make sure') }),
    )
  })
})
