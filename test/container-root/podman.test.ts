import { spawnSync } from 'node:child_process'
import { appendFileSync, copyFileSync, mkdirSync, realpathSync, writeFileSync } from 'node:fs'
import { dirname } from 'node:path'
import { describe, expect, test } from 'vitest'
import { lsyncPath } from '../cli/lsync.ts'
import { testDirectory, useFileSystem } from '../support/image.ts'
import { needs } from '../support/needs.ts'
import { canMountImages } from '../support/ready.ts'
import { isPresent, run } from '../support/system.ts'

/** A root with a shell in it, and what that needs. */
function makeBase(base: string): void {
  for (const name of ['bin', 'lib', 'dev', 'etc', 'proc', 'run', 'sys', 'tmp'])
    mkdirSync(`${base}/${name}`, { recursive: true })
  for (const name of ['sh', 'sleep', 'cat']) {
    const program = realpathSync(run('which', name).trim())
    copyFileSync(program, `${base}/bin/${name}`)
    for (const [library] of run('ldd', program).matchAll(/\/[^ \n]+/g)) {
      mkdirSync(`${base}${dirname(library)}`, { recursive: true })
      copyFileSync(library, `${base}${library}`)
    }
  }
}

/**
 * Both nodes are this machine, with a state each. crun takes no hybrid cgroups, so all of it is in a mount namespace in which there is
 * the second version alone; copies of what other tests have mounted go at once, since they would keep it in use.
 */
const SCRIPT = `
set -eu
umount --all --lazy --types overlay || :
mount -t cgroup2 none /sys/fs/cgroup
lsync() { "$LSYNC" "$@"; }
home=$AT/home
lsync root init lab --home $home --base $AT/base --state $AT/one >&2
for node in one two; do
  lsync hooks lab --home $home --state $AT/$node --preset podman --container lab-$node --stop-seconds 5 >&2
  podman create --name lab-$node --rootfs $AT/$node/roots/lab/merged /bin/sh -c \\
    'trap "exit 0" TERM; while :; do echo round >> /rounds; sleep 0.1; done' >&2
done
trap 'podman rm --force --time 0 lab-one lab-two >&2; for node in one two; do "$LSYNC" root unmount lab --state $AT/$node >&2 || :; done' EXIT
lsync root mount lab --state $AT/one >&2
podman start lab-one >&2
status() { podman inspect --format '{{.State.Status}}' lab-one lab-two | tr '\\n' ' '; }
until [ -s $AT/one/roots/lab/merged/rounds ]; do sleep 0.1; done
echo "before: $(status)"
echo one > $AT/one/roots/lab/merged/made
there() { lsync switch lab --to ssh://other$home --rsh $AT/rsh --remote-lsync "$LSYNC" --remote-state $AT/$2 --state $AT/$1; }
there one two >&2
echo "there: $(status)with $(cat $AT/two/roots/lab/merged/made)"
echo two > $AT/two/roots/lab/merged/made
there two one >&2
echo "back: $(status)with $(cat $AT/one/roots/lab/merged/made)"
`

describe.skipIf(
  !needs('root, podman, crun and file-system tools', canMountImages() && ['podman', 'crun'].every(isPresent)),
)('a container of podman', () => {
  const disk = useFileSystem('ext4')

  test('whose root is ours is stopped, switched to another node and started there by the preset, and comes back', () => {
    const at = disk.current.fresh()
    makeBase(`${at}/base`)
    for (const node of ['one', 'two']) mkdirSync(`${at}/${node}`, { mode: 0o700 })
    // Goes to the other node as ssh would.
    writeFileSync(`${at}/rsh`, '#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\nexec sh -c "$1"\n', { mode: 0o755 })
    const quoted = (path: string) => JSON.stringify(path)
    writeFileSync(
      `${at}/storage.conf`,
      `[storage]\ndriver = "vfs"\ngraphroot = ${quoted(`${at}/podman`)}\nrunroot = ${quoted(`${at}/podman-run`)}\n`,
    )
    writeFileSync(
      `${at}/containers.conf`,
      [
        '[containers]\ncgroups = "disabled"\nnetns = "none"\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]',
        `[engine]\nruntime = "crun"\ncgroup_manager = "cgroupfs"\nevents_logger = "none"\ntmp_dir = ${quoted(`${at}/podman-tmp`)}\n`,
      ].join('\n'),
    )
    const env = {
      ...process.env,
      AT: at,
      LSYNC: lsyncPath,
      CONTAINERS_CONF: `${at}/containers.conf`,
      CONTAINERS_STORAGE_CONF: `${at}/storage.conf`,
    }
    // What watches a container outlives a test that is killed.
    appendFileSync(
      `${testDirectory()}/stop.sh`,
      `for pid in $(pgrep conmon); do grep -qs ${at}/ /proc/$pid/cmdline && kill $pid; done\n`,
    )
    const { stdout, stderr, status } = spawnSync('unshare', ['--mount', 'sh', '-c', SCRIPT], { env, encoding: 'utf8' })
    expect({ stdout, stderr: status === 0 ? '' : stderr }).toEqual({
      stdout: 'before: running created \nthere: exited running with one\nback: running exited with two\n',
      stderr: '',
    })
  })
})
