import { copyFileSync, mkdirSync, rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { findProgram, runCommand } from './command.ts'
import type { Scratch } from './scratch.ts'

const address = '10.99.0.1'
const emptyMetadata = '/var/lib/mfs/metadata.mfs.empty'

/** Programs that a MooseFS of the harness's own needs. */
export const moosefsPrograms = ['mfsmaster', 'mfschunkserver', 'mfsmount', 'mfsmakesnapshot'] as const

/** A MooseFS that runs. */
export type Moosefs = {
  /** Where it is mounted. */
  root: string
  /** Mounts it once more, by a client of its own with caches of its own, as another machine would. */
  mountAgain: (name: string) => { root: string; unmount: () => void }
  stop: () => void
}

/**
 * Starts a MooseFS of one master and one chunkserver, with its data in the scratch folder, and mounts it.
 *
 * Needs a network namespace of its own (`runIsolated`), for the chunkserver refuses a master on localhost, and the tools
 * find the master only from within. Returns the mount point, which allows `mfsmakesnapshot`, and a function that stops
 * everything.
 */
export async function startMoosefs(scratch: Scratch): Promise<Moosefs> {
  const folder = scratch.folder('moosefs')
  const removeFolder = scratch.onCleanup(() => rmSync(folder, { recursive: true, force: true }))
  const [meta, chunkMeta, chunks] = ['meta', 'chunk-meta', 'chunks'].map((name) => join(folder, name)) as [
    string,
    string,
    string,
  ]
  for (const path of [meta, chunkMeta, chunks]) mkdirSync(path)
  // The chunkserver counts all that is used on its disk against its limit, so it gets a disk of its own.
  runCommand(['mount', '-t', 'tmpfs', '-o', 'size=6g', 'chunks', chunks])
  const unmountDisk = scratch.onCleanup(() => runCommand(['umount', '--lazy', chunks]))
  const program = (name: string): string => findProgram(name) ?? name
  runCommand(['ip', 'link', 'set', 'lo', 'up'])
  runCommand(['ip', 'link', 'add', 'bench0', 'type', 'veth', 'peer', 'name', 'bench1'])
  const removeLinks = scratch.onCleanup(() => runCommand(['ip', 'link', 'delete', 'bench0']))
  runCommand(['ip', 'address', 'add', `${address}/24`, 'dev', 'bench0'])
  for (const link of ['bench0', 'bench1']) runCommand(['ip', 'link', 'set', link, 'up'])

  copyFileSync(emptyMetadata, join(meta, 'metadata.mfs'))
  const exportsFile = join(folder, 'exports.cfg')
  writeFileSync(exportsFile, `${address} / rw,alldirs,admin,maproot=0:0\n${address} . rw\n`)
  const masterFile = join(folder, 'master.cfg')
  const listen = ['MATOML', 'MATOCS', 'MATOCL'].map((name) => `${name}_LISTEN_HOST = ${address}`)
  writeFileSync(
    masterFile,
    [
      `DATA_PATH = ${meta}`,
      `EXPORTS_FILENAME = ${exportsFile}`,
      'WORKING_USER = root',
      'WORKING_GROUP = root',
      ...listen,
      '',
    ].join('\n'),
  )
  const diskFile = join(folder, 'disks.cfg')
  writeFileSync(diskFile, `${chunks}\n`)
  const chunkFile = join(folder, 'chunkserver.cfg')
  writeFileSync(
    chunkFile,
    [
      `DATA_PATH = ${chunkMeta}`,
      `HDD_CONF_FILENAME = ${diskFile}`,
      'HDD_LEAVE_SPACE_DEFAULT = 100MiB',
      'WORKING_USER = root',
      'WORKING_GROUP = root',
      ...['MASTER_HOST', 'BIND_HOST', 'CSSERV_LISTEN_HOST'].map((name) => `${name} = ${address}`),
      '',
    ].join('\n'),
  )
  const stops = [masterFile, chunkFile].map((file) => {
    const server = [program(file === masterFile ? 'mfsmaster' : 'mfschunkserver'), '-c', file]
    runCommand([...server, 'start'])
    return scratch.onCleanup(() => runCommand([...server, 'stop']))
  })
  const mountAgain: Moosefs['mountAgain'] = (name) => {
    const root = scratch.folder(name)
    runCommand([program('mfsmount'), root, '-H', address, '-o', 'suid,dev'])
    return { root, unmount: scratch.onCleanup(() => runCommand(['umount', '--lazy', root])) }
  }
  const { root, unmount } = mountAgain('moosefs-mount')
  // The mount comes up before the chunkserver has said hello; a write then waits or fails.
  for (let attempt = 0; ; attempt++) {
    await scratch.checkInterrupted()
    try {
      writeFileSync(join(root, '.ready'), 'ready')
      break
    } catch (error) {
      if (attempt > 50) throw error
      await new Promise((resolve) => setTimeout(resolve, 200))
    }
  }
  // Deleted files would keep their space for a day otherwise.
  runCommand(['mfssettrashtime', '0', root])
  return {
    root,
    mountAgain,
    stop: () => {
      unmount()
      for (const stop of stops.reverse()) stop()
      removeLinks()
      unmountDisk()
      removeFolder()
    },
  }
}
