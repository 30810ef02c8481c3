import { spawnSync } from 'node:child_process'
import {
  closeSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmdirSync,
  rmSync,
  writeFileSync,
} from 'node:fs'
import { afterAll, beforeAll } from 'vitest'
import { mount, run, unmount } from './system.ts'

export const fileSystemKinds = ['ext4', 'ext4-nodtype', 'xfs', 'btrfs', 'tmpfs'] as const
export type FileSystemKind = (typeof fileSystemKinds)[number]

/** A mounted file system of the test's own. */
export interface FileSystem {
  readonly kind: string
  readonly root: string
  /** The image that backs it, where there is one. */
  readonly image?: string
  /** A new empty directory on it. */
  fresh(): string
}

// Sizes: the smallest that mkfs takes (xfs wants 300 MiB) with room for the crash tests. The files are sparse in RAM.
const MAKE: Readonly<Record<Exclude<FileSystemKind, 'tmpfs'>, readonly string[]>> = {
  ext4: ['mkfs.ext4', '-q', '-F', '-b', '4096', '-N', '131072'],
  'ext4-nodtype': ['mkfs.ext4', '-q', '-F', '-b', '4096', '-N', '131072', '-O', '^filetype'],
  xfs: ['mkfs.xfs', '-q', '-f'],
  btrfs: ['mkfs.btrfs', '-q', '-f', '-M'],
}
const IMAGE_BYTES = 320 * 1024 * 1024
const BASE = '/dev/shm'
const PREFIX = 'lsync-test-'

let directory: string | undefined
let images = 0
let holders = 0
const mountPoints: string[] = []

/** This process's own directory in RAM. What a killed test run left behind is unmounted and removed first. */
export function testDirectory(): string {
  if (directory !== undefined) return directory
  for (const name of readdirSync(BASE)) {
    if (name.startsWith(PREFIX) && !isAlive(name.slice(PREFIX.length))) clear(`${BASE}/${name}`)
  }
  directory = `${BASE}/${PREFIX}${process.pid}`
  // A pid is used again some day; whatever has this name is from a run that ended.
  clear(directory)
  mkdirSync(directory)
  process.once('exit', () => {
    if (directory !== undefined) clear(directory)
  })
  return directory
}

function isAlive(pid: string): boolean {
  try {
    process.kill(Number(pid), 0)
    return true
  } catch (cause) {
    return (cause as NodeJS.ErrnoException).code === 'EPERM'
  }
}

function clear(path: string): void {
  // What else a test started says there how to stop it.
  if (existsSync(`${path}/stop.sh`)) spawnSync('sh', [`${path}/stop.sh`])
  const mounted = readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .map((line) => line.split(' ')[4] ?? '')
    .filter((target) => target.startsWith(`${path}/`))
  for (const target of mounted.reverse()) {
    try {
      unmount(target)
    } catch {
      // Busy: it went lazily, with the process that holds it.
    }
  }
  rmSync(path, { recursive: true, force: true })
}

/** Makes a file system in RAM and mounts it. The caller releases it with `releaseFileSystem`. */
export function acquireFileSystem(kind: FileSystemKind): FileSystem {
  const id = ++images
  const root = `${testDirectory()}/fs${id}`
  mkdirSync(root)
  if (kind === 'tmpfs') {
    mount('tmpfs', root, 'tmpfs', 0, 'size=1g,mode=755')
    mountPoints.push(root)
    return handle(kind, root)
  }
  const image = `${testDirectory()}/image${id}`
  writeFileSync(image, '')
  run('truncate', '-s', String(IMAGE_BYTES), image)
  const [command, ...args] = MAKE[kind]
  run(command as string, ...args, image)
  mountImage(image, root, kind)
  mountPoints.push(root)
  return handle(kind, root, image)
}

/** Mounts an image through a loop device that goes away by itself with the mount. */
export function mountImage(image: string, root: string, kind: string): void {
  const type = kind === 'ext4-nodtype' ? 'ext4' : kind
  // The machine has eight loop devices, shared with other test runs: wait for one rather than fail.
  for (let attempt = 0; ; attempt++) {
    let loop: string
    try {
      loop = run('losetup', '-f', '--show', image).trim()
    } catch (cause) {
      if (attempt >= 100) throw cause
      Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 300)
      continue
    }
    try {
      mount(loop, root, type, 0, type === 'xfs' ? 'nouuid' : '')
    } finally {
      run('losetup', '-d', loop)
    }
    return
  }
}

function handle(kind: string, root: string, image?: string): FileSystem {
  let count = 0
  return {
    kind,
    root,
    ...(image === undefined ? {} : { image }),
    fresh() {
      const path = `${root}/t${++count}`
      mkdirSync(path)
      return path
    },
  }
}

/** Unmounts what `acquireFileSystem` made; the loop device and the image go with it. */
export function releaseFileSystem(fileSystem: FileSystem): void {
  const at = mountPoints.indexOf(fileSystem.root)
  if (at < 0) return
  mountPoints.splice(at, 1)
  // What a failed test left open would keep the mount, and with it the loop device.
  for (const { fd } of descriptorsBelow(fileSystem.root)) closeSync(fd)
  try {
    unmount(fileSystem.root)
    if (fileSystem.image !== undefined) rmSync(fileSystem.image, { force: true })
    rmdirSync(fileSystem.root)
  } finally {
    releaseWhenUnused()
  }
}

/** Keeps `testDirectory` for something else that lives in it, until the function that comes back is called. */
export function holdTestDirectory(): () => void {
  holders += 1
  return () => {
    holders -= 1
    releaseWhenUnused()
  }
}

function releaseWhenUnused(): void {
  // Vitest ends its workers without their exit handlers.
  if (mountPoints.length === 0 && holders === 0) releaseTestDirectory()
}

/** Stops, unmounts and removes everything in `testDirectory`. */
export function releaseTestDirectory(): void {
  if (directory !== undefined) clear(directory)
  mountPoints.length = 0
  holders = 0
  directory = undefined
}

/** Runs `use` on a new file system of this kind, which is gone afterwards whatever happens. */
export async function withFileSystem<T>(kind: FileSystemKind, use: (fs: FileSystem) => Promise<T> | T): Promise<T> {
  const fileSystem = acquireFileSystem(kind)
  try {
    return await use(fileSystem)
  } finally {
    releaseFileSystem(fileSystem)
  }
}

/** One file system for all tests of the surrounding `describe` (or file): made before them, gone after them. */
export function useFileSystem(kind: FileSystemKind): { readonly current: FileSystem } {
  let fileSystem: FileSystem | undefined
  beforeAll(() => {
    fileSystem = acquireFileSystem(kind)
  })
  afterAll(() => {
    if (fileSystem !== undefined) releaseFileSystem(fileSystem)
  })
  return {
    get current() {
      if (fileSystem === undefined) throw new Error('the file system exists only while tests run')
      return fileSystem
    },
  }
}

/** What this process holds open there, by its path from `directory` on. */
export function descriptorsBelow(directory: string): { fd: number; path: string }[] {
  return readdirSync('/proc/self/fd').flatMap((fd) => {
    try {
      const target = readlinkSync(`/proc/self/fd/${fd}`)
      return target === directory || target.startsWith(`${directory}/`)
        ? [{ fd: Number(fd), path: target.slice(directory.length) }]
        : []
    } catch {
      return [] // the descriptor of this very listing
    }
  })
}
