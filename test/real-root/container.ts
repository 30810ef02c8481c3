import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { run } from '../support/system.ts'

const CACHE = `${tmpdir()}/lsync-test-cache`

/** The path of a tar of a Debian root, made by debootstrap once for this machine, which takes a minute. */
export function debianTar(): string {
  const tar = `${CACHE}/debian-bookworm-minbase.tar`
  mkdirSync(CACHE, { recursive: true, mode: 0o700 })
  if (!existsSync(tar)) {
    const root = `${CACHE}/root-${process.pid}`
    try {
      run('debootstrap', '--variant=minbase', 'bookworm', root)
      run('tar', '--numeric-owner', '--xattrs', '--acls', '-C', root, '-cf', `${tar}.${process.pid}`, '.')
      renameSync(`${tar}.${process.pid}`, tar)
    } finally {
      rmSync(root, { recursive: true, force: true })
    }
  }
  return tar
}

/** The same without time zones, translations and manuals: half the entries, for stores that take milliseconds for each. */
export function slimDebianTar(): string {
  const slim = `${CACHE}/debian-bookworm-slim.tar`
  if (existsSync(slim)) return slim
  const leftOut = ['zoneinfo', 'locale', 'man'].map((name) => `--exclude=./usr/share/${name}/*`)
  run('bsdtar', ...leftOut, '-cf', `${slim}.${process.pid}`, `@${debianTar()}`)
  renameSync(`${slim}.${process.pid}`, slim)
  return slim
}

/** A Debian root made by debootstrap, unpacked into `directory`. */
export function unpackDebian(directory: string): void {
  const tar = debianTar()
  mkdirSync(directory)
  run('tar', '--numeric-owner', '--xattrs', '--xattrs-include=*', '--acls', '-C', directory, '-xf', tar)
}

/** Fetches Debian packages as files, without installing them. */
export function downloadPackages(directory: string, names: readonly string[]): void {
  mkdirSync(directory)
  const { status, stderr } = spawnSync('apt-get', ['download', '-q', ...names], { cwd: directory, encoding: 'utf8' })
  if (status !== 0) throw new Error(`apt-get download ended with ${status}: ${stderr}`)
}

interface Spec {
  process: { terminal: boolean; args: string[]; rlimits?: unknown; capabilities: Record<string, string[]> }
  root: { path: string; readonly: boolean }
  mounts: { destination: string; type?: string; source: string; options?: string[] }[]
  linux: { namespaces: { type: string }[]; resources?: unknown }
}

// What dpkg needs of a container: to change owners, modes and files of others.
const CAPABILITIES = ['CHOWN', 'DAC_OVERRIDE', 'FOWNER', 'FSETID', 'SETUID', 'SETGID', 'SETFCAP', 'SYS_CHROOT', 'KILL']

/** Makes a bundle for runc whose container has `root` as its root and runs a shell script; `packages` is seen at /packages. */
export function makeBundle(bundle: string, root: string, script: string, packages: string): void {
  mkdirSync(bundle)
  run('runc', 'spec', '--bundle', bundle)
  const spec = JSON.parse(readFileSync(`${bundle}/config.json`, 'utf8')) as Spec
  spec.process.terminal = false
  spec.process.args = ['/bin/sh', '-euc', script]
  delete spec.process.rlimits
  delete spec.linux.resources
  for (const set of Object.keys(spec.process.capabilities)) {
    spec.process.capabilities[set] = CAPABILITIES.map((name) => `CAP_${name}`)
  }
  spec.root = { path: root, readonly: false }
  spec.linux.namespaces = spec.linux.namespaces.filter(({ type }) => type !== 'cgroup')
  spec.mounts = spec.mounts.filter(({ type }) => type !== 'cgroup')
  spec.mounts.push({ destination: '/packages', type: 'bind', source: packages, options: ['bind', 'ro'] })
  writeFileSync(`${bundle}/config.json`, JSON.stringify(spec))
}

/** Runs a shell script by runc in a container whose root is `root`; `packages` is seen at /packages. */
export function runContainer(scratch: string, root: string, script: string, packages: string): string {
  const bundle = `${scratch}/bundle-${process.hrtime.bigint()}`
  makeBundle(bundle, root, script, packages)
  const id = `lsync-test-${process.pid}-${process.hrtime.bigint()}`
  const { status, stdout, stderr } = spawnSync('runc', ['--root', `${scratch}/runc`, 'run', '--bundle', bundle, id], {
    encoding: 'utf8',
    input: '',
  })
  if (status !== 0) throw new Error(`the container ended with ${status}: ${stdout}${stderr}`)
  return stdout
}
