import { appendFileSync, copyFileSync, mkdirSync, writeFileSync } from 'node:fs'
import { setTimeout as delay } from 'node:timers/promises'
import { releaseTestDirectory, testDirectory } from './image.ts'
import type { Namespace } from './network.ts'
import { type Shared, useShared } from './shared.ts'
import { enterNetworkNamespace, isPresent, mount, run } from './system.ts'
import type { DiffOptions } from './tree.ts'

/** Whether the programs of MooseFS are installed. */
export const hasMooseFs = ['mfsmaster', 'mfschunkserver', 'mfsmount', 'mfsmakesnapshot'].every(isPresent)

/**
 * What MooseFS 3.0 cannot hold: times are whole seconds, chattr flags are not there, FUSE gives it no SEEK_HOLE, and a
 * symlink in a directory with a default ACL has the mode that a file would get.
 */
export const mooseFsLimits: DiffOptions = {
  timeGranularityNs: 1_000_000_000n,
  flags: false,
  holes: false,
  symlinkModes: false,
}

/** A mounted MooseFS of the test's own. This thread is in its network namespace until it is stopped. */
export interface MooseFs {
  readonly root: string
  fresh(): string
  /**
   * Gives a node of a network a line of its own to the master and the chunkserver. With the command that comes back the node mounts the
   * store by a client of its own, with caches of its own; the caller unmounts it.
   */
  connect(node: Namespace): (directory: string) => string
}

const ADDRESS = '10.99.0.1'

/** Starts a master and a chunkserver in a network namespace and mounts them. Stop with `stopMooseFs`. */
export async function startMooseFs(): Promise<MooseFs> {
  const base = `${testDirectory()}/moosefs`
  const root = `${testDirectory()}/moosefs-mount`
  const name = `lsync-test-${process.pid}`
  for (const path of [base, `${base}/meta`, `${base}/chunk-meta`, `${base}/chunks`, root]) mkdirSync(path)
  // Written first, so that whoever finds the directory of a killed run can stop what it started.
  appendFileSync(
    `${testDirectory()}/stop.sh`,
    `umount -l ${root}
mfschunkserver -c ${base}/chunkserver.cfg stop
mfsmaster -c ${base}/master.cfg stop
ip netns delete ${name}
`,
  )
  // The chunkserver counts all that is used on its disk against its limit, so it gets a disk of its own.
  mount('tmpfs', `${base}/chunks`, 'tmpfs', 0, 'size=3g')
  run('ip', 'netns', 'add', name)
  const inside = (...command: string[]) => run('ip', 'netns', 'exec', name, ...command)
  // The chunkserver refuses a master on localhost: a veth pair inside the namespace gives an address to both.
  inside('ip', 'link', 'set', 'lo', 'up')
  inside('ip', 'link', 'add', 'v0', 'type', 'veth', 'peer', 'name', 'v1')
  inside('ip', 'address', 'add', `${ADDRESS}/24`, 'dev', 'v0')
  inside('ip', 'link', 'set', 'v0', 'up')
  inside('ip', 'link', 'set', 'v1', 'up')
  copyFileSync('/var/lib/mfs/metadata.mfs.empty', `${base}/meta/metadata.mfs`)
  writeFileSync(`${base}/exports.cfg`, `* / rw,alldirs,admin,maproot=0:0\n* . rw\n`)
  writeFileSync(`${base}/disks.cfg`, `${base}/chunks\n`)
  const common = ['WORKING_USER = root', 'WORKING_GROUP = root']
  writeFileSync(
    `${base}/master.cfg`,
    [
      ...common,
      `DATA_PATH = ${base}/meta`,
      `EXPORTS_FILENAME = ${base}/exports.cfg`,
      ...['MATOML', 'MATOCS', 'MATOCL'].map((port) => `${port}_LISTEN_HOST = ${ADDRESS}`),
      '',
    ].join('\n'),
  )
  writeFileSync(
    `${base}/chunkserver.cfg`,
    [
      ...common,
      `DATA_PATH = ${base}/chunk-meta`,
      `HDD_CONF_FILENAME = ${base}/disks.cfg`,
      'HDD_LEAVE_SPACE_DEFAULT = 100MiB',
      ...['MASTER_HOST', 'BIND_HOST', 'CSSERV_LISTEN_HOST'].map((key) => `${key} = ${ADDRESS}`),
      '',
    ].join('\n'),
  )
  inside('mfsmaster', '-c', `${base}/master.cfg`, 'start')
  inside('mfschunkserver', '-c', `${base}/chunkserver.cfg`, 'start')
  run('nsenter', `--net=/var/run/netns/${name}`, 'mfsmount', root, '-H', ADDRESS, '-o', 'suid,dev')
  // After a lazy unmount the client can live on when its master went first.
  const client = run('pgrep', '-f', `^mfsmount .*${root}( |\\)|$)`).trim().split('\n').join(' ')
  appendFileSync(`${testDirectory()}/stop.sh`, `kill ${client} 2>/dev/null\n`)
  await untilWritable(`${root}/.ready`)
  // Deleted files would keep their space for a day otherwise.
  inside('mfssettrashtime', '0', root)
  // The engine's mfsmakesnapshot speaks to the master itself.
  leave = enterNetworkNamespace(`/var/run/netns/${name}`)
  let count = 0
  let lines = 0
  return {
    root,
    connect(node) {
      const line = ++lines
      const [here, there] = [`10.99.${line}.1`, `10.99.${line}.2`]
      inside('ip', 'link', 'add', `node${line}`, 'type', 'veth', 'peer', 'name', 'store', 'netns', node.name)
      inside('ip', 'address', 'add', `${here}/24`, 'dev', `node${line}`)
      inside('ip', 'link', 'set', `node${line}`, 'up')
      run('ip', '-n', node.name, 'address', 'add', `${there}/24`, 'dev', 'store')
      run('ip', '-n', node.name, 'link', 'set', 'store', 'up')
      run('ip', '-n', node.name, 'route', 'add', `${ADDRESS}/32`, 'via', here)
      return (directory) => `mfsmount ${directory} -H ${ADDRESS} -o suid,dev`
    },
    fresh() {
      const path = `${root}/t${++count}`
      mkdirSync(path)
      return path
    },
  }
}

/** The mount is there before the chunkserver has said hello to the master; until then writes fail. */
async function untilWritable(path: string): Promise<void> {
  for (let attempt = 0; ; attempt++) {
    try {
      writeFileSync(path, 'ready')
      return
    } catch (cause) {
      if (attempt > 100) throw cause
      await delay(100)
    }
  }
}

let leave: (() => void) | undefined

export function stopMooseFs(): void {
  leave?.()
  leave = undefined
  releaseTestDirectory()
}

/** Runs `use` on a MooseFS that is started for it and stopped afterwards, whatever happens. */
export async function withMooseFs<T>(use: (fs: MooseFs) => Promise<T>): Promise<T> {
  try {
    return await use(await startMooseFs())
  } finally {
    stopMooseFs()
  }
}

/** One MooseFS for all tests of the surrounding `describe`. */
export function useMooseFs(): Shared<MooseFs> {
  return useShared('MooseFS', startMooseFs, () => stopMooseFs())
}
